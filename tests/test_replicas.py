"""Rings with replicas: as fast as exhaustive search says, and as the simulator runs them."""

import math
import random

import pytest

from planner.cost import Cell
from planner.exact import solve_exactly
from planner.facts import Cluster, CodecRate, Lengths, Link, ModelShape, Node, Workload
from planner.problem import problem
from tests.replica_oracle import best_rate

GRID = (Cell(1, 4), Cell(16, 3))


def uneven_case(seed: int, nodes: int, layers: int) -> tuple[Cluster, ModelShape, Workload]:
    """Nodes and links that differ much, and a model that fills a good part of all memory."""
    pick = random.Random(seed)
    machines = tuple(
        Node(
            f"n{i}",
            flop_per_s=pick.uniform(2e13, 1.5e14),
            memory_bytes=pick.choice([1.4e10, 2.2e10, 7e10]),
            memory_bytes_per_s=pick.uniform(2e11, 1.5e12),
            up_bytes_per_s=pick.choice([math.inf, 2e7]),
            down_bytes_per_s=pick.choice([math.inf, 3e7]),
        )
        for i in range(nodes)
    )
    links = tuple(
        Link(a.name, b.name, pick.uniform(0.0005, 0.1), pick.choice([3e6, 1e7, 8e7]))
        for a in machines
        for b in machines
        if a != b
    )
    layer_bytes = sum(m.memory_bytes for m in machines) / layers * pick.uniform(0.25, 0.75)
    model = ModelShape(
        layers, 8192, layer_bytes, 40_000.0, 2, layer_bytes / 20, layer_bytes / 9, layer_bytes
    )
    prompt, output = pick.choice([64.0, 512.0]), pick.choice([32.0, 128.0])
    codec = {"lossless": CodecRate(1.5, 5e8)} if pick.random() < 0.3 else {}
    lengths = Lengths(prompt, 2 * prompt), Lengths(output, 2 * output)
    return Cluster(machines, links), model, Workload(10_000, *lengths, codec=codec)


def exact_rate(cluster: Cluster, model: ModelShape, work: Workload, replicate: bool) -> float:
    rings = solve_exactly(problem(cluster, model, work), GRID, replicate=replicate)
    return sum(ring.rows_per_s for ring in rings)


@pytest.mark.parametrize(
    ("first", "count", "nodes", "layers"), [(0, 60, 3, 8), (100, 16, 4, 5), (200, 2, 5, 4)]
)
def test_plan_with_replicas_is_as_fast_as_exhaustive_search(
    first: int, count: int, nodes: int, layers: int
) -> None:
    gained = 0
    for seed in range(first, first + count):
        case = uneven_case(seed, nodes, layers)
        found = exact_rate(*case, replicate=True)
        assert found == pytest.approx(best_rate(*case, GRID), rel=1e-9), seed
        gained += found > exact_rate(*case, replicate=False) * (1 + 1e-6)
    print(gained)
    assert gained
