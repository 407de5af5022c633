"""Read a command line and a config file into checked options, and run a script so that errors are one line.

Flags override the config file, which overrides the defaults. Every key is checked for existence and type. The options
are in quill/options.py. These two modules import nothing slow, so that `python prepare.py --help` is fast.
"""

import ast
import difflib
import errno
import inspect
import io
import os
import runpy
import signal
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from quill.errors import UserError, check
from quill.options import NANOGPT_NOTICES, NANOGPT_VALUES, Checked

CONFIG_DIR = Path(__file__).parent.parent / "config"


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run `main(argv)` as a script, and exit with the code that it returns (None is 0).

    A UserError or an OSError becomes one line on stderr and exit code 2. Ctrl-C exits with 130, without a traceback.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # which a shell sets for commands in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # quill/start.py has set another
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A corpus may hold any character, and the locale's encoding may not.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except (UserError, OSError, KeyboardInterrupt) as error:
        text, code = explain(error)
        if text:
            note(f"{script_name()}: {text}")
    sys.exit(code)


def script_name() -> str:
    """Return the name of the running script, which its error messages start with."""
    script = Path(sys.argv[0])
    return script.parent.name if script.name == "__main__.py" else script.name


def explain(error: BaseException) -> tuple[str, int]:
    """Return the line on stderr for `error`, "" if it is silent, and the exit code, which is 1 for a bug of quill's."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, KeyboardInterrupt):
        return "", 128 + signal.SIGINT
    if isinstance(error, BrokenPipeError):
        # The reader (`| head`) has closed the pipe. Python flushes stdout again when it exits, which would fail.
        drop_output()
        return "", 0
    if isinstance(error, OSError):
        # Files are written by quill/files.py, whose errors name them. What is left without a name is stdout.
        is_stdout = error.filename is None and error.errno in (errno.ENOSPC, errno.EIO, errno.EBADF, errno.EFBIG)
        if is_stdout:
            drop_output()
        where = "can't write to stdout" if is_stdout else error.filename or "system"
        return f"{where}: {error.strerror or error}", 2
    return f"{type(error).__name__}: {error}", 1


def note(text: str, every_rank: bool = False) -> None:
    """Print a line on stderr. Only rank 0 prints, because every process would print the same line.

    Control characters are escaped, so that a message is one line even if it quotes a text with several. Errors of
    stderr are ignored, for example if it is closed. every_rank: print on this rank, whichever it is.
    """
    if every_rank or os.environ.get("RANK", "0") == "0":
        with suppress(OSError, ValueError):
            print(one_line(text), file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """Return `text` with its control characters escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def highlight(text: str) -> str:
    """Return `text` in colour if stdout is a terminal that has colours, unless NO_COLOR is set (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty()
    return text if plain else f"\033[1;36m{text}\033[0m"


def drop_output() -> None:
    """Discard everything that is written to stdout from now on, and what it has not written yet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    with suppress(OSError, ValueError):
        sys.stdout.flush()


def read_args(argv: list[str], schema: type[Checked], doc: str | None) -> tuple[list[str], dict[str, Any]]:
    """Split a command line into positional arguments and flags. → the arguments, {key: value checked by `schema`}

    A flag is written --key=value. `--key` alone means True for a bool. `--key=` leaves a number at its default.
    `--help` prints `doc` and the options, and exits with code 0. Raise a UserError for an unknown key or a wrong type.
    """
    positional, flags, types_ = [], {}, option_types(schema)
    replaced: dict[str, Any] = {}  # by nanoGPT's keys: `--decay_lr=False` turns off the warm-up of any --warmup_iters
    for arg in argv:
        if arg in ("-h", "--help"):
            print(help_text(schema, doc or ""))
            sys.exit(0)
        if not arg.startswith("-"):
            positional.append(arg)
            continue
        key, equals, text = arg.lstrip("-").partition("=")
        check(arg.startswith("--") and key, f"{arg}: options are written --key=value (see --help)")
        if not equals and key in types_:
            if types_[key] is not bool:
                default = describe_default(schema, key)
                raise UserError(f"{arg}: write {arg}=VALUE{f', as in {arg}={default}' if default else ''}")
            text = "True"
        if equals and not text and types_.get(key) in (int, float):
            continue
        (flags if key in types_ else replaced).update(resolve_option(key, text, schema, f"{arg}: "))
    return positional, flags | replaced


def read_config_file(path: str | Path, schema: type[Checked], readers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Run a config file and return the options that it assigns, checked against `schema`.

    The file runs in a new namespace. Names with a leading underscore, modules and functions are not options. `base`
    names another config file in the same folder, whose options hold where this file has none; `readers` are the files
    whose base is being read. Raise a UserError with the file's name and the line if the file has a mistake.
    """
    path = _find_config_file(Path(path))
    try:
        names = runpy.run_path(str(path))
    except KeyboardInterrupt:
        raise
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno or 1}: {error.msg}") from None
    except BaseException as error:  # a config file can raise anything
        frames = reversed(traceback.extract_tb(error.__traceback__))
        line = next((frame.lineno for frame in frames if frame.filename == str(path)), "?")
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {_as_text(error)}") from None
    values, replaced, lines, readers = {}, {}, _line_numbers(path), (*readers, path.resolve())
    if (base := names.pop("base", None)) is not None:
        where = f"{path}, line {lines.get('base', '?')}: base"
        if not isinstance(base, str) or not (path.parent / base).is_file():
            raise UserError(f"{where} is {_as_text(base, repr)}; name a config file in the same folder")
        if (path.parent / base).resolve() in readers or len(readers) > 20:
            raise UserError(f"{where} = {base} leads back to {base}, or to more than 20 files")
        values = read_config_file(path.parent / base, schema, readers)
    for key, value in names.items():
        if not (key.startswith("_") or isinstance(value, types.ModuleType) or callable(value)):
            options = resolve_option(key, value, schema, f"{path}, line {lines.get(key, '?')}: ")
            (values if key in options else replaced).update(options)
    return values | replaced


def _as_text(value: Any, convert: Callable[[Any], str] = str) -> str:
    """`convert(value)`, for objects of a config file whose methods may fail."""
    try:
        return convert(value)
    except Exception as error:
        return f"<{type(value).__name__} that can't be printed: {type(error).__name__}>"


def _find_config_file(path: Path) -> Path:
    """Return `path`, or the same path in quill's folder, so that README's commands work in any folder."""
    for found in (path, CONFIG_DIR.parent / path):
        if found.is_file():
            return found
    known = [str(p.relative_to(CONFIG_DIR.parent)) for p in config_files()]
    guess = did_you_mean(str(path), known) or did_you_mean(f"config/{path}.py", known)
    raise UserError(f"{path}: no such config file{guess}; `python train.py` lists them")


def resolve_option(key: str, value: Any, schema: type[Checked], where: str) -> dict[str, Any]:
    """Return the options that one key sets: {key: checked value}, or those that replace a key of nanoGPT's.

    where: the start of an error message, such as "--n_layer=x: ".
    """
    types_ = option_types(schema)
    if key in types_:
        return {key: coerce(value, types_[key], where, key)}
    notice, accepted = NANOGPT_NOTICES.get(schema, {}).get(key), NANOGPT_VALUES.get(key, {})
    check(notice, f"{where}there is no option {key}{did_you_mean(key, types_)}")
    if accepted:
        value = coerce(value, bool if True in accepted else str, where, key)
        check(value in accepted, f"{where}{key}: {notice}")
    note(f"note: {key}: {notice}")
    return accepted[value] if accepted else {}


def coerce(value: Any, kind: Any, where: str, key: str) -> Any:
    """Convert `value`, a flag's text or any value of a config file, to the type `kind` of an option.

    Numbers are converted where nothing is lost: "1e3" to the int 1000, "1" to the float 1.0. `T | None` takes "" and
    "none" as None. A Literal takes its members only. Raise a UserError with `where`, `key` and the values it takes.
    """
    if not isinstance(value, (str, int, float, types.NoneType)):
        raise UserError(f"{where}{key} takes a number, a text in quotes, True or False, not {_as_text(value, repr)}")
    is_literal = typing.get_origin(kind) is typing.Literal
    parts = (kind,) if is_literal else typing.get_args(kind) or (kind,)  # such as int | Literal["auto"]
    for part in parts:
        with suppress(ValueError, OverflowError):
            return _convert(value, part)
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text in quotes"}
    choices = [str(choice) for part in parts for choice in typing.get_args(part)]  # of Literals; NoneType has none
    wanted = [*(names[part] for part in parts if part in names), *choices]
    raise UserError(f"{where}{key} takes {' or '.join(wanted)}, not {value!r:.80}{did_you_mean(str(value), choices)}")


def _convert(value, kind):
    """`value` as `kind`: str, int, float, bool, NoneType or a Literal. Raise a ValueError if that is not possible."""
    if kind is str and isinstance(value, str):
        return value
    if kind is types.NoneType and str(value).lower() in ("", "none"):
        return None
    if kind in (int, float) and value is not None and not isinstance(value, bool):
        if kind is int and isinstance(value, str):
            with suppress(ValueError):
                return int(value)  # a float would round large ones
        number = float(value) if kind is float or isinstance(value, str) else value
        if kind is float or int(number) == number:
            return kind(number)
    words = {"true": True, "1": True, "false": False, "0": False}
    for choice in (True, False) if kind is bool else typing.get_args(kind):
        given = words.get(str(value).lower()) if isinstance(choice, bool) else value
        if given == choice and type(given) is type(choice):
            return choice
    raise ValueError


@cache
def option_types(schema: Any) -> dict[str, Any]:
    """Return the type of every option of the dataclass `schema`, by name."""
    hints = typing.get_type_hints(schema)
    return {f.name: hints[f.name] for f in fields(schema)}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the hint " (did you mean X?)" for the closest of `known`, or "" if none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def config_files() -> list[Path]:
    """Return the configs that ship with quill, sorted by name."""
    return sorted(p for p in CONFIG_DIR.rglob("*.py") if not p.name.startswith("_"))


def list_configs() -> str:
    """Return one line for each config that ships with quill: its path and the first line of its docstring."""
    rows = []
    for path in config_files():
        with open(path, encoding="utf-8", errors="replace") as file:
            rows.append((str(path.relative_to(CONFIG_DIR.parent)), file.readline().strip('"\n')))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:{width}}  {doc}" for name, doc in rows)


def help_text(schema: Any, doc: str) -> str:
    """Return what `--help` prints: `doc`, then each group of `schema` with a line per option (name, default, help)."""
    lines = [doc.strip()]
    hints = option_types(schema)
    for group in reversed(schema.__mro__):
        own = [f for f in fields(schema) if f.name in inspect.get_annotations(group)]
        if own:
            lines += ["", f"{vars(group)['HEADING']}:"]
        for f in own:
            kind = typing.get_args(hints[f.name]) if typing.get_origin(hints[f.name]) is typing.Literal else ()
            choices = f" ({' | '.join(str(c) for c in kind)})" if kind else ""
            lines.append(f"  --{f.name + '=' + describe_default(schema, f.name):31}  {f.metadata['help']}{choices}")
    return "\n".join(lines)


def describe_default(schema: type[Checked], key: str) -> str:
    """Return an option's default as a flag has it; "" for None."""
    default = getattr(schema, key)
    return "" if default is None else str(default)


def _line_numbers(path: Path) -> dict[str, int]:
    """Return the number of the line on which a config file last assigns each name."""
    nodes = ast.walk(ast.parse(path.read_bytes()))  # bytes, because the file may name its encoding
    found = ((n.lineno, n.id) for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    return {name: line for line, name in sorted(found)}
