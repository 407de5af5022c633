"""What the page of play.py shows of a run: files in out_dir/page, and a number up to which the run may train.

    state.json         progress, curve, evaluations and samples, at most twice a second
    live.pt            the weights in training, and the gradients of the last step
    step-000010.pt     a snapshot: the weights that evaluations use; up to 64, at equal distances
    control            written by the page: the run waits once it has done that many steps

Every file is written whole, but a power cut may damage it. The two kinds of weights are checkpoints without optimizers,
which sample.py reads too. Files that can't be written cost a line on stderr, and not the run.
"""

from __future__ import annotations

import io
import json
import math
import os
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
from quill.files import read_small, replacing
from quill.machine import StopSignals
from quill.observers.observer import Evaluation, LogEntry, Observer
from quill.optimizer import learning_rate
from quill.state import TrainState

FORMAT = 1
CURVE = ("step", "loss", "gradient_norm", "lr")
KINDS = {"pid": int, "step": int, "max_iters": int, "status": str, "note": str, "stretch": int, "curve": dict}
KINDS |= {"evaluations": list, "samples": list, "snapshots": list}
INTERVAL, SHARE = 0.5, 0.025  # seconds between writes; the part of the run's time that each kind of file may take
LOOKING, PATIENCE = 0.02, 600.0  # seconds between looks at the file control; seconds that a run waits
POINTS, ROWS, SAMPLES = 2000, 500, 8  # in the curve; evaluations that are kept; samples at each
SNAPSHOTS, SNAPSHOT_BYTES = 64, 2**28


class Curve:
    """Loss, gradient norm and learning rate: a point for each step, then means over equal stretches of steps."""

    def __init__(self) -> None:
        self.points: list[tuple[Any, ...]] = []  # last step, number of steps, sums of losses and norms, lr
        self.stretch = 1

    @property
    def last_step(self) -> int:
        """The last step that is in the curve."""
        return self.points[-1][0] if self.points else 0

    def add(self, point: tuple[Any, ...]) -> None:
        """Add a point to the stretch that it belongs to. Double the stretches if there are too many."""
        self.points = self.points[:-1] + self._merged([*self.points[-1:], point])
        if len(self.points) > POINTS:
            self.stretch *= 2
            self.points = self._merged(self.points)

    def _merged(self, points):
        merged: list[tuple[Any, ...]] = []
        for step, n, loss, norm, lr in points:
            if merged and (merged[-1][0] - 1) // self.stretch == (step - 1) // self.stretch:
                _, other_n, other_loss, other_norm, _ = merged.pop()
                n, loss, norm = n + other_n, loss + other_loss, norm + other_norm
            merged.append((step, n, loss, norm, lr))
        return merged

    def to_json(self) -> dict[str, list[Any]]:
        """Return the lists of state.json."""
        rows = [(step, _number(loss / n), _number(norm / n), _number(lr)) for step, n, loss, norm, lr in self.points]
        return {key: [row[i] for row in rows] for i, key in enumerate(CURVE)}


def _number(x: float) -> float | None:
    """Six digits; JSON has no infinity."""
    return float(f"{x:.6g}") if math.isfinite(x) else None


def read_state(path: Path) -> dict[str, Any] | None:
    """Read a state.json, which may come from anywhere. None if it is missing, damaged or of another format."""
    try:
        state = json.loads((read_small(path) or b"").decode(), parse_constant=_finite, parse_float=_finite)
        lists = [state["curve"][key] for key in CURVE]
        lists += [[row[key] for row in state["evaluations"]] for key in ("step", "val_loss")]
        right = all(type(state[key]) is kind for key, kind in KINDS.items()) and state["stretch"] > 0
        right = right and state["format"] == FORMAT and len({*map(len, lists[:4])}) == 1
        right = right and all(type(x) in (int, float, type(None)) for values in lists for x in values)
        steps = [*lists[0], *lists[4], *state["snapshots"], *(row["step"] for row in state["samples"])]
        right = right and all(type(step) is int for step in steps)
        json.dumps(state, ensure_ascii=False).encode()  # fails for half a surrogate pair
        return state if right else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


class Page(Observer):
    """The files in out_dir/page. Created again for a resumed run, it drops what is later than the checkpoint."""

    samples_wanted = SAMPLES

    def __init__(self, state: TrainState):
        self.state, self.config, self.progress = state, state.config, state.progress
        self.folder = Path(self.config.out_dir) / "page"
        self.curve, self.evaluations, self.samples, self.note = Curve(), [], [], ""
        self.status, self.weights_step, self.target, self.is_failing = "running", None, None, False
        self.next_look = self.next_write = self.next_weights = 0.0  # on the clock time.perf_counter
        self.waiting: dict[int, dict[str, Any]] = {}  # snapshots that are not on the disk yet
        self.head = {"config": asdict(self.config), "vocab_size": state.model.vocab_size, "ema": None}
        self.head |= {"tokenizer": state.tokenizer.to_json()}
        self.parameters, self.gradients = dict(state.model.named_parameters()), {}
        # This hook runs after clipping, and before the gradients are deleted.
        state.optimizers[0][0].register_step_pre_hook(self._keep_gradients)
        self.most = self._most_snapshots()
        self._restore(self.progress.step)

    def _most_snapshots(self):
        size = sum(p.numel() * p.element_size() for p in self.parameters.values())
        if size <= SNAPSHOT_BYTES:
            with io.BytesIO() as file:
                checkpoint.write(file, self._checkpoint(self._copy(self.state.eval_model.state_dict()), 0))
                size = file.tell()
        if size > SNAPSHOT_BYTES:
            most = f"{SNAPSHOT_BYTES // 2**20} MiB"
            self.note = f"the weights take {size / 2**20:,.0f} MiB: the page shows weights of at most {most}"
        return min(SNAPSHOTS, SNAPSHOT_BYTES // size)

    def _restore(self, step):
        """Read what an earlier process of this run has written, without what is later than `step`."""
        with suppress(OSError):
            for path in [*self.folder.glob(".s*.tmp"), *self.folder.glob(".live*.tmp")]:
                path.unlink()  # of a process that was killed
        self.snapshots = sorted(int(path.stem[5:]) for path in self.folder.glob("step-*.pt") if path.stem[5:].isdigit())
        self.dropped = [saved for saved in self.snapshots if saved > step]
        self.snapshots = [saved for saved in self.snapshots if saved <= step]
        self.stride = self.snapshots[1] - self.snapshots[0] if len(self.snapshots) > 1 else 1
        if old := read_state(self.folder / "state.json"):
            self.evaluations = [row for row in old["evaluations"] if row["step"] <= step]
            self.samples = [row for row in old["samples"] if row["step"] <= step]
            self.curve.stretch = old["stretch"]
            for last, *means, lr in zip(*(old["curve"][key] for key in CURVE), strict=True):
                if last <= step:
                    n = (last - 1) % old["stretch"] + 1
                    loss, norm = (math.nan if mean is None else mean * n for mean in means)
                    self.curve.add((last, n, loss, norm, lr or 0.0))

    # ------------------------------------------------------------ the events

    def _keep_gradients(self, optimizer, args, kwargs):
        """Keep the gradients without copying them: training lets go of them after the step."""
        self.gradients = {name: p.grad for name, p in self.parameters.items()} if self.most else {}

    def before_step(self, stop: StopSignals) -> None:
        """Take a snapshot if one is due, write the files if it is time, and wait if the page says so."""
        self._take_snapshot()
        now = time.perf_counter()
        if now >= self.next_look:
            self.target, self.next_look = self._read_control(), now + LOOKING
        if self.target is not None and self.progress.step >= self.target:
            self._wait(stop)
        elif now >= self.next_write:
            self._write()

    def _wait(self, stop):
        self.status, end = "waiting", time.monotonic() + PATIENCE
        self._write(at_once=True)
        while not stop.received and self.target is not None and self.progress.step >= self.target:
            if time.monotonic() > end:
                stop.received = signal.SIGTERM  # as if the page had paused the run
            time.sleep(LOOKING / 2)
            self.target = self._read_control()
        self.status = "running"
        if stop.received:  # so that a resumed run does not wait again
            with suppress(OSError):
                (self.folder / "control").unlink()

    def _read_control(self):
        path = self.folder / "control"
        with suppress(ValueError):
            return int((read_small(path) if os.path.lexists(path) else b"") or b"")
        return None

    def logged(self, entry: LogEntry) -> None:
        """Add the steps since the last entry to the curve."""
        self._add_steps(entry.step, entry.losses, entry.gradient_norms)

    def _add_steps(self, last, losses, norms):
        for step, loss, norm in zip(range(last - len(losses) + 1, last + 1), losses, norms, strict=True):
            if step > self.curve.last_step:
                self.curve.add((step, 1, loss, norm, learning_rate(step - 1, self.config)))

    def evaluated(self, evaluation: Evaluation) -> None:
        """Keep the evaluation. Of very many, every second one is dropped."""
        keys = ("step", "train_loss", "val_loss", "tokens_per_s", "seconds")
        self.evaluations.append({key: getattr(evaluation, key) for key in keys})
        if len(self.evaluations) > ROWS:
            del self.evaluations[1::2]

    def sampled(self, step: int, texts: list[str]) -> None:
        """Keep the samples. Of very many, every second one is dropped."""
        self.samples.append({"step": step, "texts": texts})
        if len(self.samples) > SNAPSHOTS:
            del self.samples[1::2]

    def finished(self, best_val_loss: float, texts: list[str]) -> None:
        """Keep the final samples."""
        self.status = "finished"
        if texts:
            self.sampled(self.progress.step, texts)

    def close(self) -> None:
        """Write how the run ended."""
        self.status = "finished" if self.status == "finished" else "stopped"
        with suppress(RuntimeError):  # of a device that has failed, which ended the run
            self._take_snapshot()
            self._write(at_once=True)

    # ------------------------------------------------------------ the files

    def _take_snapshot(self):
        """Copy the weights if a snapshot is due. If there are too many, double the distance between them."""
        step = self.progress.step
        if step % self.stride or step in self.waiting or step in self.snapshots:
            return
        due = {*self.snapshots, *self.waiting, step}
        while len(due) > self.most and due:
            self.stride *= 2
            due = {one for one in due if one % self.stride == 0 and self.most}
        self.dropped += [one for one in self.snapshots if one not in due]
        self.snapshots = [one for one in self.snapshots if one in due]
        self.waiting = {one: weights for one, weights in self.waiting.items() if one in due}
        if step in due:
            self.waiting[step] = self._copy(self.state.eval_model.state_dict())

    @staticmethod
    def _copy(weights):
        """Copies of the weights on the CPU. Tied matrices stay one."""
        copies = {weight.data_ptr(): weight.detach().to("cpu", copy=True) for weight in weights.values()}
        return {name: copies[weight.data_ptr()] for name, weight in weights.items()}

    def _checkpoint(self, weights, step, **more):
        return self.head | {"model": weights, "step": step, "best_val_loss": self.progress.best_val_loss} | more

    def _write(self, at_once=False):
        """Write the files. A failure costs one line, and is tried again."""
        try:
            began = time.perf_counter()
            if self.most and (at_once or began >= self.next_weights):
                self._write_weights()
                self.next_weights = time.perf_counter() + (time.perf_counter() - began) / SHARE
            began = time.perf_counter()
            self._write_state()
            self.next_write = began + max(INTERVAL, (time.perf_counter() - began) / SHARE)
        except (UserError, OSError) as error:
            if not self.is_failing:
                note(f"note: {error}; the page shows an older state, and training continues")
            self.is_failing, self.next_write = True, time.perf_counter() + 10 * INTERVAL

    def _write_weights(self):
        weights, step = self._copy(self.state.model.state_dict()), self.progress.step
        if not all(weight.isfinite().all() for weight in weights.values()):
            return  # the run ends with an error
        while self.dropped:
            (self.folder / f"step-{self.dropped[-1]:06}.pt").unlink(missing_ok=True)
            self.dropped.pop()
        gradients = {
            name: g.detach().cpu() for name, g in self.gradients.items() if g is not None and g.isfinite().all()
        }
        files = {"live.pt": self._checkpoint(weights, step, gradients=gradients)}
        files |= {f"step-{one:06}.pt": self._checkpoint(copy, one) for one, copy in self.waiting.items()}
        with replacing(*(self.folder / name for name in files), durable=False) as opened:
            for file, saved in zip(opened, files.values(), strict=True):
                checkpoint.write(file, saved)
        self.snapshots, self.waiting, self.weights_step = sorted([*self.snapshots, *self.waiting]), {}, step

    def _write_state(self):
        unread = self.state.pending if self.state.machine.group.world_size == 1 else []
        if unread:  # the training loop reads them again
            losses, norms = torch.stack([torch.stack(pair) for pair in unread]).cpu().T.tolist()
            self._add_steps(self.progress.step, losses, norms)
        state = {"format": FORMAT, "pid": os.getpid(), "status": self.status, "note": self.note}
        state |= {"step": self.progress.step, "max_iters": self.config.max_iters, "stretch": self.curve.stretch}
        state |= {"curve": self.curve.to_json(), "evaluations": self.evaluations, "samples": self.samples}
        state |= {"snapshots": self.snapshots, "weights_step": self.weights_step}
        with replacing(self.folder / "state.json", durable=False) as (file,):
            file.write(json.dumps(state, ensure_ascii=False).encode())
