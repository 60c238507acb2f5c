"""How many rows may enter a ring whose memory is short, by what all in it come to hold together.

A row holds its tokens, and one more with each round; once it has ended, none. So what rows hold is most
just before one of them ends, and far less than the sum of what each comes to, unless all are of one age.
Gong et al. 2025 (arXiv 2507.10150) admit by that peak, foreseen from the lengths of rows that ended.
"""

from collections.abc import Sequence

import numpy as np

LEARNED_ROWS = 64
"""Rows that must have ended before their lengths count for those to come: short ones end first."""
GROWTH_TOKENS = 64
"""Positions for which a row gets blocks at once as it grows: so most of them lie side by side."""
SHARES = 64
"""Parts into which what rows may make is cut, to count where they end."""


class Growth:
    """How much of what they may make rows do make: learned from those that have ended; mutable."""

    def __init__(self) -> None:
        self.rows = 0
        self._ended = [0] * SHARES
        self._made = [0.0] * SHARES
        """Shares of what they might, of rows that ended there."""
        self._left = [1.0] * SHARES
        """The share that rows come to in the mean which have come so far."""

    def saw(self, made: int, allowed: int) -> None:
        """A row has ended after so many tokens of the allowed ones."""
        self.rows += 1
        share = made / allowed
        place = min(int(SHARES * share), SHARES - 1)
        self._ended[place] += 1
        self._made[place] += share
        ended = total = 0.0
        for i in range(SHARES - 1, -1, -1):
            ended, total = ended + self._ended[i], total + self._made[i]
            self._left[i] = total / ended if ended else 1.0

    def expected(self, made: int, allowed: int) -> float:
        """Tokens that a row which made so many is likely to make in all; the allowed ones at most."""
        if self.rows < LEARNED_ROWS:
            return float(allowed)
        share = self._left[min(int(SHARES * made / allowed), SHARES - 1)]
        return min(max(share * allowed, made + 1.0), float(allowed))


def rows_that_fit(
    room: float, held: Sequence[float], left: Sequence[float], now: float, more: float
) -> int:
    """How many rows that hold `now` tokens, `more` to come, may enter beside others, so that all fit.

    `held` and `left` are the same of the others, `room` the tokens for all of them; each makes one
    token a round, until it ends.
    """
    ends = np.asarray(left, np.float64)
    order = np.argsort(-ends)
    ends = ends[order]
    together = np.concatenate(([0.0], np.cumsum(np.asarray(held, np.float64)[order])))
    at = np.append(ends[ends <= more], more)
    alive = np.searchsorted(-ends, -at, side="right")
    used = together[alive] + alive * at
    return max(0, int(((room - used) / (now + at)).min()))
