"""How the ranks of a run train one model: each with all of it (DDP), or each with a part of every parameter (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from quill.machine import Machine


class Parallel:
    """One process, which has the whole model and does all the work. The subclasses are for several ranks."""

    is_sharded = False

    def __init__(self, machine: Machine):
        self.machine, self.group = machine, machine.group

    def place(self, model: nn.Module) -> None:
        """Move a model to the machine, in place, before it is trained."""
        model.to(self.machine.device)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the module that a training step calls: its backward pass averages the gradients over the ranks."""
        return model

    def accumulating(self, model: Any, is_last: bool) -> AbstractContextManager[Any]:
        """A context for each micro-batch of a step, where gradients need not be averaged before the last one."""
        return nullcontext()

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a parameter, a gradient or a moment. They share memory."""
        return tensor

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor that may be sharded as a whole one, on every rank."""
        return tensor

    def shard_like(self, tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a moment, which is the same whole `tensor` on every rank."""
        return tensor

    def share_out(self, work: Callable[[torch.Tensor], torch.Tensor], items: list[torch.Tensor], parameter: Any):
        """Return work(items) (N, rows, columns), of which each rank computes some and gets the others from the others.

        items: this rank's parts of N matrices that have the shape of `parameter`. work gets whole matrices, as one
        tensor, computes each of them on its own, and keeps the shape.
        """
        return work(torch.stack(items))

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return model.state_dict(), with whole tensors on rank 0 and nothing of use on the others."""
        return model.state_dict()

    def moments(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return optimizer.state_dict(), like `weights`."""
        return optimizer.state_dict()


class Replicated(Parallel):
    """Each rank has the whole model and its own rows of the batch. The gradients are averaged (DDP)."""

    def wrap(self, model: nn.Module) -> nn.Module:  # noqa: D102
        return DistributedDataParallel(model)

    def accumulating(self, model: Any, is_last: bool) -> AbstractContextManager[Any]:  # noqa: D102
        return nullcontext() if is_last else model.no_sync()

    def share_out(self, work, items, parameter):  # noqa: D102
        most = -(-len(items) // self.group.world_size)  # of a rank; the last ranks may have fewer, or none
        mine, start = parameter.new_zeros(most, *parameter.shape), self.group.rank * most
        if own := items[start : start + most]:
            mine[: len(own)] = work(torch.stack(own))
        done = mine.new_empty(self.group.world_size * most, *parameter.shape)
        dist.all_gather_into_tensor(done, mine)
        return done[: len(items)]
