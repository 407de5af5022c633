"""From texts to ids: scan a text for its tokenizer and its length, split it for training and validation, encode it.

A stream is split once: its first nine tenths are for training, in characters (bytes with the byte tokenizer). BPE
encodes the two parts as two texts. Of documents, about a tenth are for validation. The checksum of its text decides in
which split a document is, so equal documents are in the same split. Blank documents are left out.
"""

from __future__ import annotations

import hashlib
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, compress

import numpy as np

from quill.data import bpe
from quill.data.texts import Texts
from quill.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, code_points
from quill.errors import UserError

SplitIds = tuple[np.ndarray, np.ndarray]  # a piece of each split: ids for training, ids for validation


@dataclass(frozen=True)
class Scan:
    """What `scan_text` finds out about a text."""

    tokenizer: Tokenizer
    length: int  # in bytes with the byte tokenizer, else in characters
    sha256: str  # of the files
    moved: str | None  # the document that is moved to the other split, because that split would be empty


def scan_text(text: Texts, tokenizer: Tokenizer | str, vocab_size: int) -> Scan:
    """Read a text for the first time, for its length and, where `tokenizer` is the name of a kind, its vocabulary.

    Raise a UserError if there is too little text for two splits.
    """
    kind = tokenizer if isinstance(tokenizer, str) else tokenizer.kind
    known, length, digest = np.zeros(sys.maxunicode + 1, bool), 0, hashlib.sha256()
    sides: set[bool] = set()  # the splits that get a document
    ends: list[str] = []  # the first and the last document in sorted order

    def scanned() -> Iterator[list[str]]:
        nonlocal length, ends
        for strings in text.pieces(digest):
            yield strings
            if text.is_documents and len(sides) < 2:
                sides.update(in_val(strings).tolist())
                ends = [min(strings + ends), max(strings + ends)]
            joined = "".join(strings)
            if kind == "char":
                codes = code_points(joined)
                if not known.take(codes).all():  # reading `known` is faster than writing to it
                    known[codes] = True
            length += len(joined.encode()) if kind == "byte" else len(joined)

    strings = chain.from_iterable(scanned())
    if tokenizer == "bpe":
        pieces = chain.from_iterable(bpe.cut_stream([document]) for document in strings)
        pieces = pieces if text.is_documents else bpe.cut_stream(strings)
        tokenizer = BPETokenizer(bpe.train(pieces, text.size, vocab_size), text.is_documents)
    deque(strings, maxlen=0)  # read all; BPE has done so
    if length == 0:
        raise UserError(f"{text.name}: there is no text in it")
    if text.is_documents and len(set(ends)) == 1:
        raise UserError(f"{text.name}: has one distinct document, but train and val need two that differ")
    if length == 1:
        raise UserError(f"{text.name}: has one token, but train and val need at least one each")
    chars = "".join(map(chr, np.flatnonzero(known)))
    try:  # here, so that nothing is written yet
        if isinstance(tokenizer, CharTokenizer):
            tokenizer.encode(chars)
    except UserError as error:
        raise UserError(f"{text.name}: {error}; --tokenizer=char makes a vocabulary of the text's own") from None
    if not isinstance(tokenizer, Tokenizer):
        settings = text.is_documents, text.documents == "lines"
        tokenizer = CharTokenizer(chars, *settings) if kind == "char" else ByteTokenizer(*settings)
    return Scan(tokenizer, length, digest.hexdigest(), ends[1] if len(sides) == 1 else None)


def encode_splits(text: Texts, scan: Scan) -> Iterator[SplitIds]:
    """Read a text for the second time and yield its ids in pieces. Raise a UserError if it has changed."""
    digest, train_left, tokenizer = hashlib.sha256(), scan.length * 9 // 10, scan.tokenizer
    pieces = text.pieces(digest)
    if text.is_documents:
        for documents in pieces:
            is_val = in_val(documents, scan.moved)
            train, val = ([*compress(documents, side)] for side in (~is_val, is_val))
            yield tokenizer.encode_documents(train), tokenizer.encode_documents(val)
    elif isinstance(tokenizer, BPETokenizer):
        none = np.empty(0, np.int64)
        for train, val in split_stream(chain.from_iterable(pieces), train_left):
            train_ids, val_ids = (np.concatenate([none, *tokenizer.encode_all(part)]) for part in (train, val))
            yield train_ids, val_ids
    else:
        for (piece,) in pieces:
            ids = tokenizer.encode(piece)
            yield ids[:train_left], ids[train_left:]
            train_left = max(0, train_left - len(ids))
    if digest.hexdigest() != scan.sha256:
        raise UserError(f"{text.name}: changed while it was read; run the command again")


def split_stream(texts: Iterable[str], train_left: int) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the pieces of a stream, its first `train_left` characters for training, the others for validation."""
    train_rest = val_rest = ""
    for text in texts:
        train, train_rest = bpe.cut(train_rest + text[:train_left])
        val, val_rest = bpe.cut(val_rest + text[train_left:])
        train_left = max(0, train_left - len(text))
        yield train, val
    yield [train_rest], [val_rest]


def in_val(documents: list[str], moved: str | None = None) -> np.ndarray:
    """Return which of `documents` are for validation, (len(documents),) bool. `moved`, if any, changes its split."""
    sums = np.fromiter(map(zlib.crc32, map(str.encode, documents)), np.uint32, len(documents))
    return (sums % 10 == 0) != [document == moved for document in documents] if moved else sums % 10 == 0
