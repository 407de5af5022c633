"""A text file → token files, and back: data/<dataset>/{train.bin, val.bin, meta.json}.

The .bin files are raw little-endian uint16 (uint32 above 65,535 ids) and nothing else, so that other tools read them;
meta.json says what they are, with their SHA-256. The same text always gives the same bytes.

A stream is split in one place: the first nine tenths of its tokens are for training. A set of documents, one a line,
is split by each document's own checksum, so that all copies of a text are on the same side, about a tenth of them in
validation; blank lines are no documents.
"""

import codecs
import hashlib
import io
import json
import operator
import os
import sys
import zlib
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from quill.cli import did_you_mean
from quill.data.corpora import CORPORA, locate
from quill.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, code_points, from_json
from quill.errors import UserError
from quill.files import replacing

FORMAT = 1
CHUNK = 2**20  # bytes of text held at a time: a text of any length is read in little memory
LONGEST_DOCUMENT = 2**24  # characters; a document is held whole
HASHED_BYTES = 2**28  # a larger .bin is checked by its size alone: hashing it would delay every start


@dataclass(frozen=True)
class Dataset:
    name: str
    tokenizer: Tokenizer
    is_documents: bool
    train: np.memmap  # (tokens,) uint16 or uint32
    val: np.memmap
    meta: dict


# ---------------------------------------------------------------- writing


def prepare_if_missing(dataset, data_dir="data", say=lambda line: print(line, file=sys.stderr)):
    """Prepare `dataset` if it is a known corpus that isn't there yet."""
    if dataset in CORPORA and not os.path.isfile(Path(data_dir) / dataset / "meta.json"):
        say(f"{dataset} is not prepared yet: writing it to {Path(data_dir) / dataset}")
        prepare_corpus(CORPORA[dataset], data_dir)


def prepare_corpus(corpus, data_dir="data", input=""):
    """Find the text of a known corpus, and prepare it. → meta.json's values"""
    out = Path(data_dir) / corpus.name
    return prepare(
        locate(corpus, input, data_dir), out, corpus.tokenizer, corpus.is_documents, corpus.url or f"data/{corpus.file}"
    )


def prepare(source, out, tokenizer="char", is_documents=False, name=""):
    """The text file `source` → token files in the folder `out`, replacing those that it holds. → meta.json's values

    tokenizer: "char" or "byte". is_documents: every line is a document. name: what to call the source in meta.json.
    The text is read twice: first for its vocabulary and length, then to be encoded.
    """
    source, out = Path(source), Path(out)
    if not os.path.isfile(source):  # unlike Path.is_file, it answers for what it may not look at too
        raise UserError(
            f"{source}: {'not a regular file' if os.path.exists(source) else 'no such file'}; --input=FILE names a text"
        )
    with tqdm(total=2 * source.stat().st_size, unit="B", unit_scale=True, desc="two passes", disable=None) as bar:
        text, digest = TextFile(source, is_documents, bar), hashlib.sha256()
        tokenizer, tokens, moved = scan_text(text, tokenizer, digest)
        dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65_535 else "<u4")
        with replacing(out / "train.bin", out / "val.bin", out / "meta.json", shared=True) as (train, val, meta):
            splits = {"train": TokenFile(train, dtype), "val": TokenFile(val, dtype)}
            for piece in text.pieces(again := hashlib.sha256()):
                if is_documents:
                    val_side = in_val(piece, moved)
                    ids = [tokenizer.encode(join_documents(compress(piece, side))) for side in (~val_side, val_side)]
                else:
                    ids = tokenizer.encode(piece)
                    ids = np.split(ids, [max(0, tokens * 9 // 10 - splits["train"].tokens)])
                for split, part in zip(splits.values(), ids, strict=True):
                    split.write(part)
            if again.digest() != digest.digest():
                raise UserError(f"{source}: changed while it was read; run the command again")
            values = {
                "format": FORMAT,
                "tokenizer": tokenizer.to_json(),
                "dtype": dtype.name,
                "documents": is_documents,
                "splits": {name: split.describe() for name, split in splits.items()},
                "source": {"name": name or source.name, "sha256": digest.hexdigest()},
            }
            meta.write((json.dumps(values, ensure_ascii=False, indent=2) + "\n").encode())
    return values


def scan_text(text, kind, digest):
    """The first reading. → tokenizer, number of tokens, the document that changes sides or None"""
    known, tokens = np.zeros(sys.maxunicode + 1, bool), 0
    filled, ends = set(), []  # the splits that have a document; the first and the last document in sorted order
    for piece in text.pieces(digest):
        if text.is_documents:
            if len(filled) < 2:
                filled |= set(in_val(piece).tolist())
                ends = [min(piece + ends), max(piece + ends)]
            piece = join_documents(piece)
        if kind == "char":
            codes = code_points(piece)
            if not known.take(codes).all():  # cheaper than to mark what is known already
                known[codes] = True
        tokens += len(piece) if kind == "char" else len(piece.encode())
    if tokens == 0:
        raise UserError(f"{text.path}: there is no text in it")
    if text.is_documents and len(set(ends)) == 1:
        raise UserError(f"{text.path}: holds one document, but train and val need two that differ")
    if tokens == 1:
        raise UserError(f"{text.path}: holds one token, but train and val need two at least")
    chars = map(chr, np.flatnonzero(known))
    tokenizer = CharTokenizer(chars, text.is_documents) if kind == "char" else ByteTokenizer(text.is_documents)
    return tokenizer, tokens, ends[1] if len(filled) == 1 else None


def in_val(documents, moved=None):
    """Which of `documents` are for validation, (len(documents),) bool.

    `moved`, if any, is the one that changes sides because a split would be empty otherwise.
    """
    sums = np.fromiter(map(zlib.crc32, map(str.encode, documents)), np.uint32, len(documents))
    return (sums % 10 == 0) != [document == moved for document in documents] if moved else sums % 10 == 0


def join_documents(documents):
    """Documents → the text that a tokenizer of documents encodes as `BOS a b c BOS d e …`."""
    return "\n".join(["", *documents])


class TextFile:
    """A UTF-8 file, read in pieces: of text, with \\n at the end of every line, or lists of documents."""

    def __init__(self, path, is_documents, bar):
        self.path, self.is_documents, self.bar = path, is_documents, bar

    def pieces(self, digest):
        """Yield the file's pieces, none of them empty. The file's bytes go to `digest`."""
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

    def decoded(self, digest):
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
            # error.object ends where the file has been read to, and may begin in an earlier chunk.
            at += error.start - len(error.object)
            raise UserError(
                f"{self.path}: not UTF-8 at byte {at} (line {self.line_number(at)}): {error.reason}; save it as UTF-8"
            ) from None
        except OSError as error:
            raise UserError(f"{self.path}: can't be read: {error.strerror}") from None

    def line_number(self, at):
        """The number of the line that holds byte `at`."""
        with open(self.path, "rb") as file:
            chunks = (file.read(min(CHUNK, at - start)).decode("latin-1") for start in range(0, at, CHUNK))
            newlines = io.IncrementalNewlineDecoder(None, translate=True)
            return (
                1 + sum(newlines.decode(chunk).count("\n") for chunk in chunks) + newlines.decode("", True).count("\n")
            )


class TokenFile:
    """A .bin being written."""

    def __init__(self, file, dtype):
        self.file, self.dtype, self.tokens, self.digest = file, dtype, 0, hashlib.sha256()

    def write(self, ids):
        ids = ids.astype(self.dtype)
        self.file.write(ids)
        self.digest.update(ids)
        self.tokens += len(ids)

    def describe(self):
        return {"tokens": self.tokens, "sha256": self.digest.hexdigest()}


# ---------------------------------------------------------------- reading


def open_dataset(data_dir, dataset):
    """Open `data_dir`/`dataset`, all of it verified: a UserError says what is wrong and how to mend it."""
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
        splits = []
        for name, tokens, sha256 in expected:
            path = folder / f"{name}.bin"
            splits.append(open_split(path, dtype, tokens, sha256, tokenizer.vocab_size))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {command} writes it again") from None
    except UserError as error:
        raise UserError(f"{path}: {error}; {command} writes it again") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); {command} writes it again") from None
    return Dataset(dataset, tokenizer, tokenizer.is_documents, *splits, meta)


def open_split(path, dtype, tokens, sha256, vocab_size):
    """A .bin, memory-mapped (tokens,). A UserError says how it is not what meta.json describes."""
    size = path.stat().st_size
    if size == 0 or size != tokens * dtype.itemsize:
        raise UserError(f"has {size:,} bytes, but meta.json says {tokens:,} tokens of {dtype.itemsize} bytes")
    ids = np.memmap(path, dtype, mode="r")
    if size <= HASHED_BYTES:
        if hashlib.sha256(ids).hexdigest() != sha256:
            raise UserError("its SHA-256 is not the one in meta.json")
        if (largest := ids.max()) >= vocab_size:
            raise UserError(f"holds the id {largest}, but the vocabulary in meta.json has {vocab_size}")
    return ids
