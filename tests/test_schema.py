"""schema.py: a checkpoint with valid checksums and wrong content is refused in one line that names the key."""

import math
from pathlib import Path

import pytest
import torch

import sample
import train
from quill import checkpoint
from quill.errors import UserError

NAN, INF = math.nan, math.inf


@pytest.fixture
def edited(flags, tmp_path):
    """`edited(edit)` → flags of a run of three steps whose last.pt `edit(state)` has changed."""

    def make(edit, **options):
        assert train.main(flags(max_iters=3, eval_interval=3, **options)) == 0
        path = tmp_path / "run" / "last.pt"
        state = torch.load(path, weights_only=True)
        edit(state)
        torch.save(state, path)
        return flags(max_iters=4, init_from="resume", **options)

    return make


def put(*keys, value):
    """An edit that puts `value` at state[keys[0]][keys[1]]…"""

    def edit(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return edit


def drop(*keys):
    def edit(state):
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return edit


WTE, LN = "transformer.wte.weight", "transformer.ln_f.weight"
IN_ANY_CASE = [  # refused when it is sampled from, too
    (put("config", value=[1]), "config must be options, not <list>"),
    (put("config", "n_layer", value="x"), "config: n_layer takes a whole number, not 'x'"),
    (put("config", "n_layer", value=True), "config: n_layer takes a whole number, not True"),
    (put("config", "n_layer", value="2"), "config: n_layer must be 2, not '2'"),
    (put("config", "bias", value=0), "config: bias must be False, not 0"),
    (put("config", "n_layer", value=10**9), "n_layer=1000000000, but model has the weights of 2 layers"),
    (put("config", "n_embd", value=10**6), "must be a tensor of numbers with the shape"),
    (put("config", "block_size", value=2**40), "transformer.wpe.weight"),
    (put("config", "mlp_ratio", value=1e9), "config: .*mlp_ratio"),
    (put("config", "dropout", value=2.0), "config: --dropout=2.0: must be below 1"),
    (put("config", "norm", value="zz"), "config: norm takes layernorm or rmsnorm or none, not 'zz'"),
    (put("config", "seed", value="x"), "config: seed takes a whole number, not 'x'"),
    (put("config", "schedule", value="zz"), "config: schedule takes cosine"),
    (put("config", "dataset", value=None), "config: dataset takes a text in quotes, not None"),
    (put("vocab_size", value=-1), "vocab_size must be a whole number from 1, not -1"),
    (put("vocab_size", value=2**70), "vocab_size"),
    (put("vocab_size", value=14), "the tokenizer has 13 ids, but vocab_size is 14"),
    (put("tokenizer", "chars", value="ab"), "the tokenizer has 2 ids, but vocab_size is 13"),
    (put("tokenizer", value="x"), "tokenizer: "),
    (put("step", value=-1), "step must be a whole number from 0, not -1"),
    (put("step", value="3"), "step must be"),
    (put("best_val_loss", value=NAN), "best_val_loss must be a number, not nan"),
    (put("model", value=None), "model must be weights by name"),
    (put("model", WTE, value=[1.0]), "transformer.wte.weight of model must be a tensor"),
    (put("model", WTE, value=torch.zeros(13, 15)), r"with the shape \(13, 16\)"),
    (put("model", WTE, value=torch.zeros(13, 16, dtype=torch.int64)), "must be a tensor of numbers"),
    (put("model", WTE, value=torch.zeros(13, 16).to_sparse()), "must be a tensor of numbers"),
    (put("model", WTE, value=torch.zeros(13, 16).to(torch.float8_e4m3fn)), "must be a tensor of numbers"),
    (put("model", LN, value=torch.full((16,), NAN)), "transformer.ln_f.weight of model is not finite"),
    (put("model", WTE, value=torch.ones(13, 16)), "differ, but config ties them"),
    (put("model", "new", value=torch.ones(1)), "model has new, which this model does not have"),
    (drop("model", LN), "model lacks transformer.ln_f.weight"),
    (drop("vocab_size"), "not a whole checkpoint: vocab_size missing"),
    (put("format", value=0), "format 0"),
    (put("format", value=True), "format True"),
]
ON_RESUME = [
    (put("flags", value=["--x"]), "flags must be options, not <list>"),
    (put("flags", "seed", value=[1]), "flags must be options"),
    (put("flags", "n_head", value="x"), "flags: n_head takes a whole number, not 'x'"),
    (put("losses", value=[NAN]), "losses must be finite numbers"),
    (put("losses", value=[10**400]), "losses must be finite numbers"),
    (put("seconds", value=10**400), "seconds must be a number"),
    (put("losses", value=[1.0] * 9), "9 losses, but only 3 steps"),
    (put("seconds", value=-1.0), "seconds must be a number, 0 or more"),
    (put("evals_since_best", value=1.5), "evals_since_best must be a whole number"),
    (put("scaler", value=None), "scaler must be numbers"),
    (put("optimizers", value=[]), "0 optimizers, but this run has 1"),
    (put("optimizers", value=None), "optimizers must be states"),
    (put("optimizers", 0, "state", value={}), r"moments of 0 of \d+ parameters after 3 steps"),
    (put("optimizers", 0, "state", 0, value={}), "moments must be exp_avg, exp_avg_sq, step"),
    (put("optimizers", 0, "state", 0, "exp_avg", value=torch.ones(2)), "exp_avg of a parameter must be finite"),
    (put("optimizers", 0, "state", 0, "exp_avg", value="x"), "exp_avg of a parameter"),
    (put("optimizers", 0, "param_groups", value=[]), "groups are not this run's"),
    (put("optimizers", 0, "param_groups", 0, "params", value=["x"] * 9), "groups"),
    (put("data_order", value=4), "data_order must be 1, 2 or 3, not 4"),
    (put("threads", value=0), "threads must be from 1 to 4096, not 0"),
    (drop("losses"), "not a whole checkpoint: losses missing"),
]


@pytest.mark.parametrize("edit, words", IN_ANY_CASE + ON_RESUME)
def test_a_resume_refuses_it_in_one_line(edited, tmp_path, edit, words):
    argv = edited(edit)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(UserError, match=words) as error:
        train.main(argv)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "run") in str(error.value)
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


@pytest.mark.parametrize("edit, words", IN_ANY_CASE)
def test_sampling_refuses_it_too(edited, tmp_path, capsys, edit, words):
    edited(edit)
    (tmp_path / "run" / "best.pt").unlink()
    capsys.readouterr()
    with pytest.raises(UserError, match=words):
        sample.main([f"--out_dir={tmp_path / 'run'}", "--device=cpu", "--max_new_tokens=2"])
    assert capsys.readouterr().out == ""


def test_the_average_and_muons_moments_are_checked(edited):
    options = {"optimizer": "muon", "ema_decay": 0.5}
    edit = put("ema", LN, value=torch.full((16,), INF))
    with pytest.raises(UserError, match="transformer.ln_f.weight of ema is not finite"):
        train.main(edited(edit, **options))
    edit = put("optimizers", 1, "state", 0, "momentum_buffer", value=torch.full((48, 16), NAN))
    with pytest.raises(UserError, match="momentum_buffer of a parameter must be finite"):
        train.main(edited(edit, overwrite=True, **options))


def test_an_int_becomes_the_float_that_an_option_takes(edited, tmp_path):
    assert train.main(edited(put("config", "beta2", value=0))) == 0
    assert type(checkpoint.load(tmp_path / "run" / "last.pt")["config"]["beta2"]) is float


def test_an_older_or_unknown_key_is_no_damage(edited, tmp_path):
    """Format 1 lacks two keys; an option that this quill does not know has no effect."""

    def edit(state):
        state["format"] = 1
        del state["data_order"], state["threads"], state["config"]["init_std"], state["config"]["threads"]
        state["config"]["of_a_later_quill"] = [1]
        state["config"]["of_a_later_quill"] = 1

    assert train.main(edited(edit)) == 0
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert (state["step"], state["format"], state["data_order"]) == (4, 2, 1)


def test_a_check_draws_no_weights(monkeypatch, write):
    """Drawing on tensors without memory imports torch's compiler, which takes longer than all the rest of sample.py."""
    monkeypatch.setattr(torch.Tensor, "normal_", lambda *args, **options: pytest.fail("weights are drawn"))
    assert checkpoint.load(Path(__file__).parent / "golden" / "format_1.pt")["vocab_size"] > 1
