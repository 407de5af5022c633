"""describe.py: what --dry_run says, against figures worked by hand and the memory of real steps."""

import re

import pytest
import torch

import train
from model import GPT
from quill import cpu
from quill.describe import activation_bytes, describe
from quill.distributed import ProcessGroup
from quill.errors import UserError
from quill.machine import Machine
from quill.options import TrainConfig


def cpu_machine(dtype=torch.float32, ranks=1):
    return Machine(device=torch.device("cpu"), dtype=dtype, name="cpu", group=ProcessGroup(world_size=ranks))


def mebibytes(text):
    """The memory lines of a description. → {name: MiB}"""
    return {
        name: float(size.replace(",", "")) for size, name in re.findall(r"^ +([\d,.]+) MiB  (.+)$", text, re.MULTILINE)
    }


def run(flags):
    assert train.main(flags) == 0


def test_dry_run_describes_and_trains_nothing(flags, tmp_path, capsys):
    """By hand: C = 16, block 16, 2 layers without bias, tied; AdamW has two moments, besides weights and gradients."""
    out_dir = tmp_path / "never"
    assert train.main(flags(dry_run=True, out_dir=out_dir, bias=False)) == 0
    text = capsys.readouterr().out
    vocab = int(re.search(r"wte +(\d+) × 16", text)[1])
    block = 12 * 16 * 16 + 2 * 16
    parameters = vocab * 16 + 16 * 16 + 2 * block + 16
    assert f" {parameters:,} parameters" in text and "c_attn     48 × 16" in text and "h.1: the same again" in text
    flops = 6 * (parameters - 16 * 16) + 12 * 2 * 16 * 16
    assert f"{flops:,} to train on" in text
    assert "a step            4 rows, 64 tokens" in text
    epoch = float(re.search(r"an epoch +([\d.]+) steps", text)[1])
    tokens = int(re.search(r"an epoch .* steps, ([\d,]+) tokens", text)[1].replace(",", ""))
    assert f"40 steps, {40 / epoch:.1f}" in text and "epochs, 2.56e+03 tokens, " in text and not out_dir.exists()
    assert tokens == pytest.approx(64 * epoch, abs=4)


def test_dry_run_of_a_model_that_fits_nowhere(flags, capsys):
    """GPT-3's shape, 12 · 96 · 12288² and more parameters, takes no memory to describe."""
    assert train.main(flags(dry_run=True, n_layer=96, n_head=96, n_embd=12288, tensorboard=True)) == 0
    assert int(re.search(r"GPT +([\d,]+) parameters", capsys.readouterr().out)[1].replace(",", "")) > 12 * 96 * 12288**2


def test_dry_run_of_documents_in_a_folder_that_is_in_use(flags, capsys):
    """The run in out_dir stays unchanged, and a step's tokens are those of documents of mean length."""
    run(flags(dataset="words", max_iters=2, eval_interval=2))
    capsys.readouterr()
    assert train.main(flags(dataset="words", dry_run=True)) == 0
    text = capsys.readouterr().out
    rows, tokens = map(int, re.search(r"a step +(\d+) rows, (\d+) tokens", text).groups())
    steps, total = re.search(r"an epoch +([\d.]+) steps, ([\d,]+) tokens", text).groups()
    assert rows == 4 and tokens == pytest.approx(int(total.replace(",", "")) / float(steps), rel=0.05)


# ---------------------------------------------------------------- GPT-3's sizes


@pytest.mark.parametrize(
    "size, parameters, micro_batch, tokens",
    [
        ("small", 125e6, 16, 0.5e6),
        pytest.param("medium", 350e6, 8, 0.5e6, marks=pytest.mark.slow),
        pytest.param("large", 760e6, 8, 0.5e6, marks=pytest.mark.slow),
        ("xl", 1.3e9, 4, 1e6),
        pytest.param("2.7b", 2.7e9, 2, 1e6, marks=pytest.mark.slow),
        pytest.param("6.7b", 6.7e9, 2, 2e6, marks=pytest.mark.slow),
        ("13b", 13e9, 1, 2e6),
        ("175b", 175e9, 1, 3.2e6),
    ],
)
def test_the_sizes_of_gpt3(size, parameters, micro_batch, tokens, tmp_path, monkeypatch, capsys):
    """Table 2.1 of Brown et al. 2020, without a dataset. Each is trained on 300B tokens."""
    monkeypatch.chdir(tmp_path)
    flags = [f"config/gpt3/{size}.py", "--dry_run=True", "--vocab_size=50257", "--device=cpu", "--dtype=bfloat16"]
    assert train.main(flags) == 0
    text = capsys.readouterr().out
    found = int(re.search(r"GPT +([\d,]+) parameters", text)[1].replace(",", ""))
    assert found == pytest.approx(parameters, rel=0.02)
    in_step, in_run = re.search(
        r"a step +[\d,]+ rows, ([\d,]+) tokens\nthe run .* steps, ([\d.e+]+) tokens", text
    ).groups()
    assert int(in_step.replace(",", "")) == pytest.approx(tokens, rel=0.05)
    assert float(in_run) == 3e11 and "epoch" not in text
    memory = mebibytes(text)
    assert memory["weights"] == memory["gradients"] == pytest.approx(4 * found / 2**20, rel=1e-4)
    assert memory["optimizer"] == pytest.approx(8 * found / 2**20, rel=1e-4)
    assert f"activations of a micro-batch, {micro_batch} × 2,048 tokens in bfloat16" in memory
    assert all(size > 0 for size in memory.values()) and list(tmp_path.iterdir()) == []
    total = float(re.search(r"memory +([\d,.]+) MiB of tensors at the peak", text)[1].replace(",", ""))
    assert total == pytest.approx(sum(memory.values()), abs=0.3)


def test_a_vocabulary_is_given_to_a_dry_run_only(flags, capsys):
    for options in ({}, {"eval_only": True}):
        with pytest.raises(UserError, match="--vocab_size=99 is for --dry_run only"):
            train.main(flags(vocab_size=99, **options))
    with pytest.raises(UserError, match="--vocab_size=0: must be at least 1"):
        train.main(flags(vocab_size=0, dry_run=True))
    run(flags(max_iters=1, eval_interval=1))
    capsys.readouterr()
    run(flags(vocab_size=99, dry_run=True, init_from="resume", data_dir="nowhere"))  # the checkpoint's architecture
    assert "wte        99 × 16 " in capsys.readouterr().out


# ---------------------------------------------------------------- memory


def test_parts_by_hand():
    """One layer of width 8 without an MLP: 4 · 8² in its matrices, 8 in its norm; 10 ids, 4 positions, a last norm."""
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "mlp_ratio": 0, "block_size": 4}
    config = TrainConfig(**shape, batch_size=6, gradient_accumulation_steps=2, optimizer="muon", ema_decay=0.9)
    text = describe(config, 2**20, cpu_machine(ranks=4))
    matrices, others = 4 * 8 * 8, (2**20 + 4) * 8 + 2 * 8
    memory = mebibytes(text)
    assert f"GPT{' ' * 45}{matrices + others:>10,} parameters" in text
    for name in ("weights", "gradients", "moving average"):
        assert memory[name] == round(4 * (matrices + others) / 2**20, 1)
    assert memory["optimizer"] == round(4 * (matrices + 2 * others) / 2**20, 1)
    assert "activations of a micro-batch, 3 × 4 tokens in float32" in memory  # 12 rows over 4 ranks


MODERN = {"norm": "rmsnorm", "position": "rope", "activation": "relu2", "qk_norm": True, "tie_weights": False}
STEPS = {
    "plain": (65, 12, torch.float32, {"n_embd": 64}),
    "dropout": (65, 8, torch.float32, {"n_embd": 96, "dropout": 0.1, "bias": True}),
    "bfloat16": (65, 12, torch.bfloat16, {"n_embd": 64, "dropout": 0.1}),
    "modern": (300, 4, torch.float32, {"n_embd": 128, **MODERN}),
    "large vocabulary": (5000, 2, torch.float32, {"n_embd": 32, "activation": "swiglu"}),
}


@pytest.mark.parametrize("vocab_size, rows, dtype, options", STEPS.values(), ids=STEPS)
def test_memory_of_a_micro_batch_is_that_of_a_real_one(vocab_size, rows, dtype, options):
    """What autograd saves in a real forward pass, and the peak of what torch allocates in a real second micro-batch."""
    config, machine = TrainConfig(n_layer=4, n_head=2, block_size=64, **options), cpu_machine(dtype)
    kept, added = activation_bytes(config, vocab_size, rows, machine)
    model = cpu.speed_up(GPT(config, vocab_size))
    idx = torch.randint(vocab_size, (rows, config.block_size))
    known = {tensor.data_ptr() for tensor in (idx, *model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), machine.autocast():
        model(idx, idx)[1].backward()
    assert kept == pytest.approx(sum(saved.values()), rel=0.01)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        with machine.autocast():
            loss = model(idx, idx)[1]
        loss.backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert kept + added == pytest.approx(peak, rel=0.02)
