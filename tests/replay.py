"""`python -m bench replay`: nanoGPT's model and optimizer, on quill's first weights and batches, have quill's losses.

As a program, it trains nanoGPT's model and prints the loss of each step: nanoGPT's file is called model.py too.
"""

if __name__ == "__main__":
    import quill.start  # noqa: F401 - must be the first import

import json
import statistics
import sys
import tempfile
from typing import Any

import torch

from bench.generation import load_model_module
from bench.measure import Line, as_flags, process, program, read_metrics
from bench.peers import SHAKESPEARE_10M
from model import GPT
from quill.data.batches import Batches, derive_seed
from quill.data.token_files import open_dataset
from quill.errors import UserError
from quill.machine import pick_machine
from quill.optimizer import learning_rate
from quill.options import BenchConfig, ModelConfig, TrainConfig


def replay(cases: list[str], config: BenchConfig, shape: dict[str, Any] = SHAKESPEARE_10M) -> list[Line]:
    """Train 30 steps in float32 with train.py, then with nanoGPT's model and optimizer from our weights and batches."""
    if cases or config.dtype not in ("auto", "float32"):
        raise UserError("replay is one run of each, in float32: it takes no cases and no --dtype")
    if not config.peer:
        raise UserError("replay: give a checkout of nanoGPT to compare with, --peer=../nanoGPT")
    options = shape | {"dropout": 0.0, "gradient_accumulation_steps": 1, "dataset": "shakespeare_char"}
    options |= {"learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 10, "max_iters": 30, "eval_interval": 5}
    options |= {"data_dir": config.data_dir, "device": config.device, "dtype": "float32", "compile": False}
    with tempfile.TemporaryDirectory() as folder:
        process(["train.py", *as_flags(options), f"--out_dir={folder}", "--eval_iters=1"])
        ours = [float(row["train_loss"]) for row in read_metrics(folder)]
    steps = program("tests.replay", peer=config.peer, options=options)
    theirs = [statistics.mean(steps[i : i + 5]) for i in range(0, len(steps), 5)]
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"{len(steps)} steps, loss {ours[0]:.4f} to {ours[-1]:.4f}: at most {difference:.2g} from the peer's")
    what = "train loss at 10.7M, means of 5 steps"
    return [{"what": what, "n": 1, "ours": ours, "peer": theirs, "max_abs_difference": difference}]


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
