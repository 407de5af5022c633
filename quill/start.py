"""What must happen before torch is imported. A script imports this module first, and only when it is run:

    if __name__ == "__main__":
        import quill.start

This is the one module of quill that does something when it is imported:

1. Standard streams that are closed (`train.py >&-`) become the null device. Otherwise the next file that is opened,
   such as a checkpoint, would get their number, and receive what is printed.
2. Ctrl-C during the imports, which take seconds, ends the process silently with exit code 130.
3. It decides how torch's threads wait for each other. By default they spin: they ask again and again without giving up
   their core. That is fast on a quiet machine, and many times slower if another program needs one of the cores.
   The OpenMP library of torch reads this decision once, when it is loaded. It changes no result.
"""

import os
import signal


def end_silently(number: int, frame: object) -> None:
    """Handle a signal by ending the process at once; quill.cli.run restores Python's own handler."""
    os._exit(128 + number)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_silently)

import sys  # noqa: E402 - as little as possible before the handler

from quill.cores import BUSY, cores_in_use, cpu_quota  # noqa: E402

SPINS = "10000"  # of a waiting thread before it sleeps, on a quiet machine: measured in docs/records/


def open_closed_streams() -> None:
    """Open the null device in the place of each standard stream that is closed."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def choose_waiting(environment: "os._Environ[str]") -> None:
    """Set how torch's threads wait, unless the user's environment says so."""
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environment.keys() or environment.get("OMP_NUM_THREADS") == "1":
        return
    if cores_in_use() >= BUSY or cpu_quota() < (os.cpu_count() or 1):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        environment["GOMP_SPINCOUNT"] = SPINS


open_closed_streams()
if os.path.basename(sys.argv[0]) != "prepare.py":  # which starts without torch, and fast
    choose_waiting(os.environ)
