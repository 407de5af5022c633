"""How the ranks of a run train one model: each with a copy of it (DDP), or each with a part of every parameter (FSDP).

Shapes: N matrices of one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from quill.machine import Machine


class Strategy:
    """What depends on the number of ranks. This class is for one process; the subclasses are for several ranks.

    Every rank calls each method: some of them wait for all ranks.
    """

    is_sharded = False

    def __init__(self, machine: Machine):
        self.machine, self.group = machine, machine.group

    def prepare(self, model: nn.Module) -> None:
        """Move a model to the machine, in place, before it is trained."""
        model.to(self.machine.device)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the module that a training step calls: its backward pass averages the gradients over the ranks."""
        return model

    def maybe_no_sync(self, model: Any, is_last: bool) -> AbstractContextManager[Any]:
        """A context for each micro-batch of a step, where gradients need not be averaged before the last one."""
        return nullcontext()

    def to_local(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a parameter, a gradient or a moment. They share memory."""
        return tensor

    def full_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor that may be sharded as a whole one, on every rank."""
        return tensor

    def shard(self, tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a moment, split like `parameter`. `tensor` is whole, and the same on all ranks."""
        return tensor

    def map_matrices(
        self, work: Callable[[torch.Tensor], torch.Tensor], matrices: list[torch.Tensor], parameter: Any
    ) -> torch.Tensor:
        """Return work(matrices). Each rank computes a part of the N matrices, then the parts are exchanged.

        matrices: what this rank has of each of them; they have the shape of `parameter`. work: from (N, rows, columns)
        to the same shape, each matrix on its own; it gets whole matrices. → what this rank needs, (N, …)
        """
        return work(torch.stack(matrices))

    def full_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Return model.state_dict(). On rank 0 its tensors are whole; the others have no use for it."""
        return model.state_dict()

    def full_optimizer_state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return optimizer.state_dict(), like `full_state_dict`."""
        return optimizer.state_dict()


class DDP(Strategy):
    """Each rank has the whole model and its own rows of the batch. The gradients are averaged."""

    def wrap(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model)

    def maybe_no_sync(self, model: Any, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if is_last else model.no_sync()

    def map_matrices(self, work, matrices, parameter):
        most = -(-len(matrices) // self.group.world_size)  # of a rank; the last ranks may have fewer, or none
        mine, start = parameter.new_zeros(most, *parameter.shape), self.group.rank * most
        if own := matrices[start : start + most]:
            mine[: len(own)] = work(torch.stack(own))
        done = mine.new_empty(self.group.world_size, *mine.shape)
        dist.all_gather(list(done), mine)
        return done.flatten(0, 1)[: len(matrices)]
