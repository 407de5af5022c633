"""The numbers of the page's panels: the fields of a request in, plain values for JSON out.

They are computed by the functions of sample.py in quill/trace.py, scoring.py and generation.py, in float32 on the CPU.
"""

from __future__ import annotations

import json
from dataclasses import asdict
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
from quill.trace import Inside, attention_steps, look_inside, rank

SHOWN = 64  # rows and columns of a matrix, tokens of a context, likeliest tokens of a row
MOST_CHOICES = 256  # tokens that may be drawn
MOST_CHARACTERS = 2000  # of a text that is scored: a row for each
BINS = 40  # of a histogram
MOST_TOKENS = 20_000_000  # in a dataset whose lines are compared with the samples
File = tuple[Path, int, int]  # a file, the time of its last change and its size: what a cache is keyed by


class Views:
    """The panels. The last checkpoints and contexts are kept, so that a new temperature needs no forward pass."""

    def __init__(self, runs: Runs):
        self.runs = runs
        self.open, self.lines = lru_cache(2)(open_checkpoint), lru_cache(2)(read_lines)
        self.inside, self.attention = lru_cache(16)(self._inside), lru_cache(16)(self._attention)

    def file(self, asked: Fields) -> File:
        """Find the checkpoint of a run and a step. Raise UnknownRun if there is none."""
        return stamped(self.runs.weights(asked.name, asked.step))

    def network(self, asked: Fields) -> dict[str, Any]:
        """Return the parts of the model."""
        model, *_ = self.open(self.file(asked))
        return {"parts": list_parts(model)}

    def matrix(self, asked: Fields) -> dict[str, Any]:
        """Return the values of a parameter, its gradient if the checkpoint has it, and their histograms."""
        model, tokenizer, state = self.open(self.file(asked))
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
        """Return what sample.py --trace prints about the token after a text, with every token that may be drawn."""
        file, text, temperature = self.file(asked), asked.text or "", asked.temperature
        model, tokenizer, _ = self.open(file)
        shape, names = model.config, scoring.token_names(tokenizer)
        if shape.n_layer and (asked.layer >= shape.n_layer or asked.head >= shape.n_head):
            has = f"the model has {shape.n_layer} layers, {shape.n_head} heads"
            raise UserError(f"layer {asked.layer}, head {asked.head}: {has}")
        inside = self.inside(file, text)
        logits = torch.tensor([inside.logits])
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite: its training has diverged")
        probs = F.one_hot(logits.argmax(dim=-1), len(names)).float()  # at the temperature 0
        if temperature >= COLDEST:
            probs = probabilities(logits, temperature, asked.top_k, asked.top_p)
        choices = rank(names, inside.logits, (probs[0] / probs.sum()).tolist(), temperature)
        return {
            "ids": inside.ids[-SHOWN:],
            "tokens": [scoring.START if i == tokenizer.bos else names[i] for i in inside.ids[-SHOWN:]],
            "vectors": inside.vectors,
            "attention": self.attention(file, text, asked.layer, asked.head) if shape.n_layer else None,
            "n_layer": shape.n_layer,
            "n_head": shape.n_head,
            "choices": [asdict(choice) for choice in choices[:MOST_CHOICES]],
        }

    def _inside(self, file: File, text: str) -> Inside:
        model, tokenizer, _ = self.open(file)
        return look_inside(model, encode_prompt(tokenizer, text))[0]

    def _attention(self, file: File, text: str, layer: int, head: int) -> dict[str, list[list[float]]]:
        model, tokenizer, _ = self.open(file)
        (steps,) = attention_steps(model, encode_prompt(tokenizer, text)[:, -model.config.block_size :], only=layer)
        return {name: heads[head, -SHOWN:, -SHOWN:].tolist() for name, heads in steps.items()}

    def score(self, asked: Fields) -> dict[str, Any]:
        """Return the JSON of sample.py --score, with more of the likeliest tokens."""
        (model, tokenizer, _), text = self.open(self.file(asked)), asked.text or ""
        if not scoring.split_documents(text, tokenizer):
            raise UserError("there is no text to score")
        if len(text) > MOST_CHARACTERS:
            raise UserError(f"the text is longer than {MOST_CHARACTERS:,} characters")
        ids, text = scoring.encode(text, tokenizer)
        return json.loads(scoring.to_json(scoring.score(model, tokenizer, ids, 1.0, torch.device("cpu"), SHOWN), text))

    def samples(self, asked: Fields) -> dict[str, Any]:
        """Draw the texts that sample.py draws. is_new: no line of the dataset; None where documents are not lines."""
        model, tokenizer, state = self.open(self.file(asked))
        prompt = encode_prompt(tokenizer, asked.prompt).repeat(asked.count, 1)
        drawing = {"temperature": asked.temperature, "top_k": asked.top_k, "top_p": asked.top_p}
        drawing["generator"] = torch.Generator().manual_seed(derive_seed("sample", asked.seed))
        tokens = generate(model, prompt, asked.max_new_tokens, stop_token=tokenizer.bos, **drawing)
        lines, texts = None, []
        if tokenizer.bos_is_newline:
            meta = self.runs.data_dir / str(state["config"]["dataset"]) / "meta.json"
            lines = self.lines(stamped(meta), tokenizer) if meta.is_file() else None
        for row in tokens[:, prompt.size(1) :].tolist():
            end = row.index(tokenizer.bos) if tokenizer.bos in row else None
            text = asked.prompt + tokenizer.decode(row[:end])
            texts.append({"text": text, "is_new": None if lines is None else text not in lines})
        return {"texts": texts}


def stamped(path: Path) -> File:
    """Return the key of a file in a cache."""
    info = path.stat()
    return path, info.st_mtime_ns, info.st_size


def open_checkpoint(file: File) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Read a checkpoint. → its model, its tokenizer and what it holds"""
    state = checkpoint.load(file[0])
    if state["tokenizer"] is None:
        raise UserError(f"{file[0]}: has no tokenizer; sample.py can sample from it")
    return cpu.speed_up(checkpoint.load_model(state)).eval(), from_json(state["tokenizer"]), state


def read_lines(meta: File, tokenizer: Tokenizer) -> frozenset[str] | None:
    """Return the documents of a dataset, which are lines; None if it is too large or has another tokenizer."""
    try:
        data = open_dataset(meta[0].parent.parent, meta[0].parent.name)
    except UserError:
        return None
    if data.tokenizer != tokenizer or len(data.train) > MOST_TOKENS:
        return None
    return frozenset(tokenizer.decode(np.concatenate([data.train, data.val])).split("\n"))


def encode_prompt(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """Return the ids of a prompt (1, T)."""
    return torch.from_numpy(tokenizer.prompt(text)).long()[None]


def list_parts(model: GPT) -> list[dict[str, Any]]:
    """Return the modules of a model, with the shape of the weight and the number of all parameters, in its order."""
    names, parts = {parameter: name for name, parameter in model.named_parameters()}, []
    for name, module in model.named_modules():
        if name in ("", "transformer") or isinstance(module, (nn.Identity, nn.Dropout)):
            continue
        size, depth = sum(p.numel() for p in module.parameters()), name.removeprefix("transformer.").count(".")
        own = {f"{name}.{key}": parameter for key, parameter in module.named_parameters(recurse=False)}
        for key, value in own.items() or [(name, None)]:
            is_weight, matrix = not key.endswith(".bias"), None if value is None else names[value]
            parts.append(
                {
                    "name": name if is_weight else key,
                    "kind": type(module).__name__ if is_weight else "bias",
                    "shape": [] if value is None else list(value.shape),
                    "parameters": size if value is None or is_weight else value.numel(),
                    "depth": depth if is_weight else depth + 1,
                    "tied": matrix is not None and matrix != key,
                    "matrix": matrix,
                }
            )
    return parts


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
