"""quill/data/batches.py: every row once per epoch, the same global batch at every world size, exact validation."""

from collections import Counter

import numpy as np
import pytest
import torch

from quill.data import batches as module
from quill.data.batches import Batches, derive_seed, stream_offset
from quill.data.token_files import open_dataset, prepare

CPU = torch.device("cpu")


def make(tokens, bos=None, block_size=8, rows=6, micro_rows=6, seed=0, **where):
    return Batches(
        tokens,
        bos,
        block_size,
        rows=rows,
        micro_rows=micro_rows,
        seed=seed,
        device=CPU,
        **({"rank": 0, "world_size": 1} | where),
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
    starts, lengths = module.cut_documents(data, 50, 8)
    assert starts.tolist() == [0, 8, 16]
    assert lengths.tolist() == [8, 8, 5]
    x, y, predicted = make(data, 50).gather(starts, lengths)
    assert predicted == 21
    assert y[y != -1].tolist() == list(range(20)) + [50]  # every token once, and the BOS at the end
    assert x[2].tolist() == [15, 16, 17, 18, 19, 50, 50, 50]


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
def test_batches_that_are_made_together_are_those_made_alone(monkeypatch, bos):
    """Over epochs that end within a step, with micro-batches of unequal size, on both ranks."""
    data = stream(200) if bos is None else names([3, 20, 1, 8, 5, 0, 9, 2, 7])
    for rank in range(2):
        where = {"rows": 10, "micro_rows": 3, "rank": rank, "world_size": 2}
        together = make(data, bos, **where)
        many = [together.global_batch(step) for step in range(40)]
        with monkeypatch.context() as patch:
            patch.setattr("quill.data.batches.AHEAD", 0)
            alone = make(data, bos, **where)
            for step, (total, micro_batches) in enumerate(many):
                one_total, others = alone.global_batch(step)
                assert alone.chunk == 1 and together.chunk >= 40
                assert total == one_total and [len(x) for x, _, _ in micro_batches] == [3, 2]
                for (x, y, n), (u, v, k) in zip(micro_batches, others, strict=True):
                    assert torch.equal(x, u) and torch.equal(y, v) and n == k == (y >= 0).sum()


@pytest.mark.parametrize("dtype, top", [(np.uint16, 65535), (np.uint32, 100_000)])
def test_large_files_are_mapped_and_prefetched_and_give_the_same(tmp_path, monkeypatch, dtype, top):
    data = np.random.default_rng(0).integers(0, top + 1, 5000).astype(dtype)
    data[:2] = top  # ids above half of the type's range are not negative
    data.tofile(tmp_path / "train.bin")
    small = make(data)
    monkeypatch.setattr(module, "ON_DEVICE_BYTES", 1000)
    large = make(np.memmap(tmp_path / "train.bin", dtype=dtype, mode="r"))
    assert small.prefetcher is None
    assert large.prefetcher is not None
    for step in [0, 1, 2, 7, 8, 3]:
        (x, y, _), (u, v, _) = small.global_batch(step)[1][0], large.global_batch(step)[1][0]
        assert torch.equal(x, u)
        assert torch.equal(y, v)
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
    monkeypatch.setattr(module, "COUNTED", 7)
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
