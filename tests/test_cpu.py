"""cpu.py: the faster layers compute what torch's compute, and take their place in a model under the same names."""

import math

import pytest
import torch

from model import GPT, CausalSelfAttention
from quill.cpu import Dropout, Float16Linear, Int8Linear, Linear, for_sampling, speed_up
from quill.generation import KVCache, generate
from quill.machine import Machine
from quill.options import ModelConfig

V = 11
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "bias": True, "init_std": 0.3}


def pair(**options):
    """The same model twice: as model.py makes it, and with the faster layers."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(GPT(ModelConfig(**(TINY | options)), V))
    return models[0], speed_up(models[1])


def test_names_and_parameters_stay():
    plain, fast = pair()
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in fast.named_modules()]
    assert {name: weight.tolist() for name, weight in plain.state_dict().items()} == {
        name: weight.tolist() for name, weight in fast.state_dict().items()
    }
    assert fast.lm_head.weight is fast.transformer.wte.weight and type(fast.lm_head) is Linear
    plain_types, fast_types = ({type(module).__module__ for module in model.modules()} for model in (plain, fast))
    assert "quill.cpu" not in plain_types and "quill.cpu" in fast_types
    before = [type(module) for module in fast.modules()]
    assert [type(module) for module in speed_up(fast).modules()] == before  # a second time changes nothing


def test_a_model_elsewhere_stays_as_it_is():
    with torch.device("meta"):
        model = GPT(ModelConfig(**TINY), V)
    assert type(speed_up(model).lm_head) is torch.nn.Linear


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("options", [{}, {"position": "rope", "qk_norm": True}], ids=["learned", "rope"])
def test_the_same_logits_and_gradients(options, dtype, tolerance):
    """In evaluation with few rows, and in training, where attention is computed by hand in bfloat16."""
    plain, fast = (model.to(dtype) for model in pair(**options))
    idx = torch.randint(V, (2, 8), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(fast.eval()(idx)[0], plain.eval()(idx)[0], atol=tolerance, rtol=tolerance)
    for model in (plain, fast):
        model.train()(idx, idx)[1].backward()
    for (name, a), b in zip(plain.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, atol=tolerance, rtol=tolerance, msg=name)


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


@pytest.mark.parametrize("shape", [(48,), (0, 48), (2, 0, 48), (1, 2, 3, 48)], ids=str)
def test_the_linear_takes_the_shapes_of_a_linear(shape):
    linear = Linear(48, 10).eval()
    x = torch.randn(shape)
    torch.testing.assert_close(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16


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
    attention = pair()[1].transformer["h"][0].attn
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


def small(dtype, **options):
    """A model for sampling whose weights have the type `dtype`, and the same model in float32."""
    options = {"n_embd": 32, "block_size": 16, "init_std": 0.2, **options}
    plain, model = pair(**options)
    machine = Machine(device=torch.device("cpu"), dtype=dtype, name="cpu")
    return for_sampling(model.eval(), machine), plain.eval()


@pytest.mark.parametrize("shape", [(1, 96), (33, 96), (2, 0, 96), (2, 3, 96)], ids=str)
@pytest.mark.parametrize("out, bias", [(1, True), (65, False), (130, True)])
@torch.no_grad()
def test_the_smaller_linears_are_products_of_rounded_weights(shape, out, bias):
    """Against float64: float16's product is exact to float32's rounding, int8's to that of its bfloat16 result."""
    torch.manual_seed(out)
    linear, x = torch.nn.Linear(96, out, bias=bias), torch.randn(shape[::-1]).permute(*range(len(shape))[::-1])
    added = linear.bias.double() if bias else 0
    half = linear.weight.half().double()
    torch.testing.assert_close(Float16Linear(linear)(x).double(), x.double() @ half.T + added, atol=1e-5, rtol=1e-5)
    int8 = Int8Linear(linear)
    weight = int8.weight.double() * int8.scale.double()[:, None]
    assert ((weight - linear.weight.double()).abs() <= 0.5001 * int8.scale.double()[:, None]).all()
    product = x.bfloat16().double() @ weight.T
    torch.testing.assert_close(int8(x).double() - added, product, atol=1e-5, rtol=2**-8)


@torch.no_grad()
def test_what_a_smaller_type_does_not_fit_stays():
    """torch's int8 kernel reads beyond rows that are not whole vectors; float16 has neither 1e5 nor nan."""
    assert [type(small(torch.int8, n_embd=n)[0].lm_head) for n in (32, 64, 16)] == [Int8Linear, Int8Linear, Linear]
    for value, kind in ((6e4, Float16Linear), (1e5, Linear), (math.nan, Linear), (-math.inf, Linear)):
        model = pair()[0]
        model.lm_head.weight[3, 1] = value
        machine = Machine(device=torch.device("cpu"), dtype=torch.float16, name="cpu")
        assert type(for_sampling(model, machine).lm_head) is kind
    linear = torch.nn.Linear(32, 2, bias=False)
    linear.weight.zero_()
    assert Int8Linear(linear)(torch.ones(1, 32)).tolist() == [[0, 0]]


ONE_TOKEN = {
    "learned": {},
    "rope, qk_norm": {"position": "rope", "qk_norm": True, "norm": "rmsnorm", "activation": "relu2"},
    "rope": {"position": "rope", "bias": False, "activation": "swiglu"},
    "qk_norm, n-grams": {"qk_norm": True, "ngram": 3, "ngram_rows": 37},
    "no MLP": {"mlp_ratio": 0},
    "no residual": {"residual": False},
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", ONE_TOKEN.values(), ids=ONE_TOKEN)
@torch.inference_mode()
def test_one_more_token_is_what_the_plain_block_computes(options, autocast, monkeypatch):
    """With dropout in the config, 3 rows, and the values that a cache of the plain model holds."""
    plain, fast = (model.eval() for model in pair(dropout=0.5, **options))
    idx = torch.randint(V, (3, 8), generator=torch.Generator().manual_seed(1))
    hidden, caches, forward, by_attention = [], [], CausalSelfAttention.forward, []
    monkeypatch.setattr(
        CausalSelfAttention, "forward", lambda self, *args: by_attention.append(self) or forward(self, *args)
    )
    for model in (plain, fast):
        cache = KVCache(model.config)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model.final_hidden(idx[:, :5], cache)
            hidden.append(torch.cat([model.final_hidden(idx[:, : t + 1], cache).float() for t in range(5, 8)], dim=1))
        caches.append(torch.stack([layer.stored.float() for layer in cache.layers]))
    steps = [4, 4] if {"mlp_ratio", "residual"} & options.keys() else [4, 1]  # the fast block does without the module
    assert [sum(module in model.modules() for module in by_attention) / 2 for model in (plain, fast)] == steps
    tolerance = (0.05 if autocast else 1e-5) * hidden[0].abs().max().item()
    torch.testing.assert_close(hidden[1], hidden[0], atol=tolerance, rtol=0)
    torch.testing.assert_close(caches[1], caches[0], atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-5), (torch.int8, 2**-6)], ids=str)
@pytest.mark.parametrize("options", [{}, {"position": "rope", "qk_norm": True, "bias": False}], ids=["learned", "rope"])
@torch.inference_mode()
def test_smaller_weights_with_a_cache_and_without(options, dtype, tolerance):
    """Logits and greedy tokens, to the rounding of the products: of float32, or of int8's bfloat16."""
    model, plain = small(dtype, **options)
    idx = torch.randint(V, (4, 12), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model.config)
    hidden = [
        model.final_hidden(idx[:, :5], cache),
        *(model.final_hidden(idx[:, : t + 1], cache) for t in range(5, 12)),
    ]
    cached, whole = model.lm_head(torch.cat(hidden, dim=1)), model(idx)[0]
    scale = whole.abs().max().item()
    assert (cached - whole).abs().max().item() <= tolerance * scale
    assert (whole - plain(idx)[0]).abs().max().item() <= 0.03 * scale  # 127 steps for a weight
    prompt = idx[:, :4]
    together = generate(model, prompt, 12, temperature=0)
    logits = model(together[:, :-1])[0][:, 3:]  # without a cache; a drawn token's logit is the largest but for rounding
    drawn = logits.gather(2, together[:, 4:, None])[:, :, 0]
    assert (logits.amax(dim=2) - drawn).max().item() <= tolerance * scale
    assert torch.equal(together, torch.cat([generate(model, row[None], 12, temperature=0) for row in prompt]))
    drawn = [generate(model, prompt, 20, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*drawn)
