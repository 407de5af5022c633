"""Fixtures: two small datasets, prepared once per session, and the flags of a run that takes less than a second."""

import os
import random

import pytest
import torch

from quill.data import token_files

TINY = {
    "dataset": "prose",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_iters": 40,
    "lr_decay_iters": 40,
    "warmup_iters": 4,
    "learning_rate": 1e-2,
    "min_lr": 1e-3,
    "eval_interval": 20,
    "log_interval": 10,
    "device": "cpu",
    "dtype": "float32",
}
ALICE = "Alice was beginning to get very tired of sitting by her sister on the bank.\n" * 20
HAS_GPU = torch.cuda.is_available()  # asked before a test hides the GPUs, because CUDA counts them only once
needs_corpora = pytest.mark.skipif(
    "QUILL_CORPORA" not in os.environ, reason="QUILL_CORPORA is not set to a folder with the real texts"
)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Use one thread: small models gain nothing from a second one, and on a busy machine threads wait."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def gpus_where_asked_for(request):
    """Hide the GPUs from a test that takes neither `device` nor `gpu`: it may compare what a CPU computes, bit for bit.

    Nor do the processes that it starts see them. A run on a GPU changes the precision of products: change it back.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not {"device", "gpu"} & set(request.fixturenames):
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(params=["cuda"])  # so that the test's name says that it ran on a GPU
def gpu(request):
    """Skip the test if there is no GPU."""
    return find_device(request.param)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Run the test on the CPU and, if there is one, on a GPU."""
    return find_device(request.param)


def find_device(name):
    if name == "cuda" and not HAS_GPU:
        pytest.skip("torch finds no CUDA here")
    return torch.device(name)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with two datasets: `prose` is a stream, `words` is a set of documents."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(600)]
    for name, text, is_documents in (("prose", " ".join(words), False), ("words", "\n".join(words), True)):
        source = folder / f"{name}.txt"
        source.write_text(text, encoding="utf-8")
        token_files.prepare(source, folder / name, "char", "lines" if is_documents else "none", name)
    return folder


@pytest.fixture
def flags(data_dir, tmp_path):
    """A function that makes the flags of a tiny run for train.main, as in flags(n_layer=1)."""

    def make(**options):
        options = TINY | {"data_dir": data_dir, "out_dir": tmp_path / "run"} | options
        return [f"--{key}={value}" for key, value in options.items()]

    return make


@pytest.fixture
def write(tmp_path):
    """A function that writes a text or bytes to a file in tmp_path, and returns its path."""

    def write(text, name="text.txt"):
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write
