"""start.py and the streams of a script: what happens before torch is imported, and where messages go."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quill import cores

ROOT = Path(__file__).parent.parent


def shell(command):
    """A shell command in quill's folder, with PY for the Python of the tests. → CompletedProcess"""
    env = {**os.environ, "PY": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="asks Linux whether torch is being loaded")
@pytest.mark.parametrize(
    "script",
    ["train.py --help", *(pytest.param(f"{s} --help", marks=pytest.mark.slow) for s in ("sample.py", "-m bench"))],
)
def test_ctrl_c_during_the_imports_is_silent(script):
    """When the first of torch's libraries is mapped, which is early in the seconds that `import torch` takes."""
    argv = [sys.executable, *script.split()]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8", errors="replace"):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130


@pytest.mark.slow
def test_closed_and_full_streams(flags, tmp_path):
    """A run trains without a stdout or a stderr, and a full stdout is one line."""
    argv = " ".join(flags(max_iters=2))
    assert shell(f"$PY train.py {argv} >&- 2>&-").returncode == 0
    done = shell(f"$PY train.py {argv} --overwrite=True >/dev/full")
    assert done.returncode == 2
    assert done.stderr == "train.py: can't write to stdout: No space left on device\n"


def test_a_file_never_takes_the_number_of_a_closed_stream(tmp_path):
    code = (
        "import quill.start, os, sys\n"
        "file = open(sys.argv[1], 'w')\n"
        "os.write(1, b'printed'); os.write(2, b'an error')\n"
        "print('more'); assert file.fileno() > 2\n"
    )
    done = shell(f'$PY -c "{code}" {tmp_path / "file"} >&- 2>&- <&-')
    assert done.returncode == 0
    assert (tmp_path / "file").read_text(encoding="utf-8") == ""


def waiting(**env):
    """What start.py sets, in a process with these variables; SIGINT's handler too."""
    code = (
        "import os, signal, quill.cores as cores\n"
        "cores.cores_in_use = lambda: float(os.environ['IN_USE'])\n"
        "cores.cpu_quota = lambda: float(os.environ.get('QUOTA', 'inf'))\n"
        "import quill.start\n"
        "print([os.environ.get(name) for name in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')])\n"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    argv = [sys.executable, "-c", code]
    return subprocess.run(argv, cwd=ROOT, env=clean | env, capture_output=True, text=True, check=True).stdout.strip()


def test_threads_wait_passively_only_where_others_need_the_cores():
    assert waiting(IN_USE="0.1") == "[None, '10000']"
    assert waiting(IN_USE="0.9") == "['PASSIVE', None]"
    assert waiting(IN_USE="0", QUOTA="0.5") == "['PASSIVE', None]"
    assert waiting(IN_USE="0.9", OMP_WAIT_POLICY="ACTIVE") == "['ACTIVE', None]"
    assert waiting(IN_USE="0.9", GOMP_SPINCOUNT="7") == "[None, '7']"
    assert waiting(IN_USE="0.9", OMP_NUM_THREADS="1") == "[None, None]"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the use of cores is measured on Linux only")
def test_the_use_of_the_cores_is_measured():
    """A program that spins on one of this process's cores is seen."""
    quiet = cores._measure(0.05)
    core = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    spinning = subprocess.Popen([sys.executable, "-c", code])
    try:
        time.sleep(0.3)
        os.sched_setaffinity(0, {core})
        busy = cores._measure(0.3)
    finally:
        os.sched_setaffinity(0, range(os.cpu_count()))
        spinning.kill()
        spinning.wait()
    assert 0.7 < busy <= 1
    assert 0 <= quiet <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    "used, quota, free",
    [(0, math.inf, 4), (0.4, math.inf, 4), (0.6, math.inf, 3), (1.4, math.inf, 3), (3.9, math.inf, 1), (0, 0.5, 1)]
    + [(0, 2.5, 3), (2, 3, 2), (9, math.inf, 1)],
)
def test_free_cores(used, quota, free, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)), raising=False)
    monkeypatch.setattr(cores, "cores_in_use", lambda: used)
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert cores.free_cores() == free


def test_a_command_that_has_just_ended_is_not_counted(monkeypatch):
    """A first look that finds the machine busy is followed by a longer one; both are taken once in a process."""
    found = {cores.MOMENT: 1.0, cores.LONGER: 0.2}
    looks = []
    monkeypatch.setattr(cores, "_measure", lambda seconds: looks.append(seconds) or found[seconds])
    cores.cores_in_use.cache_clear()
    try:
        assert (cores.cores_in_use(), cores.cores_in_use()) == (0.2, 0.2)
        assert looks == [cores.MOMENT, cores.LONGER]
    finally:
        cores.cores_in_use.cache_clear()


def test_a_quota_is_read(monkeypatch):
    content = {"text": "50000 100000\n"}

    class File:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def read(self):
            return content["text"]

    monkeypatch.setattr("builtins.open", lambda *args, **options: File())
    assert cores.cpu_quota() == 0.5
    content["text"] = "max 100000\n"
    assert cores.cpu_quota() == float("inf")
