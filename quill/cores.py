"""The cores that a process may use, and how busy they are. Standard library only: quill/start.py asks before torch."""

import math
import os
import time
from functools import cache

MOMENT = 0.05  # seconds over which the use of the cores is measured
LONGER = 0.3  # the same, for a second look at a busy machine: a command that has just ended is not counted
BUSY = 0.5  # cores that other programs use, from which the machine counts as busy


@cache
def cores_in_use() -> float:
    """Return how many of this process's cores other programs use, measured at the first call; 0 if it is not known."""
    used = _measure(MOMENT)
    return used if used < BUSY else min(used, _measure(LONGER))


def free_cores() -> int:
    """Return the number of cores, at least 1, that this process can use beside the other programs."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    used = cores_in_use()
    return max(1, min(mine if used < BUSY else math.floor(mine - used + 0.5), math.ceil(min(cpu_quota(), mine))))


def _measure(seconds):
    try:
        mine = os.sched_getaffinity(0)
        before = _idle_seconds(mine)
        began = time.monotonic()
        time.sleep(seconds)
        idle = _idle_seconds(mine) - before
        return max(0.0, len(mine) - idle / (time.monotonic() - began))
    except (AttributeError, OSError, ValueError, IndexError):  # not Linux
        return 0.0


def _idle_seconds(cores):
    """Sum the idle seconds of `cores` since the machine started. /proc/stat has "cpu0 user nice system idle iowait"."""
    ticks = 0
    with open("/proc/stat", encoding="ascii") as file:
        for line in file:
            name, *times = line.split()
            if name[:3] == "cpu" and name[3:].isdecimal() and int(name[3:]) in cores:
                ticks += int(times[3]) + int(times[4])
    return ticks / os.sysconf("SC_CLK_TCK")


def cpu_quota() -> float:
    """Cores that the container may use on average, from its control group; inf without a limit."""
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return float(quota) / float(period)
    except (OSError, ValueError):  # no control group of version 2, or "max"
        return float("inf")
