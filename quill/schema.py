"""What a checkpoint must hold: types, ranges and shapes, checked before anything is built from it, and then trusted.

A file with valid checksums can still hold anything: edited by hand, or written by another program. Every check here
raises a UserError that names the file, the key, what was expected and what was found.
"""

import math
import re
import sys
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from model import GPT
from quill.cli import coerce, option_types
from quill.data.tokenizers import from_json
from quill.errors import UserError, check
from quill.options import ModelConfig, TrainConfig

LARGEST = 2**53  # of a count: what a float can hold exactly


@contextmanager
def _naming(path):
    """Add the name of the file `path` to an error."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: damaged: {error}; use another checkpoint") from None


def check_to_sample(state: dict[str, Any], path: Path | str) -> None:
    """Raise a UserError if the keys that sampling and fine-tuning use are not as they must be."""
    with _naming(path):
        config, vocab_size = _require(state, "config", _is_options, "options"), _count(state, "vocab_size", 1)
        _check_options("config", config)
        _count(state, "step", 0)
        _require(state, "best_val_loss", lambda value: isinstance(value, float) and not math.isnan(value), "a number")
        if state["tokenizer"] is not None:
            try:
                tokenizer = from_json(state["tokenizer"])
            except UserError as error:
                raise UserError(f"tokenizer: {error}") from None
            if tokenizer.vocab_size != vocab_size:
                raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, but vocab_size is {vocab_size}")
        expected = _expected_shapes(config, vocab_size, state["model"])
        tied = config.get("tie_weights", ModelConfig.tie_weights)
        _check_weights("model", state["model"], expected, tied)
        if state["ema"] is not None:
            _check_weights("ema", state["ema"], expected, tied)


def check_to_resume(state: dict[str, Any], path: Path | str) -> None:
    """Raise a UserError if the keys that only a resume uses are not as they must be."""
    with _naming(path):
        _check_options("flags", _require(state, "flags", _is_options, "options"))
        _require(state, "losses", lambda x: isinstance(x, list) and all(map(_is_finite, x)), "finite numbers")
        check(len(state["losses"]) <= state["step"], f"{len(state['losses'])} losses, but only {state['step']} steps")
        _require(state, "seconds", lambda value: _is_finite(value) and value >= 0, "a number, 0 or more")
        _count(state, "evals_since_best", 0)
        _require(state, "scaler", lambda x: isinstance(x, dict) and all(map(_is_finite, x.values())), "numbers")
        _require(state, "optimizers", lambda x: isinstance(x, list) and all(isinstance(o, dict) for o in x), "states")
        _require(state, "data_order", lambda value: type(value) is int and value in (1, 2, 3), "1, 2 or 3")
        if state["threads"] is not None:
            _require(state, "threads", lambda value: type(value) is int and 1 <= value <= 4096, "from 1 to 4096")


def check_moments(
    optimizers: list[torch.optim.Optimizer], saved: list[dict[str, Any]], step: int, path: Path | str
) -> None:
    """Raise a UserError if `saved` are not states of `optimizers` after `step` steps, with finite values."""
    with _naming(path):
        check(len(saved) == len(optimizers), f"{len(saved)} optimizers, but this run has {len(optimizers)}")
        for optimizer, state in zip(optimizers, saved, strict=True):
            _check_moments(optimizer, state, step)


def _check_options(name, options):
    """Every option that this quill knows must have its type. An int becomes the float that an option takes."""
    types_ = option_types(TrainConfig)
    for key, value in options.items():
        if key in types_:
            right = coerce(value, types_[key], f"{name}: ", key)
            has_type = type(value) is type(right) or (type(value), type(right)) == (int, float)
            check(has_type, f"{name}: {key} must be {right!r}, not {_short(value)}")
            options[key] = right


def _check_moments(optimizer, saved, step):
    groups, moments = saved.get("param_groups"), saved.get("state")
    own = [group["params"] for group in optimizer.state_dict()["param_groups"]]  # numbers of parameters
    are_dicts = isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
    # Compared as texts, because a damaged file can hold anything, and == of tensors is no bool.
    if not are_dicts or repr([group.get("params") for group in groups]) != repr(own) or not isinstance(moments, dict):
        raise UserError("an optimizer's groups are not this run's")
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
    names = {"momentum_buffer"} if isinstance(optimizer, torch.optim.Muon) else {"step", "exp_avg", "exp_avg_sq"}
    if step and set(moments) != set(parameters):
        found = f"{len(moments)} of {len(parameters)}"
        raise UserError(f"an optimizer has moments of {found} parameters after {step} steps")
    for index, values in moments.items():
        if not isinstance(values, dict) or set(values) != names or index not in parameters:
            raise UserError(f"an optimizer's moments must be {', '.join(sorted(names))}")
        for name, value in values.items():
            shape = torch.Size() if name == "step" else parameters[index].shape
            if not _is_plain_tensor(value) or value.shape != shape or not value.isfinite().all():
                raise UserError(f"{name} of a parameter must be finite and have the shape {tuple(shape)}")


class SkipInit(TorchFunctionMode):
    """Do not draw a model's initial weights. On the meta device, that would import torch's compiler: 2 s."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        is_drawing = getattr(func, "__module__", None) == "torch.nn.init"
        return None if is_drawing else func(*args, **(kwargs or {}))


def without_memory(config: ModelConfig, vocab_size: int) -> GPT:
    """Return a model whose weights have shapes, but no values and no memory, so that it may have any size."""
    with torch.device("meta"), SkipInit():
        return GPT(config, vocab_size)


def _expected_shapes(config, vocab_size, weights):
    """Return the shapes that the model's weights must have, from a model without memory. → {name: shape}"""
    check(isinstance(weights, dict) and all(isinstance(name, str) for name in weights), "model must be weights by name")
    layers = {match[1] for name in weights if (match := re.match(r"transformer\.h\.(\d+)\.", name))}
    names = {f.name for f in fields(ModelConfig)}
    try:
        options = ModelConfig(**{key: value for key, value in config.items() if key in names})
        # Counted first, because a model of very many layers takes long to build even without memory.
        if options.n_layer != len(layers):
            raise UserError(f"config has n_layer={options.n_layer}, but model has the weights of {len(layers)} layers")
        model = without_memory(options, vocab_size)
    except UserError as error:
        raise UserError(f"config: {error}") from None
    except (RuntimeError, ValueError, OverflowError) as error:
        raise UserError(f"config: no model has this shape: {str(error).splitlines()[0]}") from None
    return {name: weight.shape for name, weight in model.state_dict().items()}


def _check_weights(key, weights, expected, tied):
    check(isinstance(weights, dict), f"{key} must be weights by name, not {_short(weights)}")
    if missing := sorted(expected.keys() - weights.keys()):
        raise UserError(f"{key} lacks {missing[0]}")
    if unknown := sorted(map(str, weights.keys() - expected.keys())):
        raise UserError(f"{key} has {unknown[0][:60]}, which this model does not have")
    for name, shape in expected.items():
        if not _is_plain_tensor(weights[name]) or weights[name].shape != shape:
            raise UserError(f"{name} of {key} must be a tensor of numbers with the shape {tuple(shape)}")
        check(weights[name].isfinite().all(), f"{name} of {key} is not finite")
    if tied and not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        raise UserError(f"lm_head.weight and transformer.wte.weight of {key} differ, but config ties them")


def _require(state, key, is_right, what):
    value = state[key]
    check(is_right(value), f"{key} must be {what}, not {_short(value)}")
    return value


def _count(state, key, at_least):
    what = f"a whole number from {at_least}"
    return _require(state, key, lambda value: type(value) is int and at_least <= value <= LARGEST, what)


def _is_finite(value):
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # math.isfinite fails for larger integers


def _is_options(value):
    plain = (bool, int, float, str, type(None))
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, plain) for k, v in value.items())


def _is_plain_tensor(value):
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return plain and value.is_floating_point() and value.element_size() > 1  # float8 has no arithmetic


def _short(value):
    text = f"<{type(value).__name__}>" if isinstance(value, (dict, list, tuple, torch.Tensor)) else repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
