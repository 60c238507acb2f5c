"""Rows among pipelines: pulled as each has room, and at the end taken back from who has too many.

Counts decide, by the policy in `planner.leases` that the simulator runs too; what a row asks, and
where it comes from, is unknown here.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from flows.errors import RunError
from flows.launch import Fleet
from planner.facts import Workload
from planner.leases import AHEAD_S, Desk, Move, Pace, long_row_tokens
from stages.control import MAX_RECALLED, Answer, LeasedRow

log = logging.getLogger(__name__)

MOST_ASIDE = 64
"""Rows that wait for a pipeline with room for ones so long; whoever meets more must wait too."""


class Source(Protocol):
    """Rows that no pipeline has yet."""

    def __len__(self) -> int:
        """How many there may be."""

    def take(self, pipeline: int) -> LeasedRow | None:
        """The next row for a pipeline; None if there is none now."""


@dataclass(frozen=True, slots=True)
class Told:
    """How a row ended, and in which pipeline."""

    pipeline: int
    answer: Answer


class Dealer:
    """Knows which pipeline has which rows: each has them alone, from lease to answer or return.

    Mutable; owned by the driver's thread.
    """

    def __init__(self, fleet: Fleet, paces: Sequence[Pace], work: Workload) -> None:
        """`paces` are those of the fleet's pipelines, as planned for that work."""
        self._fleet = fleet
        self._row_tokens = math.ceil(work.prompt_tokens.p95 + work.output_tokens.p95)
        self._desk = Desk(long_row_tokens(work), AHEAD_S)
        self._rows: list[dict[int, LeasedRow]] = []
        """Of each pipeline, by the row's number."""
        for number, pace in enumerate(paces):
            self._desk.enter(number, pace)
            self._rows.append({})
        self._fresh: list[list[LeasedRow]] = [[] for _ in self._rows]
        """Of each pipeline's rows, those that its head has not been sent yet."""
        self._aside: list[LeasedRow] = []
        self._asked: dict[int, Move] = {}
        """Recalls that are not answered, by who was asked."""
        self._in_vain: set[tuple[int, int]] = set()
        """(giver, taker) where the last recall brought less than asked: nothing more is to be had."""

    @property
    def rows(self) -> int:
        """Rows that are with a pipeline, or set aside for one."""
        return sum(map(len, self._rows)) + len(self._aside)

    def fill(self, source: Source) -> None:
        """Lease rows to whoever runs low, and even out what pipelines hold once there are no more."""
        for number in range(len(self._rows)):
            self._desk.resize(number, self._in_flight(number))
        low = [number for number in self._desk.held if self._desk.runs_low(number)]
        for number in low:
            self._give_aside(number)
        while (taker := self._desk.taker(low, len(source))) is not None:
            row = source.take(taker)
            if row is None:
                break
            if self._fits(taker, row):
                self._give(taker, row)
            else:
                self._aside.append(row)
                if len(self._aside) >= MOST_ASIDE:
                    low.remove(taker)
        if not len(source):
            self._even_out()
        self._send()

    def news(self, timeout_s: float) -> list[Told]:
        """Rows that ended, as the next head says; StageLostError if a stage is lost."""
        news = self._fleet.news(timeout_s)
        if news.returned is not None:
            self._moved(news.pipeline, news.returned)
        for answer in news.answers:
            self._take(news.pipeline, answer.row, "answered")
            if answer.error_type is None:
                seconds = answer.prefill_s + answer.decode_s
                self._desk.saw(news.pipeline, seconds, answer.output_tokens)
        return [Told(news.pipeline, answer) for answer in news.answers]

    def _in_flight(self, number: int) -> int:
        """Rows that a pipeline computes at once at most, as far as its memory goes."""
        ring = self._fleet.rings[number]
        held = ring.blocks // ring.shape().blocks_for(self._row_tokens)
        return max(1, min(held, self._fleet.rows_in_flight(number)))

    def _room_tokens(self, number: int) -> int:
        """Tokens that a pipeline can hold of one row."""
        return self._fleet.rings[number].shape().row_tokens

    def _fits(self, number: int, row: LeasedRow) -> bool:
        return len(row.token_ids) + row.max_new_tokens <= self._room_tokens(number)

    def _give_aside(self, number: int) -> None:
        """To a pipeline that can hold them, whether or not others would be quicker: they cannot."""
        fitting = [row for row in self._aside if self._fits(number, row)]
        given = {row.row for row in fitting[: max(0, self._desk.room(number))]}
        for row in fitting[: len(given)]:
            self._give(number, row)
        self._aside = [row for row in self._aside if row.row not in given]

    def _give(self, number: int, row: LeasedRow) -> None:
        self._rows[number][row.row] = row
        self._fresh[number].append(row)
        self._desk.held[number] += 1

    def _send(self) -> None:
        for number, fresh in enumerate(self._fresh):
            if fresh:
                self._in_vain = {pair for pair in self._in_vain if pair[0] != number}
                self._fleet.lease(number, fresh)
                fresh.clear()

    def _take(self, number: int, row: int, how: str) -> LeasedRow:
        if row not in self._rows[number]:
            raise RunError(f"pipeline {number} {how} row {row}, which it was not leased")
        self._desk.held[number] -= 1
        return self._rows[number].pop(row)

    def _even_out(self) -> None:
        """Ask whoever would be last for rows that it has not begun, for one that could begin them."""
        busy = {each for move in self._asked.values() for each in (move.giver, move.taker)}
        calm = [number for number in self._desk.held if number not in busy]
        while (move := self._desk.move(calm, calm)) is not None:
            calm.remove(move.giver)
            if (move.giver, move.taker) in self._in_vain:
                continue
            calm.remove(move.taker)
            move = replace(move, rows=min(move.rows, MAX_RECALLED))
            self._asked[move.giver] = move
            self._fleet.recall(move.giver, move.rows, self._room_tokens(move.taker))

    def _moved(self, giver: int, returned: Sequence[int]) -> None:
        """A head has let go of rows; they are the taker's now."""
        move = self._asked.pop(giver, None)
        if move is None:
            raise RunError(f"pipeline {giver} returned rows that nobody asked for")
        log.info(
            "rows moved from=%d to=%d rows=%d asked=%d",
            giver, move.taker, len(returned), move.rows,
        )  # fmt: skip
        if len(returned) < move.rows:
            self._in_vain.add((giver, move.taker))
        for row in returned:
            self._give(move.taker, self._take(giver, row, "returned"))
        self._send()
