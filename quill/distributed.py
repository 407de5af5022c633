"""The processes of a run: their ranks, what they agree on, and how they train one model together.

One process is the default. torchrun starts several, one for each GPU, and tells each its rank in the environment.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from quill.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """A process's place among the processes of a run. The default is a single process."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> ProcessGroup:
        """Read the rank and the world size that torchrun has set."""
        return cls(rank=int(os.environ.get("RANK", 0)), world_size=int(os.environ.get("WORLD_SIZE", 1)))

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Connect the processes: gloo for tensors on the CPU, nccl for those on GPUs."""
        if self.world_size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        try:
            yield
        finally:
            if self.world_size > 1:
                gc.collect()  # end DDP's threads while the group exists; at exit they would abort the process
                dist.destroy_process_group()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a CPU tensor over the ranks, in place. → `tensor`"""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, number: int) -> int:
        """Return the largest `number` of any rank."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor.item())

    def on_all_ranks(self, work: Callable[..., Any], *args: Any) -> Any:
        """Call `work(*args)` on each rank. If any rank fails, every rank raises its error instead of deadlocking."""
        result, error = None, None
        try:
            result = work(*args)
        except UserError as caught:
            error = str(caught)
        if self.world_size > 1:
            errors = [None] * self.world_size
            dist.all_gather_object(errors, error)
            error = next(filter(None, errors), None)
        if error is not None:
            raise UserError(error)
        return result

    def on_rank_0(self, work: Callable[..., Any], *args: Any) -> None:
        """Call `work(*args)` on rank 0 while the others wait. If it fails, every rank raises its error."""
        self.on_all_ranks(work if self.rank == 0 else lambda *args: None, *args)


def parallelize(model: nn.Module, group: ProcessGroup) -> nn.Module:
    """Wrap `model` so that its gradients are averaged over the ranks. A single process gets it unchanged."""
    return DistributedDataParallel(model) if group.world_size > 1 else model
