"""The plan that wins a rehearsal: candidates are simulated on sampled rows, and the first done wins.

The solver maximises a steady rate. A finite job also has a start and a tail: the last long rows go round
a ring that is no longer full, so a calmer ring with fewer rows in flight may be done sooner. How much
sooner only a simulation knows. Candidates are the solver's plans under several limits of rows in flight
and the published methods' plans; the best few are then improved one setting at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from planner.baselines import baseline
from planner.chain import best_split
from planner.cost import Cell
from planner.exact import EXACT_NODES, solve_exactly
from planner.facts import Cluster, InfeasibleError, ModelShape, Workload
from planner.grid import cells
from planner.large import solve_large
from planner.plan import Plan
from planner.problem import Problem, among, cell_costs, cell_of, judged, order_of, problem
from planner.ring import Found
from planner.rows import Row
from planner.simulate import simulate
from planner.solve import plan_of, solve

QUICK_METHODS = ("cg-bp", "gbp-cr", "petals", "parallax")
"""Published methods whose plans are candidates too: they cost milliseconds."""
ROWS_IN_FLIGHT = (4, 8, 16, 32, 64, 128)
"""Limits under which the solver is asked again: fewer rows in flight, quicker rounds."""
REHEARSED_ROWS = 1_000
"""Rows of a sample at most: beyond, start and tail no longer decide."""
FINALISTS = 3
"""Candidates that are rehearsed on all samples, and improved."""
TRIALS = 40
"""Changes of one setting that are rehearsed, in all."""


@dataclass(frozen=True, slots=True)
class _Stage:
    """What a rehearsal needs: the problem, and the rows of each sample."""

    given: Problem
    samples: tuple[tuple[Row, ...], ...]

    def finish_s(self, plan: Plan, samples: int) -> float:
        """Mean time to finish over the first so many samples."""
        runs = [
            simulate(plan, self.given.cluster, self.given.model, self.given.work, rows=rows)
            for rows in self.samples[:samples]
        ]
        return sum(run.finish_s for run in runs) / len(runs)


def rehearsed(
    cluster: Cluster, model: ModelShape, workload: Workload, samples: Sequence[Sequence[Row]]
) -> Plan:
    """The plan that ends the sampled rows first, on average over the samples.

    Raises:
        InfeasibleError: the facts are impossible, or nothing fits; the message has the numbers.
    """
    stage = _Stage(problem(cluster, model, workload), tuple(tuple(rows) for rows in samples))
    plans = candidates(cluster, model, workload)
    first = sorted(plans, key=lambda plan: stage.finish_s(plan, 1))[:FINALISTS]
    ends = {i: stage.finish_s(plan, len(samples)) for i, plan in enumerate(first)}
    best = min(ends, key=lambda i: ends[i])
    plan = _improved(stage, first[best], ends[best])
    return replace(plan, bound_tokens_per_s=max(plans[0].bound_tokens_per_s, plan.tokens_per_s))


def candidates(cluster: Cluster, model: ModelShape, workload: Workload) -> list[Plan]:
    """The solver's plan first, then the others worth a rehearsal."""
    plans = [solve(cluster, model, workload)]
    for rows in ROWS_IN_FLIGHT:
        if rows < workload.rows:
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
    exact = len(few.nodes) <= EXACT_NODES
    rings = solve_exactly(few) if exact else solve_large(few)
    if rings:
        yield plan_of(problem(cluster, model, workload), rings, 0.0)


def _improved(stage: _Stage, plan: Plan, finish_s: float) -> Plan:
    """Hill climbing: one pipeline's setting at a time, as long as the rehearsal ends sooner."""
    left, improving = TRIALS, True
    while improving and left > 0:
        improving = False
        for other in _variants(stage.given, plan):
            left -= 1
            ends_s = stage.finish_s(other, len(stage.samples))
            if ends_s < finish_s:
                plan, finish_s, improving = other, ends_s, True
                break
            if left <= 0:
                break
    return plan


def _variants(given: Problem, plan: Plan) -> Iterator[Plan]:
    """The plan with one pipeline in a neighbouring cell, or without its slowest pipeline."""
    rings = [
        Found(cell_of(pipeline), order_of(given, pipeline), judged(given, pipeline))
        for pipeline in plan.pipelines
    ]
    tried = cells(given.work)
    for i, ring in enumerate(rings):
        own, place = among(given, ring.order), tuple(range(len(ring.order)))
        for cell in _neighbours(tried, ring.cell):
            split = best_split(cell_costs(own, cell).ring(place))
            if split is not None:
                yield plan_of(
                    given, [*rings[:i], Found(cell, ring.order, split), *rings[i + 1 :]], 0.0
                )
    if len(rings) > 1:
        yield plan_of(given, rings[:-1], 0.0)


def _neighbours(tried: tuple[Cell, ...], cell: Cell) -> list[Cell]:
    """Cells with one setting a step smaller or larger."""
    batches = sorted({c.micro_batch_rows for c in tried if c.in_flight == cell.in_flight})
    depths = sorted({c.in_flight for c in tried if c.micro_batch_rows == cell.micro_batch_rows})
    near = [
        replace(cell, micro_batch_rows=rows) for rows in _beside(batches, cell.micro_batch_rows)
    ]
    return near + [replace(cell, in_flight=slots) for slots in _beside(depths, cell.in_flight)]


def _beside(values: list[int], value: int) -> list[int]:
    """The next smaller and the next larger of rising values."""
    smaller = [v for v in values if v < value][-1:]
    larger = [v for v in values if v > value][:1]
    return larger + smaller
