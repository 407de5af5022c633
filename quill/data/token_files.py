"""Write texts as token files, and open them: data/<dataset>/{train.bin, val.bin, meta.json}.

The .bin files are raw little-endian uint16 (uint32 above 65,535 ids) and nothing else, so other tools can read them.
meta.json describes them and holds their SHA-256. The same text always gives the same bytes.

A stream is split once: its first nine tenths are for training, in characters (bytes with the byte tokenizer). A word
at the border is encoded as two. Of documents, about a tenth are for validation. The checksum of its text decides in
which split a document is, so equal documents are in the same split. Blank documents are left out.

How a text is tokenized is left to tokenizers.py, how it is read to texts.py, and where the known corpora are found to
corpora.py.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, compress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from quill.cli import did_you_mean
from quill.data import bpe
from quill.data.corpora import CORPORA, Corpus, locate
from quill.data.texts import CHUNK, Digest, Texts, find_texts
from quill.data.tokenizers import (
    KINDS,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    code_points,
    from_json,
    make,
)
from quill.errors import UserError
from quill.files import folder_lock, replacing

FORMAT = 2  # 1 unless a document's BOS is a token of its own
HASHED_BYTES = 2**28  # only the size of a larger .bin is checked: hashing it would delay every start


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
    documents = "lines" if corpus.is_documents else "none"
    return prepare(source, Path(data_dir) / corpus.name, corpus.tokenizer, documents, name)


def prepare(
    source: str | Path,
    out: str | Path,
    tokenizer: str = "char",
    documents: str = "none",
    name: str = "",
    vocab_size: int = 4096,
) -> dict[str, Any]:
    """Write UTF-8 text files as token files in the folder `out`, replacing older ones.

    The text is read twice: first for its vocabulary and length, then to encode it.

    Args:
        source: as in --input: a file, or several.
        out: the dataset's folder.
        tokenizer: as in --tokenizer: "char", "byte", "bpe", or what `read_tokenizer` takes.
        documents: as in --documents: what ends a document, or "none" for a stream.
        name: the name of the source in meta.json; by default its file names.
        vocab_size: the number of ids of a BPE tokenizer that is trained.

    Returns:
        The values of meta.json.

    Raises:
        UserError: `source` can't be read, is not UTF-8, is too short, or changes while it is read.
    """
    paths = find_texts(source)
    known = None if tokenizer in KINDS else make(read_tokenizer(tokenizer), documents != "none", documents == "lines")
    size = sum(path.stat().st_size for path in paths)
    with tqdm(total=2 * size, unit="B", unit_scale=True, desc="two passes", disable=None) as bar:
        text, digest = Texts(paths, documents, bar), hashlib.sha256()
        scan = scan_text(text, known or tokenizer, digest, vocab_size)
        names = ", ".join(path.name for path in paths)
        return write_dataset(Path(out), scan.tokenizer, encode_splits(text, scan, digest), name or names, digest)


def take_over(bins: str | Path, out: str | Path, tokenizer: str) -> dict[str, Any]:
    """Write nanoGPT's train.bin and val.bin in the folder `bins` as the dataset `out`. Returns the values of meta.json.

    Raise a UserError if they have ids that `tokenizer` lacks, which is as in `read_tokenizer`.
    """
    paths = [Path(bins) / "train.bin", Path(bins) / "val.bin"]
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such file; --bins=FOLDER names nanoGPT's folder of train.bin and val.bin")
    known, digest = make(read_tokenizer(tokenizer), False, False), hashlib.sha256()
    size = sum(path.stat().st_size for path in paths)
    with tqdm(total=size, unit="B", unit_scale=True, desc="copying", disable=None) as bar:
        train, val = (read_ids(path, known, digest, bar) for path in paths)
        splits = chain(((ids, ids[:0]) for ids in train), ((ids[:0], ids) for ids in val))
        return write_dataset(Path(out), known, splits, str(bins), digest)


def read_ids(path: Path, tokenizer: Tokenizer, digest: Digest, bar: tqdm) -> Iterator[np.ndarray]:
    """Read a .bin file and yield its ids, (T,) each; add its bytes to `digest`. Raise a UserError if it is not one."""
    dtype, size = dtype_of(tokenizer), path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise UserError(f"{path}: has {size:,} bytes, which are not ids of {dtype.itemsize} bytes")
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
            ids = np.frombuffer(chunk, dtype)
            if (largest := ids.max()) >= tokenizer.vocab_size:
                raise UserError(f"{path}: has the id {largest}, but --tokenizer has {tokenizer.vocab_size} ids")
            yield ids


def write_dataset(
    out: Path, tokenizer: Tokenizer, split_ids: Iterable[tuple[np.ndarray, np.ndarray]], name: str, digest: Digest
) -> dict[str, Any]:
    """Write a dataset's three files, whole or not at all. Returns the values of meta.json.

    split_ids: pieces of the splits, (ids for training, ids for validation).
    name, digest: the source in meta.json. The digest is read when all ids are written.
    """
    dtype = dtype_of(tokenizer)
    files = replacing(out / "train.bin", out / "val.bin", out / "meta.json")
    with folder_lock(out, wait=True), files as (train, val, meta):
        splits = {"train": TokenFileWriter(train, dtype), "val": TokenFileWriter(val, dtype)}
        for train_ids, val_ids in split_ids:
            splits["train"].write(train_ids)
            splits["val"].write(val_ids)
        values = {
            "format": 2 if tokenizer.is_documents and not tokenizer.bos_is_newline else 1,
            "tokenizer": tokenizer.to_json(),
            "dtype": dtype.name,
            "documents": tokenizer.is_documents,
            "splits": {split: writer.describe() for split, writer in splits.items()},
            "source": {"name": name, "sha256": digest.hexdigest()},
        }
        meta.write((json.dumps(values, ensure_ascii=False, indent=2) + "\n").encode())
    return values


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """Return the type of a tokenizer's ids in a .bin file."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 65_535 else "<u4")


@dataclass(frozen=True)
class Scan:
    """What `scan_text` finds out about a text."""

    tokenizer: Tokenizer
    length: int  # in bytes for the tokenizer "byte", else in characters
    moved: str | None  # the document that is moved to the other split, because that split would be empty


def scan_text(text: Texts, tokenizer: Tokenizer | str, digest: Digest, vocab_size: int) -> Scan:
    """Read a text for the first time, for its length and, if `tokenizer` is only the name of a kind, its vocabulary.

    Raises:
        UserError: there is too little text for two splits.
    """
    kind = tokenizer if isinstance(tokenizer, str) else tokenizer.kind
    known, length = np.zeros(sys.maxunicode + 1, bool), 0
    sides: set[bool] = set()  # the splits that get a document
    ends: list[str] = []  # the first and the last document in sorted order

    def scanned() -> Iterator[str | list[str]]:
        nonlocal length, ends
        for piece in text.pieces(digest):
            yield piece
            if isinstance(piece, list):
                if len(sides) < 2:
                    sides.update(in_val(piece).tolist())
                    ends = [min(piece + ends), max(piece + ends)]
                piece = "".join(piece)
            if tokenizer == "char":
                codes = code_points(piece)
                if not known.take(codes).all():  # reading `known` is faster than writing to it
                    known[codes] = True
            length += len(piece.encode()) if kind == "byte" else len(piece)

    pieces = scanned()
    if tokenizer == "bpe":
        documents = (bpe.cut_stream([document]) for some in pieces for document in some)
        words = chain.from_iterable(documents) if text.is_documents else bpe.cut_stream(pieces)
        tokenizer = BPETokenizer(bpe.train(words, vocab_size), text.is_documents)
    for _ in pieces:  # all, or what is left after a sample for BPE
        pass
    if length == 0:
        raise UserError(f"{text.name}: there is no text in it")
    if text.is_documents and len(set(ends)) == 1:
        raise UserError(f"{text.name}: has one distinct document, but train and val need two that differ")
    if length == 1:
        raise UserError(f"{text.name}: has one token, but train and val need at least one each")
    if tokenizer == "char":
        tokenizer = CharTokenizer(map(chr, np.flatnonzero(known)), text.is_documents, text.documents == "lines")
    elif tokenizer == "byte":
        tokenizer = ByteTokenizer(text.is_documents, text.documents == "lines")
    return Scan(tokenizer, length, ends[1] if len(sides) == 1 else None)


def encode_splits(text: Texts, scan: Scan, digest: Digest) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read a text for the second time and yield its ids in pieces, (those for training, those for validation).

    digest: that of the first time. Raise a UserError if the text has changed.
    """
    again = hashlib.sha256()
    pieces, train_left = text.pieces(again), scan.length * 9 // 10  # of a stream
    if text.is_documents:
        yield from in_background(scan.tokenizer.encode_documents, split_documents(pieces, scan.moved))
    elif isinstance(scan.tokenizer, BPETokenizer):
        yield from in_background(scan.tokenizer.encode_pieces, split_stream(pieces, train_left))
    else:
        for piece in pieces:
            ids = scan.tokenizer.encode(piece)
            yield ids[:train_left], ids[train_left:]
            train_left = max(0, train_left - len(ids))
    if again.digest() != digest.digest():
        raise UserError(f"{text.name}: changed while it was read; run the command again")


def in_background(
    encode: Callable[[list[str]], np.ndarray], splits: Iterable[tuple[list[str], list[str]]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (encode(train), encode(val)) for each of `splits`, in order. A thread encodes while the next are read."""
    with ThreadPoolExecutor(1, "encode") as pool:
        waiting: deque[list[Future[np.ndarray]]] = deque()
        for pair in splits:
            waiting.append([pool.submit(encode, texts) for texts in pair])
            if len(waiting) == 3:  # so that memory is bounded
                train, val = waiting.popleft()
                yield train.result(), val.result()
        for train, val in waiting:
            yield train.result(), val.result()


def split_documents(pieces: Iterable[list[str]], moved: str | None) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the documents in `pieces` as (those for training, those for validation)."""
    for documents in pieces:
        side = in_val(documents, moved)
        yield [*compress(documents, ~side)], [*compress(documents, side)]


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


def read_tokenizer(name: str) -> dict[str, Any]:
    """Read the tokenizer that --tokenizer names by a path. → its description, as from `Tokenizer.to_json`

    It is the one of a prepared dataset, a tokenizer.json or its folder, or a folder with vocab.json and merges.txt.

    Raises:
        UserError: there is none, or it is not one that quill reads.
    """
    path = Path(name)
    if os.path.isdir(path):
        found = [path / file for file in ("meta.json", "tokenizer.json", "vocab.json") if os.path.isfile(path / file)]
        if not found:
            raise UserError(f"--tokenizer={name}: has no meta.json, tokenizer.json, or vocab.json and merges.txt")
        path = found[0]
    elif not os.path.isfile(path):
        kinds = f"{', '.join(KINDS)}, a tokenizer.json, or a folder{did_you_mean(name, KINDS)}"
        raise UserError(f"--tokenizer={name}: there is no such file; it is one of {kinds}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "vocab.json":
            values = bpe.describe(values, path.with_name("merges.txt").read_text(encoding="utf-8"))
        values = values["tokenizer"] if path.name == "meta.json" else {"kind": "bpe", "tokenizer": values}
        from_json({"documents": False} | values)
        return values
    except OSError as error:
        raise UserError(f"{error.filename}: can't be read: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a tokenizer ({type(error).__name__}: {error})") from None


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
