"""Which KV blocks lie on the computing device, in which of its frames; numbers only, no bytes.

A *frame* is room for one block. Slots go round in cyclic order, so what is needed next is known: the
slot after the one that is computed; and what is not needed for longest: the slot before it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from planner.blocks import BlockPool


@dataclass(frozen=True, slots=True)
class Moves:
    """What must be copied before some blocks can be computed with: first out, then in."""

    out: tuple[tuple[int, int], ...]
    """(block, frame): to be parked before the frame is another block's."""
    back: tuple[tuple[int, int], ...]
    """(block, frame): parked, and wanted in that frame."""


@dataclass(frozen=True, slots=True)
class _Holder:
    """A sequence: the slot that it travels in, and its blocks by position; only Residence adds."""

    slot: int
    blocks: list[int]


class Residence:
    """Mutable; owned by the thread that computes.

    A block whose sequences have ended may be granted again with what it holds: prompts share their
    beginnings. So it is parked like any other when its frame is wanted, until it is granted anew.
    """

    def __init__(self, frames: int) -> None:
        self.frames = frames
        self._free = BlockPool(frames)
        self._frame_of: dict[int, int] = {}
        self._holders: dict[int, _Holder] = {}
        self._holds: Counter[int] = Counter()
        """How many sequences hold each block."""
        self._idle: dict[int, None] = {}
        """Blocks with a frame that no sequence holds, the first left first."""
        self._changed: set[int] = set()
        """Blocks whose frames hold what is not parked yet."""
        self._parked: set[int] = set()
        """Blocks of which there is a copy outside the device, old or not."""

    def extend(self, slot: int, sequence: int, blocks: Sequence[int], computed: int) -> None:
        """A sequence of that slot is granted blocks; all but its first `computed` are empty."""
        holder = self._holders.setdefault(sequence, _Holder(slot, []))
        computed = max(0, computed - len(holder.blocks))
        holder.blocks.extend(blocks)
        self._holds.update(blocks)
        for block in blocks:
            self._idle.pop(block, None)
        empty = blocks[computed:]
        self._changed.difference_update(empty)
        self._parked.difference_update(empty)

    def drop(self, sequence: int) -> None:
        """A sequence has ended, if it was known."""
        holder = self._holders.pop(sequence, None)
        for block in holder.blocks if holder else ():
            self._holds[block] -= 1
            if not self._holds[block]:
                del self._holds[block]
                if block in self._frame_of:
                    self._idle[block] = None

    def changes(self, sequence: int, first: int, end: int) -> None:
        """The sequence's blocks [first, end), by place, are being written in their frames."""
        self._changed.update(self._holders[sequence].blocks[first:end])

    def frames_of(self, sequence: int) -> list[int]:
        """Where a sequence's blocks lie, by place; all of them must have been seated."""
        return [self._frame_of[block] for block in self._holders[sequence].blocks]

    def blocks_of(self, sequences: Iterable[int]) -> set[int]:
        """All blocks that some sequences hold."""
        return set(chain.from_iterable(self._holders[s].blocks for s in sequences))

    def after(self, slot: int) -> list[int]:
        """The sequences that are computed next after a slot's."""
        later = sorted({holder.slot for holder in self._holders.values()} - {slot})
        following = next((s for s in later if s > slot), later[0] if later else slot)
        return [n for n, holder in self._holders.items() if holder.slot == following != slot]

    def seat(self, sequences: Sequence[int], kept: set[int], slot: int) -> Moves | None:
        """Give every block of these sequences a frame, and leave those that are kept in theirs.

        Frames come from who needs them last, as seen from the slot that is computed. None, and
        nothing has changed, if there are too few.
        """
        kept = kept | self.blocks_of(sequences)
        missing = [
            [block for block in self._holders[sequence].blocks if block not in self._frame_of]
            for sequence in sequences
        ]
        wanted = len(set(chain.from_iterable(missing)))
        leaving = self._leaving(wanted - self._free.free, kept, slot)
        if leaving is None:
            return None
        out = tuple((b, self._frame_of[b]) for b in leaving if b in self._changed)
        self._parked.update(block for block, _ in out)
        self._changed.difference_update(leaving)
        self._free.give_back(tuple(self._frame_of.pop(block) for block in leaving))
        for block in leaving:
            self._idle.pop(block, None)
        return Moves(out, tuple(chain.from_iterable(map(self._seated, missing))))

    def _seated(self, blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Frames for a sequence's blocks, side by side if possible; those that hold something."""
        new = [block for block in blocks if block not in self._frame_of]
        frames = self._free.take(len(new))
        assert frames is not None, "who leaves made room"
        self._frame_of.update(zip(new, frames, strict=True))
        return ((b, frame) for b, frame in zip(new, frames, strict=True) if b in self._parked)

    def _leaving(self, count: int, kept: set[int], slot: int) -> list[int] | None:
        """So many blocks that need their frames last; None if there are too few beside the kept."""
        leaving: dict[int, None] = {}
        for block in self._last_needed(slot):
            if len(leaving) >= count:
                break
            if block in self._frame_of and block not in kept:
                leaving[block] = None
        return list(leaving) if len(leaving) >= count else None

    def _last_needed(self, slot: int) -> Iterator[int]:
        """Blocks in the order in which frames may be taken: what nobody holds, then by slots
        backwards from this one; what several hold comes last."""
        yield from list(self._idle)
        slots = sorted({holder.slot for holder in self._holders.values()}, reverse=True)
        backwards = [s for s in slots if s < slot] + [s for s in slots if s >= slot]
        shared = []
        for each in backwards:
            for holder in self._holders.values():
                for block in holder.blocks if holder.slot == each else ():
                    if self._holds[block] == 1:
                        yield block
                    else:
                        shared.append(block)
        yield from shared
