"""Token files to batches. The batch of a step depends on (seed, step) alone, so there is no loader state to save.

A batch is `(x, y)`, both (B, T) int64. `y` is `x` shifted by one, and -1 where nothing is predicted.

A *row* is the piece of a token file that fills one row of a batch. It is given by its start and by its length, the
number of tokens that it predicts. A stream is cut into rows of block_size tokens, from an offset that depends on the
epoch. Over the epochs the offset takes every possible value, so that every token is predicted. A document fills a row
by itself, or several rows if it is longer than block_size; two documents never share a row. Every row is used once per
epoch, in a random order that differs from epoch to epoch. Only the order of a step's rows is computed, so a run on a
stream starts as fast, and needs as little memory, whatever the stream's size.

Shapes: N tokens in a file, R rows, B rows in a batch, T = block_size.
"""

import hashlib
import math
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import chain

import numpy as np
import torch

Rows = tuple[np.ndarray, np.ndarray]  # starts and lengths, (R,) each
Batch = tuple[torch.Tensor, torch.Tensor, int]  # x and y, (B, T) each, and the number of tokens that they predict

DATA_ORDER = 3  # of new runs. 1 (quill 0.1) and 2 sort random numbers. With 1, no offset reached a stream's last tokens

ON_DEVICE_BYTES = 256 * 2**20  # a token file up to this size is copied to the device as a whole
CPU_EVAL_TOKENS = 2048  # tokens in an evaluation batch: on a CPU, as many as stay in its cache
GPU_EVAL_TOKENS = 16384  # on a GPU, more of them at once are faster
AHEAD = 2**13  # tokens of small global batches that are made together, because many short operations cost time
GPU_AHEAD = 2**20  # on a GPU, more: each copy of the rows' starts waits until all earlier steps are done
ROUNDS = 24  # of `shuffled`, an even number. With 24, even the orders of eight rows are equally likely
SCANNED = 2**20  # tokens that are read at a time where all are read, so that a long split is not copied


def derive_seed(*parts: str | int) -> int:
    """Return a 63-bit seed for one purpose, such as ("order", seed, epoch), the same on every machine and version."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def shuffled(places: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Return the rows at `places` (n,) of random orders of `size` rows; `keys` (n,) says of which order. All int64.

    It is the generalized Feistel cipher of Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002). A row is
    a pair (left, right). There may be a few more pairs than rows; a result that is not a row is permuted again.
    """
    n_left = (math.isqrt(size - 1) + 1) // 2 * 2 or 2  # about √size. If both were odd, some orders would be impossible
    n_right = -(-size // n_left)
    left, right = np.divmod(places.astype(np.uint64), n_right)
    for i in range(ROUNDS):
        words = right + keys.astype(np.uint64) + (i + 1) * 0x9E3779B97F4A7C15 % 2**64  # hashed as in SplitMix64 (2014)
        words = (words ^ (words >> 30)) * 0xBF58476D1CE4E5B9
        words = (words ^ (words >> 27)) * 0x94D049BB133111EB
        left, right, n_left, n_right = right, (left + (words >> 31)) % n_left, n_right, n_left
    rows = (left * n_right + right).astype(np.int64)
    outside = rows >= size
    if outside.any():
        rows[outside] = shuffled(rows[outside], size, keys[outside])
    return rows


def cut_documents(tokens: np.ndarray, bos: int, block_size: int) -> np.ndarray:
    """Cut `tokens` (N,) into rows that hold one document each, in order. → where each row starts, and N: (R + 1,)

    `BOS a b c` predicts 4 tokens: a, b, c and the BOS that ends it. A document that predicts more than block_size
    tokens is cut into several rows. So a row predicts as many tokens as there are to the start of the next.

    All tokens are read: 1 GB takes 0.3 s and 9 MiB (500 tokens in a document, n = 8). Make 100 GB a stream instead.
    """
    found = (i + np.flatnonzero(tokens[i : i + SCANNED] == bos) for i in range(0, len(tokens), SCANNED))
    rows, last = [], np.zeros(0, np.int64)
    for starts in chain(found, [[len(tokens)]]):
        starts = np.append(last, starts)
        pieces = -(-np.diff(starts) // block_size)
        piece = np.arange(pieces.sum()) - np.repeat(pieces.cumsum() - pieces, pieces)  # 0, 1, … within each document
        rows.append(np.repeat(starts[:-1], pieces) + piece * block_size)
        last = starts[-1:]  # it ends where the next document starts, which may be in the next SCANNED tokens
    return np.concatenate([*rows, last])


def stream_offset(seed: int, epoch: int, slack: int, block_size: int, data_order: int) -> int:
    """Return the offset from which `epoch` cuts a stream, 0 ≤ offset ≤ slack.

    slack: the number of tokens that an epoch leaves out. From epoch to epoch, the offset moves by about 0.618 of its
    range. So it takes each value once in slack + 1 epochs, and a few epochs already spread over the whole range.
    """
    if data_order == 1:
        return derive_seed("phase", seed, epoch) % (min(slack, block_size - 1) + 1)
    stride = round(0.618034 * (slack + 1))
    while math.gcd(stride, slack + 1) > 1:
        stride += 1
    return (derive_seed("phase", seed, 0) + epoch * stride) % (slack + 1)


class Batches:
    """The batches of one split, for one rank. An epoch has `rows_per_epoch` rows, the whole split `rows_in_all`."""

    def __init__(
        self,
        tokens: np.ndarray,
        bos: int | None,
        block_size: int,
        *,
        rows: int,
        micro_rows: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        data_order: int = DATA_ORDER,
    ) -> None:
        """Find the rows of a split, and copy it to the device if it is small.

        tokens: the split (N,), uint16 or uint32; it may be memory-mapped.
        bos: the id that starts a document; None for a stream, which must have more than block_size tokens.
        rows: rows in the global batch of a step, over all ranks; a multiple of world_size.
        micro_rows: maximum number of rows in a micro-batch.
        data_order: DATA_ORDER, or the lower one of an older run.
        """
        assert rows % world_size == 0, "every rank takes the same number of rows"
        self.bos, self.block_size, self.device = bos, block_size, device
        self.rows, self.micro_rows = rows, micro_rows
        self.seed, self.rank, self.world_size, self.data_order = seed, rank, world_size, data_order
        self.n_tokens = len(tokens)
        self.id_mask = np.iinfo(tokens.dtype).max
        if bos is None:
            # With so few windows, the offset can be any number from 0 to block_size - 1. So no token is at the edge of
            # a window in every epoch.
            self.rows_per_epoch = max(1, (self.n_tokens - block_size) // block_size)
            self.rows_in_all = -(-(self.n_tokens - 1) // block_size)
        else:
            self.row_starts = cut_documents(tokens, bos, block_size)
            self.rows_per_epoch = self.rows_in_all = len(self.row_starts) - 1
        # torch can index signed integers only, so ids of the upper half are negative until `id_mask` is applied.
        signed = tokens.view(np.int16 if tokens.dtype.itemsize == 2 else np.int32)
        self.on_device = tokens.nbytes <= ON_DEVICE_BYTES
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # a mapped file is only read
            self.tokens = torch.from_numpy(np.array(signed)).to(device) if self.on_device else torch.from_numpy(signed)
        self.positions = torch.arange(block_size + 1, device=self.tokens.device)
        self.order = lru_cache(maxsize=2)(self._order)  # rows at the end of an epoch and at the start of the next
        self.prefetcher = None if self.on_device else ThreadPoolExecutor(1, "prefetch")
        self.prefetched: dict[int, Future[list[tuple[int, list[Batch]]]]] = {}  # the next step's batch, by its step
        ahead = AHEAD if device.type == "cpu" else GPU_AHEAD
        ahead = min(256, ahead // (rows * block_size)) if self.on_device else 1
        self.chunk = max(1, ahead)  # steps whose batches are made together
        self.row_chunk = self.chunk * max(1, 2**11 // (self.chunk * rows))  # steps whose rows are computed together
        self.made = lru_cache(maxsize=1)(self._make_global_batches)
        self.chunk_rows = lru_cache(maxsize=1)(self.step_rows)

    def _order(self, epoch: int) -> np.ndarray:
        """Return the order of an epoch's rows with a data_order below 3: a permutation (rows_per_epoch,)."""
        words = np.random.Philox(key=derive_seed("order", self.seed, epoch)).random_raw(self.rows_per_epoch)
        return np.argsort(words, kind="stable")

    def step_rows(self, step: int, steps: int = 1) -> Rows:
        """Return the rows of the global batches of `steps` steps, on all ranks: starts and lengths, (steps × rows,)."""
        nth = step * self.rows + np.arange(steps * self.rows)  # counted from the start of the run, over all epochs
        epochs, places = np.divmod(nth, self.rows_per_epoch)
        all_epochs, epoch = range(epochs[0], epochs[-1] + 1), epochs - epochs[0]
        if self.data_order < 3:
            row = np.concatenate([self.order(e)[places[epochs == e]] for e in all_epochs])
        else:
            keys = np.array([derive_seed("order", self.seed, e) for e in all_epochs])
            row = shuffled(places, self.rows_per_epoch, keys[epoch])
        if self.bos is not None:
            return self.row_starts[row], self.row_starts[row + 1] - self.row_starts[row]
        slack = self.n_tokens - 1 - self.rows_per_epoch * self.block_size
        offsets = [stream_offset(self.seed, e, slack, self.block_size, self.data_order) for e in all_epochs]
        return np.array(offsets)[epoch] + row * self.block_size, np.full_like(row, self.block_size)

    def global_batch(self, step: int) -> tuple[int, list[Batch]]:
        """Make this rank's part of a step's global batch, as micro-batches with x and y (at most micro_rows, T).

        → the number of tokens that the global batch predicts on all ranks, [(x, y, tokens predicted)]
        """
        if self.prefetcher is None:
            return self.made(step - step % self.chunk)[step % self.chunk]
        batch = self.prefetched.get(step) or self.prefetcher.submit(self._make_global_batches, step)
        self.prefetched = {step + 1: self.prefetcher.submit(self._make_global_batches, step + 1)}
        return batch.result()[0]

    def _make_global_batches(self, step: int) -> list[tuple[int, list[Batch]]]:
        first = step - step % self.row_chunk
        here = slice(step - first, step - first + self.chunk)
        starts, lengths = (part.reshape(-1, self.rows)[here] for part in self.chunk_rows(first, self.row_chunk))
        totals = lengths.sum(axis=1).tolist()
        mine = slice(self.rank * self.rows // self.world_size, (self.rank + 1) * self.rows // self.world_size)
        starts, lengths = starts[:, mine], lengths[:, mine]
        x, y, _ = self.gather(starts.ravel(), lengths.ravel())
        x, y = x.unflatten(0, starts.shape), y.unflatten(0, starts.shape)  # (steps, B, T)
        cuts = [slice(i, i + self.micro_rows) for i in range(0, starts.shape[1], self.micro_rows)]
        micro = [[(x[i, cut], y[i, cut], int(lengths[i, cut].sum())) for cut in cuts] for i in range(self.chunk)]
        return list(zip(totals, micro, strict=True))

    def validation_rows(self, first: int = 0, last: int | None = None) -> Rows:
        """Return rows first … last - 1 of the split, in order: all together predict each token but a stream's first."""
        last = self.rows_in_all if last is None else min(last, self.rows_in_all)
        if self.bos is not None:
            ends = self.row_starts[first : last + 1]
        else:
            ends = np.minimum(np.arange(first, last + 1) * self.block_size, self.n_tokens - 1)
        return ends[:-1], np.diff(ends)

    def validation(self, max_rows: int | None = None) -> Iterator[Batch]:
        """Yield this rank's share of the split's batches (x, y, tokens predicted), in order.

        The ranks take batches in turn. Each rank yields the same number, because a forward pass of a sharded model
        waits for all ranks. So a rank's last batch may predict 0 tokens, and then its mean loss is NaN.
        max_rows: evaluate the first rows only; None evaluates all of them.
        """
        wanted = CPU_EVAL_TOKENS if self.device.type == "cpu" else GPU_EVAL_TOKENS
        size = max(1, wanted // self.block_size)
        end = min(max_rows or self.rows_in_all, self.rows_in_all)
        for i in range(self.rank * size, end + self.rank * size, self.world_size * size):
            yield self.gather(*(self.validation_rows(i, min(i + size, end)) if i < end else np.zeros((2, 1), int)))

    def bytes_per_token(self, token_bytes: np.ndarray, max_rows: int | None = None) -> float:
        """Return the mean of `token_bytes`, by id, over what `validation(max_rows)` predicts on all ranks."""
        # The rows lie next to each other, and so do the tokens that they predict.
        end = min(max_rows or self.rows_in_all, self.rows_in_all)
        (first,), (last,), (length,) = self.validation_rows(0, 1)[0], *self.validation_rows(end - 1, end)
        predicted = int(last + length - first)
        sizes = torch.from_numpy(token_bytes).to(self.tokens.device)
        pieces = self.tokens[first + 1 : first + 1 + predicted].split(SCANNED)
        total = sum(int(sizes[piece.long() & int(self.id_mask)].sum()) for piece in pieces)
        if first + predicted == self.n_tokens:  # the BOS that ends the last document is not in the file
            total += int(token_bytes[self.bos])
        return total / predicted

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> Batch:
        """Read rows, given by starts and lengths (B,), as (x, y, tokens predicted); x and y are (B, T) on the device.

        Where a row predicts fewer than T tokens, x is padded with BOS (0 for a stream) and y with -1.
        """
        at = torch.from_numpy(starts).to(self.tokens.device)[:, None] + self.positions
        window = self.tokens[at.clamp(max=self.n_tokens - 1)].long() & int(self.id_mask)
        if self.bos is not None:
            window.masked_fill_(at >= self.n_tokens, self.bos)  # BOS ends the last document too
        x, y = window[:, :-1], window[:, 1:]
        if (lengths < self.block_size).any():
            unused = self.positions[:-1] >= torch.from_numpy(lengths).to(self.tokens.device)[:, None]
            x = x.masked_fill(unused, self.bos or 0)
            y = y.masked_fill(unused, -1)
        x, y = x.contiguous(), y.contiguous()  # always: a model that is compiled is compiled again for other strides
        if not self.on_device and self.device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True), int(lengths.sum())
