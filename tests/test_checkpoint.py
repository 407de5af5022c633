"""checkpoint.py: whole or not at all, never executed, every kind of damage named."""

import os
import pickle
import re
import zipfile

import pytest
import torch

from model import GPT
from quill import checkpoint, files
from quill.errors import UserError
from quill.options import ModelConfig

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "bias": False, "dropout": 0.0}


def state(seed=0, **changes):
    torch.manual_seed(seed)
    model = GPT(ModelConfig(**SHAPE), 11)
    plain = {"config": dict(SHAPE), "vocab_size": 11, "tokenizer": None, "ema": None, "step": 7}
    return plain | {"model": model.state_dict(), "best_val_loss": 1.5} | changes


@pytest.fixture
def path(tmp_path):
    checkpoint.save(tmp_path / "last.pt", state())
    return tmp_path / "last.pt"


def refused(path, words):
    with pytest.raises(UserError) as error:
        checkpoint.load_model(checkpoint.load(path))
    assert words in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_round_trip(path):
    loaded = checkpoint.load(path)
    assert loaded["format"] == checkpoint.FORMAT and loaded["step"] == 7 and loaded["config"] == SHAPE
    model = checkpoint.load_model(loaded)
    assert all(torch.equal(value, state()["model"][key]) for key, value in model.state_dict().items())
    assert os.listdir(path.parent) == ["last.pt"]


def test_averaged_weights_are_preferred(tmp_path):
    average = {key: value + 1 for key, value in state()["model"].items()}
    checkpoint.save(tmp_path / "last.pt", state(ema=average))
    model = checkpoint.load_model(checkpoint.load(tmp_path / "last.pt"))
    assert torch.equal(model.lm_head.weight, average["lm_head.weight"])


def test_any_damaged_byte_or_length_is_noticed(path):
    """torch itself reads a file with a flipped bit in a weight without a word."""
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        weights = max(archive.infolist(), key=lambda entry: entry.file_size)
    middle = weights.header_offset + len(whole[weights.header_offset :].split(b"\0" * 8)[0]) + weights.file_size // 2
    damaged = bytearray(whole)
    damaged[middle] ^= 1
    path.write_bytes(damaged)
    refused(path, "damaged")
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "truncated, damaged, or not a checkpoint")


def test_a_damaged_directory_changes_no_weight(path):
    """Every bit of the lengths, attributes and place that the archive's directory has for a member. One of them marks a
    file as a folder: torch reads it as empty, and leaves zeros in its tensor.
    """
    whole, right, refusals = path.read_bytes(), checkpoint.load(path)["model"], 0
    with zipfile.ZipFile(path) as archive:
        names = [entry.filename for entry in archive.infolist()]
    number = names.index(next(name for name in names if name.endswith("/data/1")))
    entries = [match.start() for match in re.finditer(rb"PK\x01\x02", whole)]
    for bit in range((entries[number] + 28) * 8, (entries[number] + 46) * 8):  # behind the size, before the name
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            loaded = checkpoint.load(path)["model"]
        except UserError:
            refusals += 1
        else:
            assert all(torch.equal(loaded[key], value) for key, value in right.items())
    assert refusals > 50


def test_foreign_files(tmp_path):
    path = tmp_path / "x.pt"
    refused(path, "no such checkpoint")
    path.write_text("hello")
    refused(path, "not a checkpoint")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    refused(path, "not a checkpoint")
    torch.save({"weights": torch.zeros(3)}, path)
    refused(path, "not a checkpoint of quill's or nanoGPT's")
    torch.save([1, 2], path)
    refused(path, "not a checkpoint of quill's or nanoGPT's")
    torch.save(state(format=checkpoint.FORMAT + 1), path)
    refused(path, "update quill")
    torch.save(state(format="x"), path)
    refused(path, "format 'x'")
    torch.save({"format": 1, "model": {}}, path)
    refused(path, "best_val_loss")
    torch.save(state(format=1, vocab_size=12), path)
    refused(path, "transformer.wte.weight of model must be a tensor of numbers with the shape (12, 16)")
    for change in ({"config": None}, {"vocab_size": "q"}, {"model": None}):
        torch.save(state(format=1, **change), path)
        refused(path, "damaged")
    torch.save(state(format=1, config=SHAPE | {"n_layer": "x"}), path)
    refused(path, "config: n_layer takes a whole number, not 'x'")
    weights = state()["model"]
    weights["transformer.ln_f.weight"][0] = torch.nan
    torch.save(state(format=1, model=weights), path)
    refused(path, "not finite")
    path.unlink()
    path.mkdir()
    refused(path, "a folder without config.json; name a checkpoint in it")


def test_code_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    path = tmp_path / "trap.pt"
    torch.save({"format": 1, "model": Trap()}, path)
    refused(path, "could run code")
    path.write_bytes(pickle.dumps(Trap()))
    refused(path, "not a checkpoint")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("full_at", [0, 1000, 20000])
def test_a_full_disk_keeps_the_checkpoint_before(path, monkeypatch, full_at):
    before = path.read_bytes()

    class FullDisk:
        def __init__(self, *args):
            self.file, self.written = real_open(*args), 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.written += len(data)
            if self.written > full_at:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

    real_open = open
    monkeypatch.setattr(files, "open", FullDisk, raising=False)
    with pytest.raises(UserError, match="last.pt: No space left on device; .*last.pt is kept"):
        checkpoint.save(path, state(seed=1))
    assert path.read_bytes() == before and os.listdir(path.parent) == ["last.pt"]


@pytest.mark.parametrize("dies_at", ["fsync", "replace"])
def test_a_crash_while_saving_keeps_the_checkpoint_before(path, monkeypatch, dies_at):
    class Crash(BaseException):
        pass

    def crash(*args):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(os, dies_at, crash)
        with pytest.raises(Crash):
            checkpoint.save(path, state(seed=1))
    assert torch.equal(checkpoint.load(path)["model"]["lm_head.weight"], state()["model"]["lm_head.weight"])
    checkpoint.save(path, state(seed=1))  # and what is left over is in nobody's way
    assert os.listdir(path.parent) == ["last.pt"]
    assert torch.equal(checkpoint.load(path)["model"]["lm_head.weight"], state(seed=1)["model"]["lm_head.weight"])
