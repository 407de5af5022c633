"""generation.py: the cache against the plain model, sampling against its distribution, and how a generator ends."""

import math

import pytest
import torch

from model import GPT
from quill.errors import UserError
from quill.generation import LayerCache, generate, sample_token, stream_tokens
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


def test_top_p_keeps_the_likeliest_and_at_1_everything(device, monkeypatch):
    """float32's running sum of 50,257 probabilities reaches 1 early; a top_p below float32's range is 0 in it."""
    logits = torch.linspace(0, -30, 50_257, device=device)[None]
    kept, multinomial = [], torch.multinomial

    def count(probs, *args, **options):
        kept.append(int((probs > 0).sum()))
        return multinomial(probs, *args, **options)

    monkeypatch.setattr(torch, "multinomial", count)
    for top_p in (1.0, 1e-46):
        token = sample_token(logits, top_p=top_p, generator=torch.Generator(device).manual_seed(0))
    assert kept == [50_257, 1]
    assert token.item() == 0


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_logits_that_are_not_finite_are_one_line(temperature):
    """As of weights that are finite, but so large that their products are not."""
    for logit in (math.nan, math.inf):
        with pytest.raises(UserError, match="logits are not finite"):
            sample_token(torch.tensor([[1.0, logit, 0.0]]), temperature)
    model = make()
    torch.nn.init.constant_(model.lm_head.weight, 1e308)
    with pytest.raises(UserError, match="logits are not finite"):
        generate(model, tokens(1, 3), 5, temperature=temperature)


def test_the_cache_has_room_for_what_is_asked_for(monkeypatch):
    """Three tokens after a prompt of two need five places of a block of eight; beyond the block, all eight are used."""
    made, create = [], LayerCache.__init__
    monkeypatch.setattr(LayerCache, "__init__", lambda self, capacity: made.append(self) or create(self, capacity))
    model = make(block_size=8, n_layer=1)
    for new, capacities in ((3, [5]), (6, [8]), (8, [8, 8])):
        made.clear()
        generate(model, tokens(1, 2), new)
        assert [layer.stored.size(3) for layer in made] == capacities
