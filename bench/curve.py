"""Whether training is the peer's: nanoGPT's own model and optimizer on our first weights and our batches."""

import re
import statistics
import tempfile

from bench.measure import ROOT, flags, metrics, process
from bench.shapes import BABY
from quill.errors import UserError

# The peer's model and optimizer on our first weights and our batches, in float32. Both repositories have a model.py.
REPLAY = """
import importlib.util, sys
sys.path[:0] = [{peer!r}, {root!r}]
import torch
from quill.machine import pick_machine
from quill.options import ModelConfig, TrainConfig
from quill.data.batches import Batches, derive_seed
from quill.data.token_files import open_dataset
from model import GPT, GPTConfig
from quill.optimizer import learning_rate
spec = importlib.util.spec_from_file_location("ours", {root!r} + "/model.py")
ours = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ours)
config = TrainConfig(**{options!r})
device = pick_machine(config).device
dataset = open_dataset(config.data_dir, config.dataset)
vocab, B = dataset.tokenizer.vocab_size, config.batch_size
shape = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, block_size=config.block_size)
torch.manual_seed(derive_seed("init", config.seed))
start = ours.GPT(ModelConfig(**shape), vocab)
model = GPT(GPTConfig(vocab_size=vocab, dropout=0.0, bias=False, **shape))
model.load_state_dict(start.state_dict())
model.to(device)
optimizer = model.configure_optimizers(
    config.weight_decay, config.learning_rate, (config.beta1, config.beta2), device.type
)
batches = Batches(dataset.train, None, config.block_size, rows=B, micro_rows=B, seed=config.seed, device=device)
for step in range(config.max_iters):
    (x, y, _), = batches.global_batch(step)[1]
    loss = model(x.contiguous(), y.contiguous())[1]  # the peer's model takes views of them
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    optimizer.step()
    optimizer.zero_grad()
    print("step", step, loss.item())
"""


def curve(config, shape=BABY):
    """Whether training is the peer's: from the same weights, on the same batches, the losses of 30 steps in float32."""
    if not config.peer:
        raise UserError("curve: give a checkout of nanoGPT to compare with, --peer=../nanoGPT")
    options = shape | {"dropout": 0.0, "gradient_accumulation_steps": 1, "dataset": "shakespeare_char"}
    options |= {"learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 10, "max_iters": 30, "eval_interval": 5}
    options |= {"data_dir": config.data_dir, "device": config.device, "dtype": "float32", "compile": False}
    with tempfile.TemporaryDirectory() as folder:
        process(["train.py", *flags(options), f"--out_dir={folder}", "--eval_iters=1"])
        ours = [float(line["train_loss"]) for line in metrics(folder)]
    _, out = process(["-c", REPLAY.format(peer=config.peer, root=str(ROOT), options=options)], config.peer)
    steps = [float(figure) for figure in re.findall(r"step \d+ (\S+)", out)]
    theirs = [statistics.mean(steps[i : i + 5]) for i in range(0, len(steps), 5)]
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"{len(steps)} steps, loss {ours[0]:.4f} to {ours[-1]:.4f}: at most {difference:.2g} from the peer's")
    what = "train loss at 10.7M, means of 5 steps"
    return [{"what": what, "unit": "nats", "n": 1, "ours": ours, "peer": theirs, "max_abs_difference": difference}]
