"""Write a text file as token files, and open them: data/<dataset>/{train.bin, val.bin, meta.json}.

The .bin files are raw little-endian uint16 (uint32 above 65,535 ids) and nothing else, so other tools can read them.
meta.json describes them and holds their SHA-256. The same text always gives the same bytes.

A stream is split once: the first nine tenths of its tokens are for training. Of documents, one per line, about a tenth
are for validation. The checksum of its text decides in which split a document is, so equal documents are in the same
split. Blank lines are not documents.

How a text is tokenized is left to tokenizers.py, and where the known corpora are found to corpora.py.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import operator
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from tqdm import tqdm

from quill.cli import did_you_mean
from quill.data.corpora import CORPORA, Corpus, locate
from quill.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, code_points, from_json
from quill.errors import UserError
from quill.files import folder_lock, replacing

FORMAT = 1
CHUNK = 2**20  # bytes of text in memory at a time, so that a text of any length can be read
LONGEST_DOCUMENT = 2**24  # characters; a document is in memory as a whole
HASHED_BYTES = 2**28  # only the size of a larger .bin is checked: hashing it would delay every start


class Digest(Protocol):
    """A hash object, as from hashlib.sha256()."""

    def update(self, data: bytes, /) -> None:
        """Add `data` to what is hashed."""


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset. Its splits are memory-mapped token files (tokens,), uint16 or uint32."""

    name: str
    tokenizer: Tokenizer
    is_documents: bool
    train: np.memmap
    val: np.memmap
    meta: dict[str, Any]  # the values of meta.json


# ---------------------------------------------------------------- writing


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def prepare_if_missing(dataset: str, data_dir: str | Path = "data", say: Callable[[str], None] = _say) -> None:
    """Prepare the known corpus `dataset` if it has not been prepared yet; `say` announces it with a line.

    Nothing happens if `dataset` is not the name of a known corpus.
    """
    if dataset in CORPORA and not os.path.isfile(Path(data_dir) / dataset / "meta.json"):
        say(f"{dataset} is not prepared yet: writing it to {Path(data_dir) / dataset}")
        prepare_corpus(CORPORA[dataset], data_dir)


def prepare_corpus(corpus: Corpus, data_dir: str | Path = "data", input: str = "") -> dict[str, Any]:
    """Locate the text of a known corpus and prepare it as `data_dir`/<its name>. Returns the values of meta.json."""
    source = locate(corpus, input, data_dir)
    name = corpus.url or f"data/{corpus.file}"
    return prepare(source, Path(data_dir) / corpus.name, corpus.tokenizer, corpus.is_documents, name)


def prepare(
    source: str | Path, out: str | Path, tokenizer: str = "char", is_documents: bool = False, name: str = ""
) -> dict[str, Any]:
    """Write the UTF-8 text file `source` as token files in the folder `out`, replacing older ones.

    The text is read twice: first for its vocabulary and length, then to encode it.

    Args:
        source: the text file. A byte-order mark is dropped, and every kind of line end is read as a newline.
        out: the dataset's folder.
        tokenizer: "char" or "byte".
        is_documents: every line is a document.
        name: the name of the source in meta.json; by default its file name.

    Returns:
        The values of meta.json.

    Raises:
        UserError: `source` can't be read, is not UTF-8, is too short, or changes while it is read.
    """
    source, out = Path(source), Path(out)
    if not os.path.isfile(source):  # unlike Path.is_file, it is False without the permission to look
        reason = "not a regular file" if os.path.exists(source) else "no such file"
        raise UserError(f"{source}: {reason}; --input=FILE names a text")
    with tqdm(total=2 * source.stat().st_size, unit="B", unit_scale=True, desc="two passes", disable=None) as bar:
        text, digest, again = TextFile(source, is_documents, bar), hashlib.sha256(), hashlib.sha256()
        scan = scan_text(text, tokenizer, digest)
        dtype = np.dtype("<u2" if scan.tokenizer.vocab_size <= 65_535 else "<u4")
        files = replacing(out / "train.bin", out / "val.bin", out / "meta.json")
        with folder_lock(out, wait=True), files as (train, val, meta):
            splits = {"train": TokenFileWriter(train, dtype), "val": TokenFileWriter(val, dtype)}
            for train_ids, val_ids in encode_splits(text, scan, again):
                splits["train"].write(train_ids)
                splits["val"].write(val_ids)
            if again.digest() != digest.digest():
                raise UserError(f"{source}: changed while it was read; run the command again")
            values = {
                "format": FORMAT,
                "tokenizer": scan.tokenizer.to_json(),
                "dtype": dtype.name,
                "documents": is_documents,
                "splits": {name: split.describe() for name, split in splits.items()},
                "source": {"name": name or source.name, "sha256": digest.hexdigest()},
            }
            meta.write((json.dumps(values, ensure_ascii=False, indent=2) + "\n").encode())
    return values


@dataclass(frozen=True)
class Scan:
    """What `scan_text` finds out about a text."""

    tokenizer: Tokenizer
    tokens: int  # without BOS
    moved: str | None  # the document that is moved to the other split, because that split would be empty


def scan_text(text: TextFile, kind: str, digest: Digest) -> Scan:
    """Read a text for the first time, for the vocabulary of its `kind` of tokenizer and its number of tokens.

    Raises:
        UserError: there is too little text for two splits.
    """
    known, tokens = np.zeros(sys.maxunicode + 1, bool), 0
    sides: set[bool] = set()  # the splits that get a document
    ends: list[str] = []  # the first and the last document in sorted order
    for piece in text.pieces(digest):
        if isinstance(piece, list):
            if len(sides) < 2:
                sides |= set(in_val(piece).tolist())
                ends = [min(piece + ends), max(piece + ends)]
            piece = join_documents(piece)
        if kind == "char":
            codes = code_points(piece)
            if not known.take(codes).all():  # reading `known` is faster than writing to it
                known[codes] = True
        tokens += len(piece) if kind == "char" else len(piece.encode())
    if tokens == 0:
        raise UserError(f"{text.path}: there is no text in it")
    if text.is_documents and len(set(ends)) == 1:
        raise UserError(f"{text.path}: has one distinct document, but train and val need two that differ")
    if tokens == 1:
        raise UserError(f"{text.path}: has one token, but train and val need at least one each")
    chars = map(chr, np.flatnonzero(known))
    tokenizer = CharTokenizer(chars, text.is_documents) if kind == "char" else ByteTokenizer(text.is_documents)
    return Scan(tokenizer, tokens, ends[1] if len(sides) == 1 else None)


def encode_splits(text: TextFile, scan: Scan, digest: Digest) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read a text for the second time and yield its ids in pieces, (those for training, those for validation)."""
    train_left = scan.tokens * 9 // 10  # of a stream
    for piece in text.pieces(digest):
        if isinstance(piece, list):
            val_side = in_val(piece, scan.moved)
            train, val = (join_documents(compress(piece, side)) for side in (~val_side, val_side))
            yield scan.tokenizer.encode(train), scan.tokenizer.encode(val)
        else:
            ids = scan.tokenizer.encode(piece)
            yield ids[:train_left], ids[train_left:]
            train_left = max(0, train_left - len(ids))


def in_val(documents: list[str], moved: str | None = None) -> np.ndarray:
    """Return which of `documents` are for validation, (len(documents),) bool. `moved`, if any, changes its split."""
    sums = np.fromiter(map(zlib.crc32, map(str.encode, documents)), np.uint32, len(documents))
    return (sums % 10 == 0) != [document == moved for document in documents] if moved else sums % 10 == 0


def join_documents(documents: Iterable[str]) -> str:
    """Join documents to the text that a tokenizer encodes as `BOS a b c BOS d e …`."""
    return "\n".join(["", *documents])


class TextFile:
    """A UTF-8 text file, read in pieces. Line ends of every kind become newlines; a byte-order mark is dropped."""

    def __init__(self, path: Path, is_documents: bool, bar: tqdm) -> None:
        """bar: the progress bar to update with the number of bytes read."""
        self.path, self.is_documents, self.bar = path, is_documents, bar

    def pieces(self, digest: Digest) -> Iterator[str | list[str]]:
        """Read the file and yield its pieces, none of them empty: of a stream text, else lists of documents.

        The bytes of the file are added to `digest`.
        """
        if not self.is_documents:
            yield from self.decoded(digest)
            return
        rest = ""
        for text in self.decoded(digest):
            *lines, rest = (rest + text).split("\n")
            if len(rest) > LONGEST_DOCUMENT:
                raise UserError(f"{self.path}: a line is longer than {LONGEST_DOCUMENT:,} characters; see --documents")
            if lines := list(filter(str.strip, lines)):
                yield lines
        if rest.strip():
            yield [rest]

    def decoded(self, digest: Digest) -> Iterator[str]:
        """Read the file and yield its text in pieces, none of them empty; add its bytes to `digest`.

        Raises:
            UserError: the file can't be read, or is not UTF-8; the message has the byte and the line.
        """
        newlines = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
        at, chunk = 0, b"-"
        try:
            with open(self.path, "rb") as file:
                while chunk:
                    chunk = file.read(CHUNK)
                    digest.update(chunk)
                    mark = len(codecs.BOM_UTF8) if at == 0 and chunk.startswith(codecs.BOM_UTF8) else 0
                    at += len(chunk)
                    if text := newlines.decode(chunk[mark:], final=not chunk):
                        yield text
                    self.bar.update(len(chunk))
        except UnicodeDecodeError as error:
            # error.object ends at byte `at` of the file, but it may begin in an earlier chunk.
            at += error.start - len(error.object)
            raise UserError(
                f"{self.path}: not UTF-8 at byte {at} (line {self.line_number(at)}): {error.reason}; save it as UTF-8"
            ) from None
        except OSError as error:
            raise UserError(f"{self.path}: can't be read: {error.strerror}") from None

    def line_number(self, at: int) -> int:
        """Return the number of the line with byte `at`, from 1."""
        newlines, line = io.IncrementalNewlineDecoder(None, translate=True), 1
        with open(self.path, "rb") as file:
            for start in range(0, at, CHUNK):
                line += newlines.decode(file.read(min(CHUNK, at - start)).decode("latin-1")).count("\n")
        return line + newlines.decode("", True).count("\n")


class TokenFileWriter:
    """A .bin file that is being written."""

    def __init__(self, file: BinaryIO, dtype: np.dtype) -> None:
        """Start an empty split of the given type in `file`."""
        self.file, self.dtype, self.tokens, self.digest = file, dtype, 0, hashlib.sha256()

    def write(self, ids: np.ndarray) -> None:
        """Append `ids` (T,)."""
        ids = ids.astype(self.dtype)
        self.file.write(ids.data)
        self.digest.update(ids.data)
        self.tokens += len(ids)

    def describe(self) -> dict[str, Any]:
        """Return the split's entry in meta.json."""
        return {"tokens": self.tokens, "sha256": self.digest.hexdigest()}


# ---------------------------------------------------------------- reading


def open_dataset(data_dir: str | Path, dataset: str) -> Dataset:
    """Open `data_dir`/`dataset` and verify it against its meta.json.

    Raises:
        UserError: the dataset is missing or damaged. The message ends with the command that writes it again.
    """
    folder = Path(data_dir) / dataset
    command = f"python prepare.py {dataset if dataset in CORPORA else f'--input=FILE --dataset={dataset}'}"
    command = f"`{command}`" if Path(data_dir) == Path("data") else f"`{command} --data_dir={data_dir}`"
    path = folder / "meta.json"
    if not dataset or not os.path.isfile(path):
        known = {path.parent.name for path in Path(data_dir).glob("*/meta.json")} | set(CORPORA)
        guess = "" if dataset in CORPORA else did_you_mean(dataset, sorted(known))
        raise UserError(f"--dataset={dataset}: there is no {path}; {command} writes it{guess}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] > FORMAT:
            raise UserError(f"format {meta['format']} is newer than {FORMAT}, which this quill reads: update it")
        dtype = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}[meta["dtype"]]
        tokenizer = from_json(meta["tokenizer"])
        if meta["documents"] is not tokenizer.is_documents:
            raise ValueError("documents and tokenizer contradict each other")
        expected = [(name, operator.index(split["tokens"]), split["sha256"]) for name, split in meta["splits"].items()]
        if [name for name, _, _ in expected] != ["train", "val"]:
            raise ValueError("the splits are not train and val")
        splits = {}
        for name, tokens, sha256 in expected:
            path = folder / f"{name}.bin"
            splits[name] = open_split(path, dtype, tokens, sha256, tokenizer.vocab_size)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {command} writes it again") from None
    except UserError as error:
        raise UserError(f"{path}: {error}; {command} writes it again") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); {command} writes it again") from None
    return Dataset(dataset, tokenizer, tokenizer.is_documents, splits["train"], splits["val"], meta)


def open_split(path: Path, dtype: np.dtype, tokens: int, sha256: str, vocab_size: int) -> np.memmap:
    """Memory-map a .bin file, (tokens,). Raise a UserError if it differs from what meta.json says about it."""
    size = path.stat().st_size
    if size == 0 or size != tokens * dtype.itemsize:
        raise UserError(f"has {size:,} bytes, but meta.json says {tokens:,} tokens of {dtype.itemsize} bytes")
    ids = np.memmap(path, dtype, mode="r")
    if size <= HASHED_BYTES:
        if hashlib.sha256(ids.data).hexdigest() != sha256:
            raise UserError("its SHA-256 is not the one in meta.json")
        if (largest := ids.max()) >= vocab_size:
            raise UserError(f"has the id {largest}, but the vocabulary in meta.json has {vocab_size}")
    return ids
