"""train.py with faults on some of its ranks, for torchrun to start; or, without torchrun, many such runs in a row.

    torchrun … tests/faulty_run.py FOLDER FAULTS FLAG …
    python tests/faulty_run.py FOLDER FAULTS FLAG …

FAULTS is a list such as kill:1:12,disk-together:0:30. Before step 12, rank 1 is killed. Before step 30, rank 0 fails to
write, inside of work that the ranks do together. Each happens once: FOLDER remembers it, so that a restart passes it.
Two kinds hold from the start: --seed=2:1 gives rank 1 alone a flag, and memory=64:1 lets it have 64 MB more than torch.

Without torchrun, every fault has a run of its own on two forked processes, so that torch is imported once. This prints
a line of JSON for each: the exit codes of the ranks, the seconds between their ends, and what they wrote to stderr.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch._dynamo  # noqa: E402, F401 - once here, and not in every child
import torch.distributed as dist  # noqa: E402

import train  # noqa: E402
from quill.cli import run  # noqa: E402
from quill.distributed import ProcessGroup  # noqa: E402
from quill.errors import UserError  # noqa: E402


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def fail_to_write():
    raise OSError(28, "No space left on device", "metrics.csv")


def make_a_mistake():
    raise UserError("there is no\nmemory")


def have_a_bug():
    raise TypeError("not a number")


def be_interrupted():
    raise KeyboardInterrupt


FAULTS = {
    "kill": be_killed,
    "disk": fail_to_write,
    "user": make_a_mistake,
    "bug": have_a_bug,
    "interrupt": be_interrupted,
    "rest": lambda: time.sleep(3),
    "wait": signal.pause,  # until torchrun sends SIGTERM, because a node joins
}


def inject(folder, faults):
    """Make training steps fail as `faults` say."""
    step = train.train_step

    def faulty(state, *args):
        for fault in faults:
            kind, rank, at = fault.split(":")
            kind, _, together = kind.partition("-")
            mine = rank in ("all", os.environ["RANK"])
            mark = folder / f"{fault}:{os.environ['RANK']}"
            if int(at) == state.progress.step and (mine or together) and not mark.exists():
                mark.touch()
                work = FAULTS[kind] if mine else lambda: None
                if together:
                    ProcessGroup.from_environment().on_all_ranks(work)
                else:
                    work()
        return step(state, *args)

    train.train_step = faulty


def worker(folder, faults, flags):
    mine = [fault.split(":")[0] for fault in faults if fault.endswith(f":{os.environ['RANK']}")]
    for kind in mine:
        if kind.startswith("memory="):
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (int(kind.removeprefix("memory=")) << 20),) * 2)
    inject(folder, [fault for fault in faults if fault.count(":") == 2])
    sys.argv[1:] = flags + [kind for kind in mine if kind.startswith("--")]
    run(train.main)


def child(work, *args):
    """Fork a process that calls work(*args) and ends. → its id"""
    pid = os.fork()
    if pid:
        return pid
    try:
        work(*args)
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code)
    finally:
        os._exit(1)


def serve(pipe):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, multi_tenant=True)
    os.write(pipe, str(store.port).encode())
    os.close(pipe)
    time.sleep(600)


def two_ranks(folder, fault, flags):
    """One run with a fault, on two forked processes and with a store that outlives them, as torchrun starts them."""
    receiver, sender = os.pipe()
    server = child(serve, sender)
    os.close(sender)
    port = os.read(receiver, 10).decode()
    os.close(receiver)
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    errors = folder / "stderr"
    errors.write_text("")

    def rank(number):
        for path, stream in (("/dev/null", 1), (errors, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
        worker(folder, [fault], flags)

    ranks = [child(rank, number) for number in range(2)]
    ends, codes = [], {}
    while len(codes) < 2:
        pid, status = os.wait()
        if pid in ranks:
            ends.append(time.monotonic())
            codes[pid] = os.waitstatus_to_exitcode(status)
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)
    text = errors.read_text(encoding="utf-8")
    return {"fault": fault, "codes": [codes[pid] for pid in ranks], "seconds": ends[1] - ends[0], "stderr": text}


if __name__ == "__main__":
    folder, faults, flags = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
    if "RANK" in os.environ:
        worker(folder, faults, flags)
    for fault in faults:
        print(json.dumps(two_ranks(folder, fault, flags)), flush=True)
