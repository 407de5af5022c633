"""generation.py: the cache against the plain model, sampling against its distribution, and how a generator ends.

Steps that a GPU records are tested on a CPU too, where they are done one by one.
"""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_model import SHAPES

from model import GPT
from quill import generation
from quill.cpu import OneTokenBlock, for_sampling
from quill.errors import UserError
from quill.generation import LayerCache, can_record, generate, record, sample_token, stream_tokens
from quill.machine import Machine
from quill.options import ModelConfig

V = 11
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "bias": True, "init_std": 0.5}


def make(device="cpu", **options):
    """A tiny float64 model, dropout off, with weights wide enough that differences can't hide."""
    torch.manual_seed(0)
    return GPT(ModelConfig(**(TINY | options)), V).double().eval().to(device)


def tokens(B, T, seed=1, device="cpu"):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("position", ["learned", "rope", "none"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "none"])
def test_the_cache_draws_what_the_plain_model_draws(position, norm, device):
    """Against GPT.generate, which computes the whole context for every token."""
    model = make(position=position, norm=norm, device=device)
    for length in (1, 8, 20):  # short, a block, longer than a block
        prompt = tokens(3, length, device=device)
        for options in ({"top_k": 1}, {"temperature": 0.9, "top_k": 5}):
            torch.manual_seed(5)
            plain = model.generate(prompt, 30, **options)
            torch.manual_seed(5)
            cached = generate(model, prompt, 30, **options)
            assert torch.equal(cached, plain)
            assert cached.shape == (3, length + 30) and torch.equal(cached[:, :length], prompt)


@pytest.mark.parametrize("ngram", [2, 5, 17])  # 17 is longer than a block
def test_the_cache_draws_what_the_plain_model_draws_with_ngrams(ngram, device):
    model = make(ngram=ngram, ngram_rows=97, device=device)
    torch.nn.init.normal_(model.transformer.ngrams.weight)  # it starts at 0
    for length in (1, 8, 20):
        prompt = tokens(3, length, device=device)
        assert torch.equal(generate(model, prompt, 30, top_k=1), model.generate(prompt, 30, top_k=1))


def test_a_model_without_layers_generates():
    model = make(n_layer=0)
    assert torch.equal(generate(model, tokens(2, 3), 20, top_k=1), model.generate(tokens(2, 3), 20, top_k=1))


def test_a_row_of_a_batch_is_the_row_alone():
    model = make()
    prompt = tokens(4, 3)
    together = generate(model, prompt, 20, temperature=0)
    alone = torch.cat([generate(model, row[None], 20, temperature=0) for row in prompt])
    assert torch.equal(together, alone)


def test_stop_token_fills_up_and_ends():
    model = make()
    options = {"stop_token": 3, "generator": torch.Generator().manual_seed(0)}
    out = generate(model, tokens(6, 2), 200, **options)
    options["generator"].manual_seed(0)
    seen = list(stream_tokens(model, tokens(6, 2), 200, **options))
    new = out[:, 2:]
    assert (new == 3).any(dim=1).all() and new.size(1) < 200 and len(seen) == new.size(1)
    assert torch.equal(torch.stack(seen, 1), new)
    lengths = []
    for row in new:
        first = (row == 3).nonzero()[0, 0]
        assert (row[first:] == 3).all()
        lengths.append(first.item())
    assert max(lengths) == new.size(1) - 1 and min(lengths) < max(lengths)


def test_generation_uses_no_dropout_and_restores_the_mode():
    """At the end, after an exception of the model's or of the consumer's, and when the consumer stops early."""
    model = make(dropout=0.5).train()
    out = [generate(model, tokens(1, 2), 20, temperature=0) for _ in range(2)]
    assert model.training and torch.equal(*out)
    for _ in stream_tokens(model, tokens(1, 2), 20):
        assert not model.training
        break
    assert model.training

    def consume():
        for _ in stream_tokens(model, tokens(1, 2), 20):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()
    assert model.training
    with pytest.raises(RuntimeError):
        generate(model, tokens(1, 2), 20, generator=torch.Generator("meta"))
    assert model.training
    model.eval()
    generate(model, tokens(1, 2), 2)
    assert not model.training


def test_sampling_follows_the_distribution(device):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], device=device).expand(200_000, -1)
    generator = torch.Generator(device).manual_seed(0)

    def frequencies(**options):
        noise = torch.empty(logits.shape, device=device).exponential_(generator=generator)
        drawn, finite = (x.cpu() for x in sample_token(logits, noise, **options))
        assert finite
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


def test_top_p_keeps_the_likeliest_and_at_1_everything(device):
    """float32's running sum of 50,257 probabilities reaches 1 early; a top_p below float32's range is 0 in it."""
    logits = torch.linspace(0, -30, 50_257, device=device)[None]
    kept = [generation.probabilities(logits, 1.0, None, top_p) > 0 for top_p in (1.0, 1e-46)]
    assert [int(tokens.sum()) for tokens in kept] == [50_257, 1]
    assert sample_token(logits, torch.ones_like(logits), top_p=1e-46)[0].item() == 0


@pytest.mark.parametrize("size", [11, 50_257])
def test_a_token_is_that_of_multinomial(size, device):
    """For the same seed, so that today's samples are those of earlier versions."""
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(1)).to(device)
    for options in ({}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.5}):
        generators = [torch.Generator(device).manual_seed(3) for _ in range(2)]
        probs = generation.probabilities(logits, **({"temperature": 1.0, "top_k": None, "top_p": None} | options))
        expected = torch.multinomial(probs, 1, generator=generators[0])[:, 0]
        noise = torch.empty_like(logits).exponential_(generator=generators[1])
        assert torch.equal(sample_token(logits, noise, **options)[0], expected)
        assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_logits_that_are_not_finite_are_one_line(temperature):
    """As of weights that are finite, but so large that their products are not."""
    for logit in (math.nan, math.inf):
        assert not sample_token(torch.tensor([[1.0, logit, 0.0], [1.0, 2.0, 0.0]]), torch.ones(2, 3), temperature)[1]
    model = make()
    torch.nn.init.constant_(model.lm_head.weight, 1e308)
    with pytest.raises(UserError, match="logits are not finite"):
        generate(model, tokens(1, 3), 5, temperature=temperature)


def test_the_cache_has_room_for_what_is_asked_for(monkeypatch):
    """Three tokens after a prompt of two need five places of a block of eight; beyond the block, all eight."""
    made, create = [], LayerCache.__init__
    monkeypatch.setattr(LayerCache, "__init__", lambda self, capacity: made.append(self) or create(self, capacity))
    model = make(block_size=8, n_layer=1)
    for new, capacities in ((3, [5]), (6, [8]), (8, [8])):
        made.clear()
        generate(model, tokens(1, 2), new)
        assert [layer.stored.size(3) for layer in made] == capacities


# ---------------------------------------------------------------- steps that a GPU records


def for_steps(device="cpu", **options):
    """Like `make`, with the blocks that a recording needs."""
    model = make(device, **options)
    for block in model.transformer.h:
        block.__class__ = OneTokenBlock
    if model.transformer.ngrams is not None:
        torch.nn.init.normal_(model.transformer.ngrams.weight)  # it starts at 0
    return model


@pytest.fixture
def one_by_one(monkeypatch):
    """Let stream_tokens take the steps that a GPU records, on any device, without a recording. → the repeated ones"""
    repeated = []

    def fake(work):
        work()
        return lambda: repeated.append(work())

    monkeypatch.setattr(generation, "can_record", lambda *_: True)
    monkeypatch.setattr(generation, "record", fake)
    return repeated


def keep_logits(model):
    """→ a list that gets the last token's logits (B, V) of each call of the model."""
    kept = []
    model.lm_head.register_forward_hook(lambda module, args, logits: kept.append(logits.clone()))
    return kept


MASKED = {name: shape for name, shape in SHAPES.items() if shape.get("residual", True) and shape.get("mlp_ratio", 4)}


@pytest.mark.parametrize("shape", [*MASKED.values(), {"ngram": 17, "ngram_rows": 97}], ids=[*MASKED, "17-grams"])
def test_recorded_steps_draw_what_the_plain_model_draws(shape, device, one_by_one, monkeypatch):
    """Logits and tokens, beyond the block too; with a seed, the tokens that are drawn without a recording."""
    model = for_steps(device, **shape)
    for rows, length, new in ((1, 1, 19), (3, 20, 9)):
        prompt = tokens(rows, length, device=device)
        kept = keep_logits(model)
        out = generate(model, prompt, new, temperature=0)
        logits, start = kept[:new], max(0, length - 8)
        assert torch.equal(out, model.generate(prompt, new, top_k=1))
        for t in range(length, length + new):
            start = t - 4 if t - start > 8 else start
            torch.testing.assert_close(logits[t - length], model(out[:, start:t])[0][:, -1], atol=1e-10, rtol=1e-10)
        for options in ({"temperature": 0.9, "top_k": 5, "stop_token": 3}, {"top_p": 0.8}):
            drawn = [generate(model, prompt, new, generator=torch.Generator(device).manual_seed(2), **options)]
            with monkeypatch.context() as patch:
                patch.setattr(generation, "can_record", lambda *_: False)
                drawn += [generate(model, prompt, new, generator=torch.Generator(device).manual_seed(2), **options)]
            assert torch.equal(*drawn)
    assert len(one_by_one) > 40


@pytest.mark.parametrize("block_size", [1, 2, 3, 16, 17])
def test_recorded_steps_with_a_context_of_any_length(block_size, one_by_one):
    model = for_steps(block_size=block_size, n_layer=1)
    assert torch.equal(generate(model, tokens(2, 2), 30, temperature=0), model.generate(tokens(2, 2), 30, top_k=1))


def test_recorded_steps_do_not_wait_for_the_gpu(one_by_one):
    """The meta device has shapes and no numbers. To read one there is an error, as in a recording."""
    model = for_steps("meta", n_layer=1, position="rope", ngram=3, ngram_rows=37)
    kept = keep_logits(model)
    with pytest.raises(RuntimeError, match="meta"):  # at the end: 12 tokens are fewer than AHEAD
        next(stream_tokens(model, tokens(2, 5, device="meta"), 12, top_k=5, top_p=0.9, stop_token=3))
    assert len(kept) == 12 and len(one_by_one) > 4


def test_recorded_steps_yield_no_token_of_logits_that_are_not_finite(one_by_one, monkeypatch):
    """The position 6 is damaged: five tokens after a prompt of two are right, and are read in pairs."""
    monkeypatch.setattr(generation, "AHEAD", 2)
    model, seen = for_steps(), []
    right = generate(model, tokens(1, 2), 5, temperature=0)[0, 2:]
    model.transformer.wpe.weight.data[6] = math.nan
    stream = map(seen.append, stream_tokens(model, tokens(1, 2), 6, temperature=0))
    with pytest.raises(UserError, match="logits are not finite"):
        list(stream)
    assert torch.equal(torch.cat(seen), right[:4])


def test_what_is_recorded(monkeypatch):
    """Only on a GPU, outside autocast, with blocks that take a mask, and where it pays."""
    model, idx = for_steps(), tokens(1, 2)
    assert not can_record(model, idx, 100)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch.Tensor, "get_device", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert can_record(model, idx, 100) and can_record(for_steps(n_layer=0), idx, 100)
    assert not can_record(model, idx, 8)
    assert not any(can_record(for_steps(**shape), idx, 100) for shape in ({"residual": False}, {"mlp_ratio": 0}))
    assert not can_record(make(), idx, 100)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert not can_record(model, idx, 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [{}, {"position": "rope", "qk_norm": True, "ngram": 3, "ngram_rows": 37}], ids=str)
def test_a_recording_repeats_the_step(dtype, shape, monkeypatch, capsys, gpu):
    """Bitwise, so that even samples are equal; beyond the block, and for two models in turn."""
    options = {"n_embd": 128, "block_size": 48, "bias": False} | shape
    machine = Machine(device=torch.device("cuda"), dtype=dtype, name="cuda")
    models = [for_sampling(make(**(options | more)).float(), machine) for more in ({}, {"n_layer": 3})]
    prompt, recorded, made = tokens(3, 5, device="cuda"), [], []
    monkeypatch.setattr(generation, "record", lambda work: made.append(record(work)) or made[-1])
    for sampling in ({"temperature": 0}, {"top_k": 5}, {"top_p": 0.9, "temperature": 0.8}):
        drawn = [generate(model, prompt, 100, generator=seeded(1), **sampling) for model in models]
        again = [stream_tokens(model, prompt, 100, generator=seeded(1), **sampling) for model in models]
        for out, stream in zip(drawn, zip(*zip(*again, strict=True), strict=True), strict=True):
            assert torch.equal(out[:, 5:], torch.stack(stream, dim=1))
        recorded.append(drawn)
    assert len(made) == 12 and "note" not in capsys.readouterr().err
    assert not torch.equal(recorded[1][0], generate(models[0], prompt, 100, generator=seeded(2), top_k=5))
    monkeypatch.setattr(generation, "record", lambda work: work() or work)
    for sampling, drawn in zip(({"temperature": 0}, {"top_k": 5}), recorded, strict=False):
        for model, out in zip(models, drawn, strict=True):
            assert torch.equal(out, generate(model, prompt, 100, generator=seeded(1), **sampling))


def seeded(seed):
    return torch.Generator("cuda").manual_seed(seed)


def test_a_recording_draws_what_the_cache_draws(monkeypatch, gpu):
    """In float64, in which rounding changes no token; a row that has stopped too. It leaves no memory behind."""
    model, prompt, memory = for_steps("cuda", block_size=40), tokens(4, 3, device="cuda"), []
    for options in ({"temperature": 0}, {"top_k": 5}, {"stop_token": 3}):
        drawn = generate(model, prompt, 100, generator=seeded(1), **options)
        with monkeypatch.context() as patch:
            patch.setattr(generation, "can_record", lambda *_: False)
            assert torch.equal(drawn, generate(model, prompt, 100, generator=seeded(1), **options))
        del drawn
        memory.append(torch.cuda.memory_allocated())
    assert memory[1] == memory[2]  # the first call makes what libraries keep
    torch.manual_seed(5)
    drawn = generate(model, prompt, 100)  # the default generator
    torch.manual_seed(5)
    assert torch.equal(drawn, generate(model, prompt, 100))
    for _ in stream_tokens(model, prompt, 100):
        break
    torch.nn.init.constant_(model.lm_head.weight, 1e308)
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="logits are not finite"):
            generate(model, prompt, 100, temperature=temperature)


def test_without_a_recording_generation_goes_on(gpu):
    """After work that waits for the GPU, which can't be recorded. In its own process, because it may leave traces."""
    code = (
        "import torch\n"
        "from quill.generation import record\n"
        "x = torch.zeros(1, device='cuda')\n"
        "again = record(lambda: x.add_(1).item())\n"
        "again()\n"
        "assert torch.cuda.current_stream() == torch.cuda.default_stream()\n"
        "print(int(x))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout == "2\n", done.stderr
    assert done.stderr.startswith("note: no CUDA graph was recorded (")


def test_a_recording_that_fails_is_a_note(monkeypatch, capsys):
    """With stand-ins for torch's classes: what is recorded is done once, and repeated as it is."""

    class Graph:
        def __init__(self, graph=None):
            self.capture_stream, self.cuda_graph = self, graph

        def wait_stream(self, stream):
            pass

        def __enter__(self):
            raise RuntimeError("operation not permitted\nwhen a stream is capturing")

        def __exit__(self, *error):
            pass

    class Stream(Graph):
        def __enter__(self):
            pass

    for name, value in (("CUDAGraph", Graph), ("graph", Graph), ("stream", Stream), ("current_stream", Stream)):
        monkeypatch.setattr(torch.cuda, name, value)
    done = []
    again = record(lambda: done.append(1))
    assert done == [1]
    again()
    assert done == [1, 1]
    expected = "note: no CUDA graph was recorded (operation not permitted); generation continues without it\n"
    assert capsys.readouterr().err == expected
