"""quill/data/token_files.py: what is written for a text, what is refused, and that damage is found at opening."""

import errno
import hashlib
import itertools
import json
import os
import random
import time
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import ALICE, needs_corpora

from quill.data import corpora, texts, token_files
from quill.data.token_files import open_dataset, prepare, prepare_if_missing
from quill.errors import UserError

BPE = pytest.param("bpe", marks=pytest.mark.skipif(find_spec("tokenizers") is None, reason="needs tokenizers"))
FILES = ["meta.json", "train.bin", "val.bin"]
NAMES = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]


def prepared(source, tmp_path, *args, name="mine"):
    """Prepare `source`, and return the open dataset."""
    prepare(source, tmp_path / "data" / name, *args)
    assert sorted(path.name for path in (tmp_path / "data" / name).iterdir()) == FILES
    return open_dataset(tmp_path / "data", name)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def documents_of(tokens, tokenizer):
    text = tokenizer.decode(tokens)
    assert text.startswith("\n")
    return text[1:].split("\n")


# ---------------------------------------------------------------- the real texts


@needs_corpora
def test_tiny_shakespeare_is_nanogpts(tmp_path):
    token_files.prepare_corpus(corpora.CORPORA["shakespeare_char"], tmp_path)
    text = (Path(os.environ["QUILL_CORPORA"]) / "tinyshakespeare.txt").read_text(encoding="utf-8")
    # as data/shakespeare_char/prepare.py of nanoGPT does it
    stoi = {char: i for i, char in enumerate(sorted(set(text)))}
    halves = {"train": text[: int(len(text) * 0.9)], "val": text[int(len(text) * 0.9) :]}
    for split, half in halves.items():
        expected = np.array([stoi[char] for char in half], dtype=np.uint16).tobytes()
        assert (tmp_path / "shakespeare_char" / f"{split}.bin").read_bytes() == expected
    dataset = open_dataset(tmp_path, "shakespeare_char")
    assert (len(dataset.train), len(dataset.val), dataset.tokenizer.vocab_size) == (1_003_854, 111_540, 65)
    digests = [dataset.meta["splits"][split]["sha256"][:16] for split in ("train", "val")]
    assert digests == ["6ec305602a99ac28", "d37d30cc0c8327c2"]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        open_dataset(tmp_path, "shakespeare_char")
        times.append(time.perf_counter() - start)
    assert min(times) < 0.015


@needs_corpora
def test_names32k(tmp_path):
    start = time.perf_counter()
    token_files.prepare_corpus(corpora.CORPORA["names32k"], tmp_path)
    assert time.perf_counter() - start < 1
    dataset = open_dataset(tmp_path, "names32k")
    train, val = (documents_of(tokens, dataset.tokenizer) for tokens in (dataset.train, dataset.val))
    names = (Path(os.environ["QUILL_CORPORA"]) / "names32k.txt").read_text(encoding="utf-8").split()
    assert dataset.tokenizer.vocab_size == 27
    assert sorted(train + val) == sorted(names)
    assert len(names) == 32_033
    assert 0.09 < len(val) / len(names) < 0.11
    assert not set(train) & set(val)


# ---------------------------------------------------------------- streams


def test_a_stream_is_the_text_in_order(write, tmp_path):
    text = "Straße, 日本 🙂\u2028\x00 " * 97 + "\n"
    stoi = {char: i for i, char in enumerate(sorted(set(text)))}
    for kind, ids in (("char", [stoi[char] for char in text]), ("byte", list(text.encode()))):
        dataset = prepared(write(text), tmp_path, kind)
        assert np.concatenate([dataset.train, dataset.val]).tolist() == ids
        assert len(dataset.train) == len(ids) * 9 // 10
        assert dataset.train.dtype == np.dtype("<u2")
        assert dataset.name == "mine"
        assert dataset.tokenizer.is_documents is False
        assert dataset.tokenizer.bos is None
        assert dataset.meta["source"] == {"name": "text.txt", "sha256": hashlib.sha256(text.encode()).hexdigest()}


@pytest.mark.parametrize("kind", ["char", "byte"])
@pytest.mark.parametrize("documents", ["none", "lines", "blank_lines"])
@pytest.mark.parametrize("chunk", [3, 5, 64])
def test_the_size_of_the_chunks_changes_nothing(write, tmp_path, monkeypatch, kind, documents, chunk):
    """Characters, line ends, the byte-order mark and the split may extend over two chunks."""
    rng = random.Random(0)
    plain = "a" + "".join(rng.choices(["a", "ß", "日本", "🙂", "\ufeff", "\n", "\n\n", " "], k=300))
    prepare(write(plain, "a.txt"), tmp_path / "whole", kind, documents, "same")
    monkeypatch.setattr(texts, "CHUNK", chunk)
    source = write(b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode(), "b.txt")
    prepare(source, tmp_path / "pieces", kind, documents, "same")
    whole, pieces = contents(tmp_path / "whole"), contents(tmp_path / "pieces")
    assert whole["train.bin"] == pieces["train.bin"]
    assert whole["val.bin"] == pieces["val.bin"]
    for meta in (whole, pieces):
        meta["meta.json"] = json.loads(meta["meta.json"])
        del meta["meta.json"]["source"]
    assert whole == pieces


def test_line_ends_and_the_byte_order_mark(write, tmp_path):
    dataset = prepared(write(b"\xef\xbb\xbfone\r\ntwo\rthree\n\r\xef\xbb\xbf"), tmp_path)
    text = dataset.tokenizer.decode(np.concatenate([dataset.train, dataset.val]))
    assert text == "one\ntwo\nthree\n\n\ufeff"  # it is a mark at the start of the file only


def test_the_same_text_gives_the_same_bytes(write, tmp_path):
    for kind, documents in itertools.product(["char", "byte"], ["none", "lines"]):
        prepare(write(ALICE + "\n".join(NAMES)), tmp_path / "one", kind, documents)
        prepare(write(ALICE + "\n".join(NAMES)), tmp_path / "two", kind, documents)
        assert contents(tmp_path / "one") == contents(tmp_path / "two")
        assert str(tmp_path).encode() not in contents(tmp_path / "one")["meta.json"]


def test_more_ids_than_uint16_holds(write, tmp_path):
    text = "".join(chr(code) for code in range(0x10000, 0x10000 + 70_000)) * 2
    dataset = prepared(write(text), tmp_path)
    assert dataset.train.dtype == np.dtype("<u4")
    assert dataset.meta["dtype"] == "uint32"
    assert dataset.tokenizer.decode(np.concatenate([dataset.train, dataset.val])) == text


def test_a_text_shorter_than_any_block(write, tmp_path):
    dataset = prepared(write("ab"), tmp_path)
    assert dataset.train.tolist() == [0]
    assert dataset.val.tolist() == [1]


# ---------------------------------------------------------------- documents


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_documents_are_kept_whole_and_split_by_their_text(write, tmp_path, kind):
    lines = NAMES * 2 + ["ß", " padded ", "", "\t ", "日本 語"]
    dataset = prepared(write("\n\n".join(lines)), tmp_path, kind, "lines")
    train, val = (documents_of(tokens, dataset.tokenizer) for tokens in (dataset.train, dataset.val))
    wanted = [line for line in lines if line.strip()]
    # the rule, written for one document at a time
    assert val == [line for line in wanted if zlib.crc32(line.encode()) % 10 == 0]
    assert train == [line for line in wanted if zlib.crc32(line.encode()) % 10 != 0]
    assert dataset.tokenizer.is_documents
    assert dataset.train[0] == dataset.tokenizer.bos == dataset.tokenizer.vocab_size - 1
    assert (dataset.train == dataset.tokenizer.bos).sum() == len(train)
    if kind == "char":
        assert dataset.tokenizer.chars == "".join(sorted(set("".join(wanted))))  # no tab, because its line was blank


def test_no_split_is_ever_empty(write, tmp_path):
    sides = {bool(zlib.crc32(name.encode()) % 10): name for name in NAMES}
    for lines in ([f"{sides[True]}"] * 3 + ["zed"], [sides[False], sides[False] + "\u2003"], ["a", "b", "a", "b"]):
        dataset = prepared(write("\n".join(lines)), tmp_path, "char", "lines")
        train, val = (documents_of(tokens, dataset.tokenizer) for tokens in (dataset.train, dataset.val))
        assert sorted(train + val) == sorted(lines)
        assert not set(train) & set(val)
    for name in (sides[True], sides[False]):
        with pytest.raises(UserError, match="need two that differ"):
            prepare(write(f"{name}\n\n{name}\n"), tmp_path / "one", "char", "lines")


def test_a_line_that_is_too_long_is_refused(write, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "LONGEST_DOCUMENT", 100)
    monkeypatch.setattr(texts, "CHUNK", 64)
    with pytest.raises(UserError, match="longer than 100 characters"):
        prepare(write("short\n" + "long" * 50), tmp_path / "mine", "char", "lines")


BLANK_LINES = "\n \n\none\n two\n\n\t\nthree\r\n\r\nfour\n\nfive\nsix  \n\n"
JSON_LINES = "\n".join(json.dumps({"id": i, "text": f"line {i}\n\nand ß{i % 40}\n"}) for i in range(50)) + "\n\n"


@pytest.mark.parametrize("kind", ["char", "byte", BPE])
@pytest.mark.parametrize(
    "content, how, expected",
    [
        (BLANK_LINES, "blank_lines", ["one\n two", "three", "four", "five\nsix  "]),
        (JSON_LINES, "jsonl:text", [f"line {i}\n\nand ß{i % 40}\n" for i in range(50)]),
    ],
)
def test_documents_that_hold_newlines(write, tmp_path, kind, content, how, expected):
    dataset = prepared(write(content), tmp_path, kind, how)
    tokenizer, documents = dataset.tokenizer, []
    assert dataset.meta["format"] == 2 and dataset.meta["tokenizer"]["bos_is_newline"] is False
    for split in (dataset.train, dataset.val):
        assert split[0] == tokenizer.bos
        starts = [*np.flatnonzero(split == tokenizer.bos), None]
        documents += [tokenizer.decode(split[start:end]) for start, end in itertools.pairwise(starts)]
    assert sorted(documents) == sorted(expected)
    text_bytes = sum(len(document.encode()) for document in expected)
    assert len(dataset.train) + len(dataset.val) == text_bytes + len(expected) or kind != "byte"


@pytest.mark.parametrize(
    "content, how, reason",
    [
        ('{"text": "a"}\n{"text": 1}', "jsonl:text", "text.txt, line 2: not a JSON object with a text in 'text'"),
        ('{"text": "a"}\n\n{"words": "b"}', "jsonl:text", "line 3: not a JSON object with a text in 'text'"),
        ('{"text": "a"}\n[1]', "jsonl:text", "line 2"),
        ('{"text": "a"}\nb', "jsonl:text", "line 2"),
        ('{"text": "\\ud800"}', "jsonl:text", "line 1"),
        ("[" * 100_000, "jsonl:text", "line 1"),
        ('{"text": " "}', "jsonl:text", "there is no text"),
        ("a\n\n \na", "blank_lines", "one distinct document"),
    ],
)
def test_documents_that_are_refused(write, tmp_path, content, how, reason):
    with pytest.raises(UserError, match=reason) as caught:
        prepare(write(content), tmp_path / "mine", "char", how)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mine").exists()


def test_a_paragraph_that_is_too_long_is_refused(write, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "LONGEST_DOCUMENT", 100)
    monkeypatch.setattr(texts, "CHUNK", 64)
    with pytest.raises(UserError, match="longer than 100 characters"):
        prepare(write("short\n\n" + "long\n" * 50), tmp_path / "mine", "char", "blank_lines")


def test_several_files(write, tmp_path):
    parts = {"b.txt": "two\n", "a.txt": "\ufeffone", "c,d.txt": "three"}
    for name, text in parts.items():
        write(text, name)
    both = f"{tmp_path / 'b.txt'},{tmp_path / 'a.txt'}"
    for source, text, name in (
        (both, "two\none", "b.txt, a.txt"),
        (tmp_path / "[ab].txt", "onetwo\n", "a.txt, b.txt"),
        (tmp_path / "c,d.txt", "three", "c,d.txt"),
    ):
        dataset = prepared(source, tmp_path)
        assert dataset.tokenizer.decode(np.concatenate([dataset.train, dataset.val])) == text
        assert dataset.meta["source"]["name"] == name
    dataset = prepared(tmp_path / "*.txt", tmp_path, "char", "lines")  # a file's last line ends there
    assert sorted(documents_of(dataset.train, dataset.tokenizer) + documents_of(dataset.val, dataset.tokenizer)) == [
        "one",
        "three",
        "two",
    ]
    for source, reason in ((f"{both},x.txt", "^x.txt: no such file"), (tmp_path / "*.md", r"\*.md: no such file")):
        with pytest.raises(UserError, match=reason):
            prepare(source, tmp_path / "mine")


# ---------------------------------------------------------------- what bad input gets


@pytest.mark.parametrize(
    "content, is_documents, reason",
    [
        (b"", False, "no text"),
        (b"\xef\xbb\xbf", False, "no text"),
        (b"\n \n\t\r\n", True, "no text"),
        (b"x", False, "one token"),
        (b"abc\xff", False, r"not UTF-8 at byte 3 \(line 1\)"),
        (b"\xef\xbb\xbfabc\r\nd\re\nf\xc3", False, r"not UTF-8 at byte 13 \(line 4\): unexpected end"),
        (b"abc\r\xed\xa0\x80", False, r"not UTF-8 at byte 4 \(line 2\)"),
        ("text".encode("utf-16"), True, r"not UTF-8 at byte 0 \(line 1\)"),
    ],
)
@pytest.mark.parametrize("kind", ["char", "byte", BPE])
@pytest.mark.parametrize("chunk", [4, 2**20])
def test_texts_that_are_refused(write, tmp_path, monkeypatch, content, is_documents, reason, kind, chunk):
    monkeypatch.setattr(texts, "CHUNK", chunk)
    source = write(content)
    with pytest.raises(UserError, match=reason) as caught:
        prepare(source, tmp_path / "mine", kind, "lines" if is_documents else "none")
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mine").exists()


def test_sources_that_are_not_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        prepare(tmp_path / "nowhere.txt", tmp_path / "mine")
    with pytest.raises(UserError, match="not a regular file"):
        prepare(tmp_path, tmp_path / "mine")


def test_a_text_that_changes_while_it_is_read_is_refused(write, tmp_path, monkeypatch):
    scan_text = token_files.scan_text
    monkeypatch.setattr(token_files, "scan_text", lambda *args: (scan_text(*args), write(ALICE + "Alice"))[0])
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(write(ALICE), tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_a_full_disk_leaves_what_was_there(write, tmp_path, monkeypatch):
    prepared(write("the dataset before"), tmp_path)
    before = contents(tmp_path / "data" / "mine")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="can't write .*: No space left"):
        prepare(write(ALICE), tmp_path / "data" / "mine")
    monkeypatch.undo()
    assert contents(tmp_path / "data" / "mine") == before
    assert sorted(path.name for path in (tmp_path / "data" / "mine").iterdir()) == FILES


def test_a_folder_that_cannot_be_written_to(write, tmp_path):
    with pytest.raises(UserError, match="mine: can't be written to: Not a directory"):
        prepare(write(ALICE), write("a file", "data") / "mine")


@pytest.mark.parametrize("stop", range(4))
def test_half_a_dataset_never_opens(write, tmp_path, monkeypatch, stop):
    """After a power cut between two renames, the folder opens as the new dataset or not at all."""
    prepared(write("abcdefgh" * 10), tmp_path)
    rename, calls = os.replace, []

    def power_cut(source, target):
        if len(calls) == stop:
            raise SystemExit
        calls.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", power_cut)
    try:
        prepare(write("ABCDEFGH" * 10), tmp_path / "data" / "mine")
    except SystemExit:
        with pytest.raises(UserError, match="there is no"):
            open_dataset(tmp_path / "data", "mine")
    else:
        assert open_dataset(tmp_path / "data", "mine").tokenizer.chars == "ABCDEFGH"


# ---------------------------------------------------------------- opening


def change_meta(**values):
    def change(folder):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        (folder / "meta.json").write_text(json.dumps(meta | values), encoding="utf-8")

    return change


def change_bin(change_bytes):
    def change(folder):
        (folder / "val.bin").write_bytes(change_bytes((folder / "val.bin").read_bytes()))

    return change


def foreign_id(folder):
    """Put an id outside the vocabulary into val.bin, and its SHA-256 into meta.json."""
    change_bin(lambda data: data[:-2] + b"\xff\x00")(folder)
    splits = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["splits"]
    splits["val"]["sha256"] = hashlib.sha256((folder / "val.bin").read_bytes()).hexdigest()
    change_meta(splits=splits)(folder)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda folder: (folder / "meta.json").unlink(), "there is no .*meta.json"),
        (lambda folder: (folder / "train.bin").unlink(), "train.bin: No such file"),
        (change_bin(lambda data: data[:-2]), "val.bin: has 302 bytes, but meta.json says 152 tokens of 2 bytes"),
        (change_bin(lambda data: data[:-1]), "val.bin: has 303 bytes"),
        (change_bin(lambda data: data + data), "val.bin: has 608 bytes"),
        (change_bin(lambda data: b""), "val.bin: has 0 bytes"),
        (change_bin(lambda data: data[2:] + data[:2]), "val.bin: its SHA-256"),
        (foreign_id, "val.bin: has the id 255, but the vocabulary in meta.json has"),
        (lambda folder: (folder / "meta.json").write_bytes(b'{"format": 1'), "meta.json: damaged"),
        (lambda folder: (folder / "meta.json").write_bytes(b"\xff\xff"), "meta.json: damaged"),
        (lambda folder: (folder / "meta.json").write_bytes(b"[" * 100_000), "meta.json: damaged"),
        (lambda folder: (folder / "meta.json").write_bytes(b"[1]"), "meta.json: damaged"),
        (lambda folder: (folder / "meta.json").write_bytes(b'{"format": 1}'), "meta.json: damaged .*'dtype'"),
        (change_meta(format=3), "meta.json: format 3 is newer than 2"),
        (change_meta(format="one"), "meta.json: damaged"),
        (change_meta(dtype="float32"), "meta.json: damaged"),
        (change_meta(dtype=["uint16"]), "meta.json: damaged"),
        (change_meta(documents=True), "meta.json: damaged"),
        (change_meta(tokenizer={"kind": "wordpiece"}), "meta.json: tokenizer kind 'wordpiece'"),
        (change_meta(splits={}), "meta.json: damaged"),
        (change_meta(splits=[]), "meta.json: damaged"),
        (change_meta(splits={"train": {}, "val": {}}), "meta.json: damaged"),
        (change_meta(splits={"train": {"tokens": 1.5, "sha256": ""}}), "meta.json: damaged"),
    ],
)
def test_damage_is_found_and_the_error_names_the_fix(write, tmp_path, damage, reason):
    prepared(write(ALICE), tmp_path)
    damage(tmp_path / "data" / "mine")
    with pytest.raises(UserError, match=reason) as caught:
        open_dataset(tmp_path / "data", "mine")
    message = str(caught.value)
    assert f"`python prepare.py --input=FILE --dataset=mine --data_dir={tmp_path / 'data'}`" in message
    assert "\n" not in message


def test_large_files_are_checked_by_size(write, tmp_path, monkeypatch):
    prepared(write(ALICE), tmp_path)
    monkeypatch.setattr(token_files, "HASHED_BYTES", 303)
    change_bin(lambda data: data[2:] + data[:2])(tmp_path / "data" / "mine")
    open_dataset(tmp_path / "data", "mine")
    change_bin(lambda data: data + data)(tmp_path / "data" / "mine")
    with pytest.raises(UserError, match="val.bin: has 608 bytes"):
        open_dataset(tmp_path / "data", "mine")


def test_an_unknown_dataset_gets_the_closest_name(write, tmp_path, monkeypatch):
    prepared(write(ALICE), tmp_path, name="alice")
    for wanted, guess in (("alicee", "alice"), ("shakespear_char", "shakespeare_char")):
        with pytest.raises(UserError, match=f"did you mean {guess}\\?"):
            open_dataset(tmp_path / "data", wanted)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no data/names32k/meta.json; `python prepare.py names32k` writes it"):
        open_dataset("data", "names32k")
    with pytest.raises(UserError, match="--dataset=: there is no"):
        open_dataset(tmp_path / "data", "")


def test_prepare_if_missing_prepares_a_known_corpus_once(tmp_path, capsys, write):
    prepare_if_missing("names", tmp_path)
    assert capsys.readouterr() == ("", f"names is not prepared yet: writing it to {tmp_path / 'names'}\n")
    before = (tmp_path / "names" / "meta.json").stat().st_mtime_ns
    prepare_if_missing("names", tmp_path)
    prepare_if_missing("somebody's", tmp_path)
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "names" / "meta.json").stat().st_mtime_ns == before
    assert open_dataset(tmp_path, "names").tokenizer.vocab_size == 27
    assert not (tmp_path / "somebody's").exists()


@pytest.mark.parametrize("documents", ["none", "lines"])
def test_a_text_that_another_datasets_characters_lack_is_named_before_anything_is_written(tmp_path, documents):
    for name, text in (("few", "ab\nba\n" * 20), ("more", "ab\nbé\n" * 20)):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    prepare(tmp_path / "few.txt", tmp_path / "few", "char", documents)
    with pytest.raises(UserError, match=r"more.txt: 'é' \(1 character .*; --tokenizer=char makes"):
        prepare(tmp_path / "more.txt", tmp_path / "more", str(tmp_path / "few"), documents)
    assert not (tmp_path / "more").exists()
