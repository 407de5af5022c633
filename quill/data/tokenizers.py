r"""Tokenizers: text to token ids and back, and their description in JSON. Files are left to token_files.py.

A tokenizer is made for a stream or for documents. A stream is one long text, and its ids are its tokens. Each document
starts with one more id, BOS. Of characters and bytes, it is the last of the vocabulary. A document is one of two kinds:

    a line      BOS replaces the newline in both directions: "\nanna\nbob" is `BOS a n n a BOS b o b`.
    any text    BOS is decoded to nothing, and newlines are tokens like others. Documents of BPE are always so.

Shapes: T tokens in a text.
"""

import codecs
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from quill.data import bpe
from quill.errors import UserError


class Tokenizer:
    """Base class. A subclass sets `kind`, its name in --tokenizer and in JSON, and implements `encode`.

    size, vocab_size: the number of ids, without and with a BOS that follows them.
    bos: the id that starts a document; None for a stream.
    tokens: the bytes that each id is decoded to.
    special: the names of the ids that no text is encoded to. Only BPE has them.
    """

    kind: str
    special: dict[int, str] = {}
    newline = "\n"  # replaces an empty prompt of a stream

    def __init__(self, tokens: list[bytes], is_documents: bool, bos_is_newline: bool) -> None:
        """is_documents: the text is a set of documents, not a stream. bos_is_newline: each of them is a line."""
        self.tokens, self.size = tokens, len(tokens)
        self.is_documents = is_documents
        self.bos_is_newline = is_documents and bos_is_newline
        self.bos = min(self.special, default=self.size) if is_documents else None
        if self.bos is not None:  # it replaces a token, or is one more
            self.tokens[self.bos : self.bos + 1] = [b"\n" if bos_is_newline else b""]
        self.vocab_size = len(self.tokens)

    def encode(self, text: str) -> np.ndarray:
        """Encode `text` to its ids (T,), int64. Raise a UserError if the vocabulary lacks a character."""
        raise NotImplementedError

    def encode_all(self, texts: Iterable[str]) -> list[np.ndarray]:
        """Encode each of `texts`. → their ids, (T,) each"""
        return [self.encode(text) for text in texts]

    def encode_documents(self, documents: Iterable[str]) -> np.ndarray:
        """Encode documents, each with BOS before it, to the ids of all (T,), int64."""
        if self.bos_is_newline:
            return self.encode("\n".join(["", *documents]))
        bos = np.array([self.bos])
        return np.concatenate([bos[:0], *(part for ids in self.encode_all(documents) for part in (bos, ids))])

    def decode(self, ids: Sequence[int] | np.ndarray, errors: str = "replace") -> str:
        """Decode `ids` to text, with a newline for a BOS that replaces one. errors: as in `bytes.decode`."""
        return self.decoder(errors)(ids, final=True)

    def decoder(self, errors: str = "replace") -> Callable[..., str]:
        """Return a function `decode(ids, final=False) -> str` for ids that arrive a few at a time.

        It returns whole characters only: the bytes of an unfinished one are kept for the next call. With final=True
        they are decoded too. errors: what happens to bytes that are not UTF-8, as in `bytes.decode`.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        return lambda ids, final=False: utf8.decode(b"".join(self.tokens[i] for i in ids), final)

    def prompt(self, text: str) -> np.ndarray:
        """Encode `text` as a prompt (T,), T ≥ 1. A document starts with BOS, an empty stream with a newline."""
        if self.is_documents:
            return self.encode_documents([text])
        return self.encode(text or self.newline)

    def token_bytes(self) -> np.ndarray:
        """Return how many UTF-8 bytes of text each id stands for, (vocab_size,) int64; 0 for special tokens."""
        return np.array([0 if i in self.special else len(token) for i, token in enumerate(self.tokens)])

    def to_json(self) -> dict[str, Any]:
        """Return the description in meta.json and in checkpoints, from which `from_json` makes an equal tokenizer."""
        own_bos = self.is_documents and not self.bos_is_newline
        return {"kind": self.kind, "documents": self.is_documents} | ({"bos_is_newline": False} if own_bos else {})

    def __eq__(self, other: object) -> bool:
        """Return whether both encode every text to the same ids."""
        return isinstance(other, Tokenizer) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.kind, self.is_documents, self.size))


class CharTokenizer(Tokenizer):
    """A token is a character. Its id is its rank among the distinct characters of the text, by code point."""

    kind = "char"

    def __init__(self, chars: Iterable[str], is_documents: bool = False, bos_is_newline: bool = True) -> None:
        """chars: the characters of the vocabulary, in any order and with repetitions, so a whole text will do."""
        self.chars = "".join(sorted(set(chars) - ({"\n"} if is_documents and bos_is_newline else set())))
        super().__init__([char.encode(errors="replace") for char in self.chars], is_documents, bos_is_newline)
        if "\n" not in self.chars:
            self.newline = self.chars[:1]
        codes = code_points(self.chars + ("\n" if self.bos_is_newline else ""))  # id → code point
        # Code point → id, or -1 for unknown ones. `take` clips code points that are too high to the last entry, a -1.
        self.ids = np.full(int(codes.max(initial=0)) + 2, -1)
        self.ids[codes] = np.arange(len(codes))

    def encode(self, text: str) -> np.ndarray:
        """Encode `text` to its ids (T,), int64; T is the number of characters."""
        codes = code_points(text)
        ids = self.ids.take(codes, mode="clip")
        if ids.min(initial=0) < 0:
            raise unknown(chr(code) for code in np.unique(codes[ids < 0]))
        return ids

    def to_json(self) -> dict[str, Any]:
        """Return the description, with the characters in the order of their ids."""
        return super().to_json() | {"chars": self.chars}


class ByteTokenizer(Tokenizer):
    """A token is a byte of the text's UTF-8. There are 256 ids and BOS, so every text can be encoded."""

    kind = "byte"

    def __init__(self, is_documents: bool = False, bos_is_newline: bool = True) -> None:
        super().__init__([bytes([byte]) for byte in range(256)], is_documents, bos_is_newline)

    def encode(self, text: str) -> np.ndarray:
        """Encode `text` to its ids (T,), int64; T is the number of bytes."""
        ids = np.frombuffer(to_utf8(text), np.uint8).astype(np.int64)
        return np.where(ids == ord("\n"), self.size, ids) if self.bos_is_newline else ids


class BPETokenizer(Tokenizer):
    """A token is a sequence of bytes, found by byte-level BPE: see bpe.py.

    A special token, such as <|endoftext|>, is decoded to its name. BOS is the first of them, or one more id at the end
    if there is none, and is decoded to nothing.
    """

    kind = "bpe"

    def __init__(self, description: Any, is_documents: bool = False) -> None:
        """description: the object of a tokenizer.json. Raise a UserError if it is not byte-level BPE."""
        bpe.check_package()
        tokens, self.special, self.encoder_json = bpe.read_description(description)
        super().__init__(tokens, is_documents, bos_is_newline=False)
        self.description = description

    @cached_property
    def encoder(self) -> Any:
        """The object of the package `tokenizers`, which is imported when a text is first encoded."""
        from tokenizers import Tokenizer as Encoder

        return Encoder.from_str(self.encoder_json)

    def encode(self, text: str) -> np.ndarray:
        """Encode `text` to its ids (T,), int64. Special tokens in it are ordinary text."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Iterable[str]) -> list[np.ndarray]:
        """Encode each of `texts`, on all cores. → their ids, (T,) each"""
        cuts = []
        for text in texts:
            to_utf8(text)  # raises the error for half of a surrogate pair
            cuts.append([*bpe.cut_stream([text])])
        pieces = [piece for some in cuts for piece in some]
        # Only a batch uses several threads, after which a process should not be forked. A prompt is one piece.
        if len(pieces) == 1:
            encodings = [self.encoder.encode(pieces[0], add_special_tokens=False)]
        else:
            encodings = self.encoder.encode_batch_fast(pieces, add_special_tokens=False)
        ids = (np.array(encoding.ids, np.int64) for encoding in encodings)
        return [np.concatenate([*islice(ids, len(some))]) for some in cuts]

    def to_json(self) -> dict[str, Any]:
        """Return the description, with the object of the tokenizer.json."""
        return super().to_json() | {"tokenizer": self.description}


# How each kind is made of its description, for documents as given: is_documents, bos_is_newline.
KINDS: dict[str, Callable[[dict[str, Any], bool, bool], Tokenizer]] = {
    "char": lambda values, *documents: CharTokenizer(values["chars"], *documents),
    "byte": lambda values, *documents: ByteTokenizer(*documents),
    "bpe": lambda values, is_documents, _: BPETokenizer(values.get("tokenizer"), is_documents),
}


def from_json(values: Any) -> Tokenizer:
    """Make the tokenizer that `Tokenizer.to_json` described. Raise a UserError if `values` is not one."""
    values = values if isinstance(values, dict) else {}
    kind, is_documents, bos_is_newline = values.get("kind"), values.get("documents"), values.get("bos_is_newline", True)
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"tokenizer kind {kind!r:.80} is not known here; the kinds are {', '.join(KINDS)}")
    has_data = kind != "char" or isinstance(values.get("chars"), str)
    if isinstance(is_documents, bool) and isinstance(bos_is_newline, bool) and has_data:
        tokenizer = KINDS[kind](values, is_documents, bos_is_newline)
        # Ids are ranks. Characters in another order would decode to another text, so they are refused and not sorted.
        if not isinstance(tokenizer, CharTokenizer) or tokenizer.chars == values["chars"]:
            return tokenizer
    raise UserError(f"the description of the {kind} tokenizer is damaged")


def code_points(text: str) -> np.ndarray:
    """Return the code points of `text`, (T,) uint32. Half of a surrogate pair is a code point too."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def to_utf8(text: str) -> bytes:
    """Encode `text`. Raise a UserError for half of a surrogate pair, which a command line may hold, but UTF-8 can't."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise unknown(sorted({char for char in text if "\ud800" <= char <= "\udfff"})) from None


def unknown(chars: Iterable[str]) -> UserError:
    """Make the error that names characters which a vocabulary lacks, twenty at most, and their number."""
    names = [ascii(char) if "\ud800" <= char <= "\udfff" else repr(char) for char in chars]
    some = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    count = "1 character that is" if len(names) == 1 else f"{len(names)} characters that are"
    return UserError(f"{some} ({count} not in the vocabulary)")
