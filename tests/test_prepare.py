"""prepare.py: one command for each text, and one line for each mistake. Its files are tested in test_token_files.py."""

import io
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ALICE, needs_corpora

import prepare as script
from quill.cli import highlight
from quill.errors import UserError

REPO = Path(script.__file__).parent


def run(*args, **options):
    return subprocess.run(
        [sys.executable, REPO / "prepare.py", *args], capture_output=True, text=True, encoding="utf-8", **options
    )


def test_a_text_in_one_command(write, tmp_path, capsys):
    script.main([f"--input={write(ALICE)}", "--dataset=alice", f"--data_dir={tmp_path}"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[12:] for line in lines[:4]] == [
        f"{len(ALICE) * 9 // 10:,} tokens",
        f"{len(ALICE) - len(ALICE) * 9 // 10:,} tokens",
        f"{len(set(ALICE))} characters",
        str(tmp_path / "alice"),
    ]
    config, flag = "config/shakespeare_char_cpu.py", f"--data_dir={tmp_path}"
    assert lines[4].split()[1:] == ["python", "train.py", config, "--dataset=alice", "--out_dir=out/alice", flag]
    assert (REPO / config).is_file()


@pytest.mark.parametrize(
    "name", ["names", *(pytest.param(name, marks=needs_corpora) for name in ("names32k", "shakespeare_char"))]
)
def test_a_known_corpus_in_one_command(tmp_path, capsys, name):
    same = [f"--dataset={name}", f"--documents={'lines' if 'names' in name else 'none'}", "--tokenizer=char"]
    for flags in ([], same):
        script.main([name, *flags, f"--data_dir={tmp_path}"])
        out = capsys.readouterr().out
        assert f"python train.py config/{name}.py" in out
        assert (REPO / "config" / f"{name}.py").is_file()
    assert ("26 characters and BOS" in out) == ("names" in name)
    assert (tmp_path / name / "meta.json").is_file()


@pytest.mark.parametrize(
    "args, reason",
    [
        ([], "no corpus and no --input given.*shakespeare_char.*names32k.*--input=my.txt"),
        (["shakespere_char"], "did you mean shakespeare_char"),
        (["xyzzy"], "the known ones are shakespeare_char, names, names32k"),
        (["TEXT"], "is not a known corpus.*--input=.*text.txt --dataset="),
        (["names", "names32k"], "give one corpus, not 2"),
        (["--input=TEXT"], "no name given for the dataset.*--dataset=mine"),
        (["--dataset=mine"], "--dataset=mine: no --input given; add --input=FILE"),
        (["--dataset=names32k"], "`python prepare.py names32k`"),
        (["--input=TEXT", "--dataset=names32k"], "is the name of a known corpus"),
        (["names", "--documents=none"], "--documents=none: names has documents=lines"),
        (["names", "--tokenizer=byte"], "--tokenizer=byte: names has tokenizer=char"),
        (["names", "--dataset=mine"], "--dataset=mine: names has dataset=names"),
        (["names", "--input=TEXT"], "bundled"),
        (["shakespeare_char", "--input=TEXT"], "is not shakespeare_char: its SHA-256"),
        (
            ["--input=TEXT", "--dataset=mine", "--tokenizer=bep"],
            "tokenizer=bep: is none of char, byte, bpe.*did you mean bpe",
        ),
        (["--input=TEXT", "--dataset=mine", "--tokenizer=.*"], "--tokenizer=.*: is none of"),
        (["--input=TEXT", "--dataset=mine", "--tokenizer=TEXT"], "text.txt: not a tokenizer .JSONDecodeError"),
        (["--input=TEXT", "--dataset=mine", "--tokenizer=bpe", "--vocab_size=256"], "must be at least 257"),
        (["--input=TEXT", "--dataset=mine", "--tokenizer=bpe", "--vocab_size=9e9"], "must be below 1048576"),
        (["--input=TEXT", "--dataset=mine", "--vocab_size=512"], "--vocab_size=512: is for --tokenizer=bpe"),
        (["names", "--vocab_size=512"], "--vocab_size=512: is for --tokenizer=bpe"),
        (["names", "--tokenizer=bpe"], "--tokenizer=bpe: names has tokenizer=char"),
        (["--input=TEXT", "--dataset=mine", "--documents=line"], "--documents=line: is one of none, lines, blank_"),
        (["--input=TEXT", "--dataset=mine", "--documents=xjsonl:text"], "--documents=xjsonl:text: is one of"),
        (["--input=TEXT", "--dataset=mine", "--documents=jsonl:"], "or jsonl:FIELD, as in jsonl:text"),
        (["--input=TEXT,", "--dataset=mine"], "no such file"),
        (["--bins=x"], "--bins=x: give the ids' --tokenizer=PATH with it"),
        (["--bins=x", "--tokenizer=y"], "--bins=x: no name given for the dataset"),
        (["--bins=x", "--tokenizer=bpe", "--dataset=mine"], "give the ids' --tokenizer=PATH with it"),
        (["--bins=x", "--tokenizer=y", "--dataset=mine", "--input=TEXT"], "and neither --input nor --documents"),
        (["--bins=x", "--tokenizer=y", "--dataset=mine"], "--tokenizer=y: is none of"),
        (["names", "--bins=x"], "--bins=x: names has bins=; leave it out"),
        (["--input=TEXT", "--dataset=mine", "--splits=3"], "no option splits"),
        *(
            (["--input=TEXT", f"--dataset={name}"], "begin it with a letter")
            for name in ["a/b", "..", "a\\b", "-x", ".x", " "]
        ),
    ],
)
def test_wrong_commands(write, tmp_path, args, reason):
    source = str(write(ALICE))
    with pytest.raises(UserError, match=reason) as caught:
        script.main([arg.replace("TEXT", source) for arg in args] + [f"--data_dir={tmp_path / 'data'}"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_an_error_is_one_line_and_exit_code_2():
    result = run()
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("prepare.py: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files as POSIX does")
def test_a_file_that_cannot_grow_is_removed(write, tmp_path):
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    source = write(ALICE * 100)
    result = run(f"--input={source}", "--dataset=mine", f"--data_dir={tmp_path / 'data'}", preexec_fn=limit)
    assert result.returncode == 2
    assert "can't write" in result.stderr
    assert "File too large" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "data" / "mine").exists()


def test_help_answers_within_300_ms():
    times = []
    for _ in range(5):
        start = time.perf_counter()
        result = run("--help")
        times.append(time.perf_counter() - start)
    assert result.returncode == 0
    assert "--documents=none" in result.stdout
    assert result.stderr == ""
    assert min(times) < 0.3


def test_torch_is_not_imported(tmp_path):
    code = "import sys, prepare; prepare.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "names", f"--data_dir={tmp_path}"]
    assert subprocess.run(command, cwd=REPO, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in another unit elsewhere")
@pytest.mark.parametrize("kind", ["char", "byte"])
@pytest.mark.parametrize("documents", ["none", "lines"])
def test_a_large_file_takes_little_memory_and_time(tmp_path, kind, documents):
    source, line = tmp_path / "large.txt", io.BytesIO()
    rng = random.Random(0)
    for _ in range(20_000):
        line.write("".join(rng.choices("etaoin shrdlu ß日", k=rng.randint(4, 80))).encode() + b"\n")
    with open(source, "wb") as file:
        while file.tell() < 200e6:
            file.write(line.getbuffer())
    # Another process starts prepare.py and measures it, because a child's peak memory includes that of its parent.
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "usage = resource.getrusage(resource.RUSAGE_CHILDREN); print(usage.ru_maxrss, usage.ru_utime + usage.ru_stime)"
    )
    command = [REPO / "prepare.py", f"--input={source}", "--dataset=large", f"--data_dir={tmp_path}"]
    command = [sys.executable, "-c", code, sys.executable, *command, f"--tokenizer={kind}", f"--documents={documents}"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    kib, seconds = map(float, result.stdout.split())
    assert kib * 1024 < 300e6  # whatever the file's length
    assert source.stat().st_size / seconds > 20e6


def test_show_by_hand(write, tmp_path, capsys):
    """Ids are ranks, so of "abba c" the space is 0 and a is 1. Documents have BOS at both ends."""
    folder = [f"--data_dir={tmp_path}"]
    script.main([f"--input={write('abba c' * 9)}", "--dataset=prose", *folder])
    script.main([f"--input={write('anna' + chr(10) + 'bob', 'n.txt')}", "--dataset=two", "--documents=lines", *folder])
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    script.main(["--dataset=prose", "--show=ab c", *folder])
    assert capsys.readouterr().out.splitlines() == [
        "x  a b ␣",
        "   1 2 0",
        "y  b ␣ c",
        "   2 0 3",
        "The 3 examples in this window: what the model sees → what it is to predict",
        " 0  a → b",
        " 1  a b → ␣",
        " 2  a b ␣ → c",
    ]
    script.main(["--dataset=two", "--show=bob", *folder])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["4", "1", "3", "1"] and lines[3].split() == ["1", "3", "1", "4"]
    assert lines[-1] == " 3  BOS b o b → BOS"
    script.main(["--dataset=prose", "--show=" + "abba c" * 9, *folder])
    assert "The 16 examples" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize(
    "args, reason",
    [
        (["names", "--show="], "--show=TEXT takes a text"),
        (["--show=hello"], "--show: name a dataset, as in python prepare.py names --show=emma"),
        (["names", "--show=Z"], "'Z' .*not in the vocabulary"),
        (["names", "--show=a\nb"], "--show=a\nb: give one document"),
        (["byte", "--show=x"], "byte is not a known corpus"),
        (["--dataset=nothing", "--show=x"], "there is no .*nothing/meta.json"),
        (["names", "--show=x", "--tokenizer=char", "--input=f"], "no other options than --dataset and --data_dir"),
        (["xyzzy", "--show=x"], "xyzzy is not a known corpus"),
    ],
)
def test_mistakes_in_show(tmp_path, args, reason):
    with pytest.raises(UserError, match=reason):
        script.main([*args, f"--data_dir={tmp_path}"])


def test_colours_are_for_a_terminal(monkeypatch):
    """NO_COLOR (no-color.org) and TERM=dumb turn them off."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert highlight("x") == "x"
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    assert highlight("x") == "\033[1;36mx\033[0m"
    monkeypatch.setenv("TERM", "dumb")
    assert highlight("x") == "x"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert highlight("x") == "x"
