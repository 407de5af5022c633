"""model.py against an independent float64 reference, and the properties a GPT must have."""

import math

import numpy as np
import numpy_gpt
import pytest
import torch

from model import GPT, Dropout, Linear, sample_token
from quill.options import ModelConfig

V = 11
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "bias": True}
SHAPES = {
    "gpt2": {},
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
    """The logits at t depend on the inputs up to t (all of them, where there is attention) and on none behind it."""
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


@pytest.mark.parametrize("rows", [(1, 1), (1, 32), (3, 5), (33, 1)], ids=str)
@pytest.mark.parametrize("out", [384, 65, 37, 1])  # even, odd, a prime beyond 32, and the smallest
def test_the_linear_of_few_rows_is_a_linear(rows, out, monkeypatch):
    """fp32, against float64: what is rounded differently is still the same product, and so are its gradients."""
    taken, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *args: taken.append(1) or bmm(*args))
    torch.manual_seed(rows[0])
    x = torch.randn(*rows, 48, requires_grad=True)
    linear = Linear(48, out).eval()
    grad = torch.randn(*rows, out)
    y = linear(x)
    y.backward(grad)
    assert len(taken) == (rows[0] * rows[1] <= 32)
    weight, bias = linear.weight.detach().double(), linear.bias.detach().double()
    torch.testing.assert_close(y.double(), x.detach().double() @ weight.T + bias, atol=1e-5, rtol=0)
    torch.testing.assert_close(x.grad.double(), grad.double() @ weight, atol=2e-5, rtol=0)
    expected = (grad.double().flatten(0, 1).T @ x.detach().double().flatten(0, 1), grad.double().sum((0, 1)))
    torch.testing.assert_close((linear.weight.grad.double(), linear.bias.grad.double()), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("position", ["learned", "rope", "none"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "none"])
def test_cached_generation_is_uncached_generation(position, norm, device):
    model = make(std=0.5, position=position, norm=norm, device=device)
    for length in (1, 8, 20):  # short, a block, longer than a block
        prompt = tokens(3, length, device=device)
        for options in ({"temperature": 0}, {"temperature": 0.9, "top_k": 5, "top_p": 0.9}):
            out = [
                model.generate(
                    prompt, 30, generator=torch.Generator(device).manual_seed(5), use_cache=cached, **options
                )
                for cached in (True, False)
            ]
            assert torch.equal(*out) and out[0].shape == (3, prompt.size(1) + 30)
            assert torch.equal(out[0][:, : prompt.size(1)], prompt)


def test_generation_goes_on_from_the_last_half_block():
    """The policy for a full context, against a loop that spells it out."""
    model = make(std=0.5)
    out = tokens(1, 3)
    context = out
    with torch.no_grad():
        for _ in range(25):
            if context.size(1) > 8:
                context = context[:, -4:]
            token = model(context)[0][:, -1].argmax(dim=-1, keepdim=True)
            out, context = torch.cat([out, token], 1), torch.cat([context, token], 1)
    assert torch.equal(model.generate(tokens(1, 3), 25, temperature=0), out)


def test_a_row_of_a_batch_is_the_row_alone():
    model = make(std=0.5)
    prompt = tokens(4, 3)
    together = model.generate(prompt, 20, temperature=0)
    alone = torch.cat([model.generate(row[None], 20, temperature=0) for row in prompt])
    assert torch.equal(together, alone)


def test_stop_token_fills_up_and_ends():
    model = make(std=0.5)
    seen = []
    out = model.generate(
        tokens(6, 2), 200, stop_token=3, generator=torch.Generator().manual_seed(0), on_token=lambda t: seen.append(t)
    )
    new = out[:, 2:]
    assert (new == 3).any(dim=1).all() and new.size(1) < 200 and len(seen) == new.size(1)
    assert torch.equal(torch.stack(seen, 1), new)
    lengths = []
    for row in new:
        first = (row == 3).nonzero()[0, 0]
        assert (row[first:] == 3).all()
        lengths.append(first.item())
    assert max(lengths) == new.size(1) - 1 and min(lengths) < max(lengths)


def test_generation_leaves_the_mode_as_it_was_and_uses_no_dropout():
    model = make(std=0.5, dropout=0.5).train()
    out = [model.generate(tokens(1, 2), 20, temperature=0) for _ in range(2)]
    assert model.training and torch.equal(*out)


def test_sampling_follows_the_distribution(device):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], device=device).expand(200_000, -1)
    generator = torch.Generator(device).manual_seed(0)

    def frequencies(**options):
        drawn = sample_token(logits, generator=generator, **options).cpu()
        return torch.bincount(drawn, minlength=4) / len(drawn)

    def expected(weights):
        return torch.tensor(weights) / sum(weights)

    e = math.e
    cases = [
        ({}, [e**2, e, 1, 1 / e]),
        ({"temperature": 0.5}, [e**4, e**2, 1, e**-2]),
        ({"top_k": 2}, [e**2, e, 0, 0]),
        ({"top_k": 99}, [e**2, e, 1, 1 / e]),
        ({"top_p": 0.65}, [e**2, e, 0, 0]),  # the likeliest holds 0.644
        ({"top_p": 0.64}, [1, 0, 0, 0]),
        ({"top_p": 1.0}, [e**2, e, 1, 1 / e]),
        ({"temperature": 0}, [1, 0, 0, 0]),
    ]
    for options, weights in cases:
        torch.testing.assert_close(frequencies(**options), expected(weights), atol=0.005, rtol=0)


def test_one_batch_overfits():
    """Every logit can be learnt: a batch of noise goes below 0.01 nats."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**(TINY | {"n_embd": 32})), V)
    idx, targets = tokens(4, 8), tokens(4, 8, seed=2)
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


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_zeroes_its_share_evenly_and_keeps_the_mean(p):
    torch.manual_seed(0)
    dropout = Dropout(p).train()
    x = torch.ones(1000, 1003, requires_grad=True)
    y = dropout(x)
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=0.002)
    assert y[kept].unique().tolist() == pytest.approx([1 / (1 - p)], rel=1e-4)
    for axis in (0, 1):  # no row, no column and no neighbour is favoured
        share = kept.float().mean(dim=axis)
        assert share.std().item() == pytest.approx(math.sqrt(p * (1 - p) / 1000), rel=0.15)
    flat = kept.flatten().double() - (1 - p)
    for lag in (1, 2, 3, 4, 8):
        assert abs((flat[lag:] * flat[:-lag]).mean().item()) < 4 * p * (1 - p) / 1000
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_attention_by_hand_is_the_fused_one():
    """In training on a CPU; the gradient too. bfloat16 has 8 bits."""
    torch.manual_seed(0)
    attention = make(std=0.25).transformer["h"][0].attn
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 0.02)):
        q, k, v = (torch.randn(2, 2, 8, 8, dtype=dtype, requires_grad=True) for _ in range(3))
        fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        expected = torch.autograd.grad(fused.square().sum(), (q, k, v))
        attention.train()
        attention.attn_dropout = Dropout(2**-16)  # the smallest there is: by hand, and almost never anything to see
        by_hand = attention.attend(q, k, v) * (1 - 2**-16)
        torch.testing.assert_close(by_hand, fused, atol=tolerance, rtol=tolerance)
        for got, wanted in zip(torch.autograd.grad(by_hand.square().sum(), (q, k, v)), expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=5 * tolerance, rtol=5 * tolerance)


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


@pytest.mark.parametrize("shape", [(48,), (0, 48), (2, 0, 48), (1, 2, 3, 48)], ids=str)
def test_the_linear_takes_the_shapes_of_a_linear(shape):
    linear = Linear(48, 10).eval()
    x = torch.randn(shape)
    torch.testing.assert_close(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16


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
