"""model.py against an independent float64 reference, the properties a GPT must have, and the file on its own."""

import math
import shutil
import subprocess
import sys

import numpy as np
import numpy_gpt
import pytest
import torch

from model import GPT
from quill.options import ModelConfig

V = 11
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "bias": True}
SHAPES = {
    "gpt2": {},
    "OpenAI's gpt2": {"activation": "gelu_tanh"},
    "no bias": {"bias": False},
    "untied": {"tie_weights": False},
    "rmsnorm, rope, relu2, qk_norm": {
        "norm": "rmsnorm",
        "position": "rope",
        "activation": "relu2",
        "qk_norm": True,
        "bias": False,
    },
    "no norm, no position, swiglu": {"norm": "none", "position": "none", "activation": "swiglu", "mlp_ratio": 2.5},
    "layernorm, rope, relu": {"position": "rope", "activation": "relu"},
    "no residual": {"residual": False},
    "norm of the embeddings, none at the end": {"norm_embedding": True, "norm_final": False},
    "n-grams": {"ngram": 5, "ngram_rows": 37},
    "attention only": {"mlp_ratio": 0, "norm": "none", "residual": False, "n_layer": 1},
    "bigram": {"n_layer": 0, "position": "none", "norm": "none", "tie_weights": False},
}


def make(seed=0, std=None, device="cpu", **shape):
    """A tiny float64 model, dropout off; `std` widens its weights, so that differences can't hide in small ones."""
    torch.manual_seed(seed)
    model = GPT(ModelConfig(**(TINY | shape)), V).double().eval()
    if std is not None:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=std)
    return model.to(device)


def tokens(B, T, seed=1, device="cpu"):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed)).to(device)


def as_numpy(model):
    return {name: parameter.detach().cpu().numpy().copy() for name, parameter in model.state_dict().items()}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_loss_and_gradients_agree_with_numpy(shape, device):
    model = make(std=0.25, device=device, **shape)
    idx, targets = tokens(3, 8, device=device), tokens(3, 8, seed=2, device=device)
    targets[0, 5:] = -1
    logits, loss = model(idx, targets)
    reference = as_numpy(model)
    for row in range(3):
        expected = numpy_gpt.forward(idx[row].cpu().numpy(), reference, model.config)
        atol = 1e-6 if model.rotary is not None else 1e-11
        np.testing.assert_allclose(logits[row].detach().cpu().numpy(), expected, rtol=0, atol=atol)
    batch = idx.cpu().numpy(), targets.cpu().numpy()
    assert loss.item() == pytest.approx(numpy_gpt.loss(*batch, reference, model.config), abs=1e-6)

    loss.backward()
    rng = np.random.default_rng(3)
    for name, parameter in model.named_parameters():
        names = [name]
        if parameter is model.lm_head.weight and model.config.tie_weights:
            names = ["lm_head.weight", "transformer.wte.weight"]
        for place in rng.integers(parameter.numel(), size=2):
            place = np.unravel_index(place, parameter.shape)
            ends = []
            for step in (1e-5, -1e-5):
                nudged = {key: value.copy() if key in names else value for key, value in reference.items()}
                for key in names:
                    nudged[key][place] += step
                ends.append(numpy_gpt.loss(*batch, nudged, model.config))
            assert parameter.grad[tuple(place)].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=2e-7), name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_causality_by_gradients(shape, device):
    """The logits at t depend on the inputs up to t (all of them, where there is attention) and on none after it."""
    model = make(std=0.25, device=device, **shape)
    if model.config.n_layer == 0:
        with torch.no_grad():
            one, other = (model(torch.tensor([row], device=device))[0] for row in ([1, 2, 3], [4, 5, 3]))
        assert torch.equal(one[0, 2], other[0, 2])  # a bigram model sees one token
        return
    inputs = []
    model.transformer.wte.register_forward_hook(lambda m, i, out: (inputs.append(out), out.retain_grad())[0] and None)
    idx = tokens(1, 8, device=device)
    for t in range(8):
        inputs.clear()
        model(idx)[0][0, t].square().sum().backward()
        reach = inputs[0].grad[0].abs().amax(dim=-1)
        assert (reach[: t + 1] > 0).all() and (reach[t + 1 :] == 0).all()


def test_one_batch_overfits(device):
    """Every logit can be learnt: a batch of noise goes below 0.01 nats."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**(TINY | {"n_embd": 32})), V).to(device)
    idx, targets = tokens(4, 8).to(device), tokens(4, 8, seed=2).to(device)
    idx[:, 0] = torch.arange(4)  # rows that begin alike could not be told apart
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(300):
        loss = model(idx, targets)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01


def test_gpt2_names_sizes_and_initialisation():
    """GPT-2's smallest shape: 124,439,808 parameters (as released by Radford et al. 2019), N(0, 0.02)."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(bias=True), 50257)
    assert model.num_params() == 124_439_808
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert shapes["transformer.wte.weight"] == shapes["lm_head.weight"] == (50257, 768)
    assert shapes["transformer.wpe.weight"] == (1024, 768)
    assert shapes["transformer.h.11.attn.c_attn.weight"] == (2304, 768)
    assert shapes["transformer.h.0.mlp.c_fc.bias"] == (3072,) and shapes["transformer.ln_f.bias"] == (768,)
    assert len(shapes) == 2 + 12 * 12 + 2 + 1
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif parameter.dim() == 1:
            assert (parameter == 1).all()
        else:
            std = 0.02 / math.sqrt(24) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.01), name
    # 6 FLOPs for each weight of a product (all but the positions') and 12 L C T for attention
    assert model.flops_per_token() == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024


def test_untrained_loss_is_that_of_guessing():
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=4, n_head=4, n_embd=64, block_size=32), 65)
    idx = torch.randint(65, (8, 32))
    assert model(idx, idx.roll(-1, 1))[1].item() == pytest.approx(math.log(65), abs=0.05)


def test_dropout_is_on_in_training_only():
    torch.manual_seed(0)
    model = make(std=0.4, dropout=0.3)
    idx = tokens(2, 8)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_attention_dropout_is_its_own():
    """Unset, it is as `dropout`; at 0 with dropout 0, nothing is drawn; each alone changes what training computes."""

    def rates(**options):
        model = make(**options)
        block = model.transformer["h"][0]
        return [
            d.p
            for d in (model.transformer["drop"], block.attn.attn_dropout, block.attn.resid_dropout, block.mlp.dropout)
        ]

    assert rates(dropout=0.25) == [0.25] * 4
    assert rates(dropout=0.25, attention_dropout=0.0) == [0.25, 0, 0.25, 0.25]
    assert rates(attention_dropout=0.5) == [0, 0.5, 0, 0]
    model, idx = make(std=0.4, attention_dropout=0.5).train(), tokens(2, 8)
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_init_std_is_every_matrix_s():
    """Within 3 % of 0.08, on 64² numbers or more; unset, 0.02, and 0.02 / √(2 · 2) at the end of a branch."""
    torch.manual_seed(0)
    wide = {"n_embd": 64, "n_layer": 2, "tie_weights": False, "block_size": 64}
    for name, parameter in GPT(ModelConfig(**wide, n_head=2, init_std=0.08), 64).named_parameters():
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.08, rel=0.03), name
    for name, parameter in GPT(ModelConfig(**wide, n_head=2), 64).named_parameters():
        if parameter.dim() == 2:
            expected = 0.01 if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name


def test_generate_is_a_loop_over_the_whole_model():
    """Spelled out, with the policy for a full context: continue from the last half block. Greedy, by top_k=1."""
    model = make(std=0.5)
    out = context = tokens(1, 3)
    with torch.no_grad():
        for _ in range(25):
            if context.size(1) > 8:
                context = context[:, -4:]
            token = model(context)[0][:, -1].argmax(dim=-1, keepdim=True)
            out, context = torch.cat([out, token], 1), torch.cat([context, token], 1)
    assert torch.equal(model.generate(tokens(1, 3), 25, top_k=1), out)


def test_generate_follows_temperature_and_top_k():
    """Frequencies of the first token over 20,000 rows, against softmax(logits / T) over the k likeliest."""
    model, prompt = make(std=0.5), tokens(1, 3)
    torch.manual_seed(0)
    with torch.no_grad():
        logits = model(prompt)[0][0, -1]
    for temperature, top_k in ((1.0, None), (0.5, None), (2.0, 3), (1.0, 99)):
        drawn = model.generate(prompt.expand(20_000, -1), 1, temperature, top_k)[:, -1]
        kept = logits.topk(min(top_k or V, V)).indices
        expected = torch.zeros(V, dtype=logits.dtype)
        expected[kept] = (logits[kept] / temperature).softmax(0)
        torch.testing.assert_close(torch.bincount(drawn, minlength=V) / 20_000, expected.float(), atol=0.015, rtol=0)


ALONE = """
import dataclasses, sys, torch
from model import GPT

@dataclasses.dataclass
class Config:
    block_size: int = 8
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 32
    dropout: float = 0.0
    attention_dropout: float | None = None
    bias: bool = False
    norm: str = "layernorm"
    norm_embedding: bool = False
    norm_final: bool = True
    activation: str = "gelu"
    position: str = "learned"
    ngram: int = 0
    ngram_rows: int = 16384
    mlp_ratio: float = 4.0
    residual: bool = True
    tie_weights: bool = True
    qk_norm: bool = False
    init_std: float | None = None

torch.manual_seed(0)
model = GPT(Config(), 10)
text = torch.arange(64).remainder(10).expand(4, -1)
for _ in range(150):
    loss = model(text[:, :8], text[:, 1:9])[1]
    for parameter, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
        parameter.data -= 0.5 * gradient
print(loss.item())
print(model.eval().generate(text[:1, :2], 6, top_k=1)[0].tolist())
print("quill" in sys.modules)
"""


def test_the_file_alone_trains_and_generates(tmp_path):
    """Copied into an empty folder, with another dataclass as its config, it learns to count."""
    shutil.copy(sys.modules["model"].__file__, tmp_path)
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loss, text, needs_quill = done.stdout.splitlines()
    assert float(loss) < 0.2 and text == "[0, 1, 2, 3, 4, 5, 6, 7]" and needs_quill == "False"
