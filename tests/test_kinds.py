"""Clusters of few kinds, solved by counts: as fast as by subsets, and as an integer program says."""

import itertools
import random

import numpy as np
import pytest

from planner.cost import Cell, Floats, Role
from planner.exact import solve_exactly
from planner.facts import Cluster, Lengths, Link, ModelShape, Node, Workload
from planner.kinds import Kinds, best_counts, kinds_of, solve_by_kinds, solve_count, started
from planner.milp import Program
from planner.problem import Problem, among, cell_costs, problem
from planner.settle import SAME
from planner.solve import solve
from tests.planner_oracle import ring_row_s

GRID = (Cell(1, 1), Cell(4, 2), Cell(16, 8), Cell(32, 2))
WORK = Workload(900, Lengths(64, 90), Lengths(99, 120))


def few_kinds(seed: int, counts: tuple[int, ...], layers: int) -> Problem:
    """Nodes of as many kinds as there are counts, in mixed order, joined by equal links."""
    pick = random.Random(seed)
    kinds = [
        Node("", pick.uniform(5e12, 4e13), pick.choice([2.6e9, 4e9, 9e9]), pick.uniform(1e11, 8e11))
        for _ in counts
    ]
    every = [kind for kind, times in enumerate(counts) for _ in range(times)]
    pick.shuffle(every)
    nodes = tuple(_named(kinds[kind], f"n{i}") for i, kind in enumerate(every))
    link = Link("", "", pick.choice([0.001, 0.03]), pick.choice([2e6, 1e8]))
    model = ModelShape(layers, 2048, 4e8, 2048.0, 2, 1e8, pick.choice([1e8, 6e8]), 4e8)
    return problem(Cluster(nodes, (), link), model, WORK)


def _named(kind: Node, name: str) -> Node:
    return Node(name, kind.flop_per_s, kind.memory_bytes, kind.memory_bytes_per_s)


@pytest.mark.parametrize("counts", [(5,), (3, 3), (4, 2), (2, 2, 2)])
def test_solving_by_counts_is_as_fast_as_by_subsets(counts: tuple[int, ...]) -> None:
    feasible = 0
    for seed in range(12):
        given = few_kinds(seed, counts, 12)
        kinds = kinds_of(given)
        assert kinds is not None
        assert sorted(len(group) for group in kinds.members) == sorted(counts)
        rings = solve_by_kinds(given, kinds, GRID)
        used = [node for ring in rings for node in ring.order]
        assert len(used) == len(set(used))
        rate = sum(ring.rows_per_s for ring in rings)
        exact = sum(ring.rows_per_s for ring in solve_exactly(given, GRID))
        assert rate == pytest.approx(exact, rel=1e-9), seed
        feasible += rate > 0
    assert feasible > 2


@pytest.mark.parametrize("seed", range(4))
def test_counts_combine_as_the_integer_program_says(seed: int) -> None:
    pytest.importorskip("highspy")
    given = few_kinds(seed, (3, 2), 8)
    kinds = kinds_of(given)
    assert kinds is not None
    program, used = Program(), [[] for _ in kinds.members]  # type: ignore[var-annotated]
    for count in kinds.counts[1:]:
        column = program.integer(0, int(kinds.counts.max()), _rate_by_search(given, kinds, count))
        for kind, times in enumerate(count):
            used[kind].append((column, float(times)))
    for terms, group in zip(used, kinds.members, strict=True):
        program.at_most(float(len(group)), *terms)
    best = program.solve("counts", 20.0, maximise=True)
    assert best is not None
    assert best.proved
    rings = solve_by_kinds(given, kinds, GRID)
    assert sum(ring.rows_per_s for ring in rings) == pytest.approx(best.value, rel=1e-6)


def _rate_by_search(given: Problem, kinds, count) -> float:  # type: ignore[no-untyped-def]
    """The best rate of one ring of these counts: all orders, splits and cells tried."""
    every = [kind for kind, times in enumerate(count) for _ in range(int(times))]
    orders = []
    for order in sorted(set(itertools.permutations(every))):
        free = [iter(group) for group in kinds.members]
        orders.append(tuple(given.nodes[next(free[kind])] for kind in order))
    rows_s = [
        ring_row_s(Cluster(order, (), given.cluster.default_link), given.model, given.work, cell)
        for order in orders
        for cell in GRID
    ]
    return 1.0 / min(rows_s)


@pytest.mark.parametrize(("counts", "layers"), [((3, 2), 8), ((2, 2, 2), 6)])
def test_ring_of_each_count_is_the_one_of_the_integer_program(
    counts: tuple[int, ...], layers: int
) -> None:
    pytest.importorskip("highspy")
    feasible = 0
    for seed in range(3):
        given = few_kinds(seed, counts, layers)
        kinds = kinds_of(given)
        assert kinds is not None
        for count in kinds.counts[1:]:
            chosen = [i for g, n in zip(kinds.members, count, strict=True) for i in g[: int(n)]]
            own = among(given, tuple(chosen))
            alone = kinds_of(own)
            assert alone is not None
            rate = float(_rates_of_counts(own, alone)[-1])
            most = max(_rate_by_program(own, alone, cell) for cell in GRID)
            assert rate == pytest.approx(most, rel=1e-5), (seed, count)
            feasible += most > 0
    assert feasible > 5


def _rates_of_counts(given: Problem, kinds: Kinds) -> Floats:
    """Rows per second of the best ring of each count, as the search by counts has them."""
    search = started(given, kinds, GRID)
    for count in range(1, len(kinds.counts)):
        solve_count(search, count)
    return search.bound


def _rate_by_program(given: Problem, kinds: Kinds, cell: Cell) -> float:
    """Rows per second of the best ring through all nodes in a cell: x_tsk says that one of kind t
    holds layers [s, s + k), and one way through the positions 0..L takes all of them.

    Least row_s with row_s >= busy of every stage and link, and row_s x rows in flight >= the life.
    """
    costs, layers, n = cell_costs(given, cell), given.model.layers, len(given.nodes)
    program = Program()
    row = program.number(0.0, 1e9, cost=1.0)
    ways: list[list[tuple[int, float]]] = [[] for _ in range(layers + 1)]
    life: list[tuple[int, float]] = [(row, -float(cell.rows))]
    for group in kinds.members:
        used = []
        for first, end in itertools.combinations(range(layers + 1), 2):
            role = (Role.FIRST if first == 0 else Role.MIDDLE) | (
                Role.LAST if end == layers else Role.MIDDLE
            )
            busy = float(costs.stages[role].busy_s[group[0], end - first - 1])
            if np.isfinite(busy):
                chosen = program.integer(0, 1)
                program.at_most(0.0, (chosen, busy), (row, -1.0))
                ways[first].append((chosen, 1.0))
                ways[end].append((chosen, -1.0))
                life.append((chosen, busy * cell.micro_batch_rows))
                used.append((chosen, 1.0))
        program.equal(float(len(group)), *used)
    for place in range(1, layers):
        program.equal(0.0, *ways[place])
    program.equal(1.0, *ways[0])
    hops = (n - 1) * costs.links.hop_s[0, 0, 1] + costs.links.return_hop_s[0, 1] if n > 1 else 0.0
    program.at_most(-float(hops), *life)
    if n > 1:
        program.at_most(-float(costs.links.occupied_s[0, 0, 1]), (row, -1.0))
        program.at_most(-float(costs.links.return_occupied_s[0, 1]), (row, -1.0))
    best = program.solve("one ring", 20.0)
    return 1.0 / best.value if best else 0.0


def test_repeated_counts_fill_what_there_is() -> None:
    counts = np.array(list(itertools.product(range(3), range(4))))
    rate = np.zeros(len(counts))
    rate[[1, 6]] = 1.0, 2.5  # one of the second kind; one and two
    chosen, total = best_counts(rate, counts)
    assert (sorted(chosen), total[-1]) == ([1, 6], 3.5)


def test_two_dozen_nodes_of_three_kinds_are_planned_without_a_gap() -> None:
    given = few_kinds(3, (8, 8, 8), 24)
    plan = solve(given.cluster, given.model, given.work)
    assert plan.gap <= SAME
    assert len(plan.pipelines) > 1
