"""What layers hold that see only the last so many positions: their own, smaller pool of KV blocks.

Blocks wholly before the window of what is computed next are given to others. Numbers only; a stage
keeps to the same rule, `Window.kept_from`, and never learns that two tables name one block.
"""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from planner.blocks import BlockPool
from planner.prefixes import SHARE_TOKENS, Prefixes, completed

AHEAD_TOKENS = 128
"""A row that goes on gets blocks for about so many positions at once: so most lie side by side."""


@dataclass(frozen=True, slots=True)
class Window:
    """The kind of layers that see a window, on every stage of a pipeline."""

    tokens: int
    """Positions that a query sees, its own the last of them; the widest layer's."""
    blocks: int
    """KV blocks that every stage holds for these layers, numbered on from the others'."""

    def kept_from(self, start: int) -> int:
        """The first position that is kept while positions from `start` on are computed.

        A multiple of SHARE_TOKENS: what is given away or shared are whole units.
        """
        return max(0, start - self.tokens + 1) // SHARE_TOKENS * SHARE_TOKENS

    def most_tokens(self, at_once: int) -> int:
        """Positions that a sequence keeps at most, if it computes no more than so many at once."""
        return self.tokens + SHARE_TOKENS + at_once - 2


@dataclass(slots=True)
class _Kept:
    """What a sequence holds: consecutive blocks of it, the first ones gone."""

    marks: tuple[int, ...]
    """Of the leading units of its prompt that may be shared; see planner.prefixes."""
    prompt: int
    room: int
    """Blocks that it may come to fill in all, those that are gone included."""
    reserved: int
    """Blocks that it may come to hold at one time."""
    first: int
    """Blocks that are gone."""
    blocks: tuple[int, ...]
    shared: set[int]
    """Which of its units are shared, by place; the blocks of all others are its own."""

    @property
    def end(self) -> int:
        """Blocks that it has had in all."""
        return self.first + len(self.blocks)


@dataclass(slots=True)
class Windows:
    """The windowed blocks of the sequences in flight; mutable, owned by a ring's Holdings.

    No more is reserved than there is. So a sequence that entered always finds its blocks: what
    sequences hold is reserved, and what nobody holds makes room.
    """

    window: Window
    block_tokens: int
    step_tokens: int
    first_block: int
    """The number of the pool's first block."""
    _pool: BlockPool = field(init=False)
    _units: Prefixes = field(init=False)
    _of: dict[int, _Kept] = field(init=False, default_factory=dict)
    _unreserved: int = field(init=False)

    def __post_init__(self) -> None:
        self._pool = BlockPool(self.window.blocks, self.first_block)
        self._units = Prefixes(self._pool)
        self._unreserved = self.window.blocks

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return self._pool.free + self._units.idle_blocks

    @property
    def unreserved_blocks(self) -> int:
        """Blocks that sequences yet to come may reserve."""
        return self._unreserved

    def wanted(self, tokens: int, prompt: int) -> int:
        """Blocks that a sequence of so many tokens, `prompt` of them known, holds at one time."""
        at_once = max(AHEAD_TOKENS, min(self.step_tokens, prompt))
        return self._blocks_for(min(tokens, self.window.most_tokens(at_once)))

    def usable(self, marks: Sequence[int]) -> int:
        """How many of these leading units one may build on: the window before their end is here."""
        best = run = 0
        for unit, mark in enumerate(marks, start=1):
            run = run + 1 if mark in self._units else 0
            if run >= unit - self.window.kept_from(unit * SHARE_TOKENS) // SHARE_TOKENS:
                best = unit
        return best

    def enter(
        self, number: int, tokens: int, prompt: int, marks: tuple[int, ...], units: int
    ) -> bool:
        """Reserve for a sequence that has its first units from others; False if too few are free."""
        start = units * SHARE_TOKENS
        reserved, first = self.wanted(tokens, prompt - start), self.window.kept_from(start)
        if reserved > self._unreserved:
            return False
        self._unreserved -= reserved
        seen = range(first // SHARE_TOKENS, units)
        blocks = tuple(chain.from_iterable(self._units.hold([marks[unit] for unit in seen])))
        self._of[number] = _Kept(
            marks, prompt, self._blocks_for(tokens), reserved,
            first // self.block_tokens, blocks, set(seen),
        )  # fmt: skip
        return True

    def blocks(self, number: int) -> tuple[int, ...]:
        """The blocks that a sequence holds, in the order of its positions."""
        return self._of[number].blocks

    def extend(self, number: int, tokens: int) -> bool:
        """Reserve for a sequence that grows to so many tokens; False if too few are free."""
        kept = self._of[number]
        reserved = max(kept.reserved, self.wanted(tokens, 0))
        if reserved - kept.reserved > self._unreserved:
            return False
        kept.room = max(kept.room, self._blocks_for(tokens))
        self._reserve(kept, reserved)
        return True

    def computes(self, number: int, start: int, end: int, frame: int) -> tuple[int, ...]:
        """A frame is to compute positions [start, end): what it sees no more goes, blocks that it
        needs are added and returned, and units that it completes may be shared."""
        kept, each = self._of[number], SHARE_TOKENS // self.block_tokens
        self._let_go(kept, self.window.kept_from(start) // SHARE_TOKENS)
        still = self.wanted(kept.room * self.block_tokens, kept.prompt - start)
        self._reserve(kept, min(kept.reserved, max(still, len(kept.blocks))))
        added = self._add(kept, self._blocks_for(end))
        for unit in completed(start, end, kept.marks):
            place = unit * each - kept.first
            blocks = kept.blocks[place : place + each]
            if self._units.add(kept.marks[unit], blocks, number, frame):
                kept.shared.add(unit)
        return added

    def leave(self, number: int) -> None:
        """Take back what a sequence holds; what it shares stays for others while there is room."""
        kept = self._of.pop(number)
        self._let_go(kept, -(-kept.end * self.block_tokens // SHARE_TOKENS))
        self._unreserved += kept.reserved

    def made_since(self, frame: int, makers: Container[int]) -> set[int]:
        """Marks of the units that these makers compute in this frame or later ones."""
        return self._units.made_since(frame, makers)

    def forget(self, marks: Iterable[int]) -> None:
        """Drop units that nobody holds and nobody may use again."""
        self._units.forget(marks)

    def _let_go(self, kept: _Kept, end_unit: int) -> None:
        """Release the sequence's units before this one."""
        each = SHARE_TOKENS // self.block_tokens
        gone = range(kept.first // each, end_unit)
        own: list[int] = []
        for unit in gone:
            if unit not in kept.shared:
                own += kept.blocks[unit * each - kept.first : (unit + 1) * each - kept.first]
        self._pool.give_back(tuple(own))
        self._units.release(kept.marks[unit] for unit in gone if unit in kept.shared)
        kept.shared.difference_update(gone)
        kept.blocks = kept.blocks[len(gone) * each :]
        kept.first += len(gone) * each

    def _add(self, kept: _Kept, end: int) -> tuple[int, ...]:
        """Blocks behind the sequence's own, up to `end` of them at least if any are missing."""
        if end <= kept.end:
            return ()
        added = self._units.take(min(kept.reserved - len(kept.blocks), kept.room - kept.end))
        assert added is not None, "no more is reserved than there is"
        kept.blocks += added
        assert kept.end >= end, "what a sequence needs at one time was reserved"
        return added

    def _reserve(self, kept: _Kept, blocks: int) -> None:
        self._unreserved += kept.reserved - blocks
        kept.reserved = blocks

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)
