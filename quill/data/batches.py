"""Token files → batches. The batch of a step is a pure function of (seed, step): there is no loader state to save.

`(x, y)` of shape (B, T), int64; `y` is `x` shifted by one, and -1 where nothing is to be predicted.

A *row* is a piece of the token file that fills one row of a batch, given by its start and by how many tokens it
predicts. A stream is cut into rows of block_size tokens, at a phase of the epoch's own; a document is a row of its own
(or several, when it is longer than a block), never joined with its neighbour. Every row comes once an epoch.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

ON_DEVICE_BYTES = 256 * 2**20  # a token file up to this size is copied to the device whole
CPU_EVAL_TOKENS = 2048  # tokens in an evaluation batch: what stays in a CPU's cache is faster,
GPU_EVAL_TOKENS = 16384  # and a GPU wants more at once


def derive_seed(*parts):
    """A 63-bit seed for one purpose, such as ("order", seed, epoch); the same on every machine and version."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream_rows(n_tokens, block_size):
    """All of a stream in order, in windows that do not overlap; the last may be short. → starts, lengths (R,)"""
    starts = np.arange(0, n_tokens - 1, block_size)
    return starts, np.minimum(block_size, n_tokens - 1 - starts)


def document_rows(tokens, bos, block_size):
    """Documents in order: `BOS a b c` predicts 4 tokens, the last being the BOS that ends it. → starts, lengths (R,)

    A document that predicts more than block_size tokens gives several rows.
    """
    starts = np.flatnonzero(tokens == bos)
    lengths = np.diff(starts, append=len(tokens))
    pieces = -(-lengths // block_size)
    piece = np.arange(pieces.sum()) - np.repeat(pieces.cumsum() - pieces, pieces)  # 0, 1, … within each document
    lengths = np.repeat(lengths, pieces) - piece * block_size
    return np.repeat(starts, pieces) + piece * block_size, np.minimum(block_size, lengths)


class Batches:
    """Batches of one split for one rank.

    tokens: a token file (N,), uint16 or uint32, memory-mapped. bos: the id that starts a document, None for a stream.
    rows: rows in a step's global batch. micro_rows: most rows in one micro-batch.
    """

    def __init__(self, tokens, bos, block_size, *, rows, micro_rows, seed, device, rank=0, world_size=1):
        assert rows % world_size == 0, "every rank takes the same number of rows"
        self.bos, self.block_size, self.device = bos, block_size, device
        self.rows, self.micro_rows = rows, micro_rows
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.n_tokens = len(tokens)
        self.id_mask = np.iinfo(tokens.dtype).max
        if bos is None:
            # Leaving out one window gives the phase its whole range, so that no place is always a window's edge.
            self.rows_per_epoch = max(1, (self.n_tokens - block_size) // block_size)
        else:
            self.document_rows = document_rows(tokens, bos, block_size)
            self.rows_per_epoch = len(self.document_rows[0])
        # torch indexes signed integers only; `id_mask` undoes the sign.
        signed = tokens.view(np.int16 if tokens.dtype.itemsize == 2 else np.int32)
        self.on_device = tokens.nbytes <= ON_DEVICE_BYTES
        self.tokens = torch.from_numpy(np.array(signed)).to(device) if self.on_device else torch.from_numpy(signed)
        self.offsets = torch.arange(block_size + 1, device=self.tokens.device)
        self.order = lru_cache(maxsize=2)(self._order)  # of this epoch and, where a step straddles two, the next
        self.prefetcher = None if self.on_device else ThreadPoolExecutor(1, "prefetch")
        self.prefetched = (None, None)  # step, future

    def _order(self, epoch):
        """The rows of an epoch, shuffled. → (rows_per_epoch,)

        Ranks of raw Philox words and not Generator.permutation, whose algorithm numpy may change between versions.
        """
        words = np.random.Philox(key=derive_seed("order", self.seed, epoch)).random_raw(self.rows_per_epoch)
        return np.argsort(words, kind="stable")

    def step_rows(self, step):
        """The rows of step's global batch. → starts, lengths (rows,)"""
        nth = step * self.rows + np.arange(self.rows)  # the run's nth row, counted over all epochs
        epochs, places = np.divmod(nth, self.rows_per_epoch)
        starts, lengths = np.empty_like(nth), np.full_like(nth, self.block_size)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            row = self.order(int(epoch))[places[here]]
            if self.bos is None:
                slack = self.n_tokens - 1 - self.rows_per_epoch * self.block_size
                phase = derive_seed("phase", self.seed, int(epoch)) % (min(slack, self.block_size - 1) + 1)
                starts[here] = phase + row * self.block_size
            else:
                starts[here], lengths[here] = self.document_rows[0][row], self.document_rows[1][row]
        return starts, lengths

    def global_batch(self, step):
        """→ tokens that step's global batch predicts, and this rank's micro-batches [(x, y, tokens predicted)]"""
        if self.prefetcher is None:
            return self._make_global_batch(step)
        ready, future = self.prefetched
        batch = future.result() if ready == step else self._make_global_batch(step)
        self.prefetched = (step + 1, self.prefetcher.submit(self._make_global_batch, step + 1))
        return batch

    def _make_global_batch(self, step):
        starts, lengths = self.step_rows(step)
        total = int(lengths.sum())
        mine = slice(self.rank * self.rows // self.world_size, (self.rank + 1) * self.rows // self.world_size)
        starts, lengths = starts[mine], lengths[mine]
        cuts = range(0, len(starts), self.micro_rows)
        return total, [self.gather(starts[i : i + self.micro_rows], lengths[i : i + self.micro_rows]) for i in cuts]

    def validation_rows(self):
        """The rows of the whole split, in order. → starts, lengths (R,)"""
        return stream_rows(self.n_tokens, self.block_size) if self.bos is None else self.document_rows

    def validation(self, max_rows=None):
        """The split in order, shared out over the ranks batch by batch: yields (x, y, tokens predicted)."""
        starts, lengths = (part[:max_rows] for part in self.validation_rows())
        wanted = CPU_EVAL_TOKENS if self.device.type == "cpu" else GPU_EVAL_TOKENS
        size = max(1, wanted // self.block_size)
        for i in range(self.rank * size, len(starts), self.world_size * size):
            yield self.gather(starts[i : i + size], lengths[i : i + size])

    def gather(self, starts, lengths):
        """Rows → (x, y, tokens predicted), x and y (len(starts), block_size) on the device."""
        at = torch.from_numpy(starts).to(self.tokens.device)[:, None] + self.offsets
        window = self.tokens[at.clamp(max=self.n_tokens - 1)].long() & int(self.id_mask)
        if self.bos is not None:
            window.masked_fill_(at >= self.n_tokens, self.bos)  # the end of the last document
        x, y = window[:, :-1], window[:, 1:]
        if (lengths < self.block_size).any():
            unused = self.offsets[:-1] >= torch.from_numpy(lengths).to(self.tokens.device)[:, None]
            x = x.masked_fill(unused, self.bos or 0)
            y = y.masked_fill(unused, -1)
        if not self.on_device and self.device.type == "cuda":
            x, y = x.contiguous().pin_memory(), y.contiguous().pin_memory()
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True), int(lengths.sum())
