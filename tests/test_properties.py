"""Properties that hold for every input: option values, tokenizers, rows of tokens, atomic writes.

Hypothesis draws the inputs, from the same seed in every run.
"""

import errno
import json
import os
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import example, given, settings
from hypothesis import strategies as st

from quill.cli import coerce, option_types, read_args
from quill.data.batches import Batches
from quill.data.tokenizers import ByteTokenizer, CharTokenizer, from_json
from quill.errors import UserError
from quill.files import replacing
from quill.options import BenchConfig, PrepareConfig, SampleConfig, TrainConfig

bounded = settings(derandomize=True, deadline=None, max_examples=100, database=None)

# ---------------------------------------------------------------- options

INTS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = {  # type of an option → its values
    int: INTS,
    float: FLOATS,
    bool: st.booleans(),
    str: st.text(),
    int | None: st.none() | INTS,
    float | None: st.none() | FLOATS,
    Literal["auto", "float32"]: st.sampled_from(["auto", "float32"]),
    Literal["auto", True, False]: st.sampled_from(["auto", True, False]),
}


@pytest.mark.parametrize("kind", VALUES, ids=str)
@bounded
@given(data=st.data())
def test_a_value_and_its_text_are_the_same_option(kind, data):
    value = data.draw(VALUES[kind])
    for written in (value, str(value)):
        got = coerce(written, kind, "", "key")
        assert got == value
        assert type(got) is type(value)


@bounded
@given(INTS, FLOATS)
def test_a_number_loses_nothing(i, f):
    assert coerce(f"{i:_}", int, "", "key") == i
    got = coerce(i, float, "", "key")
    assert type(got) is float
    assert got == float(i)
    if f.is_integer():
        assert coerce(f, int, "", "key") == coerce(str(f), int, "", "key") == f
    else:
        for value in (f, str(f)):
            with pytest.raises(UserError, match="takes a whole number"):
                coerce(value, int, "", "key")


@bounded
@given(st.sampled_from([("true", True), ("1", True), ("false", False), ("0", False)]), st.lists(st.booleans()))
def test_a_bool_is_read_in_any_case(word, upper):
    text = "".join(c.upper() if up else c for c, up in zip(word[0], [*upper, *[False] * 9], strict=False))
    for kind in (bool, Literal["auto", True, False]):
        assert coerce(text, kind, "", "key") is word[1]


@pytest.mark.parametrize("kind", VALUES, ids=str)
@bounded
@given(value=st.text() | st.text("0123456789.e-+_ ", max_size=8) | FLOATS | INTS | st.booleans() | st.none())
@example(value="9" * 400)
@example(value=10**400)
@example(value=float("inf"))
def test_any_value_is_an_option_or_one_line(kind, value):
    try:
        got = coerce(value, kind, "run.py, line 1: ", "key")
    except UserError as error:
        line = str(error)
        assert line.startswith("run.py, line 1: key ")
        assert len(line.splitlines()) == 1
    else:
        assert type(got) in (int, float, bool, str, type(None))
        assert coerce(got, kind, "", "key") == got


@pytest.mark.parametrize("schema", [TrainConfig, SampleConfig, PrepareConfig, BenchConfig])
def test_every_default_is_its_flag(schema):
    for option in fields(schema):
        text = "" if option.default is None else str(option.default)
        got = coerce(text, option_types(schema)[option.name], "", option.name)
        assert got == option.default
        assert type(got) is type(option.default)


@bounded
@given(st.text())
def test_a_text_arrives_as_it_was_typed(text):
    assert read_args([f"--start={text}"], SampleConfig, "") == ([], {"start": text})


# ---------------------------------------------------------------- tokenizers


def all_kinds(text):
    kinds = (lambda is_documents: CharTokenizer(text, is_documents), ByteTokenizer)
    return [make(is_documents) for is_documents in (False, True) for make in kinds]


def in_pieces(decode, ids, sizes):
    """Decode `ids` a few at a time."""
    out = []
    for size in sizes:
        out.append(decode(ids[:size]))
        ids = ids[size:]
    return "".join(out) + decode(ids, final=True)


@bounded
@given(st.text(), st.lists(st.integers(0, 3)))
def test_text_comes_back_at_once_and_in_pieces(text, sizes):
    for tokenizer in all_kinds(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert in_pieces(tokenizer.decoder(), ids.tolist(), sizes) == text
        assert not ids.size or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
        assert from_json(json.loads(json.dumps(tokenizer.to_json()))) == tokenizer


@bounded
@given(st.lists(st.integers(0, 256)), st.lists(st.integers(0, 3)), st.sampled_from(["replace", "surrogateescape"]))
def test_any_bytes_decode_in_pieces_as_at_once(ids, sizes, errors):
    tokenizer = ByteTokenizer(is_documents=True)
    assert in_pieces(tokenizer.decoder(errors), ids, sizes) == tokenizer.decode(ids, errors)


# ---------------------------------------------------------------- rows

BOS = 50
SHAPES = {"block_size": st.integers(1, 9), "world_size": st.integers(1, 3), "rows": st.integers(1, 5)}


def make(tokens, bos, block_size, world_size, rows):
    """The batches of each rank."""
    shared = {"rows": rows * world_size, "micro_rows": 2, "seed": 0, "device": torch.device("cpu")}
    shared["world_size"] = world_size
    return [Batches(tokens, bos, block_size, rank=rank, **shared) for rank in range(world_size)]


def documents_of(lengths):
    """Documents of the given lengths. (N,)"""
    tokens = [i for n, length in enumerate(lengths) for i in [BOS] + [n % BOS] * length]
    return np.array(tokens, dtype=np.uint16)


@bounded
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12), **SHAPES)
def test_every_token_of_every_document_is_predicted_once(lengths, block_size, world_size, rows):
    tokens = documents_of(lengths)
    for batches in make(tokens, BOS, block_size, world_size, rows):
        starts, sizes = batches.validation_rows()
        assert sizes.min() >= 1
        assert sizes.max() <= block_size
        x, y, predicted = batches.gather(starts, sizes)
        assert predicted == len(tokens) == (y != -1).sum()
        assert y[y != -1].tolist() == [*tokens[1:].tolist(), BOS]
        assert x[y != -1].tolist() == tokens.tolist()  # a token is predicted from the one before it
        pieces = -(-(np.array(lengths) + 1) // block_size)  # a document's end is a target too
        assert len(starts) == batches.rows_per_epoch == pieces.sum()


@bounded
@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=9), **SHAPES)
def test_an_epoch_of_documents_uses_every_row_once(lengths, block_size, world_size, rows):
    [*_, batches] = make(documents_of(lengths), BOS, block_size, world_size, rows)
    steps = range(2 * batches.rows_per_epoch)  # of `batches.rows` rows each: that many epochs, twice
    starts = np.concatenate([batches.step_rows(step)[0] for step in steps]).reshape(-1, batches.rows_per_epoch)
    assert (np.sort(starts) == batches.row_starts[:-1]).all()


@bounded
@given(n=st.integers(10, 200), **SHAPES)
def test_every_token_of_a_stream_is_evaluated_once(n, block_size, world_size, rows):
    ranks = make(np.arange(n, dtype=np.uint16), None, block_size, world_size, rows)
    targets = [y[y != -1].tolist() for batches in ranks for _, y, _ in batches.validation()]
    assert sorted(sum(targets, [])) == list(range(1, n))


@bounded
@given(n=st.integers(3, 300), block_size=st.integers(1, 64), seed=st.integers(0, 2**40))
def test_every_token_of_a_stream_is_a_target_over_the_epochs(n, block_size, seed):
    """Within as many epochs as there are offsets; each window lies within the stream."""
    n = max(n, block_size + 2)
    device = torch.device("cpu")
    tokens = np.arange(n, dtype=np.uint16)
    batches = Batches(tokens, None, block_size, rows=1, micro_rows=1, seed=seed, device=device)
    slack = n - 1 - batches.rows_per_epoch * block_size
    steps = range((slack + 1) * batches.rows_per_epoch)
    starts = np.concatenate([batches.step_rows(step)[0] for step in steps])
    targets = np.unique(starts[:, None] + 1 + np.arange(block_size))
    assert targets.tolist() == list(range(1, n))


@bounded
@given(n=st.integers(10, 200), step=st.integers(0, 50), **SHAPES)
def test_the_ranks_of_a_step_share_its_rows(n, step, block_size, world_size, rows):
    tokens = np.arange(n, dtype=np.uint16)
    [one] = make(tokens, None, block_size, 1, rows * world_size)
    total, batches = one.global_batch(step)
    parts = [part.global_batch(step) for part in make(tokens, None, block_size, world_size, rows)]
    assert {part_total for part_total, _ in parts} == {total}
    assert sum(predicted for _, part in parts for _, _, predicted in part) == total
    together = torch.cat([x for _, part in parts for x, _, _ in part])
    assert torch.equal(together, torch.cat([x for x, _, _ in batches]))


# ---------------------------------------------------------------- atomic writes


class Points:
    """Counts the points at which a write can fail, and fails at one of them."""

    def __init__(self, failing, error):
        self.failing, self.error, self.passed = failing, error, 0

    def __call__(self):
        self.passed += 1
        if self.passed - 1 == self.failing:
            raise self.error

    def before(self, function):
        """`function`, with a point before it. A sync only counts: no disk has to be waited for."""

        def call(*args):
            self()
            return function(*args) if function is not os.fsync else None

        return call


def write_two_halves(paths, points):
    """Replace `paths` by a new version, in two writes each."""
    with replacing(*paths) as files:
        for file in files:
            for half in (b"new ", b"bytes"):
                points()
                file.write(half)
        points()


ERRORS = (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), RuntimeError("any"))


@bounded
@given(
    there=st.lists(st.booleans(), min_size=1, max_size=3),
    failing=st.integers(0, 20),
    error=st.sampled_from(ERRORS),
)
def test_a_write_that_fails_leaves_old_bytes_or_new_ones(there, failing, error):
    """`there`: for each file, whether it has an old version. The last one tells that all are of one version."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"file{i}" for i in range(len(there))]
        for path, old in zip(paths, there, strict=True):
            if old:
                path.write_bytes(b"old")
        before = [path.read_bytes() if path.exists() else None for path in paths]
        points = Points(failing, error)
        patched = {name: points.before(getattr(os, name)) for name in ("fsync", "replace")}
        failed = False
        with mock.patch.multiple(os, **patched):
            try:
                write_two_halves(paths, points)
            except (UserError, KeyboardInterrupt, RuntimeError):
                failed = True
        after = [path.read_bytes() if path.exists() else None for path in paths]
        assert failed == (failing < points.passed)
        assert set(os.listdir(folder)) <= {path.name for path in paths}  # no temporary file
        assert all(now in (old, b"new bytes", None) for old, now in zip(before, after, strict=True))
        if len(paths) == 1 or after[-1] is not None:
            assert after in (before, [b"new bytes"] * len(paths))
        if not failed:
            assert after == [b"new bytes"] * len(paths)
