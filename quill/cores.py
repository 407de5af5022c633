"""The cores that a process may use, and how busy they are. Standard library only: quill/start.py asks before torch."""

import os
import time

MOMENT = 0.05  # seconds over which the use of the cores is measured


def cores_in_use() -> float:
    """Return how many of the cores that this process may use are in use now, by any program. 0 if that is not known."""
    try:
        mine = os.sched_getaffinity(0)
        before = _idle_seconds(mine)
        began = time.monotonic()
        time.sleep(MOMENT)
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
