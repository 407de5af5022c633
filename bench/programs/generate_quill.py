"""Generate with quill's model and random weights, as sample.py does. Prints tokens per second."""

if __name__ == "__main__":
    import quill.start  # noqa: F401 - must be the first import

import json
import sys
from functools import partial
from typing import Any

import torch

from bench.programs.timing import tokens_per_second
from model import GPT
from quill.cpu import speed_up
from quill.generation import generate
from quill.machine import pick_machine
from quill.options import ModelConfig, SampleConfig


def main(device: str, dtype: Any, shape: dict[str, Any], vocab_size: int, batch_size: int, tokens: int) -> float:
    """`shape`: n_layer, n_head, n_embd, block_size. The weights have the type `dtype`, as in sample.py."""
    torch.manual_seed(0)
    machine = pick_machine(SampleConfig(device=device, dtype=dtype))
    model = speed_up(GPT(ModelConfig(**shape), vocab_size).eval().to(machine.device, machine.dtype))
    return tokens_per_second(partial(generate, model), batch_size, tokens, machine.device)


if __name__ == "__main__":
    print(json.dumps(main(**json.load(sys.stdin))))
