"""quill/data/batches.py: every row once per epoch, the same global batch at every world size, exact validation."""

import json
import math
import os
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model import GPT
from quill.data import batches as module
from quill.data.batches import Batches, derive_seed, shuffled, stream_offset
from quill.data.splits import open_splits
from quill.data.token_files import open_dataset, prepare
from quill.distributed import AgreedError
from quill.options import TrainConfig
from train import evaluate

CPU = torch.device("cpu")


def make(tokens, bos=None, block_size=8, rows=6, micro_rows=6, seed=0, **where):
    return Batches(
        tokens,
        bos,
        block_size,
        rows=rows,
        micro_rows=micro_rows,
        seed=seed,
        **({"rank": 0, "world_size": 1, "device": CPU} | where),
    )


def stream(n=1000):
    return np.arange(n, dtype=np.uint16)  # every token is its own position


def names(lengths, bos=50):
    """Documents of the given lengths. The nth one consists of the token n."""
    return np.array([i for n, length in enumerate(lengths) for i in [bos] + [n % 50] * length], dtype=np.uint16)


def test_targets_are_the_next_tokens():
    for step in range(50):
        total, [(x, y, predicted)] = make(stream()).global_batch(step)
        assert x.shape == y.shape == (6, 8)
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(y, x + 1)
        assert total == predicted == 48


def test_a_step_is_a_pure_function():
    data = stream()
    one, other = make(data), make(data)
    ahead = [one.global_batch(step)[1][0][0] for step in range(40)]
    for step in reversed(range(40)):
        assert torch.equal(other.global_batch(step)[1][0][0], ahead[step])
    assert not torch.equal(make(data, seed=1).global_batch(0)[1][0][0], ahead[0])


def test_every_window_once_an_epoch_and_another_offset_and_order_in_the_next():
    batches = make(stream(1003), rows=4)
    assert batches.rows_per_epoch == (1003 - 8) // 8 == 124
    assert 124 % 4 == 0
    epochs = []
    for epoch in range(6):
        starts = np.concatenate([batches.step_rows(epoch * 31 + step)[0] for step in range(31)])
        ordered = np.sort(starts)
        assert (np.diff(ordered) == 8).all()
        assert 0 <= ordered[0] <= 1002 - 124 * 8
        assert ordered[-1] + 8 < 1003
        epochs.append(starts)
    assert len({int(starts.min()) for starts in epochs}) > 2  # offsets differ
    assert len({tuple(np.argsort(starts)) for starts in epochs}) == 6  # orders differ


def test_the_end_of_tiny_shakespeare_is_a_target():
    """A train split of 1,003,854 tokens in blocks of 64: 78 offsets, of which 0.1's order used 64."""
    n, block_size = 1_003_854, 64
    slack = n - 1 - (n - block_size) // block_size * block_size
    assert slack == 77
    offsets = {order: {stream_offset(1337, epoch, slack, 64, order) for epoch in range(1000)} for order in (1, 2)}
    assert offsets[1] == set(range(64))
    assert offsets[2] == {stream_offset(1337, epoch, slack, 64, 2) for epoch in range(78)} == set(range(78))


def test_the_order_of_older_runs_is_kept():
    """Order 1, as it was before there was another: these numbers may never change."""
    batches = make(stream(1003), rows=4, data_order=1)
    rows = [batches.step_rows(step)[0].tolist() for step in (0, 31, 62, 93)]
    assert rows == [[357, 341, 805, 389], [530, 618, 138, 98], [987, 475, 3, 699], [462, 742, 350, 270]]


def test_the_order_of_runs_before_there_was_order_3_is_kept():
    """Order 2, likewise."""
    batches = make(stream(1003), rows=4, data_order=2)
    rows = [batches.step_rows(step)[0].tolist() for step in (0, 31, 62, 93)]
    assert rows == [[361, 345, 809, 393], [533, 621, 141, 101], [985, 473, 1, 697], [464, 744, 352, 272]]
    batches = make(names([3, 20, 1, 8, 5, 0, 9, 2, 7]), 50, rows=4, data_order=2)
    rows = [[part.tolist() for part in batches.step_rows(step)] for step in (0, 3)]
    assert rows == [[[42, 27, 51, 35], [1, 8, 2, 1]], [[53, 56, 53, 51], [3, 8, 3, 2]]]


def test_a_step_may_use_rows_of_several_epochs():
    batches = make(stream(100), rows=7)  # 11 windows
    seen = np.concatenate([batches.step_rows(step)[0] for step in range(11)]).reshape(7, 11)
    for epoch in seen:
        assert (np.diff(np.sort(epoch)) == 8).all()


@pytest.mark.parametrize("n", [9, 10, 15, 16, 17, 24])
def test_the_shortest_streams(n):
    """One token more than block_size is enough, and no window ends after the stream."""
    for step in range(30):
        _, [(x, y, _)] = make(stream(n)).global_batch(step)
        assert torch.equal(y, x + 1)
        assert y.max() < n


def test_offsets_are_evenly_spread():
    batches = make(stream(200), rows=1)
    per_epoch = batches.rows_per_epoch
    offsets = Counter(int(batches.step_rows(epoch * per_epoch)[0][0]) % 8 for epoch in range(800))
    assert set(offsets) == set(range(8))
    assert min(offsets.values()) > 60
    assert max(offsets.values()) < 140


@pytest.mark.parametrize("bos", [None, 50])
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_ranks_together_have_the_batch_of_one_process(bos, world_size):
    data = stream() if bos is None else names(range(1, 14))
    whole = make(data, bos)
    parts = [make(data, bos, rank=rank, world_size=world_size, micro_rows=1) for rank in range(world_size)]
    for step in range(20):
        total, [(x, y, _)] = whole.global_batch(step)
        shares = [part.global_batch(step) for part in parts]
        assert all(share[0] == total for share in shares)
        micro = [batch for share in shares for batch in share[1]]
        assert torch.equal(torch.cat([m[0] for m in micro]), x)
        assert torch.equal(torch.cat([m[1] for m in micro]), y)
        assert sum(m[2] for m in micro) == total == (y != -1).sum().item()


def test_a_row_holds_one_document():
    data = names([3, 1, 7, 5])
    batches = make(data, 50, rows=4)
    for epoch in range(5):
        _, [(x, y, predicted)] = batches.global_batch(epoch)
        assert predicted == 3 + 1 + 7 + 5 + 4
        seen = set()
        for row, targets in zip(x.tolist(), y.tolist(), strict=True):
            n = targets[0]
            length = [3, 1, 7, 5][n]
            assert row == [50] + [n] * length + [50] * (7 - length)  # the rest of the row is BOS and predicts nothing
            assert targets == [n] * length + [50] + [-1] * (7 - length)
            seen.add(n)
        assert seen == {0, 1, 2, 3}


def test_a_long_document_fills_several_rows():
    data = np.array([50] + list(range(20)), dtype=np.uint16)
    assert module.cut_documents(data, 50, 8).tolist() == [0, 8, 16, 21]
    batches = make(data, 50)
    starts, lengths = batches.validation_rows()
    assert starts.tolist() == [0, 8, 16]
    assert lengths.tolist() == [8, 8, 5]
    x, y, predicted = batches.gather(starts, lengths)
    assert predicted == 21
    assert y[y != -1].tolist() == list(range(20)) + [50]  # every token once, and the BOS at the end
    assert x[2].tolist() == [15, 16, 17, 18, 19, 50, 50, 50]


@pytest.mark.parametrize("scanned", [1, 7, 10, 1000])
def test_documents_are_cut_alike_whatever_is_read_at_a_time(monkeypatch, scanned):
    data = names([3, 20, 1, 8, 5, 0, 0, 40, 9, 2, 7])
    data = np.append(np.uint16([7, 8]), data)  # tokens before the first document are left out
    whole = module.cut_documents(data, 50, 8)
    monkeypatch.setattr(module, "SCANNED", scanned)
    assert module.cut_documents(data, 50, 8).tolist() == whole.tolist()
    assert whole[:5].tolist() == [2, 6, 14, 22, 27] and whole[-1] == len(data)
    assert np.diff(whole).max() == 8 and np.diff(whole).min() == 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("n", [1000, 1001, 1007, 1009])
def test_validation_predicts_every_token_once(n, world_size, monkeypatch):
    monkeypatch.setattr(module, "CPU_EVAL_TOKENS", 80)
    targets, predicted = [], 0
    for rank in range(world_size):
        for x, y, count in make(stream(n), rank=rank, world_size=world_size).validation():
            assert torch.equal((x + 1)[y != -1], y[y != -1])
            targets += y[y != -1].tolist()
            predicted += count
    assert sorted(targets) == list(range(1, n))
    assert predicted == n - 1


def test_validation_of_documents_and_the_cap():
    data = names(range(1, 14))
    y = torch.cat([y for _, y, _ in make(data, 50, block_size=16).validation()])
    assert (y != -1).sum() == len(data)
    capped = list(make(stream(), micro_rows=2).validation(max_rows=5))
    assert sum(count for _, _, count in capped) == 40


@pytest.mark.parametrize("bos", [None, 50])
def test_batches_that_are_made_together_are_those_made_alone(monkeypatch, bos, device):
    """Over epochs that end within a step, with micro-batches of unequal size, on both ranks."""
    data = stream(200) if bos is None else names([3, 20, 1, 8, 5, 0, 9, 2, 7])
    for rank in range(2):
        where = {"rows": 10, "micro_rows": 3, "rank": rank, "world_size": 2, "device": device}
        together = make(data, bos, **where)
        many = [together.global_batch(step) for step in range(40)]
        with monkeypatch.context() as patch:
            patch.setattr("quill.data.batches.AHEAD", 0)
            patch.setattr("quill.data.batches.GPU_AHEAD", 0)
            alone = make(data, bos, **where)
            for step, (total, micro_batches) in enumerate(many):
                one_total, others = alone.global_batch(step)
                assert alone.chunk == 1 and together.chunk >= 40
                assert total == one_total and [len(x) for x, _, _ in micro_batches] == [3, 2]
                for (x, y, n), (u, v, k) in zip(micro_batches, others, strict=True):
                    assert torch.equal(x, u) and torch.equal(y, v) and n == k == (y >= 0).sum()
                    assert x.device.type == device.type and x.is_contiguous() and y.is_contiguous()


@pytest.mark.parametrize("dtype, top", [(np.uint16, 65535), (np.uint32, 100_000)])
def test_large_files_are_mapped_and_prefetched_and_give_the_same(tmp_path, monkeypatch, dtype, top, device):
    data = np.random.default_rng(0).integers(0, top + 1, 5000).astype(dtype)
    data[:2] = top  # ids above half of the type's range are not negative
    data.tofile(tmp_path / "train.bin")
    small = make(data)
    monkeypatch.setattr(module, "ON_DEVICE_BYTES", 1000)
    large = make(np.memmap(tmp_path / "train.bin", dtype=dtype, mode="r"), device=device)
    assert small.prefetcher is None
    assert large.prefetcher is not None
    for step in [0, 1, 2, 7, 8, 3]:
        (x, y, _), (u, v, _) = small.global_batch(step)[1][0], large.global_batch(step)[1][0]
        assert torch.equal(x, u.cpu()) and u.device.type == device.type
        assert torch.equal(y, v.cpu())
        start = small.step_rows(step)[0][0]
        assert x[0].tolist() == data[start : start + 8].tolist()
    (first, *_), *_ = small.validation()
    assert first[0, 0].item() == top


def test_seeds_are_distinct_and_stable():
    """This number may never change, because a run must be repeatable on other machines and versions."""
    assert derive_seed("order", 1337, 0) == 5199327084268123949
    seeds = {derive_seed(purpose, seed, step) for purpose in "ab" for seed in range(30) for step in range(300)}
    assert len(seeds) == 2 * 30 * 300
    assert all(0 <= seed < 2**63 for seed in seeds)


TEXT = "naïve Straße 日本語 🙂\nzwei\n\nÄrger\n" * 40


@pytest.mark.parametrize("documents", ["none", "lines", "blank_lines"])
@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
@pytest.mark.parametrize("cap", [None, 1, 5])
def test_bytes_per_token_are_those_of_the_validation_text(tmp_path, monkeypatch, kind, documents, cap):
    """Of the UTF-8 of exactly the predicted tokens, also if an evaluation is capped, and in pieces of seven tokens."""
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    monkeypatch.setattr(module, "SCANNED", 7)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    prepare(tmp_path / "text.txt", tmp_path / "it", kind, documents, vocab_size=280)
    data = open_dataset(tmp_path, "it")
    batches, bos = make(data.val, data.tokenizer.bos), data.tokenizer.bos
    got = batches.bytes_per_token(data.tokenizer.token_bytes(), cap)
    predicted = sum(batch[2] for batch in batches.validation(cap))
    targets = np.append(data.val[1:], data.val[:1]) if bos is not None else data.val[1:]  # BOS ends the last document
    # The last token may end within a character, whose bytes "surrogateescape" keeps.
    text = data.tokenizer.decode(targets[:predicted], "surrogateescape").encode("utf-8", "surrogateescape")
    assert got == len(text) / predicted
    assert got <= 1 if kind == "byte" else got > 1.05


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_bytes_of_ids_of_the_upper_half(dtype):
    tokens = np.array([0, 40_000, 65_000, 40_000, 1] * 4, dtype=dtype)
    sizes = np.arange(65_001)
    assert make(tokens).bytes_per_token(sizes) == tokens[1:].astype(np.int64).sum() / 19
    assert make(tokens).bytes_per_token(sizes, 1) == tokens[1:9].astype(np.int64).sum() / 8


# ---------------------------------------------------------------- the order of an epoch, as a function


def orders(size, n=1, seed=0):
    """`n` orders of `size` rows, (n, size)."""
    keys = np.random.default_rng(seed).integers(2**63, size=n)
    return shuffled(np.tile(np.arange(size), n), size, np.repeat(keys, size)).reshape(n, size)


def numpys(size, n=1, seed=0):
    """The same by numpy, to test the tests."""
    generator = np.random.default_rng(seed)
    return generator.permuted(np.tile(np.arange(size), (n, 1)), axis=1)


def surprise(counts):
    """How many standard deviations χ² is above what equally likely cells give."""
    expected, free = counts.sum() / counts.size, counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - free) / math.sqrt(2 * free)


@pytest.mark.parametrize("sizes", [range(1, 301), (2**12 - 1, 2**12, 2**12 + 1, 10_007, 313 * 317)])
def test_an_order_is_a_permutation_for_every_size(sizes):
    for size in sizes:
        assert np.array_equal(np.sort(orders(size, seed=size)[0]), np.arange(size)), size


def test_the_order_never_changes():
    """These numbers may never change, because a run must be repeatable on other machines and versions."""
    small = [shuffled(np.arange(size), size, np.full(size, 7)).tolist() for size in (1, 2, 3, 9)]
    assert small == [[0], [1, 0], [0, 1, 2], [8, 1, 4, 0, 7, 3, 2, 6, 5]]
    size, key = 48_828_125_000, derive_seed("order", 1337, 0)  # 100 TB of tokens in blocks of 1024
    places = np.array([0, 1, 2, size // 2, size - 2, size - 1])
    assert shuffled(places, size, np.full(6, key)).tolist() == [
        8_105_193_604,
        11_486_204_200,
        38_375_849_095,
        9_781_086_202,
        35_985_039_813,
        21_912_567_847,
    ]
    batches = make(stream(1003), rows=4)
    rows = [batches.step_rows(step)[0].tolist() for step in (0, 31, 62, 93)]
    assert rows == [[89, 129, 113, 625], [333, 69, 565, 637], [721, 753, 633, 873], [800, 408, 328, 976]]


@pytest.mark.parametrize("make_orders", [orders, numpys])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7])
def test_all_orders_of_a_few_rows_are_equally_likely(size, make_orders):
    """With 7 rows, this would find a network of pairs of odd sizes, which gives even permutations only."""
    found = make_orders(size, 60_000)
    _, counts = np.unique(found @ size ** np.arange(size), return_counts=True)
    assert len(counts) == math.factorial(size)
    assert surprise(counts) < 4


@pytest.mark.parametrize("size", [7, 9, 25, 100, 101])
def test_three_places_hold_any_three_rows(size):
    """Among others, the first three of an order of 9 or 25 rows, which are pairs of two odd numbers."""
    found = orders(size, 200_000 // size)[:, [0, 1, -1]]
    cells = (found * 5 // size) @ [1, 5, 25]
    expected = np.bincount((numpys(size, 200_000 // size, 1)[:, [0, 1, -1]] * 5 // size) @ [1, 5, 25], minlength=125)
    counts = np.bincount(cells, minlength=125)
    both = counts + expected > 10
    chi = ((counts - expected) ** 2 / (counts + expected).clip(1))[both].sum()
    assert abs(chi - both.sum()) < 4 * math.sqrt(2 * both.sum())


def statistics_of(found):
    """For each order: rows at their own place, ascents, neighbours that stay neighbours, correlations."""
    n, size = found.shape
    side = math.isqrt(size)
    centred = found - (size - 1) / 2
    variance = (centred**2).sum(1)
    yield (found == np.arange(size)).sum(1)
    yield (np.diff(found) > 0).sum(1)
    yield (abs(np.diff(found)) == 1).sum(1)
    yield (np.diff(found) % side == 0).sum(1)
    yield centred @ np.arange(size) / variance
    for lag in (1, 2, side, side + 1):
        yield (centred[:, lag:] * centred[:, :-lag]).sum(1) / variance
    yield (centred * np.roll(centred, 1, axis=0)).sum(1) / variance  # of one epoch and the next


def test_orders_have_the_statistics_of_numpys():
    n = 400
    for size in (50, 1000):
        for ours, reference in zip(statistics_of(orders(size, n)), statistics_of(numpys(size, n)), strict=True):
            error = math.sqrt((ours.var() + reference.var()) / n)
            assert abs(ours.mean() - reference.mean()) < 4 * error
            assert 0.8 < ours.std() / reference.std() < 1.25


def test_neighbours_in_a_large_epoch_are_anywhere():
    size, n = 48_828_125_000, 50_000
    rows = shuffled(np.arange(n), size, np.full(n, 5))
    assert len(np.unique(rows)) == n
    for values in (rows, np.diff(rows) % size, np.diff(rows[::2]) % size):
        assert abs(surprise(np.bincount(values * 1000 // size, minlength=1000))) < 4
        assert abs(surprise(np.bincount(values % 1009, minlength=1009))) < 4
    side = math.isqrt(size)
    assert (np.diff(rows // side) == 0).sum() < 8 and (np.diff(rows % side) == 0).sum() < 8  # 0.2 expected


def test_epochs_and_seeds_have_orders_of_their_own():
    first = [make(stream(8008), seed=seed).step_rows(0, 500)[0] // 8 for seed in (0, 1)]  # three epochs of 1,000 rows
    found = np.concatenate([rows.reshape(3, 1000) for rows in first])
    assert len({tuple(order) for order in found}) == 6
    same = [(one == other).sum() for i, one in enumerate(found) for other in found[:i]]
    assert max(same) <= 6  # 1 expected


# ---------------------------------------------------------------- many ranks


@pytest.mark.parametrize("bos", [None, 50])
def test_a_rank_reads_its_own_rows_only(bos, monkeypatch):
    data = stream() if bos is None else names(range(1, 14))
    read = []
    monkeypatch.setattr(Batches, "gather", lambda self, *rows: read.append(rows[0]) or gather(self, *rows))
    totals = {}
    for world_size in (1, 2, 4):
        by_rank = []
        for rank in range(world_size):
            read.clear()
            part = make(data, bos, rows=8, micro_rows=8, rank=rank, world_size=world_size)
            totals[world_size, rank] = [part.global_batch(step)[0] for step in range(part.chunk)]
            by_rank.append(np.concatenate(read).reshape(part.chunk, 8 // world_size))
        whole = make(data, bos, rows=8).step_rows(0, part.chunk)[0].reshape(-1, 8)
        assert np.array_equal(np.concatenate(by_rank, axis=1), whole)
    assert len({tuple(total) for total in totals.values()}) == 1


gather = Batches.gather


@pytest.mark.parametrize("bos", [None, 50])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_evaluates_as_many_batches(bos, world_size, monkeypatch):
    """And together each token once, whatever the size of the split and of the part that is evaluated."""
    monkeypatch.setattr(module, "CPU_EVAL_TOKENS", 24)  # three rows
    blank = 0
    for n in (9, 10, 17, 24, 25, 26, 49, 50, 73, 80, 97, 98, 200):
        data = stream(n) if bos is None else names(range(n % 20 + 1))
        for cap in (None, 1, 3, 4, 1000):
            ranks = [
                [*make(data, bos, rank=i, world_size=world_size, rows=12).validation(cap)] for i in range(world_size)
            ]
            assert len({len(batches) for batches in ranks}) == 1
            in_turn = [batch for batches in zip(*ranks, strict=True) for batch in batches]
            [*whole] = make(data, bos, rows=12).validation(cap)
            some = [batch for batch in in_turn if batch[2]]
            assert [y.tolist() for _, y, _ in some] == [y.tolist() for _, y, _ in whole]
            assert [x.tolist() for x, _, _ in some] == [x.tolist() for x, _, _ in whole]
            for x, y, predicted in in_turn:
                assert x.shape == y.shape and x.shape[1] == 8 and len(x) >= 1
                assert predicted == (y != -1).sum()
                blank += predicted == 0
    assert (blank > 0) == (world_size > 1)


def test_a_batch_that_predicts_nothing_adds_nothing_to_the_loss(monkeypatch):
    monkeypatch.setattr(module, "CPU_EVAL_TOKENS", 24)
    config = TrainConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, eval_iters=0)
    torch.manual_seed(0)
    model, data = GPT(config, 50), stream(50) % 50
    sums, losses = [], []
    keep = SimpleNamespace(sum=lambda total: (sums.append(total), torch.ones(2))[1])
    for world_size in (1, 2, 3, 4):
        sums.clear()
        for rank in range(world_size):
            batches = make(data, rank=rank, world_size=world_size, rows=12)
            evaluate(model, batches, config, SimpleNamespace(autocast=nullcontext, group=keep))
        total = sum(sums)
        assert total[1] == 49
        losses.append((total[0] / total[1]).item())
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-12)
    assert sums[3].tolist() == [0, 0]  # 7 rows are three batches, so the fourth rank has none


# ---------------------------------------------------------------- 100 GB


def sparse(folder, train_bytes, val_bytes):
    """Write a dataset of zeros that takes no room on the disk."""
    folder.mkdir(parents=True)
    splits = {}
    for name, size in {"train": train_bytes, "val": val_bytes}.items():
        with open(folder / f"{name}.bin", "wb") as file:
            file.truncate(size)
        splits[name] = {"tokens": size // 2, "sha256": "not read: the file is too large"}
    tokenizer = {"kind": "byte", "documents": False}
    meta = {"format": 1, "tokenizer": tokenizer, "dtype": "uint16", "documents": False, "splits": splits, "source": {}}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    if sum(path.stat().st_blocks * 512 for path in folder.glob("*.bin")) > 2**20:
        pytest.skip("the file system has no sparse files")


def test_100_gb_of_tokens_take_no_memory(tmp_path, capsys):
    sparse(tmp_path / "huge", 100 * 10**9, 10 * 10**9)
    config = TrainConfig(
        dataset="huge", data_dir=str(tmp_path), block_size=64, batch_size=8, gradient_accumulation_steps=1, eval_iters=3
    )
    group = SimpleNamespace(world_size=2, rank=1, on_rank_0=lambda f, *args: f(*args))
    group.on_all_ranks, group.refuse_differences = group.on_rank_0, lambda values: None
    tracemalloc.start()
    splits = open_splits(config, SimpleNamespace(device=CPU, group=group))
    assert capsys.readouterr().err == ("note: --eval_iters=3 evaluates the first 24 of 78,125,000 rows only\n")
    batches = splits.train_batches
    assert batches.rows_per_epoch == (50 * 10**9 - 64) // 64
    starts, _ = batches.step_rows(0)
    with open(tmp_path / "huge" / "train.bin", "r+b") as file:
        file.seek(2 * int(starts[4]))  # the second rank's first row
        np.arange(1, 66, dtype=np.uint16).tofile(file)
    total, [(x, y, predicted)] = batches.global_batch(0)
    assert (total, predicted) == (512, 256)
    assert x[0].tolist() == [*range(1, 65)] and y[0].tolist() == [*range(2, 66)] and not x[1:].any()
    later = batches.global_batch(10**9)  # in the second epoch
    assert later[0] == 512
    assert sum(count for *_, count in splits.val_batches.validation(24)) == 0  # one batch, and it is the first rank's
    assert splits.val_batches.bytes_per_token(splits.dataset.tokenizer.token_bytes(), 24) == 1
    assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    tracemalloc.stop()


STARTED = """
import quill.start, torch, time, resource, sys
began = time.perf_counter()
import train
from quill.observers import Observers
stepped = Observers.stepped
def first_step(self, *args):
    print(f"FIRST {time.perf_counter() - began:.3f}")
    return stepped(self, *args)
Observers.stepped = first_step
assert train.main(sys.argv[1:]) == 0
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs the peak memory of a process, in KiB")
def test_a_run_on_100_gb_starts_in_two_seconds(tmp_path):
    sparse(tmp_path / "huge", 100 * 10**9, 10 * 10**9)
    shape = ["--n_layer=1", "--n_head=1", "--n_embd=32", "--block_size=64", "--max_iters=1", "--eval_iters=2"]
    where = [f"--data_dir={tmp_path}", "--dataset=huge", "--device=cpu", "--compile=False"]
    seconds = []
    for i in range(3):
        command = [sys.executable, "-c", STARTED, *shape, *where, f"--out_dir={tmp_path / str(i)}"]
        folder = Path(__file__).parent.parent
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        out = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True).stdout
        seconds.append(float(re.search(r"FIRST (\S+)", out)[1]))
        assert int(re.search(r"PEAK (\S+)", out)[1]) < 1e9
    assert min(seconds) < 2


@pytest.mark.parametrize(
    "flags, world_size, line",
    [
        ((12, 1), 5, "=12 × --gradient_accumulation_steps=1 = 12 is not .* 5 processes; it is by 1, 2, 3, 4, 6 or 12"),
        ((1, 1), 2, "= 1 is not divisible by the 2 processes; it is by 1$"),
        ((10**9, 2), 7, "= 2,000,000,000 is not .* the 7 processes; it is by 1, 2, 4, 5, .* 800, 1000 or 1024$"),
    ],
)
def test_the_numbers_of_processes_that_would_divide_the_rows_are_named(data_dir, flags, world_size, line):
    group = SimpleNamespace(world_size=world_size, rank=0, on_rank_0=lambda f, *args: f(*args))
    group.on_all_ranks, group.refuse_differences = group.on_rank_0, lambda values: None
    batch = dict(zip(("batch_size", "gradient_accumulation_steps"), flags, strict=True))
    config = TrainConfig(dataset="prose", data_dir=str(data_dir), block_size=8, **batch)
    with pytest.raises(AgreedError, match=line) as caught:  # no rank is named: all have the error
        open_splits(config, SimpleNamespace(device=CPU, group=group))
    assert "\n" not in str(caught.value)
