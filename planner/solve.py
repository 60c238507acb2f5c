"""The fastest plan for the facts at hand, and a bound on what any plan could reach."""

from dataclasses import replace

from planner.bounds import Floor, capped_compute_bound, cut_bound, floor_of
from planner.chain import best_split
from planner.cost import Cell, tokens_per_round
from planner.exact import EXACT_NODES, solve_exactly
from planner.explain import basis_lines, binding_words
from planner.facts import Cluster, ModelShape, Workload
from planner.grid import cells
from planner.infeasible import why_in_order, why_none
from planner.kinds import kinds_of, solve_by_kinds
from planner.large import solve_large
from planner.lengths import longest_tokens
from planner.plan import Plan
from planner.problem import (
    Problem,
    among,
    cell_costs,
    load_s,
    pass_s,
    pipeline_of,
    problem,
)
from planner.regions import certified, parts
from planner.ring import Found

SAME = 0.005
"""Rates and finish times this close count as equal; the calmer setting then wins."""


def solve(cluster: Cluster, model: ModelShape, workload: Workload) -> Plan:
    """The plan of most rows per second: pipelines, their nodes and order, layers and settings.

    Exact over the grid of settings for up to EXACT_NODES nodes, and for more of few kinds; else
    grown and repaired, with the bound to say how far from the optimum it may be. Nodes may be left
    out. Of its pipelines those are dropped that a job of so few rows would only wait for.

    Raises:
        InfeasibleError: the facts are impossible, or nothing fits; the message has the numbers.
    """
    given = problem(cluster, model, workload)
    tried = cells(workload)
    exact = len(given.nodes) <= EXACT_NODES
    kinds = None if exact else kinds_of(given)
    if exact or kinds:
        rings = solve_by_kinds(given, kinds, tried) if kinds else solve_exactly(given, tried)
        bound = sum(ring.rows_per_s for ring in rings)
    else:
        known = certified(given, tried)
        rings, bound = (
            solve_large(given, known.rings),
            min(compute_bound(given, tried), known.bound),
        )
    if not rings:
        raise why_none(given, tried)
    settled = [_settled(given, tried, ring) for ring in rings]
    return plan_of(given, first_done(given, settled), bound)


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
        split = best_split(cell_costs(given, cell).ring(order))
        if split is not None:
            found.append(Found(cell, order, split))
    if not found:
        raise why_in_order(given, tried)
    return plan_of(given, [_calmest(given, found)], compute_bound(given, tried))


def compute_bound(given: Problem, tried: tuple[Cell, ...]) -> float:
    """Rows per second that no plan over these cells can beat."""
    floor: Floor | None = None
    for cell in tried:
        least = floor_of(given.nodes, given.model, given.work, cell)
        floor = least.below(floor) if floor else least
    if floor is None:
        return 0.0
    capped = capped_compute_bound(floor)
    return min(capped, cut_bound(floor, parts(given, tried, capped)))


def plan_of(given: Problem, rings: list[Found], bound_rows_per_s: float) -> Plan:
    """The plan of these rings, fastest first, with what limits it and what it rests on."""
    rings = sorted(rings, key=lambda ring: (-ring.rows_per_s, ring.order))
    pipelines, limits = [], []
    for ring in rings:
        own, place = among(given, ring.order), tuple(range(len(ring.order)))
        costs = cell_costs(own, ring.cell)
        pipelines.append(pipeline_of(own, costs, place, ring.split))
        limits.append(binding_words(own, costs, place, ring.split))
    rows_per_s = sum(ring.rows_per_s for ring in rings)
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
    )


def finish_s(given: Problem, rings: list[Found]) -> float:
    """Seconds until rings that share the rows have answered them all.

    Each ring gives its rate from the end of its overhead on; none is done before its longest row.
    """
    return _finish_s(given, [(ring, _overhead_s(given, ring)) for ring in rings])


def _finish_s(given: Problem, rings: list[tuple[Found, float]]) -> float:
    rows = given.work.rows
    low, high = 0.0, max(o for _, o in rings) + rows * min(r.split.row_s for r, _ in rings)
    for _ in range(60):
        middle = (low + high) / 2.0
        done = sum(max(middle - overhead, 0.0) * ring.rows_per_s for ring, overhead in rings)
        low, high = (middle, high) if done < rows else (low, middle)
    return max(high, *(overhead + _last_life_s(given, ring) for ring, overhead in rings))


def _last_life_s(given: Problem, ring: Found) -> float:
    """The longest row's life, in a ring that few rows may not fill: it may meet the slowest ring."""
    filled = min(given.work.rows / ring.cell.rows, 1.0)
    longest = longest_tokens(given.work.output_tokens, given.work.rows)
    return ring.split.life_s * filled * longest / given.work.output_tokens.mean


def _overhead_s(given: Problem, ring: Found) -> float:
    """Load, one pass to fill the ring, and the tail.

    In the tail the longest rows (95th percentile) go on while the ring empties.
    """
    work = given.work
    own, place = among(given, ring.order), tuple(range(len(ring.order)))
    pipeline = pipeline_of(own, cell_costs(own, ring.cell), place, ring.split)
    one_pass = pass_s(given, ring.cell, ring.split.life_s)
    longer = max(work.output_tokens.p95 - work.output_tokens.mean, 0.0)
    tail = longer / tokens_per_round(work.acceptance, ring.cell.draft_len) * one_pass
    return load_s(given, pipeline) + one_pass + tail


def first_done(given: Problem, rings: list[Found]) -> list[Found]:
    """The rings without those that a job would only wait for at its end."""
    kept = [(ring, _overhead_s(given, ring)) for ring in rings]
    kept.sort(key=lambda one: one[1] + _last_life_s(given, one[0]))
    best = _finish_s(given, kept)
    while len(kept) > 1 and (shorter := _finish_s(given, kept[:-1])) < best:
        kept, best = kept[:-1], shorter
    return [ring for ring, _ in kept]


def _calmest(given: Problem, found: list[Found]) -> Found:
    """Of the settings that finish first, the calmest."""
    times = [finish_s(given, [ring]) for ring in found]
    limit = min(times) * (1.0 + SAME)
    return min((f for f, t in zip(found, times, strict=True) if t <= limit), key=_unrest)


def _settled(given: Problem, tried: tuple[Cell, ...], ring: Found) -> Found:
    """The same ring in the calmest of the cells that are as fast and differ in one setting."""
    own, place = among(given, ring.order), tuple(range(len(ring.order)))
    close, now = [ring], ring.cell
    for cell in tried:
        same_batch = cell.micro_batch_rows == now.micro_batch_rows
        if cell.draft_len != now.draft_len or not (same_batch or cell.in_flight == now.in_flight):
            continue
        split = best_split(cell_costs(own, cell).ring(place))
        if split and split.row_s <= ring.split.row_s * (1.0 + SAME):
            close.append(replace(ring, cell=cell, split=split))
    return min(close, key=_unrest)


def _unrest(ring: Found) -> tuple[bool, int, int]:
    """Calm is: one micro-batch more than the ring needs, as real steps jitter; then few rows."""
    cell = ring.cell
    needed = ring.split.life_s / (ring.split.row_s * cell.micro_batch_rows)
    slack = cell.in_flight >= min(needed + 1.0, len(ring.order) * 4.0)
    return (not slack, cell.rows, cell.in_flight)
