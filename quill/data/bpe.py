"""Byte-level BPE, as in GPT-2 (Radford et al. 2019): check a tokenizer.json, train one, cut a text into pieces.

A tokenizer.json describes a tokenizer of the package `tokenizers`. Only byte-level BPE is accepted, because it encodes
every text and gives exactly that text back. A vocabulary names each byte by a character: see `byte_of_character`.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from quill.errors import UserError

SPECIAL = "<|endoftext|>"  # the special token of a tokenizer that is trained here, as in GPT-2
SAMPLE = 2**30  # bytes of text that a tokenizer is trained on, at most
LONGEST_PIECE = 10_000  # characters that are encoded at once
# A word ends before a space, so a cut there changes no id. A text without spaces is cut before a newline.
BORDER = re.compile(r".*\S(?= )|.*\S(?=\n)", re.DOTALL)
# The one pattern beside GPT-2's, that of GPT-4 and Llama 3. Others are refused: some make the package's regex fail.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Vocabulary:
    """What `read_description` reads from a tokenizer.json."""

    tokens: list[bytes]  # the bytes of each id; for a special token, those of its name
    special: set[int]  # the ids of special tokens, which no text is encoded to
    encoder: str  # a tokenizer.json without special tokens, for the package


def check_package() -> None:
    """Raise a UserError if the package `tokenizers` is missing."""
    if find_spec("tokenizers") is None:
        raise UserError("a BPE tokenizer needs a package: pip install tokenizers")


def call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function of `tokenizers`. Raise a UserError if it fails, even by a panic, which is no Exception."""
    try:
        return function(*args, **options)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"the package tokenizers fails: {str(error)[:200]}") from None


def byte_of_character() -> dict[str, int]:
    """Return GPT-2's names of the bytes: {character: byte}. A printable byte of Latin-1 has its own character."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted({*range(256)} - {*printable})
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def cut(text: str) -> tuple[list[str], str]:
    """Cut `text` into pieces of at most LONGEST_PIECE characters, and the rest, which the next text may continue."""
    pieces, start = [], 0
    while len(text) - start > LONGEST_PIECE:
        border = BORDER.match(text, start, start + LONGEST_PIECE + 1)
        end = border.end() if border else start + LONGEST_PIECE
        pieces.append(text[start:end])
        start = end
    return pieces, text[start:]


def cut_stream(texts: Iterable[str]) -> Iterator[str]:
    """Join `texts` and cut the result into pieces. How it was divided into `texts` changes nothing."""
    rest = ""
    for text in texts:
        pieces, rest = cut(rest + text)
        yield from pieces
    yield rest


def train(pieces: Iterator[str], vocab_size: int) -> dict[str, Any]:
    """Train a tokenizer with at most `vocab_size` ids on the first SAMPLE bytes of `pieces`.

    Returns:
        The object of its tokenizer.json. The last id is that of the special token. A short text gives fewer ids.
    """
    check_package()
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    def sample() -> Iterator[str]:
        left = SAMPLE
        while left > 0 and (piece := next(pieces, None)) is not None:
            yield piece
            left -= len(piece.encode())

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, most = pre_tokenizers.ByteLevel.alphabet(), vocab_size - 1
    trainer = trainers.BpeTrainer(vocab_size=most, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    call(tokenizer.train_from_iterator, sample(), trainer)
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True, normalized=False)])
    return json.loads(tokenizer.to_str())


# ---------------------------------------------------------------- descriptions


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def describe(vocab: Any, merges: str) -> dict[str, Any]:
    """Return the object of a tokenizer.json for GPT-2's two files: `vocab` from vocab.json, the text of merges.txt.

    The tokens that no merge gives, such as <|endoftext|>, are special.
    """
    lines = [line for line in merges.splitlines() if line and not line.startswith("#version")]
    special = vocab.keys() - byte_of_character().keys() - {line.replace(" ", "") for line in lines}
    return {
        "version": "1.0",
        "added_tokens": [{"id": vocab[token], "content": token} | FLAGS for token in sorted(special, key=vocab.get)],
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocab, "merges": lines},
    }


def read_description(values: Any) -> Vocabulary:
    """Check the object of a tokenizer.json. Raise a UserError unless it is byte-level BPE that keeps every text."""
    try:
        return _read(values)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise UserError(f"not the tokenizer.json of a BPE tokenizer ({type(error).__name__}: {error})") from None


def check(is_right: bool, problem: str) -> None:
    """Raise a UserError about a tokenizer that is not accepted, unless `is_right`."""
    if not is_right:
        raise UserError(f"not a byte-level BPE tokenizer that quill reads: {problem}")


def _read(values):
    model, added, byte_of = values["model"], values.get("added_tokens") or [], byte_of_character()
    check(model.get("type", "BPE") == "BPE", f"its model is {model.get('type')!r}")
    check(not model.get("dropout"), "it leaves out merges at random (dropout)")
    check(not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")), "it marks parts of words")
    check(values.get("normalizer") is None, "its normalizer changes the text")
    check(all(token["special"] is True for token in added), "it has added tokens that are not special")
    special = {token["id"]: token["content"] for token in added}
    vocab = {token: i for token, i in model["vocab"].items() if token not in special.values()}
    ids = [*vocab.values(), *special]
    check(all(type(i) is int for i in ids) and sorted(ids) == [*range(len(ids))], "its ids are not 0, 1, 2, and so on")
    check({*"".join(vocab)} <= byte_of.keys(), "a token is not made of bytes")
    check(byte_of.keys() <= vocab.keys(), f"it lacks {len(byte_of.keys() - vocab.keys())} of the 256 bytes")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    check(all({a, b, a + b} <= vocab.keys() for a, b in merges), "a merge has a token that is not in the vocabulary")
    tokens = [b""] * len(ids)
    for token, i in vocab.items():
        tokens[i] = bytes(byte_of[char] for char in token)
    for i, name in special.items():
        tokens[i] = name.encode()
    encoder = {"version": "1.0", "added_tokens": [], "pre_tokenizer": _read_pre_tokenizer(values["pre_tokenizer"])}
    ignore_merges = model.get("ignore_merges") is True
    encoder["model"] = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": ignore_merges}
    return Vocabulary(tokens, set(special), json.dumps(encoder))


def _read_pre_tokenizer(values):
    """Return what splits a text into words, with the fields that are known here only."""
    *first, last = values["pretokenizers"] if values["type"] == "Sequence" else [values]
    check(last["type"] == "ByteLevel" and last["add_prefix_space"] is False, "its pre_tokenizer is not GPT-2's")
    steps = []
    for step in first:
        if step["type"] == "Digits":
            steps.append({"type": "Digits", "individual_digits": step["individual_digits"] is True})
        else:
            pattern = {"Regex": SPLIT_PATTERN}
            known = step["type"] == "Split" and step["pattern"] == pattern and step["behavior"] == "Isolated"
            check(known and step["invert"] is False, "its pre_tokenizer is neither GPT-2's nor Llama 3's")
            steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
    steps.append(BYTE_LEVEL | {"use_regex": last.get("use_regex", True) is True})
    return {"type": "Sequence", "pretokenizers": steps}
