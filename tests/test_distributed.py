"""distributed.py: a process that is alone, and two that agree. Whole runs on two ranks are in test_processes.py."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from quill.distributed import ProcessGroup, parallelize
from quill.errors import UserError


def fail(words):
    raise UserError(words)


def test_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    group = ProcessGroup.from_environment()
    assert (group.rank, group.world_size) == (0, 1)
    with group.connected():
        assert group.sum(torch.tensor([1.0, 2.0])).tolist() == [1, 2] and group.max(3) == 3
        assert group.on_all_ranks(lambda a, b: a + b, 1, 2) == 3
        with pytest.raises(UserError, match="no disk"):
            group.on_rank_0(fail, "no disk")
    model = torch.nn.Linear(2, 2)
    assert parallelize(model, group) is model


def work(rank, port, results):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group = ProcessGroup.from_environment()
    with group.connected():
        seen = [group.rank, group.sum(torch.tensor([rank + 1.0])).item(), group.max(10 * rank)]
        seen.append(group.on_all_ranks(lambda: rank))
        for one_fails in (
            lambda: group.on_all_ranks(fail if rank == 1 else str, "rank 1 has no disk"),
            lambda: group.on_rank_0(fail, "rank 0 has no disk"),
        ):
            try:
                one_fails()
            except UserError as error:
                seen.append(str(error))
        model = parallelize(torch.nn.Linear(1, 1, bias=False), group)
        model(torch.tensor([[rank + 1.0]])).sum().backward()  # gradients 1 and 2: their mean is 1.5
        seen += [isinstance(model, DistributedDataParallel), next(model.parameters()).grad.item()]
    results.put(seen)


def test_two_ranks_agree():
    """Sums, maxima, errors of one rank on both, and averaged gradients, over gloo on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(work, (port, results), nprocs=2)
    seen = sorted(results.get() for _ in range(2))
    errors = ["rank 1 has no disk", "rank 0 has no disk"]
    assert seen == [[rank, 3.0, 10, rank, *errors, True, 1.5] for rank in (0, 1)]
