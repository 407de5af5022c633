"""Convert models and tokenizers to Hugging Face's formats, and weights of nanoGPT and of GPT-2's family to quill's.

A GPT with learned positions is a GPT-2, whose parameters have the same names. RoPE needs a class like Llama's, which
has RMSNorm. Nothing in a folder is executed: weights are read from safetensors, or with `weights_only=True`.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from model import GPT
from quill.data import bpe
from quill.data.token_files import read_tokenizer
from quill.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from quill.errors import UserError, check

NANOGPT_KEYS = {"model_args", "model"}  # every nanoGPT checkpoint has them; quill's have no model_args
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers that old versions of nanoGPT and transformers stored
# Values of options that no class of transformers has: in any model, with RoPE, and without.
REFUSED = {"n_layer": 0, "norm": "none", "norm_final": False, "mlp_ratio": 0, "residual": False, "position": "none"}
REFUSED_WITH_ROPE = {"bias": True}
REFUSED_WITHOUT = {"norm": "rmsnorm", "norm_embedding": True, "activation": "swiglu", "qk_norm": True}
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "relu2": "relu2"}
TRANSPOSED = ("c_attn.weight", "c_fc.weight", "c_proj.weight")  # GPT-2's class holds them as (in, out)
WTE, LM_HEAD = "transformer.wte.weight", "lm_head.weight"
PRETRAINED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2 = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True}
GPT2 |= {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def find_class(config: Any, path: Path) -> str:
    """Return the class of transformers that computes a GPT with `config`. Raise a UserError if there is none."""
    rope = config.position == "rope"
    refused = [*REFUSED.items(), *(REFUSED_WITH_ROPE if rope else REFUSED_WITHOUT).items()]
    check(not config.ngram, f"{path}: no counterpart of ngram={config.ngram} in transformers (see docs/interop.md)")
    if options := [f"{key}={value}" for key, value in refused if getattr(config, key) == value]:
        near = "" if config.position == "none" else f" with position={config.position}"
        raise UserError(f"{path}: no counterpart of {', '.join(options)}{near} in transformers (see docs/interop.md)")
    if not rope:
        return "GPT2LMHeadModel"
    if config.activation == "swiglu":
        return "Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"
    return "ApertusForCausalLM" if config.qk_norm else "ArceeForCausalLM"


@torch.no_grad()
def to_transformers(model: GPT, bos: int | None, path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Convert the model of the checkpoint `path`. → config.json's values, and float32 weights. bos: its id, or None."""
    name, weights = find_class(model.config, path), {key: w.double() for key, w in model.state_dict().items()}
    values, weights = _to_gpt2(model, weights) if name.startswith("GPT2") else _to_llama(model, weights, name)
    values |= {"architectures": [name], "vocab_size": model.vocab_size, "tie_word_embeddings": LM_HEAD not in weights}
    values |= {"bos_token_id": bos, "eos_token_id": bos, "pad_token_id": None, "dtype": "float32"}
    return values, {key: weight.float().contiguous() for key, weight in weights.items()}


def _to_gpt2(model, weights):
    """Convert to GPT2LMHeadModel, whose Linear and LayerNorm always have biases."""
    config, theirs = model.config, {}
    for key, weight in weights.items():
        theirs[key] = weight.T if key.endswith(TRANSPOSED) else weight
        if not config.bias and (".h." in key or ".ln_f." in key):
            theirs[key.replace("weight", "bias")] = weight.new_zeros(len(weight))
    if config.tie_weights:
        del theirs[LM_HEAD]
    values = {key: getattr(config, key) for key in ("n_embd", "n_layer", "n_head")}
    values |= {"n_positions": config.block_size, "n_inner": model.transformer.h[0].mlp.c_proj.in_features}
    values |= GPT2 | {"activation_function": ACTIVATIONS[config.activation]}
    return values | dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0), theirs


def _to_llama(model, weights, name):
    """Convert to the class `name`, one of Llama's kind.

    RMSNorm is LayerNorm for vectors of mean 0. Every vector of the residual stream has mean 0 if the outputs of all
    matrices that add to it are centred. lm_head keeps the embedding as it was, so it is untied.
    """
    config, kind = model.config, name.removesuffix("ForCausalLM").lower()
    parts = {
        "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.c_proj": ("self_attn.o_proj",),
        "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj") if config.activation == "swiglu" else ("mlp.up_proj",),
        "mlp.c_proj": ("mlp.down_proj",),
        "ln_1": ("attention_layernorm" if kind == "apertus" else "input_layernorm",),
        "ln_2": ("feedforward_layernorm" if kind == "apertus" else "post_attention_layernorm",),
    }
    centred, head_dim = config.norm == "layernorm", config.n_embd // config.n_head
    ones = torch.ones(config.n_embd, dtype=torch.float64)  # the weights of rmsnorm and of qk_norm
    embedding = model.transformer.ln_e.double()(weights[WTE])
    embedding = embedding - embedding.mean(dim=1, keepdim=True) if centred else embedding
    theirs = {"model.embed_tokens.weight": embedding, "model.norm.weight": weights.get("transformer.ln_f.weight", ones)}
    if centred or config.norm_embedding or not config.tie_weights:
        theirs[LM_HEAD] = weights[LM_HEAD]
    for i in range(config.n_layer):
        for our, names in parts.items():
            weight = weights.get(f"transformer.h.{i}.{our}.weight", ones)
            if centred and our.endswith("c_proj"):
                weight = weight - weight.mean(dim=0)
            for part, rows in zip(names, weight.chunk(len(names)), strict=True):
                theirs[f"model.layers.{i}.{part}.weight"] = rows
        if config.qk_norm:
            theirs |= {f"model.layers.{i}.self_attn.{part}_norm.weight": ones[:head_dim] for part in "qk"}
    values = {"model_type": kind, "hidden_size": config.n_embd, "num_hidden_layers": config.n_layer}
    values |= {"num_attention_heads": config.n_head, "num_key_value_heads": config.n_head, "head_dim": head_dim}
    values |= {"intermediate_size": model.transformer.h[0].mlp.c_proj.in_features, "rms_norm_eps": 1e-5}
    values |= {"hidden_act": ACTIVATIONS.get(config.activation, "silu"), "max_position_embeddings": config.block_size}
    values |= {"rope_theta": 1e4, "rope_scaling": None}  # where transformers 4 looks for them; below, transformers 5
    return values | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, theirs


def bos_name(tokenizer: Tokenizer) -> str:
    r"""Return the name of BOS in an exported tokenizer: "\n" where it replaces the newline."""
    if tokenizer.bos in tokenizer.special:
        return tokenizer.special[tokenizer.bos]
    return "\n" if tokenizer.bos_is_newline else bpe.SPECIAL


def to_tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of the tokenizer.json that encodes and decodes as `tokenizer` does. BOS is a special token."""
    content: dict[str, Any] = {"version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if isinstance(tokenizer, CharTokenizer):
        split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        vocab = {char: i for i, char in enumerate(tokenizer.chars)}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}  # not in `vocab`: unknown ones are an error
        content |= {"pre_tokenizer": split, "model": model, "decoder": {"type": "Fuse"}}
    elif isinstance(tokenizer, BPETokenizer):
        content = tokenizer.description | {"truncation": None, "padding": None, "decoder": level}  # as quill does
    else:
        model = {"type": "BPE", "vocab": bpe.byte_of_character(), "merges": []}
        content |= {"pre_tokenizer": level, "model": model, "decoder": level}
    if tokenizer.bos is not None:
        bos, name = tokenizer.bos, bos_name(tokenizer)
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        others = [token for token in content.get("added_tokens") or [] if token["id"] != bos]
        content["added_tokens"] = [*others, {"id": bos, "content": name, **flags}]
        template = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        special = {name: {"id": name, "ids": [bos], "tokens": [name]}}
        processor = {"type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": special}
        content["post_processor"] = processor
    return content


def from_nanogpt(state: dict[str, Any], path: Path | str) -> dict[str, Any]:
    """Convert nanoGPT's ckpt.pt, whose parameters have the same names. Raise a UserError if it lacks a part.

    → what `checkpoint.load` returns, without its format number
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


def read_folder(folder: Path) -> dict[str, Any]:
    """Read a folder with weights of GPT-2's family. → what `checkpoint.load` returns, without its format number

    Types, names and shapes are left to quill/schema.py. Raise a UserError if the folder has another model.
    """
    activations = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for key, value in GPT2.items():
            if values.get(key, "" if key == "model_type" else value) != value:
                raise ValueError(f"{key} is {values.get(key)!r}, and not {value!r}")
        config = {key: values[key] for key in ("n_layer", "n_head", "n_embd")}
        hidden = values.get("n_inner") or 4 * values["n_embd"]
        ratio = hidden / values["n_embd"]
        if int(ratio * values["n_embd"]) < hidden:  # 55 / 49 × 49 is below 55
            ratio = math.nextafter(ratio, math.inf)
        tied = values.get("tie_word_embeddings", True)
        config |= {"block_size": values["n_positions"], "mlp_ratio": ratio, "bias": True, "tie_weights": tied}
        config |= {"activation": activations[values.get("activation_function", "gelu_new")], "dataset": ""}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{folder / 'config.json'}: not of a GPT-2 that can be read: {error!r}") from None
    weights, tokenizer = {}, _read_tokenizer(folder)
    for key, weight in _read_weights(folder).items():
        if not key.endswith(MASKS):
            weight = weight.T if key.endswith(TRANSPOSED) and weight.dim() == 2 else weight
            weights[key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"] = weight
    if tied and WTE in weights:
        weights[LM_HEAD] = weights[WTE]
    state = {"config": config, "vocab_size": values.get("vocab_size"), "model": weights, "ema": None}
    state |= {"tokenizer": tokenizer and tokenizer.to_json(), "step": 0, "best_val_loss": math.inf}
    return without_padding(state, tokenizer.vocab_size) if tokenizer else state


def without_padding(state: dict[str, Any], size: int) -> dict[str, Any]:
    """Cut the ids after the first `size`, if they are padding to a multiple of 64 or 128, as of 50,257 to 50,304."""
    if size < 1024 or state["vocab_size"] not in [-(-size // n) * n for n in (64, 128)]:
        return state  # a small vocabulary is not padded
    weights = {key: weight[:size] if key in (WTE, LM_HEAD) else weight for key, weight in state["model"].items()}
    return state | {"vocab_size": size, "model": weights}


def find_pretrained(name: str) -> Path:
    """Return the folder of OpenAI's GPT-2 `name` in Hugging Face's cache. Raise a UserError if it is not there."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
    for repository in (f"models--openai-community--{name}", f"models--{name}"):
        for path in hub.glob(f"{repository}/snapshots/*/config.json"):
            return path.parent
    command = f"hf download openai-community/{name} --local-dir {name}"
    raise UserError(f"--init_from={name}: not in {hub}; get it with `{command}`, then give --init_from=./{name}")


def safetensors() -> Any:
    """Return the module safetensors.torch. Raise a UserError if the package is missing."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("model.safetensors needs a package: pip install safetensors") from None
    return safetensors.torch


def _read_weights(folder):
    """Read model.safetensors, in one file or several, or pytorch_model.bin. → {name: tensor}"""
    names = [name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()][:1]
    path, weights = folder / "model.safetensors", {}
    try:
        if not names:
            index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
            names = sorted({Path(name).name for name in index["weight_map"].values()})
        for path in map(folder.joinpath, names):
            is_pickle = path.suffix == ".bin"
            weights |= torch.load(path, "cpu", weights_only=True) if is_pickle else safetensors().load_file(path)
        if all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in weights.items()):
            return weights
    except UserError:
        raise
    except Exception:  # a damaged file can fail in any way
        pass
    raise UserError(f"{path}: missing, truncated, damaged, or holds more than tensors")


def _read_tokenizer(folder):
    """Return the tokenizer of a folder: one that `to_tokenizer_json` has written, or BPE. None if there is no file."""
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        chars = [token for token in content["model"]["vocab"] if len(token) == 1]
        kinds = ((False, False), (True, True), (True, False))
        own = [tokenizer for k in kinds for tokenizer in (ByteTokenizer(*k), CharTokenizer(chars, *k))]
        return next(tokenizer for tokenizer in own if to_tokenizer_json(tokenizer) == content)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, StopIteration):
        has_files = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
        return read_tokenizer(str(folder)) if has_files else None
