"""How likely a model finds a text: a row for each token, as a table or as JSON.

The targets are chosen by the same code as in an evaluation (quill/data/batches.py), so the mean loss is what an
evaluation of these ids would report:

    lines       Every line that is not blank is a document, `BOS a n n a BOS`. The BOS that ends it is predicted too.
    documents   Where documents may hold newlines, the whole text is one document.
    a stream    The first token is predicted from a newline, as in sampling with an empty prompt. If the vocabulary has
                no newline, its first character takes its place. So a single character has a score too.

A text longer than block_size is cut into windows that do not overlap. The first token of a window is predicted from
the one token before it. Options, checkpoints and error messages are left to sample.py.

Shapes: N tokens that are predicted, B windows in a batch, T tokens in a window, V = vocab_size.
"""

import json
import math
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch

from model import GPT
from quill.data.batches import Batches
from quill.data.tokenizers import Tokenizer
from quill.errors import check

CONTEXT_WIDTH = 20  # columns for the context
SHOWN = 5  # number of likeliest tokens in a row
START, END = "<start>", "<end>"  # how BOS is shown: before a document, and after it


@dataclass(frozen=True)
class Row:
    """A token of the text, and what the model expected in its place. Texts are as `readable` shows them."""

    context: str  # the end of what the model sees
    likeliest: list[tuple[str, float]]  # tokens and their probabilities, the likeliest first
    token: str  # the token of the text
    probability: float  # its probability
    loss: float  # -ln of its probability, in nats


def split_documents(text: str, tokenizer: Tokenizer) -> list[str]:
    """Split `text` into lines that are not blank, if documents are lines; other text is one document, if not empty."""
    if tokenizer.bos_is_newline:
        return [line for line in text.split("\n") if line.strip()]
    return [text] if text else []


def encode(text: str, tokenizer: Tokenizer) -> tuple[np.ndarray, str]:
    """Encode `text` for `score`. → the ids, uint32, and the text that is scored

    The first id is context only. The final BOS of documents is not among the ids, because `Batches` adds it. A newline
    that BOS replaces is a character of the text. Raise a UserError if the vocabulary lacks a character.
    """
    if tokenizer.is_documents:
        documents = split_documents(text, tokenizer)
        ids = tokenizer.encode_documents(documents)
        text = "".join(document + "\n" * tokenizer.bos_is_newline for document in documents)
    else:
        ids = np.concatenate([tokenizer.prompt(""), tokenizer.encode(text)])
    return ids.astype(np.uint32), text


@torch.inference_mode()
def score(
    model: GPT, tokenizer: Tokenizer, ids: np.ndarray, temperature: float, device: torch.device, shown: int = SHOWN
) -> Iterator[Row]:
    """Yield a Row for each token of `ids`, which `encode` made, with the `shown` likeliest tokens in its place.

    Probabilities are the softmax of logits / temperature, in float32 whatever the model computes in. The model stays
    in evaluation mode. Raise a UserError if the logits are not finite.
    """
    model.eval()
    batches = Batches(ids, tokenizer.bos, model.config.block_size, rows=1, micro_rows=1, seed=0, device=device)
    names = token_names(tokenizer)
    for x, y, _ in batches.validation():
        used = y != -1  # (B, T)
        longest = int(used.sum(1).max())  # texts are often shorter than a block; the rest is padding
        x, y, used = x[:, :longest], y[:, :longest], used[:, :longest]
        logits = model(x)[0][used].float()  # (N, V)
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
        logprobs = logits.log_softmax(dim=-1)
        losses = -logprobs.gather(1, y[used][:, None])[:, 0]
        check(losses.isfinite().all(), "the model's logits are not finite; try --dtype=float32")
        top = logprobs.topk(min(shown, logits.size(-1)))
        contexts = (row[: t + 1] for row, n in zip(x.tolist(), used.sum(1).tolist(), strict=True) for t in range(n))
        columns = (contexts, top.values.tolist(), top.indices.tolist(), y[used].tolist(), losses.tolist())
        for context, top_logprobs, top_ids, token, loss in zip(*columns, strict=True):
            likeliest = [(names[i], math.exp(logprob)) for i, logprob in zip(top_ids, top_logprobs, strict=True)]
            yield Row(context_tail(context, tokenizer), likeliest, names[token], math.exp(-loss), loss)


def perplexity(loss: float) -> float:
    """e to the power of a loss in nats; inf where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float, n_bytes: float) -> float:
    """Return a loss in nats, of `n_bytes` bytes of text, as bits per byte; nan without bytes."""
    return loss / math.log(2) / n_bytes if n_bytes else math.nan


def totals(losses: list[float], text: str) -> dict[str, float]:
    """Sum up the `losses` of the tokens of `text` (nats): total, mean per token, perplexity, bits per character."""
    total, mean = math.fsum(losses), math.fsum(losses) / len(losses)
    n_bytes = len(text.encode("utf-8", "surrogatepass"))
    return {
        "tokens": len(losses),
        "characters": len(text),
        "total_loss": total,
        "mean_loss": mean,
        "perplexity": perplexity(mean),
        "bits_per_character": total / math.log(2) / len(text),
        "bytes": n_bytes,
        "bits_per_byte": bits_per_byte(total, n_bytes),
    }


def readable(text: str) -> list[str]:
    """Return a visible string for each character of `text`, and for each byte decoded with "surrogateescape"."""
    cells = []
    for char in text:
        if "\udc80" <= char <= "\udcff":
            char = f"\\x{ord(char) - 0xDC00:02x}"
        elif char in "\\␣" or not char.isprintable() or unicodedata.category(char).startswith("M"):
            char = char.encode("unicode_escape").decode()
        cells.append("␣" if char == " " else char)
    return cells


def token_names(tokenizer: Tokenizer) -> list[str]:
    """Return how each token is shown, by id: a list of V strings."""
    names = ["".join(readable(tokenizer.decode([i], "surrogateescape"))) for i in range(tokenizer.vocab_size)]
    if tokenizer.bos is not None:
        names[tokenizer.bos] = END
    return names


def context_tail(ids: list[int] | np.ndarray, tokenizer: Tokenizer) -> str:
    """Return the end of a context, at most CONTEXT_WIDTH columns wide; it starts with … if it is shortened."""
    ids = ids[-4 * (CONTEXT_WIDTH + 1) :]  # a character has up to 4 bytes, so this is more than is shown
    is_start = ids[0] == tokenizer.bos  # no context goes beyond the start of its document
    cells = [START] * is_start + readable(tokenizer.decode(ids[is_start:], "surrogateescape"))
    if sum(map(width, cells)) <= CONTEXT_WIDTH:
        return "".join(cells)
    while sum(map(width, cells)) > CONTEXT_WIDTH - 1:
        cells.pop(0)
    return "…" + "".join(cells)


def width(text: str) -> int:
    """Return the number of columns of `text` on a terminal. Chinese, Japanese and Korean characters take two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def pad(text: str, columns: int) -> str:
    """Right-align `text` in a field of `columns` columns."""
    return " " * (columns - width(text)) + text


def table(rows: Iterable[Row], tokenizer: Tokenizer, text: str) -> Iterator[str]:
    """Yield the lines of a table: a header, a line for each of `rows` as soon as it is known, then the totals."""
    token = max(map(width, token_names(tokenizer)))
    likeliest = f"the {SHOWN} likeliest next tokens, with probabilities"
    middle = max(len(likeliest), min(SHOWN, tokenizer.vocab_size) * (token + 8) - 2)
    last = max(token, len("token"))
    yield f"{'context':>{CONTEXT_WIDTH}}  {likeliest:{middle}}  {'token':>{last}}  {'prob.':>6}  {'loss':>7}"
    losses = []
    for row in rows:
        losses.append(row.loss)
        cells = "  ".join(f"{pad(name, token)} {p:.3f}" for name, p in row.likeliest)
        cells += " " * (middle - width(cells))
        p = format(row.probability, ".4f" if row.probability >= 5e-5 else ".0e")
        yield f"{pad(row.context, CONTEXT_WIDTH)}  {cells}  {pad(row.token, last)}  {p:>6}  {row.loss:7.3f}"
    values = totals(losses, text)
    ends = f", counting the end ({END}) of each document" if tokenizer.bos_is_newline else ""
    yield ""
    yield f"{'total loss':20}{values['total_loss']:.4f} nats over {values['tokens']:,} tokens"
    yield f"{'mean loss':20}{values['mean_loss']:.4f} nats a token"
    yield f"{'perplexity':20}{values['perplexity']:.4f}"
    yield f"{'bits per character':20}{values['bits_per_character']:.4f} over {values['characters']:,} characters{ends}"
    yield f"{'bits per byte':20}{values['bits_per_byte']:.4f} over {values['bytes']:,} bytes of UTF-8"


def to_json(rows: Iterable[Row], text: str) -> str:
    """Make one JSON object of the totals and `rows` of `text`. A perplexity that is too large for a float is null."""
    objects = [asdict(row) for row in rows]
    for row in objects:
        row["likeliest"] = [{"token": name, "probability": p} for name, p in row["likeliest"]]
    values = totals([row["loss"] for row in objects], text)
    finite = values["perplexity"] if math.isfinite(values["perplexity"]) else None
    return json.dumps(values | {"perplexity": finite, "rows": objects}, ensure_ascii=False, allow_nan=False)


def count_losses(train: np.ndarray, val: np.ndarray, vocab_size: int) -> dict[str, float]:
    """Return the mean losses (nats) on ids `val` of a die, of tokens and of pairs; counts in `train` start at 1."""
    V, train, val = vocab_size, train.astype(int), val.astype(int)
    singles = np.bincount(train, minlength=V) + 1
    pairs = np.bincount(train[:-1] * V + train[1:], minlength=V * V).reshape(V, V) + 1
    unigram, bigram = singles / singles.sum(), pairs / pairs.sum(axis=1, keepdims=True)
    chances = {"die": np.full(len(val) - 1, 1 / V), "unigram": unigram[val[1:]], "bigram": bigram[val[:-1], val[1:]]}
    return {name: -float(np.log(chance).mean()) for name, chance in chances.items()}
