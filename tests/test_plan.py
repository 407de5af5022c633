"""plan.py, against published formulas, figures worked by hand, and the memory of a model that FSDP2 has sharded."""

import re
import shlex
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.run import get_args_parser

import quill.plan
import train
from model import GPT
from quill.cli import read_args, read_config_file
from quill.describe import activation_bytes, state_bytes
from quill.distributed import ProcessGroup
from quill.errors import UserError
from quill.machine import Machine, checkpoint_activations
from quill.options import ModelConfig, TrainConfig
from quill.plan import divisors, plan, ways_to_train
from quill.schema import without_memory

ROOT = Path(__file__).parent.parent
SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "batch_size": 4, "norm": "rmsnorm"}
BF16 = Machine(device=torch.device("cpu"), dtype=torch.bfloat16, name="cpu")


def gpt3(size, **options):
    return TrainConfig(**read_config_file(ROOT / f"config/gpt3/{size}.py", TrainConfig), dry_run=True, **options)


@pytest.fixture(autouse=True, scope="module")
def counted_once():
    """A count takes 0.1 s, and most of the options do not change it."""
    names = [f.name for f in fields(ModelConfig)]
    counts = cache(lambda values, *args: activation_bytes(TrainConfig(**dict(zip(names, values, strict=True))), *args))

    def count(config, vocab_size, rows, machine, faster):
        return counts(tuple(getattr(config, name) for name in names), vocab_size, rows, machine, faster)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quill.plan, "activation_bytes", count)
        yield


def on_meta(config, vocab_size=50257):
    return without_memory(config, vocab_size)


def printed(config, vocab_size=50257):
    """A plan → its lines by their first words, the table of memory, and the table of times, as numbers."""
    lines = [*plan(config, vocab_size)]
    ways = re.findall(r"^ +([\d,.]+) GB +([\d,]+) +([\d,.]+|) +([\d,.]+|)  (\S.*)$", "\n".join(lines), re.MULTILINE)
    times = re.findall(r"^ +([\d,]+) +([\d,.]+) +([\d,.]+)  (\d+)%(.*)$", "\n".join(lines), re.MULTILINE)
    number = lambda text: float(text.replace(",", "") or "nan")  # noqa: E731
    return (
        {line[:18].strip(): line[18:] for line in lines if line[0] != " "},
        {name: (number(memory), number(rows), number(sent), number(rate)) for memory, rows, sent, rate, name in ways},
        {int(mfu): (number(rate), number(step), number(days), note) for rate, step, days, mfu, note in times},
    )


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("size", ["small", "medium", "large", "xl", "2.7b", "6.7b", "13b", "175b"])
def test_state_of_the_sizes_of_gpt3(size):
    """AdamW in float32 takes 16 bytes for each of the 12 L C² + 13 L C + (V + T + 2) C parameters; an average, 4 more.

    Muon has one moment for the 12 L C² of the blocks' matrices.
    """
    config = gpt3(size)
    layers, width = config.n_layer, config.n_embd
    total = 12 * layers * width**2 + 13 * layers * width + (50257 + 2048 + 2) * width
    states = [
        sum(state_bytes(on_meta(config), replace(config, **options)).values())
        for options in ({}, {"ema_decay": 0.9}, {"optimizer": "muon"})
    ]
    assert states == [16 * total, 20 * total, 16 * total - 4 * 12 * layers * width**2]


@pytest.mark.parametrize("dropout, bytes_of_width", [(0.0, 34 - 2 + 4), (0.1, 34 + 2 + 4)])
def test_activations_of_a_block_are_those_of_the_literature(dropout, bytes_of_width):
    """34 C bytes a token (Korthikanti et al. 2022, without the attention's T × T), of which dropout's masks are 2 C.

    They have a residual stream of 2 bytes. Ours has 4, and both norms keep it: 4 C more. Flash attention keeps 4 bytes
    for each head, and each norm a mean and a deviation. On a CPU, a mask has 2 bytes. quill/cpu.py would compute
    attention over 256 tokens with T × T weights.
    """
    config = TrainConfig(n_layer=2, n_head=4, n_embd=64, block_size=256, dropout=dropout, attention_dropout=0.0)

    def kept(rows, n_layer):
        return activation_bytes(replace(config, n_layer=n_layer), 100, rows, BF16, faster=False)[0]

    of_block = (kept(3, 2) - kept(3, 1) - kept(1, 2) + kept(1, 1)) / 2 / config.block_size
    assert of_block == bytes_of_width * config.n_embd + 4 * config.n_head + 2 * 2 * 4


def test_ddp_by_hand():
    """20 bytes for each parameter with DDP's buckets, 16 on one GPU, and 2 for autocast's copy of each matrix."""
    config = TrainConfig(**SMALL, gpus=64, dry_run=True)
    ddp, sharded, checkpointed = ways_to_train(GPT(config, 500), config)
    alone = ways_to_train(GPT(config, 500), replace(config, gpus=1))[0]
    total, matrices = (500 + 128) * 128 + 4 * 12 * 128**2, 4 * 12 * 128**2
    assert ddp.fixed - alone.fixed == 4 * total
    # Without the blocks' copies, a 64th of the state, the root in float32 and a block six times in 2 bytes.
    whole = 16 * total / 64 + 4 * (500 + 128) * 128 + 4 * 128 * 128 + 12 * matrices / 4
    assert sharded.fixed - whole == pytest.approx(alone.fixed - 16 * total - 2 * matrices)
    # With checkpointing, 4 blocks keep 4 C, and one has 36 C - 2 × 4 (rmsnorm keeps no mean) and as much again.
    of_block = 128 * (36 * 128 + 4 * 4 + 2 * 4)
    without = max(sharded.row - 4 * of_block, 2 * of_block)
    assert checkpointed.row == pytest.approx(4 * 128 * 4 * 128 + without)


def test_more_gpus_never_take_more_memory():
    config = TrainConfig(**SMALL, gradient_accumulation_steps=64, dry_run=True)
    found = [ways_to_train(GPT(config, 500), replace(config, gpus=gpus)) for gpus in (2, 3, 4096)]
    for way in range(3):
        memory = [ways[way].fixed + ways[way].row * 4 for ways in found]
        assert memory == sorted(memory, reverse=True)
        assert memory[0] > memory[-1] if way else memory[0] == memory[-1]


@pytest.fixture
def four_ranks():
    """This process is rank 0 of four, of which three do not exist: collectives leave their results as they are."""
    store = pytest.importorskip("torch.testing._internal.distributed.fake_pg").FakeStore()
    dist.init_process_group("fake", store=store, rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing, most", [(False, 1.12), (True, 1.26)])
def test_memory_of_a_sharded_model(checkpointing, most, four_ranks):
    """A quarter of 16 bytes for each parameter stays, and the peak of a micro-batch is at most the plan's."""
    from quill.sharded import FSDP

    config = TrainConfig(**SMALL, gradient_accumulation_steps=8, gpus=4, dry_run=True)
    model = GPT(config, 500)
    total, way = model.num_params(), ways_to_train(model, config)[2 if checkpointing else 1]
    if checkpointing:
        checkpoint_activations(model)
    FSDP(replace(BF16, group=ProcessGroup(world_size=4))).prepare(model)
    optimizer, idx = torch.optim.AdamW(model.parameters()), torch.zeros(4, 128, dtype=torch.int64)

    def micro_batch():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(idx, idx)[1]
        loss.backward()

    micro_batch()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    tensors = [*model.parameters(), *(p.grad for p in model.parameters()), *moments]
    state = sum(tensor.to_local().numel() * 4 for tensor in tensors)
    assert state == 16 * total / 4
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        micro_batch()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert state + peak <= way.fixed + 4 * way.row <= most * (state + peak)


# ---------------------------------------------------------------- what a plan says


def test_time_is_that_of_the_literature():
    """8 T P / (n X) seconds with recomputation (Narayanan et al. 2021, eq. 4): GPT-3 at 140 TFLOP/s of each GPU.

    Without recomputation it is 6 T P, so the model's FLOPs are 105 of the 140. The plan adds attention's FLOPs.
    """
    config = gpt3("175b", gpus=768, gpu_tflops=140 * 6 / 8 / 0.4, days=100)
    _, _, times = printed(config)
    parameters, tokens = 174.6e9, 95_367 * 1536 * 2048
    days = 8 * tokens * parameters / (768 * 140e12) / 86400
    attention = 12 * 96 * 12288 * 2048 / (6 * parameters)
    rate, step, took, _ = times[40]
    assert took == pytest.approx(days * (1 + attention), rel=2e-3)
    assert days * 768 / 1024 == pytest.approx(34, abs=0.2)  # theirs, on 1,024 GPUs
    assert rate * step == pytest.approx(1536 * 2048, rel=1e-3)
    assert step * 95_367 / 86400 == pytest.approx(took, rel=2e-3)
    assert times[20][2] == pytest.approx(2 * took, rel=2e-3)


def test_the_plan_of_13b():
    """8 bytes for each parameter, and 4 more outside of the blocks, are sent while 2,048 tokens are computed."""
    text, ways, times = printed(gpt3("13b", gpus=1024, gpu_memory=80))
    parameters = on_meta(gpt3("13b")).num_params()
    ddp, sharded, checkpointed = ways.values()
    flops = (6 * (parameters - 2048 * 5120) + 12 * 40 * 5120 * 2048) * 2048
    sent = 8 * parameters + 4 * (50257 + 2048 + 2) * 5120
    traffic = sent * 1023 / 1024 / (flops / (0.4 * 989e12)) / 1e9
    assert sharded[2] == checkpointed[2] == pytest.approx(sent * 1023 / 1024 / 1e9, rel=1e-3)
    assert sharded[3] == checkpointed[3] == pytest.approx(traffic, rel=1e-3)
    assert ddp[1] == 0 and ddp[0] > 22 * parameters / 1e9 and ddp[2] != ddp[2]  # no traffic: it does not fit
    assert 0 < sharded[1] < checkpointed[1] and sharded[0] > checkpointed[0]
    assert text["use"] == "--shard=True --batch_size=1 --gradient_accumulation_steps=1024"
    assert times[40][3] == f"; the network allows {0.4 * 50 / traffic:.0%}"
    (needed,) = re.fullmatch(r"([\d.]+)% MFU", text["in 30 days"]).groups()
    assert float(needed) == pytest.approx(40 * times[40][2] / 30, rel=0.05)
    assert times[8][2] == pytest.approx(5 * times[40][2], rel=0.1) and times[8][3] == ""  # what the network allows
    assert text["a checkpoint"].startswith(f"{12 * parameters / 1e9:.1f} GB")
    assert text["memory of a host"].startswith(f"{4 * parameters / 1e9:.1f} GB")


def small(**options):
    return TrainConfig(**{**SMALL, "gradient_accumulation_steps": 64, "dry_run": True, "gpus": 8, **options})


def test_what_is_recommended():
    """The first way whose traffic the network carries, or the one that is asked for, or one with half the traffic."""
    fast = {"gpu_network": 450}
    assert printed(small(**fast), 500)[0]["use"] == "--batch_size=32 --gradient_accumulation_steps=8"
    assert printed(small(shard=True, **fast), 500)[0]["use"].startswith("--shard=True --batch_size=32 ")
    text, ways, _ = printed(small(gpus=1, activation_checkpointing=True), 500)
    assert len(ways) == 2 and text["the plan"].startswith("1 GPU, each")
    assert text["use"].startswith("--activation_checkpointing=True --batch_size=256 ")
    # Of each GPU's 32 rows, 16 fit with DDP. With checkpointing all of them fit, and weights are sent once.
    text, ways, times = printed(small(gpu_memory=0.1, gpu_network=1), 500)
    assert [rows for _, rows, *_ in ways.values()] == pytest.approx([21, 26, 58], abs=3)
    assert text["use"] == "--shard=True --activation_checkpointing=True --batch_size=32 --gradient_accumulation_steps=8"
    ddp, sharded, checkpointed = (traffic for *_, traffic in ways.values())
    root = (500 + 128) * 128 / on_meta(small(), 500).num_params()
    assert sharded / ddp == pytest.approx(2 / 3 * (1 + root / 2), rel=2e-3) and sharded / checkpointed == pytest.approx(
        2, rel=2e-3
    )
    assert ["the network allows" in note for *_, note in times.values()] == [False] + [True] * 4  # it has its own line


def test_what_does_not_fit():
    """The number of GPUs that is said to be enough is enough. With too little memory for one row, none is."""
    way = ways_to_train(GPT(small(), 500), small())[2]
    memory = 0.99 * (way.fixed + way.row) / 0.9e9
    text, ways, times = printed(small(gpu_memory=memory), 500)
    assert not times and {rows for _, rows, *_ in ways.values()} == {0}
    assert text["too small"] == "16 GPUs are enough"
    assert "use" in printed(small(gpu_memory=memory, gpus=16), 500)[0]
    assert printed(small(gpu_memory=memory / 2), 500)[0]["too small"].endswith("it takes tensor parallelism")


@pytest.mark.parametrize(
    "flags, problem",
    [
        ({"gpus": 1000, "dry_run": True}, "--gpus=1000 does not divide the 256 rows of a step"),
        ({"gpus": 7, "dry_run": True}, "use 4 or 8"),
        ({"gpus": 8}, "--gpus=8 is for --dry_run only"),
        ({"gpus": -1, "dry_run": True}, "--gpus=-1: must be at least 0"),
        ({"gpus": 8, "gpu_memory": 0, "dry_run": True}, "--gpu_memory=0.0: must be at least 0.001"),
        ({"gpus": 8, "gpu_tflops": -1, "dry_run": True}, "--gpu_tflops=-1.0: must be at least 0.001"),
        ({"gpus": 8, "gpu_tflops": 1e299, "dry_run": True}, "must be below 1000000.0"),
        ({"gpus": 8, "days": "nan", "dry_run": True}, "--days=nan: must be a finite number"),
        ({"gpu_memory": 40, "dry_run": True}, "--gpu_memory=40 is for a plan: add --dry_run=True and --gpus=8"),
        ({"days": 3}, "--days=3 is for a plan"),
        ({"gpus": 8, "dtype": "float32", "dry_run": True}, "a plan is for bfloat16"),
    ],
)
def test_wrong_plans(flags, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--vocab_size=99"] if flags.get("dry_run") else []
    argv += ["--gradient_accumulation_steps=64", "--batch_size=4", "--n_layer=1", "--n_embd=12"]
    with pytest.raises(UserError, match=re.escape(problem)):
        train.main([*argv, *(f"--{key}={value}" for key, value in flags.items())])
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- docs/scale.md

PAGE = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
SIZES = re.findall(r"^\| `([\w.]+)` \| [\d.e+]+ \| (\d+) \|", PAGE, re.MULTILINE)


def row_of(size, gpus):
    """A row of the page's table, from what a dry run with one row in a micro-batch prints."""
    config = gpt3(size, gpus=gpus)
    rows = config.batch_size * config.gradient_accumulation_steps
    text, ways, times = printed(replace(config, batch_size=1, gradient_accumulation_steps=rows))
    flops = on_meta(config).flops_per_token() * rows * config.block_size * config.max_iters
    flags, _, rest = text["use"].rpartition("--batch_size=")
    (traffic,) = (traffic for name, (*_, traffic) in ways.items() if name == (flags.strip() or [*ways][0]))
    name = {0: "DDP", 1: "sharded", 2: "sharded + checkpointing"}[flags.count("=")]
    memory = [f"{gigabytes:,.1f}" for gigabytes, *_ in ways.values()]
    plan_of = [name, rest.split()[0], f"{traffic:.0f}", f"{times[40][2]}"]
    cells = [f"`{size}`", f"{flops:.2e}", str(gpus), *memory, *plan_of]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize(
    "size, gpus",
    [pytest.param(size, int(n), marks=[] if size == "13b" else pytest.mark.slow) for size, n in SIZES],
)
def test_table_of_the_page(size, gpus):
    assert row_of(size, gpus) in PAGE.splitlines()


def test_printed_plan_of_the_page():
    (shown,) = re.findall(r"```\n(the plan .*?)\n```", PAGE, re.DOTALL)
    assert shown == "\n".join(plan(gpt3("13b", gpus=128, gpu_memory=80), 50257))


def test_figures_of_the_page():
    """What the hosts need, the part of attention in the FLOPs, and the bandwidth that 2,048 tokens take."""
    for name, size, built, saved, averaged in re.findall(
        r"^\| (GPT.*) \| ([\d.]+)B \|" + r" ([\d.]+) GB \|" * 3, PAGE, re.M
    ):
        shape = {"n_layer": 48, "n_head": 25, "n_embd": 1600, "bias": True}
        total = on_meta(gpt3("13b") if "13B" in name else TrainConfig(**shape)).num_params()
        assert float(size) == pytest.approx(total / 1e9, abs=5e-3)
        wanted = [8 * 4 * total / 1e9, 12 * total / 1e9, 16 * total / 1e9]
        assert [float(built), float(saved), float(averaged)] == pytest.approx(wanted, abs=0.06)
    for size, more in (("small", 0.29), ("175b", 0.03)):
        model = on_meta(gpt3(size))
        assert model.flops_per_token() / (6 * model.num_params()) - 1 == pytest.approx(more, abs=0.01)
    assert pytest.approx(250, rel=0.05) == 8 / 6 / 2048 * 0.4 * 989e12 / 1e9
    assert len(SIZES) == 8


def test_commands_of_the_page():
    """torchrun and train.py know the options of every command."""
    commands = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command)
        if words[0] == "torchrun":
            launch = get_args_parser().parse_args(words[1:])
            words = ["python", launch.training_script, *launch.training_script_args]
        (path,), flags = read_args(words[2:], TrainConfig, None)
        config = TrainConfig(**(read_config_file(ROOT / path, TrainConfig) | flags))
        assert words[1] == "train.py"
        processes = (
            int(launch.nproc_per_node) * int(launch.nnodes.split(":")[-1]) if "torchrun" in command else config.gpus
        )
        assert config.batch_size * config.gradient_accumulation_steps % processes == 0


def test_divisors():
    assert all(divisors(n) == [d for d in range(1, n + 1) if n % d == 0] for n in range(1, 99))
    assert len(divisors(2**31)) == 32
