"""Sharding: each rank has a part of every parameter, of its gradient and of its moments (torch's FSDP2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from quill.machine import Machine
from quill.parallel import Strategy


class FSDP(Strategy):
    """Each parameter is split by its rows among the ranks. It becomes a DTensor, and so do its gradient and moments.

    The weights of a block are gathered before it is computed, forward and backward, and freed after it. They travel in
    the number type of the products. Gradients are summed in float32, and each rank keeps its own part.
    """

    is_sharded = True

    def __init__(self, machine: Machine):
        super().__init__(machine)
        self.mesh = init_device_mesh(machine.device.type, (machine.group.world_size,))

    def prepare(self, model: Any) -> None:
        policy = MixedPrecisionPolicy(self.machine.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.transformer.h:
            # Norms, embeddings and lm_head have float32 weights, as under autocast: so has the residual stream.
            if norms := [norm for norm in (block.ln_1, block.ln_2) if list(norm.parameters())]:
                fully_shard(norms, mesh=self.mesh)
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        # The rest, where wte and lm_head may share a matrix. A forward pass without a backward pass must free it too.
        fully_shard(model, mesh=self.mesh, reshard_after_forward=True)

    def to_local(self, tensor: Any) -> torch.Tensor:
        return tensor.to_local()

    def full_tensor(self, tensor: Any) -> torch.Tensor:
        return tensor.full_tensor()

    def shard(self, tensor: torch.Tensor, parameter: Any) -> torch.Tensor:
        # Without the clone, a part may be a view, which keeps the whole tensor in memory.
        return distribute_tensor(tensor, self.mesh, parameter.placements, src_data_rank=None).clone()

    def map_matrices(self, work, matrices, parameter):
        # The parts may be uneven, so from_local must be told the whole shape and stride. Each rank has some rows of all
        # matrices, and gets all rows of some matrices: an all-to-all. Another one takes the results back.
        shape = torch.Size((len(matrices), *parameter.shape))
        layout: Any = {"device_mesh": self.mesh, "shape": shape, "stride": torch.empty(shape, device="meta").stride()}
        some_rows = DTensor.from_local(torch.stack(matrices), placements=[Shard(1)], **layout)
        whole = some_rows.redistribute(placements=[Shard(0)])
        done = DTensor.from_local(work(whole.to_local()), placements=[Shard(0)], **layout)
        return done.redistribute(placements=[Shard(1)]).to_local()

    def full_state_dict(self, model: nn.Module) -> dict[str, Any]:
        copies = {parameter: self._to_rank_0(parameter) for parameter in model.parameters()}  # a tied matrix once
        return {name: copies[tensor] for name, tensor in model.state_dict(keep_vars=True).items()}

    def full_optimizer_state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        saved = optimizer.state_dict()
        state = saved["state"].items()
        return saved | {"state": {i: {key: self._to_rank_0(t) for key, t in own.items()} for i, own in state}}

    def _to_rank_0(self, tensor: Any) -> Any:
        """Return a sharded tensor as a whole one in the memory of rank 0's CPU; any other tensor as it is."""
        if not isinstance(tensor, DTensor):
            return tensor
        whole: Any = tensor.full_tensor().detach()
        # A copy: with uneven parts, the whole tensor is a view of a larger one, which would be saved with it.
        return whole.to("cpu", copy=True) if self.group.rank == 0 else None
