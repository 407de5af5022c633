"""Measure the speed of generation, in the same way for each program."""

import time
from collections.abc import Callable

import torch


def tokens_per_second(
    generate: Callable[..., torch.Tensor], batch_size: int, tokens: int, device: torch.device
) -> float:
    """Call `generate(idx, tokens, …)` on a batch of one-token prompts: a short warm-up, then the call that is timed."""
    idx = torch.zeros((batch_size, 1), dtype=torch.long, device=device)
    with torch.no_grad():
        generate(idx, 8, temperature=0.8, top_k=50).cpu()  # .cpu() waits until a GPU has finished
        began = time.perf_counter()
        generate(idx, tokens, temperature=0.8, top_k=50).cpu()
    return batch_size * tokens / (time.perf_counter() - began)
