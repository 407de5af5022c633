"""A run of train.py that is killed again and again. A separate process imports torch once and forks children.

    python tests/killed_run.py KILLS SEED FLAG …

Each child resumes the run (`--init_from=auto`) and is killed by SIGKILL: every second one after a random time, the
others at a random write to the disk, in the middle of a save. Prints how many died, then lets the run end.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch._dynamo  # noqa: E402, F401 - once here, and not in every child

import train  # noqa: E402


def child(flags, dies_at_write):
    """Fork a run that kills itself at its nth fsync, before the file that it wrote is renamed."""
    pid = os.fork()
    if pid:
        return pid
    fsync, writes = os.fsync, 0

    def counted(descriptor):
        nonlocal writes
        writes += 1
        if writes == dies_at_write:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = counted
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    try:
        os._exit(train.main(flags))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)


def main(kills, seed, flags):
    rng = random.Random(seed)
    killed = 0
    while killed < kills:
        by_time = killed % 2 == 0
        # The first two die before and in the very first save, between best.pt and last.pt.
        pid = child(flags, None if by_time else 3 if killed == 1 else rng.randint(1, 9))
        if by_time:
            time.sleep(0.01 if killed == 0 else rng.uniform(0.05, 0.4))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFEXITED(status):
            sys.exit(f"the run ended (exit code {os.WEXITSTATUS(status)}) after {killed} of {kills} kills")
        killed += 1
    status = os.waitpid(child(flags, None), 0)[1]
    print(f"killed {killed} times")
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
