"""Generate with nanoGPT's model and random weights. Prints tokens per second.

As in its sample.py, a GPU computes in half precision by autocast and a CPU in float32.
"""

import contextlib

if __name__ == "__main__":
    import quill.start  # noqa: F401 - must be the first import

import json
import sys
from typing import Any

import torch

from bench.programs.nanogpt import load_model_module
from bench.programs.timing import tokens_per_second


def main(
    peer: str, device: str, dtype: str, shape: dict[str, Any], vocab_size: int, batch_size: int, tokens: int
) -> float:
    """`peer`: the folder of a nanoGPT checkout. `shape`: n_layer, n_head, n_embd, block_size."""
    torch.manual_seed(0)
    target = torch.device(device)
    nanogpt = load_model_module(peer)
    model = nanogpt.GPT(nanogpt.GPTConfig(vocab_size=vocab_size, dropout=0.0, bias=False, **shape)).eval().to(target)
    context = contextlib.nullcontext()
    if target.type == "cuda":
        context = torch.autocast("cuda", getattr(torch, dtype), enabled=dtype != "float32")
    with context:
        return tokens_per_second(model.generate, batch_size, tokens, target)


if __name__ == "__main__":
    print(json.dumps(main(**json.load(sys.stdin))))
