"""Convert checkpoints of other programs. nanoGPT's are supported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quill.errors import UserError

NANOGPT_KEYS = {"model_args", "model"}  # every nanoGPT checkpoint has them; quill's have no model_args
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers that old versions of nanoGPT and transformers stored


def from_nanogpt(state: dict[str, Any], path: Path | str) -> dict[str, Any]:
    """Convert the content of nanoGPT's ckpt.pt. → what `checkpoint.load` returns, without its format number

    Parameters have the same names and shapes. torch.compile's prefix and the masks are dropped. Raise a UserError if
    the file lacks a part.
    """
    try:
        args, weights = state["model_args"], {}
        for name, tensor in state["model"].items():
            if not name.endswith(MASKS):
                weights[name.removeprefix("_orig_mod.").removeprefix("module.")] = tensor
        config = {key: args[key] for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")}
        config["dataset"] = state.get("config", {}).get("dataset", "")
        values = {"config": config, "vocab_size": args["vocab_size"], "tokenizer": None, "model": weights, "ema": None}
        return values | {"step": state.get("iter_num", 0), "best_val_loss": float(state.get("best_val_loss", "inf"))}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: looks like a nanoGPT checkpoint, but can't be read: {error}") from None
