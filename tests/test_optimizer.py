"""optimizer.py: schedules by their formulas, each parameter in one group, AdamW and Muon against torch's."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT
from quill import checkpoint
from quill.machine import pick_machine
from quill.optimizer import AdamW, BatchedMuon, learning_rate, make_optimizers, orthogonalize
from quill.options import TrainConfig
from quill.parallel import Strategy

ALONE = Strategy(pick_machine(TrainConfig(device="cpu")))


def test_schedules_by_formula():
    """nanoGPT's get_lr for cosine; the others by hand."""

    def config(**options):
        return TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=4, max_iters=20, **options)

    for step in range(4):
        assert learning_rate(step, config()) == pytest.approx((step + 1) / 5)
    for step in range(4, 21):
        expected = 0.1 + 0.5 * (1 + math.cos(math.pi * (step - 4) / 16)) * 0.9
        assert learning_rate(step, config()) == pytest.approx(expected)
        assert learning_rate(step, config(schedule="linear")) == pytest.approx(1 - 0.9 * (step - 4) / 16)
        assert learning_rate(step, config(schedule="constant")) == 1.0
        wsd = 1.0 if step < 16 else 1 - 0.9 * (step - 16) / 4
        assert learning_rate(step, config(schedule="wsd")) == pytest.approx(wsd)
    assert learning_rate(50, config()) == pytest.approx(0.1)
    assert learning_rate(10, config(lr_decay_iters=10)) == pytest.approx(0.1)


def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    for optimizer in ("adamw", "muon"):
        config = TrainConfig(
            optimizer=optimizer, n_layer=2, n_head=2, n_embd=16, block_size=8, bias=True, weight_decay=0.25
        )
        model = GPT(config, 11)
        optimizers = make_optimizers(model, config, ALONE)
        groups = [group for one, _ in optimizers for group in one.param_groups]
        grouped = [parameter for group in groups for parameter in group["params"]]
        assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
        for group in groups:
            for parameter in group["params"]:
                assert group["weight_decay"] == (0.25 if parameter.dim() == 2 else 0.0)
        kinds = [type(one).__name__ for one, _ in optimizers]
        assert kinds == (["AdamW"] if optimizer == "adamw" else ["AdamW", "BatchedMuon"])
    in_muon = {id(parameter) for parameter in optimizers[1][0].param_groups[0]["params"]}
    assert in_muon == {id(p) for name, p in model.named_parameters() if ".h." in name and p.dim() == 2}


CLASSIC = (3.4445, -4.7750, 2.0315)


def newton_schulz(matrices, size, steps):
    """Jordan et al.'s iteration as they write it, on matrices divided by `size`."""
    a, b, c = CLASSIC
    x = matrices / size[:, None, None].clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def test_adamw_is_torchs():
    """Bit for bit, after a step, a save, a load and further steps with another learning rate."""
    ours, theirs = (torch.nn.Linear(8, 8) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    before = ours.weight.detach().clone()
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1, "fused": True}
    one, other = AdamW(ours.parameters(), **settings), torch.optim.AdamW(theirs.parameters(), **settings)
    for step in range(3):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step))
            b.grad = a.grad.clone()
        one.step()
        other.step()
        for optimizer, module in ((one, ours), (other, theirs)):
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.param_groups[0]["lr"] *= 0.5
            assert not any(state["exp_avg"].requires_grad for state in optimizer.state.values())
            assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not torch.equal(ours.weight, before)


def test_optimizers_do_not_import_the_compiler():
    """torch._dynamo, which all of torch's own import: half a second of a run's start. In a process of its own."""
    program = """if True:
        import sys, torch
        from model import GPT
        from quill.machine import pick_machine
        from quill.optimizer import make_optimizers
        from quill.options import TrainConfig
        from quill.parallel import Strategy
        config = TrainConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, optimizer="muon")
        model = GPT(config, 5)
        model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))[1].backward()
        optimizers = [optimizer for optimizer, _ in make_optimizers(model, config, Strategy(pick_machine(config)))]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        print(len(optimizers), "torch._dynamo" in sys.modules)
    """
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, encoding="utf-8")
    assert done.stdout == "2 False\n", done.stderr


def test_muon_is_torchs(monkeypatch):
    """Ten steps on matrices wide, tall and square, compared with torch.optim.Muon, which updates them one by one.

    Both with torch's iteration, five steps in bfloat16 from the usual norm, so that all else is compared.
    """

    def as_torch_does(matrices, **_):
        if matrices.size(1) > matrices.size(2):
            return as_torch_does(matrices.mT).mT
        matrices = matrices.bfloat16()
        return newton_schulz(matrices, torch.linalg.matrix_norm(matrices), 5).float()

    monkeypatch.setattr("quill.optimizer.orthogonalize", as_torch_does)
    shapes = [(8, 24), (8, 24), (24, 8), (8, 8), (32, 8)]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    one = BatchedMuon(ours, 0.02, ALONE, momentum=0.9, weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1)
    for _ in range(10):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        one.step()
        other.step()
    for a, b, matrix in zip(ours, theirs, start, strict=True):
        moved = (b - matrix).norm().item()
        assert moved > 0.3 and (a - b).norm().item() < 0.01 * moved  # bfloat16's rounding apart
        buffers = one.state[a]["momentum_buffer"], other.state[b]["momentum_buffer"]
        torch.testing.assert_close(*buffers, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=str)
def test_orthogonalize_is_a_polynomial_of_the_singular_values(dtype, error):
    """Against the decomposition in float64: u p(p(p(p(s)))) vᵀ, where p(s) = a s + b s³ + c s⁵."""
    matrices = torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(0)).double()
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    s = s / (s**4).sum(dim=1, keepdim=True) ** 0.25
    for _ in range(4):
        s = CLASSIC[0] * s + CLASSIC[1] * s**3 + CLASSIC[2] * s**5
    expected = u @ torch.diag_embed(s) @ vt
    got = orthogonalize(matrices.to(dtype), CLASSIC, 4, 1e-7)
    assert got.dtype == dtype
    assert (torch.linalg.matrix_norm(got.double() - expected) < error * torch.linalg.matrix_norm(expected)).all()


def test_orthogonalize_keeps_its_word_on_gradients_of_low_rank(device):
    """A gradient's singular values span many orders: matrices of rank 2, and nearly, against the plain iteration.

    The tolerance on a GPU is TF32's.
    """
    torch.set_float32_matmul_precision("high")  # as a run on a GPU does
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(64, 2, generator=generator) @ torch.randn(2, 256, generator=generator)
    matrices = torch.stack([thin, thin + 1e-3 * torch.randn(64, 256, generator=generator)])
    double = matrices.double()
    expected = newton_schulz(double, torch.linalg.matrix_norm(double @ double.mT).sqrt(), 4)
    atol = 1e-5 if device.type == "cpu" else 0.03
    got = orthogonalize(matrices.to(device), CLASSIC, 4, 1e-7)
    torch.testing.assert_close(got.cpu().double(), expected, atol=atol, rtol=0)


class TF32(TorchDispatchMode):
    """Round the factors of products to TF32's 10 bits, as a GPU does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            args = (*args[:-2], *map(self.rounded, args[-2:]))
        return func(*args, **(kwargs or {}))

    def rounded(self, tensor):
        return (tensor.contiguous().view(torch.int32) + 2**12 & -(2**13)).view(torch.float32)


@pytest.mark.parametrize("kind, error", [("full rank", 0.01), ("rank 4", 0.1), ("six orders", 0.1)])
def test_orthogonalize_is_safe_in_tf32(kind, error):
    """Of the norm, with TF32; in bfloat16, low ranks are wrong by a third."""
    matrices = torch.randn(2, 64, 256, generator=torch.Generator().manual_seed(0))
    if kind != "full rank":
        u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
        s = torch.arange(64) < 4 if kind == "rank 4" else torch.logspace(0, -6, 64)
        matrices = u * s @ vt
    expected = orthogonalize(matrices.double(), CLASSIC, 4, 1e-7)
    with TF32():
        got = orthogonalize(matrices, CLASSIC, 4, 1e-7)
    assert 1e-4 < (got - expected).norm() / expected.norm() < error


def test_a_gradient_that_vanishes_stays_small():
    """As in torch's: below eps, the singular values are not moved to 1."""
    matrices = torch.randn(1, 16, 48, generator=torch.Generator().manual_seed(0))
    matrices /= torch.linalg.matrix_norm(matrices)
    whole, small, none = (orthogonalize(size * matrices, CLASSIC, 4, 1e-7) for size in (1e-6, 1e-12, 0))
    torch.testing.assert_close(whole, orthogonalize(matrices, CLASSIC, 4, 1e-7), atol=1e-5, rtol=0)
    assert 0 < small.norm() < 1e-2 and torch.equal(none, torch.zeros_like(none))


def test_orthogonalized_singular_values_are_near_one():
    """Four steps from the nearer bound, compared with five from the usual norm, on a gradient's falling spectrum."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 128, generator=generator))[0] for n in (128, 512))
    spectrum = torch.logspace(0, -1.5, 128)  # a factor of 30
    matrices = (u * spectrum @ v.T)[None]
    values = torch.linalg.svdvals(orthogonalize(matrices, CLASSIC, 4, 1e-7))
    five = torch.linalg.svdvals(newton_schulz(matrices, torch.linalg.matrix_norm(matrices), 5))
    for made in (values, five):
        assert made.min() > 0.6 and made.max() < 1.3
    # and the singular vectors are the matrix's own: u vᵀ of its decomposition, up to those values
    made = orthogonalize(matrices, CLASSIC, 4, 1e-7)[0]
    assert torch.linalg.matrix_norm(made - u @ v.T) / math.sqrt(128) < 0.35


def test_muon_takes_four_steps_after_a_resume_of_a_run_that_took_five():
    model = GPT(TrainConfig(n_layer=1, n_head=1, n_embd=8, block_size=4), 5)
    muon = make_optimizers(model, TrainConfig(optimizer="muon"), ALONE)[1][0]
    assert muon.param_groups[0]["ns_steps"] == 4
    saved = muon.state_dict()
    saved["param_groups"][0]["ns_steps"] = 5
    checkpoint.load_optimizer(muon, saved, ALONE)
    assert muon.param_groups[0]["ns_steps"] == 4
