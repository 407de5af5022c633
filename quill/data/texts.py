"""Text files to ids: find and read them, scan a text for its tokenizer and its length, split it and encode it.

A text may be larger than memory. A byte-order mark is dropped, and every kind of line end is read as a newline.

A stream is split once: its first nine tenths are for training, in characters (bytes with the byte tokenizer). BPE
encodes the two parts as two texts. Of documents, about a tenth are for validation. The checksum of its text decides in
which split a document is, so equal documents are in the same split. Blank documents are left out.
"""

import codecs
import glob
import hashlib
import io
import json
import os
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, compress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from quill.data import bpe
from quill.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, code_points
from quill.errors import UserError, check

CHUNK = 2**20  # bytes of text in memory at a time
LONGEST_DOCUMENT = 2**24  # characters; a document is in memory as a whole

SplitIds = tuple[np.ndarray, np.ndarray]  # a piece of each split: ids for training, ids for validation


def find_texts(names: str | Path) -> list[Path]:
    """Return the files that --input names: a file, or files and patterns such as texts/*.txt, with commas between."""
    if os.path.exists(names):  # unlike Path.exists, it answers without the permission to look
        paths = [str(names)]
    else:
        paths = [path for part in str(names).split(",") for path in sorted(glob.glob(part, recursive=True)) or [part]]
    for path in paths:
        if not os.path.isfile(path):
            reason = "not a regular file" if os.path.exists(path) else "no such file"
            raise UserError(f"{path or names}: {reason}; --input=FILE names a text")
    return [*map(Path, paths)]


class Texts:
    """UTF-8 text files, read one after the other. A document ends where its file ends."""

    def __init__(self, paths: list[Path], documents: str, bar: tqdm) -> None:
        """documents: as in --documents. bar: the progress bar to update with the number of bytes read."""
        self.paths, self.documents, self.bar = paths, documents, bar
        self.is_documents = documents != "none"
        self.name = ", ".join(map(str, paths))  # for messages
        self.size = sum(path.stat().st_size for path in paths)  # in bytes

    def pieces(self) -> Iterator[list[str]]:
        """Read the files and yield lists of documents, or of a stream [some text]. None of these strings is empty.

        `digest` is then the SHA-256 of the files.
        """
        self.digest = hashlib.sha256()
        for path in self.paths:
            if not self.is_documents:
                yield from ([text] for text in self.decoded(path))
                continue
            documents = self.lines(path)
            if self.documents == "blank_lines":
                documents = paragraphs(documents, path)
            elif self.documents.startswith("jsonl:"):
                documents = json_fields(documents, path, self.documents.removeprefix("jsonl:"))
            for some in documents:
                if some := list(filter(str.strip, some)):
                    yield some

    def lines(self, path: Path) -> Iterator[list[str]]:
        """Read a file and yield its lines, a list at a time."""
        rest = ""
        for text in self.decoded(path):
            *lines, rest = (rest + text).split("\n")
            check_length(len(rest), path)
            yield lines
        yield [rest]

    def decoded(self, path: Path) -> Iterator[str]:
        """Yield a file's text in pieces, none of them empty. Raise a UserError if it can't be read as UTF-8."""
        newlines = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
        at, chunk = 0, b"-"
        try:
            with open(path, "rb") as file:
                while chunk:
                    chunk = file.read(CHUNK)
                    self.digest.update(chunk)
                    mark = len(codecs.BOM_UTF8) if at == 0 and chunk.startswith(codecs.BOM_UTF8) else 0
                    at += len(chunk)
                    if text := newlines.decode(chunk[mark:], final=not chunk):
                        yield text
                    self.bar.update(len(chunk))
        except UnicodeDecodeError as error:
            # error.object ends at byte `at` of the file, but it may begin in an earlier chunk.
            at += error.start - len(error.object)
            place = f"byte {at} (line {line_number(path, at)})"
            raise UserError(f"{path}: not UTF-8 at {place}: {error.reason}; save it as UTF-8") from None
        except OSError as error:
            raise UserError(f"{path}: can't be read: {error.strerror}") from None


def line_number(path: Path, at: int) -> int:
    """Return the number of the line with byte `at` of a file, from 1."""
    newlines, line = io.IncrementalNewlineDecoder(None, translate=True), 1
    with open(path, "rb") as file:
        for start in range(0, at, CHUNK):
            line += newlines.decode(file.read(min(CHUNK, at - start)).decode("latin-1")).count("\n")
    return line + newlines.decode("", True).count("\n")


def check_length(characters: int, path: Path) -> None:
    """Raise a UserError if a document of so many characters is too long."""
    if characters > LONGEST_DOCUMENT:
        raise UserError(f"{path}: a document is longer than {LONGEST_DOCUMENT:,} characters; see --documents")


def paragraphs(lines: Iterable[list[str]], path: Path) -> Iterator[list[str]]:
    """Join the lines between blank lines to documents, and yield these, a list at a time."""
    document = []
    for some in chain(lines, [[""]]):
        done = []
        for line in some:
            if line.strip():
                document.append(line)
            elif document:
                done.append("\n".join(document))
                document = []
        check_length(sum(map(len, document)), path)
        yield done


def json_fields(lines: Iterable[list[str]], path: Path, field: str) -> Iterator[list[str]]:
    """Yield the text in `field` of the JSON object on each line, a list at a time. Blank lines are left out."""
    number = 0
    for some in lines:
        documents = []
        for line in some:
            number += 1
            try:
                if line.strip():
                    documents.append(json.loads(line)[field])
                    documents[-1].encode()
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
                problem = f"not a JSON object with a text in {field!r}; see --documents"
                raise UserError(f"{path}, line {number}: {problem}") from None
        yield documents


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
    known, length = np.zeros(sys.maxunicode + 1, bool), 0
    sides: set[bool] = set()  # the splits that get a document
    ends: list[str] = []  # the first and the last document in sorted order

    def scanned() -> Iterator[list[str]]:
        nonlocal length, ends
        for strings in text.pieces():
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
    check(length, f"{text.name}: there is no text in it")
    if text.is_documents and len(set(ends)) == 1:
        raise UserError(f"{text.name}: has one distinct document, but train and val need two that differ")
    check(length > 1, f"{text.name}: has one token, but train and val need at least one each")
    chars = "".join(map(chr, np.flatnonzero(known)))
    try:  # here, so that nothing is written yet
        if isinstance(tokenizer, CharTokenizer):
            tokenizer.encode(chars)
    except UserError as error:
        raise UserError(f"{text.name}: {error}; --tokenizer=char makes a vocabulary of the text's own") from None
    if not isinstance(tokenizer, Tokenizer):
        settings = text.is_documents, text.documents == "lines"
        tokenizer = CharTokenizer(chars, *settings) if kind == "char" else ByteTokenizer(*settings)
    return Scan(tokenizer, length, text.digest.hexdigest(), ends[1] if len(sides) == 1 else None)


def encode_splits(text: Texts, scan: Scan) -> Iterator[SplitIds]:
    """Read a text for the second time and yield its ids in pieces. Raise a UserError if it has changed."""
    pieces, train_left, tokenizer = text.pieces(), scan.length * 9 // 10, scan.tokenizer
    if text.is_documents:
        for documents in pieces:
            is_val = in_val(documents, scan.moved)
            train, val = ([*compress(documents, side)] for side in (~is_val, is_val))
            yield tokenizer.encode_documents(train), tokenizer.encode_documents(val)
    elif isinstance(tokenizer, BPETokenizer):
        for train, val in split_stream(chain.from_iterable(pieces), train_left):
            yield tokenizer.encode(train), tokenizer.encode(val)
    else:
        for (piece,) in pieces:
            ids = tokenizer.encode(piece)
            yield ids[:train_left], ids[train_left:]
            train_left = max(0, train_left - len(ids))
    check(text.digest.hexdigest() == scan.sha256, f"{text.name}: changed while it was read; run the command again")


def split_stream(texts: Iterable[str], train_left: int) -> Iterator[tuple[str, str]]:
    """Yield a stream in parts that end between words. Its first `train_left` characters are for training."""
    train_rest = val_rest = ""
    for text in texts:
        train, train_rest = bpe.cut(train_rest + text[:train_left])
        val, val_rest = bpe.cut(val_rest + text[train_left:])
        train_left = max(0, train_left - len(text))
        yield "".join(train), "".join(val)
    yield train_rest, val_rest


def in_val(documents: list[str], moved: str | None = None) -> np.ndarray:
    """Return which of `documents` are for validation, (len(documents),) bool. `moved`, if any, changes its split."""
    sums = np.fromiter(map(zlib.crc32, map(str.encode, documents)), np.uint32, len(documents))
    return (sums % 10 == 0) != [document == moved for document in documents] if moved else sums % 10 == 0
