"""Unequal pipelines share a job's rows: pulled by lease, and taken back at the end, or split before.

    python -m benchmarks.pulled

One pipeline of one stage and one of two slower ones, over the loopback. Stages only take their time,
C(n) as in `ring`; driver, heads, scheduler, frames and sockets are real. A split gives each pipeline
its rows at once, in proportion to the speed that the plan foresees; the same rows are then pulled.
Once the plan is right, and once the second pipeline is slower than the plan says.
"""

import math
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from benchmarks.activations import EXAMPLE
from benchmarks.pipelines import greedy_row
from benchmarks.record import Claim, record
from benchmarks.ring_arithmetic import HIDDEN, stage_s
from benchmarks.ring_stage import Order, TimedCompute
from flows.dealing import Dealer
from flows.launch import Fleet, StageSettings
from planner.facts import Cluster, LayerTimes, Lengths, Link, ModelShape, Node, Workload
from planner.leases import pace_of
from planner.plan import LinkPlan, Pipeline, Plan, StagePlan
from planner.problem import problem
from planner.rows import Row
from planner.simulate import simulate
from stages.codec import RAW
from stages.config import Ring, StageSpec
from stages.control import LeasedRow
from stages.worker import Worker

BLOCK_TOKENS = 16
QUOTAS = (24, 48, 96)
ROWS = 420
SLOT_ROWS = 16
SLOWED = 1.5
KNOWN_GAIN, GAIN = 0.9, 1.2
"""A split by speeds that are known exactly, of rows whose lengths are, is hard to beat."""
SHARE = 0.1
FORECAST = 0.15
WAIT_S = 60.0
_STEPS = (1, 8, 32, 64)
_AMPLE = 1e15


@dataclass(frozen=True, slots=True)
class Line:
    """A pipeline of timed stages."""

    paces: tuple[float, ...]
    """Of each stage, times C(n)."""
    slots: int

    def slowed(self, times: float) -> "Line":
        """The same, every stage that much slower."""
        return Line(tuple(times * pace for pace in self.paces), self.slots)


LINES = (Line((0.25,), 2), Line((0.5, 0.5), 4))


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of it."""

    seconds: float
    """From the first lease to the last answer."""
    share: float
    """Of all tokens, the first pipeline's."""


class Rows:
    """A source of rows, in order."""

    def __init__(self, rows: Sequence[LeasedRow]) -> None:
        self._rows = deque(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, _pipeline: int) -> LeasedRow | None:
        """The next one, whoever asks."""
        return self._rows.popleft() if self._rows else None


def plan_of(lines: Sequence[Line]) -> Plan:
    """The lines as pipelines: stages p0-0, p1-0, p1-1."""
    pipelines = []
    for number, line in enumerate(lines):
        names = [f"p{number}-{stage}" for stage in range(len(line.paces))]
        # Every pipeline has the same two layers: one stage's times are those of both.
        bounds = [2 * stage // len(names) for stage in range(len(names) + 1)]
        stages = tuple(map(StagePlan, names, bounds, bounds[1:]))
        ends = zip(names, [*names[1:], names[0]], strict=True) if len(names) > 1 else ()
        links = tuple(LinkPlan(here, there, RAW) for here, there in ends)
        pipelines.append(Pipeline(stages, links, SLOT_ROWS, line.slots))
    return Plan(tuple(pipelines), 0.0, 0.0, 0.0, 0.0, "")


def facts_of(lines: Sequence[Line], plan: Plan) -> tuple[Cluster, ModelShape, Workload]:
    """What a planner would have measured."""
    nodes = []
    for line, pipeline in zip(lines, plan.pipelines, strict=True):
        for pace, stage in zip(line.paces, pipeline.stages, strict=True):
            layer = pace / stage.layers
            decode = tuple((rows, 1, layer * stage_s(rows)) for rows in _STEPS)
            prefill = tuple((tokens, layer * stage_s(tokens)) for tokens in _STEPS)
            times = LayerTimes(prefill, decode)
            nodes.append(Node(stage.node, _AMPLE, _AMPLE, _AMPLE, layer_s=times))
    model = ModelShape(
        layers=2, hidden=HIDDEN, layer_bytes=1.0, kv_bytes_per_token_layer=1.0,
        activation_value_bytes=2, embedding_bytes=0.0, head_bytes=0.0, flop_per_token_layer=1.0,
    )  # fmt: skip
    outputs = Lengths(sum(QUOTAS) / len(QUOTAS), float(max(QUOTAS)), float(max(QUOTAS)))
    work = Workload(ROWS, Lengths(1.0, 1.0), outputs)
    return Cluster(tuple(nodes), default_link=Link("", "", 1e-4, 1e9)), model, work


def rows_of() -> list[LeasedRow]:
    """Rows of one prompt token, as many of each quota, the longest first."""
    quotas = sorted((QUOTAS[number % len(QUOTAS)] for number in range(ROWS)), reverse=True)
    return [greedy_row(n, [n % 4000 + 1], quota) for n, quota in enumerate(quotas)]


class Site:
    """Timed stages as threads of this process, run after run."""

    def __init__(self, folder: Path) -> None:
        self._activations = folder / "activations.npy"
        states = np.arange(4096 * HIDDEN, dtype=np.uint16)
        np.save(self._activations, states.reshape(1, 4096, HIDDEN))

    def ran(self, lines: Sequence[Line], planned: Sequence[Line], pulled: bool) -> Ran:
        """The job over the lines, by what the planned ones foresee."""
        plan = plan_of(lines)
        paces = {
            stage.node: pace
            for line, pipeline in zip(lines, plan.pipelines, strict=True)
            for pace, stage in zip(line.paces, pipeline.stages, strict=True)
        }

        def start(member: str, spec_path: str) -> None:
            spec = StageSpec.model_validate_json(Path(spec_path).read_text(encoding="utf-8"))
            order = Order("", str(self._activations), "", (RAW,), paces[member])
            worker = Worker(spec, load=lambda spec: TimedCompute(order, spec))
            worker.levels = (RAW,)
            worker.live()

        settings = StageSettings("pulled", EXAMPLE, "float16", 1)
        with Fleet(plan, [_ring(line) for line in lines], settings, start) as fleet:
            fleet.start()
            return _pulled(fleet, planned) if pulled else _split(fleet, planned)


def _pulled(fleet: Fleet, planned: Sequence[Line]) -> Ran:
    plan = plan_of(planned)
    cluster, model, work = facts_of(planned, plan)
    given = problem(cluster, model, work)
    source = Rows(rows_of())
    dealer = Dealer(fleet, [pace_of(given, each) for each in plan.pipelines], work)
    started_s, tokens = time.monotonic(), [0, 0]
    while source or dealer.rows:
        dealer.fill(source)
        for told in dealer.news(WAIT_S):
            tokens[told.pipeline] += told.answer.output_tokens
    return Ran(time.monotonic() - started_s, tokens[0] / sum(tokens))


def _split(fleet: Fleet, planned: Sequence[Line]) -> Ran:
    rows, shares = rows_of(), shares_of(planned)
    ends = [round(len(rows) * share) for share in accumulate(shares, initial=0.0)]
    # Dealt like cards, so that no pipeline has the longer rows.
    order = np.argsort([number * 0.618034 % 1.0 for number in range(len(rows))])
    started_s, tokens, left = time.monotonic(), [0, 0], len(rows)
    for number, (first, end) in enumerate(pairwise(ends)):
        fleet.lease(number, [rows[place] for place in sorted(order[first:end])])
    while left:
        news = fleet.news(WAIT_S)
        tokens[news.pipeline] += sum(answer.output_tokens for answer in news.answers)
        left -= len(news.answers)
    return Ran(time.monotonic() - started_s, tokens[0] / sum(tokens))


def shares_of(lines: Sequence[Line]) -> list[float]:
    """Each pipeline's part of the speed of all."""
    plan = plan_of(lines)
    cluster, model, work = facts_of(lines, plan)
    rates = [1.0 / pace_of(problem(cluster, model, work), p).row_s for p in plan.pipelines]
    return [rate / sum(rates) for rate in rates]


def forecast_s(lines: Sequence[Line]) -> float:
    """What the simulator expects the pulled job to take."""
    plan = plan_of(lines)
    cluster, model, work = facts_of(lines, plan)
    rows = [Row(1, each, quota=each) for each in (row.max_new_tokens for row in rows_of())]
    return simulate(plan, cluster, model, work, rows=rows).finish_s


def full_s(lines: Sequence[Line]) -> float:
    """The job's seconds if every pipeline were full to the end: as fast as its slowest stage."""
    rate = sum(SLOT_ROWS / (max(line.paces) * stage_s(SLOT_ROWS)) for line in lines)
    return sum(row.max_new_tokens for row in rows_of()) / rate


def claims_of(
    name: str, site: Site, lines: Sequence[Line], planned: Sequence[Line], gain: float
) -> list[Claim]:
    """One pair of pipelines, pulled and split: by how much the first should be the faster."""
    pulled, split = (site.ran(lines, planned, pulled=each) for each in (True, False))
    return [
        Claim(f"{name}: pulled", pulled.seconds, "s"),
        Claim(f"{name}: split", split.seconds, "s"),
        Claim(f"{name}: pulled, times as fast as split", split.seconds / pulled.seconds, "ratio", gain),
        Claim(f"{name}: of full pipelines to the end", full_s(lines) / pulled.seconds, "ratio"),
        Claim(f"{name}: the first pipeline's share of the tokens, over its share of the speed",
              pulled.share / shares_of(lines)[0], "ratio", 1 - SHARE, 1 + SHARE),
        Claim(f"{name}: simulated, over measured", forecast_s(lines) / pulled.seconds, "ratio",
              1 - FORECAST, 1 + FORECAST),
    ]  # fmt: skip


def _ring(line: Line) -> Ring:
    each = math.ceil((1 + max(QUOTAS)) / BLOCK_TOKENS)
    return Ring(
        slots=line.slots,
        slot_rows=SLOT_ROWS,
        blocks=line.slots * SLOT_ROWS * each,
        block_tokens=BLOCK_TOKENS,
        step_tokens=SLOT_ROWS + 128,
    )


def main() -> None:
    """Measure both pairs."""
    slower = (LINES[0], LINES[1].slowed(SLOWED))
    with tempfile.TemporaryDirectory() as folder:
        site = Site(Path(folder))
        record("pulled", [
            *claims_of("as planned", site, LINES, LINES, KNOWN_GAIN),
            *claims_of(f"the second {SLOWED} times slower than planned", site, slower, LINES, GAIN),
        ])  # fmt: skip


if __name__ == "__main__":
    main()
