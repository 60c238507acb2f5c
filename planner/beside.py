"""Pipelines of given nodes, side by side: only their layers and settings are left to choose."""

import math
from collections.abc import Sequence
from dataclasses import replace

from planner.chain import best_split
from planner.cost import Cell
from planner.facts import Cluster, ModelShape, Workload
from planner.grid import cells
from planner.infeasible import why_in_order
from planner.plan import Plan
from planner.problem import Found, Problem, among, problem, ring_in
from planner.settle import soonest
from planner.solve import compute_bound, plan_of


def solve_beside(
    cluster: Cluster, model: ModelShape, workload: Workload, orders: Sequence[tuple[int, ...]]
) -> Plan:
    """A pipeline through the nodes of each of these numbers, in that order, none in two of them.

    Each is the one that ends an equal share of the rows first alone, exact over the grid of
    settings. The bound is over all plans on all nodes of the cluster.

    Raises:
        InfeasibleError: the facts are impossible, or a pipeline does not fit; with the numbers.
    """
    given = problem(cluster, model, workload)
    share = replace(workload, rows=math.ceil(workload.rows / len(orders)))
    tried = cells(share)
    rings = [_fastest(replace(given, work=share), tried, order) for order in orders]
    return plan_of(given, rings, compute_bound(given, tried))


def _fastest(given: Problem, tried: tuple[Cell, ...], order: tuple[int, ...]) -> Found:
    splits = ((cell, best_split(ring_in(given, cell, order))) for cell in tried)
    found = [Found(cell, order, split) for cell, split in splits if split is not None]
    if not found:
        raise why_in_order(among(given, order), tried)
    return soonest(given, found)
