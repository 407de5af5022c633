"""Write texts as token files, and open them: data/<dataset>/{train.bin, val.bin, meta.json}.

The .bin files are raw little-endian uint16 (uint32 above 65,535 ids) and nothing else, so other tools can read them.
meta.json describes them and holds their SHA-256. The same text always gives the same bytes.

Reading, splitting and encoding a text is left to texts.py, the known corpora to corpora.py.
"""

import hashlib
import json
import operator
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from quill.cli import did_you_mean, note
from quill.data import bpe
from quill.data.corpora import CORPORA, Corpus, locate
from quill.data.texts import CHUNK, SplitIds, Texts, encode_splits, find_texts, scan_text
from quill.data.tokenizers import KINDS, Tokenizer, from_json
from quill.errors import UserError, check
from quill.files import folder_lock, replacing
from quill.options import PrepareConfig

FORMAT = 2  # 1 unless a document's BOS is a token of its own
HASHED_BYTES = 2**28  # only the size of a larger .bin is checked: hashing it would delay every start


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset. Its splits are memory-mapped token files (tokens,), uint16 or uint32."""

    name: str
    tokenizer: Tokenizer
    train: np.memmap
    val: np.memmap
    meta: dict[str, Any]  # the values of meta.json


# ---------------------------------------------------------------- writing


def prepare_if_missing(dataset: str, data_dir: str | Path = "data") -> None:
    """Prepare `dataset`, and print a line about it, if it is a known corpus that has not been prepared yet."""
    if dataset in CORPORA and not os.path.isfile(Path(data_dir) / dataset / "meta.json"):
        note(f"{dataset} is not prepared yet: writing it to {Path(data_dir) / dataset}")
        prepare_corpus(CORPORA[dataset], data_dir)


def prepare_corpus(corpus: Corpus, data_dir: str | Path = "data", input: str = "") -> dict[str, Any]:
    """Locate the text of a known corpus and prepare it as `data_dir`/<its name>. Returns the values of meta.json."""
    name = corpus.url or f"data/{corpus.file}"
    source = locate(corpus, input, data_dir)
    return prepare(source, Path(data_dir) / corpus.name, documents=corpus.documents, name=name)


def prepare(
    source: str | Path,
    out: str | Path,
    tokenizer: str = "char",
    documents: str = "none",
    name: str = "",
    vocab_size: int = PrepareConfig.vocab_size,
) -> dict[str, Any]:
    """Write UTF-8 text files as token files in the folder `out`, replacing older ones.

    The text is read twice: first for its vocabulary and length, then to encode it. Returns the values of meta.json.

    source, tokenizer, documents, vocab_size: as the options of PrepareConfig; source is its `input`.
    name: the name of the source in meta.json; by default its file names.
    Raise a UserError if `source` can't be read, is not UTF-8, is too short, or changes while it is read.
    """
    known = None if tokenizer in KINDS else read_tokenizer(tokenizer, documents != "none", documents == "lines")
    with tqdm(unit="B", unit_scale=True, desc="two passes", disable=None) as bar:
        text = Texts(find_texts(source), documents, bar)
        bar.reset(2 * text.size)
        scan = scan_text(text, known or tokenizer, vocab_size)
        name = name or ", ".join(path.name for path in text.paths)
        return write_dataset(Path(out), scan.tokenizer, encode_splits(text, scan), name, lambda: scan.sha256)


def take_over(bins: str | Path, out: str | Path, tokenizer: str) -> dict[str, Any]:
    """Write nanoGPT's train.bin and val.bin in the folder `bins` as the dataset `out`. Returns the values of meta.json.

    tokenizer: as in `read_tokenizer`. Raise a UserError if it lacks an id of the files.
    """
    known, digest, files = read_tokenizer(tokenizer), hashlib.sha256(), {}
    for path in (Path(bins) / "train.bin", Path(bins) / "val.bin"):
        try:
            files[path] = np.memmap(path, dtype_of(known), mode="r")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error).rstrip(".")
            raise UserError(f"{path}: {reason}; --bins=FOLDER names nanoGPT's train.bin and val.bin") from None

    def split_ids() -> Iterator[SplitIds]:
        for path, ids in files.items():
            for start in tqdm(range(0, len(ids), CHUNK), desc=path.name, disable=None):
                some = ids[start : start + CHUNK]
                if (largest := some.max()) >= known.vocab_size:
                    raise UserError(f"{path}: has the id {largest}, but --tokenizer has {known.vocab_size} ids")
                digest.update(some.data)
                yield (some, some[:0]) if path.name == "train.bin" else (some[:0], some)

    return write_dataset(Path(out), known, split_ids(), str(bins), digest.hexdigest)


def write_dataset(
    out: Path, tokenizer: Tokenizer, split_ids: Iterable[SplitIds], name: str, sha256: Callable[[], str]
) -> dict[str, Any]:
    """Write a dataset's three files, whole or not at all. Returns the values of meta.json.

    name, sha256: the source in meta.json. sha256() is called when all ids are written.
    """
    dtype = dtype_of(tokenizer)
    files = replacing(out / "train.bin", out / "val.bin", out / "meta.json")
    with folder_lock(out, wait=True), files as (train, val, meta):
        splits = {"train": (train, hashlib.sha256()), "val": (val, hashlib.sha256())}
        for pieces in split_ids:
            for ids, (file, digest) in zip(pieces, splits.values(), strict=True):
                raw = ids.astype(dtype).data
                file.write(raw)
                digest.update(raw)
        values = {
            "format": 2 if tokenizer.is_documents and not tokenizer.bos_is_newline else 1,
            "tokenizer": tokenizer.to_json(),
            "dtype": dtype.name,
            "documents": tokenizer.is_documents,
            "splits": {
                split: {"tokens": file.tell() // dtype.itemsize, "sha256": digest.hexdigest()}
                for split, (file, digest) in splits.items()
            },
            "source": {"name": name, "sha256": sha256()},
        }
        meta.write((json.dumps(values, ensure_ascii=False, indent=2) + "\n").encode())
    return values


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """Return the type of a tokenizer's ids in a .bin file."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 65_535 else "<u4")


# ---------------------------------------------------------------- reading


def open_dataset(data_dir: str | Path, dataset: str) -> Dataset:
    """Open `data_dir`/`dataset`. Raise a UserError, with the command that writes it, if it is missing or damaged."""
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
    except (OSError, UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        damage = error if isinstance(error, UserError) else f"damaged ({type(error).__name__}: {error})"
        reason = error.strerror if isinstance(error, OSError) else damage
        raise UserError(f"{path}: {reason}; {command} writes it again") from None
    return Dataset(dataset, tokenizer, splits["train"], splits["val"], meta)


def read_tokenizer(name: str, is_documents: bool = False, bos_is_newline: bool = False) -> Tokenizer:
    """Read the tokenizer that --tokenizer names by a path, and make it for documents as given.

    It is that of a dataset's folder, a tokenizer.json or its folder, or a folder with vocab.json and merges.txt. Raise
    a UserError if it is none of these.
    """
    files = [Path(name), *(Path(name) / file for file in ("meta.json", "tokenizer.json", "vocab.json"))]
    path = next((path for path in files if os.path.isfile(path)), None)
    if path is None:
        problem = f"is none of {', '.join(KINDS)}, a tokenizer.json, and a folder with one or a dataset"
        raise UserError(f"--tokenizer={name}: {problem}{did_you_mean(name, KINDS)}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "vocab.json":
            values = bpe.read_gpt2_files(values, path.with_name("merges.txt").read_text(encoding="utf-8"))
        values = values["tokenizer"] if path.name == "meta.json" else {"kind": "bpe", "tokenizer": values}
        from_json({"documents": False} | values)
        return KINDS[values["kind"]](values, is_documents, bos_is_newline)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a foreign file can be wrong in any way
        raise UserError(f"{path}: not a tokenizer ({type(error).__name__}: {str(error)[:200]})") from None


def open_split(path: Path, dtype: np.dtype, tokens: int, sha256: str, vocab_size: int) -> np.memmap:
    """Memory-map a .bin file, (tokens,). Raise a UserError if it differs from what meta.json says about it."""
    size = path.stat().st_size
    if size == 0 or size != tokens * dtype.itemsize:
        raise UserError(f"has {size:,} bytes, but meta.json says {tokens:,} tokens of {dtype.itemsize} bytes")
    ids = np.memmap(path, dtype, mode="r")
    if size <= HASHED_BYTES:
        check(hashlib.sha256(ids.data).hexdigest() == sha256, "its SHA-256 is not the one in meta.json")
        if (largest := ids.max()) >= vocab_size:
            raise UserError(f"has the id {largest}, but the vocabulary in meta.json has {vocab_size}")
    return ids
