"""A run's state ↔ one file; how a run starts from one; nanoGPT's checkpoints → ours.

A checkpoint is a dict of tensors and plain values. It is read with `weights_only=True`, so that a stranger's file can't
run code; its checksums are verified; and it is written whole or not at all. Its keys:

    format                  the number below
    config                  every option of the run (quill/options.py's TrainConfig), as a dict
    flags                   those that came as flags: on resume, a config file does not undo them
    vocab_size, tokenizer   the tokenizer as in meta.json; None where it is not known
    model, ema              the weights, and their moving average or None
    optimizers, scaler      their state_dicts
    step, best_val_loss, evals_since_best, losses, seconds      train.py's Progress
"""

import pickle
import zipfile
from dataclasses import fields
from pathlib import Path

import torch

from model import GPT
from quill.cli import note
from quill.errors import UserError
from quill.files import lock_folder, replacing
from quill.options import ModelConfig, TrainConfig

FORMAT = 1
SHAPE = {f.name for f in fields(ModelConfig)} - {"dropout", "attention_dropout"}  # options that a run's weights fix
SAMPLE_KEYS = {"config", "vocab_size", "tokenizer", "model", "ema", "step", "best_val_loss"}
RESUME_KEYS = {"flags", "optimizers", "scaler", "losses", "seconds", "evals_since_best"}


# ---------------------------------------------------------------- the file


def save(path, state):
    """Write `state` to `path`, whole or not at all."""
    try:
        with replacing(path) as (file,):
            try:
                torch.save({"format": FORMAT, **state}, file)
            except RuntimeError as error:
                # torch's zip writer raises one of its own while it handles a failed write.
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    except UserError as error:
        raise UserError(f"{error}; what {path} held is kept") from None


def load(path):
    """The checkpoint at `path`, ours or nanoGPT's, as a dict with the keys above and its tensors on the CPU."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not look at the checksums that it writes
        if damaged is None:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds more than tensors and plain values, which could run code; not opened") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror or error}") from None
    except Exception:  # a damaged pickle can fail in any way
        raise UserError(f"{path}: truncated, damaged, or not a checkpoint at all") from None
    if damaged is not None:
        raise UserError(f"{path}: damaged ({damaged} fails its checksum); use another checkpoint")
    if isinstance(state, dict) and {"model_args", "model"} <= state.keys():
        return _from_nanogpt(state, path)
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path}: not a checkpoint of quill's or nanoGPT's")
    if not isinstance(state["format"], int) or state["format"] > FORMAT:
        raise UserError(f"{path}: format {state['format']}, but this quill reads up to {FORMAT}; update quill")
    _require(state, SAMPLE_KEYS, path)
    kinds = {"config": dict, "vocab_size": int, "model": dict}
    if wrong := [key for key, kind in kinds.items() if not isinstance(state[key], kind)]:
        raise UserError(f"{path}: damaged: {', '.join(wrong)} is not what it should be")
    return state


def _require(state, keys, path):
    if missing := sorted(keys - state.keys()):
        raise UserError(f"{path}: not a whole checkpoint: {', '.join(missing)} missing")


def load_model(state, path):
    """The model of a loaded checkpoint, on the CPU: its averaged weights where it has them."""
    try:
        shape = {f.name: state["config"][f.name] for f in fields(ModelConfig) if f.name in state["config"]}
        model = GPT(ModelConfig(**shape), state["vocab_size"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: the shape of its model makes no sense: {str(error).splitlines()[0]}") from None
    load_weights(model, state["model"] if state["ema"] is None else state["ema"], path)
    return model


def load_weights(model, weights, path):
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: its weights do not fit its own shape: {reason[:200]}") from None
    if not all(weight.isfinite().all() for weight in model.state_dict().values()):
        raise UserError(f"{path}: its weights are not finite; use an earlier checkpoint")


def load_optimizer(optimizer, saved):
    """The saved moments, with the settings that this run was given."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(saved)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the checkpoint's optimizer state does not fit this run: {error}") from None
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)


# ---------------------------------------------------------------- a run's start


def start(from_file, flags):
    """Options from a config file and from flags → (config, all the run's flags, checkpoint to start from or None)."""
    given = from_file | flags
    out_dir = given.get("out_dir", TrainConfig.out_dir)
    init_from = given.get("init_from", TrainConfig.init_from)
    # Both are whole states; best.pt comes alone when a run is killed in its very first save.
    held = [path for path in (Path(out_dir) / "last.pt", Path(out_dir) / "best.pt") if path.is_file()]
    if init_from == "auto":
        init_from = "resume" if held else "scratch"

    # 1. resume: the run's own options, then what is given again.
    if init_from == "resume":
        if not held:
            theirs = Path(out_dir) / "ckpt.pt"
            other = f"nanoGPT's {theirs} can be fine-tuned with --init_from={theirs}" if theirs.is_file() else ""
            raise UserError(f"{out_dir}: nothing to resume; {other or 'start the run with --init_from=scratch'}")
        state = load(held[0])
        _require(state, RESUME_KEYS, held[0])
        old_flags = {key: value for key, value in state["flags"].items() if key in from_file and key not in flags}
        for key in sorted(key for key, value in old_flags.items() if value != from_file[key]):
            note(f"note: {key}={old_flags[key]} was a flag of this run's, which the config file does not undo")
        given = {key: value for key, value in given.items() if key not in old_flags}
        _refuse_changes(given, _fixed(state, SHAPE | {"optimizer"}), held[0])
        known = {f.name for f in fields(TrainConfig)}
        base = {key: value for key, value in state["config"].items() if key in known}
        config = TrainConfig(**(base | given | {"init_from": "resume", "out_dir": out_dir}))
        if (config.ema_decay > 0) != (state["ema"] is not None):
            was = state["config"]["ema_decay"]
            raise UserError(f"--ema_decay={config.ema_decay}: {held[0]} has ema_decay={was}; on or off can't change")
        return config, state["flags"] | flags, state

    if held and not any(given.get(key) for key in ("overwrite", "eval_only", "dry_run")):
        raise UserError(
            f"{held[0]} is another run's: resume it with --init_from=resume, "
            "choose another --out_dir, or replace it with --overwrite=True"
        )

    # 2. scratch: the options alone.
    if init_from == "scratch":
        return TrainConfig(**(given | {"init_from": "scratch"})), flags, None

    # 3. a checkpoint to fine-tune: its shape and weights. All else, the optimizer too, starts anew.
    if init_from.startswith("gpt2"):
        raise UserError(f"--init_from={init_from}: GPT-2's weights are not read; give scratch, resume or a checkpoint")
    state = load(init_from)
    shape = _fixed(state, SHAPE)
    _refuse_changes(given, shape, init_from)
    return TrainConfig(**(given | shape)), flags, state


def _fixed(state, keys):
    """A checkpoint's values of `keys`; of an option that it is too old to know, the default."""
    return {key: state["config"].get(key, getattr(TrainConfig, key)) for key in keys}


def _refuse_changes(given, fixed, path):
    for key in sorted(given.keys() & fixed.keys()):
        if given[key] != fixed[key]:
            raise UserError(f"{key}={given[key]}: {path} has {key}={fixed[key]}, which can't change; leave {key} out")


def claim(config):
    """Take possession of out_dir for as long as the process lives; a fresh run takes the place of what is there."""
    folder = Path(config.out_dir)
    lock_folder(folder)
    if config.init_from != "resume":
        for name in ("last.pt", "best.pt", "metrics.csv"):
            (folder / name).unlink(missing_ok=True)
        for path in folder.glob("tensorboard/events.out.tfevents.*"):
            path.unlink()


def check_vocabulary(state, dataset):
    """A checkpoint goes on with the vocabulary that it was trained on."""
    tokenizer = dataset.tokenizer
    unknown = state["tokenizer"] is None  # nanoGPT's: its size has to do
    if state["vocab_size"] != tokenizer.vocab_size or not (unknown or state["tokenizer"] == tokenizer.to_json()):
        raise UserError(f"--dataset={dataset.name}: its vocabulary is not the one that the checkpoint was trained on")


# ---------------------------------------------------------------- nanoGPT


def _from_nanogpt(state, path):
    """nanoGPT's ckpt.pt → ours: same names and shapes, less torch.compile's prefix and the attention's mask buffers."""
    shape = ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")
    try:
        weights = {}
        for name, tensor in state["model"].items():
            name = name.removeprefix("_orig_mod.").removeprefix("module.")
            if not name.endswith((".attn.bias", ".attn.masked_bias")):
                weights[name] = tensor
        return {
            "format": FORMAT,
            "config": {
                **{key: state["model_args"][key] for key in shape},
                "dataset": state.get("config", {}).get("dataset", ""),
            },
            "vocab_size": state["model_args"]["vocab_size"],
            "tokenizer": None,
            "model": weights,
            "ema": None,
            "step": state.get("iter_num", 0),
            "best_val_loss": float(state.get("best_val_loss", "inf")),
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: looks like nanoGPT's, but something is amiss: {error}") from None
