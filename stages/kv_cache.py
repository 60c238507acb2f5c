"""Keys and values of the sequences in flight: one pool of blocks a layer, one table a sequence.

Layers that see a window may have smaller pools, and tables of their own that keep only the window.
The head decides which blocks a sequence owns; this only knows where they lie.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from planner.schedule import Grant, Span, Step
from planner.windows import Window
from stages.block_tables import BlockTables, Rows
from stages.errors import ProtocolError
from stages.parking import Parking


@dataclass(frozen=True, slots=True)
class LayerKv:
    """The shape of one layer's keys and values at one position, and how many positions it sees."""

    layer: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    """Positions that a query sees, its own the last of them; None: all."""

    def bytes_per_token(self, itemsize: int) -> int:
        """Bytes that one position of one sequence takes in this layer."""
        return self.kv_heads * (self.key_dim + self.value_dim) * itemsize


class KvCache:
    """The KV blocks of one stage; mutable, owned by the thread that computes the stage's steps.

    Pools are [1, kv heads, blocks * block_tokens, dim]: a head's keys lie side by side, so that
    attention over a sequence whose blocks are consecutive reads the pool itself. A layer's pool is
    a windowed one if the layer sees no more than the window keeps.
    """

    def __init__(
        self,
        layers: Sequence[LayerKv],
        blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        window: Window | None = None,
        frames: int | None = None,
    ) -> None:
        """
        Empty pools; with `frames`, only so many blocks lie on the device at once, windows aside.

        Raises:
            StreamError: there is no room to park in.
        """
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.device = device
        self._window = window
        self._whole = BlockTables(block_tokens)
        self._near = BlockTables(block_tokens)
        self._windowed = {kv.layer for kv in layers if _keeps(window, kv)}
        all_windowed = len(self._windowed) == len(layers)
        self.frames = blocks if frames is None or all_windowed else frames
        """Blocks, of layers that see everything, that lie on the device at once."""
        self._pools = {kv.layer: self._pool(kv, dtype) for kv in layers}
        pools = [self._pools[kv.layer] for kv in layers if not self.is_windowed(kv.layer)]
        self.parking: Parking | None = None
        if self.frames < blocks:
            self.parking = Parking(list(chain(*pools)), blocks, self.frames, block_tokens)
        self._applied: tuple[int, ...] = ()
        """Sequences of the step that was applied last, in the order of its spans."""

    def _pool(self, kv: LayerKv, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        windowed = self._window if self.is_windowed(kv.layer) else None
        places = (windowed.blocks if windowed else self.frames) * self.block_tokens
        return (
            torch.zeros(1, kv.kv_heads, places, kv.key_dim, dtype=dtype, device=self.device),
            torch.zeros(1, kv.kv_heads, places, kv.value_dim, dtype=dtype, device=self.device),
        )

    @property
    def sequences(self) -> tuple[int, ...]:
        """Sequences that hold blocks."""
        return self._whole.sequences

    @property
    def bytes(self) -> int:
        """Bytes of the device that the pools, and the way to what is parked, may come to occupy."""
        staging_bytes = 0 if self.parking is None else self.parking.staging_bytes
        return staging_bytes + sum(pool.nbytes for pair in self._pools.values() for pool in pair)

    @property
    def kinds(self) -> tuple[bool, ...]:
        """Which kinds of layers there are: windowed ones, others, or both."""
        return tuple({self.is_windowed(layer) for layer in self._pools})

    def is_windowed(self, layer: int) -> bool:
        """Whether the layer keeps only a window; layers of one kind share their tables."""
        return layer in self._windowed

    def apply(self, step: Step) -> None:
        """Take up a step's block changes; call once a frame, before it is computed.

        Ended sequences drop their tables first, then grants extend tables, and what spans see no
        more is dropped. Raises ProtocolError for a block that is not in its pool, and for a span
        whose positions, or the window before them, have no blocks.
        """
        for sequence in step.ended:
            self._whole.drop(sequence)
            self._near.drop(sequence)
            if self.parking is not None:
                self.parking.residence.drop(sequence)
        starts = {span.sequence: span.start for span in step.spans}
        for grant in step.grants:
            self._extend(grant, starts.get(grant.sequence, 0), step.slot)
        self._applied = tuple(starts)
        for span in step.spans:
            self._whole.require(span, 0, step.frame)
            if self._window is not None:
                self._slide(self._window, span, step.frame)

    def bring(self, step: Step) -> None:
        """Have what a step, or a part of one that was applied, sees on the device.

        Raises KvRoomError if a part of it would have to be parked, StreamError if what was parked
        cannot be moved.
        """
        if self.parking is None:
            return
        own = [span.sequence for span in step.spans]
        later = self._applied[self._applied.index(own[-1]) + 1 :]
        self.parking.bring(step.spans, later, step.slot)
        for sequence in own:
            self._whole.move(sequence, self.parking.residence.frames_of(sequence))

    def clear(self) -> None:
        """Drop every sequence: a new epoch begins."""
        self._whole.clear()
        self._near.clear()
        if self.parking is not None:
            self.parking.clear()

    def places(self, windowed: bool, spans: Sequence[Span]) -> NDArray[np.int64]:
        """Where the spans' positions lie in the pools of one kind of layers, concatenated."""
        return (self._near if windowed else self._whole).places(spans)

    def rows(self, layer: int, sequence: int, first: int, end: int) -> Rows:
        """Where positions [first, end) of a sequence lie in the layer's pools."""
        tables = self._near if self.is_windowed(layer) else self._whole
        return tables.rows(sequence, first, end)

    def write(
        self, layer: int, places: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values [1, kv heads, T, dim] at T places; the layer's pools come back."""
        keys, values = self._pools[layer]
        keys.index_copy_(2, places, key)
        values.index_copy_(2, places, value)
        return keys, values

    def _extend(self, grant: Grant, start: int, slot: int) -> None:
        """Each kind's blocks to its tables; a windowed one begins with what its first span sees."""
        all_blocks = self.blocks + (self._window.blocks if self._window else 0)
        strangers = [block for block in grant.blocks if not 0 <= block < all_blocks]
        if strangers:
            raise ProtocolError(
                f"sequence {grant.sequence} was granted block {strangers[0]} of {all_blocks}"
            )
        whole = [block for block in grant.blocks if block < self.blocks]
        near = [block - self.blocks for block in grant.blocks if block >= self.blocks]
        if whole:
            self._whole.extend(grant.sequence, whole)
            if self.parking is not None:
                # What a sequence starts with is shared; what it is granted later is empty.
                self.parking.residence.extend(
                    slot, grant.sequence, whole, start // self.block_tokens
                )
        if near and self._window:
            self._near.extend(grant.sequence, near, self._window.kept_from(start))

    def _slide(self, window: Window, span: Span, frame: int) -> None:
        self._near.drop_before(span.sequence, window.kept_from(span.start))
        self._near.require(span, max(0, span.start - window.tokens + 1), frame)


def _keeps(window: Window | None, kv: LayerKv) -> bool:
    """Whether all that the layer sees is kept in that window."""
    return window is not None and kv.window is not None and kv.window <= window.tokens
