"""How many rows may enter a ring whose memory is short, by what all in it come to hold together.

A row holds its tokens, and one more with each round; once it has ended, none. So what rows hold is most
just before one of them ends, and far less than the sum of what each comes to, unless all are of one age.
Gong et al. 2025 (arXiv 2507.10150) admit by that peak, foreseen from the lengths of rows that ended.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from planner.holdings import Holdings

LEARNED_ROWS = 64
"""Rows that must have ended before their lengths count for those to come: short ones end first."""
GROWTH_TOKENS = 64
"""Positions for which a row gets blocks at once as it grows: so most of them lie side by side."""
SPARE = 1.25
"""Of what a row is expected to make, how much it has room for from its beginning on, memory allowing."""
SHARES = 64
"""Parts into which what rows may make is cut, to count where they end."""


@dataclass(slots=True)
class Sequence:
    """What the policy knows of a row in flight; only the ring changes it."""

    known: int
    """Tokens whose ids are known: the prompt, and what has been sampled."""
    limit: int
    """Tokens that it may grow to."""
    entered: int
    """Tokens that were known when it came."""
    marks: tuple[int, ...]
    """Of the leading units of its prompt that may be shared; see planner.prefixes."""
    computed: int = 0
    """Positions whose keys and values are cached, or will be when the step in flight is back."""

    @property
    def made(self) -> int:
        """Tokens made since it came."""
        return self.known - self.entered

    @property
    def allowed(self) -> int:
        """Tokens that it may make in all, counted likewise."""
        return self.limit - self.entered

    @property
    def prompt_left(self) -> int:
        """Tokens that it came with and that no step has computed yet."""
        return max(0, self.entered - self.computed)


class Growth:
    """How much of what they may make rows do make: learned from those that have ended; mutable."""

    def __init__(self) -> None:
        self._rows = 0
        self._ended = [0] * SHARES
        self._made = [0.0] * SHARES
        """Shares of what they might, of rows that ended there."""
        self._left = [1.0] * SHARES
        """The share that rows come to in the mean which have come so far."""

    def saw(self, made: int, allowed: int) -> None:
        """A row has ended after so many tokens of the allowed ones."""
        self._rows += 1
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
        if self._rows < LEARNED_ROWS:
            return float(allowed)
        share = self._left[min(int(SHARES * made / allowed), SHARES - 1)]
        return min(max(share * allowed, made + 1.0), float(allowed))


def rows_that_fit(
    room: float, held: Iterable[float], left: Iterable[float], now: float, more: float
) -> int:
    """How many rows that hold `now` tokens, `more` to come, may enter beside others, so that all fit.

    `held` and `left` are the same of the others, `room` the tokens for all of them; each makes one
    token a round, until it ends.
    """
    ends = np.fromiter(left, np.float64)
    order = np.argsort(-ends)
    ends = ends[order]
    together = np.concatenate(([0.0], np.cumsum(np.fromiter(held, np.float64)[order])))
    at = np.append(ends[ends <= more], more)
    alive = np.searchsorted(-ends, -at, side="right")
    used = together[alive] + alive * at
    return max(0, int(((room - used) / (now + at)).min()))


class Admission:
    """What rows are given as they enter a ring, and how many may; mutable, as it learns."""

    def __init__(self, blocks: int, holdings: Holdings) -> None:
        self._blocks = blocks
        self._holdings = holdings
        self._growth = Growth()

    def saw(self, ended: Sequence) -> None:
        """Learn from a row that has ended."""
        self._growth.saw(ended.made, ended.allowed)

    def ends(self, sequence: Sequence) -> int:
        """Tokens that a sequence is expected to come to."""
        made = self._growth.expected(sequence.made, sequence.allowed)
        return sequence.entered + math.ceil(made)

    def tokens_for(self, sequence: Sequence, rows: int) -> int:
        """Tokens that a sequence is given room for as it enters a ring of so many rows at most.

        Likely all that it comes to, so that most of its blocks lie side by side; where memory is short
        for that, some, and more later.
        """
        if self._ample(sequence, rows):
            return self._spacious(sequence)
        return min(sequence.known + GROWTH_TOKENS, self.ends(sequence))

    def places(self, first: Sequence, live: Iterable[tuple[int, Sequence]], rows: int) -> int:
        """How many rows like the first could enter now beside those that live, so that all come to their
        end; of at most `rows` in the ring."""
        holdings, ends = self._holdings, self.ends(first)
        cached, tokens = holdings.cached(first.marks), self.tokens_for(first, rows)
        places = holdings.room_for(tokens - cached, ends, first.known)
        if self._ample(first, rows) or not places:
            return places
        room = to_the_end = holdings.free_blocks
        held: list[float] = []
        left: list[int] = []
        for number, each in live:
            own_blocks, shared = holdings.own_blocks(number), holdings.shared_tokens(number)
            left.append(self.ends(each) - each.known)
            held.append(each.known - shared + self._unused(left[-1]))
            room += own_blocks
            to_the_end -= max(0, holdings.blocks_for(self.ends(each) - shared) - own_blocks)
        now, more = first.known - cached, ends - first.known
        room *= holdings.block_tokens
        fitting = rows_that_fit(room, held, left, now + self._unused(more), more)
        # If each has room to its end, nothing needs to be foreseen.
        return min(places, max(fitting, to_the_end // holdings.blocks_for(now + more)))

    def _ample(self, sequence: Sequence, rows: int) -> bool:
        """Whether there is memory for so many sequences like this, to their end."""
        return self._blocks >= rows * self._holdings.blocks_for(self._spacious(sequence))

    def _spacious(self, sequence: Sequence) -> int:
        made = SPARE * self._growth.expected(sequence.made, sequence.allowed)
        return min(sequence.entered + math.ceil(made), sequence.limit)

    def _unused(self, more: int) -> float:
        """Tokens for which a row that makes so many more has blocks too early, in the mean."""
        return (self._holdings.block_tokens + min(GROWTH_TOKENS, more)) / 2
