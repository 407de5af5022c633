"""Save a run's state to a file, load it again, and decide how a run starts.

A checkpoint is a dict of tensors and plain values. It is read with `weights_only=True`, so that a file from a stranger
can't run code. Its checksums are verified. It is written whole or not at all. Its keys:

    format                  the number below
    config                  every option of the run (TrainConfig in quill/options.py), as a dict
    flags                   the options that were given as flags, which override a config file on resume too
    vocab_size, tokenizer   the tokenizer as in meta.json; None where it is not known
    model, ema              the weights, and their moving average or None
    optimizers, scaler      their state_dicts
    step, best_val_loss, evals_since_best, losses, seconds      Progress in quill/state.py
    data_order              which order of the data the run follows: see quill/data/batches.py (since format 2)
    threads                 CPU threads, which decide how sums are rounded; None where unknown (since format 2)
"""

import pickle
import warnings
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import torch

from model import GPT
from quill.cli import note
from quill.data.token_files import Dataset
from quill.distributed import AgreedError
from quill.errors import UserError, check
from quill.files import replacing
from quill.interop import NANOGPT_KEYS, PRETRAINED, find_pretrained, from_nanogpt, read_folder, without_padding
from quill.options import ModelConfig, Options, TrainConfig
from quill.parallel import Strategy
from quill.run_folder import RunFolder, what_is_kept
from quill.schema import SkipInit, check_to_resume, check_to_sample

Checkpoint = dict[str, Any]  # the content of a file: the keys above

FORMAT = 2
# The options that a run's weights fix.
ARCHITECTURE_KEYS = {f.name for f in fields(ModelConfig)} - {"dropout", "attention_dropout"}
REQUIRED_KEYS = {"config", "vocab_size", "tokenizer", "model", "ema", "step", "best_val_loss"}
RESUME_KEYS = {"flags", "optimizers", "scaler", "losses", "seconds", "evals_since_best", "data_order", "threads"}
FORMAT_1 = {"data_order": 1, "threads": None}  # what a checkpoint of format 1 means by the keys that it lacks


def save(path: Path | str, state: Checkpoint) -> None:
    """Write `state` to `path`, whole or not at all. Raise a UserError if it can't be written."""
    try:
        with replacing(path) as (file,):
            write(file, state)
    except UserError as error:
        raise UserError(f"{error}; {what_is_kept(Path(path).parent)}") from None


def write(file: BinaryIO, state: Checkpoint) -> None:
    """Write `state` to an open file. Raise an OSError if the operating system refuses."""
    try:
        torch.save({"format": FORMAT, **state}, file)
    except RuntimeError as error:
        # torch's zip writer raises an error of its own while it handles a failed write.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def load(path: Path | str) -> Checkpoint:
    """Load a file of quill's or nanoGPT's, or a Hugging Face folder with weights of GPT-2's family.

    → a dict with the keys above, tensors on the CPU. Raise a UserError if it is damaged or has a newer format.
    """
    path = Path(path)
    state = {"format": FORMAT, **read_folder(path)} if (path / "config.json").is_file() else _read(path)
    if isinstance(state, dict) and state.keys() >= NANOGPT_KEYS:
        state = {"format": FORMAT, **from_nanogpt(state, path)}
    check(isinstance(state, dict) and "format" in state, f"{path}: not a checkpoint of quill's or nanoGPT's")
    is_known = type(state["format"]) is int and 1 <= state["format"] <= FORMAT
    check(is_known, f"{path}: format {state['format']!r}, but this quill reads up to {FORMAT}; update quill")
    if state["format"] == 1:
        state = FORMAT_1 | state
    _require(state, REQUIRED_KEYS, path)
    check_to_sample(state, path)
    return state


def find(out_dir: str | Path) -> Path:
    """Return the path of the best checkpoint in `out_dir`. Raise a UserError if there is none."""
    names = ("best.pt", "last.pt", "ckpt.pt")
    for path in (Path(out_dir) / name for name in names):
        if path.is_file():
            return path
    raise UserError(f"{out_dir}: has none of {', '.join(names)}; train a run first, or name a checkpoint")


def _read(path):
    """Verify the checksums of the file `path` and unpickle it, tensors and plain values only."""
    check(not path.is_dir(), f"{path}: a folder without config.json; name a checkpoint in it, such as last.pt")
    check(path.is_file(), f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has advice for some files that are no checkpoints
            damaged = archive.testzip()  # torch does not verify the checksums that it writes
            if any(member.external_attr for member in archive.infolist()):
                raise ValueError("torch writes none, and takes a member that is marked as a folder for empty")
            if damaged is None:
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds more than tensors and plain values, which could run code; not opened") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror or error}") from None
    except Exception:  # a damaged pickle can fail in any way
        raise UserError(f"{path}: truncated, damaged, or not a checkpoint at all") from None
    raise UserError(f"{path}: damaged ({damaged} fails its checksum); use another checkpoint")


def _require(state, keys, path):
    if missing := sorted(keys - state.keys()):
        raise UserError(f"{path}: not a whole checkpoint: {', '.join(missing)} missing")


def load_model(state: Checkpoint) -> GPT:
    """Return the model of a loaded checkpoint, on the CPU, with its averaged weights if it has them."""
    config = {f.name: state["config"][f.name] for f in fields(ModelConfig) if f.name in state["config"]}
    with SkipInit():
        model = GPT(ModelConfig(**config), state["vocab_size"])
    model.load_state_dict(weights_to_sample(state))
    return model


def weights_to_sample(state: Checkpoint) -> dict[str, torch.Tensor]:
    """Return the weights that samples and evaluations use: their moving average, if the run has one."""
    return state["model"] if state["ema"] is None else state["ema"]


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], strategy: Strategy) -> None:
    """Restore the saved moments, but keep the settings that `optimizer` has, because a resume may change them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        i: {key: strategy.shard(t, parameters[i]) if t.shape == parameters[i].shape else t for key, t in own.items()}
        for i, own in saved["state"].items()
    }
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def resolve_start(
    from_file: Options, flags: Options, folder: RunFolder
) -> tuple[TrainConfig, Options, Checkpoint | None]:
    """Combine the config file, the flags and a checkpoint.

    → the config, all flags that this run was ever given, and the checkpoint to start from or None
    folder: the run's folder, which is locked if the run trains. Raise a UserError if an option contradicts the
    checkpoint, or if the folder has another run.
    """
    given: Options = from_file | flags
    init_from = given.get("init_from", TrainConfig.init_from)
    held = folder.checkpoints()
    if init_from == "auto":
        init_from = "resume" if held else "scratch"

    # 1. resume: the run's own options, then what is given again.
    if init_from == "resume":
        return _resume(from_file, flags, held)

    # 2. scratch: the options alone.
    if init_from == "scratch":
        given["init_from"] = "scratch"
        config, state = TrainConfig(**given), None

    # 3. fine-tune: the checkpoint's architecture and weights. All else, the optimizer too, starts anew.
    else:
        state = load(find_pretrained(init_from) if init_from in PRETRAINED else init_from)
        architecture = _values(state, ARCHITECTURE_KEYS)
        _refuse_changes(given, architecture, init_from)
        config = TrainConfig(**(given | architecture))
    if not (config.eval_only or config.dry_run):
        folder.refuse_another_run(config)
    return config, flags, state


def _resume(from_file, flags, held):
    given: Options = from_file | flags
    out_dir = given.get("out_dir", TrainConfig.out_dir)
    if not held:
        theirs = Path(out_dir) / "ckpt.pt"
        other = f"nanoGPT's {theirs} can be fine-tuned with --init_from={theirs}" if theirs.is_file() else ""
        raise UserError(f"{out_dir}: nothing to resume; {other or 'start the run with --init_from=scratch'}")
    path = held[0]
    state = load(path)
    _require(state, RESUME_KEYS, path)
    check_to_resume(state, path)
    old_flags = {key: value for key, value in state["flags"].items() if key in from_file and key not in flags}
    for key in sorted(key for key, value in old_flags.items() if value != from_file[key]):
        note(f"note: {key}={old_flags[key]} was given as a flag earlier, and flags override the config file")
    given = {key: value for key, value in given.items() if key not in old_flags}
    _refuse_changes(given, _values(state, ARCHITECTURE_KEYS | {"optimizer", "val_split"}), path)
    options: Options = _values(state, {f.name for f in fields(TrainConfig)})
    config = TrainConfig(**(options | given | {"init_from": "resume", "out_dir": out_dir}))
    problem = f"{path} has ema_decay={options['ema_decay']}; a resumed run can't turn averaging on or off"
    check((config.ema_decay > 0) == (state["ema"] is not None), f"ema_decay={config.ema_decay}: {problem}")
    return config, state["flags"] | flags, state


def _values(state, keys):
    """Return a checkpoint's values of the options `keys`, and the defaults of those that it is too old to have."""
    return {key: state["config"].get(key, getattr(TrainConfig, key)) for key in keys}


def _refuse_changes(given, fixed, path):
    for key in sorted(given.keys() & fixed.keys()):
        if given[key] != fixed[key]:
            raise UserError(f"{key}={given[key]}: {path} has {key}={fixed[key]}, which can't change; leave {key} out")


def match_vocabulary(state: Checkpoint, dataset: Dataset) -> Checkpoint:
    """Return `state` without padded ids. Raise a UserError if it was trained with another vocabulary than `dataset`."""
    tokenizer, theirs = dataset.tokenizer, state["tokenizer"]
    if theirs is None:  # nanoGPT's checkpoints know the number of ids only
        state = without_padding(state, tokenizer.vocab_size)
    # GPT-2's <|endoftext|> is among its ids. It can start documents, whether the model has seen any or not.
    same = theirs is None or theirs | {"documents": None} == tokenizer.to_json() | {"documents": None}
    if state["vocab_size"] != tokenizer.vocab_size or not same:
        own = f"({tokenizer.vocab_size} ids, {tokenizer.kind})"
        other = f"({state['vocab_size']} ids, {theirs['kind'] if theirs else 'unknown'})"
        problem = f"its vocabulary {own} is not the one that the checkpoint was trained on {other}"
        raise AgreedError(f"dataset={dataset.name}: {problem}")
    return state
