"""How many KV blocks a pipeline's stages hold, of each kind of layers: pure arithmetic.

Every stage holds the same number, so that one table of blocks serves them all; the tightest decides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from planner.cost import STREAM_BUFFERS, resident_kv
from planner.facts import Cluster, ModelShape
from planner.plan import StagePlan
from planner.windows import AHEAD_TOKENS, Window

BLOCK_TOKENS = 16
KV_SHARE = 0.8
"""Of the memory that a stage's weights leave free; the rest is for activations."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a stage has for keys and values, and for which layers."""

    layer_blocks: float
    """Blocks of one layer that fit beside its weights."""
    whole: int
    """Layers that see all positions."""
    windowed: int
    """Layers that see a window."""
    resident: float = 1.0
    """Share of the blocks that have room here; the others are parked. Windowed layers' all have."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a ring would like to hold: its rows at these lengths, or one that fills the context."""

    rows: int
    prompt_tokens: float
    output_tokens: float
    context_tokens: int
    step_tokens: int


@dataclass(frozen=True, slots=True)
class KvBlocks:
    """Blocks of every layer's pool."""

    whole: int
    windowed: int = 0
    """Of layers that keep only their window; 0: those are like all others."""


def kv_room(stage: StagePlan, model: ModelShape, cluster: Cluster, in_flight: int) -> Room:
    """What a stage's memory leaves for keys and values beside its weights."""
    streamed = stage.weights_offloaded
    weights_bytes = (stage.layers - streamed + min(streamed, STREAM_BUFFERS)) * model.layer_bytes
    if stage.first_layer == 0:
        weights_bytes += model.embedding_bytes
    if stage.end_layer == model.layers:
        weights_bytes += model.head_bytes
    free_bytes = KV_SHARE * (cluster.node(stage.node).memory_bytes - weights_bytes)
    windowed = model.windowed_layers(stage.first_layer, stage.end_layer)
    block_bytes = model.kv_bytes_per_token_layer * BLOCK_TOKENS
    resident = resident_kv(stage.kv_offloaded, in_flight)
    return Room(free_bytes / block_bytes, stage.layers - windowed, windowed, resident)


def kv_blocks(rooms: Sequence[Room], window_tokens: int, wanted: Wanted) -> KvBlocks:
    """As many blocks as the rows in flight may want, or as the tightest stage has room for.

    Layers that see a window keep only that, unless the context is no longer than what they would
    keep, or memory so short that one row's window would take more than all of the row does.
    """
    alike = min(room.layer_blocks / (room.whole + room.windowed) / room.resident for room in rooms)
    same = KvBlocks(max(1, min(_most(rooms, wanted), int(alike))))
    least = _blocks(Window(window_tokens, 0).most_tokens(wanted.step_tokens))
    some = any(room.windowed for room in rooms)
    if not some or not window_tokens or _blocks(wanted.context_tokens) <= least:
        return same
    apart = _apart(rooms, window_tokens, wanted, least)
    return apart if apart.whole >= same.whole else same


def _apart(rooms: Sequence[Room], window_tokens: int, wanted: Wanted, least: int) -> KvBlocks:
    """Either kind's blocks: as the rows need them, but a row that fills the context first."""
    row = _blocks(wanted.prompt_tokens + wanted.output_tokens)
    at_once = max(AHEAD_TOKENS, min(wanted.step_tokens, math.ceil(wanted.prompt_tokens)))
    near = min(row, _blocks(Window(window_tokens, 0).most_tokens(at_once)))
    # One row's more, for beginnings that nobody uses just now.
    most = max(least, (wanted.rows + 1) * near)
    rows = min(
        room.layer_blocks / (room.resident * room.whole * row + room.windowed * near)
        for room in rooms
    )
    windowed = min(most, max(least, int(rows * near)))
    if _whole(rooms, windowed, wanted) < _blocks(wanted.context_tokens):
        windowed = min(windowed, max(least, _beside(rooms, _blocks(wanted.context_tokens))))
    return KvBlocks(_whole(rooms, windowed, wanted), windowed)


def _whole(rooms: Sequence[Room], windowed: int, wanted: Wanted) -> int:
    """Blocks for layers that see everything, beside so many for the others; 0 if none fit."""
    left = _most(rooms, wanted)
    for room in rooms:
        free = room.layer_blocks - room.windowed * windowed
        if free < 0:
            return 0
        if room.whole:
            left = min(left, int(free / room.whole / room.resident))
    return left


def _beside(rooms: Sequence[Room], whole: int) -> int:
    """Blocks for windowed layers beside so many for the others; below 0 if those do not fit."""
    return min(
        math.floor((room.layer_blocks - room.resident * room.whole * whole) / room.windowed)
        for room in rooms
        if room.windowed
    )


def _most(rooms: Sequence[Room], wanted: Wanted) -> int:
    """Blocks beyond which nobody gains: of one row, no stage may park any."""
    row = _blocks(wanted.prompt_tokens + wanted.output_tokens)
    resident = min(room.resident for room in rooms)
    return max(wanted.rows * row, math.ceil(_blocks(wanted.context_tokens) / resident))


def _blocks(tokens: float) -> int:
    return math.ceil(tokens / BLOCK_TOKENS)
