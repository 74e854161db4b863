"""Temporary folders with an owner, which removes them; folders of a killed owner are removed by later processes.

    <temporary folder>/fedbonsai-<user>/<run>/<kind>-<random>/.owner

The owner of a folder is the process that holds the lock (``flock``) of the file ``.owner`` in it. The system releases a lock
when its process ends for any reason, so a folder whose lock can be taken is an orphan. Only folders that hold such a
file, written here and by the same user, are ever removed by another process.
"""

import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not a POSIX system: there is no such lock, and no folder counts as an orphan
    fcntl = None  # type: ignore[assignment]

_OWNER, _MAGIC = ".owner", b"fedbonsai scratch folder\n"
_MOST_TRIES = 10  # another process may remove an empty parent folder between two steps


@dataclass(frozen=True)
class Scratch:
    """The temporary folders of one run on this machine, made by any of its processes."""

    run: str = field(default_factory=lambda: f"run-{secrets.token_hex(8)}")

    def folder(self, kind: str) -> "ScratchFolder":
        """A new folder, owned by this process. Raises ``OSError``."""
        for left in reversed(range(_MOST_TRIES)):
            try:
                path = base() / self.run / f"{kind}-{secrets.token_hex(8)}"
                path.parent.mkdir(mode=0o700, exist_ok=True)
                path.mkdir(mode=0o700)
                break
            except FileNotFoundError:
                if not left:
                    raise
        return ScratchFolder(path)

    def close(self) -> None:
        """Remove all folders of the run, also those of killed processes. All other processes of the run must have ended."""
        with suppress(OSError):  # the folder of all runs belongs to another user, or cannot be read
            shutil.rmtree(base() / self.run, ignore_errors=True)
            base().rmdir()  # fails where another run has folders


class ScratchFolder:
    """A folder owned by this process. It is removed by ``close``, or when the process exits normally."""

    def __init__(self, path: Path) -> None:
        """``path``: an empty folder that no other process uses yet. Raises ``OSError``."""
        self.path = path
        self._remove = weakref.finalize(self, _remove, path, claim(path), os.getpid())

    def close(self) -> None:
        """Remove the folder and its contents."""
        self._remove()


def base() -> Path:
    """The folder of all runs of this user on this machine. Raises ``OSError`` where it belongs to another user."""
    path = Path(tempfile.gettempdir()) / f"fedbonsai-{_user()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != _user():
        raise PermissionError(f"{str(path)!r} belongs to another user")
    return path


def claim(path: Path) -> BinaryIO:
    """Make this process the owner of a folder while the returned file is open. Raises ``OSError``."""
    partial = path / f"{_OWNER}.{secrets.token_hex(4)}"
    file = partial.open("xb")
    file.write(_MAGIC)
    file.flush()
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    partial.rename(path / _OWNER)  # it is renamed when it is locked, so no process finds it without its lock
    return file


def reap_runs() -> None:
    """Remove the folders that killed processes of this user have left on this machine."""
    with suppress(OSError):
        for run in base().iterdir():
            reap(run.iterdir())
            with suppress(OSError):  # a folder of it is in use
                run.rmdir()
        base().rmdir()  # fails where a run has folders


def reap(paths: Iterable[Path]) -> None:
    """Remove those of ``paths`` that are folders whose owner has ended."""
    for path in paths:
        if (file := _orphan(path)) is not None:
            with file:
                shutil.rmtree(path, ignore_errors=True)


def _orphan(path: Path) -> BinaryIO | None:
    """The owner file of an orphaned folder, locked by this process; None for any other path."""
    if fcntl is None or path.is_symlink():
        return None
    try:
        file = os.fdopen(os.open(path / _OWNER, os.O_RDWR | os.O_NOFOLLOW), "r+b")
    except OSError:  # not a folder, without an owner file, or of another user
        return None
    try:
        if os.fstat(file.fileno()).st_uid == _user() and file.read(len(_MAGIC)) == _MAGIC:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
    except OSError:  # its owner is alive
        pass
    file.close()
    return None


def _remove(path: Path, file: BinaryIO, pid: int) -> None:
    """Remove a folder; not in a process that was forked from its owner."""
    if os.getpid() == pid:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # another folder of the run, or another run, exists
            path.parent.rmdir()
            path.parent.parent.rmdir()
    file.close()


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0
