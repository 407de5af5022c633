"""python -m bench: the statistics by hand, a comparison from end to end, and its mistakes."""

import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import needs_corpora

import prepare
import sample
import train
from bench import __main__ as bench
from bench import experiments, generation, growth, measure, peers
from bench.experiments import counts, draw, interval, t_quantile, verdict
from model import GPT
from quill.cli import read_config_file
from quill.data import token_files
from quill.errors import UserError
from quill.generation import LayerCache
from quill.machine import pick_machine
from quill.optimizer import learning_rate
from quill.options import BenchConfig, ModelConfig, TrainConfig
from tests import replay

needs_matplotlib = pytest.mark.skipif(
    not find_spec("matplotlib"), reason="matplotlib is not installed: pip install -r requirements-extra.txt"
)
SVG = "{http://www.w3.org/2000/svg}"


def drawn_dots(part):
    """The places of the dots in a part of matplotlib's SVG: y grows downwards. Ticks are not inside a clipped group."""
    groups = [group for group in part.iter(f"{SVG}g") if group.get("clip-path")]
    return [(float(dot.get("x")), float(dot.get("y"))) for group in groups for dot in group.iter(f"{SVG}use")]


def drawn_lines(part, color):
    """The points of each line of a color in a part of matplotlib's SVG."""
    paths = [path for path in part.iter(f"{SVG}path") if path.get("clip-path") and color in path.get("style", "")]
    numbers = [[float(number) for number in re.findall(r"[\d.]+", path.get("d"))] for path in paths]
    return [list(zip(line[::2], line[1::2], strict=True)) for line in numbers]


@pytest.fixture
def in_process(monkeypatch):
    """The benches' commands run in this process: a new process would import torch for each of them."""
    scripts = {"train.py": train, "sample.py": sample, "prepare.py": prepare}

    def run(command, cwd, input=None, **settings):
        python, *argv = command
        assert python == sys.executable
        if cwd != measure.ROOT:  # a peer's
            return subprocess.run(command, cwd=cwd, **settings)
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

    @contextmanager
    def popen(command, cwd, **settings):
        python, unbuffered, *argv = command
        out = run([python, *argv], cwd, capture_output=True, encoding="utf-8").stdout
        yield SimpleNamespace(stdout=out.splitlines(keepends=True), kill=lambda: None)

    names = {"run": run, "Popen": popen, "PIPE": subprocess.PIPE, "STDOUT": subprocess.STDOUT}
    monkeypatch.setattr(measure, "subprocess", SimpleNamespace(**names))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)  # by another test, on a machine with a GPU


def test_a_process_and_its_failure():
    seconds, out = measure.process(["prepare.py", "--help"])
    assert seconds > 0
    assert "--tokenizer" in out
    with pytest.raises(UserError, match="prepare.py nonsense in .* failed: prepare.py: nonsense is not a known corpus"):
        measure.process(["prepare.py", "nonsense"])


def test_a_process_is_ended_after_its_last_line_that_counts(monkeypatch):
    """A GPU's memory in use is read while the process is still there."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10e9, 80e9))
    program = "import time\nprint('step 1/')\ntime.sleep(0.2)\nprint('step 12/')\ntime.sleep(100)"
    first, last, memory = measure.seconds_to_lines(["step 1/", "step 12/"], ["-c", program])
    assert 0.2 <= last - first < 5 and memory == 70
    with pytest.raises(UserError, match="-c ended before it printed step 2/: too early"):
        measure.seconds_to_lines(["step 2/"], ["-c", "print('step 1/')\nprint('too early')"])


def test_paired_interval_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1/√3, t of 2 degrees of freedom 4.303."""
    mean, margin = interval([1, 2, 3])
    assert mean == 2 and margin == pytest.approx(4.303 / math.sqrt(3), abs=0.0005)


@pytest.mark.parametrize(
    "degrees, t",
    [(1, 12.706), (2, 4.303), (3, 3.182), (14, 2.145), (15, 2.131), (30, 2.042), (99, 1.984), (1000, 1.962)],
)
def test_t_quantile(degrees, t):
    """The values of printed tables, to their three decimals."""
    assert t_quantile(degrees) == pytest.approx(t, abs=0.0005)


def test_verdicts():
    assert verdict(-0.021, 0.006, "a") == "better than a by 0.0210 ± 0.0060"
    assert verdict(0.021, 0.006, "a") == "worse than a by 0.0210 ± 0.0060"
    assert verdict(0.005, 0.006, "a") == "can't be told apart from a: +0.0050 ± 0.0060"
    assert verdict(0.5, math.inf, "a").startswith("can't be told apart")


@pytest.fixture
def variants(flags, tmp_path):
    """Two configs, with learning rates 1e-2 and 1e-5. → the arguments of `bench compare`, without their names"""
    keep = [flag for flag in flags(max_iters=30) if not flag.startswith(("--out_dir", "--l", "--min"))]
    for name, rate in (("fast", 1e-2), ("slow", 1e-5)):
        (tmp_path / f"{name}.py").write_text(f"learning_rate = {rate}\nmin_lr = 0\n", encoding="utf-8")
    return [*keep, f"--out_dir={tmp_path / 'bench'}"]


def test_compare_trains_both_resumes_and_tells_them_apart(variants, in_process, tmp_path, capsys):
    """The first must win, and a second call has nothing left to train."""
    argv = ["compare", str(tmp_path / "fast.py"), str(tmp_path / "slow.py"), "--seeds=3", *variants]
    assert bench.main(argv) == 0
    first = capsys.readouterr().out
    fast, slow = json.loads((tmp_path / "bench" / "compare.json").read_text(encoding="utf-8"))["results"]
    losses = [[run["val_loss"] for run in side["runs"]] for side in (fast, slow)]
    difference = statistics.mean(losses[1]) - statistics.mean(losses[0])
    *_, best, worst, hardware = first.splitlines()
    assert best.startswith(f"val loss {statistics.mean(losses[0]):.4f} (spread ") and best.endswith(" s: fast")
    assert f", worse than fast by {difference:.4f} ± " in worst and worst.endswith(": slow")
    assert losses[0][0] != losses[0][1] and hardware.endswith("compare.json")
    assert [run["best_step"] for run in fast["runs"]] == [30] * 3 and fast["parameters"] > 6000
    before = (tmp_path / "bench" / "compare" / "fast-1" / "last.pt").stat().st_mtime_ns
    bench.main(argv)
    assert capsys.readouterr().out == first
    assert (tmp_path / "bench" / "compare" / "fast-1" / "last.pt").stat().st_mtime_ns == before


def test_variants_of_a_file_are_ranked_and_a_failed_one_is_a_line(variants, in_process, tmp_path, capsys):
    """Comments and empty lines are left out. The last variant's folder is in use, which only a run can find out."""
    path = str(tmp_path / "fast.py")
    names = [f"{path} --learning_rate=1e-5", path, f"{path} --beta1=0.8"]
    listed = tmp_path / "variants.txt"
    listed.write_text("\ufeff# slow\n\n" + "\n".join(names) + "  # in use", encoding="utf-8")
    (tmp_path / "bench" / "compare").mkdir(parents=True)
    folder = re.sub(r"[/ ]", "_", names[2])
    (tmp_path / "bench" / "compare" / f"{folder}-1").touch()
    assert bench.main(["compare", str(listed), "--seeds=1", *variants]) == 1
    *_, a, b, c, _ = capsys.readouterr().out.splitlines()
    assert a.startswith("val loss") and a.endswith(f": {names[1]}") and b.endswith(f" s: {names[0]}")
    assert c.startswith(f"seed 1: train.py {path} in ") and c.endswith(f": {names[2]}")
    bench.main(["compare", str(listed), "--seeds=1", "--minutes=1e-9", *variants])
    assert capsys.readouterr().out.count("seed 1: not started, as --minutes=1e-09 were over") == 6


def test_several_runs_at_a_time(variants, tmp_path, monkeypatch, capsys):
    """The first two runs end only when both have started. Each seed's losses stay with it."""
    both = threading.Barrier(2, timeout=10)

    def train_or_resume(path, given, seed, name, config):
        if seed == 1:
            both.wait()
        loss = seed + 0.25 * path.endswith("slow.py")
        return {"seed": seed, "val_loss": loss, "best_loss": loss, "best_step": 1, "seconds": 1.0, "parameters": 7}

    monkeypatch.setattr(experiments, "train_or_resume", train_or_resume)
    argv = ["compare", str(tmp_path / "fast.py"), str(tmp_path / "slow.py"), "--seeds=4", "--jobs=2", *variants]
    bench.main(argv)
    assert "val loss 2.7500 (spread 3.0000, n = 4), best 1.2500 at step 1, 1.0 s, " in capsys.readouterr().out
    report = json.loads((tmp_path / "bench" / "compare.json").read_text(encoding="utf-8"))
    assert [[run["seed"] for run in line["runs"]] for line in report["results"]] == [[1, 2, 3, 4]] * 2


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


@needs_matplotlib
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
    assert bigram["name"] == "0_bigram" and bigram["parameters"] == 2 * 16 * len(meta["tokenizer"]["chars"])
    losses = [run["val_loss"] for run in bigram["runs"]]
    assert len(set(losses)) == 2 and bigram["val_loss"] == pytest.approx(sum(losses) / 2)
    assert bigram["spread"] == pytest.approx(abs(losses[0] - losses[1]))
    assert "0_bigram" in capsys.readouterr().out and "0 bigram" in (tmp_path / "ladder.svg").read_text(encoding="utf-8")
    assert readme_picture.stat().st_mtime_ns == before


@needs_matplotlib
def test_ladder_picture_is_to_scale(tmp_path):
    """Equal differences in loss are equal distances in the picture, and a wider range of seeds is a longer bar."""
    lines = [
        {
            "name": f"{i}_<x>",
            "val_loss": loss,
            "parameters": 7,
            "seconds": 3,
            "runs": [{"val_loss": loss - i / 50}, {"val_loss": loss + i / 50}],
        }
        for i, loss in enumerate((2.5, 2.0, 1.5))
    ]
    pictures = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in pictures:
        draw(lines, path)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()  # no date, no random names
    picture = xml.etree.ElementTree.parse(pictures[0]).getroot()
    dots = [x for x, _ in drawn_dots(picture)]
    assert dots[0] - dots[1] == pytest.approx(dots[1] - dots[2], abs=1e-3) and dots[0] > dots[1] > dots[2] > 0
    lengths = [right - left for (left, _), (right, _) in drawn_lines(picture, "#ff7f0e")]
    assert lengths[0] == 0 and lengths[2] == pytest.approx(2 * lengths[1], abs=1e-3)
    assert lengths[2] / (dots[0] - dots[1]) == pytest.approx(0.08 / 0.5, abs=1e-4)
    assert max(dots) + 40 < float(picture.get("viewBox").split()[2])
    assert {"0 <x>", "7 parameters, 3 s", "1.500"} <= {text.text for text in picture.iter(f"{SVG}text")}


def test_counts_by_hand(write, tmp_path, capsys):
    """Of "aab…", 54 a, 27 b and the pairs aa 27, ab 27, ba 26 are in training; "aabaabaab" is the validation split."""
    token_files.prepare(write("aab" * 30), tmp_path / "aab")
    lines = list(counts(BenchConfig(data_dir=str(tmp_path)), "aab"))
    unigram = -(5 * math.log(55 / 83) + 3 * math.log(28 / 83)) / 8
    pairs = -(6 * math.log(28 / 56) + 2 * math.log(27 / 28)) / 8
    assert [line["val_loss"] for line in lines] == pytest.approx([math.log(2), unigram, pairs], abs=1e-12)
    assert [line["parameters"] for line in lines] == [0, 2, 4]
    assert capsys.readouterr().out.count("val loss") == 3


@needs_corpora
def test_the_tours_counts(tmp_path):
    """The figures of docs/tour.md and of its picture, and the picture's dots are where the losses say."""
    lines = list(counts(BenchConfig(data_dir=str(tmp_path))))
    assert [f"{line['val_loss']:.3f}" for line in lines] == ["4.174", "3.347", "2.482"]
    tour = (measure.ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    losses = re.findall(r"^Loss \*\*(\d\.\d{3})\*\*", tour, flags=re.MULTILINE)
    assert losses[:3] == ["4.174", "3.347", "2.482"] and len(losses) == 12
    picture = xml.etree.ElementTree.parse(measure.ROOT / "docs" / "ladder.svg").getroot()
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert [text for text in texts if re.fullmatch(r"\d\.\d{3}", text)] == losses
    dots = [x for x, _ in drawn_dots(picture)]
    scale = (dots[0] - dots[3]) / (4.174 - 2.483)
    assert dots == pytest.approx([dots[0] + scale * (float(loss) - 4.174) for loss in losses], abs=1e-3)
    ranges = re.findall(r"^Loss .*\((\d\.\d{3}) to (\d\.\d{3})\)", tour, flags=re.MULTILINE)
    ends = [dots[0] + scale * (float(loss) - 4.174) for pair in ranges for loss in pair]
    bars = drawn_lines(picture, "#ff7f0e")[3:]  # the die and the counts have one loss
    assert [x for bar in bars for x, _ in bar] == pytest.approx(ends, abs=1e-3) and len(bars) == 9


@needs_matplotlib
def test_a_finished_run_with_other_options_is_not_taken_for_this_one(flags, in_process, tmp_path, capsys):
    keep = [flag for flag in flags(max_iters=2) if not flag.startswith(("--data_dir", "--out_dir"))]
    argv = ["ladder", str(RUNGS[0]), "--seeds=1", next(flag for flag in flags() if flag.startswith("--data_dir"))]
    bench.main([*argv, f"--out_dir={tmp_path}", *keep])
    assert bench.main([*argv, f"--out_dir={tmp_path}", *keep, "--learning_rate=0.02", "--max_iters=3"]) == 1
    assert "0_bigram-1 has a run with another max_iters, learning_rate" in capsys.readouterr().out


def test_shares_of_the_peak_and_of_the_product_rate_by_hand(in_process, monkeypatch):
    """On a tiny shape and 300 ids, and a CPU said to do 10⁹ FLOP/s: 6 for each weight that multiplies, 12 L C T."""
    monkeypatch.setattr("quill.machine.PEAK_FLOPS", {"cpu": 1e9})
    monkeypatch.setattr(peers, "product_rate", lambda machine, size: 2e9)
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16, "batch_size": 2}
    config = BenchConfig(pairs=2, device="cpu", dtype="bfloat16")
    monkeypatch.setattr(peers, "GPT2_IDS", 300)
    *_, speed, rate, share, mfu = peers.random_tokens("tiny", shape, 2, config)
    weights = 300 * 8 + 12 * 8 * 8 + 3 * 8  # lm_head, which the embedding shares; a block's matrices; three norms
    flops = [tokens * (6 * weights + 12 * 8 * 16) for tokens in speed["ours"]]
    assert len(flops) == 2 and min(flops) > 0 and rate["ours"] == [2e-3, 2e-3]
    assert share["ours"] == pytest.approx([flop / 2e9 for flop in flops])
    assert mfu["ours"] == pytest.approx([flop / 1e9 for flop in flops])


def test_seconds_of_a_call():
    """A call that waits 10 ms takes that long, plus what the machine adds; the threads stay as they were."""
    threads, seen = torch.get_num_threads(), set()
    seconds = peers.seconds_of(lambda: seen.add(torch.get_num_threads()) or time.sleep(0.01))
    assert 0.01 <= seconds < 0.02 and seen == {threads} == {torch.get_num_threads()}


def test_the_rates_of_a_machine(device):
    """What they must be at least and at most: a small size takes a CPU less than a second."""
    machine = pick_machine(BenchConfig(device=device.type, dtype="float32"))
    gpu = device.type == "cuda"
    assert (1e12 if gpu else 1e6) < peers.product_rate(machine, 4096 if gpu else 128) < 1e15
    assert (5e10 if gpu else 1e6) < peers.read_bandwidth(machine, 2**27 if gpu else 2**16) < 1e14


@pytest.fixture
def peer(tmp_path):
    """A stand-in for nanoGPT: quill's model under nanoGPT's names, and another AdamW with the same settings.

    Its train.py prints what nanoGPT's prints, and copies a checkpoint that has been made before.
    """
    folder = tmp_path / "peer"
    folder.mkdir()
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16}
    state = {
        "model": GPT(ModelConfig(**shape), 13).state_dict(),
        "model_args": shape | {"bias": False, "dropout": 0.0, "vocab_size": 13},
    }
    state |= {"iter_num": 250, "best_val_loss": torch.tensor(2.0), "config": {"dataset": "prose"}}
    torch.save(state, folder / "ckpt.pt")
    (folder / "data" / "shakespeare_char").mkdir(parents=True)
    (folder / "data" / "shakespeare_char" / "train.bin").touch()
    (folder / "train.py").write_text(
        """
import os, shutil, sys, time
options = dict(arg[2:].split("=", 1) for arg in sys.argv[2:])
with open("command.txt", "a") as file:
    print(*sys.argv[1:], os.environ.get("TORCHINDUCTOR_CACHE_DIR"), file=file)
for i in range(0, 1200, 4):
    print(f"iter {i}: loss 4.0000, time 1.00ms, mfu -100.00%")
if "TRITON_CACHE_DIR" in os.environ:
    shutil.copyfile("ckpt.pt", options["out_dir"] + "/ckpt.pt")
    open(os.environ["TRITON_CACHE_DIR"], "w").close()
    time.sleep(0.2)
""",
        encoding="utf-8",
    )
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


@pytest.fixture
def tiny(monkeypatch, in_process, data_dir, tmp_path):
    """Shapes of a few hundred parameters in place of those that are measured, as on a GPU. → the folder of datasets"""
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16}
    for name, more in (("SHAKESPEARE_10M", {"batch_size": 2}), ("GPT2", {}), ("GPT2_XL", {"batch_size": 2})):
        monkeypatch.setattr(peers, name, shape | more)
    monkeypatch.setattr(peers, "GPT2_IDS", 100)
    monkeypatch.setattr(peers, "on_gpu", lambda config: True)
    monkeypatch.setattr(peers, "product_rate", lambda machine, size: 2e9)
    monkeypatch.setattr(peers, "read_bandwidth", lambda machine: 1e9)
    for part in ("train", "stock", "speedrun", "best", "generate", "xl", "replay", "compare"):
        (tmp_path / "out" / part).mkdir(parents=True)
    (tmp_path / "out" / "data").mkdir()
    (tmp_path / "out" / "data" / "shakespeare_char").symlink_to(data_dir / "prose")
    return tmp_path / "out"


def gpu_sh(folder, *argv, **env):
    """Run bench/gpu.sh in `folder`, with a `python` that only prints its arguments, a line for each, and END."""
    python = folder / "python"
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\" END\n", encoding="utf-8")
    python.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "PYTHON": python, "DEVICE": "cpu", "QUILL_CORPORA": ".", "OUT": "out"} | env
    command = ["bash", measure.ROOT / "bench" / "gpu.sh", *argv]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


RUN = "--n_layer=1 --n_head=1 --n_embd=8 --block_size=16 --batch_size=2 --max_iters=4 --eval_interval=2"


@pytest.mark.parametrize(
    "argv, name, measured, with_peer",
    [
        ("train peer --pairs=1", "train", 6, 1),
        (f"stock peer {RUN}", "loss", 5, 4),
        ("speedrun --recipe=tiny.py --pairs=2", "loss", 5, 0),
        ("best --recipe=tiny.py --pairs=2", "loss", 5, 0),
        ("generate peer --pairs=1", "generate", 6, 3),
        ("xl --bias=True", "xl", 3, 0),
        ("compare variants.txt", "compare", 2, 0),
    ],
)
def test_a_part_of_gpu_sh(argv, name, measured, with_peer, tiny, peer, write, monkeypatch):
    """The script's command runs in this process at a tiny size, and gives all figures, nanoGPT's where it should."""
    write("x", "tinyshakespeare.txt")
    options = RUN.replace("--", "").replace(" ", "\n").replace("=", " = ")
    write(f"{options}\ndataset = 'shakespeare_char'\ngradient_accumulation_steps = 1\n", "tiny.py")
    write("tiny.py\ntiny.py --learning_rate=0.1", "variants.txt")
    done = gpu_sh(tiny.parent, *argv.split(), JOBS="1")
    commands = [command.splitlines() for command in done.stdout.split("END\n")]
    (command,) = [words for words in commands if words[:2] == ["-m", "bench"]]
    assert done.returncode == 0 and command[2] == name and done.stderr == ""
    monkeypatch.chdir(tiny.parent)
    assert bench.main(command[2:]) == 0
    folder = tiny / argv.split()[0]
    lines = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["results"]
    assert len(lines) == measured and sum(bool(line.get("peer")) for line in lines) == with_peer
    runs = [figure for line in lines for figure in line.get("ours") or [run["val_loss"] for run in line["runs"]]]
    assert all(math.isfinite(run) and run >= 0 for run in runs) and "END" in (folder / "log.txt").read_text("utf-8")


def test_nanogpt_runs_as_shipped_with_new_caches_and_its_checkpoint_is_earlier_than_its_end(tiny, peer):
    """Of its flags only those are given that name the machine and the folder. It writes one file."""
    config = BenchConfig(device="cpu", pairs=2, peer=str(peer), data_dir=str(tiny / "data"))
    run = {**dict(flag[2:].split("=") for flag in RUN.split()), "dataset": "shakespeare_char", "warmup_iters": 0}
    lines = {line["what"]: line for line in peers.loss(run | {"gradient_accumulation_steps": 1}, config)}
    commands = (peer / "command.txt").read_text(encoding="utf-8").splitlines()
    assert [[word.partition("=")[0] for word in command.split()[:-1]] for command in commands] == [
        [peers.PEER_CONFIG, "--out_dir", "--device", "--dtype"]
    ] * 2
    assert len({command.split()[-1] for command in commands}) == 2
    loss, whole, best, compiled, size = lines.values()
    assert compiled["ours"] == [0, 0] and compiled["peer"] == [1, 1] and loss["ours"][0] != loss["ours"][1]
    assert all(0.2 <= end - saved < 5 for end, saved in zip(whole["peer"], best["peer"], strict=True))
    assert all(0 < saved <= end for end, saved in zip(whole["ours"], best["ours"], strict=True))
    assert loss["peer"][0] == loss["peer"][1] == pytest.approx(math.log(13), abs=0.1)
    assert size["ours"] == [13 * 8 + 16 * 8 + 12 * 64 + 3 * 8] * 2 and ", at most 4.0" in measure.describe(loss, 4.0)


@pytest.mark.parametrize(
    "argv, env, words",
    [
        ("", {}, "bench/gpu.sh tests "),
        ("trian peer", {}, "bench/gpu.sh tests "),
        ("train", {"QUILL_CORPORA": "nowhere"}, "gpu.sh: QUILL_CORPORA must be the folder of tinyshakespeare.txt"),
        ("train", {"QUILL_CORPORA": ""}, "gpu.sh: QUILL_CORPORA must be the folder of tinyshakespeare.txt"),
        ("train nowhere", {}, "nowhere: give a checkout of nanoGPT"),
        ("replay", {}, "gpu.sh: replay needs a checkout of nanoGPT"),
        ("compare", {}, "gpu.sh: compare needs a file with a variant on each line"),
        ("generate", {"OUT": "a_file"}, "a_file/generate: can't be written to"),
        ("tests", {"DEVICE": "cuda"}, "gpu.sh: no test ran on the GPU"),
    ],
)
def test_mistakes_of_gpu_sh(argv, env, words, write, tmp_path):
    write("x", "tinyshakespeare.txt")
    write("x", "a_file")
    done = gpu_sh(tmp_path, *argv.split(), **env)
    assert done.returncode == 2 and words in done.stdout + done.stderr


def test_tests_on_a_gpu_are_counted(tmp_path):
    """The arguments are printed by the stand-in for pytest, which runs twice."""
    names = ["[cuda]", "[muon-cuda-3]", "[cpu]", "[cudax]", ""]
    done = gpu_sh(tmp_path, "tests", *(f"PASSED tests/test_a.py::test_b{name}" for name in names))
    assert done.returncode == 0 and done.stdout.endswith("4 tests ran on the GPU\n") and "PASSED" not in done.stdout
    assert done.stdout.splitlines()[5:7] == ["-k", "cuda"]


@pytest.mark.slow
def test_generation_is_measured_beside_a_peer(peer, tmp_path):
    """Of every sort of generation one pair, each a positive speed."""
    argv = ["generate", "--pairs=1", "--device=cpu", "--dtype=float32", f"--peer={peer}", f"--out_dir={tmp_path}"]
    bench.main(argv)
    lines = json.loads((tmp_path / "generate.json").read_text(encoding="utf-8"))["results"]
    assert len(lines) == 6 and all(line["ours"][0] > 0 for line in lines)
    assert all(line["peer"][0] > 0 for line in lines if line["unit"] == "tokens/s")


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
        ([], "give one of train, xl, loss, generate, start, counts, growth, ladder, compare, replay, faults"),
        (["trian"], "give one of"),
        (["train", "--peer=nowhere"], "nowhere: there is no model.py"),
        (["generate", "--n_layer=3"], "--n_layer=3: not an option of python -m bench generate"),
        (["train", "--n_layre=3"], "there is no option n_layre"),
        (["xl", "--seed=3"], "--seed: not with python -m bench xl"),
        (["xl", "--device=cpu"], "xl needs a GPU with 80 GB"),
        (["compare", "config/names.py"], "compare takes two config files"),
        (["compare", "config/names.py", "config/names.py"], "different names"),
        (["compare", "nowhere.txt", "config/names.py"], "nowhere.txt"),
        (["compare", "config/names.py", "config/names32k.py", "--jobs=0"], "--jobs=0"),
        (["compare", "config/names.py", "config/names32k.py", "--minutes=0"], "--minutes=0"),
        (["compare", "config/names.py", "config/typo.py"], "typo.py: no such config file"),
        (["train", "config/names.py"], "config/names.py: not an option of python -m bench train"),
        (["replay"], "replay: give a checkout of nanoGPT"),
        (["replay", "--dtype=bfloat16"], "it takes no cases and no --dtype"),
        (["train", "--peer=config"], "config: there is no model.py"),
        (
            ["train", "--dtype=float16", "--device=cpu"],
            "--dtype=float16: on a CPU, only python -m bench generate takes it",
        ),
        (["start", "--pairs=0"], "--pairs=0"),
        (["growth", "--gigabytes=0"], "--gigabytes=0"),
        (["growth", "training"], "training: not an option of python -m bench growth"),
        (["growth", "--n_layer=3"], "--n_layer=3: not an option of python -m bench growth"),
        (
            ["compare", "config/names.py", "config/gpt2.py"],
            "losses on names, --val_split=val, and openwebtext, --val_split=val, can't be compared",
        ),
        (["compare", "config/names.py", "config/names32k.py", "--seed=7"], "--seed: not with python -m bench compare"),
        (["ladder", "config/ladder/typo.py"], "typo.py: no such config file"),
    ],
)
def test_mistakes(argv, words, tmp_path, monkeypatch):
    """Each is one line, before anything is measured."""
    monkeypatch.setattr(bench, "find_spec", lambda name: True)
    with pytest.raises((UserError, FileNotFoundError)) as error:
        bench.main([*argv, f"--out_dir={tmp_path}"])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["ladder", "growth"])
def test_pictures_need_matplotlib(name, monkeypatch, tmp_path):
    """It is asked for before anything is measured."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(bench.BENCHES, name, lambda *_: pytest.fail("it ran"))
    with pytest.raises(UserError, match=f"python -m bench {name} needs a package: pip install matplotlib"):
        bench.main([name, f"--out_dir={tmp_path}"])


@pytest.mark.parametrize(
    "line, words",
    [
        ("config/names.py --n_layre=3", "there is no option n_layre"),
        ("config/names.py --n_embd=30", "--n_embd=30 is not divisible by --n_head=4"),
        ("config/names.py --seed=3", "--seed: not with python -m bench compare"),
        ("config/names.py --out_dir=x", "--out_dir: not with python -m bench compare"),
        ("--n_layer=3", "--n_layer=3: give one config file"),
        ("config/typo.py", "typo.py: no such config file"),
        (b"config/names.py --dataset=\xe9", "must be UTF-8 text"),
        ("config/names.py\nconfig/names.py", "config/names.py: give different lines"),
        ("", "takes two config files or more"),
    ],
)
def test_mistakes_in_a_file_of_variants(line, words, write, tmp_path):
    with pytest.raises(UserError) as error:
        bench.main(["compare", str(write(line, "variants.txt")), f"--out_dir={tmp_path / 'bench'}"])
    assert words in str(error.value)


def test_a_folder_that_can_t_be_written_to_is_reported_before_the_first_run(write, monkeypatch):
    monkeypatch.setitem(bench.BENCHES, "generate", lambda config: pytest.fail("it ran"))
    with pytest.raises(UserError, match="can't be written to"):
        bench.main(["generate", f"--out_dir={write('a file')}"])


def test_what_was_measured_before_a_failure_is_kept(tmp_path, monkeypatch, capsys):
    speeds = iter([[100.0, 1.0], [300.0]])

    def generate(config):
        yield from measure.in_turn(config, {"speed": "tokens/s", "time": "s"}, lambda: next(speeds))
        pytest.fail("there is no third run")

    monkeypatch.setitem(bench.BENCHES, "generate", generate)
    with pytest.raises(RuntimeError):  # how a generator reports the StopIteration of `next`
        bench.main(["generate", "--pairs=3", f"--out_dir={tmp_path}"])
    speed, time = json.loads((tmp_path / "generate.json").read_text(encoding="utf-8"))["results"]
    assert speed["ours"] == [100, 300] and time["ours"] == [1]
    *_, a, b, _ = capsys.readouterr().out.splitlines()
    assert a == "speed: 200 (100–300) tokens/s (n = 2)" and b == "time: 1 s (n = 1)"


@pytest.mark.parametrize(
    "unit, text",
    [
        ("s", "a: 2.5 (1–4) s, peer 3.5 (3–4), ratio 2 (1–3) (n = 2)"),
        ("tokens/s", "a: 2.5 (1–4) tokens/s, peer 3.5 (3–4), ratio 0.6667 (0.3333–1) (n = 2)"),
        ("files", "a: 2.5 (1–4) files, peer 3.5 (3–4) (n = 2)"),
        ("nats", "a: 2.5 (1–4) nats, mean 2.5000, NOT at most 2.4, peer 3.5 (3–4), ratio 2 (1–3) (n = 2)"),
    ],
)
def test_a_line_by_hand(unit, text):
    """A ratio compares the runs of a pair, and is above 1 where ours is better."""
    line = {"what": "a", "unit": unit, "ours": [1, 4], "peer": [3, 4]}
    assert measure.describe(line, 2.4) == text


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
    assert growth.verdict({"power": power, "expected": expected}).endswith(f": {verdict} 15 %")


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


@needs_matplotlib
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
    panels = [part for part in picture.iter(f"{SVG}g") if part.get("id", "").startswith("axes_")]
    for panel, rise, expected in zip(panels, (1, 0.5), (1, 0), strict=True):
        ((left, bottom), *_), dots = drawn_dots(panel), drawn_dots(panel)
        xs = [x - left for x, _ in dots]
        assert xs == pytest.approx([0, xs[2] / 3, xs[2]], abs=1e-3) and xs[2] > 100
        assert [bottom - y for _, y in dots] == pytest.approx([rise * x for x in xs], abs=1e-3)
        (curve,) = drawn_lines(panel, "#1f77b4")
        assert [bottom - y for _, y in curve] == pytest.approx([expected * (x - left) for x, _ in curve], abs=1e-3)
        assert {round(x - left) for x, _ in curve} >= {0, round(xs[2])}
    texts = {text.text for text in picture.iter(f"{SVG}text")}
    assert {"walk", "power 1.00, expected 1.00: within 15 %", "miles", "1k", "seconds", "measured"} <= texts


@needs_matplotlib
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
    """Its cost is that of `flops_per_token`, and its time is that of a step after the first quarter of the run."""
    asked = {}

    def seconds_to_lines(starts, argv, cwd):
        asked.update(arg[2:].split("=") for arg in argv[1:])
        return [5.0, 5.0 + int(starts[1][5:-1]) - int(starts[0][5:-1])]  # a second for each step

    monkeypatch.setattr(measure, "seconds_to_lines", seconds_to_lines)
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16}
    flops, seconds = growth.step(shape | {"data_dir": "x"})
    assert flops == 6 * (65 * 8 + 12 * 8 * 8 + 3 * 8) + 12 * 8 * 16 and seconds == 1
    assert int(asked["batch_size"]) * 16 == growth.TOKENS and asked["gradient_accumulation_steps"] == "1"
    assert int(asked["max_iters"]) == 4 * int(asked["log_interval"]) + 1 >= 9


@needs_corpora
def test_a_text_of_copies(tmp_path):
    growth.prepare_seconds(2, tmp_path, BenchConfig())
    text = (tmp_path / "text").read_bytes()
    assert len(text) >= 2e6 and text == text[: len(text) // 2] * 2


@pytest.mark.slow
@needs_corpora
@needs_matplotlib
def test_growth_of_the_smallest_sizes(tmp_path):
    """Every series for real, at its first two sizes."""
    bench.main(["growth", "--quick", f"--out_dir={tmp_path}"])
    lines = json.loads((tmp_path / "growth.json").read_text(encoding="utf-8"))["results"]
    assert len(lines) == 6 and all(len(line["seconds"]) == 2 and min(line["seconds"]) > 0 for line in lines)
    assert all(0 <= line["expected"] < 1.1 for line in lines)
    assert lines[0]["power"] > 0 and lines[2]["power"] > 0.3  # ten times the text, nine times the parameters
    picture = xml.etree.ElementTree.parse(tmp_path / "growth.svg").getroot()
    assert len(drawn_dots(picture)) == 12
