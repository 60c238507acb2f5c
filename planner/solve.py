"""The fastest plan for the facts at hand, and a bound on what any plan could reach."""

from dataclasses import dataclass

from planner.bounds import Floor, capped_compute_bound, floor_of
from planner.chain import Split, best_split
from planner.cost import Cell, tokens_per_round
from planner.explain import basis_lines, binding_words
from planner.facts import Cluster, ModelShape, Workload
from planner.grid import cells
from planner.infeasible import why_in_order
from planner.plan import Pipeline, Plan
from planner.problem import CellCosts, Problem, cell_costs, load_s, pass_s, pipeline_of, problem

SAME = 0.005
"""Finish times this close count as equal; the calmer setting then wins."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    costs: CellCosts
    split: Split
    pipeline: Pipeline
    finish_s: float

    @property
    def cell(self) -> Cell:
        return self.costs.cell

    @property
    def has_slack(self) -> bool:
        """Whether one more micro-batch than the ring needs is in flight: real steps jitter."""
        cell = self.costs.cell
        ring_needs = self.split.life_s / (self.split.row_s * cell.micro_batch_rows)
        return cell.in_flight >= min(ring_needs + 1.0, len(self.pipeline.stages) * 4.0)


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
    finishes the workload first.

    Raises:
        InfeasibleError: the facts are impossible, or nothing fits; the message has the numbers.
    """
    given = problem(cluster, model, workload)
    order = tuple(range(len(given.nodes)))
    found: list[_Candidate] = []
    floor: Floor | None = None
    for cell in cells(workload, micro_batch_rows, in_flight, (draft_len,)):
        costs = cell_costs(given, cell)
        least = floor_of(given.nodes, model, workload, cell)
        floor = least.below(floor) if floor else least
        split = best_split(costs.ring(order))
        if split is not None:
            found.append(_candidate(given, costs, order, split))
    if not found:
        raise why_in_order(given, cells(workload, micro_batch_rows, in_flight, (draft_len,)))
    assert floor is not None
    return _plan(given, order, _calmest(found), capped_compute_bound(floor))


def _candidate(
    given: Problem, costs: CellCosts, order: tuple[int, ...], split: Split
) -> _Candidate:
    pipeline = pipeline_of(given, costs, order, split)
    return _Candidate(costs, split, pipeline, finish_s(given, costs.cell, split, pipeline))


def finish_s(given: Problem, cell: Cell, split: Split, pipeline: Pipeline) -> float:
    """Seconds to answer all rows: load, one pass to fill the ring, the rows, and the tail.

    In the tail the longest rows (95th percentile) go on while the ring empties.
    """
    work = given.work
    one_pass = pass_s(given, cell, split.life_s)
    longer = max(work.output_tokens.p95 - work.output_tokens.mean, 0.0)
    tail = longer / tokens_per_round(work.acceptance, cell.draft_len) * one_pass
    return load_s(given, pipeline) + one_pass + work.rows * split.row_s + tail


def _calmest(found: list[_Candidate]) -> _Candidate:
    """Among the settings that finish first: slack in flight, then the fewest rows in flight."""
    first = min(candidate.finish_s for candidate in found)
    close = [c for c in found if c.finish_s <= first * (1.0 + SAME)]
    return min(close, key=lambda c: (not c.has_slack, c.cell.rows, c.cell.in_flight))


def _plan(
    given: Problem, order: tuple[int, ...], best: _Candidate, bound_rows_per_s: float
) -> Plan:
    rows_per_s = 1.0 / best.split.row_s
    tokens = given.work.output_tokens.mean
    return Plan(
        pipelines=(best.pipeline,),
        rows_per_s=rows_per_s,
        tokens_per_s=rows_per_s * tokens,
        finish_s=best.finish_s,
        # Bisection ends a rounding error away from the optimum that a plan may attain.
        bound_tokens_per_s=max(bound_rows_per_s, rows_per_s) * tokens,
        binding=binding_words(given, best.costs, order, best.split),
        basis=basis_lines(given, best.costs.cell),
    )
