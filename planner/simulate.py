"""A run of a plan, imagined event by event: the ring's own policy on facts instead of frames.

Every pipeline runs `schedule.Ring`, as its head does. Pipelines share the queue of rows by leases, or
are given rows as they come; when the queue is empty, rows that one has not begun go to another, by the
same `leases.Desk`, if at once. Nodes may leave and join on the way: the run is then planned again, and
the rows of pipelines that are gone prefill again elsewhere. What is measured on the way changes
nothing here: micro-batches stay as many, and pipelines count as fast, as planned.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

import numpy as np

from planner.facts import Cluster, InfeasibleError, ModelShape, Workload
from planner.leases import AHEAD_S, Desk, Policy, long_row_tokens
from planner.line import Flight, Line
from planner.plan import Pipeline, Plan
from planner.problem import Problem, load_s, problem
from planner.replan import replan
from planner.rows import Row, sample_rows
from planner.schedule import most_rounds
from planner.ways import busy_fractions

LOST_AFTER_S = 20.0
"""Silence after which a node counts as gone; its rows are leased again from then on."""

_ARRIVAL, _CHANGE, _LOOK = range(3)


@dataclass(frozen=True, slots=True)
class NodesChange:
    """From `at_s` on the cluster is this one: nodes that are not in it are gone, others are new."""

    at_s: float
    cluster: Cluster


@dataclass(frozen=True, slots=True)
class Event:
    """A line of the trace: at `at_s`, this happened to a row, a frame or a pipeline."""

    at_s: float
    pipeline: int
    what: str
    number: int


@dataclass(frozen=True, slots=True)
class Simulated:
    """What a run came to."""

    rows: int
    output_tokens: int
    finish_s: float
    row_latency_s: tuple[float, float, float]
    """Median, 95th and 99th percentile of the time from a row's arrival or lease to its end."""
    first_token_s: tuple[float, float, float]
    """The same of the time to its first token."""
    mean_latency_s: float
    busy: dict[str, float]
    """Busy fraction of every stage (by node) and link (`a -> b`)."""
    steps: int
    replans: int = 0
    rows_again: int = 0
    """Rows that a change threw back into the queue."""
    trace: tuple[Event, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second of the whole run, loading, filling and tail included."""
        return self.output_tokens / self.finish_s

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.finish_s


def simulate(
    plan: Plan,
    cluster: Cluster,
    model: ModelShape,
    work: Workload,
    *,
    rows: Sequence[Row] | None = None,
    policy: Policy = "worthwhile",
    changes: Sequence[NodesChange] = (),
    trace: bool = False,
) -> Simulated:
    """Run the plan on imagined nodes until every row is answered.

    Rows are drawn from the workload with seed 0 unless given. After each change the rest of the
    work is planned again, by `replan`.

    Raises:
        InfeasibleError: the facts are impossible, or after the last change no plan fits any more.
    """
    given = problem(cluster, model, work)
    queue = sample_rows(work, 0) if rows is None else list(rows)
    return _Run(given, plan, queue, policy, sorted(changes, key=lambda c: c.at_s), trace).result()


@dataclass(slots=True)
class _Run:
    """The queue of rows and the pipelines that lease from it; mutable, alive for one run."""

    given: Problem
    plan: Plan
    rows: list[Row]
    policy: Policy
    changes: list[NodesChange]
    tracing: bool
    lines: dict[int, Line] = field(default_factory=dict)
    gone: list[Line] = field(default_factory=list)
    waiting: deque[Flight] = field(default_factory=deque)
    returning: dict[int, Flight] = field(default_factory=dict)
    """Rows of pipelines that are gone, until that is noticed."""
    desk: Desk = field(init=False)
    clock: list[tuple[float, int, int]] = field(default_factory=list)
    """(when, what, which): arrivals first, then changes, then looks at pipelines."""
    events: list[Event] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    steps: int = 0
    replans: int = 0
    rows_again: int = 0
    end_s: float = 0.0
    quota: int = 0
    """Tokens that any row may make, as far as its head knows."""
    longest: int = 0
    lines_made: int = 0

    def result(self) -> Simulated:
        """Run to the end and count."""
        outputs = self.given.work.output_tokens
        longest = max(1, *(row.output_tokens for row in self.rows))
        self.quota = max(longest, int(outputs.most)) if outputs.most < math.inf else longest
        self.longest = max(self._limit(row) for row in self.rows)
        ahead_s = AHEAD_S if self.policy == "worthwhile" else 0.0
        self.desk = Desk(long_row_tokens(self.given.work), ahead_s)
        self._schedule()
        for pipeline in self.plan.pipelines:
            self._open(pipeline, load_s(self.given, pipeline), 0.0)
        self._play()
        if self.waiting or len(self.latencies) < len(self.rows):
            left = len(self.rows) - len(self.latencies)
            raise InfeasibleError(
                f"{left} rows are left, and no node change brings a plan for them"
            )
        ways = [line.way for line in (*self.gone, *self.lines.values())]
        return Simulated(
            rows=len(self.rows),
            output_tokens=sum(row.output_tokens for row in self.rows),
            finish_s=self.end_s,
            row_latency_s=_percentiles(self.latencies),
            first_token_s=_percentiles(self.firsts),
            mean_latency_s=float(np.mean(self.latencies)),
            busy=busy_fractions(ways, self.end_s),
            steps=self.steps,
            replans=self.replans,
            rows_again=self.rows_again,
            trace=tuple(self.events),
        )

    def _flight(self, number: int, since_s: float) -> Flight:
        row = self.rows[number]
        return Flight(number, row.prompt_tokens, row.output_tokens, self._limit(row), since_s)

    def _limit(self, row: Row) -> int:
        """Tokens that a row may grow to: nobody knows its true length before."""
        return row.prompt_tokens + (row.quota or self.quota)

    def _schedule(self) -> None:
        """Put all arrivals and changes on the clock; rows that are there at once only queue."""
        # Longest expected first, as the job's order has it: true lengths are nobody's to know.
        order = sorted(range(len(self.rows)), key=self._order)
        for number in order:
            row = self.rows[number]
            if row.arrives_s > 0 or self.policy == "ws-rr":
                self.clock.append((row.arrives_s, _ARRIVAL, number))
            else:
                self.waiting.append(self._flight(number, float("nan")))
        self.clock.extend((c.at_s, _CHANGE, i) for i, c in enumerate(self.changes))
        self.clock.sort()

    def _order(self, number: int) -> tuple[float, float, int]:
        row = self.rows[number]
        rounds = most_rounds(row.prompt_tokens, row.quota or self.quota)
        return (row.arrives_s, -rounds, number)

    def _open(self, pipeline: Pipeline, starts_s: float, now: float) -> None:
        number, self.lines_made = self.lines_made, self.lines_made + 1
        line = Line(self.given, pipeline, number, self.longest, starts_s)
        self.lines[number] = line
        self.desk.enter(number, line.pace)
        self._wake(line, max(starts_s, now))

    def _wake(self, line: Line, at_s: float) -> None:
        if at_s < line.wakes_s:
            line.wakes_s = at_s
            heappush(self.clock, (at_s, _LOOK, line.number))

    def _play(self) -> None:
        while self.clock:
            now, what, which = heappop(self.clock)
            if what == _LOOK:
                line = self.lines.get(which)
                if line is not None and line.wakes_s == now:
                    self._look(line, now)
            elif what == _ARRIVAL:
                self._arrive(which, now)
            else:
                self._change(self.changes[which], now)

    def _look(self, line: Line, now: float) -> None:
        """All that a pipeline does at one moment, and when it must be looked at next."""
        line.wakes_s = float("inf")
        self._take_back(line, now)
        self._lease(line, now)
        if not self.waiting and self.policy == "worthwhile":
            self._even_out(now)
        sent = False
        if line.way.first_free_s <= now:
            step = line.send(now)
            sent = step is not None
            if step is not None:
                self.steps += 1
                self._note(now, line, "step", step.frame)
        way, free = line.way, max(line.way.first_free_s, now)
        if (sent or way.first_free_s > now) and way.in_flight < line.ring.shape.slots:
            self._wake(line, free)
        elif way.in_flight:
            self._wake(line, max(way.next_s, free))
        if way.moves_s < math.inf:
            self._wake(line, way.moves_s)

    def _arrive(self, number: int, now: float) -> None:
        """A row that came, or came back: to the pipeline that ends it first, or to who takes it."""
        flight = self.returning.pop(number, None)
        if flight is None:
            flight = self._flight(number, now)
        if self.policy == "ws-rr" and self.lines:
            line = self.lines[self.desk.least_wait_and_service(list(self.lines))]
            self._give(line, flight, now)
            self._wake(line, max(now, line.starts_s))
            return
        self.waiting.append(flight)
        for line in self.lines.values():
            if line.wakes_s == float("inf") and self.desk.room(line.number) > 0:
                self._wake(line, now)

    def _lease(self, line: Line, now: float) -> None:
        """Fill the pipeline's slots: small leases leave no one idle at the end."""
        while self.waiting and self.desk.room(line.number) > 0:
            if self.policy == "worthwhile" and not self.desk.worthwhile(
                line.number, len(self.waiting)
            ):
                return
            self._give(line, self.waiting.popleft(), now)

    def _even_out(self, now: float) -> None:
        """Have whoever would be last give rows that it has not begun to one that could begin them."""
        left = set(self.lines)
        while (move := self.desk.move(left, left)) is not None:
            left -= {move.giver, move.taker}
            giver, taker = self.lines[move.giver], self.lines[move.taker]
            for flight in giver.give_back(move.rows):
                self.desk.held[giver.number] -= 1
                self._give(taker, flight, now)
                self._wake(taker, max(now, taker.starts_s))

    def _give(self, line: Line, flight: Flight, now: float) -> None:
        if math.isnan(flight.since_s):
            flight.since_s = now
        line.take(flight)
        self.desk.held[line.number] += 1
        self._note(now, line, "lease", flight.number)

    def _take_back(self, line: Line, now: float) -> None:
        for at_s, flight in line.take_back(now):
            self.desk.held[line.number] -= 1
            self.latencies.append(at_s - flight.since_s)
            self.firsts.append(flight.first_s - flight.since_s)
            self._note(at_s, line, "end", flight.number)
            self.end_s = max(self.end_s, at_s)

    def _change(self, change: NodesChange, now: float) -> None:
        """Nodes left or came: plan the rest again; pipelines that stay in the plan go on."""
        for line in self.lines.values():
            self._take_back(line, now)
        left = len(self.rows) - len(self.latencies)
        if not left:
            return
        names = {node.name for node in change.cluster.nodes}
        dead = [n for n, line in self.lines.items() if not names >= {s.name for s in line.nodes}]
        noticed_s = now + LOST_AFTER_S if dead else now
        work = replace(self.given.work, rows=left)
        back = [row for number in dead for row in self._close(number, now)]
        try:
            self.given = problem(change.cluster, self.given.model, work)
            after = replan(self.plan, change.cluster, self.given.model, work)
        except InfeasibleError:
            # Nothing fits: the rows wait for the next change, if one comes.
            self.plan = replace(self.plan, pipelines=())
        else:
            if after.pays or not self.lines:
                back.extend(self._change_to(after.plan, noticed_s + after.load_s, now))
        self.replans += 1
        self.rows_again += len(back)
        for flight in back:
            self.returning[flight.number] = flight
            heappush(self.clock, (noticed_s, _ARRIVAL, flight.number))

    def _change_to(self, plan: Plan, starts_s: float, now: float) -> list[Flight]:
        """Close what the new plan has no more and open what it has new; gives the rows closed off."""
        dropped = [n for n, line in self.lines.items() if line.pipeline not in plan.pipelines]
        back = [row for number in dropped for row in self._close(number, now)]
        running = [line.pipeline for line in self.lines.values()]
        for pipeline in plan.pipelines:
            if pipeline not in running:
                self._open(pipeline, starts_s, now)
        self.plan = plan
        return back

    def _close(self, number: int, now: float) -> list[Flight]:
        """Take a pipeline out of the run; its rows come back with what they have made as prompt."""
        line = self.lines.pop(number)
        self.gone.append(line)
        self.desk.leave(number)
        self._note(now, line, "close", number)
        return line.give_up()

    def _note(self, at_s: float, line: Line, what: str, number: int) -> None:
        if self.tracing:
            self.events.append(Event(at_s, line.number, what, number))


def _percentiles(seconds: list[float]) -> tuple[float, float, float]:
    median, late, last = (float(q) for q in np.percentile(seconds, (50, 95, 99)))
    return median, late, last
