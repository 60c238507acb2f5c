"""Which pipeline takes the next row, and which gives rows back: pure decisions from paces and counts.

Three policies. `first-free`: any pipeline with room takes the next row. `worthwhile`, the default: it
does so only if it ends the row before the others could, so that no fast pipeline waits at the end of a
job for a slow one. `ws-rr`: each row is given to a pipeline as it comes, by least waiting and service
(Sun et al. 2025, arXiv 2512.21884), whether or not there is room.

A pipeline may hold some rows more than are in flight in it, so that it never waits for them; when no
others are left, those that it has not begun go to whoever ends them sooner.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from planner.cost import tokens_per_round
from planner.facts import Workload
from planner.plan import Pipeline
from planner.problem import Problem
from planner.rounds import round_s, steady

Policy = Literal["worthwhile", "first-free", "ws-rr"]
POLICIES: tuple[Policy, ...] = ("worthwhile", "first-free", "ws-rr")

LONG_ROW = 1.25
"""A long row's rounds, in 95th percentiles: rounds beside prompts take longer than the plan's mean."""
AHEAD_S = 0.5
"""For so long a pipeline has rows to begin while whoever leases them out is busy with others."""
SEEN_ROWS = 8
"""Rows that must have ended before their times count for those to come."""
FORGETS = 1 / 64
"""Share of what was seen before that each further row takes away."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a pipeline answers rows, as planned or as seen."""

    row_s: float
    """Seconds per row while it is full."""
    pass_s: float
    """Seconds of one way round."""
    tokens_per_pass: float
    rows: int
    """Rows in flight at most."""
    alone_s: float = 0.0
    """Seconds of one way round with a single row; 0 where it is not known."""

    def service_s(self, tokens: float, held: float = math.inf) -> float:
        """Seconds of a row of so many output tokens, from its admission on, among so many rows."""
        full = min(held / self.rows, 1.0) if self.alone_s else 1.0
        pass_s = self.alone_s + full * (self.pass_s - self.alone_s)
        return pass_s * (1.0 + tokens / self.tokens_per_pass)

    def slower(self, times: float) -> "Pace":
        """The same pipeline where everything takes so many times as long."""
        seconds = {name: times * getattr(self, name) for name in ("row_s", "pass_s", "alone_s")}
        return replace(self, **seconds)

    def with_rows(self, rows: int) -> "Pace":
        """The same with so many rows in flight, each of which takes as long as before."""
        return replace(self, row_s=self.row_s * self.rows / rows, rows=rows)


def pace_of(given: Problem, pipeline: Pipeline) -> Pace:
    """A pipeline's pace while rows are left, as planned."""
    full = steady(given, pipeline)
    committed = tokens_per_round(given.work.acceptance, pipeline.draft_len)
    alone_s = min(round_s(given, pipeline, 1.0), full.round_s)
    return Pace(full.row_s, full.round_s, committed, full.rows, alone_s)


def long_row_tokens(work: Workload) -> float:
    """Output tokens of a long row: it is the long ones that others wait for."""
    return min(LONG_ROW * work.output_tokens.p95, work.output_tokens.most)


@dataclass(frozen=True, slots=True)
class Move:
    """Rows that one pipeline has not begun, and another would end sooner."""

    giver: int
    taker: int
    rows: int


@dataclass(slots=True)
class _Seen:
    """What rows of one pipeline took, and what was planned for them; the last rows count most."""

    rows: int = 0
    seconds: float = 0.0
    planned_s: float = 0.0

    def add(self, seconds: float, planned_s: float) -> None:
        self.rows += 1
        self.seconds += seconds - FORGETS * self.seconds
        self.planned_s += planned_s - FORGETS * self.planned_s


@dataclass(slots=True)
class Desk:
    """What the pipelines hold together; mutable, owned by whoever leases the rows out."""

    tokens: float
    """Output tokens of a long row."""
    ahead_s: float = 0.0
    """For so long a pipeline should have rows to begin, whoever leases them out being busy."""
    paces: dict[int, Pace] = field(default_factory=dict)
    """By the pipeline's number."""
    held: dict[int, int] = field(default_factory=dict)
    """Rows by the pipeline's number."""
    _planned: dict[int, Pace] = field(default_factory=dict)
    _seen: dict[int, _Seen] = field(default_factory=dict)

    def enter(self, number: int, pace: Pace) -> None:
        """A pipeline that starts, empty."""
        self._planned[number], self._seen[number], self.held[number] = pace, _Seen(), 0
        self.resize(number, pace.rows)

    def resize(self, number: int, rows: int) -> None:
        """So many rows may be in flight from now on."""
        seen, pace = self._seen[number], self._planned[number].with_rows(rows)
        if seen.rows >= SEEN_ROWS:
            pace = pace.slower(seen.seconds / seen.planned_s)
        self.paces[number] = pace

    def leave(self, number: int) -> None:
        """A pipeline that is gone."""
        for each in (self.paces, self.held, self._planned, self._seen):
            del each[number]

    def saw(self, number: int, seconds: float, tokens: float) -> None:
        """A row of so many output tokens took so long from its admission on: its pipeline's pace
        is what was seen from the next `resize` on."""
        self._seen[number].add(seconds, self._planned[number].service_s(tokens))

    def room(self, number: int) -> int:
        """Rows that a pipeline can be given before it holds all that it may."""
        return self.free(number) + self.ahead(number)

    def ahead(self, number: int) -> int:
        """Rows beyond those in flight that a pipeline may hold; as many again at most."""
        pace = self.paces[number]
        return min(pace.rows, math.ceil(self.ahead_s / pace.row_s))

    def runs_low(self, number: int) -> bool:
        """Whether a lease to a pipeline is worth its message."""
        return 2 * self.room(number) >= max(1, self.ahead(number))

    def free(self, number: int) -> int:
        """Rows that a pipeline could begin at once; below 0, so many wait in it already."""
        return self.paces[number].rows - self.held[number]

    def taker(self, open_lines: Sequence[int], waiting: int) -> int | None:
        """Which of these pipelines takes the next of the waiting rows: the one that ends it first,
        if it has room and the others would not end all of them before; else nobody."""
        roomy = [number for number in open_lines if self.room(number) > 0]
        if not roomy or not waiting:
            return None
        first = self.least_wait_and_service(roomy)
        return first if self.worthwhile(first, waiting) else None

    def worthwhile(self, number: int, waiting: int) -> bool:
        """Whether a pipeline ends a long row before the others, with all that wait, would."""
        others = [n for n in self.paces if n != number]
        return self._ends_s(number) <= self._ended_s(others, waiting)

    def move(self, givers: Collection[int], takers: Collection[int]) -> Move | None:
        """When no row waits any more: who should give unbegun rows to whom, and how many.

        From the pipeline that would be the last to end one, to the one that would end them first.
        Each row that moves ends sooner than it would have; None where none would.
        """
        behind = [number for number in givers if self.free(number) < 0]
        idle = [number for number in takers if self.free(number) > 0]
        if not behind or not idle:
            return None
        giver = max(behind, key=lambda number: (self._last_s(number, 0), number))
        taker = self.least_wait_and_service(idle)
        rows = 0
        while rows < -self.free(giver) and self._ends_s(taker, rows) < self._last_s(giver, rows):
            rows += 1
        return Move(giver, taker, rows) if rows else None

    def _last_s(self, number: int, fewer: int) -> float:
        """Seconds to the end of the last row that a pipeline holds, if it had so many fewer."""
        return self._ends_s(number, -1 - fewer)

    def _ends_s(self, number: int, more: int = 0) -> float:
        """Seconds to the end of a further long row, if a pipeline held so many more before it."""
        pace = self.paces[number]
        before = max(1 + more - self.free(number), 0)
        held = self.held[number] + 1 + more
        return before * pace.row_s + pace.service_s(self.tokens, held)

    def _ended_s(self, numbers: Sequence[int], rows: int) -> float:
        """Seconds in which these pipelines could end so many long rows more; infinite if never.

        A pipeline counts from the time on at which its first row would be ended: its free places
        then, and one whenever one of its rows leaves.
        """
        room, rate, begins_s = 0.0, 0.0, 0.0
        held = ((n, self.held[n] + rows) for n in numbers)
        for service_s, n in sorted((self.paces[n].service_s(self.tokens, h), n) for n, h in held):
            room += rate * (service_s - begins_s)
            if room >= rows:
                return service_s - (room - rows) / rate
            begins_s = service_s
            room += self.free(n)
            if room >= rows:
                return service_s
            rate += 1.0 / self.paces[n].row_s
        return begins_s + (rows - room) / rate if rate else float("inf")

    def least_wait_and_service(self, open_lines: Sequence[int]) -> int:
        """The pipeline that would end a row first, its present rows waited for."""
        return min(open_lines, key=lambda number: (self._ends_s(number), number))
