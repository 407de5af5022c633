"""A command line and a config file, read into checked options. Precedence: defaults < config file < flags.

Every key is checked for existence and type wherever it comes from, and everything that is wrong ends as one line.
"""

import ast
import difflib
import inspect
import os
import runpy
import signal
import sys
import traceback
import types
import typing
from dataclasses import MISSING, fields
from pathlib import Path

from quill.errors import UserError
from quill.options import RETIRED, Checked

CONFIG_DIR = Path(__file__).parent.parent / "config"


def run(main):
    """Run `main(argv) → exit code or None` as a script. What the user can cause: one line on stderr, exit code 2."""
    script = Path(sys.argv[0])
    name = script.parent.name if script.name == "__main__.py" else script.name
    for stream in (sys.stdout, sys.stderr):
        # Whatever the locale says: a corpus may hold any character.
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        note(f"{name}: {error}")
        code = 2
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Python flushes stdout again on its way out: give it a place to go.
        drop_output()
        code = 0
    except OSError as error:
        note(f"{name}: {error.filename or 'system'}: {error.strerror or error}")
        code = 2
    sys.exit(code)


def note(text):
    """A line on stderr. Of several processes, which share their errors, one speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def drop_output():
    """Send stdout to nowhere from here on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_args(argv, schema, doc):
    """`argv` → (positional arguments, {key: value} of the flags), checked against `schema`.

    `--help` prints `doc` and the options, and exits 0. A bare `--flag` means True for a bool; `--key=` leaves a number
    as it is.
    """
    positional, flags, types_ = [], {}, option_types(schema)
    # Retired keys come last, here and in files: `decay_lr = False` switches the warm-up off wherever the two stand.
    argv = sorted(argv, key=lambda arg: arg.lstrip("-").partition("=")[0] in RETIRED.get(schema, {}))
    for arg in argv:
        if arg in ("-h", "--help"):
            print(help_text(schema, doc))
            sys.exit(0)
        if not arg.startswith("-"):
            positional.append(arg)
            continue
        key, equals, text = arg.lstrip("-").partition("=")
        if not arg.startswith("--") or not key:
            raise UserError(f"{arg}: options are written --key=value (see --help)")
        if not equals and key in types_:
            if types_[key] is not bool:
                default = describe_default(schema, key)
                raise UserError(f"{arg}: write {arg}=VALUE{f', as in {arg}={default}' if default else ''}")
            text = "True"
        if equals and not text and types_.get(key) in (int, float):
            continue
        flags.update(check(key, text, schema, f"{arg}: "))
    return positional, flags


def read_config_file(path, schema):
    """The assignments of a config file → {key: value}, checked against `schema`.

    It runs in a namespace of its own; names with a leading underscore, modules and functions are its own business.
    """
    path = Path(path)
    if not path.is_file() and (CONFIG_DIR.parent / path).is_file():
        path = CONFIG_DIR.parent / path  # named as in README, from another folder
    if not path.is_file():
        known = [str(Path("config") / p.relative_to(CONFIG_DIR)) for p in config_files()]
        guess = did_you_mean(str(path), known) or did_you_mean(f"config/{path}.py", known)
        raise UserError(f"{path}: no such config file{guess}; `python train.py` lists them")
    try:
        names = runpy.run_path(str(path))
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno or 1}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        line = next(
            (f.lineno for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == str(path)), "?"
        )
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    values = {}
    for key, value in sorted(names.items(), key=lambda item: item[0] in RETIRED.get(schema, {})):
        if key.startswith("_") or isinstance(value, types.ModuleType) or callable(value):
            continue
        values.update(check(key, value, schema, f"{path}, line {_line_of(key, path)}: "))
    return values


def check(key, value, schema, where):
    """One key and its value → the options that it sets: {key: checked value}, or what a retired key stands for."""
    types_ = option_types(schema)
    if key in types_:
        return {key: coerce(value, types_[key], where, key)}
    retired = RETIRED.get(schema, {}).get(key)
    if retired is None:
        raise UserError(f"{where}there is no option {key}{did_you_mean(key, types_)}")
    becomes = {}
    for old, options in retired.becomes.items():
        if coerce(value, type(old), where, key) == old:
            becomes = options
    if retired.only is not None and value != retired.only:
        raise UserError(f"{where}{key}: {retired.notice}")
    note(f"note: {key}: {retired.notice}")
    return becomes


def coerce(value, kind, where, key):
    """`value`, from a flag (text) or a config file (anything), as `kind`: `1e3` is a fine int, `1` a fine float."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        for choice in choices:
            if value == choice and type(value) is type(choice):
                return choice
            if isinstance(choice, bool) and _as_bool(value) is choice:
                return choice
        names = [str(c) for c in choices]
        raise UserError(f"{where}{key} is one of {', '.join(names)}, not {value!r}{did_you_mean(str(value), names)}")
    if types.NoneType in choices:
        if value is None or (isinstance(value, str) and value.lower() in ("", "none")):
            return None
        kind = choices[0]
    if kind is str and isinstance(value, str):
        return value
    if kind is bool and _as_bool(value) is not None:
        return _as_bool(value)
    if kind in (int, float) and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        for number in (int, float):
            try:
                value = number(value) if isinstance(value, str) else value
            except ValueError:
                continue
            if kind is float:
                return float(value)
            if value == value and abs(value) != float("inf") and int(value) == value:
                return int(value)
    wanted = {int: "a whole number", float: "a number", bool: "True or False", str: "a text in quotes"}[kind]
    raise UserError(f"{where}{key} takes {wanted}, not {value!r}")


def _as_bool(value):
    return {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())


def option_types(schema: type[Checked]) -> dict[str, typing.Any]:
    hints = typing.get_type_hints(schema)
    return {f.name: hints[f.name] for f in fields(schema)}


def did_you_mean(word, known):
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def config_files():
    """The run files that ship with quill, in the order of their names."""
    return sorted(p for p in CONFIG_DIR.rglob("*.py") if not p.name.startswith("_"))


def list_configs():
    """One line for each shipped config: its path and the first line of its docstring."""
    rows = []
    for path in config_files():
        try:
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        except (SyntaxError, UnicodeDecodeError) as error:
            doc = f"({type(error).__name__})"
        rows.append((str(Path("config") / path.relative_to(CONFIG_DIR)), doc.partition("\n")[0]))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:{width}}  {doc}" for name, doc in rows)


def help_text(schema, doc):
    """`doc`, then every option of `schema` by group: name, default, help."""
    lines = [doc.strip(), ""]
    hints = option_types(schema)
    for group in reversed(schema.__mro__):
        own = [f for f in fields(schema) if f.name in inspect.get_annotations(group)]
        if own:
            lines.append(f"{(group.__doc__ or '').strip()}:")
        for f in own:
            kind = typing.get_args(hints[f.name]) if typing.get_origin(hints[f.name]) is typing.Literal else ()
            choices = f" ({' | '.join(str(c) for c in kind)})" if kind else ""
            lines.append(f"  --{f.name + '=' + describe_default(schema, f.name):31}  {f.metadata['help']}{choices}")
        if own:
            lines.append("")
    return "\n".join(lines).rstrip()


def describe_default(schema, key):
    default = next(f.default for f in fields(schema) if f.name == key)
    assert default is not MISSING, f"{key} has no default"
    return "" if default is None else str(default)


def _line_of(key, path):
    """The line on which a config file last assigns `key`."""
    lines = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and node.id == key and isinstance(node.ctx, ast.Store)
    ]
    return max(lines, default="?")
