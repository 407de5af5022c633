"""Generate with nanoGPT's model and random weights. Prints tokens per second.

As in its sample.py, a GPU computes in half precision by autocast and a CPU in float32.
"""

import contextlib
import json
import sys

import torch

from bench.programs.nanogpt import load_model_module
from bench.programs.timing import tokens_per_second


def main(peer, device, dtype, shape, vocab_size, batch_size, tokens):
    """`peer`: the folder of a nanoGPT checkout. `shape`: n_layer, n_head, n_embd, block_size."""
    torch.manual_seed(0)
    device = torch.device(device)
    nanogpt = load_model_module(peer)
    model = nanogpt.GPT(nanogpt.GPTConfig(vocab_size=vocab_size, dropout=0.0, bias=False, **shape)).eval().to(device)
    context = contextlib.nullcontext()
    if device.type == "cuda":
        context = torch.autocast("cuda", getattr(torch, dtype), enabled=dtype != "float32")
    with context:
        return tokens_per_second(model.generate, batch_size, tokens, device)


if __name__ == "__main__":
    print(json.dumps(main(**json.load(sys.stdin))))
