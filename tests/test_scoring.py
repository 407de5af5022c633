"""quill/scoring.py: losses equal the numpy reference's and GPT's own; the table and the JSON; mistakes."""

import json
import math

import numpy as np
import numpy_gpt
import pytest
import torch

import sample
from model import GPT
from quill import checkpoint, scoring
from quill.data.tokenizers import ByteTokenizer, CharTokenizer
from quill.errors import UserError
from quill.options import ModelConfig

CPU = torch.device("cpu")
CONFIG = ModelConfig(block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.5)


def make_model(vocab_size):
    """A model with large weights, so that probabilities differ, and with dropout, which a score must turn off."""
    torch.manual_seed(0)
    model = GPT(CONFIG, vocab_size)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def rows_of(text, tokenizer, temperature=1.0, device=CPU):
    """Returns the model, the rows of `text` and the text that they score."""
    model = make_model(tokenizer.vocab_size).to(device)
    ids, scored = scoring.encode(text, tokenizer)
    return model, list(scoring.score(model, tokenizer, ids, temperature, device)), scored


def reference(model, windows, temperature=1.0):
    """The losses of all ids of each window but the first, by the numpy reference, one prefix at a time."""
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    losses = []
    for window in windows:
        for t in range(1, len(window)):
            z = numpy_gpt.forward(np.array(window[:t]), weights, CONFIG)[-1] / temperature
            losses.append(np.log(np.exp(z - z.max()).sum()) - (z[window[t]] - z.max()))
    return losses


DOCUMENTS = CharTokenizer("abcdefghij", is_documents=True)  # a is 0, …, and BOS 10
STREAM = CharTokenizer("\nabcdefghij")  # the newline is 0, a is 1, …
CASES = [
    (DOCUMENTS, "cab", [[10, 2, 0, 1, 10]]),
    (DOCUMENTS, "cab\n \n\nj\n", [[10, 2, 0, 1, 10], [10, 9, 10]]),  # blank lines are not documents
    (DOCUMENTS, "abcdefghij", [[10, *range(8)], [7, 8, 9, 10]]),  # longer than block_size: two windows
    (DOCUMENTS, "abcdefgh", [[10, *range(8)], [7, 10]]),  # the second window predicts the end only
    (STREAM, "a", [[0, 1]]),
    (STREAM, "ab\nj\n", [[0, 1, 2, 0, 10, 0]]),
    (STREAM, "abcdefgh", [[0, *range(1, 9)]]),
    (STREAM, "abcdefghij" * 2, [[0, *range(1, 9)], [8, 9, 10, *range(1, 7)], [6, 7, 8, 9, 10]]),
    (ByteTokenizer(), "é\n", [[10, 0xC3, 0xA9, 10]]),
    (ByteTokenizer(is_documents=True), "é\nz", [[256, 0xC3, 0xA9, 256], [256, 122, 256]]),
    (ByteTokenizer(True, bos_is_newline=False), "é\nz", [[256, 0xC3, 0xA9, 10, 122, 256]]),  # one document
    (CharTokenizer("abcdefghij\n", True, bos_is_newline=False), "cab\nj\n", [[11, 3, 1, 2, 0, 10, 0, 11]]),
]


@pytest.mark.parametrize("tokenizer, text, windows", CASES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_losses_are_the_references(tokenizer, text, windows, temperature, device):
    model, rows, _ = rows_of(text, tokenizer, temperature, device)
    expected = reference(model.cpu(), windows, temperature)
    assert [row.loss for row in rows] == pytest.approx(expected, abs=1e-5)
    assert [row.probability for row in rows] == pytest.approx(np.exp(-np.array(expected)), abs=1e-6)


@pytest.mark.parametrize("tokenizer, text, windows", CASES)
def test_the_total_is_the_models_loss(tokenizer, text, windows):
    """The expected loss is GPT.forward's, one window at a time and without padding."""
    model, rows, scored = rows_of(text, tokenizer)
    model.eval()
    with torch.no_grad():
        losses = [model(torch.tensor([w[:-1]]), torch.tensor([w[1:]]))[1].item() for w in windows]
    total = sum(loss * (len(window) - 1) for loss, window in zip(losses, windows, strict=True))
    values = scoring.totals([row.loss for row in rows], scored)
    tokens = sum(len(window) - 1 for window in windows)
    assert values["tokens"] == tokens
    assert values["total_loss"] == pytest.approx(total, abs=1e-5)
    assert values["mean_loss"] == pytest.approx(total / tokens, abs=1e-5)
    assert values["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_the_likeliest_tokens():
    tokenizer = CharTokenizer("abc", is_documents=True)  # four ids, fewer than the five that a row shows
    _, rows, _ = rows_of("abcab", tokenizer)
    for row in rows:
        names, probs = zip(*row.likeliest, strict=True)
        assert sorted(names) == ["<end>", "a", "b", "c"]
        assert list(probs) == sorted(probs, reverse=True)
        assert sum(probs) == pytest.approx(1, abs=1e-6)
        assert dict(row.likeliest)[row.token] == row.probability
    model, rows, _ = rows_of("cab", DOCUMENTS)
    with torch.no_grad():
        probs = model(torch.tensor([[10, 2]]))[0][0, -1].softmax(-1)
    best = probs.argsort(descending=True)[:5].tolist()
    assert [name for name, _ in rows[1].likeliest] == [[*"abcdefghij", "<end>"][i] for i in best]
    assert [p for _, p in rows[1].likeliest] == pytest.approx(probs[best].tolist(), abs=1e-6)


def test_a_low_temperature_sharpens():
    text = "abcdefghij"
    cold, warm, hot = (rows_of(text, DOCUMENTS, temperature)[1] for temperature in (0.5, 1.0, 2.0))
    for a, b, c in zip(cold, warm, hot, strict=True):
        assert a.likeliest[0][0] == b.likeliest[0][0] == c.likeliest[0][0]
        assert a.likeliest[0][1] > b.likeliest[0][1] > c.likeliest[0][1]
    frozen = rows_of(text, DOCUMENTS, sample.COLDEST)
    assert all(row.likeliest[0][1] == 1 and math.isfinite(row.loss) for row in frozen[1])
    assert json.loads(scoring.to_json(*frozen[1:]))["perplexity"] is None  # too large for a float


@pytest.mark.parametrize(
    "tokenizer, text, characters, n_bytes",
    [
        (STREAM, "ab\n", 3, 3),
        (DOCUMENTS, "ab\n\ncd\n", 6, 6),  # the ends of two documents count
        (CharTokenizer("\né🙂"), "é🙂\n", 3, 7),
        (ByteTokenizer(), "é🙂\n", 3, 7),
        (ByteTokenizer(is_documents=True), "é🙂\nz", 5, 9),
    ],
)
def test_bits_per_character_and_per_byte(tokenizer, text, characters, n_bytes):
    _, rows, scored = rows_of(text, tokenizer)
    values, bits = scoring.totals([row.loss for row in rows], scored), -sum(math.log2(r.probability) for r in rows)
    assert (values["characters"], values["bytes"]) == (characters, n_bytes)
    assert values["bits_per_character"] == pytest.approx(bits / characters)
    assert values["bits_per_byte"] == pytest.approx(bits / n_bytes)
    predicted = np.append(scoring.encode(text, tokenizer)[0][1:], [tokenizer.bos] * tokenizer.is_documents)
    assert tokenizer.token_bytes()[predicted.astype(int)].sum() == n_bytes


def test_contexts_and_tokens_as_shown():
    tokenizer = CharTokenizer("\n\t ab\\␣語\u0301")
    rows = rows_of("a\t \\␣語\u0301b\n", tokenizer)[1]
    assert [row.token for row in rows] == ["a", r"\t", "␣", r"\\", r"\u2423", "語", r"\u0301", "b", r"\n"]
    assert [row.context for row in rows[:4]] == [r"\n", r"\na", r"\na\t", r"\na\t␣"]
    assert rows[7].context == r"…\t␣\\\u2423語\u0301"
    assert rows[8].context == "b"  # the second window
    rows = rows_of("aé\nz", ByteTokenizer(is_documents=True))[1]
    assert [row.token for row in rows] == ["a", r"\xc3", r"\xa9", "<end>", "z", "<end>"]
    contexts = ["<start>", "<start>a", r"<start>a\xc3", "<start>aé", "<start>", "<start>z"]
    assert [row.context for row in rows] == contexts
    ids = ByteTokenizer().encode("語" * 30)
    assert scoring.context_tail(ids, ByteTokenizer()) == "…" + "語" * 9


def test_the_table_is_aligned():
    text = "a語b\t" * 6
    tokenizer = CharTokenizer(text + "\n\u2028 語", is_documents=True)
    _, rows, scored = rows_of(text, tokenizer)
    lines = list(scoring.table(rows, tokenizer, scored))
    assert {scoring.width(line) for line in lines[: len(rows) + 1]} == {scoring.width(lines[0])}
    assert lines[-6] == ""
    tokenizer = ByteTokenizer(is_documents=True)
    lines = list(scoring.table(rows_of(text, tokenizer)[1], tokenizer, scored))
    assert all(scoring.width(line) <= 110 for line in lines)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints of untrained models: of documents, of a stream, of bytes."""
    folder = tmp_path_factory.mktemp("saved")
    for name, tokenizer in (("documents", DOCUMENTS), ("stream", STREAM), ("bytes", ByteTokenizer())):
        state = {"config": vars(CONFIG), "vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.to_json()}
        state |= {"model": make_model(tokenizer.vocab_size).state_dict(), "ema": None, "step": 0, "best_val_loss": 1.0}
        checkpoint.save(folder / f"{name}.pt", state)
    return folder


def run(capsys, ckpt, *flags):
    capsys.readouterr()
    sample.main([f"--ckpt={ckpt}", "--device=cpu", "--dtype=float32", *flags])
    return capsys.readouterr().out


def test_json_has_the_tables_numbers(saved, capsys):
    lines = run(capsys, saved / "documents.pt", "--score=cab").splitlines()
    values = json.loads(run(capsys, saved / "documents.pt", "--score=cab", "--json"))
    assert len(lines) == 1 + 4 + 6
    assert len(values["rows"]) == 4
    for line, row in zip(lines[1:5], values["rows"], strict=True):
        pairs = [word for top in row["likeliest"] for word in (top["token"], f"{top['probability']:.3f}")]
        numbers = [f"{row['probability']:.4f}", f"{row['loss']:.3f}"]
        assert line.split() == [row["context"], *pairs, row["token"], *numbers]
    expected = reference(make_model(11), [[10, 2, 0, 1, 10]])
    assert values["total_loss"] == pytest.approx(sum(expected), abs=1e-5)
    shown = {line[:20].strip(): float(line[20:].split()[0]) for line in lines[6:]}
    keys = ("total_loss", "mean_loss", "perplexity", "bits_per_character", "bits_per_byte")
    assert shown == {key.replace("_", " "): float(f"{values[key]:.4f}") for key in keys}
    assert (values["tokens"], values["characters"], values["bytes"]) == (4, 4, 4)


def test_the_temperature_is_1_unless_given(saved, capsys):
    bare, one, half = (
        run(capsys, saved / "stream.pt", "--score=abc", *flags)
        for flags in ([], ["--temperature=1"], ["--temperature=0.5"])
    )
    assert bare == one == run(capsys, saved / "stream.pt", "--score=abc", "--temperature=") != half


def test_a_text_from_a_file(saved, capsys, tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfabc\r\njjj\r\n")
    from_file = run(capsys, saved / "stream.pt", f"--score=FILE:{tmp_path / 'x.txt'}")
    assert from_file == run(capsys, saved / "stream.pt", "--score=abc\njjj\n")
    from_file = run(capsys, saved / "documents.pt", f"--score=FILE:{tmp_path / 'x.txt'}")
    assert from_file == run(capsys, saved / "documents.pt", "--score=abc\njjj")


def test_a_nanogpt_checkpoint(data_dir, tmp_path, capsys):
    """`prose` has no newline, so the first token is predicted from the first character of its vocabulary, a space."""
    model = make_model(13)
    shape = {key: getattr(CONFIG, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")}
    theirs = {"model": model.state_dict(), "model_args": shape | {"vocab_size": 13}, "config": {"dataset": "prose"}}
    torch.save(theirs, tmp_path / "ckpt.pt")
    values = json.loads(run(capsys, tmp_path / "ckpt.pt", f"--data_dir={data_dir}", "--score=then", "--json"))
    ids = [" adehilnorstu".index(char) for char in " then"]
    assert [row["loss"] for row in values["rows"]] == pytest.approx(reference(model, [ids]), abs=1e-5)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--score=abÄ\nz"], [r"--score=abÄ\nz: 'z', 'Ä' (2 characters that are not in the vocabulary)", "stream.pt"]),
        (["--score=" + "ab" * 99 + "z"], ["…: 'z' (1 character"]),
        (["--start=z\n"], [r"--start=z\n: 'z'"]),
        (["--score="], ["--score=: there is no text to score"]),
        (["--score"], ["write --score=VALUE"]),
        (["--score=FILE:nowhere.txt"], ["--score=FILE:nowhere.txt: No such file"]),
        (["--score=FILE:latin1.txt"], ["--score=FILE:latin1.txt: not UTF-8 at byte 1"]),
        (["--score=FILE:empty.txt"], ["--score=FILE:empty.txt: there is no text"]),
        (["--score=a", "--temperature=0"], ["--temperature=0.0: must be at least 1e-06 with --score"]),
        (["--score=a", "--start=b"], ["--score and --start don't go together"]),
        (["--score=a", "--top_k=5", "--top_p=0.9"], ["--score and --top_k, --top_p don't go together"]),
        (["--score=a", "--num_samples=1", "--max_new_tokens=9", "--seed=1"], ["--num_samples, --max_new_tokens, --se"]),
        (["--json"], ["--json is for a score; give --score=TEXT"]),
    ],
)
def test_mistakes(saved, capsys, monkeypatch, tmp_path, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin1.txt").write_bytes(b"a\xe9")
    (tmp_path / "empty.txt").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(UserError) as error:
        run(capsys, saved / "stream.pt", *flags)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


def test_blank_lines_are_not_scored(saved, capsys):
    with pytest.raises(UserError, match=r"--score= \\n: there is no text to score"):
        run(capsys, saved / "documents.pt", "--score= \n")
    with pytest.raises(UserError, match="' ' .1 character that is not in the vocabulary"):
        run(capsys, saved / "documents.pt", "--score=a b")


def test_words_that_could_be_values_are_texts(saved, capsys):
    for text in ("none", "True", "0"):
        values = json.loads(run(capsys, saved / "bytes.pt", f"--score={text}", "--json"))
        assert "".join(row["token"] for row in values["rows"]) == text
