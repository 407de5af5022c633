"""The machine that a process runs on: its device, number type, the other processes of the run, and signals to stop.

Imports torch, which the options themselves do not.
"""

import gc
import os
import re
import signal
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from quill.errors import UserError

# Dense bf16 peaks (V100, T4: fp16) in FLOP/s, from NVIDIA's data sheets, by words of the device's name; first match.
PEAK_FLOPS = {
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """A process's place among those that torchrun started; alone, it is rank 0 of 1."""

    rank: int
    world: int

    @classmethod
    def from_environment(cls):
        return cls(rank=int(os.environ.get("RANK", 0)), world=int(os.environ.get("WORLD_SIZE", 1)))

    @contextmanager
    def joined(self):
        """The processes can talk to each other: about tensors on the CPU by gloo, about those on GPUs by nccl."""
        if self.world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        try:
            yield
        finally:
            if self.world > 1:
                gc.collect()  # DDP's threads go while the group is still there; at exit they would abort the process
                dist.destroy_process_group()

    def sum(self, tensor):
        """A CPU tensor's sum over the ranks."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def on_all_ranks(self, work, *args):
        """`work(*args)`, on each rank. If one fails, all raise its line before they wait for each other for ever."""
        result, error = None, None
        try:
            result = work(*args)
        except UserError as caught:
            error = str(caught)
        if self.world > 1:
            errors = [None] * self.world
            dist.all_gather_object(errors, error)
            error = next(filter(None, errors), None)
        if error is not None:
            raise UserError(error)
        return result

    def on_rank_0(self, work, *args):
        """`work(*args)` on rank 0 while the others wait; its failure is everyone's."""
        self.on_all_ranks(work if self.rank == 0 else lambda *args: None, *args)


@dataclass(frozen=True, kw_only=True)
class Machine(Ranks):
    """What a process computes on, the type that its matrix products are computed in, and the device's name."""

    device: torch.device
    dtype: torch.dtype
    name: str

    def autocast(self):
        """Mixed precision: weights stay float32. A no-op when dtype is float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def seed(self, seed):
        """Seed the device's random stream."""
        if self.device.type == "cpu":
            # torch.manual_seed sees to GPUs too, which takes 0.2 ms: a tenth of microgpt's step.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    @property
    def peak_flops(self):
        """The device's known peak in FLOP/s, or None; in half precision, which is all that data sheets agree on."""
        if self.dtype == torch.float32:
            return None
        return next((peak for words, peak in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", self.name)), None)


@contextmanager
def memory_limits(machine):
    """What does not fit into memory, or into any, ends as one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = ("allocate memory", "Storage size calculation overflowed")
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(k in str(error) for k in known):
            raise
        raise UserError(
            f"{machine.name} is out of memory; use a smaller --batch_size, --num_samples or model"
        ) from None


class StopSignals:
    """SIGINT and SIGTERM ask the loop to end after its step. A second SIGINT ends a process that is alone at once."""

    def __enter__(self):
        self.received = 0
        self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _receive(self, number, frame):
        # torchrun passes on what its processes have been sent already, so that one signal may come twice.
        again = self.received and number == signal.SIGINT and "RANK" not in os.environ
        self.received = self.received or number
        if again:
            raise KeyboardInterrupt

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self, machine):
        """The signal that any rank has received, or 0: all ranks stop after the same step."""
        if machine.world == 1:
            return self.received
        number = torch.tensor(self.received)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()


def pick_machine(config, ranks=None):
    """`config.device`, `config.dtype` → Machine; under torchrun, each process on a node takes a GPU of its own."""
    ranks = ranks or Ranks(rank=0, world=1)
    device = _best_device(ranks) if config.device == "auto" else _device(config.device)
    if device.type == "cuda":
        device, name = _pick_gpu(device, ranks)
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device=mps: torch finds no Metal GPU here; use --device=cpu")
        if ranks.world > 1:
            raise UserError(f"--device=mps: {ranks.world} processes can't share it; use --device=cpu")
        name = "mps"
    else:
        threads = torch.get_num_threads()
        name = f"cpu, {threads} thread{'s' if threads > 1 else ''}"
    dtype = getattr(torch, config.dtype) if config.dtype != "auto" else _best_dtype(device)
    if dtype == torch.float16 and device.type == "cpu":
        raise UserError("--dtype=float16 is for GPUs; use --dtype=float32 or --dtype=bfloat16 on a CPU")
    return Machine(rank=ranks.rank, world=ranks.world, device=device, dtype=dtype, name=name)


def _pick_gpu(device, ranks):
    if not torch.cuda.is_available():
        raise UserError("--device=cuda: torch finds no CUDA here; use --device=cpu")
    if ranks.world > 1 and device.index is not None:
        raise UserError(f"--device={device}: {ranks.world} processes take a GPU each; use --device=cuda")
    index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        raise UserError(f"cuda:{index}: this machine has {torch.cuda.device_count()} GPUs; one is needed per process")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    # What stays in float32 beside the mixed precision may use TF32, as in nanoGPT.
    torch.set_float32_matmul_precision("high")
    return device, torch.cuda.get_device_name(device)


def _best_device(ranks):
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() and ranks.world == 1 else "cpu")


def _device(text):
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps") or (device.type != "cuda" and device.index):
        raise UserError(f"--device={text}: there is no such device; use auto, cpu, cuda, cuda:1 or mps")
    return device


def _best_dtype(device):
    if device.type == "cuda":
        # Older cards emulate bf16: it "works", slower than fp32.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        # Where the processor multiplies bf16 itself, a step takes 0.42 to 0.73 of its time in fp32 (docs/records.md).
        tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, test, lambda: False)() for test in tests)
        return torch.bfloat16 if native else torch.float32
    return torch.float32
