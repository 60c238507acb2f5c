"""Folders for the while of one piece of work, in the system's folder for such.

A process that is killed leaves its own behind, with a run's keys or gigabytes of an index in it. So
each is locked while its process lives, and whoever makes a new one removes those that nobody holds.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "wagonway-"
YOUNG_S = 60.0
"""A folder of this age may be about to be locked by the process that made it."""


class Scratch:
    """One such folder, mode 0700; a context, or ended by `cleanup`."""

    def __init__(self, purpose: str) -> None:
        sweep()
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{purpose}-"))
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_error: object) -> None:
        self.cleanup()

    def cleanup(self) -> None:
        """Remove the folder and all in it."""
        shutil.rmtree(self.path)
        os.close(self._lock)


def sweep() -> None:
    """Remove this user's scratch folders whose processes are gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with _abandoned(folder) as abandoned:
            if abandoned:
                shutil.rmtree(folder)


@contextmanager
def _abandoned(folder: Path) -> Iterator[bool]:
    """Whether nobody holds the folder; nobody else can while the context lasts."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # gone meanwhile, a file, or another user's
        yield False
        return
    try:
        facts = os.fstat(lock)
        old = facts.st_uid == os.getuid() and time.time() - facts.st_mtime > YOUNG_S
        yield old and _is_free(lock)
    finally:
        os.close(lock)


def _is_free(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
