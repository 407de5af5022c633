"""Run quill's scripts in forked children, which start in a tenth of a second; kill them, or make their disk fail.

A server: each line of stdin is a request, the arguments of `serve` as JSON; each line of stdout is its answer. It
imports torch once. A child is a process of its own, which runs a script as `python SCRIPT …` does.
"""

if __name__ == "__main__":
    import quill.start  # noqa: F401 - first: see there

import _pyio
import builtins
import errno
import importlib
import io
import json
import mmap
import os
import resource
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
MEMORY = 8 * 2**30  # bytes of address space of a child: a wild value must end in a line, and not end the machine
FIRST, LAST, CALLS = range(3)  # counters, which outlive a killed child: its first and last step, and its calls of each
DISK = ("open", "write", "fsync", "replace")  # of these, which change the disk
DEFAULTS: dict[str, Any] = {
    **{"cwd": str(ROOT), "ranks": 1, "limit": 20.0},  # after `limit` seconds, the children hang and are killed
    **{"kill_after": 1e9, "kill_ranks": [0]},  # seconds, after which these ranks are killed
    **{"calls": [], "nth": 0, "error": "kill"},  # of rank 0: see break_disk
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = {"os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.truncate": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2}


def break_disk(counters: Any, calls: list[str], nth: int, error: str) -> None:
    """Make the nth of the `calls` (see DISK) fail. error: an errno's name, or kill: end the process.

    A disk that is full, ENOSPC, stays full. With nth = 0 the calls are only counted.
    """

    def checked(call: str, function: Any) -> Any:
        def wrapper(first: Any, second: Any = 0, *rest: Any, **options: Any) -> Any:
            if call != "open" or second & WRITING:
                counters[CALLS + DISK.index(call)] += 1
                if nth == sum(counters[CALLS:]) or (error == "ENOSPC" and 0 < nth < sum(counters[CALLS:])):
                    if error == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    if call == "write":
                        function(first, second[: len(second) // 2])  # a disk takes a part before it is full
                    raise OSError(getattr(errno, error), os.strerror(getattr(errno, error)))
            return function(first, *([] if call == "fsync" else [second]), *rest, **options)

        return wrapper

    builtins.open = io.open = _pyio.open  # Python's own, in Python: it calls os.open and os.write
    for call in calls:
        setattr(os, call, checked(call, getattr(os, call)))


def record_changes(paths: set[str]) -> None:
    """Add to `paths` what this process makes, opens to write, renames or deletes from now on."""

    def audit(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & WRITING
        for name in args[: 1 if writes else EVENTS.get(event, 0)]:
            if not isinstance(name, int):
                paths.add(os.path.abspath(os.fsdecode(name)))

    sys.addaudithook(audit)


def call(run: str, argv: list[Any]) -> int:
    """Run a script with the arguments `argv`, or call a "module:function" and print its result. → exit code"""
    module, _, function = run.partition(":")
    try:
        if function:
            print(json.dumps(getattr(importlib.import_module(module), function)(*argv)))
        else:
            sys.argv = [str(ROOT / run), *argv]
            runpy.run_path(sys.argv[0], run_name="__main__")
        sys.stdout.flush()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def be_child(files: list[Any], cwd: str, environment: dict[str, str], counters: Any, disk: Any) -> set[str]:
    """Become one rank's process. files: its stdout and stderr. disk: see `break_disk`. → the paths that it changes"""
    for number in (1, 2):
        os.dup2(files[number - 1].fileno(), number)
    os.chdir(cwd)
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    changed: set[str] = set()
    record_changes(changed)
    if environment.get("RANK", "0") == "0":
        from quill.state import Progress

        def count(progress: Progress, key: str, value: Any) -> None:
            if key == "step":  # any but the next step is a start
                counters[FIRST], counters[LAST] = (counters[FIRST] if value == counters[LAST] + 1 else value), value
            object.__setattr__(progress, key, value)

        Progress.__setattr__ = count  # pyright: ignore[reportAttributeAccessIssue]
        if disk[0]:
            break_disk(counters, *disk)
    return changed


def serve(run: str, argv: list[Any], **options: Any) -> dict[str, Any]:
    """Start a child for each rank, connected as by torchrun, wait for all, and describe how they ended.

    run, argv: see `call`. The other options and their defaults are DEFAULTS.
    """
    how = DEFAULTS | options
    ranks, disk = how["ranks"], (how["calls"], how["nth"], how["error"])
    counters, files = memoryview(mmap.mmap(-1, 48)).cast("q"), [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    began, running, codes, is_hung = time.monotonic(), {}, {}, False
    for rank in range(ranks):
        environment = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        if (pid := os.fork()) == 0:
            code = 1
            try:
                changed = be_child(files, how["cwd"], environment, counters, disk)
                code = call(run, argv)
                os.pwrite(files[2].fileno(), "\0".join(changed).encode(errors="surrogateescape"), 0)
            finally:
                os._exit(code & 255)
        running[pid] = rank
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            rank = running.pop(pid)
            codes[rank] = os.waitstatus_to_exitcode(status)
            for other in running if codes[rank] else ():
                os.kill(other, signal.SIGTERM)  # as torchrun does
            continue
        seconds = time.monotonic() - began
        is_hung = is_hung or seconds > how["limit"]
        for pid, rank in running.items():
            if is_hung or (seconds > how["kill_after"] and rank in how["kill_ranks"]):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)
    out, err, paths = (os.pread(file.fileno(), 2**24, 0).decode(errors="replace") for file in files)
    answer = {"codes": [codes[rank] for rank in range(ranks)], "is_hung": is_hung, "out": out, "err": err}
    answer |= {"seconds": time.monotonic() - began, "changed": paths.split("\0") if paths else []}
    return answer | {
        "first": counters[FIRST],
        "last": counters[LAST],
        "calls": dict(zip(DISK, counters[CALLS:], strict=True)),
    }


def main() -> None:
    """Import what the scripts import, and serve until stdin ends."""
    modules = [
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in ROOT.glob("quill/**/*.py")
    ]
    for name in (*modules, "model", "numpy", "torch._dynamo", "torch.utils.tensorboard.writer", "faults"):
        importlib.import_module(name.removesuffix(".__init__"))
    for line in sys.stdin:
        print(json.dumps(serve(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
