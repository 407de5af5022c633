"""sample.py: it needs a checkpoint only, a seed gives the same text, and every mistake is one line."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import sample
import train
from quill import checkpoint, cpu
from quill.data import token_files
from quill.data.batches import Batches
from quill.errors import UserError
from quill.machine import Machine
from quill.trace import attention_steps


@pytest.fixture(scope="session")
def runs(data_dir, tmp_path_factory):
    """A folder with two runs: `prose`, trained on a stream, and `words`, trained on documents."""
    from conftest import TINY

    folder = tmp_path_factory.mktemp("runs")
    for dataset in ("prose", "words"):
        options = TINY | {"dataset": dataset, "data_dir": data_dir, "out_dir": folder / dataset}
        assert train.main([f"--{key}={value}" for key, value in options.items()]) == 0
    return folder


def write(capsys, runs, name, *flags):
    capsys.readouterr()
    sample.main([f"--out_dir={runs / name}", "--device=cpu", "--dtype=float32", *flags])
    return capsys.readouterr().out


def test_a_stream(runs, capsys):
    out = write(capsys, runs, "prose", "--start=the ", "--num_samples=3", "--max_new_tokens=50")
    texts = out.split("\n---------------\n")
    assert len(texts) == 4
    assert texts[3] == ""
    assert all(text.startswith("the ") and len(text) == 54 for text in texts[:3])
    assert len(set(texts)) == 4
    assert out == write(capsys, runs, "prose", "--start=the ", "--num_samples=3", "--max_new_tokens=50")
    assert out != write(capsys, runs, "prose", "--start=the ", "--num_samples=3", "--max_new_tokens=50", "--seed=2")


def test_documents_are_a_line_each_and_end_at_bos(runs, capsys):
    lines = write(capsys, runs, "words", "--num_samples=40").splitlines()
    assert len(lines) == 40
    assert all(set(line) <= set("etaoinshrdlu") for line in lines)
    assert len({len(line) for line in lines}) > 3
    lines = write(capsys, runs, "words", "--num_samples=5", "--start=sh").splitlines()
    assert len(lines) == 5
    assert all(line.startswith("sh") for line in lines)


def test_greedy_text_is_the_models_own(runs, capsys):
    """The expected text is made by a loop that takes the argmax without a cache."""
    out = write(capsys, runs, "prose", "--start=the", "--num_samples=1", "--max_new_tokens=12", "--temperature=0")
    state = checkpoint.load(runs / "prose" / "best.pt")
    model = checkpoint.load_model(state).eval()
    tokenizer = sample.find_tokenizer(state, None, "")
    ids = torch.tensor(tokenizer.encode("the").tolist())[None]
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(ids)[0][:, -1:].argmax(-1)], 1)
    assert out == tokenizer.decode(ids[0].tolist()) + "\n---------------\n"


def test_the_first_sample_is_written_as_it_is_drawn(runs):
    state = checkpoint.load(runs / "prose" / "best.pt")
    pieces = []
    config = sample.SampleConfig(num_samples=2, max_new_tokens=20, device="cpu", start="a")
    machine = sample.pick_machine(config)
    tokenizer = sample.find_tokenizer(state, config, "")
    sample.sample(checkpoint.load_model(state), tokenizer, "a", config, machine, pieces.append)
    assert pieces[0] == "a"
    assert all(len(piece) == 1 for piece in pieces[1:21])
    assert len(pieces) == 23


def test_prompts(runs, capsys, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("the nude ", encoding="utf-8")
    one = ["--num_samples=1", "--max_new_tokens=20"]
    from_file = write(capsys, runs, "prose", f"--start=FILE:{prompt}", *one)
    assert from_file == write(capsys, runs, "prose", "--start=the nude ", *one)
    long = "the " * 40  # longer than block_size
    assert write(capsys, runs, "prose", f"--start={long}", *one).startswith(long)
    assert write(capsys, runs, "prose", *one)  # no prompt


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--start=ÄZ~"], ["'Z'", "'~'", "'Ä'", "not in the vocabulary"]),
        (["--start=FILE:nowhere.txt"], ["nowhere.txt", "No such file"]),
        (["--out_dir=nowhere"], ["nowhere: has none of best.pt", "name a checkpoint"]),
        (["--ckpt=nowhere.pt"], ["nowhere.pt: no such checkpoint"]),
        (["--top_p=2"], ["--top_p=2.0"]),
        (["--temperature=-1"], ["--temperature=-1.0"]),
        (["--num_samples=0"], ["--num_samples=0"]),
        (["config/names.py"], ["config/names.py", "--key=value"]),
        (["--strat=x"], ["did you mean start?"]),
        (["--device=gpu"], ["--device=gpu"]),
    ],
)
def test_mistakes(runs, capsys, flags, words):
    with pytest.raises(UserError) as error:
        write(capsys, runs, "prose", *flags)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


def test_cuda_without_cuda(runs, capsys):
    with pytest.raises(UserError, match="--device=cuda: torch finds no CUDA here; use --device=cpu"):
        write(capsys, runs, "prose", "--device=cuda")


def test_a_nanogpt_run_samples_with_the_dataset_prepared_here(runs, data_dir, tmp_path, capsys):
    ours = checkpoint.load(runs / "prose" / "best.pt")
    shape = {key: ours["config"][key] for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")}
    theirs = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in ours["model"].items()},
        "model_args": shape | {"vocab_size": ours["vocab_size"]},
        "iter_num": 3,
        "best_val_loss": torch.tensor(2.0),
        "config": {"dataset": "prose"},
    }
    torch.save(theirs, tmp_path / "ckpt.pt")
    one = ["--num_samples=2", "--max_new_tokens=30", "--start=the"]
    expected = write(capsys, runs, "prose", *one)
    assert write(capsys, tmp_path, "", f"--data_dir={data_dir}", *one) == expected
    (tmp_path / "other.txt").write_text("abc" * 100, encoding="utf-8")
    token_files.prepare(tmp_path / "other.txt", tmp_path / "data" / "other")
    theirs["config"]["dataset"] = "other"
    torch.save(theirs, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="13 ids, but .*other has 3"):
        write(capsys, tmp_path, "", f"--data_dir={tmp_path / 'data'}", *one)
    theirs["model_args"]["vocab_size"] = 14
    torch.save(theirs, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"wte.weight of model must be a tensor of numbers with the shape \(14, 16\)"):
        write(capsys, tmp_path, "", f"--data_dir={data_dir}", *one)


def test_a_prompt_without_an_end_is_refused(runs, capsys):
    with pytest.raises(UserError, match="--start=FILE:/dev/zero: longer than 64 MiB"):
        write(capsys, runs, "prose", "--start=FILE:/dev/zero")


def test_a_cpu_samples_with_the_faster_layers(runs, capsys, monkeypatch):
    seen = []
    draw = sample.sample
    monkeypatch.setattr(sample, "sample", lambda model, *args: seen.append(model) or draw(model, *args))
    for flags, kind in (
        ([], cpu.Linear),
        (["--dtype=float16"], cpu.Float16Linear),
        (["--dtype=bfloat16"], cpu.Linear),
        (["--dtype=int8"], cpu.Linear),  # rows of 16 weights are too short for int8
    ):
        write(capsys, runs, "prose", "--max_new_tokens=2", *flags)
        assert type(seen[-1].lm_head) is kind and type(seen[-1].transformer["h"][0].attn) is cpu.Attention


@pytest.mark.slow
@torch.inference_mode()
def test_smaller_weights_have_the_same_loss(flags, tmp_path):
    """Of a trained model on its whole validation split: at most 0.002 nats more than in float32."""
    token_files.prepare(Path(__file__).parent.parent / "data" / "names.txt", tmp_path / "names", "char", "lines")
    with torch.inference_mode(False):
        options = {"n_embd": 64, "max_iters": 300, "lr_decay_iters": 300, "eval_interval": 300, "batch_size": 64}
        train.main(flags(dataset="names", data_dir=tmp_path, **options))
    state, losses = checkpoint.load(tmp_path / "run" / "best.pt"), {}
    data = token_files.open_dataset(tmp_path, "names")
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8):
        machine = Machine(device=torch.device("cpu"), dtype=dtype, name="cpu")
        model = cpu.for_sampling(checkpoint.load_model(state).eval(), machine)
        bos, total, count = data.tokenizer.bos, 0.0, 0
        for x, y, _ in Batches(data.val, bos, 16, rows=64, micro_rows=64, seed=0, device=machine.device).validation():
            total += cross_entropy(
                model(x)[0].float().flatten(0, 1), y.flatten(), ignore_index=-1, reduction="sum"
            ).item()
            count += int((y != -1).sum())
        losses[dtype] = total / count
    assert losses[torch.float32] < 2.5 and len(set(losses.values())) == 4
    assert abs(losses[torch.float16] - losses[torch.float32]) < 1e-4
    assert max(losses.values()) < losses[torch.float32] + 0.002


@pytest.mark.parametrize("name, prompt", [("prose", "the "), ("prose", ""), ("prose", "the " * 40), ("words", "sh")])
def test_a_trace_is_of_the_token_that_sampling_draws_first(runs, capsys, name, prompt):
    """With the same options, the token that --trace names is the first character after the prompt of --start."""
    seen = set()
    for flags in (["--top_k=3", "--num_samples=2"], *([f"--seed={seed}"] for seed in range(8))):
        text = write(capsys, runs, name, f"--start={prompt}", "--max_new_tokens=1", *flags)[len(prompt) :]
        lines = write(capsys, runs, name, f"--trace={prompt}", *flags).splitlines()
        token = lines[-1].partition(" is drawn: ")[0]
        assert {"<end>": "\n", "␣": " "}.get(token, token) == text[0]
        seen.add(token)
    assert len(seen) > 1


def test_a_trace_shows_the_attention_of_one_head(runs, capsys):
    state = checkpoint.load(runs / "words" / "best.pt")
    tokenizer = sample.find_tokenizer(state, None, "")
    layers = attention_steps(checkpoint.load_model(state), torch.from_numpy(tokenizer.prompt("she"))[None])
    for flags, layer, head in ((["--layer=1", "--head=1"], 1, 1), (["--head=1"], 0, 1), (["--layer=1"], 1, 0)):
        out = write(capsys, runs, "words", "--trace=she", *flags)
        table = out.partition("softmax: ")[2].splitlines()[2:6]
        numbers = torch.tensor([[float(word) for word in line.split()[1:]] for line in table])
        torch.testing.assert_close(numbers, layers[layer]["softmax"][head], atol=6e-4, rtol=0)
    assert "Attention" not in write(capsys, runs, "words", "--trace=she")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--trace=Z"], "--trace=Z: 'Z' (1 character that is not in the vocabulary)"),
        (["--trace=the", "--layer=2"], "--layer=2 --head=0: the model has 2 layers, 2 heads"),
        (["--trace=the", "--head=9"], "--layer=0 --head=9: the model has 2 layers"),
        (["--trace=the", "--layer=-1"], "--layer=-1: must be at least 0"),
        (["--layer=0"], "--layer is for a trace; give --trace=TEXT too"),
        (["--score=the", "--head=0"], "--head is for a trace"),
        (["--trace=the", "--json"], "--json is for a score"),
        (["--trace=the", "--score=the"], "--score and --trace don't go together"),
        (["--trace=the", "--temperature=0"], "--temperature=0.0: must be at least 1e-06 with --trace"),
        (["--trace=the", "--start=a"], "--trace and --start don't go together"),
        (["--trace"], "--trace: write --trace=VALUE"),
        (["--trace=FILE:nowhere.txt"], "--trace=FILE:nowhere.txt: No such file"),
    ],
)
def test_mistakes_in_a_trace(runs, capsys, flags, words):
    with pytest.raises(UserError) as error:
        write(capsys, runs, "prose", *flags)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().out == ""
