r"""Tokenizers: text to token ids and back, and their description in JSON. Files are left to token_files.py.

A tokenizer is made for a stream or for documents. A stream is one long text, and its ids are its tokens. Documents are
short texts, one per line; each of them starts with one more id, BOS, which is the last of the vocabulary. BOS replaces
the newline in both directions: "\nanna\nbob" is `BOS a n n a BOS b o b`.

Shapes: T tokens in a text.
"""

import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from quill.errors import UserError


class Tokenizer:
    """Base class. A subclass sets `kind` and `size`, and implements `encode` and `decoder`.

    kind: its name in --tokenizer and in JSON.
    size: the number of ids, without BOS.
    """

    kind: str
    size: int

    def __init__(self, is_documents: bool = False) -> None:
        """is_documents: the text is a set of documents, one per line, and not a stream."""
        self.is_documents = is_documents

    @property
    def vocab_size(self) -> int:
        """The number of ids, with BOS."""
        return self.size + self.is_documents

    @property
    def bos(self) -> int | None:
        """The id that starts a document; None for a stream."""
        return self.size if self.is_documents else None

    def encode(self, text: str) -> np.ndarray:
        """Encode `text` to its ids (T,), int64. Raise a UserError if the vocabulary lacks a character."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int] | np.ndarray, errors: str = "replace") -> str:
        """Decode `ids` to text, with a newline for BOS. errors: as in `bytes.decode`."""
        return self.decoder(errors)(ids, final=True)

    def decoder(self, errors: str = "replace") -> Callable[..., str]:
        """Return a function `decode(ids, final=False) -> str` for ids that arrive a few at a time.

        It returns whole characters only: the bytes of an unfinished one are kept for the next call. With final=True
        they are decoded too. errors: what happens to bytes that are not UTF-8, as in `bytes.decode`.
        """
        raise NotImplementedError

    def prompt(self, text: str) -> np.ndarray:
        """Encode `text` as a prompt: the ids (T,), T ≥ 1, that generation continues.

        Documents start with BOS. For a stream, an empty prompt is a newline.
        """
        if self.is_documents:
            return self.encode("\n" + text)
        return self.encode(text or self.newline())

    def newline(self) -> str:
        """Return the text that replaces an empty prompt of a stream."""
        return "\n"

    def token_bytes(self) -> np.ndarray:
        """Return how many UTF-8 bytes of text each id stands for, (vocab_size,) int64. BOS stands for a newline."""
        texts = (self.decode([i], "surrogateescape") for i in range(self.vocab_size))
        return np.array([len(text.encode(errors="replace")) for text in texts])  # a byte of a longer character is a "?"

    def to_json(self) -> dict[str, Any]:
        """Return the description in meta.json and in checkpoints, from which `from_json` makes an equal tokenizer."""
        return {"kind": self.kind, "documents": self.is_documents}

    def __eq__(self, other: object) -> bool:
        """Return whether both encode every text to the same ids."""
        return isinstance(other, Tokenizer) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        """Equal tokenizers have equal hashes."""
        return hash(tuple(self.to_json().values()))


class CharTokenizer(Tokenizer):
    """A token is a character. Its id is its rank among the distinct characters of the text, by code point."""

    kind = "char"

    def __init__(self, chars: Iterable[str], is_documents: bool = False) -> None:
        """chars: the characters of the vocabulary, in any order and with repetitions, so a whole text will do."""
        super().__init__(is_documents)
        self.chars = "".join(sorted(set(chars) - ({"\n"} if is_documents else set())))
        self.size = len(self.chars)
        self.codes = code_points(self.chars + ("\n" if is_documents else ""))  # id → code point
        # Code point → id, or -1 for unknown ones. `take` clips code points that are too high to the last entry, a -1.
        self.ids = np.full(int(self.codes.max(initial=0)) + 2, -1)
        self.ids[self.codes] = np.arange(len(self.codes))

    def encode(self, text: str) -> np.ndarray:
        """Encode `text` to its ids (T,), int64; T is the number of characters."""
        codes = code_points(text)
        ids = self.ids.take(codes, mode="clip")
        if ids.min(initial=0) < 0:
            raise unknown(chr(code) for code in np.unique(codes[ids < 0]))
        return ids

    def decoder(self, errors: str = "replace") -> Callable[..., str]:
        """Return the decoding function. Every id is a whole character, so it keeps nothing between calls."""

        def decode(ids: Sequence[int] | np.ndarray, final: bool = False) -> str:
            return self.codes[np.asarray(ids, dtype=np.int64)].tobytes().decode("utf-32-le", "surrogatepass")

        return decode

    def newline(self) -> str:
        """Return a newline, or the first character of a vocabulary without one."""
        return "\n" if "\n" in self.chars else self.chars[0]

    def to_json(self) -> dict[str, Any]:
        """Return the description, with the characters in the order of their ids."""
        return super().to_json() | {"chars": self.chars}


class ByteTokenizer(Tokenizer):
    """A token is a byte of the text's UTF-8. There are 256 ids and BOS, so every text can be encoded."""

    kind = "byte"
    size = 256

    def encode(self, text: str) -> np.ndarray:
        """Encode `text` to its ids (T,), int64; T is the number of bytes."""
        try:
            ids = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        except UnicodeEncodeError:  # half of a surrogate pair: UTF-8 can't express it, but a command line may hold one
            raise unknown(sorted({char for char in text if "\ud800" <= char <= "\udfff"})) from None
        return np.where(ids == ord("\n"), self.size, ids) if self.is_documents else ids

    def decoder(self, errors: str = "replace") -> Callable[..., str]:
        """Return the decoding function, which keeps the bytes of an unfinished character between calls."""
        utf8 = codecs.getincrementaldecoder("utf-8")(errors)

        def decode(ids: Sequence[int] | np.ndarray, final: bool = False) -> str:
            ids = np.asarray(ids, dtype=np.int64)
            return utf8.decode(np.where(ids == self.bos, ord("\n"), ids).astype(np.uint8).tobytes(), final)

        return decode


KINDS: dict[str, type[Tokenizer]] = {kind.kind: kind for kind in (CharTokenizer, ByteTokenizer)}


def from_json(values: Any) -> Tokenizer:
    """Make the tokenizer that `Tokenizer.to_json` described. Raise a UserError if `values` is not one."""
    values = values if isinstance(values, dict) else {}
    kind, is_documents, chars = (values.get(key) for key in ("kind", "documents", "chars"))
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"tokenizer kind {kind!r} is not known here; the kinds are {', '.join(KINDS)}")
    if isinstance(is_documents, bool):
        if kind == "byte":
            return ByteTokenizer(is_documents)
        # Ids are ranks. Characters in another order would decode to another text, so they are refused and not sorted.
        if isinstance(chars, str) and (tokenizer := CharTokenizer(chars, is_documents)).chars == chars:
            return tokenizer
    raise UserError(f"the description of the {kind} tokenizer is damaged")


def code_points(text: str) -> np.ndarray:
    """Return the code points of `text`, (T,) uint32. Half of a surrogate pair is a code point too."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def unknown(chars: Iterable[str]) -> UserError:
    """Make the error that names characters which a vocabulary lacks, twenty at most, and their number."""
    names = [ascii(char) if "\ud800" <= char <= "\udfff" else repr(char) for char in chars]
    some = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    count = "1 character that is" if len(names) == 1 else f"{len(names)} characters that are"
    return UserError(f"{some} ({count} not in the vocabulary)")
