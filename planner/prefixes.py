"""Beginnings that several sequences share: which KV blocks hold them, and for how long.

A prompt's leading tokens are cut into units of SHARE_TOKENS. A unit is known by its *mark*, a digest
of everything up to its end, so equal marks mean equal keys and values. Numbers only; the head makes
the marks, and a stage never learns that two tables name one block.
"""

from array import array
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from planner.blocks import BlockPool

SHARE_TOKENS = 32
"""Positions in a unit. Attention on the CPU cuts queries into 32s (measured: a prompt whose first
32, 64 or 96 positions are left out gets the same bits in float32; at 8 and 16 it does not)."""


def marks(ids: Sequence[int]) -> tuple[int, ...]:
    """A digest of everything up to the end of each leading unit of a prompt.

    Two tokens at least are left to the row itself: a last position that is computed alone, as a
    decode is, may get other bits than one that is computed beside others.
    """
    digest = blake2b(digest_size=16)
    found: list[int] = []
    for end in range(SHARE_TOKENS, len(ids) - 1, SHARE_TOKENS):
        digest.update(array("q", ids[end - SHARE_TOKENS : end]).tobytes())
        found.append(int.from_bytes(digest.digest(), "big"))
    return tuple(found)


def completed(start: int, end: int, marks: Sequence[int]) -> range:
    """Which of a prompt's marked units are whole once positions [start, end) are computed."""
    return range(start // SHARE_TOKENS, min(end // SHARE_TOKENS, len(marks)))


@dataclass(slots=True)
class _Unit:
    blocks: tuple[int, ...]
    maker: int
    """The sequence that computes it."""
    frame: int
    """The frame in which it does; later frames may read it, and the rest of that one too."""
    holders: int = 1


class Prefixes:
    """Who holds which unit; mutable, owned by a ring. A unit that nobody holds stays until its
    blocks are wanted: the next row of its kind may come late."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._units: dict[int, _Unit] = {}
        self._idle: dict[int, None] = {}
        """Marks of units without holders, the longest unused first."""
        self.idle_blocks = 0

    def __contains__(self, mark: int) -> bool:
        return mark in self._units

    def known(self, marks: Sequence[int]) -> int:
        """How many of the leading units are here."""
        strangers = (i for i, mark in enumerate(marks) if mark not in self._units)
        return next(strangers, len(marks))

    def hold(self, marks: Sequence[int]) -> list[tuple[int, ...]]:
        """Hold units that are here; their blocks, unit by unit."""
        found: list[tuple[int, ...]] = []
        for mark in marks:
            unit = self._units[mark]
            if unit.holders == 0:
                del self._idle[mark]
                self.idle_blocks -= len(unit.blocks)
            unit.holders += 1
            found.append(unit.blocks)
        return found

    def add(self, mark: int, blocks: tuple[int, ...], maker: int, frame: int) -> bool:
        """Let others share a unit that its maker holds; False if the mark is known already."""
        if mark in self._units:
            return False
        self._units[mark] = _Unit(blocks, maker, frame)
        return True

    def release(self, marks: Iterable[int]) -> None:
        """Hold the units no longer, the deepest first to go when blocks are wanted."""
        for mark in reversed(list(marks)):
            unit = self._units[mark]
            unit.holders -= 1
            if unit.holders == 0:
                self._idle[mark] = None
                self.idle_blocks += len(unit.blocks)

    def forget(self, marks: Iterable[int]) -> None:
        """Give back the blocks of units that nobody holds and nobody may use again."""
        for mark in marks:
            unit = self._units.pop(mark)
            assert unit.holders == 0, "a unit is forgotten after all who hold it have left"
            del self._idle[mark]
            self.idle_blocks -= len(unit.blocks)
            self._pool.give_back(unit.blocks)

    def made_since(self, frame: int, makers: Container[int]) -> set[int]:
        """Marks of the units that these makers compute in this frame or later ones."""
        return {
            mark
            for mark, unit in self._units.items()
            if unit.frame >= frame and unit.maker in makers
        }

    def take(self, count: int) -> tuple[int, ...] | None:
        """`count` blocks of the pool, idle units making room; None if even those are too few."""
        if self._pool.free + self.idle_blocks < count:
            return None
        while self._pool.free < count:
            self.forget([next(iter(self._idle))])
        return self._pool.take(count)
