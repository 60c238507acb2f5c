"""Where streamed layers wait for their turn: a file on this node's disk, or pinned host memory.

A layer here is bytes, ready to be computed from; which weights they are is unknown. They are written
once, when the shard loads. A checkpoint's own files would not do: experts lie apart there, types
differ from the computed one, tensors begin at odd addresses, and a file that is replaced under a
running stage would change its answers.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Protocol

import psutil
import torch
from torch import Tensor

from stages.errors import StreamError

PAGE_BYTES = 4096
"""What a read past the page cache must begin and end at, in the file and in memory."""
IN_MEMORY = {"tmpfs", "ramfs"}
"""File systems that would keep in memory what is to leave it."""


class LayerStore(Protocol):
    """Layers of whole pages each, by their place in the order in which they were kept."""

    def keep(self, layer: Tensor) -> None:
        """Take a copy of a layer, uint8, as the next one."""

    def fetch(self, place: int, target: Tensor, free: torch.Event | None) -> torch.Event | None:
        """Copy a layer into the beginning of `target`, uint8 on the computing device.

        On an accelerator the copy begins after `free`, and is there after the event that is returned.
        """


class LayerFile:
    """Layers in a file that has no name, so that it goes with its process.

    Reads pass by the page cache, which would otherwise fill the memory that was to be saved: with
    O_DIRECT where the file system has it, else by dropping what was read.
    """

    def __init__(self, folder: Path, room_bytes: int) -> None:
        """
        A file in the folder with room for so many bytes.

        Raises:
            StreamError: the folder lies in memory, has no such room, or cannot be written.
        """
        self._folder = folder
        self._ends = [0]
        require_room(folder, room_bytes)
        try:
            self._file, self._is_direct = _nameless_file(folder)
        except OSError as error:
            raise self._failed("cannot make a file for streamed layers", error) from error

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def keep(self, layer: Tensor) -> None:
        """See LayerStore; StreamError if the disk does not take it."""
        source, start = memoryview(layer.numpy().data), self._ends[-1]
        assert not len(source) % PAGE_BYTES, "layers are whole pages"
        try:
            while source:
                source = source[os.pwrite(self._file, source, start) :]
                start = self._ends[-1] + len(layer) - len(source)
            self._forget(self._ends[-1], len(layer))
        except OSError as error:
            raise self._failed(
                f"cannot write streamed layer {len(self._ends) - 1}", error
            ) from error
        self._ends.append(start)

    def fetch(self, place: int, target: Tensor, free: torch.Event | None = None) -> None:
        """See LayerStore; StreamError unless every byte was read."""
        assert free is None, "nothing here waits for an accelerator"
        start, end = self._ends[place], self._ends[place + 1]
        rest = memoryview(target.numpy().data)[: end - start]
        try:
            while rest:
                count = os.preadv(self._file, [rest], end - len(rest))
                if not count:
                    raise StreamError(
                        f"{self._folder}: the file of streamed layers ends {len(rest)} bytes before "
                        f"layer {place} does; something cut it"
                    )
                rest = rest[count:]
            self._forget(start, end - start)
        except OSError as error:
            raise self._failed(f"cannot read streamed layer {place}", error) from error

    def _forget(self, start: int, count: int) -> None:
        """Have the page cache drop what it holds of a range, which must be on disk for that."""
        if not self._is_direct:
            os.fdatasync(self._file)
            os.posix_fadvise(self._file, start, count, os.POSIX_FADV_DONTNEED)

    def _failed(self, what: str, error: OSError) -> StreamError:
        return StreamError(f"{self._folder}: {what}: {error.strerror or error}")


class PinnedLayers:
    """Layers in host memory beside an accelerator, copied by a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._copies = torch.Stream(device)
        self._layers: list[Tensor] = []

    def keep(self, layer: Tensor) -> None:
        """See LayerStore."""
        self._layers.append(torch.empty(layer.shape, dtype=layer.dtype, pin_memory=True))
        self._layers[-1].copy_(layer)

    def fetch(self, place: int, target: Tensor, free: torch.Event | None) -> torch.Event:
        """See LayerStore."""
        layer = self._layers[place]
        if free is not None:
            self._copies.wait_event(free)
        with self._copies:
            target[: len(layer)].copy_(layer, non_blocking=True)
        return self._copies.record_event()


def scratch_folder() -> Path:
    """Where this node's layers stream from: the system's folder for temporary files."""
    return Path(tempfile.gettempdir())


def require_room(folder: Path, room_bytes: int) -> None:
    """StreamError unless so many bytes fit into a folder, and that folder is on a disk."""
    kind = _file_system(folder)
    if kind in IN_MEMORY:
        raise StreamError(
            f"{folder}: is in memory ({kind}), so layers streamed from there would save none; "
            "set TMPDIR to a folder on a disk"
        )
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < room_bytes:
        raise StreamError(
            f"{folder}: {room_bytes / 1e9:.3g} GB of layers are to stream from there, and "
            f"{free_bytes / 1e9:.3g} GB are free; free some, or set TMPDIR to a roomier folder"
        )


def bytes_per_s(folder: Path, layer_bytes: int, count: int) -> float:
    """Measured rate at which so many layers of that size stream from a file there, each once.

    Raises StreamError.
    """
    layer = page_aligned(pages(layer_bytes)).random_()  # a disk may be quicker with zeros
    file = LayerFile(folder, count * len(layer))
    for _ in range(count):
        file.keep(layer)
    target = page_aligned(len(layer))
    started = time.perf_counter()
    for place in range(count):
        file.fetch(place, target)
    return count * len(layer) / (time.perf_counter() - started)


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
    named, name = tempfile.mkstemp(prefix="wagonway-layers-", dir=folder)
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
