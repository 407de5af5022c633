"""What the page of play.py shows of a run: files in out_dir/page, and a step at which the run waits.

    state.json         progress and the curve of the loss
    live.pt            the weights in training, and the gradients of the last step
    step-000010.pt     a snapshot: the weights that evaluations use; up to 64, at equal distances
    control            written by the page: the run waits once it has done that many steps

The first three are written together, at most twice a second. Every file is written whole, but a power cut may damage
it. The weights are checkpoints without optimizers, which sample.py reads too. Files that can't be written cost a line
on stderr, and not the run.
"""

import io
import json
import math
import os
import re
import signal
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from quill import checkpoint
from quill.cli import note
from quill.errors import UserError
from quill.files import read_end, replacing
from quill.machine import StopSignals
from quill.observers.observer import LogEntry, Observer
from quill.optimizer import learning_rate
from quill.state import TrainState

INTERVAL, PAUSE = 0.5, 20  # between two writes: the longer of so many seconds, and so often the time of a write
LOOK = 0.02  # seconds between two looks at control
PATIENCE = 300.0  # seconds that a run waits: other ranks, if there are any, give up after 600
POINTS, SNAPSHOTS, SNAPSHOT_BYTES = 2000, 64, 2**28
TYPES = {"format": int, "pid": int, "status": str, "step": int, "note": str, "curve": list}


def read_state(path: Path) -> dict[str, Any] | None:
    """Read a state.json, which may come from anywhere. None if it is missing, damaged or of another format.

    Its curve has rows of step, loss, gradient norm and learning rate.
    """
    try:
        state = json.loads(read_end(path), parse_constant=lambda name: None)  # JSON has no NaN
        right = all(type(state[key]) is kind for key, kind in TYPES.items()) and state["format"] == 1
        rows = [[type(x) for x in row] for row in state["curve"]]
        right = right and state["pid"] > 0 and 0 <= state["step"] < 2**53
        right = right and all(len(row) == 4 and row[0] is int and {*row} <= {int, float, type(None)} for row in rows)
        return state if right else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def list_snapshots(folder: Path) -> list[int]:
    """Return the steps of the snapshots in the folder `page` of a run."""
    return sorted(int(path.stem[5:]) for path in folder.glob("step-*.pt") if re.fullmatch(r"\d{6,15}", path.stem[5:]))


class Page(Observer):
    """The files in out_dir/page. Created again for a resumed run, it drops what is later than the checkpoint."""

    def __init__(self, state: TrainState):
        self.state, self.config, self.progress = state, state.config, state.progress
        self.folder = Path(self.config.out_dir) / "page"
        self.status, self.note, self.is_failing = "running", "", False
        self.target, self.next_look, self.next_write = math.inf, 0.0, 0.0  # a step; on the clock time.perf_counter
        self.head = {"config": asdict(self.config), "vocab_size": state.model.vocab_size, "ema": None}
        self.head |= {"tokenizer": state.tokenizer.to_json()}
        self.parameters, self.gradients = dict(state.model.named_parameters()), {}
        size = 4 * state.model.num_params() + 2**16  # of a snapshot
        self.most_snapshots = min(SNAPSHOTS, SNAPSHOT_BYTES // size)
        if self.most_snapshots:
            # This hook runs after clipping, and before the gradients are deleted.
            state.optimizers[0][0].register_step_pre_hook(self._keep_gradients)
        else:
            self.note = f"the weights take {size >> 20:,} MiB: the page shows weights of at most {SNAPSHOT_BYTES >> 20}"
        with suppress(OSError):
            for path in self.folder.glob(".[ls]*.tmp"):  # of a process that was killed
                path.unlink()
        # Snapshots are bytes until they are on the disk, then None. `_write` deletes those that are not listed here.
        known = [step for step in list_snapshots(self.folder) if step <= self.progress.step]
        self.snapshots: dict[int, Any] = dict.fromkeys(known)
        old = (read_state(self.folder / "state.json") or {"curve": []})["curve"]
        self.curve = {step: point for step, *point in old if step <= self.progress.step}
        # After a resume, the distances start at 1 again, and soon become what they were.
        self.snapshot_distance = self.curve_distance = 1

    def _keep_gradients(self, optimizer, args, kwargs):
        """Keep the gradients without copying them: training lets go of them after the step."""
        self.gradients = {name: p.grad for name, p in self.parameters.items()}

    def before_step(self, stop: StopSignals) -> None:
        """Take a snapshot if one is due, write the files if it is time, and wait if the page says so."""
        self._take_snapshot()
        now = time.perf_counter()
        if now >= self.next_look:
            self.target, self.next_look = self._read_target(), now + LOOK
        if self.progress.step >= self.target:
            self._wait(stop)
        elif now >= self.next_write:
            self._write()

    def _read_target(self):
        """Return the step at which the run waits; infinity if the page has not written one."""
        with suppress(ValueError):
            return int(read_end(self.folder / "control"))
        return math.inf

    def _wait(self, stop):
        """Wait until the page raises the step or removes it, a signal arrives, or PATIENCE is over."""
        self.status, end = "waiting", time.monotonic() + PATIENCE
        self._write()
        while not stop.received and self.progress.step >= self.target:
            if time.monotonic() > end:
                stop.received = signal.SIGTERM  # as if the page had paused the run
            time.sleep(LOOK / 2)
            self.target = self._read_target()
        self.status = "running"
        if stop.received:  # so that a resumed run does not wait again
            with suppress(OSError):
                (self.folder / "control").unlink()

    def logged(self, entry: LogEntry) -> None:
        """Add the steps since the last entry to the curve."""
        self._add_to_curve(entry.losses, entry.gradient_norms)

    def _add_to_curve(self, losses, norms):
        """Add those of the last steps that are multiples of the distance. If there are too many, double it."""
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), self.progress.step - len(losses) + 1):
            if step % self.curve_distance == 0:
                self.curve[step] = [round(loss, 6), round(norm, 6), learning_rate(step - 1, self.config)]
        while len(self.curve) > POINTS:
            self.curve_distance *= 2
            self.curve = {step: point for step, point in self.curve.items() if step % self.curve_distance == 0}

    def finished(self, best_val_loss: float, texts: list[str]) -> None:
        """Note that the run is complete."""
        self.status = "finished"

    def close(self) -> None:
        """Write how the run ended."""
        self.status = "finished" if self.status == "finished" else "stopped"
        with suppress(RuntimeError):  # of a device that has failed, which ended the run
            self._take_snapshot()
            self._write()

    def _take_snapshot(self):
        """Keep the weights in memory if a snapshot is due. If there are too many, double the distance between them."""
        step = self.progress.step
        if step % self.snapshot_distance or step in self.snapshots or not self.most_snapshots:
            return
        self.snapshots[step] = self._serialize(self.state.eval_model)
        while len(self.snapshots) > self.most_snapshots:
            self.snapshot_distance *= 2
            self.snapshots = {n: data for n, data in self.snapshots.items() if n % self.snapshot_distance == 0}

    def _serialize(self, model, **more):
        """Return the bytes of a checkpoint."""
        file, best = io.BytesIO(), self.progress.best_val_loss
        own = {"model": model.state_dict(), "step": self.progress.step, "best_val_loss": best}
        checkpoint.write(file, self.head | own | more)
        return file.getbuffer()

    def _write(self):
        """Write the files. A failure costs one line, and is tried again."""
        began = time.perf_counter()
        for write in (self._write_weights, self._write_state):  # the second may fit on a full disk
            try:
                write()
            except (UserError, OSError) as error:
                if not self.is_failing:
                    note(f"note: {error}; the page shows an older state, and training continues")
                self.is_failing = True
        now = time.perf_counter()
        self.next_write = now + max(INTERVAL, PAUSE * (now - began))

    def _write_weights(self):
        """Delete the snapshots that are dropped, and write live.pt and the new snapshots."""
        if not self.most_snapshots or not all(p.isfinite().all() for p in self.parameters.values()):
            return  # if they are not finite, the run ends with an error
        for step in {*list_snapshots(self.folder)} - {*self.snapshots}:
            (self.folder / f"step-{step:06}.pt").unlink(missing_ok=True)
        files = {"live.pt": self._serialize(self.state.model, gradients=self.gradients)}
        files |= {f"step-{step:06}.pt": data for step, data in self.snapshots.items() if data}
        with replacing(*(self.folder / name for name in files), durable=False) as opened:
            for file, data in zip(opened, files.values(), strict=True):
                file.write(data)
        self.snapshots = dict.fromkeys(self.snapshots)

    def _write_state(self):
        unread = self.state.pending if self.state.machine.group.world_size == 1 else []
        if unread:  # the training loop reads them again
            self._add_to_curve(*torch.stack([torch.stack(pair) for pair in unread]).cpu().T.tolist())
        state = {"format": 1, "pid": os.getpid(), "status": self.status, "step": self.progress.step, "note": self.note}
        state["curve"] = [[step, *point] for step, point in self.curve.items()]
        with replacing(self.folder / "state.json", durable=False) as (file,):
            file.write(json.dumps(state).encode())
