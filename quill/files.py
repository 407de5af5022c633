"""Atomic writes, and a lock that gives an output folder to one process."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from quill.errors import UserError


@contextmanager
def replacing(*paths: str | Path, shared: bool = False) -> Iterator[list[BinaryIO]]:
    """Write new versions of `paths`, and put them in place together when the `with` block ends.

    The block gets one binary file per path. These are temporary files in the folder of the first path, which is made
    if it does not exist. When the block ends, they are synced to the disk and renamed to `paths`. If it raises, they
    are deleted and `paths` keep what they held.

    With several paths, the last one is the commit marker: it is deleted before the first rename and renamed last. If
    the renames are interrupted, the marker is missing, so a reader that asks for it never mixes old and new files.

    Args:
        paths: the files to write. They are all in one folder.
        shared: whether several processes may write the same files at the same time; each then gets temporary files
            of its own.

    Raises:
        UserError: the operating system refuses a write, for example because the disk is full.
    """
    targets = [Path(path) for path in paths]
    process = f"{os.getpid()}." if shared else ""
    temporary = [path.with_name(f".{path.name}.{process}tmp") for path in targets]
    folder = targets[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            files: list[BinaryIO] = [stack.enter_context(open(path, "wb")) for path in temporary]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        if len(targets) > 1:
            targets[-1].unlink(missing_ok=True)
        for source, target in zip(temporary, targets, strict=True):
            os.replace(source, target)
        _sync_folder(folder)
    except OSError as error:
        raise UserError(f"can't write {targets[-1]}: {error.strerror or error}") from None
    finally:
        for path in temporary:
            with suppress(OSError):
                path.unlink()


def _sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut. Only POSIX systems can open a folder to sync it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def lock_folder(folder: Path) -> None:
    """Make `folder` if it does not exist, and lock it for this process.

    The operating system releases the lock when the process ends, also after a crash. The empty file .lock remains.
    On Windows, and on file systems without locks, nothing is locked.

    Raises:
        UserError: the folder can't be written to, or another running process has locked it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Never closed, because closing the file would release the lock.
        descriptor = os.open(folder / ".lock", os.O_WRONLY | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{folder}: can't be written to: {error.strerror}") from None
    try:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder}: another process is writing there; choose another folder") from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
