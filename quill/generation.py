"""Generation: a cache of keys and values, sampling, and one generator that yields tokens as they are drawn.

    for tokens in stream_tokens(model, idx, max_new_tokens=100, temperature=0.8):
        ...                                                              # (B,) int64, one token for each row

The tests compare this file with `GPT.generate` in model.py, which computes the same without a cache.

Shapes: B sequences in a batch, T tokens in a sequence, H heads, D = C / H, V = vocab_size.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from model import GPT
from quill.data.batches import derive_seed
from quill.data.tokenizers import Tokenizer
from quill.errors import check
from quill.machine import Machine
from quill.options import TrainConfig

NOT_FINITE = "the model's logits are not finite: its weights may be damaged; or try --dtype=float32"
COLDEST = 1e-6  # a temperature below this takes the likeliest token: logits / temperature may overflow float32


class KVCache:
    """The keys and values of each layer, of up to `capacity` or block_size tokens. When full, a new one replaces it."""

    def __init__(self, config: Any, capacity: int = 2**31):
        self.length = 0  # tokens that the model has seen; GPT.final_hidden counts them
        self.layers = [LayerCache(min(config.block_size, capacity)) for _ in range(config.n_layer)]


class LayerCache:
    """The part of a KVCache that belongs to one layer."""

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self.stored = torch.empty(0)  # keys and values, (B, 2, H, capacity, D) as soon as B, H and D are known

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store `k`, `v` (B, H, T, D) after the tokens so far. → all keys, all values (B, H, length + T, D)"""
        return self.append_both(torch.stack([k, v], dim=1))

    def append_both(self, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Like `append`, of keys and values in one tensor (B, 2, H, T, D)."""
        if self.length == 0:
            self.stored = kv.new_empty(*kv.shape[:3], self.capacity, kv.size(4))
        start, self.length = self.length, self.length + kv.size(3)
        self.stored[:, :, :, start : self.length] = kv
        keys, values = self.stored[:, :, :, : self.length].unbind(1)
        return keys, values


def sample_token(logits: torch.Tensor, temperature=1.0, top_k=None, top_p=None, generator=None) -> torch.Tensor:
    """Draw one token for each row of `logits` (B, V), with its `probabilities`. → (B,) int64"""
    if temperature < COLDEST:
        check(logits.isfinite().all(), NOT_FINITE)
        return logits.argmax(dim=-1)
    try:
        return torch.multinomial(probabilities(logits, temperature, top_k, top_p), 1, generator=generator).squeeze(1)
    except RuntimeError as error:
        check("probability tensor" not in str(error), NOT_FINITE)
        raise


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


@torch.inference_mode()
def stream_tokens(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_token=None, generator=None):
    """Continue each row of `idx` (B, T), T ≥ 1, by up to `max_new_tokens` tokens. Yields (B,) int64 for each step.

    A row that has drawn `stop_token` repeats it, and generation ends when every row has. temperature, top_k, top_p,
    generator: see `sample_token`. A longer prompt is cut to its last `block_size` tokens. When the context is full,
    generation continues from its last `block_size // 2` tokens, because positions are learned for one block only.
    """
    block_size = model.config.block_size
    context = idx[:, -block_size:]  # the tokens that the next one depends on
    cache = KVCache(model.config, context.size(1) + max_new_tokens)
    done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
    with eval_mode(model):
        for _ in range(max_new_tokens):
            if context.size(1) > block_size:
                context = context[:, -max(1, block_size // 2) :]
                cache = KVCache(model.config)
            hidden = model.final_hidden(context, cache)  # of the tokens that are not in the cache
            token = sample_token(model.lm_head(hidden[:, -1]), temperature, top_k, top_p, generator)
            if stop_token is not None:
                token = token.masked_fill(done, stop_token)
                done |= token == stop_token
            context = torch.cat([context, token[:, None]], dim=1)
            yield token
            if stop_token is not None and done.all():
                return


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
