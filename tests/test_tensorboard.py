"""tensorboard.py: what is written is what happened, training doesn't notice, and TensorBoard shows it in a browser."""

import csv
import io
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install -r requirements-extra.txt")
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

import train
from quill import checkpoint
from quill.errors import UserError
from quill.observers.tensorboard import as_code, signed_colors
from quill.optimizer import AdamW

OF_EVALUATIONS = {"loss/val", "loss/val_bits_per_byte"}
SCALARS = {"loss/train", "optimizer/lr", "optimizer/gradient_norm", "performance/tokens_per_s"} | OF_EVALUATIONS
EVERYTHING = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}  # 0 keeps all


def run(flags):
    assert train.main(flags) == 0


def read(folder):
    """An out_dir's event files → what TensorBoard's own reader has of them"""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance=EVERYTHING)
    return events.Reload()


def steps(events):
    return [event.step for event in events]


def metrics(folder):
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def hyperparameters(events):
    content = events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    values = metadata.parse_session_start_info_plugin_data(content).hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}


def text(events, tag):
    return [event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{tag}/text_summary")]


@pytest.fixture
def next_second():
    """Event files are read in the order of their names, which begin with the second."""
    return lambda: time.sleep(1.01 - time.time() % 1)


def test_scalars_are_the_rows_of_metrics_csv(flags, tmp_path):
    run(flags(tensorboard=True))
    events, rows = read(tmp_path / "run"), metrics(tmp_path / "run")
    assert set(events.Tags()["scalars"]) == SCALARS
    for tag in SCALARS:
        assert steps(events.Scalars(tag)) == ([20, 40] if tag in OF_EVALUATIONS else [10, 20, 30, 40])
    columns = {
        "loss/val": "val_loss",
        "loss/val_bits_per_byte": "bits_per_byte",
        "optimizer/lr": "lr",
        "performance/tokens_per_s": "tokens_per_s",
    }
    for tag, column in columns.items():
        shown = [event.value for event in events.Scalars(tag) if event.step % 20 == 0]
        rounded = 0.05 if column == "tokens_per_s" else 0  # as metrics.csv has it
        np.testing.assert_allclose(shown, [float(row[column]) for row in rows], rtol=1e-7, atol=rounded)
    shown = np.array([event.value for event in events.Scalars("loss/train")]).reshape(2, 2).mean(axis=1)
    np.testing.assert_allclose(shown, [float(row["train_loss"]) for row in rows], rtol=2e-7)


def test_gradient_norm_and_histograms_are_the_last_steps(flags, tmp_path, monkeypatch, device):
    """Of a whole step, several micro-batches, clipped; with two optimizers."""
    norms, gradients, step = [], {}, AdamW.step
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda g, f=torch.nn.utils.get_total_norm: keep(f(g)))

    def keep(norm):
        norms.append(norm.item())
        return norm

    def stepped(optimizer, *args):
        for group in optimizer.param_groups:
            for p in group["params"]:
                gradients[tuple(p.shape)] = p.grad.clone()
        return step(optimizer, *args)

    monkeypatch.setattr(AdamW, "step", stepped)
    options = {"optimizer": "muon", "gradient_accumulation_steps": 2, "grad_clip": 0.1, "log_interval": 40}
    options |= {"device": device.type, "compile": False}
    run(flags(tensorboard=True, eval_interval=40, bias=True, **options))
    events, model = read(tmp_path / "run"), checkpoint.load(tmp_path / "run" / "last.pt")["model"]
    (norm,) = events.Scalars("optimizer/gradient_norm")
    assert norm.value == pytest.approx(math.fsum(norms) / 40, rel=1e-6) and norms[-1] > 0.1
    parameters = set(model) - {"lm_head.weight"}  # tied
    kinds = ("weights", "weights_grad")
    assert set(events.Tags()["histograms"]) == {f"{kind}/{name}" for kind in kinds for name in parameters}
    squares = 0
    for name in parameters:
        for kind in kinds:
            (event,) = events.Histograms(f"{kind}/{name}")
            value = event.histogram_value
            assert event.step == 40 and value.num == sum(value.bucket) == model[name].numel()
            squares += value.sum_squares if kind == "weights_grad" else 0
        weights = events.Histograms(f"weights/{name}")[0].histogram_value
        assert [weights.min, weights.max] == [model[name].min().item(), model[name].max().item()]
    assert math.sqrt(squares) == pytest.approx(0.1, rel=1e-3)  # all together, the clipped norm
    expected = gradients[tuple(model["transformer.wte.weight"].shape)]
    shown = events.Histograms("weights_grad/transformer.wte.weight")[0].histogram_value
    assert [shown.min, shown.max] == [expected.min().item(), expected.max().item()]


@pytest.mark.parametrize("count", [0, 2])
def test_samples_images_and_hyperparameters(flags, tmp_path, capsys, count):
    options = {"dataset": "words", "eval_samples": count, "final_samples": 0, "sample_tokens": 12, "n_layer": 3}
    run(flags(tensorboard=True, **options))
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(("step", "best"))][1:]
    events = read(tmp_path / "run")
    samples = text(events, "samples")
    assert steps(events.Tensors("samples/text_summary")) == [20, 40] and all(line[:4] == "    " for line in samples)
    assert printed == [line.strip() for sample in samples for line in sample.split("\n\n---\n\n")] if count else samples
    heads = {f"self_attention/layer_{layer}_head_{head}" for layer in range(3) for head in range(2)}
    assert set(events.Tags()["images"]) == heads | {"token_embedding"}
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    embedding = Image.open(io.BytesIO(events.Images("token_embedding")[-1].encoded_image_string))
    vocab_size, width = state["model"]["transformer.wte.weight"].shape
    assert embedding.size == (width * (256 // 16), vocab_size * (256 // 16)) and embedding.mode == "RGB"
    (tokens,) = {len(shown.replace("    ", "")) for shown in text(events, "self_attention")}  # BOS is a line break
    for head in heads:
        assert steps(events.Images(head)) == [20, 40]
        pixels = np.asarray(Image.open(io.BytesIO(events.Images(head)[-1].encoded_image_string)).convert("L"))
        weights = (pixels[:: 256 // tokens, :: 256 // tokens] / 255.0) ** 2
        assert weights.shape == (tokens, tokens) and weights[0, 0] == 1 and np.triu(weights, 1).max() == 0
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=0.15)  # 8 bits of a square root
    shown = hyperparameters(events)
    assert shown["n_layer"] == 3 and shown["optimizer"] == "adamw" and shown["qk_norm"] == "False"
    assert shown["learning_rate"] == 0.01 and "top_k" not in shown


RUNS = {
    "dropout": {"dropout": 0.2},
    "muon-ema-documents": {"optimizer": "muon", "ema_decay": 0.9, "dropout": 0.1, "dataset": "words"},
    "samples-bfloat16": {"eval_samples": 2, "gradient_accumulation_steps": 2, "dropout": 0.1, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS.keys())
def test_training_is_the_same_with_and_without(flags, tmp_path, capsys, options):
    printed = []
    for name in ("with", "without"):
        run(flags(**options, out_dir=tmp_path / name, tensorboard=name == "with", eval_interval=15))
        lines = capsys.readouterr().out.splitlines()[:-1]  # the last one names the folder
        printed.append([re.sub(r"[\d,]+ tokens/s", "", line) for line in lines])
    assert not (tmp_path / "without" / "tensorboard").exists()
    one, other = (checkpoint.load(tmp_path / name / "last.pt") for name in ("with", "without"))
    for key in ("model", "ema", "optimizers", "step", "best_val_loss", "losses"):
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)
    for a, b in zip(metrics(tmp_path / "with"), metrics(tmp_path / "without"), strict=True):
        assert list(a.values())[:5] == list(b.values())[:5]
    assert printed[0] == printed[1]


@pytest.mark.slow
def test_without_it_nothing_of_it_is_imported(flags):
    code = "import sys, train; train.main(sys.argv[1:]); print([m for m in sys.modules if m.startswith('tensorboard')])"
    done = subprocess.run([sys.executable, "-c", code, *flags(max_iters=1)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_resumed_run_has_every_point_once(flags, tmp_path, monkeypatch, next_second):
    """A crash has left points after the checkpoint, and the resume changes an option."""
    step = train.train_step

    def dies(state, *args):
        if state.progress.step == 35:
            raise KeyboardInterrupt
        return step(state, *args)

    monkeypatch.setattr(train, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train.main(flags(tensorboard=True))
    monkeypatch.undo()
    crashed = read(tmp_path / "run")
    assert steps(crashed.Scalars("loss/train")) == [10, 20, 30] and hyperparameters(crashed)["beta2"] == 0.95
    next_second()
    run([f"--out_dir={tmp_path / 'run'}", "--init_from=resume", "--max_iters=60", "--beta2=0.9"])  # still with it
    events = read(tmp_path / "run")
    tags = events.Tags()
    for tag in tags["scalars"]:
        assert steps(events.Scalars(tag)) == ([20, 40, 60] if tag in OF_EVALUATIONS else [10, 20, 30, 40, 50, 60])
    assert all(steps(events.Histograms(tag)) == [20, 40, 60] for tag in tags["histograms"])
    assert all(steps(events.Images(tag)) == [20, 40, 60] for tag in tags["images"])
    assert steps(events.Tensors("samples/text_summary")) == [20, 40, 60]
    assert hyperparameters(events)["beta2"] == 0.9 and hyperparameters(events)["max_iters"] == 60
    files = len(list((tmp_path / "run" / "tensorboard").iterdir()))
    run([f"--out_dir={tmp_path / 'run'}", "--init_from=resume", "--max_iters=80", "--tensorboard=False"])
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == files


def test_overwriting_leaves_nothing_of_the_other_run(flags, tmp_path):
    run(flags(tensorboard=True))
    run(flags(tensorboard=True, max_iters=5, overwrite=True))
    assert steps(read(tmp_path / "run").Scalars("loss/train")) == [5]
    run(flags(max_iters=5, overwrite=True))
    assert not list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_missing_package_is_one_line_and_nothing_is_overwritten(flags, tmp_path, monkeypatch):
    run(flags(max_iters=2))
    before = (tmp_path / "run" / "last.pt").read_bytes()
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match="--tensorboard=True needs a package: pip install tensorboard"):
        train.main(flags(tensorboard=True, overwrite=True))
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


@pytest.mark.slow
def test_a_folder_that_cant_be_written_to_is_one_line(flags, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("a file where the folder should be", encoding="utf-8")
    argv = [sys.executable, "train.py", *flags(tensorboard=True)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=Path(train.__file__).parent)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"train.py: can't write {tmp_path / 'run' / 'tensorboard'}: File exists")


def test_no_layers_no_attention(flags, tmp_path):
    run(flags(tensorboard=True, n_layer=0, position="none"))
    assert read(tmp_path / "run").Tags()["images"] == ["token_embedding"]


def test_colors_and_code():
    image = signed_colors(torch.tensor([[0.0, 2.0], [-2.0, -1.0]]))[:, ::128, ::128].permute(1, 2, 0)
    assert image.tolist() == [[[1, 1, 1], [1, 0, 0]], [[0, 0, 1], [0.5, 0.5, 1]]]
    assert as_code("a\n```\n\n*b*") == "    a\n    ```\n    \n    *b*"


# ---------------------------------------------------------------- in a browser


@pytest.fixture
def board_url(tmp_path):
    """TensorBoard over all runs in tmp_path, on a free port of this machine alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "tensorboard.main", f"--logdir={tmp_path}", f"--port={port}", "--host=127.0.0.1"]
    with open(tmp_path / "server.txt", "wb") as log:
        server = subprocess.Popen([*argv, "--load_fast=false", "--reload_interval=1"], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "server.txt").read_text()
            try:
                with urllib.request.urlopen(f"{url}/data/runs", timeout=5) as answer:
                    if len(json.load(answer)) == 2:
                        break
            except OSError:
                pass
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(10)


@pytest.mark.slow
def test_a_browser_shows_two_runs_side_by_side(flags, tmp_path, request):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium to look at TensorBoard with")
    for name, rate in (("a", 0.01), ("b", 0.02)):
        run(flags(out_dir=tmp_path / name, tensorboard=True, learning_rate=rate))
    url = request.getfixturevalue("board_url")  # when there is something to show

    def page(path):
        off = ("gpu", "quic", "background-networking", "component-update", "sync")
        argv = [browser, "--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in off)]
        argv += [f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=20000", "--dump-dom", url + path]
        return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True).stdout

    shown = re.sub(r"\s+|<(script|style).*?</\1>|<[^>]*>", "", page("/#timeseries"), flags=re.DOTALL)
    # Its runs and groups; the cards below are drawn when the browser has time for them.
    assert all(words in shown for words in ("a/tensorboard", "b/tensorboard", "loss", "optimizer", "self_attention"))
    shown = page("/data/plugin/scalars/tags")
    assert all(tag in shown for tag in SCALARS) and "a/tensorboard" in shown
    sample = text(read(tmp_path / "a"), "samples")[-1].split()[0]
    assert sample in page("/data/plugin/text/text?run=a/tensorboard&tag=samples/text_summary")
    body = b'{"experimentName": "", "colParams": [], "allowedStatuses": ["STATUS_SUCCESS"], "sliceSize": 10}'
    query = urllib.request.Request(
        f"{url}/data/plugin/hparams/session_groups", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(query, timeout=30) as answer:
        groups = json.load(answer)["sessionGroups"]
    assert sorted(group["hparams"]["learning_rate"] for group in groups) == [0.01, 0.02]
    for group in groups:
        name = "a" if group["hparams"]["learning_rate"] == 0.01 else "b"
        (val_loss,) = (value["value"] for value in group["metricValues"] if value["name"]["tag"] == "loss/val")
        assert val_loss == pytest.approx(float(metrics(tmp_path / name)[-1]["val_loss"]), rel=1e-6)
