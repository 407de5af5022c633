"""The numbers of the page's panels: a model and a request in, plain values for JSON out.

The functions are those of sample.py: quill/trace.py, scoring.py and generation.py. They compute on the CPU in float32.

Shapes: T tokens in the context, C = n_embd, V = vocab_size.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from model import GPT
from quill import checkpoint, cpu, scoring
from quill.data.batches import derive_seed
from quill.data.token_files import open_dataset
from quill.data.tokenizers import Tokenizer, from_json
from quill.errors import UserError
from quill.generation import COLDEST, generate, probabilities
from quill.play.fields import Fields
from quill.play.runs import Runs, UnknownRun
from quill.trace import attention_steps, look_inside, rank

CPU = torch.device("cpu")
SHOWN = 64  # rows, columns and tokens of the context that are shown
MOST_CHOICES = 256  # tokens that may be drawn, in a list
BINS = 40  # of a histogram
MOST_TOKENS = 20_000_000  # of a dataset whose documents are compared with samples


@dataclass(frozen=True, eq=False)
class Opened:
    """A checkpoint that was read."""

    model: GPT
    tokenizer: Tokenizer
    dataset: str
    gradients: dict[str, torch.Tensor]


class Views:
    """The panels of the runs of `runs`. One thread may call them at a time."""

    def __init__(self, runs: Runs):
        self.runs = runs
        self.open_file = lru_cache(4)(open_file)
        self.forward = lru_cache(16)(self._forward)
        self.attend = lru_cache(16)(self._attend)
        self.documents = lru_cache(4)(self._documents)

    def opened(self, request: Fields) -> Opened:
        """Read the weights that `request` names, unless they were read before and the file has not changed."""
        path = self.runs.weights(request.name, request.step)
        info = path.stat()
        return self.open_file(path, info.st_mtime_ns, info.st_size)

    def network(self, request: Fields) -> dict[str, Any]:
        """List the parts of the model, in its order. See `list_parts`."""
        return {"parts": list_parts(self.opened(request).model)}

    def matrix(self, request: Fields) -> dict[str, Any]:
        """Return a parameter's values, at most SHOWN × SHOWN, its gradient if it is saved, and histograms."""
        opened = self.opened(request)
        value = dict(opened.model.named_parameters()).get(request.matrix)
        if value is None:
            raise UnknownRun(f"{request.name} has no matrix {request.matrix!r:.80}")
        value, gradient = value.detach(), opened.gradients.get(request.matrix)
        of_tokens = value.dim() == 2 and value.size(0) == opened.model.vocab_size <= SHOWN
        return {
            "name": request.matrix,
            "shape": list(value.shape),
            "values": shrink(value),
            "shrunk": max(value.shape) > SHOWN,
            "row_names": scoring.token_names(opened.tokenizer) if of_tokens else None,
            "gradient": None if gradient is None else shrink(gradient),
            "histogram": histogram(value),
            "gradient_histogram": None if gradient is None else histogram(gradient),
            "mean": value.mean().item(),
            "std": value.std(correction=0).item(),
            "largest": value.abs().max().item(),
        }

    def token(self, request: Fields) -> dict[str, Any]:
        """Return what sample.py --trace prints about the token after a text, and every token that may be drawn."""
        opened = self.opened(request)
        shape, tokenizer = opened.model.config, opened.tokenizer
        if shape.n_layer and (request.layer >= shape.n_layer or request.head >= shape.n_head):
            has = f"the model has {shape.n_layer} layers, {shape.n_head} heads"
            raise UserError(f"layer {request.layer}, head {request.head}: {has}")
        inside, names = self.forward(opened, request.text), scoring.token_names(tokenizer)
        logits, temperature = torch.tensor([inside.logits]), request.temperature
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite: the run has diverged")
        probs = F.one_hot(logits.argmax(-1), len(names)).float()  # what a temperature of 0 means
        if temperature >= COLDEST:
            probs = probabilities(logits, temperature, request.top_k, request.top_p)
        choices = rank(names, inside.logits, (probs[0] / probs.sum()).tolist(), temperature)
        ids = inside.ids[-SHOWN:]
        return {
            "ids": ids,
            "tokens": [scoring.START if i == tokenizer.bos else names[i] for i in ids],
            "vectors": inside.vectors,
            "attention": self.attend(opened, request.text, request.layer, request.head) if shape.n_layer else None,
            "n_layer": shape.n_layer,
            "n_head": shape.n_head,
            "choices": [asdict(choice) for choice in choices[:MOST_CHOICES]],
        }

    def _forward(self, opened, text):
        return look_inside(opened.model, prompt_ids(opened, text))[0]

    def _attend(self, opened, text, layer, head):
        idx = prompt_ids(opened, text)[:, -opened.model.config.block_size :]
        (steps,) = attention_steps(opened.model, idx, only=layer)
        return {name: heads[head, -SHOWN:, -SHOWN:].tolist() for name, heads in steps.items()}

    def score(self, request: Fields) -> dict[str, Any]:
        """Return the JSON of sample.py --score, with SHOWN of the likeliest tokens in each row."""
        opened = self.opened(request)
        if not scoring.split_documents(request.text, opened.tokenizer):
            raise UserError("there is no text to score")
        ids, text = scoring.encode(request.text, opened.tokenizer)
        rows = scoring.score(opened.model, opened.tokenizer, ids, 1.0, CPU, SHOWN)
        return json.loads(scoring.to_json(rows, text))

    def samples(self, request: Fields) -> dict[str, Any]:
        """Draw the texts of sample.py. is_new: the dataset has no such line; None where documents are not lines."""
        opened = self.opened(request)
        tokenizer, prompt = opened.tokenizer, prompt_ids(opened, request.prompt).repeat(request.count, 1)
        drawing = {"temperature": request.temperature, "top_k": request.top_k, "top_p": request.top_p}
        generator = torch.Generator().manual_seed(derive_seed("sample", request.seed))
        drawing |= {"stop_token": tokenizer.bos, "generator": generator}
        texts, documents = [], self.documents(opened)
        for row in generate(opened.model, prompt, request.max_new_tokens, **drawing)[:, prompt.size(1) :].tolist():
            if tokenizer.bos in row:
                row = row[: row.index(tokenizer.bos)]
            text = request.prompt + tokenizer.decode(row)
            texts.append({"text": text, "is_new": text not in documents if documents else None})
        return {"texts": texts}

    def _documents(self, opened):
        """The lines of the dataset that the model was trained on; empty where they are not known."""
        try:
            data = open_dataset(self.runs.data_dir, opened.dataset)
        except UserError:
            return frozenset()
        if data.tokenizer != opened.tokenizer or not data.tokenizer.bos_is_newline or len(data.train) > MOST_TOKENS:
            return frozenset()
        return frozenset(data.tokenizer.decode(np.concatenate([data.train, data.val])).split("\n"))


def open_file(path: Path, changed: int, size: int) -> Opened:
    """Read a checkpoint. changed, size: of the file, so that a cache reads it again when it was replaced."""
    state = checkpoint.load(path)
    if state["tokenizer"] is None:
        raise UserError(f"{path}: has no tokenizer; sample it with sample.py")
    model = cpu.speed_up(checkpoint.load_model(state)).eval()
    return Opened(model, from_json(state["tokenizer"]), state["config"]["dataset"], state.get("gradients") or {})


def prompt_ids(opened: Opened, text: str) -> torch.Tensor:
    """Return the ids of a prompt (1, T), as sample.py makes them."""
    return torch.from_numpy(opened.tokenizer.prompt(text)).long()[None]


def list_parts(model: GPT) -> list[dict[str, Any]]:
    """List the modules that compute something and what they are parts of, in the model's order."""
    parts, names = [], {parameter: name for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if name in ("", "transformer") or isinstance(module, (nn.Identity, nn.Dropout)):
            continue
        weight, kind = getattr(module, "weight", None), type(module).__name__
        matrix = names.get(weight)
        part = {"name": name, "kind": kind, "shape": [] if weight is None else list(weight.shape)}
        part["parameters"] = sum(parameter.numel() for parameter in module.parameters())
        part["depth"] = name.removeprefix("transformer.").count(".")
        parts.append(part | {"tied": matrix is not None and matrix != f"{name}.weight", "matrix": matrix})
        if getattr(module, "bias", None) is not None:
            size = {"shape": list(module.bias.shape), "parameters": module.bias.numel(), "depth": part["depth"] + 1}
            parts.append({"name": f"{name}.bias", "kind": "bias", **size, "tied": False, "matrix": f"{name}.bias"})
    return parts


def shrink(value: torch.Tensor) -> list[list[float]]:
    """Return a matrix, or a vector as one row, as lists; a side longer than SHOWN as means of neighbours."""
    value = value.reshape(-1, value.shape[-1]).float()
    rows, columns = (min(side, SHOWN) for side in value.shape)
    return F.adaptive_avg_pool2d(value[None, None], (rows, columns))[0, 0].tolist()


def histogram(value: torch.Tensor) -> dict[str, list[float]]:
    """Count the values, those that are finite, in BINS bins of the same width."""
    counts, edges = np.histogram(value[value.isfinite()].double().numpy(), BINS)
    return {"edges": edges.tolist(), "counts": counts.tolist()}
