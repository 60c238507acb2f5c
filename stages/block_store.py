"""Where parked KV blocks are: a file on this node's disk, or pinned host memory beside its device.

A block here is a record of bytes, as long as all others; what is in it is unknown.
"""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from stages.scratch_file import ScratchFile


class BlockStore(Protocol):
    """Records of equal length, by number; what was never written is not read."""

    def write(self, first: int, records: Tensor) -> None:
        """Take a copy of records [n, bytes], uint8 on the computing device, from number `first` on."""

    def read(self, first: int, records: Tensor) -> None:
        """Fill records with copies of those from number `first` on."""


class BlockFile:
    """Records in a file without a name, past the page cache."""

    def __init__(self, folder: Path, count: int, record_bytes: int) -> None:
        """Room for so many; StreamError if there is none on that folder's disk."""
        self._record_bytes = record_bytes
        self._file = ScratchFile(folder, count * record_bytes, "parked keys and values")

    def write(self, first: int, records: Tensor) -> None:
        """See BlockStore; StreamError if the disk does not take it."""
        self._file.write(first * self._record_bytes, records.flatten())

    def read(self, first: int, records: Tensor) -> None:
        """See BlockStore; StreamError unless every byte was read."""
        self._file.read(first * self._record_bytes, records.view(-1))


class PinnedBlocks:
    """Records in host memory, copied by the stream that is current in the thread that asks."""

    def __init__(self, count: int, record_bytes: int) -> None:
        self._records = torch.empty(count, record_bytes, dtype=torch.uint8, pin_memory=True)

    def write(self, first: int, records: Tensor) -> None:
        """See BlockStore."""
        self._records[first : first + len(records)].copy_(records, non_blocking=True)

    def read(self, first: int, records: Tensor) -> None:
        """See BlockStore."""
        records.copy_(self._records[first : first + len(records)], non_blocking=True)
