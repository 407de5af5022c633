"""Generate with random weights: quill's model or nanoGPT's. Options and result are JSON.

On a GPU, both compute in `dtype`, nanoGPT by autocast as in its sample.py. On a CPU, nanoGPT computes in float32.
"""

if __name__ == "__main__":
    import quill.start  # noqa: F401 - must be the first import

import json
import runpy
import sys
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from model import GPT
from quill.cpu import for_sampling
from quill.generation import generate
from quill.machine import pick_machine
from quill.options import ModelConfig, SampleConfig


def quill_model(shape: dict[str, Any], vocab_size: int, device: str, dtype: Any) -> Callable:
    """Return quill's `generate` with a model, whose weights have the type `dtype`, as in sample.py."""
    machine = pick_machine(SampleConfig(device=device, dtype=dtype))
    return partial(generate, for_sampling(GPT(ModelConfig(**shape), vocab_size).eval(), machine))


def load_model_module(folder: str) -> Any:
    """Run nanoGPT's `folder`/model.py by its path, because quill has a module `model` too. → its names"""
    sys.path.append(folder)  # a fork's model.py may import other files of its folder
    return SimpleNamespace(**runpy.run_path(f"{folder}/model.py"))


def nanogpt_model(shape: dict[str, Any], vocab_size: int, device: str, dtype: str, peer: str) -> Callable:
    """Return nanoGPT's `generate`, from the folder `peer`. It takes the same arguments."""
    nanogpt = load_model_module(peer)
    config = nanogpt.GPTConfig(vocab_size=vocab_size, dropout=0.0, bias=False, **shape)
    kind = torch.device(device).type
    autocast = torch.autocast(kind, getattr(torch, dtype), enabled=kind == "cuda" and dtype != "float32")
    return autocast(nanogpt.GPT(config).eval().to(device).generate)


def main(model: str, batch_size: int, tokens: int, **options: Any) -> float:
    """Return the tokens/s of `model`, "quill" or "nanogpt", from prompts of one token, after a short warm-up."""
    torch.manual_seed(0)
    draw = quill_model(**options) if model == "quill" else nanogpt_model(**options)
    idx = torch.zeros((batch_size, 1), dtype=torch.long, device=options["device"])
    with torch.no_grad():
        draw(idx, 8, temperature=0.8, top_k=50).cpu()  # .cpu() waits until a GPU has finished
        began = time.perf_counter()
        draw(idx, tokens, temperature=0.8, top_k=50).cpu()
    return batch_size * tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    print(json.dumps(main(**json.load(sys.stdin))))
