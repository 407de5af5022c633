"""config/microgpt.py against the same model in plain Python (scalar_gpt.py), and scalar_gpt.py against calculus."""

import csv
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scalar_gpt
import torch
from scalar_gpt import Value, dot

import train
from model import GPT
from quill.cli import read_config_file
from quill.data.batches import Batches
from quill.data.tokenizers import CharTokenizer
from quill.generation import generate
from quill.machine import Machine
from quill.optimizer import learning_rate
from quill.options import TrainConfig
from quill.state import TrainState

ROOT = Path(__file__).parent.parent
CONFIG = TrainConfig(**read_config_file(ROOT / "config" / "microgpt.py", TrainConfig))
NAMES = (ROOT / "data" / "names.txt").read_text(encoding="utf-8").split()
TOKENIZER = scalar_gpt.Tokenizer(NAMES)
V = 27  # a … z and BOS


def make(std=0.08, seed=0, vocab_size=V):
    """The same weights twice. → {name: rows of Values}, the torch model in float64"""
    weights = scalar_gpt.init_weights(vocab_size, random.Random(seed), std)
    model = GPT(CONFIG, vocab_size).double()
    model.load_state_dict({name: matrix(weights, name, "data") for name in weights})  # strict: all of them, no more
    return weights, model


def matrix(weights, name, what):
    """`what` ("data" or "grad") of each Value of a matrix. → (rows, columns) float64"""
    return torch.tensor([[getattr(value, what) for value in row] for row in weights[name]], dtype=torch.float64)


def parameters(weights):
    return [value for rows in weights.values() for row in rows for value in row]


# ---------------------------------------------------------------- autograd


# Each: f, the arguments, f's value, its derivative by each argument.
DERIVATIVES = {
    "x + y": (lambda x, y: x + y, (3.0, 5.0), 8.0, (1.0, 1.0)),
    "x + number": (lambda x: x + 2, (3.0,), 5.0, (1.0,)),
    "number + x": (lambda x: 2 + x, (3.0,), 5.0, (1.0,)),
    "x y": (lambda x, y: x * y, (3.0, -5.0), -15.0, (-5.0, 3.0)),
    "x number": (lambda x: x * 4, (3.0,), 12.0, (4.0,)),
    "number x": (lambda x: 4 * x, (3.0,), 12.0, (4.0,)),
    "x / y": (lambda x, y: x / y, (3.0, 2.0), 1.5, (1 / 2, -3 / 4)),
    "x / number": (lambda x: x / 4, (3.0,), 0.75, (1 / 4,)),
    "x³": (lambda x: x**3, (-2.0,), -8.0, (12.0,)),
    "1 / √x": (lambda x: x**-0.5, (4.0,), 0.5, (-1 / 16,)),
    "exp": (lambda x: x.exp(), (1.5,), math.exp(1.5), (math.exp(1.5),)),
    "log": (lambda x: x.log(), (4.0,), math.log(4), (1 / 4,)),
    "relu above 0": (lambda x: x.relu(), (2.0,), 2.0, (1.0,)),
    "relu below 0": (lambda x: x.relu(), (-2.0,), 0.0, (0.0,)),
    "dot": (lambda a, b, c, d: dot([a, b], [c, d]), (2.0, 3.0, 5.0, 7.0), 31.0, (5.0, 7.0, 2.0, 3.0)),
    "x x": (lambda x: x * x, (3.0,), 9.0, (6.0,)),
    "dot with itself": (lambda x, y: dot([x, y], [x, y]), (3.0, 4.0), 25.0, (6.0, 8.0)),
    "x² x² + x": (lambda x: (lambda y: y * y + x)(x * x), (2.0,), 18.0, (33.0,)),
    "sum": (lambda x, y: sum([x, y, x]), (3.0, 5.0), 11.0, (2.0, 1.0)),
    "e^(x y) log y": (lambda x, y: (x * y).exp() * y.log(), (0.5, 1.0), 0.0, (0.0, math.exp(0.5))),
}


@pytest.mark.parametrize("case", DERIVATIVES.values(), ids=DERIVATIVES.keys())
def test_derivatives_by_hand(case):
    f, arguments, expected, derivatives = case
    arguments = [Value(x) for x in arguments]
    result = f(*arguments)
    result.backward()
    assert result.data == pytest.approx(expected, abs=1e-12)
    assert [x.grad for x in arguments] == pytest.approx(derivatives, abs=1e-12)


def test_gradients_add_up_over_graphs():
    """As in torch: what clears a gradient is the optimizer's step."""
    x = Value(3.0)
    (x * x).backward()
    (x * 5).backward()
    assert x.grad == 6 + 5


def test_a_deep_graph_needs_no_recursion():
    """50,000 additions one on the other, each of which uses x twice: x (1 + 2 · 50,000)."""
    x = Value(1.0)
    y = x
    for _ in range(50_000):
        y = y + (x + x)
    y.backward()
    assert y.data == x.grad == 100_001


def test_softmax_by_hand():
    """Of log 1, log 2, log 5: 1/8, 2/8, 5/8, however far shifted; d p_i / d z_j = p_i (δ_ij - p_j)."""
    for shift in (0.0, 1000.0):
        logits = [Value(math.log(x) + shift) for x in (1, 2, 5)]
        probs = scalar_gpt.softmax(logits)
        assert [p.data for p in probs] == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=1e-12)
        probs[1].backward()
        assert [z.grad for z in logits] == pytest.approx([-2 / 64, 2 / 8 * 6 / 8, -10 / 64], abs=1e-12)


def test_gradients_are_slopes():
    """Of each matrix 4 weights, each nudged by ε = 1e-5 both ways.

    A central difference is off by ε² f‴ / 6 ≈ 1e-10 for derivatives near 1, and by the rounding of f ≈ 3, which is
    some 1e-15 / ε = 1e-10. Up to 1e-8 is asked for; the gradients compared are above 1e-4, mostly by far.
    """
    weights, _ = make(std=0.3)
    ids, epsilon = TOKENIZER.encode("emma"), 1e-5
    scalar_gpt.cross_entropy(ids, weights).backward()
    for name, rows in weights.items():
        ranked = sorted((value for row in rows for value in row), key=lambda value: abs(value.grad), reverse=True)
        for value in ranked[:40:10]:
            ends, middle = [], value.data
            for nudge in (epsilon, -epsilon):
                value.data = middle + nudge
                ends.append(scalar_gpt.cross_entropy(ids, weights).data)
            value.data = middle
            assert abs(value.grad) > 1e-4, name
            assert (ends[0] - ends[1]) / (2 * epsilon) == pytest.approx(value.grad, rel=0, abs=1e-8), name


# ---------------------------------------------------------------- the same model as torch's


def test_4192_parameters():
    """27 · 16 and 16 · 16 of embeddings, (3 + 1) 16² of attention, 2 · 4 · 16² of the MLP, 27 · 16 of lm_head."""
    weights, model = make()
    assert 27 * 16 + 16 * 16 + 4 * 16**2 + 8 * 16**2 + 27 * 16 == 4192
    assert model.num_params() == len(parameters(weights)) == 4192


def test_both_begin_alike():
    """N(0, 0.08): of 4,192 draws, the standard deviation is within 5 of its standard errors, 0.08 / √(2 · 4192)."""
    torch.manual_seed(0)
    drawn = torch.cat([parameter.flatten() for parameter in GPT(CONFIG, V).parameters()])
    scalar = torch.tensor([value.data for value in parameters(scalar_gpt.init_weights(V, random.Random(0)))])
    for numbers in (drawn, scalar):
        assert numbers.std().item() == pytest.approx(0.08, abs=5 * 0.08 / math.sqrt(2 * 4192))
        assert abs(numbers.mean().item()) < 5 * 0.08 / math.sqrt(4192)


def test_the_tokenizers_agree_on_all_names():
    theirs = CharTokenizer("\n".join(NAMES), is_documents=True)
    assert theirs.vocab_size == TOKENIZER.bos + 1 == V and theirs.bos == TOKENIZER.bos == 26
    assert TOKENIZER.encode("abz") == [26, 0, 1, 25, 26]
    for name in NAMES:
        assert theirs.encode(f"\n{name}\n").tolist() == TOKENIZER.encode(name)


@pytest.mark.parametrize("name", ["emma", "maximiliana", "abcdefghijklmnopqrst"])  # the last outgrows the block
@pytest.mark.parametrize("std", [0.08, 0.4])  # as shipped, and wide enough for attention and ReLU to matter
def test_logits_loss_and_gradients_agree_with_torch(std, name):
    weights, model = make(std)
    ids = TOKENIZER.encode(name)
    scalar_logits = scalar_gpt.forward(ids[:-1][:16], weights)
    scalar_loss = scalar_gpt.cross_entropy(ids, weights)
    scalar_loss.backward()

    window = torch.tensor([ids[:17]])
    logits, loss = model(window[:, :-1], window[:, 1:])
    loss.backward()
    expected = torch.tensor([[z.data for z in row] for row in scalar_logits], dtype=torch.float64)
    torch.testing.assert_close(logits[0], expected, atol=1e-9, rtol=0)
    assert loss.item() == pytest.approx(scalar_loss.data, rel=0, abs=1e-9)
    for key, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 1e-4, key
        torch.testing.assert_close(parameter.grad, matrix(weights, key, "grad"), atol=1e-9, rtol=0, msg=key)


def test_five_steps_agree_with_train_step():
    """train.py's own step in float64, on its own batches, each of which is one name: all weights, after each step."""
    weights, model = make()
    tokens = np.array([i for name in NAMES for i in TOKENIZER.encode(name)[:-1]], dtype=np.uint16)
    cpu = torch.device("cpu")
    settings = {"rows": CONFIG.batch_size, "micro_rows": CONFIG.batch_size, "seed": CONFIG.seed, "device": cpu}
    batches = Batches(tokens, TOKENIZER.bos, CONFIG.block_size, **settings)
    machine = Machine(device=cpu, dtype=torch.float32, name="cpu")  # float32: no autocast
    state = TrainState(CONFIG, {}, CharTokenizer(TOKENIZER.chars, True), machine)
    state.model = state.train_model = model
    state.add_optimizers()
    scalar = parameters(weights)
    m, v = [0.0] * len(scalar), [0.0] * len(scalar)
    seen = set()
    for step in range(5):
        [(x, y, predicted)] = batches.global_batch(step)[1]
        name = "".join(TOKENIZER.chars[i] for i in x[0, 1:predicted].tolist())
        assert name in NAMES and y[0, predicted - 1] == TOKENIZER.bos
        seen.add(name)
        scalar_loss = scalar_gpt.cross_entropy(TOKENIZER.encode(name), weights)
        scalar_loss.backward()
        before = scalar[0].data, scalar[-1].data
        scalar_gpt.adam_step(scalar, m, v, step)
        assert before != (scalar[0].data, scalar[-1].data) and not any(value.grad for value in scalar)
        total = train.train_step(state, batches, CONFIG, machine)
        loss, _ = state.pending[-1]
        assert total == predicted == len(name) + 1
        assert loss.item() == pytest.approx(scalar_loss.data, abs=1e-6)  # summed up in float32
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), matrix(weights, key, "data"), atol=1e-8, rtol=0, msg=key)
    assert len(seen) == 5


def test_the_learning_rate_falls_to_zero_in_both():
    """By Adam's own steps: with running means of a gradient that was always 1, a step is the learning rate."""
    assert scalar_gpt.MAX_ITERS == CONFIG.decay_end == 1000
    for step in (0, 1, 250, 999, 1000):
        weight = Value(1.0)
        weight.grad = 1.0
        scalar_gpt.adam_step([weight], [1 - 0.85**step], [1 - 0.99**step], step)
        assert learning_rate(step, CONFIG) == pytest.approx(0.01 * (1 - step / 1000), abs=1e-15)
        assert 1 - weight.data == pytest.approx(0.01 * (1 - step / 1000), abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_likeliest_document_is_torchs(seed):
    """Sampling at a very low temperature gives the tokens of `generate` at temperature 0."""
    weights, model = make(std=0.6, seed=seed)
    text = scalar_gpt.sample(weights, TOKENIZER, random.Random(0), temperature=1e-6)
    ids = generate(model, torch.tensor([[TOKENIZER.bos]]), 16, temperature=0, stop_token=TOKENIZER.bos)[0].tolist()
    assert text == "".join(TOKENIZER.chars[i] for i in ids if i != TOKENIZER.bos)


def test_samples_follow_the_distribution(monkeypatch):
    """The first token of 1,000 samples: each share within 4 standard errors, √(p (1 - p) / 1000), of softmax(z / T)."""
    tokenizer, rng = scalar_gpt.Tokenizer(["ab"]), random.Random(0)
    weights, model = make(std=0.4, vocab_size=3)
    monkeypatch.setattr(scalar_gpt, "BLOCK_SIZE", 1)
    probs = (model(torch.tensor([[tokenizer.bos]]))[0][0, 0] / 0.5).softmax(dim=0).tolist()
    texts = [scalar_gpt.sample(weights, tokenizer, rng) for _ in range(1000)]
    assert max(probs) - min(probs) > 0.2
    for text, p in zip(["a", "b", ""], probs, strict=True):
        assert texts.count(text) / 1000 == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 1000))


def test_the_script_trains_and_samples(tmp_path, capsys):
    """A hundred steps on two names of 5 different tokens: log 5 = 1.61 is guessing, log 2 / 3 = 0.23 the least."""
    path = tmp_path / "names.txt"
    path.write_text("al\nbo\n", encoding="utf-8")
    with open(path, encoding="utf-8") as text:
        scalar_gpt.main(text, steps=100, seed=1337)
    size, progress, *samples = capsys.readouterr().out.splitlines()
    assert size == f"{4192 - 2 * 22 * 16:,} parameters, 2 documents"
    assert float(progress.split()[-1]) < 0.5
    assert len(samples) == 20 and set(samples) == {"al", "bo"}


@pytest.mark.parametrize(
    "flags, code, words",
    [
        pytest.param(["--steps=2", "--seed=1"], 0, "step 2: mean loss of 2 steps", marks=pytest.mark.slow),
        (["--steps=few"], 2, "--steps: invalid int value: 'few'"),
        (["--text=nowhere.txt"], 2, "--text: can't open 'nowhere.txt'"),
    ],
)
def test_the_scripts_options(flags, code, words):
    """A mistake is one line."""
    argv = [sys.executable, scalar_gpt.__file__, *flags]
    done = subprocess.run(argv, capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert done.returncode == code and words in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == (code != 0)


# ---------------------------------------------------------------- the figures


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("QUILL_CORPORA"), reason="QUILL_CORPORA is not set: needs the real corpora")
def test_the_recipe(tmp_path):
    """1,000 names of 32,033: the mean loss of the last 100 steps, which are metrics.csv's second row, and held out."""
    argv = [f"--out_dir={tmp_path / 'run'}", f"--data_dir={tmp_path / 'data'}", "--device=cpu", "--eval_interval=900"]
    assert train.main([str(ROOT / "config" / "microgpt.py"), *argv]) == 0
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [900, 1000]
    assert float(rows[-1]["train_loss"]) == pytest.approx(2.37, abs=0.1)
    assert float(rows[-1]["val_loss"]) < 2.45
