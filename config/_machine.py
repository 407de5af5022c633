"""The machine that a process runs on: device, number type, the other processes of the run, and signals to stop.

Imports torch, which the options themselves do not.
"""

import os
import signal
from dataclasses import dataclass

import torch
import torch.distributed as dist

from config._errors import UserError

# Dense bf16 (V100, T4: fp16) peaks in FLOP/s, from NVIDIA's data sheets; the key is a word of the device's name.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "4090": 165e12,
    "3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


@dataclass(frozen=True)
class Machine:
    """What a process computes on and in, and its place among the processes that torchrun started."""

    device: torch.device
    dtype: torch.dtype
    name: str
    rank: int = 0
    world: int = 1

    def autocast(self):
        """Mixed precision: weights stay float32. A no-op when dtype is float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def peak_flops(self):
        """The device's known peak in FLOP/s, or None."""
        return next((PEAK_FLOPS[word] for word in self.name.replace("-", " ").split() if word in PEAK_FLOPS), None)

    def sum(self, tensor):
        """A CPU tensor's sum over the ranks."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def on_all_ranks(self, work):
        """`work()`, on each rank. If one fails, all raise its line before they wait for each other for ever."""
        result, error = None, None
        try:
            result = work()
        except UserError as caught:
            error = str(caught)
        if self.world > 1:
            errors = [None] * self.world
            dist.all_gather_object(errors, error)
            error = next(filter(None, errors), None)
        if error is not None:
            raise UserError(error)
        return result

    def on_rank_0(self, work):
        """`work()` on rank 0 while the others wait; its failure is everyone's."""
        self.on_all_ranks(work if self.rank == 0 else lambda: None)


class StopSignals:
    """SIGINT and SIGTERM: the first asks the loop to end after its step, the second ends the process at once."""

    def __enter__(self):
        self.received = 0
        self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _receive(self, number, frame):
        self.received = number
        self.__exit__()

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


def pick_machine(config):
    """`config.device`, `config.dtype` → Machine; under torchrun, each process on a node takes a GPU of its own."""
    device = _best_device() if config.device == "auto" else _device(config.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device={config.device}: torch finds no CUDA here; use --device=cpu")
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", device.index if device.index is not None else local_rank)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"{device}: this machine has {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
        name = torch.cuda.get_device_name(device)
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device=mps: torch finds no Metal GPU here; use --device=cpu")
        name = "mps"
    else:
        name = f"cpu, {torch.get_num_threads()} threads"
    dtype = getattr(torch, config.dtype) if config.dtype != "auto" else _best_dtype(device)
    if dtype == torch.float16 and device.type == "cpu":
        raise UserError("--dtype=float16 is for GPUs; use --dtype=float32 or --dtype=bfloat16 on a CPU")
    return Machine(device, dtype, name, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def _best_device():
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _device(text):
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device={text}: there is no such device; use auto, cpu, cuda, cuda:1 or mps")
    return device


def _best_dtype(device):
    if device.type == "cuda":
        # Older cards emulate bf16: it "works", slower than fp32.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32
