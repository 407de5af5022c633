"""What the page shows before it asks about a run: configs, dials, lessons and code, all read from the repository."""

import ast
import re
import textwrap
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args

from quill.cli import CONFIG_DIR, config_files, option_types, read_config_file
from quill.options import TrainConfig

ROOT = CONFIG_DIR.parent
DIALS = ["n_layer", "n_head", "n_embd", "block_size", "dropout", "batch_size"]
DIALS += ["learning_rate", "optimizer", "max_iters", "seed"]
CODE = {
    "model.py": "GPT.final_hidden CausalSelfAttention.qkv CausalSelfAttention.attend MLP.forward Block.forward "
    "GPT.forward GPT.init_weights",
    "quill/generation.py": "sample_token probabilities",
    "quill/scoring.py": "score",
    "train.py": "train_step",
}


@cache
def read_contents() -> dict[str, Any]:
    """Return what does not change while the server runs: configs, dials, lessons, code."""
    configs = [read_config(path) for path in config_files()]
    dials, kinds = [], option_types(TrainConfig)
    helps = {f.name: f.metadata["help"] for f in fields(TrainConfig)}
    for name in DIALS:
        choices = list(get_args(kinds[name])) or None
        kind = "choice" if choices else kinds[name].__name__
        dials.append({"name": name, "help": helps[name], "kind": kind, "choices": choices})
    lessons = [read_lesson(config) for config in configs if config["name"].startswith("config/ladder/")]
    code = {name: find_code(file, name) for file, names in CODE.items() for name in names.split()}
    return {"configs": configs, "dials": dials, "lessons": lessons, "code": code}


def read_config(path: Path) -> dict[str, Any]:
    """Return the name of a config, its docstring and all options that it trains with."""
    about = ast.get_docstring(ast.parse(path.read_bytes())) or ""
    options = asdict(TrainConfig(**read_config_file(path, TrainConfig)))
    name = path.relative_to(ROOT).as_posix()
    return {"name": name, "title": about.partition("\n")[0], "about": about, "options": options}


def read_lesson(config: dict[str, Any]) -> dict[str, Any]:
    """Return the lesson in the docstring of a rung: its title, its paragraphs, and the loss that was measured."""
    first, *rest = config["about"].split("\n\n")
    title, _, more = first.partition(": ")[2].partition(". ")
    paragraphs = [part for part in (more, *rest) if part and not part.startswith(("    ", "Measured"))]
    loss = re.search(r"validation loss ([\d.]+\d)", rest[-1])
    return {
        "number": int(Path(config["name"]).stem.partition("_")[0]),
        "config": config["name"],
        "title": title.removesuffix("."),
        "text": "\n\n".join(part.replace("\n", " ") for part in paragraphs),
        "measured_loss": float(loss[1]) if loss else None,
    }


def find_code(file: str, name: str) -> dict[str, Any]:
    """Return the source of a function, and its line. name: the function's, or Class.function."""
    source = (ROOT / file).read_text(encoding="utf-8")
    node: Any = ast.parse(source)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
    return {"name": name, "file": file, "line": node.lineno, "source": textwrap.dedent("\n".join(lines))}


def write_config(name: str, options: dict[str, Any]) -> str:
    """Return a config file that trains the run `name` again, with the options that differ from the defaults."""
    stem = re.sub(r"\W", "_", Path(name).name)
    options = options | {"out_dir": f"out/{stem}"}
    own = (key for key in options if options[key] != getattr(TrainConfig, key))
    lines = [f"{key} = {options[key]!r}\n" for key in own if key not in ("init_from", "overwrite", "page")]
    return f'"""The options of the run {stem}.\n\n    python train.py {stem}.py\n"""\n\n' + "".join(lines)
