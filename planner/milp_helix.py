"""Helix's placement: layers on nodes so that the most tokens flow from source to sink.

Mei et al. 2025 (ASPLOS, arXiv 2406.01566). Node i holds layers [s_i, e_i), of which one b_ik says that
they are k. Tokens flow along links whose ends fit together: into a node that holds the first layer, on
to the node that starts where this one ends, out of a node that holds the last.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from planner.cost import Floats
from planner.milp import Program, Solution


@dataclass(frozen=True, slots=True)
class Placement:
    """Layers [first, end) by node, and the tokens/s on every link that is used."""

    layers: tuple[tuple[int, int], ...]
    flow: dict[tuple[int, int], float]
    tokens_per_s: float
    bound: float
    proved: bool


@dataclass(frozen=True, slots=True)
class _Columns:
    first: list[int]
    holds: list[list[int]]
    """By node, for k = 1.. layers."""
    into: list[int]
    out: list[int]
    between: dict[tuple[int, int], int]


def helix(
    rates: Sequence[Sequence[float]], links: Floats, layers: int, limit_s: float
) -> Placement | None:
    """The placement of most tokens/s; None where none is found.

    `rates[i][k - 1]` is node i's tokens/s with k layers, for as many as it can hold; `links[i, j]`
    a link's tokens/s. Stopped after `limit_s` it gives the best found, not `proved`.

    Raises:
        MissingSolverError: HiGHS is not installed.
    """
    program = Program()
    most = [max(node, default=0.0) for node in rates]
    columns = _variables(program, rates, links, layers, most)
    for i, node in enumerate(rates):
        length = [(column, float(k)) for k, column in enumerate(columns.holds[i], 1)]
        program.equal(1.0, *((column, 1.0) for column in columns.holds[i]))
        program.at_most(float(layers), (columns.first[i], 1.0), *length)
        inflow = [(columns.into[i], 1.0)]
        inflow += [(f, 1.0) for (_, j), f in columns.between.items() if j == i]
        outflow = [(columns.out[i], -1.0)]
        outflow += [(f, -1.0) for (j, _), f in columns.between.items() if j == i]
        program.equal(0.0, *inflow, *outflow)
        capacity = [(c, -rate) for c, rate in zip(columns.holds[i], node, strict=True)]
        program.at_most(0.0, *inflow, *capacity)
        _ends(program, columns, i, layers, most[i])
    for (i, j), flow in columns.between.items():
        _joint(program, columns, (i, j), layers, (flow, min(most[i], most[j], float(links[i, j]))))
    solution = program.solve("helix", limit_s, maximise=True)
    return _placement(columns, solution) if solution else None


def _variables(
    program: Program,
    rates: Sequence[Sequence[float]],
    links: Floats,
    layers: int,
    most: list[float],
) -> _Columns:
    nodes = range(len(rates))
    return _Columns(
        first=[program.integer(0, layers - 1) for _ in nodes],
        holds=[[program.switch() for _ in node] for node in rates],
        into=[program.number(0.0, most[i], cost=1.0) for i in nodes],
        out=[program.number(0.0, most[i]) for i in nodes],
        between={
            (i, j): program.number(0.0, min(most[i], most[j], float(links[i, j])))
            for i in nodes
            for j in nodes
            if i != j and links[i, j] > 0
        },
    )


def _ends(program: Program, columns: _Columns, node: int, layers: int, most: float) -> None:
    """Tokens enter a node only at the first layer, and leave it only after the last."""
    opens, closes = program.switch(), program.switch()
    program.at_most(0.0, (columns.into[node], 1.0), (opens, -most))
    program.at_most(float(layers), (columns.first[node], 1.0), (opens, float(layers)))
    program.at_most(0.0, (columns.out[node], 1.0), (closes, -most))
    length = [(column, -float(k)) for k, column in enumerate(columns.holds[node], 1)]
    program.at_most(0.0, (closes, float(layers)), (columns.first[node], -1.0), *length)


def _joint(
    program: Program,
    columns: _Columns,
    link: tuple[int, int],
    layers: int,
    flow: tuple[int, float],
) -> None:
    """Tokens pass from i to j only where j starts at i's end."""
    (i, j), (column, most) = link, flow
    used, wide = program.switch(), float(layers)
    program.at_most(0.0, (column, 1.0), (used, -most))
    end = [(c, float(k)) for k, c in enumerate(columns.holds[i], 1)]
    minus_end = [(c, -k) for c, k in end]
    program.at_most(wide, (columns.first[i], 1.0), *end, (columns.first[j], -1.0), (used, wide))
    program.at_most(
        wide, (columns.first[j], 1.0), (columns.first[i], -1.0), *minus_end, (used, wide)
    )


def _placement(columns: _Columns, solution: Solution) -> Placement:
    at = [round(solution.values[column]) for column in columns.first]
    counts = [
        sum(k for k, column in enumerate(node, 1) if solution.values[column] > 0.5)
        for node in columns.holds
    ]
    flow = {
        link: solution.values[column]
        for link, column in columns.between.items()
        if solution.values[column] > 1e-9
    }
    layers = tuple((first, first + count) for first, count in zip(at, counts, strict=True))
    return Placement(layers, flow, solution.value, solution.bound, solution.proved)


def widest_ways(placement: Placement, layers: int) -> list[tuple[int, ...]]:
    """Node-disjoint ways through all layers along links with flow, widest first.

    Helix sends each request along its own mix of links; a ring is one way, and owns its nodes.
    """
    free = set(range(len(placement.layers)))
    ways: list[tuple[int, ...]] = []
    while way := _widest_way(placement, layers, free):
        ways.append(way)
        free -= set(way)
    return ways


def _widest_way(placement: Placement, layers: int, free: set[int]) -> tuple[int, ...]:
    """The way of greatest least flow; a node that holds all layers alone is the widest of all."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {
        i: (float("inf"), (i,)) for i in free if placement.layers[i][0] == 0
    }
    # Links lead from lower to higher layers, so by rising first layer each node is final once met.
    for i in sorted(free, key=lambda node: placement.layers[node][0]):
        if i not in best:
            continue
        for (source, target), flow in placement.flow.items():
            if source == i and target in free:
                width = min(best[i][0], flow)
                if width > best.get(target, (0.0, ()))[0]:
                    best[target] = (width, (*best[i][1], target))
    ends = [best[i] for i in best if placement.layers[i][1] == layers]
    return max(ends, default=(0.0, ()), key=lambda way: (way[0], -len(way[1])))[1]
