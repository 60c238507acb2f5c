"""What a ring of equal stages can reach, and what others make of it: sums of a few seconds each.

A stage takes C(n) seconds for n tokens; a link takes their bytes' time, and then its delay.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.wan_board import Path

HIDDEN = 5120
TOKEN_BYTES = 2 * HIDDEN
ROWS = 32
_STAGE_S = ((1, 0.045), (8, 0.058), (32, 0.120))
"""Tokens in a step, and a stage's seconds for them."""


@dataclass(frozen=True, slots=True)
class Network:
    """Every link of a ring."""

    name: str
    path: Path

    def link_s(self, tokens: int) -> float:
        """Seconds that raw activations of so many tokens occupy a link, without its delay."""
        return 8 * TOKEN_BYTES * tokens / self.path.rate_bit_per_s


NETWORKS = tuple(
    Network(f"E{number}", Path(1e6 * mbit_per_s, delay_ms / 1e3))
    for number, (mbit_per_s, delay_ms) in enumerate(
        ((1000, 5), (500, 25), (250, 50), (125, 75), (20, 100)), 1
    )
)


def stage_s(tokens: int) -> float:
    """C(n): linear between the given points, and beyond the last as between the last two."""
    (a, a_s), (b, b_s) = next(
        (pair for pair in pairwise(_STAGE_S) if tokens <= pair[1][0]), _STAGE_S[-2:]
    )
    return a_s + (b_s - a_s) * (tokens - a) / (b - a)


@dataclass(frozen=True, slots=True)
class Cell:
    """A ring on a network."""

    network: Network
    stages: int

    @property
    def bottleneck_s(self) -> float:
        """The longest that one micro-batch occupies a stage or a link."""
        return self.coded_bottleneck_s(1.0)

    @property
    def bound_by_links(self) -> bool:
        """Whether raw activations occupy a link for longer than a stage."""
        return self.network.link_s(ROWS) > stage_s(ROWS)

    def coded_bottleneck_s(self, ratio: float) -> float:
        """The same where a codec makes activations so many times smaller."""
        return max(stage_s(ROWS), self.network.link_s(ROWS) / ratio)

    def loop_s(self, rows: int = ROWS) -> float:
        """Once round for a micro-batch that is alone: the last link carries token ids only."""
        hop_s = self.network.link_s(rows) + self.network.path.delay_s
        back_s = self.network.path.delay_s
        return self.stages * stage_s(rows) + (self.stages - 1) * hop_s + back_s

    @property
    def slots(self) -> int:
        """Micro-batches in flight: what fills the loop, a quarter more for what comes late (a machine
        that is busy elsewhere, a link that measures itself), and one that waits at the bottleneck."""
        return math.ceil(1.25 * self.loop_s() / self.bottleneck_s) + 1

    def relayed_s(self) -> float:
        """A step of one batch where a client sends to every stage and takes back from every one."""
        hop_s = self.network.link_s(ROWS) + self.network.path.delay_s
        return self.stages * (stage_s(ROWS) + 2 * hop_s)

    def pushed_s(self) -> float:
        """The same where stages also push to the next: what the client relays comes too late."""
        hop_s = self.network.link_s(ROWS) + self.network.path.delay_s
        return self.stages * stage_s(ROWS) + (self.stages + 1) * hop_s
