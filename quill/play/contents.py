"""What the page shows before it asks about a run: configs, dials, lessons and code, all read from the repository."""

from __future__ import annotations

import ast
import re
import textwrap
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from quill.cli import CONFIG_DIR, config_files, option_types, read_config_file
from quill.options import TrainConfig

ROOT = CONFIG_DIR.parent
DIALS = ["n_layer", "n_head", "n_embd", "block_size", "dropout", "batch_size"]
DIALS += ["learning_rate", "optimizer", "max_iters", "seed"]
CODE = {
    "model.py": ["final_hidden", "qkv", "attend", "MLP.forward", "Block.forward", "GPT.forward", "init_weights"],
    "quill/generation.py": ["sample_token", "probabilities"],
    "quill/scoring.py": ["score"],
    "train.py": ["train_step"],
}


def read_contents() -> dict[str, Any]:
    """Return what does not change while the server runs: configs, dials, lessons, code."""
    configs = [read_config(path) for path in config_files()]
    lessons = [read_lesson(config) for config in configs if config["name"].startswith("config/ladder/")]
    code = {name: find_code(file, name) for file, names in CODE.items() for name in names}
    return {"configs": configs, "dials": [*map(dial, DIALS)], "lessons": lessons, "code": code}


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


def dial(name: str) -> dict[str, Any]:
    """Return the help line of an option, and the values that it takes."""
    kind, help = (
        option_types(TrainConfig)[name],
        next(f for f in fields(TrainConfig) if f.name == name).metadata["help"],
    )
    choices = list(get_args(kind)) if get_origin(kind) is Literal else None
    return {"name": name, "help": help, "kind": "choice" if choices else kind.__name__, "choices": choices}


def find_code(file: str, name: str) -> dict[str, Any]:
    """Return the source of a function, and its line. name: the function's, or Class.function."""
    source = (ROOT / file).read_text(encoding="utf-8")
    nodes = {node.name: node for node in ast.parse(source).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    for outer in [node for node in nodes.values() if isinstance(node, ast.ClassDef)]:
        nodes |= {f"{outer.name}.{node.name}": node for node in outer.body if isinstance(node, ast.FunctionDef)}
    whole = next(key for key in nodes if key == name or key.endswith(f".{name}"))
    lines = source.splitlines()[nodes[whole].lineno - 1 : nodes[whole].end_lineno]
    return {"name": whole, "file": file, "line": nodes[whole].lineno, "source": textwrap.dedent("\n".join(lines))}


def write_config(name: str, options: dict[str, Any]) -> str:
    """Return a config file that trains a run again, with the options that differ from the defaults."""
    name = re.sub(r"[^\w./ -]", "_", name)
    defaults = {f.name: f.default for f in fields(TrainConfig) if f.default is not MISSING}
    stem = re.sub(r"\W", "_", Path(name).name)
    lines = [f'"""The options of the run {name}.\n\n    python train.py {stem}.py\n"""\n']
    for key, value in ({"out_dir": f"out/{stem}"} | options | {"out_dir": f"out/{stem}"}).items():
        if value != defaults[key] and key not in ("init_from", "overwrite", "page"):
            lines.append(f"{key} = {value!r}")
    return "\n".join(lines) + "\n"
