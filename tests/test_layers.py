"""Which file may import which, and how long a file may be. The imports are read from the source of every file.

A new file fails here until it has a place in LAYERS, so that somebody decides where it belongs.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The layers, the lowest first: a file or a folder, and the third-party packages that it may import. A package
# in parentheses may be imported inside functions only. A file may import from lower layers and from its own.
LAYERS = [
    {"config/": ""},
    {"quill/__init__.py": "", "quill/start.py": "", "quill/cores.py": "", "quill/errors.py": "", "quill/files.py": ""},
    {"quill/options.py": "", "quill/cli.py": ""},
    {
        "quill/data/__init__.py": "",
        "quill/data/bpe.py": "(tokenizers)",
        "quill/data/corpora.py": "",
        "quill/data/tokenizers.py": "numpy tqdm (tokenizers)",
        "quill/data/texts.py": "numpy tqdm",
        "quill/data/token_files.py": "numpy tqdm",
        "quill/data/batches.py": "numpy tqdm torch",
        "quill/data/splits.py": "numpy tqdm torch",
        "quill/machine.py": "torch",
        "quill/distributed.py": "torch",
        "quill/parallel.py": "torch",
        "quill/sharded.py": "torch",
    },
    {"model.py": "torch", "quill/optimizer.py": "torch", "quill/cpu.py": "torch", "quill/generation.py": "torch"},
    {"quill/interop.py": "torch (safetensors)"},
    {"quill/checkpoint.py": "torch", "quill/run_folder.py": "", "quill/schema.py": "torch"},
    {"quill/state.py": "torch"},
    {
        "quill/observers/": "torch tqdm (tensorboard)",
        "quill/scoring.py": "numpy torch",
        "quill/describe.py": "torch",
        "quill/plan.py": "torch",
        "quill/trace.py": "torch",
    },
    {"quill/play/": "numpy torch starlette uvicorn"},
    {
        "train.py": "torch",
        "sample.py": "numpy torch",
        "prepare.py": "numpy",
        "export.py": "torch (safetensors)",
        "play.py": "(starlette) (uvicorn)",
        "bench/": "numpy torch (matplotlib)",
        "docs/": "",
    },
    {"tests/": "any"},
]
ALONE = {"model.py"}  # imports nothing of ours, because it can be copied into any project
SCRIPTS = {"train.py", "sample.py", "prepare.py", "export.py", "play.py"}  # only tests import them

MOST_LINES = {"model.py": 249, "train.py": 249}
PAGE = ("play.py", "quill/play/", "quill/observers/page.py")  # counted apart: nothing of it is needed to train a GPT
MOST_LINES_IN_ALL, MOST_LINES_OF_THE_PAGE = 8014, 1199  # of Python, without tests
MOST_LINES_OF_A_FUNCTION = 60
MOST_LINES_OF_THE_LOOP = 44  # train.train


# ---------------------------------------------------------------- reading the source


def read_sources():
    """Every Python file of the repository → {path: source}. Hidden folders, environments and outputs are left out."""
    sources = {}
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "out"))
            and name not in ("__pycache__", "build")
            and not (Path(folder) / name / "pyvenv.cfg").exists()
        ]
        for path in (Path(folder) / name for name in files if name.endswith(".py")):
            sources[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    return sources


def find_imports(source):
    """Yield (dotted name, line number, whether it is inside a function) for each imported module or name."""
    waiting = [(ast.parse(source), False)]
    while waiting:
        node, lazy = waiting.pop()
        lazy = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = "." * node.level + (node.module or "")
            yield from ((f"{parent}.{alias.name}", node.lineno, lazy) for alias in node.names)
        waiting += [(child, lazy) for child in ast.iter_child_nodes(node)]


def module_name(path):
    """quill/data/batches.py → quill.data.batches. Files of docs and tests are imported by their bare names."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name.removeprefix("docs.").removeprefix("tests.")


def find_file(name, modules):
    """The file of ours that importing `name` reads, or None: `name` may be a module, or something in a module."""
    while name not in modules:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return None
    return modules[name]


def find_place(path):
    """→ the layer's number, packages, packages allowed inside functions only; None if LAYERS does not have `path`."""
    for number, layer in enumerate(LAYERS):
        for place, packages in layer.items():
            if path == place or (place.endswith("/") and path.startswith(place)):
                words = packages.split()
                lazily = {word.strip("()") for word in words if word.startswith("(")}
                return number, {word.strip("()") for word in words}, lazily
    return None


# ---------------------------------------------------------------- the rules


def check_layers(sources):
    """{path: source} → a line for each import that breaks a rule, and for each file without a place."""
    modules = {module_name(path): path for path in sources}
    problems, edges = [], {path: set() for path in sources}
    for path, source in sorted(sources.items()):
        place = find_place(path)
        if place is None:
            problems.append(f"{path}: has no layer; add it to LAYERS in tests/test_layers.py")
            continue
        for name, line, lazy in find_imports(source):
            target = find_file(name, modules)
            if target is not None:
                edges[path].add(target)
                problem = check_own_import(path, target)
            else:
                problem = check_package(name, lazy, *place[1:])
            if problem:
                problems.append(f"{path}:{line}: {problem}")
    return problems + [f"a cycle of imports: {' → '.join(cycle)}" for cycle in find_cycles(edges)]


def check_own_import(path, target):
    """Why file `path` may not import file `target`, or None."""
    own, other = find_place(path), find_place(target)
    if path.startswith("tests/") or other is None:
        return None
    if path in ALONE:
        return f"imports {target}, but must work alone"
    if target in SCRIPTS:
        return f"imports {target}, but only tests import scripts"
    if other[0] > own[0]:
        return f"imports {target}, which is in a higher layer"
    return None


def check_package(name, lazy, packages, lazily):
    """Why a file may not import the third-party module `name`, or None."""
    package = "tensorboard" if name.startswith("torch.utils.tensorboard") else name.partition(".")[0]
    if not package:
        return f"{name} is a relative import; write the whole name"
    if package in sys.stdlib_module_names or "any" in packages:
        return None
    if package not in packages:
        return f"imports {package}, which is not among its packages ({', '.join(sorted(packages)) or 'none'})"
    if package in lazily and not lazy:
        return f"imports {package} at its top, but may do so inside a function only"
    return None


def find_cycles(edges):
    """{file: files it imports} → cycles, each as the files along it with the first one again at the end."""
    cycles, finished = [], set()

    def visit(path, trail):
        if path in trail:
            cycles.append([*trail[trail.index(path) :], path])
        elif path not in finished:
            for target in sorted(edges[path]):
                visit(target, [*trail, path])
            finished.add(path)

    for path in sorted(edges):
        visit(path, [])
    return cycles


def check_sizes(sources):
    """{path: source} → a line for each file or function that is too long. Tests may be of any length."""
    sources = {path: source for path, source in sources.items() if not path.startswith("tests/")}
    lines = {path: len(source.splitlines()) for path, source in sources.items()}
    problems = [
        f"{path}: {lines[path]} lines, at most {most}" for path, most in MOST_LINES.items() if lines.get(path, 0) > most
    ]
    of_page = sum(n for path, n in lines.items() if path.startswith(PAGE))
    for what, total, most in (
        ("Python without tests and without the page", sum(lines.values()) - of_page, MOST_LINES_IN_ALL),
        ("the page's Python", of_page, MOST_LINES_OF_THE_PAGE),
    ):
        if total > most:
            problems.append(f"{what}: {total} lines, at most {most}")
    for path, source in sorted(sources.items()):
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            length = node.end_lineno - node.lineno + 1
            is_loop = (path, node.name) == ("train.py", "train")
            most = MOST_LINES_OF_THE_LOOP if is_loop else MOST_LINES_OF_A_FUNCTION
            if length > most:
                problems.append(f"{path}:{node.lineno}: {node.name}() has {length} lines, at most {most}")
    return problems


# ---------------------------------------------------------------- tests


def test_imports_follow_the_layers():
    assert check_layers(read_sources()) == []


def test_sizes():
    assert check_sizes(read_sources()) == []


def test_every_file_is_read():
    sources = read_sources()
    assert {"model.py", "train.py", "quill/data/batches.py", "config/names.py", "tests/test_layers.py"} <= set(sources)
    assert not any(path.startswith((".", "out")) for path in sources)


@pytest.mark.parametrize(
    "sources, problem",
    [
        ({"quill/helpers.py": ""}, "quill/helpers.py: has no layer"),
        ({"quill/files.py": "\nimport torch.nn"}, "quill/files.py:2: imports torch, which is not among its packages"),
        ({"quill/files.py": "def f():\n    import numpy as np"}, "quill/files.py:2: imports numpy, which is not"),
        ({"quill/data/token_files.py": "from torch import nn"}, "imports torch, which is not among its packages"),
        ({"export.py": "import safetensors"}, "imports safetensors at its top"),
        ({"quill/observers/board.py": "from torch.utils import tensorboard"}, "imports tensorboard at its top"),
        ({"config/names.py": "from quill import errors", "quill/errors.py": ""}, "a higher layer"),
        ({"quill/machine.py": "from model import GPT", "model.py": ""}, "imports model.py, which is in a higher layer"),
        ({"quill/files.py": "def f():\n    from quill import cli", "quill/cli.py": ""}, "imports quill/cli.py, which"),
        ({"quill/files.py": "if True:\n    import quill.cli", "quill/cli.py": ""}, "quill/files.py:2: imports"),
        ({"model.py": "from quill.errors import UserError", "quill/errors.py": ""}, "must work alone"),
        ({"model.py": "import numpy"}, "imports numpy"),
        ({"sample.py": "def f():\n    import train", "train.py": ""}, "only tests import scripts"),
        ({"bench/peers.py": "from train import main", "train.py": ""}, "only tests import scripts"),
        ({"quill/state.py": "from .checkpoint import save"}, "relative import"),
        (
            {"quill/options.py": "import quill.cli", "quill/cli.py": "def f():\n    from quill.options import Checked"},
            "a cycle of imports: quill/cli.py → quill/options.py → quill/cli.py",
        ),
    ],
)
def test_a_wrong_import_is_found(sources, problem):
    (found,) = check_layers(sources)
    assert problem in found


def test_right_imports_are_accepted():
    sources = {
        "quill/data/corpora.py": "def f():\n    import http.client",
        "quill/data/texts.py": "from tqdm import tqdm",
        "quill/observers/board.py": "import torch\ndef f():\n    from torch.utils.tensorboard import SummaryWriter",
        "quill/observers/console.py": "import quill.observers.board",
        "train.py": "import math\nimport torch\nfrom quill.observers import console",
        "tests/test_train.py": "import train, hypothesis",
    }
    assert check_layers(sources) == []


@pytest.mark.parametrize(
    "sources, problem",
    [
        ({"model.py": "\n" * 250}, "model.py: 250 lines, at most 249"),
        (
            {"quill/a.py": "\n" * MOST_LINES_IN_ALL, "bench/b.py": "\n", "play.py": "\n" * 9},
            f"Python without tests and without the page: {MOST_LINES_IN_ALL + 1} lines",
        ),
        ({"play.py": "\n" * 600, "quill/play/a.py": "\n" * 600}, "the page's Python: 1200 lines, at most 1199"),
        ({"quill/a.py": "class A:\n    def f():\n" + "        x\n" * 60}, "quill/a.py:2: f() has 61 lines, at most 60"),
        ({"train.py": "def train():\n" + "    x\n" * 44}, "train.py:1: train() has 45 lines, at most 44"),
    ],
)
def test_a_wrong_size_is_found(sources, problem):
    (found,) = check_sizes(sources)
    assert problem in found


def test_right_sizes_are_accepted():
    function = "def train():\n" + "    x\n" * 43
    assert check_sizes({"train.py": function, "tests/test_a.py": "def f():\n" + "    x\n" * 9000}) == []


def test_prepare_explains_itself_without_torch_or_numpy():
    """`--help` imports nothing slow. tests/test_prepare.py tests that a whole run does without torch."""
    code = (
        "import sys, prepare\n"
        "try: prepare.main(['--help'])\n"
        "except SystemExit: sys.exit(str({'torch', 'numpy', 'tqdm'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "--tokenizer" in done.stdout
    assert done.stderr.strip() == ""
