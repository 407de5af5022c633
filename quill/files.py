"""Files that are written whole or not at all, and folders that one process writes to."""

import os
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from quill.errors import UserError


@contextmanager
def replacing(*paths, shared=False):
    """Binary files to write that get the names `paths` when all are complete and on the disk, or else are removed.

    The last one vouches for the others, if there are any: it goes before they change, and comes after them. `shared`:
    other processes may be writing the same files.
    """
    paths = [Path(path) for path in paths]
    temporary = [path.with_name(f".{path.name}.{f'{os.getpid()}.' if shared else ''}tmp") for path in paths]
    folder = paths[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            files = [stack.enter_context(open(path, "wb")) for path in temporary]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        if len(paths) > 1:
            paths[-1].unlink(missing_ok=True)
        for source, target in zip(temporary, paths, strict=True):
            os.replace(source, target)
        if os.name == "posix":  # makes the names last through a power cut; elsewhere a folder can't be opened
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"can't write {paths[-1]}: {error.strerror or error}") from None
    finally:
        for path in temporary:
            with suppress(OSError):
                path.unlink()


def lock_folder(folder):
    """Make `folder`, see that it can be written to, and refuse it if another living process has locked it.

    The lock ends with the process, however that ends; the empty file .lock stays.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_WRONLY | os.O_CREAT, 0o666)  # stays open, and with it the lock
    except OSError as error:
        raise UserError(f"{folder}: can't be written to: {error.strerror}") from None
    try:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder}: another process is writing there; choose another folder") from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
