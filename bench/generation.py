"""Our speed of generation beside a peer's and transformers', in turn, with random weights."""

from importlib.util import find_spec

from bench.measure import ROOT, in_turn, on_gpu, peer_machine, process, row
from bench.shapes import BABY, GPT2, GPT2_IDS

GENERATE = """
import contextlib, io, sys, time
sys.path.insert(0, {path!r})
import torch
torch.manual_seed(0)
device = torch.device({device!r})
context = contextlib.nullcontext()
{build}
idx = torch.zeros(({batch}, 1), dtype=torch.long, device=device)
with torch.no_grad(), context:
    model.generate(idx, 8, temperature=0.8, top_k=50).cpu()
    began = time.perf_counter()
    model.generate(idx, {tokens}, temperature=0.8, top_k=50).cpu()
print({batch} * {tokens} / (time.perf_counter() - began))
"""
OURS = """
from quill.options import ModelConfig, SampleConfig
from quill.machine import pick_machine
from model import GPT
from quill.cpu import speed_up
from quill.generation import generate
machine = pick_machine(SampleConfig(device={device!r}, dtype={dtype!r}))
model = speed_up(GPT(ModelConfig(**{shape!r}), {vocab}).eval().to(device, machine.dtype))
model.generate = lambda *args, **options: generate(model, *args, **options)
"""
TRANSFORMERS = """
from transformers import GPT2Config, GPT2LMHeadModel
class GPT:
    def __init__(self, n_layer, n_head, n_embd, block_size):
        shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=block_size)
        config = GPT2Config(vocab_size={vocab}, bos_token_id=0, eos_token_id=None, **shape)
        self.model = GPT2LMHeadModel(config).eval()
        self.model.to(device, torch.{dtype} if device.type == "cuda" else torch.float32)
    def generate(self, idx, tokens, **options):
        out = self.model.generate(idx, max_new_tokens=tokens, do_sample=True, pad_token_id=0, **options)
        assert out.shape[1] == idx.shape[1] + tokens
        return out
model = GPT(**{shape!r})
"""
# As its sample.py does: on a GPU in half precision by autocast, on a CPU in float32, where transformers is faster too.
THEIRS = """
with contextlib.redirect_stdout(io.StringIO()):
    from model import GPT, GPTConfig
    model = GPT(GPTConfig(vocab_size={vocab}, dropout=0.0, bias=False, **{shape!r})).eval().to(device)
if device.type == "cuda":
    context = torch.autocast("cuda", torch.{dtype}, enabled={dtype!r} != "float32")
"""


def generate(config):
    """Tokens a second of `generate` within the block, random weights, temperature 0.8, top-k 50.

    Beside the peer, and beside transformers where it is installed, both of which draw one sample at a time.
    """
    lines = []
    device, dtype = peer_machine(config).values()
    baby = {key: BABY[key] for key in GPT2}
    many = 64 if on_gpu(config) else 16
    for name, shape, vocab, batch, tokens in (
        ("10.7M, one sample", baby, 65, 1, 250),
        (f"10.7M, {many} samples", baby, 65, many, 250),
        ("124M, one sample", GPT2, GPT2_IDS, 1, 100),
    ):

        def measure(build, path, batch=batch, shape=shape, vocab=vocab, tokens=tokens):
            known = {"path": str(path), "device": device, "batch": batch, "tokens": tokens}
            build = build.format(shape=shape, vocab=vocab, device=device, dtype=dtype)
            return float(process(["-c", GENERATE.format(build=build, **known)], path)[1])

        def ours():
            return measure(OURS, ROOT)

        def theirs(shape=shape, vocab=vocab, tokens=tokens):
            return measure(THEIRS, config.peer, batch=1, shape=shape, vocab=vocab, tokens=tokens)

        def transformers():
            return measure(TRANSFORMERS, ROOT)

        figures = in_turn(config.pairs, ours, theirs if config.peer else None)
        lines.append(row(f"generation, {name} (peer one at a time)", "tokens/s", *figures, more_is_better=True))
        if config.peer and batch == 1 and find_spec("transformers"):
            figures = in_turn(config.pairs, ours, transformers)
            lines.append(row(f"generation, {name}, beside transformers", "tokens/s", *figures, more_is_better=True))
    return lines
