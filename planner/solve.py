"""The fastest plan for the facts at hand, and a bound on what any plan could reach."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import reduce

import numpy as np

from planner.bounds import Floor, capped_compute_bound, cut_bound, floor_of
from planner.chain import best_split
from planner.cost import Cell
from planner.exact import EXACT_NODES, solve_exactly
from planner.explain import basis_lines, binding_words
from planner.facts import Cluster, ModelShape, Workload
from planner.finish import finish_s, first_done
from planner.grid import cells, grid_words
from planner.infeasible import why_in_order, why_none
from planner.kinds import kinds_of, solve_by_kinds
from planner.large import Effort, solve_large
from planner.plan import Plan
from planner.problem import (
    Found,
    Problem,
    pipeline_of,
    problem,
    ring_in,
)
from planner.regions import Certified, certified, parts
from planner.replica_exact import REPLICA_NODES
from planner.replica_search import with_replicas
from planner.settle import settled, soonest

FEWER_ROWS = (8, 32, 128)
FEW_NODES, FEW_JOB_ROWS = 48, 2_000
"""Up to so many nodes and rows the solver is also asked for rings of fewer rows, in a few seconds."""


def solve(
    cluster: Cluster, model: ModelShape, workload: Workload, *, replicate: bool = False
) -> Plan:
    """The plan of most rows per second: pipelines, their nodes and order, layers and settings.

    Without replicas, as a ring can run today, it is exact over the grid of settings for up to
    EXACT_NODES nodes, and for more of few kinds; else grown and repaired, with the bound to say how
    far from the optimum it may be. Nodes may be left out. Of its pipelines those are dropped that a
    job of so few rows would only wait for, and a job of few rows gets fewer in flight where it is done
    sooner so: its plan may then be slower than the bound on rates allows.

    With `replicate` stages may have replicas where that ends the job sooner: exact, with those, for
    up to REPLICA_NODES nodes, and beyond searched for from the plan without. The bound then holds for
    plans with replicas too, and what is known of plans without is in the basis.

    Raises:
        InfeasibleError: the facts are impossible, or nothing fits; the message has the numbers.
    """
    given = problem(cluster, model, workload)
    tried = cells(workload)
    exact = len(given.nodes) <= EXACT_NODES or kinds_of(given) is not None
    known = Certified(np.inf, []) if exact else certified(given, tried)
    rings = best_rings(given, tried, known.rings)
    if not rings:
        raise why_none(given, tried)
    bound = _rate(rings) if exact else min(compute_bound(given, tried), known.bound)
    options = [rings, *_fewer_in_flight(given)]
    plain = _soonest_plan(given, tried, options, bound)
    return _replicated(given, tried, rings, plain) if replicate else plain


def _soonest_plan(
    given: Problem, tried: tuple[Cell, ...], options: list[list[Found]], bound: float
) -> Plan:
    plans = [plan_of(given, suited(given, tried, option), bound) for option in options]
    return min(plans, key=lambda plan: plan.finish_s)


def _fewer_in_flight(given: Problem) -> Iterator[list[Found]]:
    """The fastest rings of fewer rows each, which go round sooner, for a job that is soon over."""
    if len(given.nodes) > FEW_NODES or given.work.rows > FEW_JOB_ROWS:
        return
    for rows in (rows for rows in FEWER_ROWS if rows < given.work.rows):
        few = replace(given, work=replace(given.work, rows=rows))
        some = tuple(cell for cell in cells(few.work) if cell.rows > rows // 4)
        yield from filter(None, [best_rings(few, some)])


def _replicated(given: Problem, tried: tuple[Cell, ...], rings: list[Found], plain: Plan) -> Plan:
    """The plan without replicas, or one with some that is done sooner; under a bound on both."""
    if len(given.nodes) <= REPLICA_NODES:
        rings = solve_exactly(given, tried, replicate=True)
        bound, known = _rate(rings), list[str]()
    else:
        rings, bound = with_replicas(given, tried, rings), capped_bound(given, tried)
        known = [
            f"without replicas no plan beats {plain.bound_tokens_per_s:.4g} tokens/s; of those with "
            "replicas only some were tried, and what all nodes compute at best bounds them"
        ]
    best = min(_soonest_plan(given, tried, [rings], bound), plain, key=lambda plan: plan.finish_s)
    tokens = max(bound * given.work.output_tokens.mean, best.tokens_per_s)
    over, basis = "with replicas or without", (*best.basis, *known)
    return replace(best, bound_tokens_per_s=tokens, bound_over=over, basis=basis)


def best_rings(
    given: Problem,
    tried: tuple[Cell, ...],
    start: Sequence[Found] = (),
    *,
    replicate: bool = False,
    effort: Effort | None = None,
) -> list[Found]:
    """Disjoint rings of the greatest total rate, and no certificate; empty if none fits.

    Where the search is not exact it ends no slower than `start`, rings that can run here, takes the
    pains that `effort` says, by default as many as there are nodes for, and looks at the whole grid.
    """
    nodes = len(given.nodes)
    if nodes <= (REPLICA_NODES if replicate else EXACT_NODES):
        return solve_exactly(given, tried, replicate=replicate)
    if replicate:
        undealt = [ring for ring in start if not ring.dealt]
        plain = best_rings(given, tried, undealt, effort=effort)
        return with_replicas(given, tried, max(start, plain, key=_rate))
    kinds = kinds_of(given)
    return solve_by_kinds(given, kinds, tried) if kinds else solve_large(given, start, effort)


def suited(given: Problem, tried: tuple[Cell, ...], rings: list[Found]) -> list[Found]:
    """The rings in calm settings, without those that a job would only wait for at its end."""
    return first_done(given, settled(given, tried, rings))


def solve_in_order(
    cluster: Cluster,
    model: ModelShape,
    workload: Workload,
    *,
    micro_batch_rows: int | None = None,
    in_flight: int | None = None,
    draft_len: int = 0,
) -> Plan:
    """One pipeline through all nodes in the given order, each with at least one layer.

    Exact over the grid of micro-batch rows and micro-batches in flight (or those given): layers,
    offload and codecs are the ones of least time per row, and of all settings the one that
    finishes the workload first. The bound is over all plans on these nodes, in any order.

    Raises:
        InfeasibleError: the facts are impossible, or nothing fits; the message has the numbers.
    """
    given = problem(cluster, model, workload)
    order = tuple(range(len(given.nodes)))
    tried = cells(workload, micro_batch_rows, in_flight, (draft_len,))
    found: list[Found] = []
    for cell in tried:
        split = best_split(ring_in(given, cell, order))
        if split is not None:
            found.append(Found(cell, order, split))
    if not found:
        raise why_in_order(given, tried)
    return plan_of(given, [soonest(given, found)], compute_bound(given, tried), tried)


def compute_bound(given: Problem, tried: tuple[Cell, ...]) -> float:
    """Rows per second that no plan without replicas over these cells can beat."""
    floor = floor_of_cells(given, tried)
    if floor is None:
        return 0.0
    capped = capped_compute_bound(floor)
    return min(capped, cut_bound(floor, parts(given, tried, capped)))


def floor_of_cells(given: Problem, tried: tuple[Cell, ...]) -> Floor | None:
    """The least that stages without replicas cost over these cells; None where there are none."""
    # Fewer micro-batches in flight leave more memory: a stage never costs less with more of them.
    fewest: dict[tuple[int, int], Cell] = {}
    for cell in sorted(tried, key=lambda cell: -cell.in_flight):
        fewest[cell.micro_batch_rows, cell.draft_len] = cell
    return _floor(given, fewest.values())


def capped_bound(given: Problem, tried: tuple[Cell, ...]) -> float:
    """Rows per second that no plan over these cells can beat, with replicas or without.

    A replica may have a single slot, so every stage is let have no more in flight. Slow links bound
    nothing here: replicas share what crosses between groups of nodes among many.
    """
    floor = _floor(given, {replace(cell, in_flight=1) for cell in tried})
    return capped_compute_bound(floor) if floor else 0.0


def _floor(given: Problem, some: Iterable[Cell]) -> Floor | None:
    floors = [floor_of(given.nodes, given.model, given.work, cell) for cell in some]
    return reduce(Floor.below, floors) if floors else None


def plan_of(
    given: Problem,
    rings: list[Found],
    bound_rows_per_s: float,
    tried: tuple[Cell, ...] | None = None,
) -> Plan:
    """The plan of these rings, fastest first, with what limits it and what it rests on.

    The bound is over the cells `tried`, by default the whole grid.
    """
    rings = sorted(rings, key=lambda ring: (-ring.rows_per_s, ring.order))
    pipelines, limits = [], []
    for ring in rings:
        pipelines.append(pipeline_of(given, ring))
        limits.append(binding_words(given, ring))
    rows_per_s = _rate(rings)
    tokens = given.work.output_tokens.mean
    words = limits if len(limits) == 1 else [f"pipeline {i}: {w}" for i, w in enumerate(limits)]
    return Plan(
        pipelines=tuple(pipelines),
        rows_per_s=rows_per_s,
        tokens_per_s=rows_per_s * tokens,
        finish_s=finish_s(given, rings),
        # Bisection ends a rounding error away from an optimum that a plan may attain.
        bound_tokens_per_s=max(bound_rows_per_s, rows_per_s) * tokens,
        binding="; ".join(words),
        basis=basis_lines(given, rings[0].cell),
        grid=grid_words(tried or cells(given.work), given.work),
    )


def _rate(rings: Sequence[Found]) -> float:
    return sum(ring.rows_per_s for ring in rings)
