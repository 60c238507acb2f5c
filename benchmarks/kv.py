"""How many sequences a GB of keys and values holds, and what each measure adds: factors, apart.

Rows enter in random order, each with room for all that it may come to, until the pool refuses one:
by the ring's own ledger, with the pools that a stage would have, in bytes as its cache allocates.
"""

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.record import Claim, record
from planner.kv_blocks import BLOCK_TOKENS, KvBlocks, Room, Wanted, kv_blocks
from planner.schedule import CHUNK_TOKENS, RingShape, holdings_of
from planner.windows import Window
from stages.kv_cache import KvCache, LayerKv

GB = 10**9
SLOTS, SLOT_ROWS = 4, 64
STEP_TOKENS = SLOT_ROWS + 2 * CHUNK_TOKENS
SHORTEST, LONGEST = 16, 512
"""Lengths of rows; the longest is the slab of a cache that gives every sequence room for any."""
POOL_GB = 100
"""Large, so that what is left over at its end counts for nothing."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's attention, in 16-bit numbers."""

    layers: int
    heads: int
    kv_heads: int
    dim: int
    window: int = 0
    whole_every: int = 1
    """One layer of so many sees everything."""

    def token_bytes(self, kv_heads: int) -> int:
        """Bytes of one position in all layers, as a stage's cache allocates them."""
        kv = LayerKv(0, kv_heads, self.dim, self.dim)
        return self.layers * KvCache((kv,), 1, 1, torch.bfloat16, torch.device("meta")).bytes


GROUPED = Shape(layers=32, heads=32, kv_heads=8, dim=128)
WINDOWED = Shape(layers=60, heads=32, kv_heads=16, dim=128, window=1024, whole_every=6)


def lengths(draw: Callable[[random.Random], float], count: int = 40_000) -> list[int]:
    """Rows' lengths, drawn."""
    dice = random.Random(0)
    return [round(draw(dice)) for _ in range(count)]


def slabs_per_gb(shape: Shape, kv_heads: int) -> float:
    """Sequences per GB that each have a slab for the longest."""
    return GB / (shape.token_bytes(kv_heads) * LONGEST)


def paged_per_gb(shape: Shape, rows: Sequence[int], windows: bool) -> float:
    """Sequences per GB with blocks, of both kinds where windows are on; three quarters is prompt."""
    whole = shape.layers // shape.whole_every if windows else shape.layers
    block_bytes = shape.token_bytes(shape.kv_heads) / shape.layers * BLOCK_TOKENS
    room = Room(POOL_GB * GB / block_bytes, whole, shape.layers - whole)
    p95 = statistics.quantiles(rows, n=20)[-1]
    wanted = Wanted(len(rows), 0.75 * p95, 0.25 * p95, max(rows), STEP_TOKENS)
    return (
        _entered(kv_blocks([room], shape.window if windows else 0, wanted), shape, rows) / POOL_GB
    )


def _entered(blocks: KvBlocks, shape: Shape, rows: Sequence[int]) -> int:
    kept = Window(shape.window, blocks.windowed) if blocks.windowed else None
    ring = RingShape(SLOTS, SLOT_ROWS, blocks.whole, BLOCK_TOKENS, STEP_TOKENS, window=kept)
    holdings = holdings_of(ring)
    for number, tokens in enumerate(rows):
        if not holdings.enter(number, tokens, tokens, math.ceil(0.75 * tokens), ()):
            return number
    raise AssertionError("there are more rows than the pool holds")


def main() -> None:
    """Grouped heads and pages on short rows, windows on rows of several windows."""
    every = slabs_per_gb(GROUPED, GROUPED.heads)
    slabs = slabs_per_gb(GROUPED, GROUPED.kv_heads)
    evenly = lengths(lambda dice: dice.uniform(SHORTEST, LONGEST))
    mostly_short = lengths(lambda dice: SHORTEST * (LONGEST / SHORTEST) ** dice.random())
    claims = [
        Claim("slabs of 512, keys and values for every head", every, "sequences/GB"),
        Claim("grouped heads alone: 8 for 32", slabs / every, "ratio"),
    ]
    for rows, drawn in ((mostly_short, "log-uniform"), (evenly, "uniform")):
        paged = paged_per_gb(GROUPED, rows, windows=False)
        claim = f"paging alone: lengths 16-512, {drawn}"
        claims.append(Claim(claim, paged / slabs, "ratio", target=2.0))
    for longest in (2048, 8192, 32_768):
        rows = [longest // LONGEST * length for length in evenly]
        alike = paged_per_gb(WINDOWED, rows, windows=False)
        apart = paged_per_gb(WINDOWED, rows, windows=True)
        claim = f"windows alone: 5 of 6 layers see 1,024, lengths to {longest:,}"
        claims.append(Claim(claim, apart / alike, "ratio"))
    record("kv", claims)


if __name__ == "__main__":
    main()
