"""One token's way through a model, as numbers, and the text that `python sample.py --trace=TEXT` makes of them.

Shapes: B rows in a batch, T tokens in the context, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate

import torch

from model import GPT, ngram_vectors
from quill.cli import highlight
from quill.data.tokenizers import Tokenizer
from quill.generation import eval_mode, probabilities, stream_tokens
from quill.scoring import START, pad, token_names, width

SHOWN = 8  # how many tokens and how many numbers of a vector are printed


@dataclass(frozen=True)
class Trace:
    """What the token after a context was drawn from."""

    ids: list[int]  # the tokens that the model sees (T,)
    vectors: dict[str, list[float]]  # the last token's vector (C,) after each part: "wte", "wte + wpe", "block 0", …
    logits: list[float]  # (V,)
    probs: list[float]  # softmax(logits / temperature), with 0 for what top_k and top_p drop (V,)
    numbers: list[float]  # a random number for each token (V,)
    token: int  # the one with the largest probs / numbers


def trace(model: GPT, idx: torch.Tensor, generator: torch.Generator, temperature=1.0, top_k=None, top_p=None) -> Trace:
    """Draw the token after `idx` (B, T) with `stream_tokens`. Return what row 0 was drawn from."""
    parts, seen = model.transformer, {}
    places = {"wte": parts.wte, "ln_e": parts.ln_e} | {f"block {i}": block for i, block in enumerate(parts.h)}
    places |= {"ln_f": parts.ln_f, "lm_head": model.lm_head}
    again = torch.Generator(idx.device)
    again.set_state(generator.get_state())
    with ExitStack() as stack:
        for name, part in places.items():  # each keeps row 0 of its input and of its output
            hook = part.register_forward_hook(lambda _, args, y, name=name: seen.update({name: (args[0][0], y[0])}))
            stack.callback(hook.remove)
        (tokens,) = stream_tokens(model, idx, 1, temperature, top_k, top_p, generator=generator)
    ids, logits = seen["wte"][0].tolist(), seen.pop("lm_head")[1].float()
    vectors = {name: y[-1] for name, (_, y) in seen.items() if not isinstance(places[name], torch.nn.Identity)}
    added = {}
    if parts.ngrams is not None:
        added["ngrams"] = ngram_vectors(idx[:1, -len(ids) :], model.config.ngram, parts.ngrams.weight)[0, -1]
    if parts.wpe is not None:
        added["wpe"] = parts.wpe.weight[len(ids) - 1]
    if added:
        vectors = {"wte": vectors["wte"]} | added | {" + ".join(["wte", *added]): seen["ln_e"][0][-1]} | vectors
    probs = probabilities(logits[None], temperature, top_k, top_p)
    # `stream_tokens` draws these numbers too, and then takes the token with the largest probability / number.
    numbers = probs.repeat(len(idx), 1).exponential_(generator=again)[0]
    vectors = {name: vector.tolist() for name, vector in vectors.items()}
    return Trace(ids, vectors, logits.tolist(), (probs[0] / probs.sum()).tolist(), numbers.tolist(), int(tokens[0]))


@torch.no_grad()
def attention_steps(model: GPT, idx: torch.Tensor, only: int | None = None) -> list[dict[str, torch.Tensor]]:
    """Return each layer's steps to the attention weights on `idx` (1, T). → [{"q kᵀ": (H, T, T), …, "softmax": …}]

    only: the number of a layer; the list has this one alone.
    """
    layers = []

    def keep(layer, args):
        x, rotary, _ = args
        q, k, _ = (part[0].float() for part in layer.qkv(x, rotary))
        scores = q @ k.mT
        scaled = scores / math.sqrt(q.size(-1))
        masked = scaled.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
        names = ("q kᵀ", "q kᵀ / √D", "with the mask", "softmax")
        layers.append(dict(zip(names, (scores, scaled, masked, masked.softmax(dim=-1)), strict=True)))

    with ExitStack() as stack, eval_mode(model):
        for block in model.transformer.h if only is None else [model.transformer.h[only]]:
            stack.callback(block.attn.register_forward_pre_hook(keep).remove)
        model.final_hidden(idx)
    return layers


def trace_lines(path: Trace, steps: dict[str, torch.Tensor], tokenizer: Tokenizer, temperature: float) -> Iterator[str]:
    """Yield lines with the numbers of `path`, and with a table for each of `steps` {title: (T, T)} of a head."""
    names = token_names(tokenizer)
    context = [START if i == tokenizer.bos else names[i] for i in path.ids[-SHOWN:]]
    yield highlight(f"The last {len(context)} of {len(path.ids)} tokens, and their ids")
    yield from table([context, path.ids[-SHOWN:]])
    yield highlight("\nThe vector of the last token: its length, and the first of its numbers")
    yield from table([[name, math.hypot(*vector), *vector[:SHOWN]] for name, vector in path.vectors.items()])
    for title, matrix in steps.items():
        yield highlight(f"\nAttention, {title}: a row for each query, a column for each key")
        last = matrix[-len(context) :, -len(context) :].tolist()
        yield from table([["", *context], *([name, *row] for name, row in zip(context, last, strict=True))])
    yield highlight("\nThe likeliest tokens, and the one that is drawn")
    sums = rank(path.logits, path.probs)
    order = list(sums)
    rows: list = [["token", "logit", f"/ {temperature:g}", "softmax", "running sum", "random", "softmax / random"]]
    for i in order[:SHOWN] + [path.token] * (path.token not in order[:SHOWN]):
        logit, p, number = path.logits[i], path.probs[i], path.numbers[i]
        rows.append([names[i], logit, logit / temperature, p, sums[i], number, p / number])
    yield from table(rows)
    drawn, end = f"{names[path.token]} is drawn: it has the largest softmax / random.", sums[path.token]
    yield f"{drawn} On a wheel from 0 to 1, its part is {end - path.probs[path.token]:.4f} to {end:.4f}."


def rank(logits: list[float], probs: list[float]) -> dict[int, float]:
    """Sort the ids by their logits, the largest first. → {id: the sum of the probabilities down to it}"""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    return dict(zip(order, accumulate(probs[i] for i in order), strict=True))


def table(rows: list) -> list[str]:
    """Align the columns of `rows`, lists of texts and numbers, to the right. → a line for each"""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    columns = [max(map(width, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(pad, row, columns)) for row in cells]
