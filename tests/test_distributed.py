"""distributed.py: a process that is alone, and two that agree. Whole runs on two ranks are in test_processes.py."""

import os
import random
import socket
import threading

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from quill import distributed
from quill.distributed import AgreedError, ErrorElsewhere, ProcessGroup, meet
from quill.errors import UserError
from quill.machine import Machine
from quill.optimizer import BatchedMuon
from quill.parallel import DDP, Strategy


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
    assert Strategy(on_cpu(group)).wrap(model) is model


def on_cpu(group):
    return Machine(device=torch.device("cpu"), dtype=torch.float32, name="cpu", group=group)


def work(rank, port, results):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group = ProcessGroup.from_environment()
    with group.connected():
        seen = [group.rank, group.sum(torch.tensor([rank + 1.0])).item(), group.max(10 * rank)]
        seen.append(group.on_all_ranks(lambda: rank))
        for one_fails in (
            lambda: group.on_all_ranks(fail if rank == 1 else str, "no disk"),
            lambda: group.on_all_ranks(fail, "no disk"),
            lambda: group.on_rank_0(fail, "no disk"),
            lambda: group.on_rank_0(open, "/"),
        ):
            with pytest.raises(AgreedError) as caught:
                one_fails()
            seen.append(str(caught.value))
        group.refuse_differences({"seed": 1, "dtype": torch.float32})
        for values in ({"seed": 1 + rank}, {"seed": 1} if rank else {}):
            with pytest.raises(AgreedError) as caught:
                group.refuse_differences(values)
            seen.append(str(caught.value))
        distributed.code_digest = lambda: f"code {rank}"
        with pytest.raises(AgreedError, match="rank 1 has quill's code=code 1, but rank 0 has"):
            group.refuse_differences({})
        with pytest.raises(TypeError if rank == 1 else ErrorElsewhere):  # a bug of quill's
            group.on_all_ranks(len if rank == 1 else str, 3)
        strategy = DDP(on_cpu(group))
        model = strategy.wrap(torch.nn.Linear(1, 1, bias=False))
        model(torch.tensor([[rank + 1.0]])).sum().backward()  # gradients 1 and 2: their mean is 1.5
        seen += [isinstance(model, DistributedDataParallel), next(model.parameters()).grad.item()]
        seen += [
            share_out_tokens(strategy),
            muon_after_3_steps(strategy) == muon_after_3_steps(Strategy(on_cpu(group))),
        ]
    results.put(seen)


def share_out_tokens(strategy):
    """Seven matrices among two ranks, and one, of which the second rank has none: which rank has computed each."""
    work = lambda part: part + strategy.group.rank  # noqa: E731
    return [strategy.map_matrices(work, [torch.zeros(1, 1)] * n, torch.zeros(1, 1)).flatten().tolist() for n in (7, 1)]


def muon_after_3_steps(strategy):
    """Five matrices of one shape, and two of others. → their values"""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in [(16, 24)] * 5 + [(24, 16), (8, 8)]]
    muon = BatchedMuon(parameters, 0.02, strategy)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape)
        muon.step()
    return [parameter.tolist() for parameter in parameters]


def test_two_ranks_agree():
    """Sums, maxima, errors of one rank on both, and averaged gradients, over gloo on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(work, (port, results), nprocs=2)
    seen = sorted(results.get() for _ in range(2))
    errors = ["rank 1: no disk", "no disk", "no disk", "/: Is a directory"]
    for one, zero in (("seed=2", "seed=1"), ("seed=1", "seed at its default")):
        errors.append(f"rank 1 has {one}, but rank 0 has {zero}; start all nodes with the same code, options and data")
    shares = [[0.0] * 4 + [1.0] * 3, [0.0]]
    assert seen == [[rank, 3.0, 10, rank, *errors, True, 1.5, shares, True] for rank in (0, 1)]


def test_ranks_meet_those_of_their_own_start_only():
    """50 starts with one store, as torchrun's agents make them. Ranks of most starts die before they have met."""
    store, rng = dist.HashStore(), random.Random(0)
    for start in range(50):
        world_size, met = rng.randint(2, 4), {}
        for rank in range(1, world_size):
            if rng.random() < 0.7:
                store.set(f"quill/token/{rank}", f"of a rank that is dead {start}")
            if rng.random() < 0.5:
                store.set(f"quill/answer/of a rank that is dead {start}", "of a rank 0 that is dead")

        def join(rank, world_size=world_size, met=met):
            met[rank] = meet(store, rank, world_size)

        ranks = [threading.Thread(target=join, args=(rank,)) for rank in range(world_size)]
        rng.shuffle(ranks)
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout=10)
        assert len(met) == world_size
        assert not any(shared.check([str(rank)]) for rank in range(4) for shared in met.values())  # of earlier starts
        for rank, shared in met.items():
            shared.set(str(rank), "here")
        assert all(shared.check([str(rank)]) for rank in met for shared in met.values())
