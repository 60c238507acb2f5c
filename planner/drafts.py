"""How many tokens to draft for each row: what commits the most tokens a second, as rows come and go.

Where many rows are in flight, a drafted position costs a busy stage or link as much as one that counts;
where few are, a round takes its time anyway, and drafts fill it. So the length follows the rows that
there are, by what a round of them costs and by how many drafts have held so far; 0 is a normal answer.
"""

from bisect import bisect_left
from dataclasses import dataclass

from planner.cost import tokens_per_round

FORESEEN_TRIES = 32
"""Drafts for which the chances known beforehand count, beside those that were seen."""


@dataclass(frozen=True, slots=True)
class DraftCosts:
    """What rounds of a ring cost with drafts, and how likely these are to hold."""

    rows: tuple[int, ...]
    """Rows in flight whose rounds were costed, rising."""
    lengths: tuple[int, ...]
    """Drafted tokens a row, rising from 0."""
    round_s: tuple[tuple[float, ...], ...]
    """Seconds in which each of so many rows is verified once, by rows and by length."""
    chances: tuple[float, ...]
    """That the i-th draft holds where those before it did, as far as is known beforehand."""

    def __post_init__(self) -> None:
        if not self.rows or self.lengths[:1] != (0,) or self.lengths[-1] > len(self.chances):
            raise ValueError(f"drafts from 0 up to one for each chance, for some rows: {self}")


class Goodput:
    """Chooses the length; mutable, owned by a ring, and learns from what the ring sees hold."""

    def __init__(self, costs: DraftCosts) -> None:
        self._costs = costs
        self._tried = [float(FORESEEN_TRIES)] * len(costs.chances)
        self._held = [FORESEEN_TRIES * chance for chance in costs.chances]

    @property
    def chances(self) -> tuple[float, ...]:
        """That the i-th draft holds where those before it did, by all that is known now."""
        return tuple(held / tried for held, tried in zip(self._held, self._tried, strict=True))

    def draft_len(self, rows: int) -> int:
        """Tokens to draft for each row while so many are in flight."""
        place = min(bisect_left(self._costs.rows, rows), len(self._costs.rows) - 1)
        chances, seconds = self.chances, self._costs.round_s[place]
        rates = [
            tokens_per_round(chances, n) / s
            for n, s in zip(self._costs.lengths, seconds, strict=True)
        ]
        return self._costs.lengths[rates.index(max(rates))]  # of equals the shortest

    def saw(self, drafted: int, held: int) -> None:
        """Of so many drafts of a row the first `held` held: those behind the next tell nothing."""
        for place in range(min(held + 1, drafted)):
            self._tried[place] += 1.0
            self._held[place] += place < held
