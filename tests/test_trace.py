"""quill/trace.py: the numbers are those that the model computes, and the token is the one that sampling draws."""

import math

import numpy as np
import numpy_gpt
import pytest
import torch

from model import GPT
from quill import cpu
from quill.data.tokenizers import CharTokenizer
from quill.generation import stream_tokens
from quill.options import ModelConfig
from quill.trace import Trace, attention_steps, trace, trace_lines

V = 11
SHAPES = {
    "gpt2": {"bias": True},
    "rope": {"position": "rope", "norm": "rmsnorm", "qk_norm": True, "activation": "relu2"},
    "no positions, untied": {"position": "none", "tie_weights": False},
    "norm of the embedding": {"norm_embedding": True, "norm_final": False},
    "no norm, no residual": {"norm": "none", "residual": False, "init_std": 0.2},
    "n-grams": {"ngram": 3, "ngram_rows": 37},
    "n-grams, rope": {"ngram": 5, "ngram_rows": 37, "position": "rope"},
    "bigram": {"n_layer": 0, "n_head": 1, "position": "none", "norm": "none"},
}


def make(**options):
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "init_std": 0.5, "dropout": 0.4}
    config = ModelConfig(**(shape | options))
    return config, GPT(config, V)


def draw(model, idx, seed=0, **options):
    return trace(model, idx, torch.Generator(idx.device).manual_seed(seed), **options)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_numbers_are_the_models(shape, device):
    """Logits against the numpy reference; the vectors add up, and the last one times lm_head is the logits."""
    config, model = make(**shape)
    if config.ngram:
        torch.nn.init.normal_(model.transformer.ngrams.weight)  # it starts at 0
    model = cpu.speed_up(model.to(device))
    weights = {name: value.double().cpu().numpy() for name, value in model.state_dict().items()}
    idx = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]], device=device)  # longer than a block
    path = draw(model, idx, temperature=0.7)
    assert path.ids == idx[0, -8:].tolist()
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    np.testing.assert_allclose(path.logits, numpy_gpt.forward(np.array(path.ids), weights, config)[-1], atol=2e-5)
    np.testing.assert_allclose(path.vectors["wte"], weights["transformer.wte.weight"][3])
    names = ["wte"] + ["ngrams"] * bool(config.ngram) + ["wpe"] * (config.position == "learned")
    if config.ngram:
        expected = numpy_gpt.ngrams(np.array(path.ids), weights["transformer.ngrams.weight"], config.ngram)
        np.testing.assert_allclose(path.vectors["ngrams"], expected, rtol=1e-6, atol=1e-6)
    if config.position == "learned":
        np.testing.assert_allclose(path.vectors["wpe"], weights["transformer.wpe.weight"][7])
    if len(names) > 1:
        together = np.sum([path.vectors[name] for name in names], axis=0)
        np.testing.assert_allclose(path.vectors[" + ".join(names)], together, rtol=1e-6, atol=1e-6)
        names.append(" + ".join(names))
    names += ["ln_e"] * config.norm_embedding + [f"block {i}" for i in range(config.n_layer)]
    names += ["ln_f"] * (config.norm_final and config.norm != "none")
    assert list(path.vectors) == names
    np.testing.assert_allclose(weights["lm_head.weight"] @ path.vectors[names[-1]], path.logits, atol=2e-5)
    e = np.exp(np.array(path.logits) / 0.7 - max(path.logits) / 0.7)
    np.testing.assert_allclose(path.probs, e / e.sum(), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.6}, {"temperature": 2.0}])
def test_the_token_is_the_one_that_sampling_draws(options, device):
    """For 60 seeds, in a batch of three. The random numbers explain the draw: theirs is the largest quotient."""
    _, model = make()
    model.to(device)
    idx, tokens = torch.tensor([[3, 1, 4]] * 3, device=device), set()
    for seed in range(60):
        path = draw(model, idx, seed, **options)
        generator = torch.Generator(device).manual_seed(seed)
        (drawn,) = stream_tokens(model, idx, 1, generator=generator, **options)
        assert path.token == drawn[0]
        assert sum(path.probs) == pytest.approx(1, abs=1e-5)
        assert path.token == max(range(V), key=lambda i: path.probs[i] / path.numbers[i])
        tokens.add(path.token)
    assert len(tokens) > 1


def test_attention_steps_by_hand():
    """A head with the queries 0, 1, 2 and the keys 1, 2, 3 in one of D = 4 numbers: q kᵀ is their product."""
    config, model = make(n_layer=1, n_head=1, n_embd=4, position="none", norm="none")
    with torch.no_grad():
        model.transformer.wte.weight[:3] = torch.tensor([[0.0, 1, 0, 0], [1, 2, 0, 0], [2, 3, 0, 0]])
        model.transformer.h[0].attn.c_attn.weight.zero_()
        model.transformer.h[0].attn.c_attn.weight[0, 0] = model.transformer.h[0].attn.c_attn.weight[4, 1] = 1
    (steps,) = attention_steps(model, torch.tensor([[0, 1, 2]]))
    products = torch.tensor([[[0.0, 0, 0], [1, 2, 3], [2, 4, 6]]])
    e = math.e
    weights = [[1, 0, 0], [1 / (1 + e**0.5), e**0.5 / (1 + e**0.5), 0], [x / (1 + e + e * e) for x in (1, e, e * e)]]
    later = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)
    expected = [products, products / 2, (products / 2).masked_fill(later, -math.inf), torch.tensor([weights])]
    for got, wanted in zip(steps.values(), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_printed_trace():
    """Softmax of ln 6, ln 3, ln 1 is 0.6, 0.3, 0.1, and 0.3 / 0.1 is the largest quotient. No colours in a file."""
    logits = [math.log(3), 0.0, math.log(6)]
    path = Trace([2, 1], {"wte": [3.0, 4.0], "ln_f": [0.0, 1.0]}, logits, [0.3, 0.1, 0.6], [0.1, 0.5, 2.0], 0)
    steps = {"with the mask": torch.tensor([[0.5, -math.inf], [1.0, 2.0]])}
    text = "\n".join(trace_lines(path, steps, CharTokenizer("ab", is_documents=True), 0.5))
    assert "\033" not in text
    rows = [line.split() for line in text.splitlines() if line]
    assert rows[1:3] == [["<start>", "b"], ["2", "1"]]
    assert rows[4:6] == [["wte", "5.000", "3.000", "4.000"], ["ln_f", "1.000", "0.000", "1.000"]]
    assert rows[7:10] == [["<start>", "b"], ["<start>", "0.500", "-inf"], ["b", "1.000", "2.000"]]
    assert rows[12] == ["<end>", "1.792", "3.584", "0.600", "0.600", "2.000", "0.300"]
    assert rows[13] == ["a", "1.099", "2.197", "0.300", "0.900", "0.100", "3.000"]
    assert text.endswith(
        "a is drawn: it has the largest softmax / random. On a wheel from 0 to 1, its part is 0.6000 to 0.9000."
    )


@pytest.mark.parametrize("position", ["learned", "rope", "none"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_weights_times_values_are_what_the_model_computes(position, qk_norm):
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "dropout": 0.3, "init_std": 0.5, "bias": True}
    model = GPT(ModelConfig(**shape, position=position, qk_norm=qk_norm), 50)
    idx = torch.randint(50, (1, 17))
    maps = [steps["softmax"] for steps in attention_steps(model, idx)]
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    values, mixed = [], []
    for block in model.eval().transformer.h:
        block.attn.c_attn.register_forward_hook(lambda module, args, y: values.append(y[0, :, 64:]))
        block.attn.c_proj.register_forward_pre_hook(lambda module, args: mixed.append(args[0][0]))
    model(idx)
    assert len(maps) == len(mixed) == 2 and maps[0].shape == (4, 17, 17)
    for weights, v, y in zip(maps, values, mixed, strict=True):
        got = weights @ v.unflatten(1, (4, 8)).transpose(0, 1)
        torch.testing.assert_close(got.transpose(0, 1).flatten(1), y, atol=1e-5, rtol=1e-5)
        assert weights.std() > 0.1  # sharp: a map of another layer, or without the rotation, would not fit
