"""Generate with transformers' GPT-2, random weights and its cache. Prints tokens per second.

A GPU computes in `dtype`, a CPU in float32, where transformers is faster.
"""

if __name__ == "__main__":
    import quill.start  # noqa: F401 - must be the first import

import json
import sys
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel  # pyright: ignore[reportMissingImports]

from bench.programs.timing import tokens_per_second


def main(device: str, dtype: str, shape: dict[str, Any], vocab_size: int, batch_size: int, tokens: int) -> float:
    """`shape`: n_layer, n_head, n_embd, block_size."""
    torch.manual_seed(0)
    target = torch.device(device)
    shape = shape | {"n_positions": shape["block_size"]}
    del shape["block_size"]
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, bos_token_id=0, eos_token_id=None, **shape)).eval()
    model.to(target, getattr(torch, dtype) if target.type == "cuda" else torch.float32)

    def generate(idx, tokens, **options):
        out = model.generate(idx, max_new_tokens=tokens, do_sample=True, pad_token_id=0, **options)
        assert out.shape[1] == idx.shape[1] + tokens
        return out

    return tokens_per_second(generate, batch_size, tokens, target)


if __name__ == "__main__":
    print(json.dumps(main(**json.load(sys.stdin))))
