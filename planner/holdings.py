"""The KV blocks of the sequences in flight: which each holds, and which of those it shares."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from planner.blocks import BlockPool
from planner.prefixes import SHARE_TOKENS, Prefixes, completed
from planner.windows import Windows


@dataclass(slots=True)
class _Holding:
    marks: tuple[int, ...]
    """Of the leading units of its prompt that may be shared; see planner.prefixes."""
    blocks: tuple[int, ...]
    shared: set[int]
    """Which of its units are shared, by place; the blocks of all others are its own."""

    @property
    def shared_marks(self) -> list[int]:
        return [self.marks[unit] for unit in sorted(self.shared)]


@dataclass(slots=True)
class Holdings:
    """Mutable; owned by a ring. Layers that see a window have blocks of their own, in `windows`."""

    total_blocks: int
    block_tokens: int
    windows: Windows | None = None
    _pool: BlockPool = field(init=False)
    _prefixes: Prefixes = field(init=False)
    _of: dict[int, _Holding] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._pool = BlockPool(self.total_blocks)
        self._prefixes = Prefixes(self._pool)

    @property
    def free_blocks(self) -> int:
        """Blocks that a sequence could have now."""
        return self._pool.free + self._prefixes.idle_blocks

    def blocks_for(self, tokens: int) -> int:
        """Blocks that a sequence of so many tokens fills."""
        return -(-tokens // self.block_tokens)

    def room_for(self, tokens: int, ends: int, prompt: int) -> int:
        """How many sequences that are given room for so many tokens, and come to `ends`, could enter."""
        rows = self.free_blocks // self.blocks_for(tokens)
        if self.windows is None:
            return rows
        return min(rows, self.windows.unreserved_blocks // self.windows.wanted(ends, prompt))

    def own_blocks(self, number: int) -> int:
        """A sequence's blocks that it shares with no other."""
        each = SHARE_TOKENS // self.block_tokens
        return len(self._of[number].blocks) - each * len(self._of[number].shared)

    def shared_tokens(self, number: int) -> int:
        """Tokens of a sequence that lie in blocks which others may use too."""
        return SHARE_TOKENS * len(self._of[number].shared)

    def cached(self, marks: tuple[int, ...]) -> int:
        """The leading tokens of a sequence with these marks that others have computed."""
        units = self._prefixes.known(marks)
        if self.windows is not None:
            units = self.windows.usable(marks[:units])
        return units * SHARE_TOKENS

    def enter(
        self, number: int, tokens: int, ends: int, prompt: int, marks: tuple[int, ...]
    ) -> bool:
        """Give a sequence room for so many tokens, `prompt` of them known, and what is cached of it.

        Windowed blocks are reserved for all that it may come to, its `ends`. False, and nothing is
        given, if too few blocks are free.
        """
        units = self.cached(marks) // SHARE_TOKENS
        if self.windows is not None and not self.windows.enter(
            number, max(tokens, ends), prompt, marks, units
        ):
            return False
        blocks = tuple(chain.from_iterable(self._prefixes.hold(marks[:units])))
        own = self._prefixes.take(max(0, self.blocks_for(tokens) - len(blocks)))
        if own is None:
            self._prefixes.release(marks[:units])
            if self.windows is not None:
                self.windows.leave(number)
            return False
        self._of[number] = _Holding(marks, blocks + own, set(range(units)))
        return True

    def blocks(self, number: int) -> tuple[int, ...]:
        """A sequence's blocks, in the order of its positions; behind them its windowed ones."""
        windowed = () if self.windows is None else self.windows.blocks(number)
        return self._of[number].blocks + windowed

    def covers(self, number: int, tokens: int) -> bool:
        """Whether so many tokens of a sequence have room."""
        return len(self._of[number].blocks) * self.block_tokens >= tokens

    def extend(self, number: int, tokens: int, better: int) -> tuple[int, ...] | None:
        """Blocks added so that so many tokens have room, or even `better` if it must be some; None if
        too few are free."""
        if self.covers(number, tokens):
            return ()
        holding = self._of[number]
        for wanted in (better, tokens):
            missing = self.blocks_for(wanted) - len(holding.blocks)
            if missing <= self.free_blocks and (
                self.windows is None or self.windows.extend(number, wanted)
            ):
                added = self._prefixes.take(missing)
                assert added is not None, "so many are free"
                holding.blocks += added
                return added
        return None

    def computes(self, number: int, start: int, end: int, frame: int) -> tuple[int, ...]:
        """A frame is to compute positions [start, end): units of the prompt that this completes
        may be shared from that frame on. Returns the windowed blocks that are added for it."""
        holding, each = self._of[number], SHARE_TOKENS // self.block_tokens
        for unit in completed(start, end, holding.marks):
            blocks = holding.blocks[unit * each : (unit + 1) * each]
            if self._prefixes.add(holding.marks[unit], blocks, number, frame):
                holding.shared.add(unit)
        return () if self.windows is None else self.windows.computes(number, start, end, frame)

    def leave(self, number: int) -> None:
        """Take back what a sequence holds; what it shares stays for others."""
        holding, each = self._of.pop(number), SHARE_TOKENS // self.block_tokens
        own = [b for i, b in enumerate(holding.blocks) if i // each not in holding.shared]
        self._prefixes.release(holding.shared_marks)
        self._pool.give_back(tuple(own))
        if self.windows is not None:
            self.windows.leave(number)

    def lose(self, frame: int, numbers: Sequence[int]) -> set[int]:
        """Take back everything of these sequences and of all that share what they were to compute
        in this frame or later ones, for it was not computed. Returns them all."""
        left = set(numbers)
        lost = self._made_since(frame, left)
        left |= {n for n, each in self._of.items() if not lost.isdisjoint(each.shared_marks)}
        # What those were to compute rests on what was lost; whoever holds that, holds this too.
        made = self._prefixes.made_since(frame, left)
        seen = set() if self.windows is None else self.windows.made_since(frame, left)
        for number in left:
            self.leave(number)
        self._prefixes.forget(made)
        if self.windows is not None:
            self.windows.forget(seen)
        return left

    def _made_since(self, frame: int, makers: set[int]) -> set[int]:
        """Marks of the units, of either kind of layers, that these make in this frame or later."""
        made = self._prefixes.made_since(frame, makers)
        return made if self.windows is None else made | self.windows.made_since(frame, makers)
