"""Train nanoGPT's model with nanoGPT's optimizer on quill's first weights and quill's batches, in float32.

Prints the loss of each step.
"""

if __name__ == "__main__":
    import quill.start  # noqa: F401 - must be the first import

import json
import sys
from typing import Any

import torch

from bench.programs.nanogpt import load_model_module
from model import GPT
from quill.data.batches import Batches, derive_seed
from quill.data.token_files import open_dataset
from quill.machine import pick_machine
from quill.optimizer import learning_rate
from quill.options import ModelConfig, TrainConfig


def main(peer: str, options: dict[str, Any]) -> list[float]:
    """`peer`: the folder of a nanoGPT checkout. `options`: train.py's, for a run in float32 without dropout."""
    config = TrainConfig(**options)
    device = pick_machine(config).device
    dataset = open_dataset(config.data_dir, config.dataset)
    vocab_size, rows = dataset.tokenizer.vocab_size, config.batch_size
    shape = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size")}
    torch.manual_seed(derive_seed("init", config.seed))
    ours = GPT(ModelConfig(**shape), vocab_size)
    nanogpt = load_model_module(peer)
    model = nanogpt.GPT(nanogpt.GPTConfig(vocab_size=vocab_size, dropout=0.0, bias=False, **shape))
    model.load_state_dict(ours.state_dict())
    model.to(device)
    betas = (config.beta1, config.beta2)
    optimizer = model.configure_optimizers(config.weight_decay, config.learning_rate, betas, device.type)
    batches = Batches(
        dataset.train, None, config.block_size, rows=rows, micro_rows=rows, seed=config.seed, device=device
    )
    losses = []
    for step in range(config.max_iters):
        ((x, y, _),) = batches.global_batch(step)[1]
        loss = model(x.contiguous(), y.contiguous())[1]  # nanoGPT's model calls view() on its targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(json.dumps(main(**json.load(sys.stdin))))
