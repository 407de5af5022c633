"""python -m bench: the statistics by hand, a comparison from end to end, and its mistakes."""

import io
import json
import math
import re
import statistics
import subprocess
import sys
import xml.etree.ElementTree
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import needs_corpora

import prepare
import sample
import train
from bench import __main__ as bench
from bench import generation, growth, measure, peers
from bench.experiments import counts, draw, paired_difference, t_quantile, verdict
from quill.cli import read_config_file
from quill.data import token_files
from quill.errors import UserError
from quill.generation import LayerCache
from quill.optimizer import learning_rate
from quill.options import BenchConfig, TrainConfig
from tests import replay


@pytest.fixture
def in_process(monkeypatch):
    """The benches' commands run in this process: a new process would import torch for each of them."""
    scripts = {"train.py": train, "sample.py": sample, "prepare.py": prepare}

    def run(command, cwd, input, **settings):
        python, *argv = command
        assert python == sys.executable and cwd == measure.ROOT
        out, err, code = io.StringIO(), "", 0
        with redirect_stdout(out):
            try:
                if argv[0] == "-m":
                    print(json.dumps(import_module(argv[1]).main(**json.loads(input))))
                else:
                    code = scripts[argv[0]].main(argv[1:])
            except UserError as error:
                code, err = 2, f"{argv[0]}: {error}"
        return subprocess.CompletedProcess(argv, code or 0, out.getvalue(), err)

    monkeypatch.setattr(measure, "subprocess", SimpleNamespace(run=run, Popen=subprocess.Popen, PIPE=subprocess.PIPE))


def test_a_process_and_its_failure():
    seconds, out = measure.process(["prepare.py", "--help"])
    assert seconds > 0
    assert "--tokenizer" in out
    with pytest.raises(UserError, match="prepare.py nonsense in .* failed: prepare.py: nonsense is not a known corpus"):
        measure.process(["prepare.py", "nonsense"])


def test_paired_interval_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1/√3, t of 2 degrees of freedom 4.303."""
    mean, margin = paired_difference([0, 0, 0], [1, 2, 3])
    assert mean == 2 and margin == pytest.approx(4.303 / math.sqrt(3), abs=0.0005)


@pytest.mark.parametrize(
    "degrees, t",
    [(1, 12.706), (2, 4.303), (3, 3.182), (14, 2.145), (15, 2.131), (30, 2.042), (99, 1.984), (1000, 1.962)],
)
def test_t_quantile(degrees, t):
    """The values of printed tables, to their three decimals."""
    assert t_quantile(degrees) == pytest.approx(t, abs=0.0005)


def test_verdicts():
    assert verdict("a", "b", -0.021, 0.006) == "b is better by 0.0210 ± 0.0060"
    assert verdict("a", "b", 0.021, 0.006) == "a is better by 0.0210 ± 0.0060"
    assert "can't be told apart" in verdict("a", "b", 0.005, 0.006)
    assert "can't be told apart" in verdict("a", "b", 0.5, math.inf)


def test_compare_trains_both_resumes_and_tells_them_apart(flags, in_process, tmp_path, capsys):
    """Learning rates 1e-2 and 1e-5: the first must win, and a second call has nothing left to train."""
    keep = [flag for flag in flags(max_iters=30) if not flag.startswith(("--data_dir", "--out_dir", "--l", "--min"))]
    data_dir = next(flag for flag in flags() if flag.startswith("--data_dir"))
    for name, rate in (("fast", 1e-2), ("slow", 1e-5)):
        (tmp_path / f"{name}.py").write_text(f"learning_rate = {rate}\nmin_lr = 0\n", encoding="utf-8")
    argv = ["compare", str(tmp_path / "fast.py"), str(tmp_path / "slow.py"), "--seeds=3", data_dir]
    bench.main([*argv, f"--out_dir={tmp_path / 'bench'}", *keep])
    first = capsys.readouterr().out
    assert "fast is better by" in first and first.count("seed") == 6
    report = json.loads((tmp_path / "bench" / "compare.json").read_text(encoding="utf-8"))
    fast, slow, summary = report["results"]
    losses = [[run["val_loss"] for run in side["runs"]] for side in (fast, slow)]
    assert summary["difference"] == pytest.approx(statistics.mean(losses[1]) - statistics.mean(losses[0]))
    assert losses[0][0] != losses[0][1] and report["hardware"] and summary["verdict"] in first
    before = (tmp_path / "bench" / "compare" / "fast-1" / "last.pt").stat().st_mtime_ns
    bench.main([*argv, f"--out_dir={tmp_path / 'bench'}", *keep])
    assert capsys.readouterr().out == first
    assert (tmp_path / "bench" / "compare" / "fast-1" / "last.pt").stat().st_mtime_ns == before


RUNGS = sorted((measure.ROOT / "config" / "ladder").glob("*.py"))
INGREDIENTS = [
    {"position"},
    {"n_layer"},
    {"n_head"},
    {"mlp_ratio"},
    {"residual"},
    {"n_layer"},
    {"norm"},
    {"dropout"},
]


def test_each_rung_has_one_ingredient_more():
    rungs = [read_config_file(path, TrainConfig) | {"out_dir": ""} for path in RUNGS]
    assert len(rungs) == len(INGREDIENTS) + 1
    for below, above, ingredient in zip(rungs, rungs[1:], INGREDIENTS, strict=False):
        assert {key for key in below | above if below.get(key) != above.get(key)} == ingredient
    classic = {"position": "learned", "mlp_ratio": 4.0, "residual": True, "norm": "layernorm"}
    assert classic.items() <= rungs[-1].items() and rungs[-1]["dropout"] > 0


def test_a_rung_trains_samples_and_is_drawn(flags, in_process, tmp_path, capsys):
    """Two seeds of a bigram model: as many parameters as two matrices of V × 16 have."""
    wanted = ("--max", "--eval", "--dataset", "--batch", "--grad", "--block", "--n_embd")
    keep = [flag for flag in flags(max_iters=20) if flag.startswith(wanted)]
    data_dir = next(flag for flag in flags() if flag.startswith("--data_dir"))
    readme_picture = RUNGS[0].parents[2] / "docs" / "ladder.svg"
    before = readme_picture.stat().st_mtime_ns
    bench.main(["ladder", str(RUNGS[0]), "--seeds=2", data_dir, f"--out_dir={tmp_path}", *keep])
    *_, bigram = json.loads((tmp_path / "ladder.json").read_text(encoding="utf-8"))["results"]
    meta = json.loads((Path(data_dir.partition("=")[2]) / "prose" / "meta.json").read_text(encoding="utf-8"))
    assert bigram["rung"] == "0_bigram" and bigram["parameters"] == 2 * 16 * len(meta["tokenizer"]["chars"])
    losses = [run["val_loss"] for run in bigram["runs"]]
    assert len(set(losses)) == 2 and bigram["val_loss"] == pytest.approx(sum(losses) / 2)
    assert bigram["spread"] == pytest.approx(abs(losses[0] - losses[1]))
    assert "0_bigram" in capsys.readouterr().out and "0 bigram" in (tmp_path / "ladder.svg").read_text(encoding="utf-8")
    assert readme_picture.stat().st_mtime_ns == before


def test_ladder_picture_is_to_scale():
    """Equal differences in loss are equal distances in the picture, and a wider range of seeds is a longer bar."""
    lines = [
        {
            "rung": f"{i}_<x>",
            "val_loss": loss,
            "parameters": 7,
            "seconds": 3,
            "runs": [{"val_loss": loss - i / 50}, {"val_loss": loss + i / 50}],
        }
        for i, loss in enumerate((2.5, 2.0, 1.5))
    ]
    picture = xml.etree.ElementTree.fromstring(draw(lines))
    dots = [float(dot.get("cx")) for dot in picture.iter("{http://www.w3.org/2000/svg}circle")]
    assert dots[0] - dots[1] == pytest.approx(dots[1] - dots[2], abs=0.2) and dots[0] > dots[1] > dots[2] > 0
    bars = [path.get("d") for path in picture.iter("{http://www.w3.org/2000/svg}path") if path.get("stroke") == "#c73"]
    lengths = [float(d.split("H")[1]) - float(d.split()[0][1:]) for d in bars]
    assert lengths[0] == 0 and lengths[2] == pytest.approx(2 * lengths[1], abs=0.3)
    assert max(dots) + 60 < float(picture.get("width"))


def test_counts_by_hand(write, tmp_path, capsys):
    """Of "aab…", 54 a, 27 b and the pairs aa 27, ab 27, ba 26 are in training; "aabaabaab" is the validation split."""
    token_files.prepare(write("aab" * 30), tmp_path / "aab")
    lines = counts(BenchConfig(data_dir=str(tmp_path)), "aab")
    unigram = -(5 * math.log(55 / 83) + 3 * math.log(28 / 83)) / 8
    pairs = -(6 * math.log(28 / 56) + 2 * math.log(27 / 28)) / 8
    assert [line["val_loss"] for line in lines] == pytest.approx([math.log(2), unigram, pairs], abs=1e-12)
    assert [line["parameters"] for line in lines] == [0, 2, 4]
    assert capsys.readouterr().out.count("val loss") == 3


@needs_corpora
def test_the_tours_counts(tmp_path):
    """The figures of docs/tour.md and of its picture, and the picture's dots are where the losses say."""
    lines = counts(BenchConfig(data_dir=str(tmp_path)))
    assert [f"{line['val_loss']:.3f}" for line in lines] == ["4.174", "3.347", "2.482"]
    tour = (measure.ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    losses = re.findall(r"^Loss \*\*(\d\.\d{3})\*\*", tour, flags=re.MULTILINE)
    assert losses[:3] == ["4.174", "3.347", "2.482"] and len(losses) == 12
    picture = xml.etree.ElementTree.parse(measure.ROOT / "docs" / "ladder.svg").getroot()
    texts = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if re.fullmatch(r"\d\.\d{3}", text)] == losses
    dots = [float(dot.get("cx")) for dot in picture.iter("{http://www.w3.org/2000/svg}circle")]
    scale = (dots[0] - dots[3]) / (4.174 - 2.483)
    assert dots == pytest.approx([dots[0] + scale * (float(loss) - 4.174) for loss in losses], abs=0.3)


def test_a_finished_run_with_other_options_is_not_taken_for_this_one(flags, in_process, tmp_path, capsys):
    keep = [flag for flag in flags(max_iters=2) if not flag.startswith(("--data_dir", "--out_dir"))]
    argv = ["ladder", str(RUNGS[0]), "--seeds=1", next(flag for flag in flags() if flag.startswith("--data_dir"))]
    bench.main([*argv, f"--out_dir={tmp_path}", *keep])
    with pytest.raises(UserError, match="0_bigram-1 has a run with another max_iters, learning_rate"):
        bench.main([*argv, f"--out_dir={tmp_path}", *keep, "--learning_rate=0.02", "--max_iters=3"])


def test_gpt2_s_share_of_the_peak_by_hand(in_process, monkeypatch):
    """On a tiny shape and 300 ids, and a CPU said to do 10⁹ FLOP/s: 6 for each weight that multiplies, 12 L C T."""
    monkeypatch.setattr("quill.machine.PEAK_FLOPS", {"cpu": 1e9})
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16}
    config = BenchConfig(pairs=1, device="cpu", dtype="bfloat16")
    speed, share = peers.gpt2(config, shape, ids=300, batch_size=2, steps=8)
    weights = 300 * 8 + 12 * 8 * 8 + 3 * 8  # lm_head, which the embedding shares; a block's matrices; three norms
    assert speed["n"] == 1 and min(speed["ours"]) > 0
    expected = [tokens * (6 * weights + 12 * 8 * 16) / 1e9 for tokens in speed["ours"]]
    assert share["ours"] == pytest.approx(expected)


@pytest.fixture
def peer(tmp_path):
    """A stand-in for nanoGPT: quill's model under nanoGPT's names, and another AdamW with the same settings."""
    folder = tmp_path / "peer"
    folder.mkdir()
    (folder / "train.py").touch()
    (folder / "model.py").write_text(
        """
import torch
import model
from quill.options import ModelConfig
def GPTConfig(vocab_size, **options):
    return ModelConfig(**options), vocab_size
class GPT(model.GPT):
    def __init__(self, config):
        super().__init__(*config)
    def forward(self, idx, targets=None):
        return super().forward(idx, None if targets is None else targets.view(-1).view(targets.shape))
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        groups = [{"params": [p for p in self.parameters() if (p.dim() > 1) == matrix]} for matrix in (True, False)]
        groups[1]["weight_decay"] = 0.0
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, weight_decay=weight_decay)
""",
        encoding="utf-8",
    )
    return folder


SMALL = {"shape": {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 16}, "vocab_size": 5, "tokens": 8}
SMALL |= {"device": "cpu", "dtype": "float32", "batch_size": 1}


def test_programs_that_generate(peer):
    """Ours in a new process, as the bench runs it; the peer's in this one."""
    assert measure.program("bench.generation", model="quill", **SMALL) > 0
    assert generation.main("nanogpt", peer=str(peer), **SMALL) > 0


@pytest.mark.slow
def test_generation_is_measured_beside_a_peer(peer, tmp_path, capsys):
    """Of every sort of generation one pair, each a positive speed; transformers too, where it is installed."""
    argv = ["generate", "--pairs=1", "--device=cpu", "--dtype=float32", f"--peer={peer}", f"--out_dir={tmp_path}"]
    bench.main(argv)
    lines = json.loads((tmp_path / "generate.json").read_text(encoding="utf-8"))["results"]
    assert [line["n"] for line in lines] == [1] * len(lines) and len(lines) >= 3
    assert all(line["ours"][0] > 0 and line["peer"][0] > 0 for line in lines)
    assert capsys.readouterr().out.count("10.7M, one sample") == 1 + (find_spec("transformers") is not None)


def test_the_curve_of_a_peer_that_is_quill_is_quills(peer, data_dir, in_process, monkeypatch, tmp_path):
    """With quill as its own peer, the losses agree to float32's rounding; with another learning rate they don't."""
    (tmp_path / "shakespeare_char").symlink_to(data_dir / "prose")
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 16, "batch_size": 4}
    config = BenchConfig(device="cpu", peer=str(peer), data_dir=str(tmp_path))
    (line,) = replay.replay([], config, shape)
    assert len(line["ours"]) == 6 and line["max_abs_difference"] < 1e-6
    monkeypatch.setattr(replay, "learning_rate", lambda step, config: learning_rate(step, config) / 2)
    assert replay.replay([], config, shape)[0]["max_abs_difference"] > 1e-4


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "give one of train, loss, generate, start, counts, growth, ladder, compare, replay, faults"),
        (["trian"], "give one of"),
        (["train", "--peer=nowhere"], "nowhere: there is no model.py"),
        (["train", "--n_layer=3"], "--n_layer=3: not an option of python -m bench train"),
        (["compare", "config/names.py"], "compare takes two config files"),
        (["compare", "config/names.py", "config/names.py"], "different names"),
        (["train", "config/names.py"], "config/names.py: python -m bench train takes options only"),
        (["replay"], "replay: give a checkout of nanoGPT"),
        (["replay", "--dtype=bfloat16"], "it takes no cases and no --dtype"),
        (["train", "--peer=config"], "config: there is no model.py"),
        (["train", "--dtype=float16", "--device=cpu"], "--dtype=float16: on a CPU, is for python -m bench generate"),
        (["start", "--pairs=0"], "--pairs=0"),
        (["growth", "--gigabytes=0"], "--gigabytes=0"),
        (["growth", "training"], "training: python -m bench growth takes options only"),
        (["growth", "--n_layer=3"], "--n_layer=3: not an option of python -m bench growth"),
        (
            ["compare", "config/names.py", "config/gpt2.py"],
            "losses on names, --val_split=val, and openwebtext, --val_split=val, can't be compared",
        ),
        (["compare", "config/names.py", "config/names32k.py", "--seeds=1"], "two seeds or more"),
        (["compare", "config/names.py", "config/names32k.py", "--seed=7"], "--seed: not with python -m bench compare"),
        (["ladder", "config/ladder/typo.py"], "typo.py: no such config file"),
    ],
)
def test_mistakes(argv, words):
    with pytest.raises(UserError) as error:
        bench.main(argv)
    assert words in str(error.value)


def test_power_is_numpy_s_slope():
    sizes, rng = np.array([1.0, 3, 10, 200]), np.random.default_rng(0)
    for exponent in (-1.0, 0.5, 2.0):
        values = sizes**exponent * rng.uniform(0.5, 2, 4)
        slope = np.polyfit(np.log(sizes), np.log(values), 1)[0]
        assert growth.power(sizes.tolist(), values.tolist()) == pytest.approx(slope, rel=1e-12)
    assert growth.power([1, 10, 100], [5, 5, 5]) == 0


@pytest.mark.parametrize(
    "power, expected, verdict",
    [(0.86, 1.0, "within"), (0.84, 1.0, "NOT within"), (1.16, 1.0, "NOT within"), (0.25, 0.2, "NOT within")]
    + [(0.14, 0.0, "within"), (-0.16, 0.0, "NOT within")],
)
def test_a_power_is_close_within_a_share_or_where_a_constant_is_expected_within_that_power(power, expected, verdict):
    line = {"what": "", "by": "", "sizes": [1, 2], "seconds": [1, 2], "power": power, "expected": expected}
    assert growth.describe(line)[2].endswith(f": {verdict} 15 %")


@pytest.fixture
def two_series(monkeypatch):
    """Stand-ins for the measurements. → the sizes that were measured"""
    measured = []

    def points(cost, seconds):
        for size in (1, 10, 1000):
            measured.append(size)
            yield size, cost(size), seconds(size)

    def list_series(config, folder):
        yield "walk", "miles", points(lambda size: 7 * size, lambda size: 2 * size)
        yield "wait", "m", points(lambda size: 1, lambda size: size**0.5)

    monkeypatch.setattr(growth, "list_series", list_series)
    return measured


def test_growth_is_measured_and_drawn_to_scale(two_series, tmp_path, monkeypatch, capsys):
    """A series of power 1 follows its line; of one that should be constant, the dots rise half as far as they go."""
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    bench.main(["growth", f"--out_dir={tmp_path}"])
    walk, wait = json.loads((tmp_path / "growth.json").read_text(encoding="utf-8"))["results"]
    assert (walk["power"], walk["expected"]) == pytest.approx((1, 1)) and walk["seconds"] == [2, 20, 2000]
    assert (wait["power"], wait["expected"]) == pytest.approx((0.5, 0)) and wait["sizes"] == [1, 10, 1000]
    out = capsys.readouterr().out
    assert "walk, 1 to 1,000 miles, 2 to 2e+03 s, power 1.00, expected 1.00: within 15 %\n" in out
    assert "power 0.50, expected 0.00: NOT within 15 %\n" in out
    picture = xml.etree.ElementTree.parse(tmp_path / "docs" / "growth.svg").getroot()
    for panel, rise in zip(picture.iter("{http://www.w3.org/2000/svg}g"), (1, 0.5), strict=True):
        dots = [(float(dot.get("cx")), -float(dot.get("cy"))) for dot in panel if dot.tag.endswith("circle")]
        assert [x for x, _ in dots] == [0, 60, 180] and [y for _, y in dots] == [rise * x for x, _ in dots]
        curve = next(line.get("points") for line in panel if line.tag.endswith("polyline"))
        assert curve == ("0.0,-0.0 60.0,-60.0 180.0,-180.0" if rise == 1 else "0.0,-0.0 60.0,-0.0 180.0,-0.0")


@pytest.mark.parametrize("flag, measured", [("--quick", [1, 10] * 2), ("--dtype=float32", [1, 10, 1000] * 2)])
def test_a_growth_that_is_not_as_shipped_is_not_drawn_into_docs(two_series, tmp_path, monkeypatch, flag, measured):
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    bench.main(["growth", flag, f"--out_dir={tmp_path / 'out'}"])
    assert two_series == measured
    assert (tmp_path / "out" / "growth.svg").is_file() and not (tmp_path / "docs").exists()


def test_what_generating_reads_is_counted(in_process, monkeypatch):
    """The formula beside the keys and values that the cache returned; the formula's mean is a token short."""
    read, append = [], LayerCache.append_both

    def count(self, kv):
        keys, values = append(self, kv)
        read.append(keys.numel() + values.numel())
        return keys, values

    monkeypatch.setattr(LayerCache, "append_both", count)
    monkeypatch.setattr(growth, "MEDIUM", {"n_layer": 3, "n_head": 2, "n_embd": 16})
    cost, seconds = growth.generation(4, 60, 64, BenchConfig(device="cpu", dtype="float32"))
    last = read[-60 * 3 :]  # without the warm-up
    weights = 3 * (12 * 16 * 16 + 2 * 16) + 65 * 16 + 16  # blocks, lm_head, final norm
    assert cost == pytest.approx(60 * weights + sum(last) * 60 / 61) and seconds > 0


def test_a_step_of_growth_by_hand(monkeypatch):
    """Its cost is that of `flops_per_token`, and its time is that of the last evaluation's half of the run."""
    asked = {}

    def train(options):
        asked.update(options)
        return 99.0, [{"tokens_per_s": "1"}, {"tokens_per_s": "1024"}]

    monkeypatch.setattr(measure, "train", train)
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16}
    flops, seconds = growth.step(shape | {"data_dir": "x"})
    assert flops == 6 * (65 * 8 + 12 * 8 * 8 + 3 * 8) + 12 * 8 * 16 and seconds == growth.TOKENS / 1024
    assert asked["batch_size"] * asked["block_size"] == growth.TOKENS and asked["gradient_accumulation_steps"] == 1
    assert asked["max_iters"] == 2 * asked["eval_interval"] >= 6


@needs_corpora
def test_a_text_of_copies(tmp_path):
    measure.write_text(tmp_path / "text", 2, BenchConfig())
    text = (tmp_path / "text").read_bytes()
    assert len(text) >= 2e6 and text == text[: len(text) // 2] * 2


@pytest.mark.slow
@needs_corpora
def test_growth_of_the_smallest_sizes(tmp_path):
    """Every series for real, at its first two sizes."""
    bench.main(["growth", "--quick", f"--out_dir={tmp_path}"])
    lines = json.loads((tmp_path / "growth.json").read_text(encoding="utf-8"))["results"]
    assert len(lines) == 6 and all(len(line["seconds"]) == 2 and min(line["seconds"]) > 0 for line in lines)
    assert all(0 <= line["expected"] < 1.1 for line in lines)
    assert lines[0]["power"] > 0 and lines[2]["power"] > 0.3  # ten times the text, nine times the parameters
    picture = xml.etree.ElementTree.parse(tmp_path / "growth.svg").getroot()
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}circle"))) == 12
