"""Generation: a cache of keys and values, sampling, and one generator that yields tokens as they are drawn.

    for tokens in stream_tokens(model, idx, max_new_tokens=100, temperature=0.8):
        ...                                                              # (B,) int64, one token for each row

On a GPU, a step is recorded as a CUDA graph, so that its many kernels are launched at once; the gain is not measured
yet. The tests compare this file with `GPT.generate` in model.py, which computes the same without a cache.

Shapes: B sequences in a batch, T tokens in a sequence, H heads, D = C / H, V = vocab_size.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import pad

from model import GPT
from quill.cli import note
from quill.cpu import OneTokenBlock
from quill.data.batches import derive_seed
from quill.data.tokenizers import Tokenizer
from quill.errors import check
from quill.machine import Machine
from quill.options import TrainConfig

NOT_FINITE = "the model's logits are not finite: its weights may be damaged; or try --dtype=float32"
COLDEST = 1e-6  # a temperature below this takes the likeliest token: logits / temperature may overflow float32
AHEAD = 16  # tokens that a GPU draws before Python waits for them; for fewer, no step is recorded


class KVCache:
    """The keys and values of each layer, of up to `capacity` or block_size tokens. With length = 0, it starts again."""

    def __init__(self, config: Any, capacity: int = 2**31):
        self.length = 0  # tokens that the model has seen
        self.layers = [LayerCache(min(config.block_size, capacity)) for _ in range(config.n_layer)]

    def take(self, start: int, end: int) -> slice | torch.Tensor:
        """Make room for the tokens from `start` to `end`. → their positions, as an index"""
        if start == 0:
            for layer in self.layers:
                layer.length = 0
        self.length = end
        return slice(start, end)


class StaticCache(KVCache):
    """A KVCache for which one more token is always the same work on the same memory, so that a GPU can record it.

    Its layers return all their places. `position` (1,) is the last token's; `mask` is -inf for the places after it.
    Once it has tokens, `length` stays block_size - 1, because a recorded step passes the last block_size tokens.
    """

    def __init__(self, model: GPT, capacity: int):
        super().__init__(model.config)
        self.block_size, weight = model.config.block_size, model.lm_head.weight
        places = -(-min(self.block_size, capacity) // 16) * 16  # torch would copy a mask of another size
        self.position, self.mask = weight.new_zeros(1, dtype=torch.long), weight.new_zeros(1, places)
        for layer in self.layers:
            layer.capacity, layer.position, layer.mask = places, self.position, self.mask

    def take(self, start: int, end: int) -> slice | torch.Tensor:  # noqa: D102
        index = super().take(start, end)
        self.length = self.block_size - 1
        if start == 0:
            self.mask.fill_(-math.inf)[:, :end] = 0
            self.position.fill_(end - 1)
            return index
        self.mask.index_fill_(1, self.position.add_(1), 0)
        return self.position


class LayerCache:
    """The part of a KVCache that belongs to one layer."""

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self.position: Any = None  # a StaticCache's
        self.mask: Any = None  # a StaticCache's, added to the scores of one more token (1, places)
        self.stored = torch.empty(0)  # keys and values, (B, 2, H, capacity, D) as soon as B, H and D are known

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Store `k`, `v` (B, H, T, D) after the tokens so far. → all keys, all values (B, H, length + T, D)"""
        return self.append_both(torch.stack([k, v], dim=1))

    def append_both(self, kv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Like `append`, of keys and values in one tensor (B, 2, H, T, D)."""
        if self.stored.numel() == 0:  # with zeros: a masked value has weight 0, but 0 · nan is nan
            self.stored = kv.new_zeros(*kv.shape[:3], self.capacity, kv.size(4))
        if self.length and self.position is not None:
            return self.stored.index_copy_(3, self.position, kv).unbind(1)
        start, self.length = self.length, self.length + kv.size(3)
        self.stored[:, :, :, start : self.length] = kv
        return self.stored[:, :, :, : self.length].unbind(1)


def sample_token(logits, noise, temperature=1.0, top_k=None, top_p=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token for each row of `logits` (B, V). → (B,) int64, and whether the logits are finite, a bool ()

    noise: numbers of the exponential distribution (B, V). The token with the largest probability / noise is drawn, as
    by torch.multinomial, which waits for the GPU.
    """
    if temperature < COLDEST:
        return logits.argmax(dim=-1), logits.isfinite().all()
    probs = probabilities(logits, temperature, top_k, top_p)
    return (probs / noise).argmax(dim=-1), probs.sum() > 0  # the sum is nan if a logit is nan or inf


def probabilities(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Return softmax(logits / temperature), with 0 for the tokens that are not kept. (B, V) → (B, V) float32

    top_k: keep the k likeliest tokens. top_p: keep the fewest of the likeliest tokens whose probabilities sum up to
    top_p or more (nucleus sampling, Holtzman et al. 2019); the sum is then not 1.
    """
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # the likeliest is 0 at any temperature
    if top_k is not None and top_k < logits.size(-1):
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    probs = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:  # float32's running sum may reach 1 too early
        ranked, order = probs.sort(dim=-1, descending=True)
        # Keep a token if the likelier ones sum up to less than top_p, and keep the likeliest in any case.
        drop = ranked.cumsum(dim=-1) - ranked >= top_p
        drop[:, 0] = False
        ranked = ranked.masked_fill(drop, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)
    return probs


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off, and restore the model's mode at the end, also after an exception."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def stream_tokens(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_token=None, generator=None):
    """Continue each row of `idx` (B, T), T ≥ 1, by up to `max_new_tokens` tokens. Yields (B,) int64 for each step.

    A row that has drawn `stop_token` repeats it, and generation ends when every row has. temperature, top_k, top_p: see
    `probabilities`. A longer prompt is cut to its last `block_size` tokens. When the context is full, generation
    continues from its last `block_size // 2` tokens, because positions are learned for one block only. On a
    GPU, AHEAD tokens are drawn before they are yielded, so `generator` may have drawn a few more at the end.
    """
    context, block_size, B = idx, model.config.block_size, len(idx)
    recorded, capacity = can_record(model, idx, max_new_tokens), idx.size(1) + max_new_tokens
    cache = StaticCache(model, capacity) if recorded else KVCache(model.config, capacity)
    recent = idx.new_zeros(B, block_size)  # the end of the context, for recorded steps; before its start are zeros
    noise = torch.empty(B, model.vocab_size, device=idx.device)
    done, finite = noise.new_zeros(B, dtype=torch.bool), noise.new_ones((), dtype=torch.bool)

    @(torch.no_grad() if recorded else torch.inference_mode())  # torch's graphs can't mix them: pytorch/pytorch#166792
    def step():
        nonlocal context
        hidden = model.final_hidden(context, cache)  # of the tokens that are not in the cache
        token, is_finite = sample_token(model.lm_head(hidden[:, -1]), noise, temperature, top_k, top_p)
        finite.logical_and_(is_finite)
        if stop_token is not None:
            token = token.masked_fill(done, stop_token)
            done.logical_or_(token == stop_token)
        longer = torch.cat([context, token[:, None]], dim=1)
        context = recent.copy_(pad(longer, (block_size - longer.size(1), 0))) if recorded else longer  # < 0 cuts

    repeat, ahead = (None, AHEAD) if recorded else (step, 1)
    drawn, kept, free = [], block_size, -1  # free: how many more tokens the cache takes
    with eval_mode(model):
        for left in reversed(range(max_new_tokens)):
            if free < 0:  # at the start, and when the context is full
                context, kept = context[:, -kept:], max(1, block_size // 2)
                cache.length, free = 0, block_size - context.size(1)
            if temperature >= COLDEST:
                noise.exponential_(generator=generator)  # not recorded: a graph would have to know the generator
            if not cache.length:
                step()
            elif repeat:
                repeat()
            else:
                repeat = record(step)
            free -= 1
            drawn.append(context[:, -1].clone())
            if left % ahead == 0:
                check(finite, NOT_FINITE)  # waits for the GPU
                for token, ids in zip(drawn, torch.stack(drawn).tolist(), strict=True):
                    yield token
                    if set(ids) == {stop_token}:
                        return
                drawn = []


def can_record(model: GPT, idx: torch.Tensor, max_new_tokens: int) -> bool:
    """Return whether the steps run on a GPU that can record them, and are enough to record them."""
    on_gpu = idx.is_cuda and idx.get_device() == torch.cuda.current_device() and not torch.is_autocast_enabled("cuda")
    masked = all(isinstance(block, OneTokenBlock) and block.residual and block.mlp for block in model.transformer.h)
    return on_gpu and masked and max_new_tokens > AHEAD


def record(work: Callable[[], None]) -> Callable[[], None]:
    """Do `work` on a GPU, and record it as a CUDA graph. → a function that launches its kernels again, all at once

    They use the same memory again. So `work` reads what changes from tensors, and updates these in place; it draws no
    random numbers, and never waits for the GPU. If it can't be recorded, print a note and return `work` itself. Then
    torch's default generator may fail, so use one of your own.
    """
    recording: Any = torch.cuda.graph(torch.cuda.CUDAGraph())
    recording.capture_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(recording.capture_stream):  # and back at the end, also after a recording that fails
        work()  # what libraries set up when they are first used can't be recorded
        try:
            with recording:  # waits for the GPU first
                work()
        except RuntimeError as error:
            reason = str(error.__context__ or error).strip().partition("\n")[0]
            note(f"note: no CUDA graph was recorded ({reason}); generation continues without it")
            return work
    return recording.cuda_graph.replay


def generate(model: GPT, idx: torch.Tensor, max_new_tokens: int, **options: Any) -> torch.Tensor:
    """Return all tokens of `stream_tokens` at once. → (B, T + new), the prompt included"""
    return torch.stack([*idx.unbind(1), *stream_tokens(model, idx, max_new_tokens, **options)], dim=1)


def draw_samples(
    model: GPT, tokenizer: Tokenizer, count: int, config: TrainConfig, machine: Machine, step: int
) -> list[str]:
    """Draw `count` texts for a training run at `step`, with config.sample_tokens and config.sample_temperature.

    Their random numbers are derived from (seed, step), so that asking for samples changes no training step.
    """
    if not count:
        return []
    generator = torch.Generator(machine.device).manual_seed(derive_seed("sample", config.seed, step))
    prompt = torch.from_numpy(tokenizer.prompt("")).long().to(machine.device).repeat(count, 1)
    options = {"temperature": config.sample_temperature, "stop_token": tokenizer.bos, "generator": generator}
    with machine.autocast():
        tokens = generate(model, prompt, config.sample_tokens, **options)
    return [tokenizer.decode(row[prompt.size(1) :]).strip() for row in tokens.tolist()]
