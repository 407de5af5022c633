"""The machine that a process runs on: its device, number type and memory errors, compiling, and signals to stop."""

from __future__ import annotations

import ctypes
import os
import re
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from quill.cli import note
from quill.cores import free_cores
from quill.distributed import ProcessGroup
from quill.errors import UserError, check
from quill.options import TrainConfig

# Dense bf16 peaks (V100, T4: fp16) in FLOP/s, from NVIDIA's data sheets, by regular expressions for the words of a
# device's name. The first match counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "GH200|H200|H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10|V100": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "T4": 65e12,
}
BF16_PAYS = 2**14  # B × T × C from which a CPU trains faster in bfloat16; below, the conversions cost more


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The device that a process computes on, the number type of its matrix products, and its place in the run."""

    device: torch.device
    dtype: torch.dtype
    name: str
    threads_reason: str = ""  # why a CPU has this number of threads, and how they wait
    group: ProcessGroup = field(default_factory=ProcessGroup)

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision: weights stay float32. A no-op when dtype is float32."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def seed(self, seed: int) -> None:
        """Seed the device's random number generator."""
        if self.device.type == "cpu":
            # torch.manual_seed also prepares seeds for GPUs, which takes 0.2 ms: a tenth of microgpt's step.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    @property
    def peak_flops(self) -> float | None:
        """The device's peak in FLOP/s, in half precision, from its data sheet. None where it is not known."""
        if self.dtype == torch.float32 or "MIG" in self.name:  # MIG: a part of a GPU, with the name of the whole
            return None
        return next((peak for words, peak in PEAK_FLOPS.items() if re.search(rf"\b({words})\b", self.name)), None)


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees: to get it again costs thousands of page faults in each step."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        for option, value in ((-1, 2**31 - 1), (-4, 0)):  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX
            ctypes.CDLL(None).mallopt(option, value)


@contextmanager
def memory_limits(machine: Machine, advice: str) -> Iterator[None]:
    """Turn torch's out-of-memory errors, and CUDA's own, into a UserError with `advice`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = ("allocate memory", "Storage size calculation overflowed", "CUDA error: out of memory", "ALLOC_FAILED")
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(k in str(error) for k in known):
            raise
        raise UserError(f"{machine.name} is out of memory; {advice}") from None


class StopSignals:
    """Let SIGINT and SIGTERM end the loop after its step. A second SIGINT ends a single process at once."""

    def __enter__(self) -> StopSignals:
        self.received = 0
        self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _receive(self, number, frame):
        # torchrun forwards signals that its processes have received already, so that one signal may arrive twice.
        again = self.received and number == signal.SIGINT and "RANK" not in os.environ
        self.received = self.received or number
        if again:
            raise KeyboardInterrupt

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self, group: ProcessGroup) -> int:
        """Return the signal that any rank has received, or 0, so that all ranks stop after the same step."""
        return group.max(self.received)


def pick_machine(config: Any, group: ProcessGroup | None = None, saved_threads: int | None = None) -> Machine:
    """Pick the device and the dtype that `config` asks for, and set the number of torch's threads.

    Under torchrun, each process of a node uses its own GPU. saved_threads: the number of threads in the checkpoint. A
    resumed run keeps it, because it decides how sums are rounded. Raise a UserError if something is not available.
    """
    group = group or ProcessGroup()
    training = isinstance(config, TrainConfig)
    reason = set_threads(config.threads, saved_threads)
    device = _device(config.device, group)
    if device.type == "cuda":
        device, name = _pick_gpu(device, group)
    elif device.type == "mps":
        check(torch.backends.mps.is_available(), "--device=mps: torch finds no Metal GPU here; use --device=cpu")
        check(group.world_size == 1, f"--device=mps: {group.world_size} processes can't share it; use --device=cpu")
        name = "mps"
    else:
        threads = torch.get_num_threads()
        name = f"cpu, {threads} thread{'s' if threads > 1 else ''}"
    dtype = getattr(torch, config.dtype) if config.dtype != "auto" else _best_dtype(device, config)
    if dtype == torch.int8 and not (device.type == "cpu" and hasattr(torch, "_weight_int8pack_mm")):
        raise UserError(f"--dtype=int8 is for CPUs, not for {name} with torch {torch.__version__}; use --dtype=auto")
    if dtype == torch.float16 and device.type == "cpu" and (training or not _has_fbgemm()):
        reason = "is for sampling or for GPUs" if training else "on a CPU needs torch's fbgemm, which this torch lacks"
        raise UserError(f"--dtype=float16 {reason}; use --dtype=float32 or --dtype=bfloat16")
    reason = reason if device.type == "cpu" else ""
    return Machine(device=device, dtype=dtype, name=name, threads_reason=reason, group=group)


def set_threads(option: int | str, saved: int | None = None) -> str:
    """Set the number of torch's CPU threads. → why this number, and how the threads wait

    option: --threads. saved: the number in the checkpoint that a run starts from.
    """
    if option != "auto":
        threads, reason = int(option), f"--threads={option}"
    elif "OMP_NUM_THREADS" in os.environ:
        threads, reason = torch.get_num_threads(), "OMP_NUM_THREADS"
    elif saved is not None:
        threads, reason = saved, "as in the checkpoint"
    else:
        threads, reason = torch.get_num_threads(), "one for each core"
        if threads > 1 and free_cores() < threads:
            threads, reason = free_cores(), "the other cores are in use, or not granted"
    torch.set_num_threads(threads)
    if threads > 1 and os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        reason += "; they wait passively"
    return reason


def _pick_gpu(device, group):
    check(torch.cuda.is_available(), "--device=cuda: torch finds no CUDA here; use --device=cpu")
    if group.world_size > 1 and device.index is not None:
        raise UserError(f"--device={device}: {group.world_size} processes take a GPU each; use --device=cuda")
    index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count()
    check(index < gpus, f"cuda:{index}: this machine has {gpus} GPUs; one is needed per process")
    device = torch.device("cuda", index)
    try:
        torch.cuda.set_device(device)
        torch.cuda.synchronize()
    except RuntimeError as error:  # another process may have the GPU for itself, or all of its memory
        raise UserError(f"--device={device}: {str(error).splitlines()[0]}") from None
    # Products that stay in float32 may use TF32, as in nanoGPT.
    torch.set_float32_matmul_precision("high")
    return device, torch.cuda.get_device_name(device)


def _device(text, group):
    if text == "auto":
        mps = torch.backends.mps.is_available() and group.world_size == 1
        text = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    is_device = re.fullmatch("cuda(:0|:[1-9][0-9]?)?|(cpu|mps)(:0)?", text)
    check(is_device, f"--device={text}: there is no such device; use auto, cpu, cuda, cuda:1 or mps")
    return torch.device(text)


def _best_dtype(device, config):
    training = isinstance(config, TrainConfig)
    if device.type == "cpu" and not training and _has_fbgemm():
        # A token takes less time than in fp32 or bf16, and the loss is the same to 1e-5 nats (docs/records/).
        return torch.float16
    if device.type == "cuda":
        # Older cards emulate bf16, which is slower than fp32.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # With a CPU's bf16 instructions, a step takes 0.42 to 0.73 of its time in fp32 (docs/records/).
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = device.type == "cpu" and any(getattr(torch.cpu, test, lambda: False)() for test in tests)
    small = training and config.batch_size * config.block_size * config.n_embd < BF16_PAYS
    return torch.bfloat16 if native and not small else torch.float32


def _has_fbgemm():
    """Return whether torch has products on a CPU of weights in float16 with the rest in float32."""
    return torch.backends.quantized.engine in ("x86", "fbgemm") and hasattr(torch.ops.quantized, "linear_dynamic_fp16")


def checkpoint_activations(model: Any) -> None:
    """Let each block of a GPT keep only its input for the backward pass, which computes it again (Chen et al. 2016)."""

    def forward(compute, *args):
        # Without gradients, nothing is kept anyway.
        return checkpoint(compute, *args, use_reentrant=False) if torch.is_grad_enabled() else compute(*args)

    for block in model.transformer.h:
        block.forward = partial(forward, block.forward)


def compile_model(model: Any, x: torch.Tensor, y: torch.Tensor, option: bool | str, machine: Machine) -> None:
    """Compile a GPT for training, in place, where `option` (config.compile) asks for it and it works.

    Each block is compiled by itself, and the head together with the loss. All blocks share their compiled code, so only
    one of them is compiled (with --shard, FSDP's hooks split it). Without gradients, as in an evaluation, none is used.

    x, y: a batch, (B, T) each, on which the compiled model is tried, forward and backward.
    """
    if not (machine.device.type == "cuda" if option == "auto" else option):
        return
    from torch._functorch import config as cache_config  # here, because it takes long to import

    head, device = model.head, machine.device
    parts = [(block, "forward", block.forward, block.forward) for block in model.transformer.h]
    # The logits are not returned: for their gradient, the backward pass would make zeros of the same size.
    parts.append((model, "head", head, lambda x, targets: (None, head(x, targets)[1])))

    def try_linear():
        torch.compile(nn.Linear(1, 1, device=device))(torch.ones(1, 1, device=device)).sum().backward()

    def try_model():
        for module, name, plain, of_training in parts:
            setattr(module, name, partial(_with_gradients, torch.compile(of_training), plain))
        # torch 2.13 may crash when it stores a graph that returns a view. quill/cpu.py's Dropout leads to such graphs.
        with cache_config.patch(enable_autograd_cache=cache_config.enable_autograd_cache and device.type != "cpu"):
            with machine.autocast():
                loss = model(x, y)[1]
            loss.backward()

    # The ranks agree before they try a sharded model, of which each waits for the others.
    failure = _failure(try_linear) if machine.group.world_size > 1 else ""
    if machine.group.max(bool(failure)):
        failure = failure or "on another rank"
    elif failure := _failure(try_model):
        for module, name, plain, _ in parts:
            setattr(module, name, plain)
    if failure:
        note(f"note: torch.compile failed ({failure}); training continues uncompiled")
    model.zero_grad(set_to_none=True)


def _with_gradients(compiled, plain, *args):
    return compiled(*args) if torch.is_grad_enabled() else plain(*args)


def _failure(work):
    """Call `work`, which compiles. → the first line of its error, or "": a compiler can fail in any way"""
    try:
        work()
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except Exception as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""
