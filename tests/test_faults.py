"""python -m bench faults: a few cases of every campaign, and that every campaign can fail."""

import copy
import json
import random
from pathlib import Path

import pytest
import torch
from faults import CAMPAIGNS, campaign, checkpoints, costs, generated, runs
from faults.campaign import KINDS, Workplace, differences, run_campaign, why_no_end, why_no_refusal

from bench import __main__ as bench
from quill import checkpoint
from quill.data.batches import Batches
from quill.errors import UserError
from quill.options import BenchConfig

pytest.importorskip("hypothesis")
CASES = {  # of each campaign, for the tests; --quick has more
    "kill": {"muon_ema-0"},
    "worlds": {"adamw-micro-batches-0"},
    "resumes": {"names-0"},
    "damage": {"adamw-flip-0-0", "adamw-flip-60-0", "adamw-cut-50", "muon_ema-edit-1"},
    "disk": {
        "adamw-full-9",
        "adamw-fsync-1",
        "adamw-rename-1",
        "prepare-full-1",
        "prepare-fsync-1",
        "prepare-rename-1",
    },
    "inputs": {str(number) for number in range(6)},
    "pickles": {"model-os.mkdir", "protocol 4-os.mkdir"},
    "order": set(),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The campaigns' folder, and one server for all of them."""
    place = Workplace(BenchConfig(quick=True, out_dir=str(tmp_path_factory.mktemp("bench"))))
    yield place
    place.close()


@pytest.mark.parametrize("name", CASES)
def test_a_few_cases_find_no_fault(place, name):
    line = run_campaign(name, CAMPAIGNS[name](place), place, CASES[name])
    assert line["problems"] == [] and line["cases"] == (len(CASES[name]) or 2)
    counts = {"kill": ("kills", 2), "pickles": ("executed", 0), "order": ("windows", 2000)}
    count, value = counts.get(name, ("cases", line["cases"]))
    assert line[count] == value
    assert not list((place.folder / "failed").glob(f"{name}-*"))


@pytest.mark.slow
def test_every_case_of_quick(tmp_path):
    assert bench.main(["faults", "--quick", f"--out_dir={tmp_path}"]) == 0


# ---------------------------------------------------------------- each campaign can fail


class Saboteur:
    """A Workplace that calls `spoil(out_dir or command, answer)` after each of its processes."""

    def __init__(self, place, spoil):
        self.place, self.spoil = place, spoil

    def __getattr__(self, name):
        return getattr(self.place, name)

    def train(self, out_dir, options, **how):
        answer = self.place.train(out_dir, options, **how)
        self.spoil(out_dir, answer)
        return answer

    def ask(self, run, argv, **how):
        answer = self.place.ask(run, argv, **how)
        self.spoil(how.get("cwd", run), answer)
        return answer


def change_a_weight(folder):
    """Add the smallest change to one weight in `folder`/last.pt, which then has valid checksums."""
    state = checkpoint.load(folder / "last.pt")
    weight = state["model"]["transformer.h.0.attn.c_attn.weight"]
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    checkpoint.save(folder / "last.pt", {key: value for key, value in state.items() if key != "format"})


def test_a_lost_bit_is_counted(place, tmp_path):
    def spoil(out_dir, answer):
        if out_dir.name in ("killed", "pieces") and answer["codes"][0] == 0:
            change_a_weight(out_dir)

    spoiled = Saboteur(place, spoil)
    assert "unequal bits: last.pt/model/" in runs.kill_case(spoiled, "adamw", 0, 1, tmp_path / "1")["problems"][0]
    problems = runs.resume_case(spoiled, KINDS["adamw"], 1, tmp_path / "2")["problems"]
    assert "last.pt/model/transformer.h.0.attn.c_attn.weight" in problems


class Script:
    """A Workplace whose processes end as `answers` say: exit codes, first step, last step."""

    def __init__(self, *answers):
        self.answers = [{"codes": [0], "seconds": 1.0, "calls": {"write": 9}}]  # of the undisturbed run
        self.answers += [{"codes": [code], "first": first, "last": last} for code, first, last in answers]

    def size(self, full, quick):
        return quick

    def train(self, out_dir, options, **how):
        return {"is_hung": False, "err": "x"} | {"first": 0, "last": 0} | self.answers.pop(0)


def test_what_a_kill_costs_is_counted():
    """Step 9 is redone, then steps 9 to 11. Then the run is lost, which ends the case."""
    result = runs.kill_case(Script((-9, 0, 12), (-9, 8, 9), (-9, 0, 0), (-9, 8, 11), (1, 8, 8)), "adamw", 0, 9, Path())
    assert (result["kills"], result["steps redone"], result["lost"]) == (4, 1 + 3, 1)
    assert result["problems"] == ["lost after 4 kills: exit code [1], x"]


def test_a_run_that_starts_again_is_counted():
    result = runs.kill_case(Script((-9, 0, 12), (-9, 0, 3), (1, 0, 0)), "adamw", 0, 9, Path())
    assert result["problems"][0] == "after 1 kills: back from step 12 to 0"


def test_a_wrong_value_of_a_damaged_checkpoint_is_counted(place, tmp_path):
    path = place.finished_run("adamw") / "last.pt"
    expected = checkpoint.load(path)
    assert checkpoints.try_bytes(place, path.read_bytes(), expected, "nothing", tmp_path)["problems"] == []
    expected["step"] += 1
    problems = checkpoints.try_bytes(place, path.read_bytes(), expected, "nothing", tmp_path / ".." / tmp_path.name)[
        "problems"
    ]
    assert problems == ["loads another /step (nothing)"]


def test_a_traceback_is_counted(place, tmp_path):
    def spoil(command, answer):
        if command == "sample.py":
            answer |= {"codes": [1], "err": "Traceback (most recent call last):\nValueError: x"}

    path = place.finished_run("adamw") / "last.pt"
    problems = checkpoints.try_bytes(Saboteur(place, spoil), path.read_bytes(), checkpoint.load(path), "it", tmp_path)[
        "problems"
    ]
    assert len(problems) == 1 and problems[0].startswith("sample: exit code [1], 2 lines")


def test_an_executed_pickle_is_counted(place, tmp_path):
    def spoil(command, answer):
        if command == "sample.py":
            (tmp_path / "made").mkdir()

    assert checkpoints.try_pickle(Saboteur(place, spoil), "model", "os.mkdir", "('PATH',)", tmp_path)["executed"] == 1


def test_a_lost_checkpoint_and_an_untrue_line_are_counted(place, tmp_path):
    def spoil(out_dir, answer):
        if answer["codes"] == [2]:
            for path in out_dir.glob("*.pt"):
                path.unlink()

    how = {"calls": ["fsync"], "error": "EIO", "nth": 9}
    problems = runs.fail_run("adamw", Saboteur(place, spoil), how, tmp_path)["problems"]
    assert "not true, with {}" in problems[0] and "there is {}" in problems[1]


def test_a_stray_file_is_counted(place, tmp_path):
    def spoil(folder, answer):
        (tmp_path / "stray").touch()
        answer["changed"].append("/somewhere/else")

    problems = generated.try_input(Saboteur(place, spoil), 0, tmp_path)["problems"]
    assert problems == ["touched /somewhere/else", "left stray"]


def test_another_order_of_the_data_is_counted(place, tmp_path, monkeypatch):
    rows = Batches.step_rows
    monkeypatch.setattr(Batches, "step_rows", lambda self, step, n=1: rows(self, step + (self.world_size == 4), n))
    assert "hashes differ" in costs.order_case(place, "prose", 400, tmp_path)["problems"][0]


def test_a_slow_save_is_counted(place, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "MOST", 1e-9)
    result = costs.cost_case(place, tmp_path)
    assert "of a run" in result["problems"][0] and 0 < result["share"] < 0.1


# ---------------------------------------------------------------- the parts


def test_what_counts_as_a_refusal():
    line = {"codes": [2], "err": "note: a\ntrain.py: no\n", "is_hung": False}
    assert why_no_refusal(line) == why_no_end(line) == ""
    assert why_no_end({"codes": [0], "err": "note: a\n", "is_hung": False}) == ""
    for wrong in (
        {"codes": [1]},
        {"codes": [-9], "is_hung": True},
        {"err": "train.py: no\nmore\n"},
        {"err": ""},
        {"codes": [0], "err": "Traceback"},
    ):
        assert why_no_refusal(line | wrong) and why_no_end(line | wrong)


@pytest.mark.parametrize(
    "a, b",
    [
        (1, 1.0),
        (1, True),
        ([1], (1,)),
        ({"a": 1}, {"a": 1, "b": 2}),
        (torch.tensor(0.0), torch.tensor(-0.0)),
        (torch.ones(2), torch.ones(2, dtype=torch.float64)),
        (torch.ones(2), torch.ones(2, 1)),
        ({"a": [torch.ones(2)]}, {"a": [torch.tensor([1.0, 1.0000001])]}),
    ],
)
def test_differences(a, b):
    assert differences(a, b) and not differences(a, a) and not differences(b, b)
    assert (
        differences(float("nan"), float("nan")) == differences(torch.tensor(torch.nan), torch.tensor(torch.nan)) == []
    )


def test_a_campaign_continues_from_its_journal(place):
    ran = []

    def case(folder):
        ran.append(folder.name)
        return {"largest x": len(ran), "n": 1, "problems": ["it broke"] if len(ran) == 2 else []}

    def cases():
        return iter([("a", case), ("b", case)])

    first = run_campaign("try", cases(), place, set())
    assert ran == ["try-a", "try-b"] and first["problems"] == ["try:b: it broke"]
    with open(place.folder / "try.jsonl", "a", encoding="utf-8") as file:
        file.write('{"case": "a", "n')  # killed while it wrote
    assert run_campaign("try", cases(), place, set()) == first and len(ran) == 2
    assert first["n"] == first["largest x"] == 2
    assert (place.folder / "failed" / "try-b").is_dir() and not (place.folder / "failed" / "try-a").exists()
    code, place.code = place.code, "another"
    assert run_campaign("try", cases(), place, {"a"})["n"] == 1 and len(ran) == 3
    place.code = code


def test_edits_change_a_checkpoint_and_are_repeatable(place):
    path = place.finished_run("muon_ema") / "last.pt"
    whole, seen = checkpoint.load(path), set()
    for seed in range(15):
        one, two = copy.deepcopy(whole), copy.deepcopy(whole)
        what = checkpoints.edit(one, random.Random(seed))[0]
        assert checkpoints.edit(two, random.Random(seed))[0] == what
        seen.add(what if differences(one, whole) else "nothing")
    assert len(seen) > 11


def test_regions_cover_a_file(place):
    path = place.finished_run("adamw") / "last.pt"
    regions = checkpoints.regions(path.read_bytes())
    assert regions[0][0] == 0 and regions[-1][1] == path.stat().st_size and len(regions) > 200
    assert all(end == start for (_, end), (start, _) in zip(regions, regions[1:], strict=False))


def test_generated_inputs_are_repeatable_and_many():
    cases = generated.generate(3)
    generated.generate.cache_clear()
    assert generated.generate(3) == cases and len(cases) == generated.BATCH
    assert {script for script, _, _ in cases} == {"train", "sample", "prepare"}
    assert len({repr(case) for case in cases}) > 90


def test_the_command(tmp_path, capsys, monkeypatch):
    assert bench.main(["faults", "order", "--quick", f"--out_dir={tmp_path}"]) == 0
    report = json.loads((tmp_path / "faults.json").read_text(encoding="utf-8"))
    assert report["results"][0]["windows"] == 2000 and report["command"].startswith("python -m bench faults order")
    assert "| order | 2 cases" in capsys.readouterr().out
    monkeypatch.setattr(costs, "open_dataset", lambda *args: campaign.read_journal("nowhere", ""))
    with pytest.raises(UserError, match="there are kill, worlds, resumes"):
        bench.main(["faults", "kil", "--quick", f"--out_dir={tmp_path}"])
