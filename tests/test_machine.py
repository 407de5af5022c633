"""machine.py: the device and dtype that are picked, peaks, memory errors and signals."""

import os
import signal
from functools import partial

import pytest
import torch

from model import GPT
from quill import cpu
from quill import machine as module
from quill.distributed import ProcessGroup
from quill.errors import UserError
from quill.machine import Machine, StopSignals, checkpoint_activations, memory_limits, pick_machine
from quill.options import SampleConfig, TrainConfig

CPU = torch.device("cpu")


def small_gpt(**options):
    return GPT(TrainConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16} | options), 11)


def test_a_cpu_and_its_dtypes(monkeypatch):
    machine = pick_machine(SampleConfig(device="cpu", dtype="float32"))
    assert machine.device == CPU and machine.dtype == torch.float32 and machine.name.startswith("cpu, ")
    assert machine.group == ProcessGroup(rank=0, world_size=1) and machine.peak_flops is None
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        for test in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, test, lambda supported=supported: supported, raising=False)
        for rows, picked in ((3, torch.float32), (4, dtype)):  # 2**14 activations
            shape = {"batch_size": rows, "block_size": 64, "n_embd": 64, "n_head": 4}
            assert pick_machine(TrainConfig(device="cpu", **shape)).dtype == picked
        with monkeypatch.context() as patch:
            for engine, sampling in (("x86", torch.float16), ("qnnpack", dtype)):
                patch.setattr(module, "_has_fbgemm", lambda engine=engine: engine == "x86")
                assert pick_machine(SampleConfig(device="cpu")).dtype == sampling


def test_dtypes_of_weights_are_for_sampling_on_a_cpu(monkeypatch):
    for dtype in (torch.float16, torch.int8):
        monkeypatch.setattr(module, "_has_fbgemm", lambda: True)
        name = str(dtype).removeprefix("torch.")
        assert pick_machine(SampleConfig(device="cpu", dtype=name)).dtype == dtype
        with pytest.raises(UserError, match=f"--dtype={name} is for sampl"):
            pick_machine(TrainConfig(device="cpu", dtype=name))
    monkeypatch.setattr(module, "_has_fbgemm", lambda: False)
    with pytest.raises(UserError, match="--dtype=float16 on a CPU needs torch's fbgemm"):
        pick_machine(SampleConfig(device="cpu", dtype="float16"))
    monkeypatch.delattr(torch, "_weight_int8pack_mm")
    with pytest.raises(UserError, match=r"--dtype=int8 is for CPUs, not for cpu, .* with torch"):
        pick_machine(SampleConfig(device="cpu", dtype="int8"))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"device": "tpu"}, "--device=tpu: there is no such device; use auto, cpu, cuda, cuda:1 or mps"),
        ({"device": "cpu:1"}, "--device=cpu:1"),
        ({"device": ""}, "--device="),
    ],
)
def test_what_is_not_there_is_one_line(options, words):
    with pytest.raises(UserError) as error:
        pick_machine(SampleConfig(**options))
    assert words in str(error.value)


def test_cuda_without_cuda():
    with pytest.raises(UserError, match="--device=cuda: torch finds no CUDA here"):
        pick_machine(SampleConfig(device="cuda"))


def test_a_process_needs_a_gpu_of_its_own(monkeypatch):
    """Two processes and one GPU, as torch would report them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    pair = ProcessGroup(rank=1, world_size=2)
    with pytest.raises(UserError, match="cuda:1: this machine has 1 GPUs"):
        pick_machine(SampleConfig(device="cuda"), pair)
    with pytest.raises(UserError, match="--device=cuda:0: 2 processes take a GPU each"):
        pick_machine(SampleConfig(device="cuda:0"), pair)


def test_a_gpu_that_is_in_use_is_one_line(monkeypatch):
    def busy(device):
        raise torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nSearch for …")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(
        UserError, match=r"^--device=cuda:0: CUDA error: CUDA-capable device\(s\) is/are busy or una\w+$"
    ):
        pick_machine(SampleConfig(device="cuda"))


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A1000", None),
        ("NVIDIA L40S", 362e12),
        ("Tesla T4", 65e12),
    ],
)
def test_peaks_by_name(name, peak):
    assert Machine(device=torch.device("cuda"), dtype=torch.bfloat16, name=name).peak_flops == peak
    assert Machine(device=torch.device("cuda"), dtype=torch.float32, name=name).peak_flops is None


def test_autocast_computes_in_the_dtype():
    linear, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    for dtype in (torch.float32, torch.bfloat16):
        with Machine(device=CPU, dtype=dtype, name="cpu").autocast():
            assert linear(x).dtype == dtype


@pytest.mark.parametrize(
    "option, environment, saved, free, threads, reason",
    [
        ("auto", {}, None, 4, 4, "one for each core"),
        ("auto", {}, None, 9, 4, "one for each core"),  # torch takes one for each core without hyperthreads
        ("auto", {}, None, 1, 1, "other cores are in use"),
        ("auto", {}, 3, 1, 3, "as in the checkpoint"),
        ("auto", {"OMP_NUM_THREADS": "4"}, 3, 1, 4, "OMP_NUM_THREADS"),
        (2, {"OMP_NUM_THREADS": "4"}, 3, 1, 2, "--threads=2"),
    ],
)
def test_the_number_of_threads(option, environment, saved, free, threads, reason, monkeypatch):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    taken = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)  # what torch has chosen, from the cores or OMP_NUM_THREADS
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(module, "free_cores", lambda: free)
    assert reason in module.set_threads(option, saved)
    assert taken == [threads]
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert ("they wait passively" in module.set_threads(option, saved)) == (threads > 1)


def test_seeding_repeats():
    machine = Machine(device=CPU, dtype=torch.float32, name="cpu")
    drawn = []
    for seed in (3, 3, 4):
        machine.seed(seed)
        drawn.append(torch.rand(4).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("x"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be …"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_is_one_line(error):
    machine = Machine(device=CPU, dtype=torch.float32, name="cpu, 2 threads")
    with (
        pytest.raises(UserError, match="^cpu, 2 threads is out of memory; use less$"),
        memory_limits(machine, "use less"),
    ):
        raise error
    with pytest.raises(RuntimeError, match="something else"), memory_limits(machine, "use less"):
        raise RuntimeError("something else")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_a_second_ctrl_c_interrupts(number, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.agreed(ProcessGroup()) == 0
        os.kill(os.getpid(), number)
        assert stop.agreed(ProcessGroup()) == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(number) is before


def test_compile_falls_back_to_the_model(monkeypatch, capsys):
    """A compiler that fails, on the first call or at once, costs a note."""

    def broken(*args):
        raise RuntimeError("no compiler here\nand a long story")

    def broken_when_called(function):
        return broken

    model, idx = small_gpt(), torch.zeros(1, 4, dtype=torch.int64)
    machine = Machine(device=CPU, dtype=torch.float32, name="cpu")
    expected = model(idx, idx)[1].item()
    for compiler in (broken, broken_when_called):
        monkeypatch.setattr(torch, "compile", compiler)
        module.compile_model(model, idx, idx, True, machine)
        note = "note: torch.compile failed (no compiler here); training continues uncompiled\n"
        assert capsys.readouterr().err == note
        assert model(idx, idx)[1].item() == expected
    module.compile_model(model, idx, idx, "auto", machine)  # auto is for CUDA
    assert capsys.readouterr().err == "" and model(idx, idx)[1].item() == expected


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
@pytest.mark.parametrize("options", [{"position": "rope", "qk_norm": True, "dropout": 0.2}, {"checkpoint": True}])
def test_blocks_share_their_compiled_code(options, monkeypatch):
    """Two graphs for six blocks: a block, and the head with the loss. An evaluation compiles nothing."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # Inductor would take a minute
    is_checkpointed = options.pop("checkpoint", False)
    model, idx = small_gpt(n_layer=6, **options), torch.randint(11, (4, 16))

    def gradients():
        torch.manual_seed(1)
        model.zero_grad()
        model(idx, idx)[1].backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    if is_checkpointed:
        checkpoint_activations(model)
    module.compile_model(model, idx, idx, True, Machine(device=CPU, dtype=torch.float32, name="cpu"))
    assert all(parameter.grad is None for parameter in model.parameters())
    for _ in range(2):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(), expected, strict=True))
        with torch.no_grad():
            logits, loss = model.eval()(idx[:3], idx[:3])  # of another shape
            assert logits.shape == (3, 16, 11) and loss.isfinite()
        model.train()
    assert counters["stats"]["unique_graphs"] == counters["frames"]["ok"] == 2
    assert not counters["graph_break"]


def test_a_cpu_compiles_without_the_cache_in_which_torch_crashes(monkeypatch):
    from torch._functorch import config

    def compile(function):
        return lambda *args: seen.append(config.enable_autograd_cache) or function(*args)

    seen, before, idx = [], config.enable_autograd_cache, torch.zeros(1, 4, dtype=torch.int64)
    monkeypatch.setattr(torch, "compile", compile)
    module.compile_model(small_gpt(), idx, idx, True, Machine(device=CPU, dtype=torch.float32, name="cpu"))
    assert seen == [False, False, False] and config.enable_autograd_cache == before


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_no_gradient(dropout, dtype):
    """Bit for bit, because the random numbers of dropout are drawn again as they were."""
    model = cpu.speed_up(small_gpt(n_layer=3, dropout=dropout, position="rope"))
    idx = torch.randint(11, (4, 16))

    def gradients():
        torch.manual_seed(1)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            model(idx, idx)[1].backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected, calls = gradients(), []
    model.transformer.h[0].attn.register_forward_hook(lambda *_: calls.append(1))
    checkpoint_activations(model)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(), expected, strict=True))
    assert len(calls) == 2  # forward, and again in the backward pass
