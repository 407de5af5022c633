"""bench.py: the statistics by hand, a comparison from end to end, and its mistakes."""

import json
import math
import statistics

import pytest

import bench
from config._errors import UserError


def test_paired_interval_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1/√3, t of 2 degrees of freedom 4.303."""
    mean, margin = bench.paired([0, 0, 0], [1, 2, 3])
    assert mean == 2 and margin == pytest.approx(4.303 / math.sqrt(3))
    assert bench.paired([1.0], [3.0]) == (2.0, math.inf)
    _, margin = bench.paired([0] * 100, [0, 1] * 50)
    assert margin == pytest.approx(1.96 * statistics.stdev([0, 1] * 50) / 10)


def test_verdicts():
    assert bench.verdict("a", "b", -0.021, 0.006) == "b is better by 0.0210 ± 0.0060"
    assert bench.verdict("a", "b", 0.021, 0.006) == "a is better by 0.0210 ± 0.0060"
    assert "can't be told apart" in bench.verdict("a", "b", 0.005, 0.006)
    assert "can't be told apart" in bench.verdict("a", "b", 0.5, math.inf)


def test_compare_trains_both_resumes_and_tells_them_apart(flags, tmp_path, capsys):
    """Learning rates 1e-2 and 1e-5: the first must win, and a second call has nothing left to train."""
    keep = [flag for flag in flags(max_iters=30) if not flag.startswith(("--data_dir", "--out_dir", "--l", "--min"))]
    data_dir = next(flag for flag in flags() if flag.startswith("--data_dir"))
    for name, rate in (("fast", 1e-2), ("slow", 1e-5)):
        (tmp_path / f"{name}.py").write_text(f"learning_rate = {rate}\nmin_lr = 0\n", encoding="utf-8")
    argv = ["compare", str(tmp_path / "fast.py"), str(tmp_path / "slow.py"), "--seeds=2", data_dir]
    bench.main([*argv, f"--out_dir={tmp_path / 'bench'}", *keep])
    first = capsys.readouterr().out
    assert "fast is better by" in first and first.count("seed") == 4
    report = json.loads((tmp_path / "bench" / "compare.json").read_text(encoding="utf-8"))
    fast, slow, summary = report["results"]
    losses = [[run["val_loss"] for run in side["runs"]] for side in (fast, slow)]
    assert summary["difference"] == pytest.approx(statistics.mean(losses[1]) - statistics.mean(losses[0]))
    assert losses[0][0] != losses[0][1] and report["hardware"] and summary["verdict"] in first
    before = (tmp_path / "bench" / "compare" / "fast-1" / "last.pt").stat().st_mtime_ns
    bench.main([*argv, f"--out_dir={tmp_path / 'bench'}", *keep])
    assert capsys.readouterr().out == first
    assert (tmp_path / "bench" / "compare" / "fast-1" / "last.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "give one of train, loss, generate, start, prepare, compare"),
        (["trian"], "give one of"),
        (["train", "--peer=nowhere"], "--peer=nowhere"),
        (["train", "--n_layer=3"], "--n_layer=3: not an option of bench.py train"),
        (["compare", "config/names.py"], "compare takes two config files"),
        (["compare", "config/names.py", "config/names.py"], "different names"),
        (["start", "--pairs=0"], "--pairs=0"),
    ],
)
def test_mistakes(argv, words):
    with pytest.raises(UserError) as error:
        bench.main(argv)
    assert words in str(error.value)
