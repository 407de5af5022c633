"""The processes of a run: their ranks, what they agree on, and how they end.

One process is the default. torchrun starts several, one for each GPU, and tells each its rank in the environment. After
a failure, or when a node joins, it kills them all and starts new ones: a restart.

An error on any rank ends all of them at once, with one line on stderr.
"""

from __future__ import annotations

import gc
import hashlib
import os
import secrets
import signal
import socket
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from quill.cli import explain, note, script_name
from quill.errors import UserError

JOINING = 300.0  # seconds from the first rank's start until the last rank must be there
LEAVING = 10.0  # seconds that a rank waits for the others to have seen the end of the run
REPORTING = 5.0  # seconds that a rank gives another one to report its error
UNREACHABLE = 30  # seconds without an answer from another node's kernel, after which its processes are given up
HOW_TO_JOIN = "a node can join a run that has started if torchrun runs with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"


class AgreedError(UserError):
    """An error that every rank raises, with the same words."""


class ErrorElsewhere(UserError):
    """A bug on another rank, which reports it."""


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """A process's place among the processes of a run. The default is a process that is alone."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> ProcessGroup:
        """Read the rank and the world size that torchrun has set."""
        return cls(rank=int(os.environ.get("RANK", 0)), world_size=int(os.environ.get("WORLD_SIZE", 1)))

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Connect the processes: gloo for tensors on the CPU, nccl for those on GPUs.

        If the `with` block raises on any rank, every process ends at once, with the exit code and, on one of them, the
        line on stderr that `quill.cli.run` gives a process that is alone.
        """
        if self.world_size == 1:
            yield
            return
        store = None
        try:
            store = self._join()
            before = signal.signal(signal.SIGTERM, _interrupt)
            yield
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # the run has ended already
            self._leave(store)
            signal.signal(signal.SIGTERM, before)
        except BaseException as error:
            self._end(error, store)
        gc.collect()  # end DDP's threads while the group exists; at exit they would abort the process
        dist.destroy_process_group()

    def _join(self):
        """Connect the processes. → a store for this start's processes alone"""
        try:
            timeout = timedelta(seconds=JOINING)
            store = meet(next(dist.rendezvous("env://", timeout=timeout))[0], self.rank, self.world_size)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size)
            give_up_unreachable_nodes()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"can't connect to the other processes: {reason}") from None
        return store

    def _leave(self, store):
        """Wait until every rank has left its last collective.

        A rank that closes its connections earlier can fail another one that still reads from them.
        """
        self.max(0)  # this waits as long as it takes, but not for the dead
        store.add("left", 1)
        with suppress(dist.DistError):  # rank 0 may serve the store; it ends when it has seen all of them here
            _wait_until(lambda: store.add("left", 0) == self.world_size, LEAVING)

    def _end(self, error: BaseException, store: dist.Store | None) -> NoReturn:
        """End this process because of `error`. The first rank to get here prints its line; the others are silent.

        The group is not destroyed, which would wait for operations that can't end. The connections close with the
        process, and that ends the collectives of the other ranks.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # torchrun sends SIGTERM as soon as another process has ended
        text, code = self._line(error)
        mine = first = f"{self.rank} {code}"
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        if store is not None:
            if isinstance(error, ErrorElsewhere):
                _wait_until(lambda: store.check(["ended"]), REPORTING)
            try:
                first = store.compare_set("ended", "", mine).decode()
            except dist.DistError:  # rank 0 served the store and has ended, or its node can't be reached
                speaks = self.rank == 1 or (self.rank > 1 and os.environ.get("LOCAL_RANK") == "0")
                text = text if speaks else ""
        if first == mine and text:
            # Before the ranks have met, a signal to all of them gives each the same line.
            note(f"{script_name()}: {text}", every_rank=store is not None or not isinstance(error, KeyboardInterrupt))
        if store is not None:
            with suppress(dist.DistError):
                store.add("informed", 1)
                # torchrun's agent serves the store, unless an option moves it to rank 0. Then it ends with rank 0.
                if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                    _wait_until(lambda: store.add("informed", 0) == self.world_size, 1.0)
        os._exit(int(first.split()[1]))

    def _line(self, error):
        """The line on stderr for `error` and the exit code. A bug gets its traceback as well."""
        if isinstance(error, (AgreedError, ErrorElsewhere)):
            return explain(error)
        if isinstance(error, KeyboardInterrupt):
            number = error.args[0] if error.args else signal.SIGINT
            return f"stopped by {signal.Signals(number).name}", 128 + number
        if isinstance(error, SystemExit):
            return "", error.code if isinstance(error.code, int) else int(error.code is not None)
        # gloo's errors have no type of their own.
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower()):
            return f"rank {self.rank} lost its connection to another process, which has failed or can't be reached", 1
        if not isinstance(error, (UserError, OSError)):
            traceback.print_exception(error)
        text, code = explain(error)
        return text and f"rank {self.rank}: {text}", code

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a CPU tensor over the ranks, in place. → `tensor`"""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, number: int) -> int:
        """The largest `number` of any rank."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor.item())

    def refuse_differences(self, values: dict[str, Any]) -> None:
        """Raise a UserError, on every rank, if a rank has other `values`, another torch or other code than rank 0."""
        if self.world_size == 1:
            return
        ranks: list[Any] = [None] * self.world_size
        dist.all_gather_object(ranks, {"torch": torch.__version__, "quill's code": code_digest()} | values)
        for rank, theirs in enumerate(ranks):
            for key in ranks[0] | theirs:
                own, first = (f"{key}={of[key]}" if key in of else f"{key} at its default" for of in (theirs, ranks[0]))
                if own != first:
                    advice = "start all nodes with the same code, options and data"
                    raise AgreedError(f"rank {rank} has {own}, but rank 0 has {first}; {advice}")

    def on_all_ranks(self, work: Callable[..., Any], *args: Any) -> Any:
        """Call `work(*args)` on each rank. If any rank fails, every rank raises its error instead of deadlocking."""
        if self.world_size == 1:
            return work(*args)
        result, bug, text = None, None, None
        try:
            result = work(*args)
        except (UserError, OSError) as error:
            text = explain(error)[0]
        except Exception as error:
            bug = error
        failures: list[Any] = [None] * self.world_size
        dist.all_gather_object(failures, (text, bug is not None))
        if bug is not None:
            raise bug
        if any(is_bug for _, is_bug in failures):
            raise ErrorElsewhere("another rank has failed")
        texts = [text for text, _ in failures]
        failed = [rank for rank, text in enumerate(texts) if text is not None]
        if failed:
            same = len(set(texts)) == 1 or failed == [0]  # rank 0 has work that no other has
            raise AgreedError(texts[failed[0]] if same else f"rank {failed[0]}: {texts[failed[0]]}")
        return result

    def on_rank_0(self, work: Callable[..., Any], *args: Any) -> None:
        """Call `work(*args)` on rank 0 while the others wait. If it fails, every rank raises its error."""
        self.on_all_ranks(work if self.rank == 0 else lambda *args: None, *args)


def code_digest() -> str:
    """Return a digest of quill's source files."""
    root = Path(__file__).parent.parent
    paths = (root / "model.py", root / "train.py", *sorted(root.glob("quill/**/*.py")))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def give_up_unreachable_nodes() -> None:
    """Let this process's connections fail UNREACHABLE seconds after the other end can't be reached any more.

    By default that takes a quarter of an hour. A node's kernel answers for processes that compute or write, so that
    waiting for them is not cut short, unless they are stopped (SIGSTOP) for as long. Only Linux has this.
    """
    seconds = {"TCP_KEEPIDLE": UNREACHABLE // 2, "TCP_KEEPINTVL": UNREACHABLE // 6, "TCP_KEEPCNT": 3}
    for descriptor in Path("/proc/self/fd").glob("*"):  # gloo does not say which are its own
        number = int(descriptor.name)
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                with socket.socket(fileno=os.dup(number)) as connection:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    for name, value in (seconds | {"TCP_USER_TIMEOUT": UNREACHABLE * 1000}).items():
                        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def meet(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """Wait for the other ranks of this start. → a store that only they share

    torchrun's store outlives the processes: it still has the addresses at which gloo could reach those of the last
    start (pytorch issue 135712). Nothing in the environment is common to all nodes and new at each start: an agent
    counts the restarts that its own processes caused, and a node that joins causes none. So each rank writes a random
    token. Rank 0 answers every token it finds with its own, and a rank that replies to that is alive. The tokens of
    dead processes stay without a reply, until those of the living replace them.
    """
    token = secrets.token_hex(8)
    if rank > 0:
        answer = f"quill/answer/{token}"
        store.set(f"quill/token/{rank}", token)
        if not _wait_until(lambda: store.check([answer]), JOINING):
            raise UserError(f"rank {rank} has waited {JOINING:.0f} s for rank 0; {HOW_TO_JOIN}")
        start = store.get(answer).decode()
        store.set(f"quill/{start}/reply/{rank}", "")
        return dist.PrefixStore(f"quill/{start}", store)
    missing = set(range(1, world_size))

    def all_replied():
        for other in sorted(missing):
            if store.check([f"quill/{token}/reply/{other}"]):
                missing.remove(other)
            elif store.check([f"quill/token/{other}"]):
                store.set(f"quill/answer/{store.get(f'quill/token/{other}').decode()}", token)
        return not missing

    if not _wait_until(all_replied, JOINING):
        raise UserError(f"rank 0 has waited {JOINING:.0f} s for rank {', '.join(map(str, missing))}; {HOW_TO_JOIN}")
    return dist.PrefixStore(f"quill/{token}", store)


def _wait_until(is_true, seconds):
    """Ask `is_true` again and again; signals are handled in between. → whether it has become true"""
    deadline = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _interrupt(number, frame):
    raise KeyboardInterrupt(number)
