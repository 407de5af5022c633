"""`python -m bench faults`: campaigns that break quill on purpose and count what happens, one file for each group.

A campaign is a function that yields cases. A case gets an empty folder and returns what it has counted; its problems
are faults of quill. A campaign that is interrupted, or started again with the same code, continues from its journal.
"""

from bench.measure import Line
from faults.campaign import Workplace, run_campaign
from faults.checkpoints import damage, pickles
from faults.costs import cost, order
from faults.generated import inputs
from faults.runs import disk, kill, resumes, worlds
from quill.errors import UserError
from quill.options import BenchConfig

CAMPAIGNS = {work.__name__: work for work in (kill, worlds, resumes, damage, disk, inputs, pickles, cost, order)}


def faults(names: list[str], config: BenchConfig) -> list[Line]:
    """Run the campaigns `names`, or all of them. kill:adamw-3 repeats one case of a campaign. → what they counted"""
    wanted: dict[str, set[str]] = {}
    for name, _, case in (name.partition(":") for name in names or CAMPAIGNS):
        if name not in CAMPAIGNS:
            raise UserError(f"{name}: no such campaign; there are {', '.join(CAMPAIGNS)}")
        wanted.setdefault(name, set()).update({case} - {""})
    place, lines = Workplace(config), []
    try:
        for name, only in wanted.items():
            lines.append(run_campaign(name, CAMPAIGNS[name](place), place, only))
            counts = [
                f"{value:,} {key}" if isinstance(value, int) else f"{key} {value}" for key, value in lines[-1].items()
            ]
            counts = [count for count in counts if not count.startswith(("what", "problems"))]
            print(f"| {name} | {', '.join(counts)} | {len(lines[-1]['problems'])} faults |", flush=True)
    finally:
        place.close()
    return lines
