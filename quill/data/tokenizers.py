"""Text ↔ token ids: one small base, a class for each kind, to and from JSON. Files are token_files.py's.

Text that is one long stream has the ids of its tokens and nothing else. Text that is a set of documents has one id
more, the last: BOS, which starts every document. It stands where the text has a newline, in both directions, so
"\nanna\nbob" is `BOS a n n a BOS b o b` and back.
"""

import codecs

import numpy as np

from quill.errors import UserError


class Tokenizer:
    """What every kind has. A subclass sets `kind`, and `size`: how many ids there are without BOS."""

    kind: str
    size: int

    def __init__(self, is_documents=False):
        self.is_documents = is_documents

    @property
    def vocab_size(self):
        return self.size + self.is_documents

    @property
    def bos(self):
        """The id that starts a document; None for a stream."""
        return self.size if self.is_documents else None

    def encode(self, text):
        """`text` → its ids (T,), int64. A UserError names the characters that the vocabulary lacks."""
        raise NotImplementedError

    def decode(self, ids, errors="replace"):
        """`ids` → text. BOS is a newline."""
        return self.stream(errors)(ids, final=True)

    def stream(self, errors="replace"):
        """A function `(ids, final=False) → text` for ids that come a few at a time: it returns whole characters only.

        It keeps an unfinished character for the next call; `final` says that there is none. errors: what becomes of
        bytes that are no character, as in `bytes.decode`.
        """
        raise NotImplementedError

    def prompt(self, text):
        """`text` → the ids to generate from, at least one: a new document, or for an empty text a new line."""
        if self.is_documents:
            return self.encode("\n" + text)
        return self.encode(text or self.newline())

    def newline(self):
        return "\n"

    def to_json(self):
        return {"kind": self.kind, "documents": self.is_documents}

    def __eq__(self, other):
        return isinstance(other, Tokenizer) and self.to_json() == other.to_json()

    def __hash__(self):
        return hash(tuple(self.to_json().values()))


class CharTokenizer(Tokenizer):
    """A token is a character; its id is its rank among `chars`, the text's distinct characters, by code point."""

    kind = "char"

    def __init__(self, chars, is_documents=False):
        super().__init__(is_documents)
        self.chars = "".join(sorted(set(chars) - ({"\n"} if is_documents else set())))
        self.size = len(self.chars)
        self.codes = code_points(self.chars + ("\n" if is_documents else ""))  # id → code point
        # Code point → id or -1. The last entry is for all code points above the highest known one, which `take` clips.
        self.ids = np.full(int(self.codes.max(initial=0)) + 2, -1)
        self.ids[self.codes] = np.arange(len(self.codes))

    def encode(self, text):
        codes = code_points(text)
        ids = self.ids.take(codes, mode="clip")
        if ids.min(initial=0) < 0:
            raise unknown(chr(code) for code in np.unique(codes[ids < 0]))
        return ids

    def stream(self, errors="replace"):
        def decode(ids, final=False):
            return self.codes[np.asarray(ids, dtype=np.int64)].tobytes().decode("utf-32-le", "surrogatepass")

        return decode

    def newline(self):
        return "\n" if "\n" in self.chars else self.chars[0]

    def to_json(self):
        return super().to_json() | {"chars": self.chars}


class ByteTokenizer(Tokenizer):
    """A token is a byte of the text's UTF-8, so every text has ids; 256 of them, and BOS."""

    kind = "byte"
    size = 256

    def encode(self, text):
        try:
            ids = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        except UnicodeEncodeError:  # half of a surrogate pair, which no UTF-8 file holds but a command line may
            raise unknown(sorted({char for char in text if "\ud800" <= char <= "\udfff"})) from None
        return np.where(ids == ord("\n"), self.bos, ids) if self.is_documents else ids

    def stream(self, errors="replace"):
        utf8 = codecs.getincrementaldecoder("utf-8")(errors)

        def decode(ids, final=False):
            ids = np.asarray(ids, dtype=np.int64)
            return utf8.decode(np.where(ids == self.bos, ord("\n"), ids).astype(np.uint8).tobytes(), final)

        return decode


KINDS = {kind.kind: kind for kind in (CharTokenizer, ByteTokenizer)}


def from_json(values):
    """The tokenizer that `to_json` described. A UserError where the description is not one of ours."""
    values = values if isinstance(values, dict) else {}
    kind, is_documents, chars = (values.get(key) for key in ("kind", "documents", "chars"))
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"tokenizer kind {kind!r} is not known here; the kinds are {', '.join(KINDS)}")
    if isinstance(is_documents, bool):
        if kind == "byte":
            return ByteTokenizer(is_documents)
        # Ids are ranks, so characters in another order would decode to another text: refused, not sorted.
        if isinstance(chars, str) and (tokenizer := CharTokenizer(chars, is_documents)).chars == chars:
            return tokenizer
    raise UserError(f"the description of the {kind} tokenizer is damaged")


def code_points(text):
    """The code points of `text`, (T,) uint32; half of a surrogate pair is one of its own."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def unknown(chars):
    chars = [ascii(char) if "\ud800" <= char <= "\udfff" else repr(char) for char in chars]
    some = ", ".join(chars[:20]) + (", …" if len(chars) > 20 else "")
    count = "1 character that is" if len(chars) == 1 else f"{len(chars)} characters that are"
    return UserError(f"{some} ({count} not in the vocabulary)")
