"""One writer per run: an advisory lock on a file in the run's folder, and on folders that are there for a moment.

`flock` belongs to the open file, so the kernel releases it when the process ends, however it ends. The file says who
holds it; without the lock what it says means nothing. Descriptors are closed on exec, and by hand in a forked child, so
that no child keeps a lock alive after its parent.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rlft.types import InputError

FILE = ".lock"
UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF}  # NFS: not open for writing
_held: set[int] = set()


@contextlib.contextmanager
def sole_writer(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Make the folder where it is missing, and hold its lock. Raises InputError where another process holds it.

    On a file system that knows no locks the run goes on without one, and says so.
    """
    path = folder / FILE
    descriptor = _open(path)
    while (got := locked(descriptor)) and not _still_there(descriptor, path):  # removed by the one before as it ended
        _close(descriptor)
        descriptor = _open(path)
    if got is False:
        _close(descriptor)
        raise InputError(_refusal(folder))
    if got is None:
        say(f"the file system of {folder} keeps no locks; see to it that no other rlft writes there")
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_myself()).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        _close(descriptor)


def refuse_in_use(folder: Path) -> None:
    """Raise InputError where a process holds the folder's lock now; leaves no trace."""
    if not (folder / FILE).is_file():
        return
    descriptor = os.open(folder / FILE, os.O_RDONLY)
    try:
        if locked(descriptor) is False:
            raise InputError(_refusal(folder))
    finally:
        os.close(descriptor)


def locked(descriptor: int) -> bool | None:
    """Take the lock of an open file or folder if nobody has it; None where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in UNSUPPORTED:
            return None
        raise
    return True


class Scratch:
    """A folder for a moment, locked as long as its process lives.

    What a killed process left of the same kind is removed first: its lock is free. Another process's id would not tell,
    since containers share a folder but not their processes. Removed by `close`, or as a context manager.
    """

    def __init__(self, kind: str, where: Path | None = None) -> None:
        where = where or Path(tempfile.gettempdir())
        for left in where.glob(f"{kind}-*"):
            _remove_orphan(left)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=where))
            with contextlib.suppress(FileNotFoundError):
                self._descriptor = os.open(self.path, os.O_RDONLY)
                _held.add(self._descriptor)
                if locked(self._descriptor) is not False and _still_there(self._descriptor, self.path):
                    return
                _close(self._descriptor)  # another process took it for an orphan in between

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        _close(self._descriptor)


def _remove_orphan(folder: Path) -> None:
    with contextlib.suppress(OSError):  # somebody else's, or gone already
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if locked(descriptor):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def _open(path: Path) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the folder was removed in between
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            _held.add(descriptor)
            return descriptor


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _still_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _myself() -> dict[str, str | int]:
    return {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _refusal(folder: Path) -> str:
    try:
        found = json.loads((folder / FILE).read_text())
        who = f"process {found['process']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just begun, or just ended
        who = "another process"
    return (
        f"out: {folder} is being written by {who}. Wait for it, or stop it with Ctrl-C or `kill` and then "
        f"`rlft resume {folder}`; a new run needs another folder: out=..."
    )


def _forked() -> None:
    """A child closes its copies; the parent's lock stays."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forked)
