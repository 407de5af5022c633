"""Atomic writes, and a lock that gives a folder to one process.

Nothing here writes through a symbolic link: a temporary file is always a new file, and a rename replaces the link.
"""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from quill.errors import UserError


@contextmanager
def replacing(*paths: str | Path, durable: bool = True) -> Iterator[list[BinaryIO]]:
    """Write new versions of `paths`, and put them in place together when the `with` block ends.

    The block gets a new temporary file for each path, in the folder of the first one, which is made if it does not
    exist. If the block raises, they are deleted and `paths` stay unchanged. A process that is killed does not delete
    them: see `folder_lock`. With several paths, the last one is the commit marker: it is deleted before the first
    rename and renamed last, so that a reader that asks for it never mixes old and new files.

    durable: sync the files to the disk. Without it they are written faster, and a power cut may damage them. Raise a
    UserError if the operating system refuses a write, for example because the disk is full.
    """
    targets = [Path(path) for path in paths]
    token = secrets.token_hex(4)  # several processes may write the same files at the same time
    temporary = [path.with_name(f".{path.name}.{token}.tmp") for path in targets]
    folder = targets[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            files: list[BinaryIO] = [stack.enter_context(open(path, "xb")) for path in temporary]
            yield files
            for file in files:
                file.flush()
                if durable:
                    os.fsync(file.fileno())
        if len(targets) > 1:
            targets[-1].unlink(missing_ok=True)
        for source, target in zip(temporary, targets, strict=True):
            os.replace(source, target)
        if os.name == "posix" and durable:  # make the renames survive a power cut; other systems can't open a folder
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"can't write {targets[-1]}: {error.strerror or error}") from None
    finally:
        for path in temporary:
            with suppress(OSError):
                path.unlink()


def open_without_links(path: Path, flags: int) -> int:
    """os.open, but an OSError if `path` is a symbolic link, or a pipe to write to. → file descriptor"""
    if not hasattr(os, "O_NOFOLLOW") and path.is_symlink():  # Windows
        raise OSError(0, "is a symbolic link", str(path))
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


def read_end(path: Path, limit: int = 2**21) -> bytes:
    """Return the last `limit` bytes of a regular file; b"" if it can't be read or is a symbolic link."""
    try:
        with open(open_without_links(path, os.O_RDONLY), "rb") as file:
            info = os.fstat(file.fileno())
            file.seek(max(0, info.st_size - limit))
            return file.read(limit) if stat.S_ISREG(info.st_mode) else b""
    except OSError:
        return b""


@contextmanager
def folder_lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Lock `folder` for this process while the `with` block runs. The folder is made if it does not exist.

    Temporary files that killed processes have left there are deleted, so whoever calls `replacing` holds this lock.
    The operating system releases the lock when the process ends, also after a crash, which leaves the empty file .lock.
    If this made the folder, and the block raises without having written anything, the folder is removed.
    On Windows, and on file systems without locks, nothing is locked.
    wait: wait for another process to release the lock, instead of raising. Raise a UserError if the folder can't be
    written to, or if another running process has locked it.
    """
    is_new = not folder.exists()
    descriptor = _open_and_lock(folder, wait)
    failed = True
    try:
        for path in folder.glob(".*.tmp"):
            with suppress(OSError):
                path.unlink()
        yield
        failed = False
    finally:
        with suppress(OSError):  # Windows removes no open file
            (folder / ".lock").unlink()
            if is_new and failed:
                folder.rmdir()  # fails if something was written
        os.close(descriptor)  # and with it the lock


def _open_and_lock(folder, wait):
    path = folder / ".lock"
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = open_without_links(path, os.O_WRONLY | os.O_CREAT)
        except OSError as error:
            reason = "is a symbolic link" if path.is_symlink() else error.strerror
            raise UserError(f"{path if path.is_symlink() else folder}: can't be written to: {reason}") from None
        try:
            import fcntl

            fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Another process may have removed the file between the two calls. Its lock would then be worth nothing.
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
            os.close(descriptor)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            raise UserError(f"{folder}: another process is writing there; choose another folder") from None
        except (ImportError, OSError):  # Windows, or a file system without locks
            return descriptor
