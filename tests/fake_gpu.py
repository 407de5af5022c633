"""Train on a GPU without hardware: `python tests/fake_gpu.py FLAGS -- FLAGS …` prints what each run waited for.

torch's fake tensors have a shape, a type and a device, but no numbers. An operation on tensors of two devices fails,
and so does a read of a number, such as `.item()`. The device "gpu" takes the place of CUDA, because autograd can't run
on fake CUDA tensors where no CUDA is. What fake tensors can't do is replaced in `prepare`.
"""

import json
import sys
import warnings
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from quill.cli import read_args
from quill.data import batches
from quill.data.splits import open_splits
from quill.machine import Machine
from quill.options import TrainConfig
from quill.state import TrainState


class Copies(TorchDispatchMode):
    """List the copies between host and GPU for which the host waits, and then the GPU too, which has no work left."""

    def __enter__(self):
        self.found = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        source, non_blocking = args and args[0], (kwargs or {}).get("non_blocking", False)
        if func is torch.ops.aten.copy_.default:
            source, non_blocking = args[1], len(args) == 3 and args[2]
        is_copy = func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
        if is_copy and source.device != result.device and not (non_blocking and result.device.type == "gpu"):
            self.found.append(f"{source.device.type} to {result.device.type}")
        return result


def prepare():
    """Register the device "gpu", and replace what fake tensors can't do."""
    _setup_privateuseone_for_python_backend("gpu")
    torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    library = torch.library.Library("_", "IMPL")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # no casts: all is float32
    torch.nn.Module.to = move
    batches.GPU_EVAL_TOKENS = 256  # so that an evaluation has several batches
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # deepcopy of the averaged model
    return library  # which ends its fallback when it is deleted


def move(module, device):
    """nn.Module.to, which can't replace a fake parameter by another one."""
    moved = {}
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in moved:
                    data = tensor.detach().to(device)
                    moved[tensor] = torch.nn.Parameter(data) if isinstance(tensor, torch.nn.Parameter) else data
                tensors[name] = moved.get(tensor)
    return module


def train_and_evaluate(flags):
    """→ the copies in config.max_iters steps and in an evaluation, its batches, and the devices of all that is kept"""
    config = TrainConfig(**read_args(flags, TrainConfig, "")[1])
    machine = Machine(device=torch.device("gpu", 0), dtype=getattr(torch, config.dtype), name="no GPU")
    with FakeTensorMode(allow_non_fake_inputs=True):
        data = open_splits(config, machine)
        state = TrainState(config, {}, data.dataset.tokenizer, machine)
        state.add_optimizers()
        with Copies() as in_steps:
            for _ in range(config.max_iters):
                train.train_step(state, data.train_batches, config, machine)
        calls = []
        state.eval_model.register_forward_hook(lambda *args: calls.append(args))
        with Copies() as in_evaluation, suppress(DataDependentOutputException):
            train.evaluate(state.eval_model, data.val_batches, config, machine)  # up to where it reads the losses
    kept = [tensor for pair in state.pending for tensor in pair]
    kept += [t for optimizer, _ in state.optimizers for moments in optimizer.state.values() for t in moments.values()]
    devices = sorted({tensor.device.type for tensor in kept})
    return {"steps": in_steps.found, "evaluation": in_evaluation.found, "batches": len(calls), "devices": devices}


if __name__ == "__main__":
    library = prepare()
    for is_separator, flags in groupby(sys.argv[1:], "--".__eq__):
        if not is_separator:
            print(json.dumps(train_and_evaluate([*flags])), flush=True)
