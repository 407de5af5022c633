"""interop.py and export.py: folders for transformers and back, against numpy, and (slow) against transformers."""

import json
import math
import os
import pickle
import sys
from dataclasses import asdict

import numpy as np
import numpy_gpt
import pytest
import torch

import export
import sample
import train
from model import GPT
from quill import checkpoint
from quill.cli import config_files, read_config_file
from quill.data import token_files
from quill.data.tokenizers import ByteTokenizer, CharTokenizer
from quill.errors import UserError
from quill.generation import generate
from quill.interop import to_tokenizer_json
from quill.options import TrainConfig

st = pytest.importorskip("safetensors.torch")

TEXT = "anna\nzoë: To be,\tor  not?\r\n 🙂 e\u0301 x"
TOKENIZERS = [CharTokenizer(TEXT), CharTokenizer(TEXT, True), ByteTokenizer(), ByteTokenizer(True)]
V = TOKENIZERS[0].vocab_size
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12}
CLASSES = {  # of each shipped config; for those without, the options that the refusal names
    "gpt2": "GPT2LMHeadModel",
    "names": "GPT2LMHeadModel",
    "shakespeare_char": "GPT2LMHeadModel",
    "shakespeare_char_cpu": "GPT2LMHeadModel",
    "7_layernorm": "GPT2LMHeadModel",
    "8_dropout": "GPT2LMHeadModel",
    "names32k": "ApertusForCausalLM",
    "shakespeare_char_fast": "ngram=5",
    "shakespeare_char_laptop": "ApertusForCausalLM",
    "shakespeare_char_best": "ApertusForCausalLM",
    "speedrun_gpu": "ApertusForCausalLM",
    "speedrun_cpu": "ngram=5",
    "microgpt": "norm_final=False, norm=rmsnorm, norm_embedding=True with position=learned",
    "0_bigram": "n_layer=0, norm=none, mlp_ratio=0, residual=False, position=none",
    "1_positions": "n_layer=0, norm=none, mlp_ratio=0, residual=False with position=learned",
    "2_attention": "norm=none, mlp_ratio=0, residual=False with position=learned",
    "3_multihead": "norm=none, mlp_ratio=0, residual=False with position=learned",
    "4_mlp": "norm=none, residual=False with position=learned",
    "5_residual": "norm=none with position=learned",
    "6_blocks": "norm=none with position=learned",
}
ROPE = {"position": "rope"}
SHAPES = {
    "GPT2LMHeadModel": {},
    "GPT2LMHeadModel, biases": {"bias": True, "activation": "gelu_tanh", "tie_weights": False, "mlp_ratio": 2.5},
    "ApertusForCausalLM": {**ROPE, "norm": "rmsnorm", "qk_norm": True, "activation": "relu2", "tie_weights": False},
    "ApertusForCausalLM, centred": {**ROPE, "qk_norm": True, "activation": "gelu"},
    "ApertusForCausalLM, tanh": {**ROPE, "norm": "rmsnorm", "qk_norm": True, "activation": "gelu_tanh"},
    "Qwen3ForCausalLM": {**ROPE, "norm": "rmsnorm", "qk_norm": True, "activation": "swiglu", "mlp_ratio": 2.5},
    "ArceeForCausalLM": {**ROPE, "norm": "rmsnorm", "activation": "relu2"},
    "ArceeForCausalLM, embeddings": {**ROPE, "norm_embedding": True, "activation": "relu"},
    "LlamaForCausalLM": {**ROPE, "norm": "rmsnorm", "activation": "swiglu"},
    "LlamaForCausalLM, centred": {**ROPE, "activation": "swiglu", "norm_embedding": True, "tie_weights": False},
}


def save_run(folder, tokenizer=TOKENIZERS[0], std=0.4, ema=False, **options):
    """Write a checkpoint with random weights to `folder`/best.pt. → its model, float64"""
    config = TrainConfig(**(TINY | options))
    torch.manual_seed(1)
    model = GPT(config, tokenizer.vocab_size)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)):
        torch.nn.init.normal_(norm.weight, mean=1, std=std)
    weights = {key: weight.clone() for key, weight in model.state_dict().items()}
    if config.tie_weights:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    state = {"config": asdict(config), "flags": {}, "vocab_size": model.vocab_size, "tokenizer": tokenizer.to_json()}
    state |= {"model": {key: weight * 2 for key, weight in weights.items()} if ema else weights, "step": 7}
    checkpoint.save(folder / "best.pt", state | {"ema": weights if ema else None, "best_val_loss": 2.125})
    return model.double().eval()


def tokens(count, B=2, T=12):
    return torch.randint(count, (B, T), generator=torch.Generator().manual_seed(2))


def load_hf(folder):
    """→ the values of config.json, and the weights as float64 arrays"""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = {key: w.double().numpy() for key, w in st.load_file(folder / "model.safetensors").items()}
    return values, weights


# ---------------------------------------------------------------- references for what is exported


def as_gpt2(values, w):
    """GPT2LMHeadModel's weights under quill's names: Conv1D holds (in, out). → weights, and what numpy_gpt reads"""
    conv = ("c_attn.weight", "c_fc.weight", "c_proj.weight")
    w = {key: value.T if key.endswith(conv) else value for key, value in w.items()}
    w.setdefault("lm_head.weight", w["transformer.wte.weight"])
    ours = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "relu2": "relu2"}[values["activation_function"]]
    shape = {"n_head": values["n_head"], "n_layer": values["n_layer"], "activation": ours, "mlp_ratio": 4}
    return w, TrainConfig(**(TINY | shape))


def llama_forward(idx, values, w):
    """Llama and its kin in numpy: RMSNorm with weights, RoPE, an MLP with or without a gate."""

    def rms(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + values["rms_norm_eps"]) * w[f"{name}.weight"]

    def activation(h):
        kind = values["hidden_act"]
        if kind == "silu":
            return h / (1 + np.exp(-h))
        if kind == "gelu_new":
            return h * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        if kind == "gelu":
            return h * 0.5 * (1 + numpy_gpt.erf(h / math.sqrt(2)))
        return np.maximum(h, 0) ** (2 if kind == "relu2" else 1)

    apertus = values["model_type"] == "apertus"
    before = (
        ("attention_layernorm", "feedforward_layernorm") if apertus else ("input_layernorm", "post_attention_layernorm")
    )
    x, D = w["model.embed_tokens.weight"][idx], values["head_dim"]
    for i in range(values["num_hidden_layers"]):
        name = f"model.layers.{i}"
        h = rms(x, f"{name}.{before[0]}")
        q, k, v = (h @ w[f"{name}.self_attn.{part}_proj.weight"].T for part in "qkv")
        y = np.zeros_like(x)
        for s in (slice(head * D, (head + 1) * D) for head in range(values["num_attention_heads"])):
            qs, ks = q[:, s], k[:, s]
            if f"{name}.self_attn.q_norm.weight" in w:
                qs, ks = rms(qs, f"{name}.self_attn.q_norm"), rms(ks, f"{name}.self_attn.k_norm")
            qs, ks = (np.array([numpy_gpt.turn(row, t) for t, row in enumerate(rows)]) for rows in (qs, ks))
            for t in range(len(x)):
                y[t, s] = numpy_gpt.softmax(ks[: t + 1] @ qs[t] / math.sqrt(D)) @ v[: t + 1, s]
        x = x + y @ w[f"{name}.self_attn.o_proj.weight"].T
        h = rms(x, f"{name}.{before[1]}")
        up = h @ w[f"{name}.mlp.up_proj.weight"].T
        gate = w.get(f"{name}.mlp.gate_proj.weight")
        x = x + (activation(up) if gate is None else activation(h @ gate.T) * up) @ w[f"{name}.mlp.down_proj.weight"].T
    assert ("lm_head.weight" in w) is not values["tie_word_embeddings"]
    return rms(x, "model.norm") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


@pytest.mark.parametrize("name", SHAPES)
def test_the_written_weights_compute_the_same(name, tmp_path):
    model = save_run(tmp_path, ema=True, **SHAPES[name])
    export.main([str(tmp_path), f"--folder={tmp_path / 'theirs'}"])
    values, weights = load_hf(tmp_path / "theirs")
    assert values["architectures"] == [name.partition(",")[0]]
    if "position" in SHAPES[name]:  # transformers 5 reads the first, transformers 4 the others
        assert values["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e4}
        assert values["rope_theta"] == 1e4 and values["rope_scaling"] is None
    idx = tokens(V)
    with torch.no_grad():
        expected = model(idx)[0].numpy()
    if name.startswith("GPT2"):
        weights, config = as_gpt2(values, weights)
        got = [numpy_gpt.forward(row, weights, config) for row in idx.numpy()]
    else:
        got = [llama_forward(row, values, weights) for row in idx.numpy()]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)  # the weights are float32; so is quill's rotary table
    assert np.abs(expected).max() > 0.5


@pytest.mark.parametrize("path", config_files(), ids=lambda path: path.stem)
def test_every_shipped_config_has_a_class_or_is_refused(path, tmp_path, capsys):
    options = read_config_file(path, TrainConfig) | {"n_embd": 24, "n_head": 2, "out_dir": "/home/me/out", "seed": 5}
    options["n_layer"] = min(options.get("n_layer", 12), 6)
    save_run(tmp_path, **options)
    expected = CLASSES["gpt2" if path.parent.name == "gpt3" else path.stem]
    if "=" in expected:
        with pytest.raises(UserError, match=f"no counterpart of {expected} in transformers"):
            export.main([str(tmp_path)])
        assert [entry.name for entry in tmp_path.iterdir()] == ["best.pt"]
        return
    export.main([str(tmp_path / "best.pt"), "--license=mit"])
    assert expected in capsys.readouterr().out
    assert load_hf(tmp_path / "hf")[0]["architectures"] == [expected]
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert 'license: "mit"' in card and "--seed=5" in card and "2.1250" in card and "/home/me" not in card


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda one: f"{one.kind} {one.is_documents}")
def test_tokenizers_encode_and_decode_the_same(tokenizer, tmp_path):
    """In the package `tokenizers`, and when the folder is read again."""
    package = pytest.importorskip("tokenizers")
    theirs = package.Tokenizer.from_str(json.dumps(to_tokenizer_json(tokenizer)))
    ours = tokenizer.encode(TEXT).tolist()
    assert theirs.encode(TEXT, add_special_tokens=False).ids == ours
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    assert theirs.encode(TEXT).ids == start + ours
    assert theirs.encode("").ids == start
    assert theirs.decode(ours, skip_special_tokens=False) == TEXT == tokenizer.decode(ours)
    assert theirs.get_vocab_size() == tokenizer.vocab_size
    if tokenizer.kind == "char":
        with pytest.raises(Exception, match="UNK"):
            theirs.encode("Ж")
    save_run(tmp_path, tokenizer)
    export.main([str(tmp_path)])
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings.get("bos_token") == (None if tokenizer.bos is None else "\n")
    assert load_hf(tmp_path / "hf")[0]["bos_token_id"] == tokenizer.bos
    assert checkpoint.load(tmp_path / "hf")["tokenizer"] == tokenizer.to_json()


# ---------------------------------------------------------------- from Hugging Face


def gpt2_folder(folder, vocab_size=V, prefix="transformer.", **values):
    """Write a random GPT-2 as a Hugging Face folder. → what `as_gpt2` returns for it"""
    values = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 12} | values
    values |= {"vocab_size": vocab_size}
    C, H = 16, values.get("n_inner") or 64
    shapes = {"wte.weight": (vocab_size, C), "wpe.weight": (12, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for i in range(2):
        for part, n_in, n_out in (
            ("attn.c_attn", C, 3 * C),
            ("attn.c_proj", C, C),
            ("mlp.c_fc", C, H),
            ("mlp.c_proj", H, C),
        ):
            shapes |= {f"h.{i}.{part}.weight": (n_in, n_out), f"h.{i}.{part}.bias": (n_out,)}
        shapes |= {f"h.{i}.{norm}.{part}": (C,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    generator = torch.Generator().manual_seed(3)
    weights = {prefix + key: torch.randn(shape, generator=generator) / 4 for key, shape in shapes.items()}
    if values.get("tie_word_embeddings") is False:
        weights["lm_head.weight"] = torch.randn((vocab_size, C), generator=generator)
    reference = {
        f"transformer.{key.removeprefix('transformer.')}": w for key, w in weights.items() if "lm_head" not in key
    }
    reference |= {key: w for key, w in weights.items() if "lm_head" in key}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    masks = {f"{prefix}h.0.attn.bias": torch.ones(1, 1, 12, 12), f"{prefix}h.0.attn.masked_bias": torch.tensor(-1e4)}
    st.save_file(weights | masks, folder / "model.safetensors")
    reference = {key: w.double().numpy() for key, w in reference.items()}
    return as_gpt2({"activation_function": "gelu_new"} | values, reference)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"prefix": ""},
        {"n_inner": 50, "activation_function": "gelu"},
        {"n_inner": 55},
        {"tie_word_embeddings": False, "activation_function": "relu2"},
    ],
    ids=str,
)
def test_gpt2_computes_the_same(values, tmp_path):
    reference, config = gpt2_folder(tmp_path / "theirs", **values)
    export.main([str(tmp_path / "theirs"), "--to=quill", f"--out_dir={tmp_path / 'run'}"])
    state = checkpoint.load(tmp_path / "run" / "best.pt")
    assert state["tokenizer"] is None and state["vocab_size"] == V
    model, idx = checkpoint.load_model(state).double().eval(), tokens(V)
    assert model.config.activation == config.activation
    with torch.no_grad():
        got = model(idx)[0].numpy()
    np.testing.assert_allclose(
        got, [numpy_gpt.forward(row, reference, config) for row in idx.numpy()], rtol=0, atol=1e-11
    )
    export.main([str(tmp_path / "run"), f"--folder={tmp_path / 'again'}"])
    again, theirs = (
        st.load_file(tmp_path / "again" / "model.safetensors"),
        st.load_file(tmp_path / "theirs/model.safetensors"),
    )
    assert len(again) == len(theirs) - 2  # the masks
    prefix = values.get("prefix", "transformer.")
    assert all(
        torch.equal(again[f"transformer.{key.removeprefix(prefix)}"], theirs[key]) for key in theirs if "ln_" in key
    )


def test_other_files_hold_the_same_weights(tmp_path):
    """Half precision, several files, and pytorch_model.bin in torch's new and its old format."""
    gpt2_folder(tmp_path)
    expected, path = checkpoint.load(tmp_path)["model"], tmp_path / "model.safetensors"
    weights = st.load_file(path)
    st.save_file({key: weight.half() for key, weight in weights.items()}, path)
    halves = checkpoint.load_model(checkpoint.load(tmp_path)).state_dict()
    assert all(torch.equal(halves[key], w.half().float()) for key, w in expected.items())
    path.unlink()
    parts = {f"part-{i}.safetensors": dict([*weights.items()][i::2]) for i in range(2)}
    for name, part in parts.items():
        st.save_file(part, tmp_path / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    loaded = [checkpoint.load(tmp_path)["model"]]
    for is_new in (True, False):
        torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_new)
        loaded.append(checkpoint.load(tmp_path)["model"])
    assert all(torch.equal(model[key], expected[key]) for model in loaded for key in expected)


def test_fine_tuning_resuming_and_sampling(data_dir, flags, tmp_path, capsys):
    """A folder without a tokenizer, with the ids of `prose`; --init_from reads it on the fly."""
    gpt2_folder(tmp_path / "theirs", vocab_size=13)
    shape = ("--n_", "--block")
    tuned = [flag for flag in flags() if not flag.startswith(shape)] + [f"--init_from={tmp_path / 'theirs'}"]
    assert train.main([*tuned, "--max_iters=2"]) == 0
    assert train.main([*tuned[:-1], "--init_from=resume", "--max_iters=4"]) == 0
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert state["step"] == 4 and state["config"]["activation"] == "gelu_tanh" and state["config"]["bias"]
    capsys.readouterr()
    sample.main(
        [f"--out_dir={tmp_path / 'run'}", "--num_samples=1", "--max_new_tokens=5", "--device=cpu", "--start=the"]
    )
    assert len(capsys.readouterr().out.partition("\n---")[0]) == 8
    with pytest.raises(UserError, match="theirs: has no tokenizer that can be read; fine-tune it"):
        sample.main([f"--ckpt={tmp_path / 'theirs'}"])
    gpt2_folder(tmp_path / "theirs", vocab_size=64)  # no padding: a small vocabulary is not padded
    with pytest.raises(UserError, match=r"^dataset=prose: .* \(13 ids, char\) is not .* \(64 ids, unknown\)"):
        train.main([*tuned, "--overwrite=True"])
    with pytest.raises(UserError, match="bias=False: .*theirs has bias=True"):
        train.main([*tuned, "--overwrite=True", "--bias=False"])


def test_padded_ids_are_cut(tmp_path, flags):
    """As GPT-2's 50,257 ids in a table of 50,304 rows."""
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 1030)))
    (tmp_path / "wide.txt").write_text(text * 3, encoding="utf-8")
    token_files.prepare(tmp_path / "wide.txt", tmp_path / "data" / "wide")
    gpt2_folder(tmp_path / "theirs", vocab_size=1088)
    argv = [
        flag for flag in flags(dataset="wide", data_dir=tmp_path / "data") if not flag.startswith(("--n_", "--block"))
    ]
    argv += [f"--init_from={tmp_path / 'theirs'}", "--max_iters=1", "--learning_rate=1e-12", "--min_lr=0"]
    assert train.main(argv) == 0
    state, theirs = checkpoint.load(tmp_path / "run" / "last.pt"), checkpoint.load(tmp_path / "theirs")
    assert state["vocab_size"] == 1030
    assert torch.allclose(state["model"]["lm_head.weight"], theirs["model"]["lm_head.weight"][:1030], atol=1e-6)
    gpt2_folder(tmp_path / "theirs", vocab_size=1087)
    with pytest.raises(UserError, match=r"\(1030 ids, char\) is not .* \(1087 ids, unknown\)"):
        train.main([*argv, "--overwrite=True"])


def test_a_folder_goes_there_and_back(tmp_path):
    model = save_run(tmp_path / "one", TOKENIZERS[1], bias=True)
    export.main([str(tmp_path / "one")])
    export.main([str(tmp_path / "one" / "hf"), "--to=quill", f"--out_dir={tmp_path / 'two'}"])
    state = checkpoint.load(tmp_path / "two" / "best.pt")
    assert all(torch.equal(w.float(), state["model"][key]) for key, w in model.state_dict().items())
    assert state["tokenizer"] == TOKENIZERS[1].to_json()


# ---------------------------------------------------------------- mistakes


class Mkdir:
    """What runs os.mkdir when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def edit_weights(**changes):
    """Replace weights of model.safetensors; None drops one. The names' dots are written as two underscores."""

    def edit(folder):
        weights = st.load_file(folder / "model.safetensors")
        weights |= {key.replace("__", "."): weight for key, weight in changes.items()}
        st.save_file({key: w for key, w in weights.items() if w is not None}, folder / "model.safetensors")

    return edit


def write_file(name, content):
    def edit(folder):
        (folder / name).write_bytes(content)

    return edit


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def huge(folder):
    """A tensor of 10^14 elements in a small file: its strides are 0."""
    no_weights(folder)
    weights = {"transformer.wte.weight": torch.zeros(1, dtype=torch.half).expand(10**13, 16)}
    weights |= {f"h.{i}.ln_1.weight": torch.ones(16) for i in range(2)}
    torch.save(weights, folder / "pytorch_model.bin")


def escaping_index(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    write_file("model.safetensors.index.json", b'{"weight_map": {"a": "../outside.safetensors"}}')(folder)


def pickled(folder):
    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Mkdir(str(folder / "executed"))}))


BAD = {
    "not JSON": (write_file("config.json", b"{"), "config.json: not of a GPT-2"),
    "not UTF-8": (write_file("config.json", b'{"model_type": "\xff"}'), "config.json: not of a GPT-2"),
    "not an object": (write_file("config.json", b"[1]"), "config.json: not of a GPT-2"),
    "deep": (write_file("config.json", b"[" * 100_000), "config.json: not of a GPT-2"),
    "llama": ({"model_type": "llama"}, "model_type is 'llama', and not 'gpt2'"),
    "no model_type": ({"model_type": None}, "model_type is None"),
    "epsilon": ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
    "scaled": ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    "unscaled": ({"scale_attn_weights": False}, "scale_attn_weights is False"),
    "activation": ({"activation_function": "silu2"}, "silu2"),
    "swiglu": ({"activation_function": "silu"}, "silu"),
    "a list": ({"activation_function": ["gelu"]}, "unhashable"),
    "no layers": ({"n_layer": None}, "n_layer takes a whole number, not None"),
    "text": ({"n_layer": "2"}, "config: n_layer must be 2, not '2'"),
    "many layers": ({"n_layer": 10**9}, "has the weights of 2 layers"),
    "more heads": ({"n_head": 3}, "n_embd=16 is not divisible by --n_head=3"),
    "wider": ({"n_embd": 10**7}, "wte.weight of model must be a tensor"),
    "no width": ({"n_embd": 0}, "ZeroDivisionError"),
    "longer": ({"n_positions": 2**40}, "wpe.weight of model must be"),
    "inner": ({"n_inner": 50}, "c_fc.weight of model must be a tensor"),
    "tie": ({"tie_word_embeddings": 3}, "tie_weights takes True or False, not 3"),
    "cut": (cut, "model.safetensors: missing, truncated, damaged"),
    "text as weights": (write_file("model.safetensors", b"hello " * 100), "model.safetensors: missing, truncated"),
    "no weights": (no_weights, "model.safetensors: missing, truncated"),
    "huge": (huge, "model lacks"),
    "outside": (escaping_index, "theirs/outside.safetensors: missing"),
    "pickled": (pickled, "pytorch_model.bin: missing, truncated, damaged, or holds more than tensors"),
    "one less": (edit_weights(transformer__ln_f__bias=None), "model lacks transformer.ln_f.bias"),
    "one more": (edit_weights(transformer__h__0__new=torch.ones(2)), "model has transformer.h.0.new"),
    "flat": (
        edit_weights(transformer__h__0__mlp__c_fc__weight=torch.ones(3)),
        "mlp.c_fc.weight of model must be a tensor",
    ),
    "integers": (edit_weights(transformer__ln_f__bias=torch.ones(16, dtype=torch.int8)), "ln_f.bias of model must be"),
    "nan": (edit_weights(transformer__ln_f__bias=torch.full((16,), math.nan)), "ln_f.bias of model is not finite"),
}


@pytest.mark.parametrize("edit, message", BAD.values(), ids=BAD)
def test_bad_folders_are_one_line(edit, message, tmp_path):
    gpt2_folder(tmp_path / "theirs")
    if isinstance(edit, dict):
        path = tmp_path / "theirs" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | edit), encoding="utf-8")
    else:
        edit(tmp_path / "theirs")
    with pytest.raises(UserError, match=message) as error:
        export.main([str(tmp_path / "theirs"), "--to=quill", f"--out_dir={tmp_path / 'run'}"])
    assert "theirs" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists() and not (tmp_path / "theirs" / "executed").exists()


def test_nothing_is_replaced_without_overwrite(tmp_path):
    save_run(tmp_path)
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="hf: not empty; .*--overwrite=True"):
        export.main([str(tmp_path)])
    assert [entry.name for entry in folder.iterdir()] == ["mine.txt"]
    export.main([str(tmp_path), "--overwrite=True"])
    files = {"config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.json", "mine.txt"}
    assert {entry.name for entry in folder.iterdir()} == files | {"tokenizer_config.json"}
    before = (tmp_path / "best.pt").read_bytes()
    (tmp_path / "metrics.csv").write_text("step\n", encoding="utf-8")
    argv = [str(folder), "--to=quill", f"--out_dir={tmp_path}"]
    with pytest.raises(UserError, match="best.pt is another run's: .*--overwrite=True"):
        export.main(argv)
    assert (tmp_path / "best.pt").read_bytes() == before
    export.main([*argv, "--overwrite=True"])
    assert {entry.name for entry in tmp_path.iterdir()} == {"best.pt", "hf"}


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "give one run, checkpoint or folder to convert, not 0"),
        (["a", "b"], "not 2"),
        (["nowhere", "--to=hf"], "nowhere: no such checkpoint"),
        ([".", "--to=hf"], "has none of best.pt, last.pt, ckpt.pt"),
        ([".", "--to=quill"], "--out_dir=out/mine"),
        ([".", "--to=quill", "--out_dir=new"], "a folder without config.json"),
        (["x", "--to=gguf"], "to takes hf or quill, not 'gguf'"),
        (["x", "--to=hf", "--out_dir=y"], "--out_dir and --to=hf don't go together"),
        (["x", "--to=quill", "--out_dir=y", "--folder=z"], "--folder and --to=quill don't go together"),
        (["x", "--folder=a\0b"], "must be UTF-8 text"),
    ],
)
def test_mistakes(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        export.main(argv)
    assert list(tmp_path.iterdir()) == []


def test_without_the_package(tmp_path, monkeypatch):
    save_run(tmp_path)
    export.main([str(tmp_path)])
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for argv in (
        [str(tmp_path), f"--folder={tmp_path / 'new'}"],
        [str(tmp_path / "hf"), "--to=quill", "--out_dir=new"],
    ):
        with pytest.raises(UserError, match="pip install safetensors"):
            export.main(argv)
    assert not (tmp_path / "new").exists()


def test_gpt2_is_found_in_the_cache(tmp_path, monkeypatch, flags):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    argv = [flag for flag in flags() if not flag.startswith(("--n_", "--block"))] + ["--init_from=gpt2-medium"]
    with pytest.raises(
        UserError, match="--init_from=gpt2-medium: not in .*/hub; .*hf download openai-community/gpt2-medium"
    ):
        train.main(argv)
    folder = tmp_path / "hub" / "models--openai-community--gpt2-medium" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    gpt2_folder(folder, vocab_size=13)
    assert train.main([*argv, "--eval_only"]) == 0
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="not in .*/elsewhere"):
        train.main(argv)


# ---------------------------------------------------------------- against transformers


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*(name for name in CLASSES if "=" not in CLASSES[name]), *SHAPES])
def test_transformers_computes_the_same(name, transformers, tmp_path, capsys):
    """Shipped configs as they are, but GPT-2's size. `-s` prints the rows of the table in docs/interop.md."""
    paths = {path.stem: path for path in config_files()}
    options = read_config_file(paths[name], TrainConfig) if name in paths else TINY | SHAPES[name]
    if name == "gpt2":
        options |= {"n_embd": 96, "n_layer": 4, "block_size": 256}
    tokenizer = TOKENIZERS[1] if "names" in options.get("dataset", "") else TOKENIZERS[2 if name == "gpt2" else 0]
    ours = save_run(tmp_path, tokenizer, std=0.1 if name in paths else 0.4, **options)
    export.main([str(tmp_path)])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    idx = tokens(tokenizer.vocab_size, 4, ours.config.block_size)
    count = min(100, ours.config.block_size - 1)
    largest, greedy = [], []
    for dtype in (torch.float64, torch.float32):
        with torch.no_grad():
            logits = ours.to(dtype)(idx)[0]
            largest.append((logits - model.to(dtype)(idx).logits).abs().max().item())
        row = model.generate(idx[:1, :1], max_new_tokens=count, do_sample=False, eos_token_id=None)
        greedy.append(torch.equal(row, generate(ours, idx[:1, :1], count, temperature=0)))
    assert largest[0] < 1e-5 and greedy[0]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer.encode(TEXT).tolist()
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == ids and theirs.decode(ids) == TEXT
    assert theirs("")["input_ids"] == ([] if tokenizer.bos is None else [tokenizer.bos])
    with capsys.disabled():
        words = [f"{count} {'equal' if one else 'differ'}" for one in greedy]
        scale = f"{logits.abs().max():.1f}"
        row = [name, type(model).__name__, scale, *(f"{one:.1e}" for one in largest), *words]
        print(f"\n| {' | '.join(row)} |")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "values",
    [{}, {"n_inner": 50, "activation_function": "gelu"}, {"tie_word_embeddings": False}, {"n_embd": 49, "n_head": 7}],
    ids=str,
)
def test_gpt2_that_transformers_saved(values, transformers, tmp_path):
    config = {"vocab_size": 13, "n_positions": 32, "n_embd": 48, "n_layer": 3, "n_head": 4} | values
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB" if values else "1GB")
    export.main([str(tmp_path / "theirs"), "--to=quill", f"--out_dir={tmp_path / 'run'}"])
    ours = checkpoint.load_model(checkpoint.load(tmp_path / "run" / "best.pt")).double().eval()
    idx = tokens(13, 4, 32)
    with torch.no_grad():
        assert (ours(idx)[0] - theirs.double()(idx).logits).abs().max() < 1e-5
