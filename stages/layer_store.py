"""Where streamed layers wait for their turn: a file on this node's disk, or pinned host memory.

A layer here is bytes, ready to be computed from; which weights they are is unknown. They are written
once, when the shard loads. A checkpoint's own files would not do: experts lie apart there, types
differ from the computed one, tensors begin at odd addresses, and a file that is replaced under a
running stage would change its answers.
"""

import time
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from stages.scratch_file import ScratchFile, page_aligned, pages


class LayerStore(Protocol):
    """Layers of whole pages each, by their place in the order in which they were kept."""

    def keep(self, layer: Tensor) -> None:
        """Take a copy of a layer, uint8, as the next one."""

    def fetch(self, place: int, target: Tensor, free: torch.Event | None) -> torch.Event | None:
        """Copy a layer into the beginning of `target`, uint8 on the computing device.

        On an accelerator the copy begins after `free`, and is there after the event that is returned.
        """


class LayerFile:
    """Layers in a file that has no name, past the page cache."""

    def __init__(self, folder: Path, room_bytes: int) -> None:
        """
        A file in the folder with room for so many bytes.

        Raises:
            StreamError: the folder lies in memory, has no such room, or cannot be written.
        """
        self._file = ScratchFile(folder, room_bytes, "streamed layers")
        self._ends = [0]

    def keep(self, layer: Tensor) -> None:
        """See LayerStore; StreamError if the disk does not take it."""
        self._file.write(self._ends[-1], layer)
        self._ends.append(self._ends[-1] + len(layer))

    def fetch(self, place: int, target: Tensor, free: torch.Event | None = None) -> None:
        """See LayerStore; StreamError unless every byte was read."""
        assert free is None, "nothing here waits for an accelerator"
        start, end = self._ends[place], self._ends[place + 1]
        self._file.read(start, target[: end - start])


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
