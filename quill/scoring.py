"""How likely a model finds a text: text → token ids → a row for each token → a table, or JSON.

Options, checkpoints and messages are sample.py's. What is predicted from what is as in validation, by the same code
(quill/data/batches.py), so that the total is what the training loss says of that text:

    documents   every line that is not blank is a document, `BOS a n n a BOS`, and the BOS that ends it is predicted too
    a stream    the first token is predicted from what sampling with an empty prompt starts from, which is a newline
                (where the vocabulary has none, its first character); so a single character has a score as well

A text longer than a block is cut into windows that do not overlap, and the context starts anew in each of them.
"""

import json
import math
import unicodedata
from dataclasses import asdict, dataclass

import numpy as np
import torch

from quill.data.batches import Batches
from quill.data.token_files import join_documents
from quill.errors import UserError
from quill.observers.console import perplexity

CONTEXT_WIDTH = 20  # columns of context in a row
SHOWN = 5  # likeliest tokens in a row
START, END = "<start>", "<end>"  # BOS, as it is shown before a document and after it


@dataclass(frozen=True)
class Row:
    """A token, and what the model expected in its place. Texts are as `readable` shows them."""

    context: str  # the tail of what the model sees
    likeliest: list[tuple[str, float]]  # tokens and their probabilities, the likeliest first
    token: str  # the one that came,
    probability: float
    loss: float  # and -ln of its probability: nats


def split_documents(text, tokenizer):
    """The texts in `text` that begin anew: its lines, as `prepare.py --documents=lines` has them, or all of a stream.

    Empty if there is nothing to score.
    """
    return list(filter(str.strip, text.split("\n"))) if tokenizer.is_documents else list(filter(None, [text]))


def encode(text, tokenizer):
    """`text` → ids (N,) uint32, all but the first to be predicted and for documents one BOS behind them; characters.

    A document's end counts as a character, the newline that BOS stands for: with a token for each character, bits per
    character are then the mean loss / ln 2. A UserError says what the vocabulary lacks.
    """
    if tokenizer.is_documents:
        text = join_documents(split_documents(text, tokenizer))
        ids = tokenizer.encode(text)
    else:
        ids = np.concatenate([tokenizer.prompt(""), tokenizer.encode(text)])
    return ids.astype(np.uint32), len(text)


@torch.inference_mode()
def score(model, tokenizer, ids, temperature, device):
    """`ids` as from `encode` → yields a Row for each token. Dropout is off from here on.

    Probabilities are of logits / temperature, in float32 whatever the model computes in.
    """
    model.eval()
    batches = Batches(ids, tokenizer.bos, model.config.block_size, rows=1, micro_rows=1, seed=0, device=device)
    names = token_names(tokenizer)
    for x, y, _ in batches.validation():
        used = y != -1  # (B, T)
        longest = int(used.sum(1).max())  # texts are often shorter than a block: the rest is padding
        x, y, used = x[:, :longest], y[:, :longest], used[:, :longest]
        logits = model(x)[0][used].float()  # (N, V), of the N tokens that are predicted
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
        logprobs = logits.log_softmax(dim=-1)
        losses = -logprobs.gather(1, y[used][:, None])[:, 0]
        if not losses.isfinite().all():
            raise UserError("the model's logits are not finite; try --dtype=float32")
        top = logprobs.topk(min(SHOWN, logits.size(-1)))
        contexts = (row[: t + 1] for row, n in zip(x.tolist(), used.sum(1).tolist(), strict=True) for t in range(n))
        columns = (contexts, top.values.tolist(), top.indices.tolist(), y[used].tolist(), losses.tolist())
        for context, top_logprobs, top_ids, token, loss in zip(*columns, strict=True):
            likeliest = [(names[i], math.exp(logprob)) for i, logprob in zip(top_ids, top_logprobs, strict=True)]
            yield Row(context_tail(context, tokenizer), likeliest, names[token], math.exp(-loss), loss)


def totals(losses, characters):
    """The sum of `losses` in nats, and what it is a token and a character."""
    total, mean = math.fsum(losses), math.fsum(losses) / len(losses)
    return {
        "tokens": len(losses),
        "characters": characters,
        "total_loss": total,
        "mean_loss": mean,
        "perplexity": perplexity(mean),
        "bits_per_character": total / math.log(2) / characters,
    }


# ---------------------------------------------------------------- to be read


def readable(text, bos=None):
    """A list with a string for each character of `text`, so that it is seen and takes columns of its own.

    A space is ␣. Control characters, combining marks and bytes that are no character ("surrogateescape") are escaped.
    bos: what a newline is shown as, where it is a document's edge.
    """
    cells = []
    for char in text:
        if char == "\n" and bos:
            char = bos
        elif char == " ":
            char = "␣"
        elif "\udc80" <= char <= "\udcff":
            char = f"\\x{ord(char) - 0xDC00:02x}"
        elif char in "\\␣" or not char.isprintable() or unicodedata.category(char).startswith("M"):
            char = char.encode("unicode_escape").decode()
        cells.append(char)
    return cells


def token_names(tokenizer):
    """Every token as it is shown, by id. → (V,)"""
    end = END if tokenizer.is_documents else None
    return ["".join(readable(tokenizer.decode([i], "surrogateescape"), end)) for i in range(tokenizer.vocab_size)]


def context_tail(ids, tokenizer):
    """The end of a context, at most CONTEXT_WIDTH columns wide, with … before it where it is shortened."""
    ids = ids[-4 * (CONTEXT_WIDTH + 1) :]  # a character has up to 4 bytes: this is more than is shown
    cells = readable(tokenizer.decode(ids, "surrogateescape"), START if tokenizer.is_documents else None)
    if sum(map(width, cells)) <= CONTEXT_WIDTH:
        return "".join(cells)
    while sum(map(width, cells)) > CONTEXT_WIDTH - 1:
        cells.pop(0)
    return "…" + "".join(cells)


def width(text):
    """Columns that `text` takes on a terminal: Chinese, Japanese and Korean characters take two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def pad(text, columns):
    return " " * (columns - width(text)) + text


def table(rows, tokenizer, characters):
    """Yields the lines of a table, one for each of `rows` as it comes, and the totals below them."""
    token = max(map(width, token_names(tokenizer)))
    likeliest = f"the {SHOWN} likeliest next tokens, with probabilities"
    middle = max(len(likeliest), min(SHOWN, tokenizer.vocab_size) * (token + 8) - 2)
    came = max(token, len("token"))
    yield f"{'context':>{CONTEXT_WIDTH}}  {likeliest:{middle}}  {'token':>{came}}  {'prob.':>6}  {'loss':>7}"
    losses = []
    for row in rows:
        losses.append(row.loss)
        cells = "  ".join(f"{pad(name, token)} {p:.3f}" for name, p in row.likeliest)
        cells += " " * (middle - width(cells))
        p = row.probability
        p = f"{p:.4f}" if p >= 5e-5 else f"{p:.0e}"
        yield f"{pad(row.context, CONTEXT_WIDTH)}  {cells}  {pad(row.token, came)}  {p:>6}  {row.loss:7.3f}"
    values = totals(losses, characters)
    ends = f", the end of a document ({END}) being one" if tokenizer.is_documents else ""
    yield ""
    yield f"{'total loss':20}{values['total_loss']:.4f} nats over {values['tokens']:,} tokens"
    yield f"{'mean loss':20}{values['mean_loss']:.4f} nats a token"
    yield f"{'perplexity':20}{values['perplexity']:.4f}"
    yield f"{'bits per character':20}{values['bits_per_character']:.4f} over {characters:,} characters{ends}"


def to_json(rows, characters):
    """One JSON object: the totals, and `rows`. A perplexity too large for a number is null."""
    rows = [asdict(row) for row in rows]
    for row in rows:
        row["likeliest"] = [{"token": name, "probability": p} for name, p in row["likeliest"]]
    values = totals([row["loss"] for row in rows], characters)
    if math.isinf(values["perplexity"]):
        values["perplexity"] = None
    return json.dumps(values | {"rows": rows}, ensure_ascii=False, allow_nan=False)
