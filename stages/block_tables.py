"""Where the positions of sequences lie in one kind of pools: a table of blocks for each sequence.

The head decides which blocks a sequence has; pools and their numbers are unknown here. Tables are
the host's: what a step needs of them is sent to the device that computes all at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from planner.schedule import Span
from stages.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class Rows:
    """Where consecutive positions of a sequence lie in a pool: runs of (first place, tokens)."""

    runs: tuple[tuple[int, int], ...]

    def of(self, pool: Tensor) -> Tensor:
        """Those positions of a pool [1, heads, places, dim]: a view of one run, a copy of several.

        A shared beginning and what follows it are two. Copying runs takes a third of the time that
        gathering places one by one does (measured).
        """
        parts = [pool.narrow(2, first, tokens) for first, tokens in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


@dataclass(slots=True)
class _Table:
    """A sequence's blocks, by position; only its tables change it."""

    first: int
    """The position that the first block begins with: those before it are gone."""
    blocks: list[int]
    runs: tuple[tuple[int, int], ...]
    """The same as runs of (first place, tokens)."""

    def slice(self, first: int, end: int) -> tuple[tuple[int, int], ...]:
        """The runs of positions [first, end)."""
        found, start = [], self.first
        for place, tokens in self.runs:
            low, high = max(first, start), min(end, start + tokens)
            if low < high:
                found.append((place + low - start, high - low))
            start += tokens
        return tuple(found)


class BlockTables:
    """Mutable; owned by a KV cache."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._tables: dict[int, _Table] = {}

    @property
    def sequences(self) -> tuple[int, ...]:
        """Sequences that hold blocks."""
        return tuple(self._tables)

    def extend(self, sequence: int, blocks: Sequence[int], first: int = 0) -> None:
        """Add blocks to the end of a sequence's table; a new one begins at position `first`."""
        table = self._tables.setdefault(sequence, _Table(first, [], ()))
        table.blocks += blocks
        table.runs = _joined(table.runs, blocks, self._block_tokens)

    def move(self, sequence: int, blocks: Sequence[int]) -> None:
        """What a sequence has lies in these blocks from now on, as many as it had."""
        table = self._tables[sequence]
        assert len(blocks) == len(table.blocks), "a sequence moves whole"
        table.blocks = list(blocks)
        table.runs = _joined((), blocks, self._block_tokens)

    def drop_before(self, sequence: int, position: int) -> None:
        """Forget where positions before this one lie, whole blocks: others may have them by now."""
        table = self._tables.get(sequence)
        if table is not None and table.first < position:
            table.runs = table.slice(position, self._end(table))
            del table.blocks[: (position - table.first) // self._block_tokens]
            table.first = position

    def drop(self, sequence: int) -> None:
        """Forget a sequence, if it is known."""
        self._tables.pop(sequence, None)

    def clear(self) -> None:
        """Forget every sequence."""
        self._tables.clear()

    def require(self, span: Span, first: int, frame: int) -> None:
        """ProtocolError unless all from position `first` to the span's end have places."""
        table = self._tables.get(span.sequence)
        held = (0, 0) if table is None else (table.first, self._end(table))
        end = span.start + span.tokens
        if span.tokens < 1 or span.start < 0 or first < held[0] or end > held[1]:
            raise ProtocolError(
                f"frame {frame}: sequence {span.sequence} computes positions {span.start} to "
                f"{end}, sees those from {first}, and holds blocks for {held[0]} to {held[1]}"
            )

    def places(self, spans: Sequence[Span]) -> NDArray[np.int64]:
        """Where the spans' positions lie, concatenated."""
        each, parts = self._block_tokens, []
        for span in spans:
            table = self._tables[span.sequence]
            start = span.start - table.first
            blocks = table.blocks[start // each : -(-(start + span.tokens) // each)]
            inside = np.arange(start % each, start % each + span.tokens)
            parts.append(np.array(blocks, np.int64)[inside // each] * each + inside % each)
        return np.concatenate(parts)

    def rows(self, sequence: int, first: int, end: int) -> Rows:
        """Where positions [first, end) of a sequence lie."""
        return Rows(self._tables[sequence].slice(first, end))

    def _end(self, table: _Table) -> int:
        """The first position that has no place yet."""
        return table.first + len(table.blocks) * self._block_tokens


def _joined(
    runs: tuple[tuple[int, int], ...], blocks: Sequence[int], block_tokens: int
) -> tuple[tuple[int, int], ...]:
    """The runs with these blocks behind them."""
    joined = list(runs)
    for block in blocks:
        place = block * block_tokens
        if joined and sum(joined[-1]) == place:
            joined[-1] = (joined[-1][0], joined[-1][1] + block_tokens)
        else:
            joined.append((place, block_tokens))
    return tuple(joined)
