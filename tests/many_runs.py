"""train.py many times in one process, for torchrun to start, so that torch is imported once.

    torchrun … tests/many_runs.py FLAGS        # a JSON list with a list of flags for each run

At the end, rank 0 prints a JSON list: the bytes of weights, gradients and moments that it holds in each run.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

import train  # noqa: E402

held = []


class Watched(train.TrainState):
    """A TrainState that notes in `held` what it holds when the gradients of a step are there."""

    def add_optimizers(self, saved=None):
        super().add_optimizers(saved)
        self.optimizers[0][0].register_step_pre_hook(self.count)

    def count(self, *_):
        tensors = [*self.parameters, *(parameter.grad for parameter in self.parameters)]
        for optimizer, _ in self.optimizers:
            tensors += [t for moments in optimizer.state.values() for t in moments.values() if t.dim()]
        storages = [self.strategy.to_local(tensor).untyped_storage() for tensor in tensors]
        held[-1] = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())  # some are shared


if __name__ == "__main__":
    torch.set_num_threads(1)
    train.TrainState = Watched
    for flags in json.loads(sys.argv[1]):
        held.append(0)
        assert train.main(flags) == 0
    if os.environ["RANK"] == "0":
        print(json.dumps(held))
