"""The bound by integer program: above every plan, below what all nodes compute."""

from dataclasses import replace
from functools import reduce

import numpy as np
import pytest

from planner.bounds import Floor, capped_compute_bound, floor_of
from planner.cost import Cell
from planner.exact import solve_exactly
from planner.milp_bound import flow_bound
from planner.problem import Problem, problem
from tests.planner_oracle import random_case

pytest.importorskip("highspy")

GRID = (Cell(1, 1), Cell(4, 2), Cell(16, 8))
LIMIT_S = 30.0


def floor(given: Problem, *, one_slot: bool) -> Floor:
    """The least that stages cost in the grid; of replicas, which may have a single slot."""
    some = {replace(cell, in_flight=1) for cell in GRID} if one_slot else GRID
    return reduce(
        Floor.below, (floor_of(given.nodes, given.model, given.work, cell) for cell in some)
    )


@pytest.mark.parametrize("replicate", [False, True])
def test_bound_lies_between_the_exact_rate_and_what_all_nodes_compute(replicate: bool) -> None:
    tighter = 0
    for seed in range(9 if replicate else 12):
        cluster, model, work = random_case(seed, 3 if replicate else 4, 8)
        given = problem(cluster, model, replace(work, acceptance=()))
        rings = solve_exactly(given, GRID, replicate=replicate)
        least = floor(given, one_slot=replicate)
        bound, capped = flow_bound(least, LIMIT_S), capped_compute_bound(least)
        assert sum(ring.rows_per_s for ring in rings) <= bound * (1 + 1e-6), seed
        assert bound <= capped, seed
        tighter += bound < capped * 0.99
    assert tighter


def test_one_node_before_two_replicas_is_the_best_that_whole_layers_allow() -> None:
    # Three nodes pass 3, 1.5 and 1 rows/s with 1, 2 and 3 layers of 4. Of shares of layers they could
    # pass 3 x 3 / 4 together; whole, one has the first layer and both others the last three.
    seconds = np.array([[1.0, 2.0, 3.0, np.inf]] * 3) / 3.0
    least = Floor(seconds, seconds)
    assert capped_compute_bound(least) == pytest.approx(9.0 / 4.0)
    assert flow_bound(least, LIMIT_S) == pytest.approx(2.0)
