"""The plan that wins a rehearsal: candidates are simulated on sampled rows, and the first done wins.

The solver knows by arithmetic when a job is about done. What rings make of one another's leases, of
prompts that hold up decodes and of long rows that come last, only a simulation shows. Candidates are the
solver's plans, under several limits of rows in flight too, and the published methods'; the best is then
improved one setting at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from planner.baselines import baseline
from planner.cost import Cell
from planner.facts import Cluster, InfeasibleError, ModelShape, Workload
from planner.grid import cells
from planner.plan import Plan
from planner.problem import Problem, again, problem
from planner.replica_exact import REPLICA_NODES
from planner.ring import rings_of
from planner.rows import Row
from planner.simulate import simulate
from planner.solve import best_rings, compute_bound, plan_of, solve

QUICK_METHODS = ("cg-bp", "gbp-cr", "petals", "parallax")
"""Published methods whose plans are candidates too: they cost milliseconds."""
ROWS_IN_FLIGHT = (4, 16, 64)
"""Limits under which the solver is asked again: fewer rows in flight, quicker rounds."""
REHEARSED_ROWS = 1_000
"""Rows of a sample at most: beyond, start and tail no longer decide."""
MANY_NODES = 100
"""Above, the solver is asked once: each plan takes seconds."""
UNLIKELY = 1.5
"""A plan that is expected to end so much later than another is not rehearsed."""
HOPELESS = 0.06
"""A plan that is so far behind after the first sample is not played to the end: which rows turn out long
moves an end by half as much, for one plan this way and for another that."""
TRIALS = 12
"""Changes of one setting that are rehearsed, in all."""
WORTH = 0.005
"""A change must save so much: what saves less may only suit the samples."""
SHORTLIST = 3
"""Plans of which other rows choose one."""


@dataclass(frozen=True, slots=True)
class _Run:
    """A plan, when it ends each sample, and how long its rows take."""

    plan: Plan
    ends_s: tuple[float, ...]
    latency_s: float

    @property
    def mean_s(self) -> float:
        return fmean(self.ends_s)

    def and_then(self, stage: "_Stage") -> "_Run":
        """The same with that stage's samples besides, played to their end whatever comes of them."""
        more = stage.play(self.plan)
        assert more is not None, "there is none to beat"
        parts = [(run.latency_s, len(run.ends_s)) for run in (self, more)]
        ends_s = self.ends_s + more.ends_s
        return _Run(self.plan, ends_s, sum(s * n for s, n in parts) / len(ends_s))


@dataclass(frozen=True, slots=True)
class _Stage:
    """What a rehearsal needs: the problem, and the rows of each sample."""

    given: Problem
    samples: tuple[tuple[Row, ...], ...]

    def play(self, plan: Plan, beat: _Run | None = None) -> _Run | None:
        """The plan on all samples; None as soon as it is far behind the one to beat."""
        ends, latencies, given = list[float](), list[float](), self.given
        for i, rows in enumerate(self.samples):
            run = simulate(plan, given.cluster, given.model, given.work, rows=rows)
            ends.append(run.finish_s)
            latencies.append(run.mean_latency_s)
            if beat and sum(ends) > sum(beat.ends_s[: i + 1]) * (1.0 + HOPELESS / (i + 1)):
                return None
        return _Run(plan, tuple(ends), fmean(latencies))


def rehearsed(
    cluster: Cluster,
    model: ModelShape,
    workload: Workload,
    samples: Sequence[Sequence[Row]],
    *,
    others: Sequence[Sequence[Row]] = (),
    plans: Sequence[Plan] = (),
) -> Plan:
    """The plan that ends the sampled rows first, on average over the samples.

    It is one of `plans`, by default the candidates, or one of them with other settings. What was
    chosen for some rows may only suit these, so `others` have their say on the best few.

    Raises:
        InfeasibleError: the facts are impossible, or nothing fits; the message has the numbers.
    """
    given = problem(cluster, model, workload)
    stage = _Stage(given, tuple(tuple(rows) for rows in samples))
    plans = plans or candidates(cluster, model, workload)
    runs = _played(stage, plans)
    if (improved := _improved(stage, runs[0])) is not runs[0]:
        runs.insert(0, improved)
    if others:
        fresh = _Stage(given, tuple(tuple(rows) for rows in others))
        runs = _ranked([run.and_then(fresh) for run in runs[:SHORTLIST]])
    best = runs[0]
    over = best.plan.bound_over
    known = [plan.bound_tokens_per_s for plan in plans if plan.bound_over == over]
    bound = max(known[0], best.plan.tokens_per_s)
    whole = all(len(rows) == workload.rows for rows in samples)
    finish_s = best.mean_s if whole else best.plan.finish_s
    return replace(best.plan, bound_tokens_per_s=bound, finish_s=finish_s)


def _played(stage: _Stage, plans: Sequence[Plan]) -> list[_Run]:
    """Plans that are not far behind, ranked."""
    runs: list[_Run] = []
    soonest_s = min(plan.finish_s for plan in plans)
    for plan in (plan for plan in plans if plan.finish_s <= UNLIKELY * soonest_s):
        run = stage.play(plan, min(runs, key=lambda r: r.mean_s, default=None))
        runs.extend([run] if run else [])
    return _ranked(runs)


def _ranked(runs: list[_Run]) -> list[_Run]:
    """By their mean end; of equals, the quicker rows' first."""
    limit_s = min(run.mean_s for run in runs) * (1.0 + WORTH)
    equals = sorted((r for r in runs if r.mean_s <= limit_s), key=lambda r: r.latency_s)
    return [*equals, *sorted((r for r in runs if r.mean_s > limit_s), key=lambda r: r.mean_s)]


def candidates(cluster: Cluster, model: ModelShape, workload: Workload) -> list[Plan]:
    """The solver's plan first, then the others worth a rehearsal."""
    plans = [solve(cluster, model, workload)]
    if len(cluster.nodes) <= REPLICA_NODES:
        plans.append(solve(cluster, model, workload, replicate=True))
    for rows in ROWS_IN_FLIGHT:
        if rows < workload.rows and len(cluster.nodes) <= MANY_NODES:
            plans.extend(_with_rows_in_flight(cluster, model, workload, rows))
    for method in QUICK_METHODS:
        try:
            plans.append(baseline(method, cluster, model, workload))
        except InfeasibleError:
            continue
    return [plan for i, plan in enumerate(plans) if plan.pipelines not in _rings(plans[:i])]


def _rings(plans: list[Plan]) -> list[object]:
    return [plan.pipelines for plan in plans]


def _with_rows_in_flight(
    cluster: Cluster, model: ModelShape, workload: Workload, rows: int
) -> Iterator[Plan]:
    """The fastest rings of which none has more rows in flight, if there are any."""
    few = problem(cluster, model, replace(workload, rows=rows))
    rings = best_rings(few, cells(few.work))
    if rings:
        given = problem(cluster, model, workload)
        yield plan_of(given, rings, compute_bound(given, cells(workload)))


def _improved(stage: _Stage, best: _Run) -> _Run:
    """Hill climbing: one pipeline's setting at a time, as long as the rehearsal ends sooner."""
    left, move, since = TRIALS, 0, 0
    while left > 0 and since < len(best.plan.pipelines) * len(_MOVES):
        pipeline, step = divmod(move % (len(best.plan.pipelines) * len(_MOVES)), len(_MOVES))
        other = _moved(stage.given, best.plan, pipeline, _MOVES[step])
        move, since = move + 1, since + 1
        if other is None:
            continue
        left -= 1
        run = stage.play(other, best)
        if run and run.mean_s < best.mean_s * (1.0 - WORTH):
            # The same step again may help again.
            best, move, since = run, move - 1, 0
    return best


def _moved(given: Problem, plan: Plan, pipeline: int, step: tuple[int, int]) -> Plan | None:
    """The plan with one pipeline in a neighbouring cell, its layers split anew; None if it cannot."""
    rings = rings_of(given, plan)
    ring = rings[pipeline]
    cell = _neighbour(cells(given.work), ring.cell, step)
    if cell is None:
        return None
    moved = again(given, ring, cell)
    if moved is None:
        return None
    rings[pipeline] = moved
    return replace(plan_of(given, rings, 0.0), bound_over=plan.bound_over)


_MOVES = ((1, 0), (-1, 0), (0, -1), (0, 1))
"""Steps along the grid: micro-batch rows, and micro-batches in flight."""


def _neighbour(tried: tuple[Cell, ...], cell: Cell, step: tuple[int, int]) -> Cell | None:
    """The cell one setting larger or smaller on the grid, if there is one."""
    rows, slots = step
    if rows:
        batches = [c.micro_batch_rows for c in tried if c.in_flight == cell.in_flight]
        batch = _beside(batches, cell.micro_batch_rows, rows)
        return replace(cell, micro_batch_rows=batch) if batch else None
    depths = [c.in_flight for c in tried if c.micro_batch_rows == cell.micro_batch_rows]
    depth = _beside(depths, cell.in_flight, slots)
    return replace(cell, in_flight=depth) if depth else None


def _beside(values: list[int], value: int, step: int) -> int | None:
    """The next larger or smaller of some values."""
    larger = [v for v in values if (v - value) * step > 0]
    return min(larger, key=lambda v: abs(v - value), default=None)
