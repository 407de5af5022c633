"""Byte-level BPE, as in GPT-2 (Radford et al. 2019): check a tokenizer.json, train one, cut a text into pieces.

A tokenizer.json describes a tokenizer of the package `tokenizers`. It is accepted only if it splits words as GPT-2 does
and encodes every text so that decoding gives exactly that text back.
"""

import json
import re
import signal
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

from quill.errors import UserError, check

SPECIAL = "<|endoftext|>"  # the special token of a tokenizer that is trained here, as in GPT-2
SAMPLE = 2**28  # bytes of text that a tokenizer is trained on, at most
LONGEST_PIECE = 10_000  # characters that are encoded at once
# A word ends before a space, so a cut there changes no id. A text without spaces is cut before a newline.
BORDER = re.compile(r".*\S(?= )|.*\S(?=\n)", re.DOTALL)


def check_package() -> None:
    """Raise a UserError if the package `tokenizers` is missing."""
    check(find_spec("tokenizers"), "a BPE tokenizer needs a package: pip install tokenizers")


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


def train(pieces: Iterable[str], size: int, vocab_size: int) -> dict[str, Any]:
    """Train a tokenizer with at most `vocab_size` ids. A short text gives fewer. → the object of its tokenizer.json

    size: about the number of bytes in all `pieces`. If it exceeds SAMPLE, pieces from the whole text are left out.
    """
    check_package()
    from tokenizers import models, pre_tokenizers, trainers

    def sample() -> Iterator[str]:
        read = taken = 0
        for piece in pieces:
            length = len(piece.encode())
            read += length
            if taken * size <= read * SAMPLE:
                taken += length
                yield piece

    settings = {"vocab_size": vocab_size - 1, "min_frequency": 2, "show_progress": False}
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **settings)
    tokenizer, handler = gpt2_like(models.BPE()), signal.getsignal(signal.SIGINT)
    # The package would delay Python's Ctrl-C until it is done. Nothing is written yet, so the process may end at once.
    signal.signal(signal.SIGINT, signal.SIG_IGN if handler is signal.SIG_IGN else signal.SIG_DFL)
    try:
        tokenizer.train_from_iterator(sample(), trainer)
    finally:
        signal.signal(signal.SIGINT, handler)
    tokenizer.add_special_tokens([SPECIAL])
    return json.loads(tokenizer.to_str())


def read_gpt2_files(vocab: dict[str, int], merges: str) -> dict[str, Any]:
    """Read vocab.json, already parsed, and the text of merges.txt. → the object of a tokenizer.json

    The tokens that no merge gives, such as <|endoftext|>, are special.
    """
    check_package()
    from tokenizers import models

    lines = [line for line in merges.splitlines() if line and not line.startswith("#version")]
    pairs = [(a, b) for a, b in (line.split(" ") for line in lines)]
    special = vocab.keys() - byte_of_character().keys() - {a + b for a, b in pairs}
    tokenizer = gpt2_like(models.BPE(vocab, pairs))
    tokenizer.add_special_tokens(sorted(special, key=vocab.__getitem__))
    return json.loads(tokenizer.to_str())


def gpt2_like(model: Any) -> Any:
    """Return a tokenizer of the package with the BPE `model` and GPT-2's split into words."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer: Any = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_of_character() -> dict[str, int]:
    """Return GPT-2's names of the bytes: {character: byte}. A printable byte of Latin-1 has its own character."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted({*range(256)} - {*printable})
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def read_description(values: Any) -> tuple[list[bytes], dict[int, str], str]:
    """Read the object of a tokenizer.json. Raise a UserError if it is not byte-level BPE, or does not keep every text.

    → the bytes of each id, where a special token has those of its name; the special tokens' names by id; a
    tokenizer.json without them, so that no text is encoded to one
    """
    try:
        json.dumps(values, ensure_ascii=False).encode()  # meta.json can hold it
        return _read_description(values)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(f"not the tokenizer.json of a BPE tokenizer ({type(error).__name__}: {error})") from None


def _read_description(values):
    model, added, byte_of = values["model"], values.get("added_tokens") or [], byte_of_character()
    check(model.get("type", "BPE") == "BPE", f"its model is {model.get('type')!r}, not BPE")
    check(not model.get("dropout"), "it leaves out merges at random (dropout)")
    check(not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")), "it marks parts of words")
    check(values.get("normalizer") is None, "its normalizer changes the text")
    words = values["pre_tokenizer"]
    is_gpt2s = words["type"] == "ByteLevel" and words["add_prefix_space"] is False and words.get("use_regex", True)
    check(is_gpt2s is True, "its pre_tokenizer is not GPT-2's, ByteLevel without add_prefix_space")
    check(all(token["special"] is True for token in added), "it has added tokens that are not special")
    special = {token["id"]: token["content"] for token in added}
    reserved = set(special.values())
    vocab = {token: i for token, i in model["vocab"].items() if token not in reserved}
    ids = [*vocab.values(), *special]
    check(all(type(i) is int for i in ids) and sorted(ids) == [*range(len(ids))], "its ids are not 0, 1, 2, and so on")
    check(set("".join(vocab)) <= byte_of.keys() <= vocab.keys(), "its tokens are not made of GPT-2's 256 bytes")
    merges = [merge.split(" ") if isinstance(merge, str) else [*merge] for merge in model["merges"]]
    check(all({a, b, a + b} <= vocab.keys() for a, b in merges), "a merge has a token that is not in the vocabulary")
    tokens = {i: bytes(byte_of[char] for char in token) for token, i in vocab.items()}
    tokens |= {i: name.encode() for i, name in special.items()}
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": model.get("ignore_merges") is True}
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    encoder = {"version": "1.0", "added_tokens": [], "pre_tokenizer": words, "model": model}
    return [tokens[i] for i in range(len(ids))], special, json.dumps(encoder)
