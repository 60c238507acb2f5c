"""A run of a plan, imagined event by event: the ring's own policy on facts instead of frames.

Every pipeline runs `schedule.Ring`, as its head does. Frames keep their order at every stage, codec
and link, so each of these is free again when the frame before has left it, and a step's whole way
round follows from the times at which they become free. Pipelines share the queue of rows by leases.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np

from planner.cost import FRAME_BYTES, ID_BYTES, ROW_BYTES
from planner.facts import Cluster, CodecRate, Lengths, ModelShape, Workload
from planner.layer_times import head_s, step_layer_s
from planner.lengths import spread
from planner.plan import Pipeline, Plan
from planner.problem import Problem, load_s, problem
from planner.schedule import CHUNK_TOKENS, Ring, RingShape, Step

BLOCK_TOKENS = 16
CHUNKS_PER_STEP = 2
"""Prefill chunks that may travel with a step's decodes."""
CONTEXT_GRAIN = 32
"""Mean contexts are rounded up to this, so that equal steps are costed once."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row to answer: its true lengths, and when it comes."""

    prompt_tokens: int
    output_tokens: int
    arrives_s: float = 0.0


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
    mean_latency_s: float
    busy: dict[str, float]
    """Busy fraction of every stage (by node) and link (`a -> b`)."""
    steps: int
    trace: tuple[Event, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second of the whole run, loading, filling and tail included."""
        return self.output_tokens / self.finish_s

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.finish_s


def sample_rows(work: Workload, seed: int) -> list[Row]:
    """Rows of lognormal lengths with the workload's mean and 95th percentile."""
    pick = np.random.default_rng(seed)
    prompts = _lengths(pick, work.prompt_tokens, work.rows)
    outputs = _lengths(pick, work.output_tokens, work.rows)
    return [Row(int(p), int(o)) for p, o in zip(prompts, outputs, strict=True)]


def _lengths(pick: np.random.Generator, lengths: Lengths, count: int) -> Iterator[float]:
    """Lognormal with the mean and, if it can have it, the 95th percentile; at least 1."""
    sigma = spread(lengths)
    drawn = pick.lognormal(np.log(lengths.mean) - sigma**2 / 2.0, sigma, count)
    return iter(np.maximum(np.rint(drawn), 1.0))


def simulate(
    plan: Plan,
    cluster: Cluster,
    model: ModelShape,
    work: Workload,
    *,
    seed: int = 0,
    rows: list[Row] | None = None,
    trace: bool = False,
) -> Simulated:
    """Run the plan on imagined nodes until every row is answered.

    Rows are drawn by `seed` from the workload unless given. Pipelines with a draft are run without.

    Raises:
        InfeasibleError: the facts are impossible.
    """
    given = problem(cluster, model, work)
    queue = sample_rows(work, seed) if rows is None else list(rows)
    return _Run(given, plan, queue, trace).result()


@dataclass(slots=True)
class _Station:
    """Something that does one thing at a time: a stage, a codec or a link."""

    name: str
    free_s: float = 0.0
    busy_s: float = 0.0

    def serve(self, arrives_s: float, takes_s: float) -> float:
        """When work that arrives then is done."""
        done = (self.free_s if self.free_s > arrives_s else arrives_s) + takes_s
        self.free_s = done
        self.busy_s += takes_s
        return done


@dataclass(frozen=True, slots=True)
class _Hop:
    """What lies between two stages."""

    encoder: _Station
    wire: _Station
    codec: CodecRate | None
    bytes_per_s: float
    latency_s: float

    def cross(self, at_s: float, raw_bytes: float, header_bytes: float) -> float:
        """When a frame that leaves then is decoded at the other end."""
        coding_s = raw_bytes / self.codec.bytes_per_s if self.codec else 0.0
        if coding_s:
            at_s = self.encoder.serve(at_s, coding_s)
        sent = raw_bytes / (self.codec.ratio if self.codec else 1.0) + header_bytes
        return self.wire.serve(at_s, sent / self.bytes_per_s) + self.latency_s + coding_s


class _Line:
    """One pipeline: its ring, its stations, and the rows it holds; only the run moves it."""

    def __init__(self, given: Problem, pipeline: Pipeline, number: int, longest: int) -> None:
        self.given = given
        self.number = number
        self.nodes = [given.cluster.node(stage.node) for stage in pipeline.stages]
        self.plan = pipeline.stages
        self.starts_s = load_s(given, pipeline)
        self.stages = [_Station(node.name, self.starts_s) for node in self.nodes]
        self.hops = _hops(given, pipeline)
        self.ring = Ring(_ring_shape(given, pipeline, longest))
        self.returns: list[tuple[float, int, Step]] = []
        self.taken: dict[int, Row] = {}
        self.left: dict[int, int] = {}
        self.since: dict[int, float] = {}
        self._takes: dict[tuple[int, int, int, int], tuple[float, ...]] = {}

    def next_s(self) -> float:
        """When something can happen here next; infinite while nothing can."""
        return self.returns[0][0] if self.returns else float("inf")

    def send(self, step: Step, at_s: float) -> None:
        """Carry a step round the ring; it is back when the head has its samples."""
        model = self.given.model
        decodes, context, prefills, samples = self._shape(step)
        takes = self._stage_times(decodes, context, prefills, samples)
        raw = (decodes + prefills) * model.activation_bytes_per_token
        header = FRAME_BYTES + ROW_BYTES * len(step.spans)
        for stage, station in enumerate(self.stages):
            at_s = station.serve(at_s, takes[stage])
            if stage < len(self.hops):
                last = stage == len(self.stages) - 1
                at_s = self.hops[stage].cross(at_s, ID_BYTES * samples if last else raw, header)
        heappush(self.returns, (at_s, step.frame, step))

    def _shape(self, step: Step) -> tuple[int, int, int, int]:
        """(decoding rows, their mean context, prefill tokens, sampled rows)."""
        decodes = total = prefills = samples = 0
        for span in step.spans:
            samples += span.samples
            if span.tokens == 1 and span.samples:
                decodes += 1
                total += span.start
            else:
                prefills += span.tokens
        context = -(-total // (decodes * CONTEXT_GRAIN)) * CONTEXT_GRAIN if decodes else 0
        return decodes, context, prefills, samples

    def _stage_times(
        self, decodes: int, context: int, prefills: int, samples: int
    ) -> tuple[float, ...]:
        key = (decodes, context, prefills, samples)
        if key not in self._takes:
            last = len(self.nodes) - 1
            self._takes[key] = tuple(
                self._stage_s(i, key)
                + (head_s(n, self.given.model, samples) if i == last and samples else 0.0)
                for i, n in enumerate(self.nodes)
            )
        return self._takes[key]

    def _stage_s(self, stage: int, key: tuple[int, int, int, int]) -> float:
        decodes, context, prefills, _ = key
        node, plan, model = self.nodes[stage], self.plan[stage], self.given.model
        prompt = self.given.work.prompt_tokens.mean
        compute = plan.layers * step_layer_s(node, model, (decodes, context), (prefills, prompt))
        streamed = plan.weights_offloaded * model.layer_bytes
        kv = decodes * context * model.kv_bytes_per_token_layer * plan.layers
        streamed += plan.kv_offloaded * kv
        stream_s = streamed / node.host_to_device_bytes_per_s if streamed else 0.0
        return max(compute, stream_s) + node.step_s


def _hops(given: Problem, pipeline: Pipeline) -> list[_Hop]:
    at = {node.name: i for i, node in enumerate(given.nodes)}
    hops = []
    for link in pipeline.links:
        i, j = at[link.source], at[link.target]
        name = f"{link.source} -> {link.target}"
        hops.append(
            _Hop(
                _Station(f"codec {name}"),
                _Station(name),
                given.work.codec.get(link.codec),
                float(given.net.bytes_per_s[i, j]),
                float(given.net.latency_s[i, j]),
            )
        )
    return hops


def _ring_shape(given: Problem, pipeline: Pipeline, longest: int) -> RingShape:
    """The ring's settings, as the head gets them: KV blocks for its rows at their 95 % lengths."""
    rows = pipeline.micro_batch_rows * pipeline.in_flight
    tokens = given.work.prompt_tokens.p95 + given.work.output_tokens.p95
    return RingShape(
        slots=pipeline.in_flight,
        slot_rows=pipeline.micro_batch_rows,
        blocks=int(max(rows * -(-tokens // BLOCK_TOKENS), -(-longest // BLOCK_TOKENS))),
        block_tokens=BLOCK_TOKENS,
        step_tokens=pipeline.micro_batch_rows + CHUNKS_PER_STEP * CHUNK_TOKENS,
    )


@dataclass(slots=True)
class _Run:
    """The queue of rows and the pipelines that lease from it."""

    given: Problem
    plan: Plan
    rows: list[Row]
    tracing: bool
    lines: list[_Line] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    steps: int = 0
    end_s: float = 0.0

    def result(self) -> Simulated:
        """Run to the end and count."""
        longest = max(self._limit(row) for row in self.rows)
        self.lines = [
            _Line(self.given, pipeline, number, longest)
            for number, pipeline in enumerate(self.plan.pipelines)
        ]
        self._play()
        latencies = np.array(self.latencies)
        stations = [s for line in self.lines for s in (*line.stages, *(h.wire for h in line.hops))]
        return Simulated(
            rows=len(self.rows),
            output_tokens=sum(row.output_tokens for row in self.rows),
            finish_s=self.end_s,
            row_latency_s=tuple(float(q) for q in np.percentile(latencies, (50, 95, 99))),  # type: ignore[arg-type]
            mean_latency_s=float(latencies.mean()),
            busy={station.name: station.busy_s / self.end_s for station in stations},
            steps=self.steps,
            trace=tuple(self.events),
        )

    def _limit(self, row: Row) -> int:
        """Tokens that a row's blocks are granted for: nobody knows its true length before."""
        output = max(row.output_tokens, int(self.given.work.output_tokens.p95))
        return row.prompt_tokens + max(output, 1)

    def _play(self) -> None:
        # Longest expected first, as the job's order has it, and by arrival where rows come online.
        waiting = deque(sorted(range(len(self.rows)), key=self._order))
        clock: list[tuple[float, int]] = [(line.starts_s, line.number) for line in self.lines]
        clock.sort()
        while clock:
            now, number = heappop(clock)
            line = self.lines[number]
            self._take_back(line, now)
            self._lease(line, waiting, now)
            sent = self._send(line, now)
            upcoming = self._wakes(line, waiting, now, sent)
            if upcoming < float("inf"):
                heappush(clock, (upcoming, number))

    def _order(self, number: int) -> tuple[float, int, int]:
        row = self.rows[number]
        return (row.arrives_s, -self._limit(row), number)

    def _wakes(self, line: _Line, waiting: deque[int], now: float, sent: bool) -> float:
        """When a pipeline must be looked at again."""
        free = line.stages[0].free_s
        if sent:
            return max(free, now)
        upcoming = line.next_s()
        if waiting and self.rows[waiting[0]].arrives_s > now:
            upcoming = min(upcoming, self.rows[waiting[0]].arrives_s)
        return max(upcoming, free) if upcoming < float("inf") else upcoming

    def _lease(self, line: _Line, waiting: deque[int], now: float) -> None:
        """Top the pipeline's queue up to one micro-batch: small leases leave no one idle at the end."""
        shape = line.ring.shape
        room = shape.slots * shape.slot_rows - line.ring.live - line.ring.queued
        while waiting and room > 0 and self.rows[waiting[0]].arrives_s <= now:
            number = waiting.popleft()
            row = self.rows[number]
            line.ring.enqueue(number, row.prompt_tokens, self._limit(row))
            line.taken[number], line.left[number] = row, row.output_tokens
            line.since[number] = max(row.arrives_s, 0.0) if row.arrives_s else now
            room -= 1
            self._note(now, line, "lease", number)

    def _send(self, line: _Line, now: float) -> bool:
        if line.stages[0].free_s > now:
            return False
        step = line.ring.next_step()
        if step is None:
            return False
        self.steps += 1
        self._note(now, line, "step", step.frame)
        line.send(step, now)
        return True

    def _take_back(self, line: _Line, now: float) -> None:
        while line.returns and line.returns[0][0] <= now:
            at_s, _, step = heappop(line.returns)
            ended = []
            for span in step.spans:
                if span.samples:
                    line.left[span.sequence] -= 1
                    if line.left[span.sequence] == 0:
                        ended.append(span.sequence)
            line.ring.returned(step.slot, ended)
            for number in ended:
                self.latencies.append(at_s - line.since.pop(number))
                del line.taken[number], line.left[number]
                self._note(at_s, line, "end", number)
            self.end_s = max(self.end_s, at_s)

    def _note(self, at_s: float, line: _Line, what: str, number: int) -> None:
        if self.tracing:
            self.events.append(Event(at_s, line.number, what, number))
