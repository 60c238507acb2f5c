"""A file on this node's disk for bytes that memory is not to hold; it goes with its process.

Reads pass by the page cache, which would otherwise fill the memory that was to be saved: with
O_DIRECT where the file system has it, else by dropping what was read.
"""

import os
import shutil
import tempfile
from pathlib import Path

import psutil
import torch
from torch import Tensor

from stages.errors import StreamError

PAGE_BYTES = 4096
"""What a read past the page cache must begin and end at, in the file and in memory."""
IN_MEMORY = {"tmpfs", "ramfs"}
"""File systems that would keep in memory what is to leave it."""


class ScratchFile:
    """Bytes by their place, whole pages at a time; one thread at a time uses it."""

    def __init__(self, folder: Path, room_bytes: int, what: str) -> None:
        """
        A file in the folder with room for so many bytes of `what`.

        Raises:
            StreamError: the folder lies in memory, has no such room, or cannot be written.
        """
        self._folder, self._what = folder, what
        require_room(folder, room_bytes, what)
        try:
            self._file, self._is_direct = _nameless_file(folder)
        except OSError as error:
            raise self._failed("cannot make a file for", error) from error

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def write(self, start: int, source: Tensor) -> None:
        """Write uint8s of the host from a place on; StreamError if the disk does not take them."""
        rest, place = memoryview(source.numpy().data), start
        assert not len(rest) % PAGE_BYTES, "what is written is whole pages"
        try:
            while rest:
                written = os.pwrite(self._file, rest, place)
                rest, place = rest[written:], place + written
            self._forget(start, len(source))
        except OSError as error:
            raise self._failed("cannot write", error) from error

    def read(self, start: int, target: Tensor) -> None:
        """Fill uint8s of the host from a place on; StreamError unless every byte was read."""
        rest, place = memoryview(target.numpy().data), start
        try:
            while rest:
                count = os.preadv(self._file, [rest], place)
                if not count:
                    raise StreamError(
                        f"{self._folder}: the file of {self._what} ends {len(rest)} bytes too soon; "
                        "something cut it"
                    )
                rest, place = rest[count:], place + count
            self._forget(start, len(target))
        except OSError as error:
            raise self._failed("cannot read", error) from error

    def _forget(self, start: int, count: int) -> None:
        """Have the page cache drop what it holds of a range, which must be on disk for that."""
        if not self._is_direct:
            os.fdatasync(self._file)
            os.posix_fadvise(self._file, start, count, os.POSIX_FADV_DONTNEED)

    def _failed(self, doing: str, error: OSError) -> StreamError:
        return StreamError(f"{self._folder}: {doing} {self._what}: {error.strerror or error}")


def scratch_folder() -> Path:
    """Where this node keeps such files: the system's folder for temporary ones."""
    return Path(tempfile.gettempdir())


def require_room(folder: Path, room_bytes: int, what: str) -> None:
    """StreamError unless so many bytes fit into a folder, and that folder is on a disk."""
    kind = _file_system(folder)
    if kind in IN_MEMORY:
        raise StreamError(
            f"{folder}: is in memory ({kind}), so {what} kept there would save none; "
            "set TMPDIR to a folder on a disk"
        )
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < room_bytes:
        raise StreamError(
            f"{folder}: {room_bytes / 1e9:.3g} GB of {what} are to be kept there, and "
            f"{free_bytes / 1e9:.3g} GB are free; free some, or set TMPDIR to a roomier folder"
        )


def pages(count: int) -> int:
    """So many bytes, rounded up to whole pages."""
    return -(-count // PAGE_BYTES) * PAGE_BYTES


def page_aligned(count: int) -> Tensor:
    """Uninitialised bytes on the CPU, uint8, that begin at a page's address."""
    roomy = torch.empty(count + PAGE_BYTES, dtype=torch.uint8)
    first = -roomy.data_ptr() % PAGE_BYTES
    return roomy[first : first + count]


def _nameless_file(folder: Path) -> tuple[int, bool]:
    """A new open file without a name, and whether it passes by the page cache."""
    named, name = tempfile.mkstemp(prefix="wagonway-", dir=folder)
    try:
        return os.open(name, os.O_RDWR | os.O_DIRECT), True
    except OSError:  # the file system has no O_DIRECT
        return os.dup(named), False
    finally:
        os.close(named)
        Path(name).unlink()


def _file_system(folder: Path) -> str:
    """The kind of the file system that a folder is on; the deepest mount above it counts."""
    path = folder.resolve()
    above = [
        part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)
    ]
    return max(above, key=lambda part: len(part.mountpoint)).fstype if above else ""
