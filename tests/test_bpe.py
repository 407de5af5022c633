"""Byte-level BPE: ids beside two other programs, every text and back, and what is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ALICE, TINY, needs_corpora

pytest.importorskip("hypothesis")
pytest.importorskip("tokenizers")

from hypothesis import given, settings
from hypothesis import strategies as st

import sample
import train
from quill.data import bpe, texts, token_files
from quill.data.token_files import open_dataset, prepare, read_tokenizer, take_over
from quill.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, from_json
from quill.errors import UserError
from quill.interop import to_tokenizer_json

ROOT = Path(token_files.__file__).parent.parent.parent
FILES = ["meta.json", "train.bin", "val.bin"]
# The ids are tiktoken's (0.14, from OpenAI's two files), and those of the npm package gpt-3-encoder (1.1.4).
GPT2 = {
    "Hello world": [15496, 995],
    " leading and  double   spaces ": [3756, 290, 220, 4274, 220, 220, 9029, 220],
    "tabs\tand\r\nlines\n\n\n  end\n": [8658, 82, 197, 392, 201, 198, 6615, 628, 198, 220, 886, 198],
    "it's they'll WE'VE don’t": [270, 338, 484, 1183, 12887, 6, 6089, 836, 447, 247, 83],
    "naïve Straße façade": [2616, 38776, 15195, 39683, 68, 24685, 16175, 671],
    "日本語のテキスト": [33768, 98, 17312, 105, 45739, 252, 5641, 24336, 25084, 43302],
    "👩‍👩‍👧 🙂 🇪🇺": [41840, 102, 447, 235, 41840, 102, 447, 235, 41840, 100, 32485, 12520, 229, 103, 8582, 229, 118],
    "12345 3.14159 ½ ²": [10163, 2231, 513, 13, 1415, 19707, 25208, 1587, 110],
    "<|endoftext|> is text": [27, 91, 437, 1659, 5239, 91, 29, 318, 2420],
    "\x00\x7f\u2028\ufeff\u00a0x\u0301": [188, 221, 447, 101, 171, 119, 123, 1849, 87, 136, 223],
}


@pytest.fixture(scope="module")
def description():
    """A tokenizer.json that was trained on a text with more than ASCII."""
    return bpe.train(bpe.cut_stream([ALICE + "naïve 日本語 日本語 don't 12 12\n\n  x"]), 10_000, 400)


@pytest.fixture(scope="module")
def tokenizer(description):
    return BPETokenizer(description)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


# ---------------------------------------------------------------- ids


def corpora_folder(name):
    folder = Path(os.environ.get("QUILL_CORPORA", "")) / name
    return pytest.param(folder, marks=pytest.mark.skipif(not folder.is_dir(), reason=f"QUILL_CORPORA has no {name}/"))


@pytest.mark.parametrize("folder", [corpora_folder("gpt2")])
def test_gpt2s_own_files_give_gpt2s_ids(folder):
    gpt2 = read_tokenizer(str(folder), is_documents=True)
    assert {text: gpt2.encode(text).tolist() for text in GPT2} == GPT2
    assert [gpt2.decode(ids) for ids in GPT2.values()] == [*GPT2]
    assert (gpt2.vocab_size, gpt2.bos) == (50_257, 50_256)
    assert gpt2.prompt("Hello world").tolist() == [50_256, 15496, 995]


@pytest.mark.parametrize("folder", [corpora_folder("gpt2")])
def test_tiny_shakespeare_has_nanogpts_number_of_tokens(folder, tmp_path):
    """The numbers are from nanoGPT's data/shakespeare/readme.md."""
    prepare(folder.parent / "tinyshakespeare.txt", tmp_path / "gpt2", str(folder))
    dataset = open_dataset(tmp_path, "gpt2")
    assert (len(dataset.train), len(dataset.val)) == (301_966, 36_059)


def merged_by_hand(text, description):
    """The ids of one word: merge the pair of the lowest rank again and again, as in Sennrich et al. (2016)."""
    character = {byte: char for char, byte in bpe.byte_of_character().items()}
    ranks = {tuple(pair): rank for rank, pair in enumerate(description["model"]["merges"])}
    word = [character[byte] for byte in text.encode()]
    while pairs := [pair for pair in zip(word, word[1:], strict=False) if pair in ranks]:
        best, merged = min(pairs, key=ranks.__getitem__), []
        while word:
            size = 2 if tuple(word[:2]) == best else 1
            merged.append("".join(word[:size]))
            word = word[size:]
        word = merged
    return [description["model"]["vocab"][token] for token in word]


def test_ids_are_those_of_the_algorithm(description, tokenizer):
    words = ["Alice", " was", " beginning", " sitting", " ", " naïve", " 日本語", "\n", " zebra"]  # GPT-2 splits so
    expected = [merged_by_hand(word, description) for word in words]
    assert tokenizer.encode("".join(words)).tolist() == sum(expected, [])
    assert max(map(len, expected)) > 1 and min(map(len, expected)) == 1


def test_bytes_are_named_as_gpt2_names_them():
    names = {byte: char for char, byte in bpe.byte_of_character().items()}
    assert sorted(names) == [*range(256)]
    assert [names[byte] for byte in b"A \n\xad\x00"] == ["A", "Ġ", "Ċ", "Ń", "Ā"]


@settings(derandomize=True, deadline=None, max_examples=100, database=None)
@given(text=st.text() | st.text("ab \n\u00a0\u20281'é日🙂<|endoftext>"), cuts=st.lists(st.integers(0, 30)))
def test_every_text_and_back(tokenizer, text, cuts):
    text = "".join(char for char in text if not "\ud800" <= char <= "\udfff")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert not set(ids.tolist()) & tokenizer.special.keys()
    decode, pieces = tokenizer.decoder(), []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), None], strict=True):
        pieces.append(decode(ids[start:end], final=end is None))
    assert "".join(pieces) == text


def test_token_bytes(tokenizer, description):
    documents = BPETokenizer(description, is_documents=True)
    for made in (tokenizer, documents):
        assert made.token_bytes().shape == (made.vocab_size,)
        assert made.token_bytes()[min(made.special)] == 0
        for i in range(256):
            assert made.token_bytes()[i] == 1
    without = description | {"added_tokens": []}
    assert BPETokenizer(without, True).token_bytes()[-1] == 0
    assert len(BPETokenizer(without, True).token_bytes()) == tokenizer.vocab_size


def test_bos(tokenizer, description):
    documents = BPETokenizer(description, is_documents=True)
    special = description["added_tokens"][0]
    assert special["content"] == "<|endoftext|>" and special["id"] == tokenizer.size - 1
    assert (tokenizer.bos, documents.bos) == (None, special["id"])
    assert tokenizer.vocab_size == documents.vocab_size == tokenizer.size
    without = BPETokenizer(description | {"added_tokens": []}, is_documents=True)
    assert (without.bos, without.vocab_size) == (special["id"], special["id"] + 1)
    ids = documents.encode_documents(["a\nb", "", "c"]).tolist()
    assert ids == [documents.bos, *tokenizer.encode("a\nb"), documents.bos, documents.bos, *tokenizer.encode("c")]
    assert documents.decode(ids) == "a\nbc"
    assert tokenizer.decode(ids) == "<|endoftext|>a\nb<|endoftext|><|endoftext|>c"
    assert documents.prompt("").tolist() == [documents.bos]
    assert tokenizer.prompt("").tolist() == tokenizer.encode("\n").tolist()


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_bos_of_its_own_with_characters_and_bytes(kind):
    make = {"char": lambda *settings: CharTokenizer("ab\n", *settings), "byte": ByteTokenizer}[kind]
    own = make(True, False)
    ids = own.encode_documents(["a\nb", "b"]).tolist()
    assert ids == [own.bos, *make().encode("a\nb"), own.bos, *make().encode("b")]
    assert (own.bos, own.vocab_size) == (own.size, own.size + 1)
    assert own.decode(ids) == "a\nbb"
    assert from_json(json.loads(json.dumps(own.to_json()))) == own != make(True)


# ---------------------------------------------------------------- pieces


@needs_corpora
def test_pieces_have_the_ids_of_the_whole_text(tmp_path):
    """The package, given all of Tiny Shakespeare as one string, finds the same ids as we do in pieces."""
    from tokenizers import Tokenizer

    path = Path(os.environ["QUILL_CORPORA"]) / "tinyshakespeare.txt"
    text = path.read_text(encoding="utf-8")[:300_000]
    (tmp_path / "part.txt").write_text(text, encoding="utf-8")
    meta = prepare(tmp_path / "part.txt", tmp_path / "mine", "bpe", vocab_size=1000)
    assert meta["tokenizer"]["tokenizer"]["added_tokens"][0]["id"] == 999
    dataset = open_dataset(tmp_path, "mine")
    theirs = Tokenizer.from_str(json.dumps(meta["tokenizer"]["tokenizer"]))
    border = len(text) * 9 // 10
    assert dataset.train.tolist() == theirs.encode(text[:border]).ids
    assert dataset.val.tolist() == theirs.encode(text[border:]).ids
    assert theirs.decode(dataset.val.tolist()) == text[border:]


def test_cuts():
    text = "a  b\n" * 10_000 + "x" * 30_000 + "\n\ny" * 10
    pieces = [*bpe.cut_stream([text])]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) == bpe.LONGEST_PIECE
    for size in (7, 9_999, 10_000, 25_001):
        assert [*bpe.cut_stream(text[i : i + size] for i in range(0, len(text), size))] == pieces
    for before, after in zip(pieces[:4], pieces[1:5], strict=True):
        assert not before[-1].isspace() and after[0] == " "


@pytest.mark.parametrize("documents", ["none", "blank_lines"])
@pytest.mark.parametrize("chunk", [5, 1000])
def test_two_prepares_give_the_same_bytes(write, tmp_path, monkeypatch, documents, chunk):
    """With chunks of another size, on one core, and with a sample that is smaller than the text too."""
    monkeypatch.setattr(bpe, "LONGEST_PIECE", 50)
    monkeypatch.setattr(bpe, "SAMPLE", 2000)
    source = write((ALICE + "\n日本語 text, ") * 3 + "x" * 120 + "\r\n \r\n last")
    prepare(source, tmp_path / "one", "bpe", documents, vocab_size=300)
    monkeypatch.setattr(texts, "CHUNK", chunk)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    prepare(source, tmp_path / "two", "bpe", documents, vocab_size=300)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_sample_comes_from_the_whole_text(monkeypatch):
    """The word at the end is learnt although the sample is a tenth of the text."""
    pieces = ["start start "] * 100 + ["middle "] * 100 + ["finish "] * 100
    size = len("".join(pieces))
    monkeypatch.setattr(bpe, "SAMPLE", size // 10)
    vocab = bpe.train(pieces, size, 300)["model"]["vocab"]
    assert {"start", "middle", "finish"} <= vocab.keys()


@pytest.mark.skipif(os.name != "posix", reason="ends as a signal ends a process on POSIX")
def test_ctrl_c_ends_the_training_of_a_tokenizer():
    code = (
        "import os, signal; from quill.data import bpe\n"
        "def pieces():\n"
        "    for number in range(10**7):\n"
        "        if number == 1000: os.kill(os.getpid(), signal.SIGINT)\n"
        "        yield 'some text ' * 10\n"
        "bpe.train(pieces(), 10**8, 300); print('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


# ---------------------------------------------------------------- where a tokenizer comes from


def test_a_tokenizer_from_each_place(description, tokenizer, write, tmp_path):
    (tmp_path / "hf").mkdir()
    write(json.dumps(description), "hf/tokenizer.json")
    (tmp_path / "files").mkdir()
    model = description["model"]
    write(json.dumps(model["vocab"] | {"<|endoftext|>": tokenizer.size - 1}), "files/vocab.json")
    merges = "".join(f"{a} {b}\n" for a, b in model["merges"])
    write("#version: 0.2\n" + merges, "files/merges.txt")
    prepare(write(ALICE), tmp_path / "data" / "first", str(tmp_path / "hf" / "tokenizer.json"))
    for place in ("hf", "hf/tokenizer.json", "files", "data/first"):
        meta = prepare(write(ALICE), tmp_path / "data" / "mine", str(tmp_path / place))
        same = from_json(meta["tokenizer"])
        assert (same.tokens, same.special) == (tokenizer.tokens, tokenizer.special)
        dataset = open_dataset(tmp_path / "data", "mine")
        assert np.concatenate([dataset.train, dataset.val]).size < len(ALICE) / 2
        assert dataset.tokenizer.decode(dataset.train) + dataset.tokenizer.decode(dataset.val) == ALICE


def test_another_datasets_characters(write, tmp_path):
    prepare(write("cab\nabc\n" * 9), tmp_path / "one")
    meta = prepare(write("ab\nb\na\nba"), tmp_path / "two", str(tmp_path / "one"), "lines")
    assert meta["tokenizer"] == {"kind": "char", "documents": True, "chars": "abc"}
    with pytest.raises(UserError, match="'x' .1 character that is not in the vocabulary"):
        prepare(write("abx"), tmp_path / "three", str(tmp_path / "one"))
    assert not (tmp_path / "three").exists()


def test_nanogpts_token_files(description, tokenizer, write, tmp_path):
    ids = tokenizer.encode(ALICE)
    (tmp_path / "owt").mkdir()
    ids[:-50].astype("<u2").tofile(tmp_path / "owt" / "train.bin")
    ids[-50:].astype("<u2").tofile(tmp_path / "owt" / "val.bin")
    path = str(write(json.dumps(description), "tokenizer.json"))
    for _ in range(2):  # the second time from the folder into itself
        take_over(tmp_path / "owt", tmp_path / "owt", path)
        dataset = open_dataset(tmp_path, "owt")
        assert dataset.tokenizer == tokenizer
        assert np.concatenate([dataset.train, dataset.val]).tolist() == ids.tolist()
    for content, reason in (
        (b"", "train.bin: .*empty file; --bins=FOLDER"),
        (b"abc", "train.bin: .*multiple of the data-type size; --bins=FOLDER"),
        (np.array([7, 60_000], "<u2").tobytes(), f"the id 60000, but --tokenizer has {tokenizer.vocab_size} ids"),
    ):
        write(content, "owt/train.bin")
        with pytest.raises(UserError, match=reason):
            take_over(tmp_path / "owt", tmp_path / "new", path)
        assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="nowhere/train.bin: No such file or directory; --bins=FOLDER"):
        take_over(tmp_path / "nowhere", tmp_path / "new", path)


# ---------------------------------------------------------------- a run


@pytest.mark.parametrize("documents", ["none", "blank_lines"])
def test_train_sample_and_score(write, tmp_path, capsys, documents):
    paragraphs = [f"A line {i}.\nAnother 日本 line {i % 7}.\n" for i in range(200)]
    prepare(write("\n".join(paragraphs)), tmp_path / "data" / "mine", "bpe", documents, vocab_size=300)
    options = TINY | {"dataset": "mine", "data_dir": tmp_path / "data", "out_dir": tmp_path / "run", "block_size": 32}
    options |= {"max_iters": 4, "lr_decay_iters": 4, "warmup_iters": 1, "eval_interval": 4, "final_samples": 1}
    assert train.main([f"--{key}={value}" for key, value in options.items()]) == 0
    (tmp_path / "data").rename(tmp_path / "moved")  # a checkpoint is enough
    capsys.readouterr()
    flags = [f"--out_dir={tmp_path / 'run'}", "--device=cpu", "--dtype=float32"]
    sample.main([*flags, "--start=A line", "--num_samples=2", "--max_new_tokens=30", "--temperature=0"])
    drawn = capsys.readouterr().out.split("\n---------------\n")
    assert drawn[0] == drawn[1] and drawn[0].startswith("A line") and drawn[2] == ""
    assert "<|endoftext|>" not in drawn[0]
    text = "A line 1.\nAnother 日本 line 1."
    sample.main([*flags, f"--score={text}", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["characters"] == len(text)
    ids = open_dataset(tmp_path / "moved", "mine").tokenizer.encode(text)
    assert result["tokens"] == len(ids) + (documents != "none")
    assert (result["rows"][-1]["token"] == "<end>") == (documents != "none")
    first = result["rows"][0]
    assert first["context"] == ("\\n" if documents == "none" else "<start>") and first["token"].startswith("A")


# ---------------------------------------------------------------- what is refused


def changed(description, **values):
    return json.loads(json.dumps(description)) | values


HOSTILE = [
    (lambda d: None, "not the tokenizer.json"),
    (lambda d: [], "not the tokenizer.json"),
    (lambda d: {"model": []}, "not the tokenizer.json"),
    (lambda d: changed(d, model={"type": "WordPiece", "vocab": {}}), "its model is 'WordPiece', not BPE"),
    (lambda d: changed(d, model=d["model"] | {"dropout": 0.1}), "leaves out merges at random"),
    (lambda d: changed(d, model=d["model"] | {"end_of_word_suffix": "</w>"}), "marks parts of words"),
    (lambda d: changed(d, model=d["model"] | {"vocab": {"a": 0}}), "its ids are not 0, 1, 2|256 bytes"),
    (lambda d: changed(d, model=d["model"] | {"vocab": {"a": "0"}}), "its ids are not 0, 1, 2"),
    (lambda d: changed(d, model=d["model"] | {"vocab": {**d["model"]["vocab"], "日": 0}}), "its ids are not"),
    (lambda d: changed(d, model=d["model"] | {"vocab": {**d["model"]["vocab"], "z" * 9: 2**40}}), "its ids are not"),
    (lambda d: changed(d, model=d["model"] | {"merges": [["q", "zzz"]]}), "a merge has a token"),
    (lambda d: changed(d, model=d["model"] | {"merges": [[1, 2]]}), "a merge has a token"),
    (lambda d: changed(d, model=d["model"] | {"merges": [["a"]]}), "not the tokenizer.json"),
    (lambda d: changed(d, model=d["model"] | {"merges": [{"q": 1, "z": 2}]}), "a merge has a token"),
    (lambda d: changed(d, model=d["model"] | {"merges": {"a": 1}}), "not the tokenizer.json"),
    (lambda d: changed(d, normalizer={"type": "NFC"}), "its normalizer changes the text"),
    (lambda d: changed(d, pre_tokenizer=None), "not the tokenizer.json"),
    (lambda d: changed(d, pre_tokenizer={"type": "Whitespace"}), "its pre_tokenizer is not GPT-2's"),
    (lambda d: changed(d, pre_tokenizer=d["pre_tokenizer"] | {"add_prefix_space": True}), "its pre_tokenizer is not"),
    (lambda d: changed(d, pre_tokenizer=d["pre_tokenizer"] | {"use_regex": False}), "its pre_tokenizer is not GPT-2's"),
    (lambda d: changed(d, added_tokens=[{"id": 5, "content": "x", "special": False}]), "not special"),
    (lambda d: changed(d, added_tokens=[{"id": [], "content": "x", "special": True}]), "not the tokenizer.json"),
    (lambda d: changed(d, added_tokens=[{"id": 5, "content": "x", "special": True}]), "its ids are not"),
    (
        lambda d: changed(d, added_tokens=[{"id": len(d["model"]["vocab"]), "content": "\ud800", "special": True}]),
        "Uni",
    ),
    (lambda d: changed(d, extra="\ud800"), "surrogates not allowed"),
    (lambda d: changed(d, extra={1, 2}), "not JSON serializable"),
]


@pytest.mark.parametrize("change, reason", HOSTILE)
def test_a_description_that_is_not_accepted(description, change, reason):
    values = {"kind": "bpe", "documents": False, "tokenizer": change(description)}
    with pytest.raises(UserError, match=reason):
        from_json(values)


def test_files_that_are_no_tokenizers(write, tmp_path):
    for content, reason in (
        ("{", "not a tokenizer .JSONDecodeError"),
        (b"\xff", "UnicodeDecodeError"),
        ("1", "not the"),
    ):
        path = write(content, "tokenizer.json")
        with pytest.raises(UserError, match=f"{path}: .*{reason}") as caught:
            read_tokenizer(str(path))
        assert "\n" not in str(caught.value)
    (tmp_path / "files").mkdir()
    write(json.dumps({"a": 0}), "files/vocab.json")
    for merges, reason in (
        (None, "No such file"),
        ("#version\na b c", "too many values"),
        ("#version\na z", "Exception"),
    ):
        if merges:
            write(merges, "files/merges.txt")
        with pytest.raises(UserError, match=reason):
            read_tokenizer(str(tmp_path / "files"))


def test_half_a_surrogate_pair(tokenizer):
    with pytest.raises(UserError, match=r"^'\\udce9' \(1 character"):
        tokenizer.encode("a\udce9")


def test_without_the_package(description, monkeypatch, write, tmp_path):
    monkeypatch.setattr(bpe, "find_spec", lambda name: None)
    for make in (
        lambda: prepare(write(ALICE), tmp_path / "mine", "bpe"),
        lambda: from_json({"kind": "bpe", "documents": False, "tokenizer": description}),
    ):
        with pytest.raises(UserError, match="a BPE tokenizer needs a package: pip install tokenizers"):
            make()
    assert not (tmp_path / "mine").exists()


def test_decoding_does_not_import_the_package(description):
    """Training on a dataset, and decoding what a model writes, start without it."""
    code = (
        "import json, sys; from quill.data.tokenizers import from_json;"
        "t = from_json(json.load(sys.stdin)); print(repr(t.decode([72, 73]))); sys.exit('tokenizers' in sys.modules)"
    )
    values = json.dumps({"kind": "bpe", "documents": True, "tokenizer": description})
    done = subprocess.run([sys.executable, "-c", code], input=values, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "'ij'\n"


@pytest.mark.slow
def test_transformers_finds_the_same_ids(description, tokenizer, write, tmp_path):
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(write(json.dumps(description), "tokenizer.json")))
    for text in [*GPT2, ALICE]:
        if "<|endoftext|>" not in text:
            assert fast(text)["input_ids"] == tokenizer.encode(text).tolist()
            assert fast.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("is_documents", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}},
        {"decoder": {"type": "Fuse"}},
        {"added_tokens": []},
    ],
    ids=lambda changes: " ".join(changes) or "as trained",
)
def test_an_exported_tokenizer_encodes_and_decodes_the_same(description, changes, is_documents):
    """Fields that quill does not use must not change what the exported tokenizer does."""
    if "added_tokens" in changes:
        vocab = {token: i for token, i in description["model"]["vocab"].items() if token != bpe.SPECIAL}
        changes = changes | {"model": description["model"] | {"vocab": vocab}}
    check_export(BPETokenizer(description | changes, is_documents))


@pytest.mark.parametrize("make", [ByteTokenizer, lambda *kind: CharTokenizer(ALICE, *kind)], ids=["byte", "char"])
def test_so_does_one_whose_documents_may_hold_newlines(make):
    check_export(make(True, False))


def check_export(tokenizer):
    import tokenizers

    theirs, start = tokenizers.Tokenizer.from_str(json.dumps(to_tokenizer_json(tokenizer))), tokenizer.prompt("")
    ids = tokenizer.encode(ALICE).tolist()
    assert theirs.encode(ALICE, add_special_tokens=False).ids == ids
    assert theirs.encode(ALICE).ids == (start.tolist() if tokenizer.is_documents else []) + ids
    assert theirs.decode(ids) == ALICE
    assert theirs.get_vocab_size() == tokenizer.vocab_size
