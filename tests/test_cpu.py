"""cpu.py: the faster layers compute what torch's compute, and take their place in a model under the same names."""

import math

import pytest
import torch

from model import GPT
from quill.cpu import Dropout, Linear, speed_up
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
