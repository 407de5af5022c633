"""The two splits of a run's dataset, opened and made into batches for one rank."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quill.cli import note
from quill.data.batches import DATA_ORDER, Batches
from quill.data.token_files import Dataset, open_dataset, prepare_if_missing
from quill.distributed import AgreedError
from quill.errors import check
from quill.machine import Machine
from quill.options import TrainConfig


@dataclass(frozen=True)
class Splits:
    """The dataset of a run, and the batches of its two splits for this rank."""

    dataset: Dataset
    train_batches: Batches
    val_batches: Batches


def open_splits(config: TrainConfig, machine: Machine, data_order: int = DATA_ORDER) -> Splits:
    """Prepare the dataset if it is a known corpus, and open it. Raise a UserError if it does not fit the options."""
    group = machine.group
    group.on_rank_0(prepare_if_missing, config.dataset, config.data_dir)
    dataset = group.on_all_ranks(open_dataset, config.data_dir, config.dataset)
    group.refuse_differences({f"{name}.bin": split["sha256"][:12] for name, split in dataset.meta["splits"].items()})
    if config.val_split == "train_tail":
        dataset = group.on_all_ranks(hold_out_tail, dataset)
    if config.rows % group.world_size:
        *most, last = [str(n) for n in range(1, min(config.rows, 1024) + 1) if config.rows % n == 0]
        problem = f"{config.rows_as_flags} = {config.rows:,} is not divisible by the {group.world_size} processes"
        raise AgreedError(f"{problem}; it is by {', '.join(most)}{' or ' * bool(most)}{last}")
    settings: dict[str, Any] = {"rows": config.rows, "micro_rows": config.batch_size, "seed": config.seed}
    settings |= {"device": machine.device, "data_order": data_order, "rank": group.rank, "world_size": group.world_size}
    bos, batches = dataset.tokenizer.bos, []
    held_out = "val split" if config.val_split == "val" else "held-out tail of the train split"
    for name, tokens in (("train split", dataset.train), (held_out, dataset.val)):
        if bos is None and len(tokens) <= config.block_size:
            problem = f"the {name} of {config.dataset} has {len(tokens)} tokens, too few for"
            raise AgreedError(f"{problem} --block_size={config.block_size}: use a smaller one or a longer text")
        batches.append(Batches(tokens, bos, config.block_size, **settings))
    splits, rows = Splits(dataset, *batches), config.eval_iters * config.batch_size
    if 0 < rows < splits.val_batches.rows_in_all:
        covered = f"{rows:,} of {splits.val_batches.rows_in_all:,}"
        note(f"note: --eval_iters={config.eval_iters} evaluates the first {covered} rows only")
    return splits


def hold_out_tail(dataset: Dataset) -> Dataset:
    """Return `dataset` with the last tenth of its training split as `val`, from a document's start on, and the rest.

    With it, you can choose hyperparameters without a look at the validation split. Documents that are sorted must be
    shuffled before: their tail is not like the rest. Raise a UserError if no document starts in the last tenth.
    """
    train, bos = dataset.train, dataset.tokenizer.bos
    cut = len(train) - len(train) // 10
    if bos is not None:
        starts = np.flatnonzero(train[cut:] == bos)
        check(len(starts), f"--val_split=train_tail: no document starts in the last tenth of {dataset.name}/train.bin")
        cut += int(starts[0])
    return replace(dataset, train=train[:cut], val=train[cut:])
