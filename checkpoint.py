"""A run's state ↔ one file, and nanoGPT's checkpoints → ours.

A checkpoint is a dict of tensors and plain values. It is read with `weights_only=True`, so that a stranger's file can't
run code; its checksums are verified; and it is written whole or not at all. Its keys:

    format                  the number below
    config                  every option of the run (config/_schema.py's TrainConfig), as a dict
    flags                   those that came as flags: on resume, a config file does not undo them
    vocab_size, tokenizer   the tokenizer as in meta.json; None where it is not known
    model, ema              the weights, and their moving average or None
    optimizers, scaler      their state_dicts
    step, best_val_loss, evals_since_best, losses, seconds      train.py's Progress
"""

import os
import pickle
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import torch

from config._errors import UserError
from config._schema import ModelConfig, TrainConfig
from model import GPT

FORMAT = 1
SHAPE = {f.name for f in fields(ModelConfig)} - {"dropout"}  # options that a run's weights fix
KEYS = {"config", "vocab_size", "tokenizer", "model", "ema", "step", "best_val_loss"}


def save(path, state, best_path=None):
    """Write `state` to `path`, whole or not at all; and with `best_path` there too, first.

    First, because should the machine stop in between, the older `path` resumes and comes to the same best again.
    """
    path = Path(path)
    temporary = path.with_suffix(".tmp")
    try:
        for target in filter(None, [best_path, path]):
            with open(temporary, "wb") as file:
                torch.save({"format": FORMAT, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        if os.name == "posix":  # makes the new names last through a power cut; elsewhere a folder can't be opened
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:
        # torch's zip writer raises a RuntimeError of its own while it handles a failed write.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        temporary.unlink(missing_ok=True)
        raise UserError(f"can't write {path}: {cause.strerror or cause}; the checkpoint before it is kept") from None


def load(path):
    """The checkpoint at `path`, ours or nanoGPT's, as a dict with the keys above and its tensors on the CPU."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not look at the checksums that it writes
        if damaged is not None:
            raise UserError(f"{path}: damaged ({damaged} fails its checksum); use another checkpoint")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds more than tensors and plain values, which could run code; not opened") from None
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, RuntimeError, NotImplementedError):
        raise UserError(f"{path}: truncated, damaged, or not a checkpoint at all") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror or error}") from None
    if isinstance(state, dict) and {"model_args", "model"} <= state.keys():
        return _from_nanogpt(state, path)
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path}: not a checkpoint of quill's or nanoGPT's")
    if not isinstance(state["format"], int) or state["format"] > FORMAT:
        raise UserError(f"{path}: format {state['format']}, but this quill reads up to {FORMAT}; update quill")
    if not KEYS <= state.keys():
        raise UserError(f"{path}: not a whole checkpoint: {', '.join(sorted(KEYS - state.keys()))} missing")
    return state


def start(from_file, flags):
    """Options from a config file and from flags → (config, all the run's flags, checkpoint to start from or None)."""
    given = from_file | flags
    config = TrainConfig(**given)
    last = Path(config.out_dir) / "last.pt"
    if config.init_from == "auto":
        given["init_from"] = "resume" if last.is_file() else "scratch"
        config = TrainConfig(**given)

    # 1. resume: the run's own options, then what is given again.
    if config.init_from == "resume":
        if not last.is_file():
            raise UserError(f"{last}: nothing to resume; start the run with --init_from=scratch")
        state = load(last)
        given = {key: value for key, value in given.items() if key in flags or key not in state["flags"]}
        _refuse_changes(given, {key: state["config"][key] for key in SHAPE | {"optimizer"}}, last)
        known = {f.name for f in fields(TrainConfig)}
        base = {key: value for key, value in state["config"].items() if key in known}
        config = TrainConfig(**(base | given | {"init_from": "resume"}))
        if (config.ema_decay > 0) != (state["ema"] is not None):
            was = state["config"]["ema_decay"]
            raise UserError(f"--ema_decay={config.ema_decay}: {last} has ema_decay={was}; on or off can't change")
        return config, state["flags"] | flags, state

    # 2. scratch: the options alone.
    if config.init_from == "scratch":
        return config, flags, None

    # 3. a checkpoint to fine-tune: its shape and weights. All else, the optimizer too, starts anew.
    state = load(config.init_from)
    shape = {key: value for key, value in state["config"].items() if key in SHAPE}
    _refuse_changes(given, shape, config.init_from)
    return replace(config, **shape), flags, state


def _refuse_changes(given, fixed, path):
    for key in given.keys() & fixed.keys():
        if given[key] != fixed[key]:
            raise UserError(f"--{key}={given[key]}: {path} has {key}={fixed[key]}, which can't change; leave it out")


def load_model(state, path):
    """The model of a loaded checkpoint, on the CPU: its averaged weights where it has them."""
    shape = {f.name: state["config"][f.name] for f in fields(ModelConfig) if f.name in state["config"]}
    model = GPT(ModelConfig(**shape), state["vocab_size"])
    load_weights(model, state["model"] if state["ema"] is None else state["ema"], path)
    return model


def load_weights(model, weights, path):
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: its weights do not fit its own shape: {reason}") from None


def _from_nanogpt(state, path):
    """nanoGPT's ckpt.pt → ours: same names and shapes, less torch.compile's prefix and the attention's mask buffers."""
    args = state["model_args"]
    weights = {}
    for name, tensor in state["model"].items():
        name = name.removeprefix("_orig_mod.").removeprefix("module.")
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            weights[name] = tensor
    shape = ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")
    missing = [key for key in (*shape, "vocab_size") if key not in args]
    if missing:
        raise UserError(f"{path}: looks like nanoGPT's, but its model_args lack {', '.join(missing)}")
    config = {key: args[key] for key in shape}
    config["dataset"] = state.get("config", {}).get("dataset", "")
    return {
        "format": FORMAT,
        "config": config,
        "vocab_size": args["vocab_size"],
        "tokenizer": None,
        "model": weights,
        "ema": None,
        "step": state.get("iter_num", 0),
        "best_val_loss": float(state.get("best_val_loss", "inf")),
    }
