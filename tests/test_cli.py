"""quill/cli.py: flags and config files become checked options; every mistake is one line."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from quill.cli import (
    CONFIG_DIR,
    coerce,
    config_files,
    help_text,
    list_configs,
    note,
    option_types,
    read_args,
    read_config_file,
)
from quill.errors import UserError
from quill.options import PrepareConfig, SampleConfig, TrainConfig

ROOT = Path(__file__).parent.parent


def flags(*argv, schema=TrainConfig):
    return read_args(argv, schema, "")[1]


def config_file(tmp_path, text):
    path = tmp_path / "run.py"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--n_layer=3", 3),
        ("--max_iters=1e3", 1000),
        ("--max_iters=1_000", 1000),
        ("--learning_rate=1", 1.0),
        ("--learning_rate=1e-3", 0.001),
        ("--bias=true", True),
        ("--bias=1", True),
        ("--bias=False", False),
        ("--bias=0", False),
        ("--bias", True),
        ("--out_dir=a=b", "a=b"),
        ("--out_dir=1", "1"),
        ("--lr_decay_iters=", None),
        ("--lr_decay_iters=9", 9),
        ("--compile=False", False),
        ("--compile=1", True),
        ("--compile=auto", "auto"),
        ("--norm=rmsnorm", "rmsnorm"),
    ],
)
def test_flags_and_files_mean_the_same(flag, value, tmp_path):
    key, _, text = flag.removeprefix("--").partition("=")
    got = flags(flag)
    assert got == {key: value}
    assert type(got[key]) is type(value)
    if text:
        from_file = read_config_file(config_file(tmp_path, f"{key} = {text!r}"), TrainConfig)
        assert from_file == {key: value}
        assert type(from_file[key]) is type(value)


def test_values_of_a_file_keep_their_types(tmp_path):
    text = "import time\n_private = [1]\ndef helper(): pass\nmax_iters = 5 * 8\nlearning_rate = 1\nn_layer = 2.0\n"
    got = read_config_file(config_file(tmp_path, text), TrainConfig)
    assert got == {"max_iters": 40, "learning_rate": 1.0, "n_layer": 2}
    assert type(got["learning_rate"]) is float
    assert type(got["n_layer"]) is int


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--n_layers=3"], ["n_layers", "did you mean n_layer?"]),
        (["--zzz=3"], ["there is no option zzz"]),
        (["--n_layer=three"], ["n_layer", "whole number", "three"]),
        (["--n_layer=2.5"], ["whole number", "2.5"]),
        (["--n_layer=True"], ["whole number"]),
        (["--learning_rate=fast"], ["learning_rate", "a number"]),
        (["--bias=maybe"], ["bias", "True or False", "maybe"]),
        (["--norm=layrnorm"], ["norm takes layernorm or rmsnorm or none", "did you mean layernorm?"]),
        (["--n_layer"], ["--n_layer=12"]),
        (["-n_layer=3"], ["--key=value"]),
    ],
)
def test_wrong_flags(argv, words):
    with pytest.raises(UserError) as error:
        flags(*argv)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("n_layer = 2\nn_heads = 3\n", ["run.py, line 2", "n_heads", "did you mean n_head?"]),
        ("n_layer = 2\nbias = 'x'\n", ["run.py, line 2", "True or False"]),
        ("n_layer = 2\n\nn_head = = 3\n", ["run.py, line 3", "invalid syntax"]),
        ("x = 1\n1 / 0\n", ["run.py, line 2", "ZeroDivisionError"]),
        ("n_layer = [1]\n", ["line 1", "n_layer takes a number", "[1]"]),
        ("dataset = 3\n", ["line 1", "a text in quotes"]),
        ("import nonsense_module\n", ["line 1", "nonsense_module"]),
        ("raise SystemExit(3)\n", ["line 1", "SystemExit"]),
    ],
)
def test_wrong_files(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        read_config_file(config_file(tmp_path, text), TrainConfig)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_one_that_is_not_utf8(tmp_path):
    with pytest.raises(UserError, match="config/shakespear.py: no such config file .did you mean config/shakespeare_"):
        read_config_file("config/shakespear.py", TrainConfig)
    path = tmp_path / "run.py"
    path.write_bytes(b"dataset = '\xff'\n")
    with pytest.raises(UserError, match="run.py, line 1: .*utf-8"):
        read_config_file(path, TrainConfig)


def test_a_config_file_runs_in_a_new_namespace(tmp_path):
    before = set(sys.modules["quill.cli"].__dict__)
    read_config_file(config_file(tmp_path, "n_layer = 2\n_x = 5\n"), TrainConfig)
    assert set(sys.modules["quill.cli"].__dict__) == before


def test_nanogpts_other_keys_are_translated_and_noted(capsys, tmp_path):
    text = "wandb_log = True\nwandb_project = 'x'\nalways_save_checkpoint = False\ndecay_lr = False\nwarmup_iters = 9\n"
    got = read_config_file(config_file(tmp_path, text), TrainConfig)
    assert got == {"schedule": "constant", "warmup_iters": 0}  # nanoGPT has no warm-up without decay
    assert len(capsys.readouterr().err.splitlines()) == 4
    assert flags("--decay_lr=True", "--backend=gloo") == {"schedule": "cosine"}
    notices = capsys.readouterr().err
    assert "note: backend" in notices
    assert "note: decay_lr" in notices
    assert flags("--decay_lr=False", "--warmup_iters=9")["warmup_iters"] == 0
    assert flags("--init_from=resume", schema=SampleConfig) == {}
    with pytest.raises(UserError, match="the folder of GPT-2's weights"):
        flags("--init_from=gpt2-xl", schema=SampleConfig)


def test_an_empty_value_leaves_a_number_at_its_default():
    assert flags("--top_p=", "--seed=", "--start=", schema=SampleConfig) == {"top_p": None, "start": ""}


@pytest.mark.parametrize("schema", [TrainConfig, SampleConfig, PrepareConfig])
def test_help_names_every_option_once(schema, capsys):
    text = help_text(schema, "the docstring")
    for option in dataclasses.fields(schema):
        assert text.count(f"  --{option.name}=") == 1
    with pytest.raises(SystemExit) as exit:
        read_args(["--help"], schema, "the docstring")
    assert exit.value.code == 0
    assert capsys.readouterr().out.strip() == text


def test_every_shipped_config_is_valid_and_holds_assignments_only():
    assert {"names", "names32k", "shakespeare_char", "shakespeare_char_cpu", "gpt2"} <= {p.stem for p in config_files()}
    for path in config_files():
        config = TrainConfig(**read_config_file(path, TrainConfig))
        assert f"python train.py {path.relative_to(ROOT)}" in path.read_text(encoding="utf-8") or path.stem == "gpt2"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert all(isinstance(node, (ast.Assign, ast.Expr)) for node in tree.body), path
        assert config.out_dir == f"out/{path.relative_to(CONFIG_DIR).with_suffix('')}"


def test_the_list_of_configs_has_a_line_for_each():
    lines = list_configs().splitlines()
    assert len(lines) == len(config_files())
    assert all(len(line.split(None, 1)[1]) > 20 for line in lines)


def test_cli_imports_the_standard_library_only():
    code = "import quill.cli, sys; print(not {'torch', 'numpy', 'tqdm'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "True"


@pytest.mark.parametrize(
    "source",
    [
        b"\xef\xbb\xbfn_layer = 2\n",
        b"# -*- coding: latin-1 -*-\nn_layer = 2  # \xe9\n",
    ],
    ids=["byte-order mark", "latin-1"],
)
def test_encodings_of_a_config_file(tmp_path, source):
    """A key that is wrong is still found on its line."""
    path = tmp_path / "run.py"
    path.write_bytes(source)
    assert read_config_file(path, TrainConfig) == {"n_layer": 2}
    path.write_bytes(source + b"\nn_heads = 3\n")
    with pytest.raises(UserError, match=f"line {source.count(10) + 2}: there is no option n_heads"):
        read_config_file(path, TrainConfig)


@pytest.mark.parametrize(
    "source, words",
    [
        ("class Stop(BaseException): pass\nraise Stop('no')\n", "line 2: Stop: no"),
        ("class Bad(Exception):\n    def __str__(self): 1 / 0\nraise Bad\n", "Bad: <Bad that can't be printed"),
        ("class Bad:\n    def __repr__(self): 1 / 0\nn_layer = Bad()\n", "n_layer takes .*not <Bad that can't be pr"),
        ("class Bad:\n    def __eq__(self, other): 1 / 0\n    __hash__ = None\nnorm = Bad()\n", "norm takes"),
        ("raise ValueError('two\\nlines')\n", "line 1: ValueError: two\nlines"),
    ],
)
def test_contrived_config_files(tmp_path, source, words):
    path = tmp_path / "run.py"
    path.write_text(source, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read_config_file(path, TrainConfig)


def test_a_base_holds_where_a_config_file_has_no_option(tmp_path):
    (tmp_path / "a.py").write_text("n_layer = 3\nn_head = 2\nn_embd = 8\n", encoding="utf-8")
    (tmp_path / "b.py").write_text("base = 'a.py'\nn_layer = 5\n", encoding="utf-8")
    (tmp_path / "c.py").write_text("n_head = 4\nbase = 'b.py'\n", encoding="utf-8")
    assert read_config_file(tmp_path / "c.py", TrainConfig) == {"n_layer": 5, "n_head": 4, "n_embd": 8}


@pytest.mark.parametrize(
    "base, words",
    [
        ("'nowhere.py'", "mine.py, line 2: base is 'nowhere.py'; name a config file in the same folder"),
        ("3", "mine.py, line 2: base is 3; name a config file"),
        ("''", "mine.py, line 2: base is ''; name a config file"),
        ("'mine.py'", "mine.py, line 2: base = mine.py leads back to mine.py"),
        ("'round.py'", "round.py, line 1: base = mine.py leads back to mine.py"),
        ("'0.py'", "or to more than 20 files"),
        ("'typo.py'", "typo.py, line 1: there is no option n_layers"),
    ],
)
def test_mistakes_in_a_base(tmp_path, base, words):
    (tmp_path / "round.py").write_text("base = 'mine.py'\n", encoding="utf-8")
    (tmp_path / "typo.py").write_text("n_layers = 3\n", encoding="utf-8")
    for i in range(30):
        (tmp_path / f"{i}.py").write_text(f"base = '{i + 1}.py'\n", encoding="utf-8")
    (tmp_path / "30.py").write_text("n_layer = 3\n", encoding="utf-8")
    (tmp_path / "mine.py").write_text(f"n_layer = 3\nbase = {base}\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_config_file(tmp_path / "mine.py", TrainConfig)
    assert words in str(error.value)


def test_a_config_file_can_be_interrupted(tmp_path):
    path = tmp_path / "run.py"
    path.write_text("raise KeyboardInterrupt\n", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        read_config_file(path, TrainConfig)


def test_a_message_is_one_line_whatever_it_quotes(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    note("--dataset=a\nb\r\x1b[31m\u2028\udc80 é 語")
    assert capsys.readouterr().err == "--dataset=a\\nb\\r\\x1b[31m\\u2028\\udc80 é 語\n"


@pytest.mark.parametrize("option, value", [("out_dir", "a\0b"), ("dataset", "\ud800"), ("init_from", "x\0")])
def test_names_that_no_file_can_have(option, value):
    with pytest.raises(UserError, match=f"--{option}=.*must be UTF-8 text without null characters"):
        TrainConfig(**{option: value})


@pytest.mark.parametrize("value, expected", [("auto", "auto"), ("3", 3), (2, 2)])
def test_an_option_that_is_a_number_or_a_word(value, expected):
    assert coerce(value, option_types(TrainConfig)["threads"], "", "threads") == expected
    with pytest.raises(UserError, match="threads takes a whole number or auto, not 'x'"):
        coerce("x", option_types(TrainConfig)["threads"], "", "threads")
