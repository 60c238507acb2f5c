"""Keys and values of the sequences in flight: one pool of blocks a layer, one table a sequence.

The head decides which blocks a sequence owns; this only knows where they lie.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from planner.schedule import Grant, Span, Step
from stages.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class LayerKv:
    """The shape of one layer's keys and values at one position."""

    layer: int
    kv_heads: int
    key_dim: int
    value_dim: int

    def bytes_per_token(self, itemsize: int) -> int:
        """Bytes that one position of one sequence takes in this layer."""
        return self.kv_heads * (self.key_dim + self.value_dim) * itemsize


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
    """A sequence's places in the pools, by position; only the cache changes it."""

    places: Tensor
    runs: tuple[tuple[int, int], ...]
    """The same as runs of (first place, tokens)."""


class KvCache:
    """The KV blocks of one stage; mutable, owned by the thread that computes the stage's steps.

    Pools are [1, kv heads, blocks * block_tokens, dim]: a head's keys lie side by side, so that
    attention over a sequence whose blocks are consecutive reads the pool itself.
    """

    def __init__(
        self,
        layers: Sequence[LayerKv],
        blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.device = device
        self._tables: dict[int, _Table] = {}
        places = blocks * block_tokens
        self._pools = {
            kv.layer: (
                torch.zeros(1, kv.kv_heads, places, kv.key_dim, dtype=dtype, device=device),
                torch.zeros(1, kv.kv_heads, places, kv.value_dim, dtype=dtype, device=device),
            )
            for kv in layers
        }

    @property
    def sequences(self) -> tuple[int, ...]:
        """Sequences that hold blocks."""
        return tuple(self._tables)

    @property
    def bytes(self) -> int:
        """Bytes that the pools may come to occupy."""
        return sum(pool.nbytes for pair in self._pools.values() for pool in pair)

    def apply(self, step: Step) -> None:
        """Take up a step's block changes; call once a frame, before it is computed.

        Ended sequences drop their tables first, then grants extend tables. Raises ProtocolError for
        a block that is not in the pool, and for a span whose positions have no blocks.
        """
        for sequence in step.ended:
            self._tables.pop(sequence, None)
        for grant in step.grants:
            self._extend(grant)
        for span in step.spans:
            self._require(span, step.frame)

    def clear(self) -> None:
        """Drop every sequence: a new epoch begins."""
        self._tables.clear()

    def places(self, spans: Sequence[Span]) -> Tensor:
        """Where the spans' positions lie in the pools, concatenated, int64."""
        return torch.cat(
            [
                self._tables[span.sequence].places[span.start : span.start + span.tokens]
                for span in spans
            ]
        )

    def rows(self, sequence: int, first: int, end: int) -> Rows:
        """Where positions [first, end) of a sequence lie."""
        found, start = [], 0
        for place, tokens in self._tables[sequence].runs:
            low, high = max(first, start), min(end, start + tokens)
            if low < high:
                found.append((place + low - start, high - low))
            start += tokens
        return Rows(tuple(found))

    def write(
        self, layer: int, places: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values [1, kv heads, T, dim] at T places; the layer's pools come back."""
        keys, values = self._pools[layer]
        keys.index_copy_(2, places, key)
        values.index_copy_(2, places, value)
        return keys, values

    def _extend(self, grant: Grant) -> None:
        strangers = [block for block in grant.blocks if not 0 <= block < self.blocks]
        if strangers:
            raise ProtocolError(
                f"sequence {grant.sequence} was granted block {strangers[0]} of {self.blocks}"
            )
        table = self._tables.get(grant.sequence)
        starts = torch.tensor(grant.blocks, dtype=torch.int64, device=self.device)
        offsets = torch.arange(self.block_tokens, device=self.device)
        places = (starts[:, None] * self.block_tokens + offsets).flatten()
        if table is not None:
            places = torch.cat([table.places, places])
        before = () if table is None else table.runs
        self._tables[grant.sequence] = _Table(places, _joined(before, grant, self.block_tokens))

    def _require(self, span: Span, frame: int) -> None:
        table = self._tables.get(span.sequence)
        held = 0 if table is None else len(table.places)
        if span.tokens < 1 or span.start < 0 or span.start + span.tokens > held:
            raise ProtocolError(
                f"frame {frame}: sequence {span.sequence} computes positions {span.start} to "
                f"{span.start + span.tokens} and holds blocks for {held}"
            )


def _joined(
    runs: tuple[tuple[int, int], ...], grant: Grant, block_tokens: int
) -> tuple[tuple[int, int], ...]:
    """The runs with the granted blocks behind them."""
    joined = list(runs)
    for block in grant.blocks:
        place = block * block_tokens
        if joined and sum(joined[-1]) == place:
            joined[-1] = (joined[-1][0], joined[-1][1] + block_tokens)
        else:
            joined.append((place, block_tokens))
    return tuple(joined)
