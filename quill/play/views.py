"""The numbers of the page's panels, as plain values for JSON, and the check of the fields that a request sends.

sample.py computes the same numbers with the same functions, of quill/trace.py, scoring.py and generation.py. Here they
are in float32 on the CPU. The last checkpoints and contexts are kept, so a new temperature needs no forward pass.
"""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from model import GPT
from quill import checkpoint, cpu, scoring
from quill.cli import coerce, did_you_mean, option_types
from quill.data.batches import derive_seed
from quill.data.token_files import open_dataset
from quill.data.tokenizers import Tokenizer, from_json
from quill.errors import UserError
from quill.generation import COLDEST, generate, probabilities
from quill.options import Checked, option
from quill.play.runs import Runs, UnknownRun
from quill.trace import Trace, attention_steps, rank, trace

SHOWN = 64  # rows and columns of a matrix, tokens of a context, likeliest tokens of a row
MOST_CHOICES = 256  # tokens that may be drawn
MOST_CHARACTERS = 2000  # of a text that is scored: a row for each
BINS = 40  # of a histogram
MOST_TOKENS = 20_000_000  # in a dataset whose lines are compared with the samples


@dataclass(frozen=True)
class Fields(Checked, heading="A request", texts=("name", "matrix", "text", "prompt", "config", "run")):
    """Every field that a request may have. Each address reads its own."""

    name: str = option("bundled", "a run, as /api/runs has it")
    step: int | None = option(None, "a saved step; null for the newest weights", at_least=0)
    matrix: str = option("", "the name of a parameter")
    text: str | None = option(None, "to score, to trace, or to train on")
    layer: int = option(0, "the layer whose attention is shown", at_least=0)
    head: int = option(0, "the head whose attention is shown", at_least=0)
    prompt: str = option("", "as for sample.py --start")
    count: int = option(10, "number of samples", at_least=1, at_most=20)
    max_new_tokens: int = option(200, "longest sample, in tokens", at_least=1, at_most=500)
    temperature: float = option(1.0, "divides the logits; 0 always takes the likeliest token", at_least=0)
    top_k: int | None = option(None, "draw from the k likeliest tokens", at_least=1)
    top_p: float | None = option(None, "draw from the likeliest tokens with this sum", above=0, at_most=1)
    seed: int = option(1337, "the same seed gives the same samples", at_least=0)
    action: Literal["train", "pause", "step"] = option("train", "step: take one step, then wait")
    config: str | None = option(None, "a config to start a run from, such as config/names.py")
    run: str | None = option(None, "a run to start from, in place of a config")
    options: dict[str, Any] = field(default_factory=dict)  # changes to those of the config
    documents: Literal["none", "lines"] = option("none", "whether each line of the text is a document")
    paused: bool = option(False, "the run waits before its first step")


def read_fields(values: Any) -> Fields:
    """Check the fields of a request; null is the default. Raise a UserError for a wrong name, type or value."""
    if not isinstance(values, dict):
        raise UserError("the request must be a JSON object")
    kinds, given = option_types(Fields), {key: value for key, value in values.items() if value is not None}
    for key, value in given.items():
        if key not in kinds:
            raise UserError(f"there is no field {key!r:.80}{did_you_mean(key, kinds)}")
        if key != "options":
            given[key] = coerce(value, kinds[key], "", key)
        elif not isinstance(value, dict):
            raise UserError("options takes an object")
    return Fields(**given)


class Views:
    """The panels: each method answers the requests of one address."""

    def __init__(self, runs: Runs):
        self.runs = runs

    def open(self, asked: Fields) -> tuple[GPT, Tokenizer, dict[str, Any]]:
        """Return the model of a run and a step, its tokenizer and its checkpoint. Raise UnknownRun if there is none."""
        return open_checkpoint(*stamped(self.runs.weights(asked.name, asked.step)))

    def network(self, asked: Fields) -> dict[str, Any]:
        """Return the model's modules, then their biases, with the shape of the matrix and the number of parameters."""
        model, *_ = self.open(asked)
        names, parts = {value: name for name, value in model.named_parameters()}, []  # one name for tied weights
        for name, module in model.named_modules():
            if name in ("", "transformer") or isinstance(module, (nn.Identity, nn.Dropout)):
                continue
            own, size = dict(module.named_parameters(recurse=False)), sum(p.numel() for p in module.parameters())
            rows = [(name, type(module).__name__, own.get("weight"), size)]
            if "bias" in own:
                rows.append((f"{name}.bias", "bias", own["bias"], own["bias"].numel()))
            for part, kind, value, size in rows:
                shape, depth = [] if value is None else list(value.shape), part.removeprefix("transformer.").count(".")
                one = {"name": part, "kind": kind, "shape": shape, "parameters": size, "depth": depth}
                matrix = None if value is None else names[value]
                parts.append(one | {"tied": not (matrix or part).startswith(part), "matrix": matrix})
        return {"parts": parts}

    def matrix(self, asked: Fields) -> dict[str, Any]:
        """Return the values of a parameter, at most SHOWN × SHOWN, its gradient if it is saved, and histograms."""
        model, tokenizer, state = self.open(asked)
        value = dict(model.named_parameters()).get(asked.matrix)
        if value is None:
            raise UnknownRun(f"{asked.name} has no matrix {asked.matrix!r:.80}")
        value, gradient = value.detach(), (state.get("gradients") or {}).get(asked.matrix)
        of_tokens = value.dim() == 2 and len(value) == model.vocab_size <= SHOWN
        return {
            "name": asked.matrix,
            "shape": list(value.shape),
            "values": shrink(value),
            "shrunk": max(value.shape) > SHOWN,
            "row_names": scoring.token_names(tokenizer) if of_tokens else None,
            "gradient": None if gradient is None else shrink(gradient),
            "histogram": histogram(value),
            "gradient_histogram": None if gradient is None else histogram(gradient),
            "mean": value.mean().item(),
            "std": value.std(correction=0).item(),
            "largest": value.abs().max().item(),
        }

    def token(self, asked: Fields) -> dict[str, Any]:
        """Return what sample.py --trace prints about the token after a text, with up to MOST_CHOICES tokens."""
        (model, tokenizer, _), temperature = self.open(asked), asked.temperature
        shape, names = model.config, scoring.token_names(tokenizer)
        if shape.n_layer and (asked.layer >= shape.n_layer or asked.head >= shape.n_head):
            has = f"the model has {shape.n_layer} layers, {shape.n_head} heads"
            raise UserError(f"layer {asked.layer}, head {asked.head}: {has}")
        path, attention = trace_text(model, tokenizer, asked.text or "", asked.layer)
        logits = torch.tensor([path.logits])
        probs = F.one_hot(logits.argmax(dim=-1), len(names)).float()  # at the temperature 0
        if temperature >= COLDEST:
            probs = probabilities(logits, temperature, asked.top_k, asked.top_p)
        probs, choices = (probs[0] / probs.sum()).tolist(), []
        for i, total in rank(path.logits, probs).items():
            scaled = path.logits[i] / temperature if temperature else None
            one = {"id": i, "token": names[i], "logit": path.logits[i], "scaled": scaled}
            choices.append(one | {"probability": probs[i], "sum": total})
        ids = path.ids[-SHOWN:]
        return {
            "ids": ids,
            "tokens": [scoring.START if i == tokenizer.bos else names[i] for i in ids],
            "vectors": path.vectors,
            "attention": {name: heads[asked.head].tolist() for name, heads in attention.items()} or None,
            "n_layer": shape.n_layer,
            "n_head": shape.n_head,
            "choices": choices[:MOST_CHOICES],
        }

    def score(self, asked: Fields) -> dict[str, Any]:
        """Return the JSON of sample.py --score, with more of the likeliest tokens."""
        (model, tokenizer, _), text = self.open(asked), asked.text or ""
        if not scoring.split_documents(text, tokenizer):
            raise UserError("there is no text to score")
        if len(text) > MOST_CHARACTERS:
            raise UserError(f"the text is longer than {MOST_CHARACTERS:,} characters")
        ids, text = scoring.encode(text, tokenizer)
        return json.loads(scoring.to_json(scoring.score(model, tokenizer, ids, 1.0, torch.device("cpu"), SHOWN), text))

    def samples(self, asked: Fields) -> dict[str, Any]:
        """Draw the texts that sample.py draws. is_new: no line of the dataset; None where documents are not lines."""
        model, tokenizer, state = self.open(asked)
        prompt = encode_prompt(tokenizer, asked.prompt).repeat(asked.count, 1)
        drawing = {"temperature": asked.temperature, "top_k": asked.top_k, "top_p": asked.top_p}
        drawing["generator"] = torch.Generator().manual_seed(derive_seed("sample", asked.seed))
        tokens = generate(model, prompt, asked.max_new_tokens, stop_token=tokenizer.bos, **drawing)
        lines, texts = None, []
        with suppress(OSError, ValueError, UserError):  # the dataset is not here
            folder = self.runs.data_dir / str(state["config"].get("dataset"))
            lines = read_lines(tokenizer, *stamped(folder / "meta.json")) if tokenizer.bos_is_newline else None
        for row in tokens[:, prompt.size(1) :].tolist():
            end = row.index(tokenizer.bos) if tokenizer.bos in row else None
            text = asked.prompt + tokenizer.decode(row[:end])
            texts.append({"text": text, "is_new": None if lines is None else text not in lines})
        return {"texts": texts}


def stamped(path: Path) -> tuple[Path, int, int]:
    """Return a file, the time of its last change and its size in bytes: the key of what was read from it in a cache."""
    info = path.stat()
    return path, info.st_mtime_ns, info.st_size


@lru_cache(2)
def open_checkpoint(path: Path, *stamp: int) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Read a checkpoint. → model, tokenizer, the checkpoint. Raise a UserError if it is damaged or has no tokenizer."""
    state = checkpoint.load(path)
    if state["tokenizer"] is None:
        raise UserError(f"{path}: has no tokenizer; sample.py can sample from it")
    return cpu.speed_up(checkpoint.load_model(state)).eval(), from_json(state["tokenizer"]), state


@lru_cache(2)
def trace_text(model: GPT, tokenizer: Tokenizer, text: str, layer: int) -> tuple[Trace, dict[str, torch.Tensor]]:
    """Trace the token after a text. The steps to the attention weights of a layer, if it has any, are (H, T, T)."""
    idx, steps = encode_prompt(tokenizer, text), {}
    if model.config.n_layer:
        (steps,) = attention_steps(model, idx[:, -model.config.block_size :], only=layer)
    shown = {name: heads[:, -SHOWN:, -SHOWN:].clone() for name, heads in steps.items()}
    return trace(model, idx, torch.Generator()), shown  # the token that it draws is not used


@lru_cache(2)
def read_lines(tokenizer: Tokenizer, meta: Path, *stamp: int) -> frozenset[str] | None:
    """Return the documents of a dataset, which are lines; None if it is too large or has another tokenizer."""
    data = open_dataset(meta.parent.parent, meta.parent.name)
    if data.tokenizer != tokenizer or len(data.train) > MOST_TOKENS:
        return None
    return frozenset(tokenizer.decode(np.concatenate([data.train, data.val])).split("\n"))


def encode_prompt(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """Return the ids of a prompt (1, T)."""
    return torch.from_numpy(tokenizer.prompt(text)).long()[None]


def shrink(value: torch.Tensor) -> list[list[float]]:
    """Return a matrix, or a vector as one row, as lists. A side longer than SHOWN becomes means of neighbours."""
    value = value.reshape(-1, value.shape[-1]).float()
    rows, columns = (min(side, SHOWN) for side in value.shape)
    return F.adaptive_avg_pool2d(value[None], (rows, columns))[0].tolist()


def histogram(value: torch.Tensor) -> dict[str, list[float]]:
    """Count the finite values in BINS bins of one width."""
    finite = value[value.isfinite()].double().numpy()
    scale = float(np.abs(finite).max(initial=0)) or 1.0  # else numpy fails where all values are equal and large
    counts, edges = np.histogram(finite / scale, BINS)
    return {"edges": (edges * scale).tolist(), "counts": counts.tolist()}
