"""Keys and values of slots that are elsewhere in the ring: parked beside the device, fetched ahead.

A thread of its own copies, in the order in which it is asked; on an accelerator it only queues copies
on a stream of their own. While a step is computed, what the step before it wrote goes out and what
the next one needs comes back. What goes wrong there is raised where the bytes are waited for.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from planner.schedule import Span
from stages.block_store import BlockFile, BlockStore, PinnedBlocks
from stages.errors import KvRoomError
from stages.residence import Moves, Residence
from stages.scratch_file import page_aligned, pages, scratch_folder

STAGING_BYTES = 4 * 2**20
"""Copied at once: enough for a disk to be at its full speed."""
PART_BYTES = 64
"""A layer's keys or values begin at a multiple of this inside a block's bytes."""


@dataclass(slots=True)
class ParkCounts:
    """What has been parked so far; written by the computing thread."""

    bytes_out: int = 0
    bytes_back: int = 0
    waited_s: float = 0.0
    """Seconds that the computing thread stood still for keys and values."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Where in a parked block's bytes one pool's share lies."""

    frames: Tensor
    """The pool, [heads, frames, block_tokens, dim], on the device."""
    first: int
    end: int

    def of(self, staging: Tensor) -> Tensor:
        """The share of the blocks in some of staging's records, shaped as so many frames."""
        heads, _, tokens, dim = self.frames.shape
        share = staging[:, self.first : self.end].view(self.frames.dtype)
        return share.view(len(staging), heads, tokens, dim).transpose(0, 1)


class Parking:
    """Some layers' pools, which have frames for a part of the ring's blocks; one thread computes."""

    def __init__(
        self, pools: Sequence[Tensor], blocks: int, frames: int, block_tokens: int
    ) -> None:
        """
        Room beside the device for all blocks.

        Raises:
            StreamError: there is no such room.
        """
        self._block_tokens = block_tokens
        self._device = pools[0].device
        self._parts, end = [], 0
        for pool in pools:
            by_frame = pool[0].view(pool.shape[1], frames, block_tokens, pool.shape[3])
            first = -(-end // PART_BYTES) * PART_BYTES
            end = first + by_frame[:, 0].nbytes
            self._parts.append(_Part(by_frame, first, end))
        record = pages(end)
        at_once = max(1, STAGING_BYTES // record)
        self._store: BlockStore
        if self._device.type == "cpu":
            self._store = BlockFile(scratch_folder(), blocks, record)
            self._staging = page_aligned(at_once * record).view(at_once, record)
            self._copies = None
        else:
            self._store = PinnedBlocks(blocks, record)
            self._staging = torch.empty(at_once, record, dtype=torch.uint8, device=self._device)
            self._copies = torch.Stream(self._device)
        self.residence = Residence(frames)
        self._copier = ThreadPoolExecutor(1, "parked-kv")
        self._moving: Future[torch.Event | None] | None = None
        """The last that was asked of the copier; when it is done, all before it are."""
        self.counts = ParkCounts()

    @property
    def staging_bytes(self) -> int:
        """Bytes on the device through which blocks come and go."""
        return self._staging.nbytes

    def bring(self, spans: Sequence[Span], later: Sequence[int], slot: int) -> None:
        """Have all blocks of these spans' sequences on the device, and others on their way.

        `later` are sequences of the same slot; after them, the next slot's come. KvRoomError,
        which names the sequences, if the spans' own do not fit all at once; StreamError if bytes
        could not be moved.
        """
        own = [span.sequence for span in spans]
        moves = self.residence.seat(own, set(), slot)
        if moves is None:
            raise KvRoomError(
                f"no memory for the keys and values of {len(own)} sequences at once: they hold "
                f"{len(self.residence.blocks_of(own))} blocks, and the device has room for "
                f"{self.residence.frames}",
                tuple(own),
            )
        self._start(moves)
        for span in spans:
            end = -(-(span.start + span.tokens) // self._block_tokens)
            self.residence.changes(span.sequence, span.start // self._block_tokens, end)
        self._wait()
        self._start(self._ahead(own, [*later, *self.residence.after(slot)], slot))

    def _ahead(self, own: Sequence[int], next_ones: Sequence[int], slot: int) -> Moves:
        """What brings back as many of the next ones as there is room for."""
        kept, moves = self.residence.blocks_of([*own, *next_ones]), Moves((), ())
        for sequence in next_ones:
            more = self.residence.seat([sequence], kept, slot)
            if more is None:
                break
            moves = Moves(moves.out + more.out, moves.back + more.back)
        return moves

    def clear(self) -> None:
        """Forget every block: a new epoch begins."""
        self._wait()
        self.residence = Residence(self.residence.frames)

    def _start(self, moves: Moves) -> None:
        if not moves.out and not moves.back:
            return
        written = None
        if self._copies is not None:
            written = torch.accelerator.current_stream(self._device).record_event()
        self._moving = self._copier.submit(self._move, moves, written)
        record = self._staging.shape[1]
        self.counts.bytes_out += len(moves.out) * record
        self.counts.bytes_back += len(moves.back) * record

    def _wait(self) -> None:
        """Until every frame holds what its block is; on an accelerator, only its own queue waits."""
        if self._moving is None:
            return
        started = time.perf_counter()
        there, self._moving = self._moving.result(), None
        if there is not None:
            torch.accelerator.current_stream(self._device).wait_event(there)
        self.counts.waited_s += time.perf_counter() - started

    @torch.inference_mode()
    def _move(self, moves: Moves, written: torch.Event | None) -> torch.Event | None:
        """In the copying thread: park and bring back, by way of the staging bytes."""
        with self._copies or nullcontext():
            if self._copies is not None and written is not None:
                self._copies.wait_event(written)
            for some in self._batches(moves.out):
                staging, at = self._staging[: len(some)], self._frames(some)
                for part in self._parts:
                    part.of(staging).copy_(part.frames.index_select(1, at))
                for first, place, end in _runs(some):
                    self._store.write(first, staging[place:end])
            for some in self._batches(moves.back):
                staging, at = self._staging[: len(some)], self._frames(some)
                for first, place, end in _runs(some):
                    self._store.read(first, staging[place:end])
                for part in self._parts:
                    part.frames.index_copy_(1, at, part.of(staging))
            return None if self._copies is None else self._copies.record_event()

    def _batches(self, pairs: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """The pairs by block, no more at a time than staging holds."""
        ordered, at_once = sorted(pairs), len(self._staging)
        for start in range(0, len(ordered), at_once):
            yield ordered[start : start + at_once]

    def _frames(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """The pairs' frames, on the device."""
        frames = torch.tensor([frame for _, frame in pairs])
        if self._copies is None:
            return frames
        return frames.pin_memory().to(self._device, non_blocking=True)


def _runs(pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(first block, its place, the place after the last) of consecutive blocks."""
    for _, run in groupby(enumerate(pairs), lambda each: each[1][0] - each[0]):
        some = [(block, place) for place, (block, _) in run]
        yield *some[0], some[-1][1] + 1
