"""Block placement and request routing as one integer program (Sun et al. 2025, arXiv 2512.21884).

Server j holds blocks [first_j, end_j). Request r takes link (i, j) where f = 1, and j then processes
end_j - end_i blocks; the source's end is 0, and only servers that end at the last block lead to the
sink. Equations 13a-13f, with end = a + m in place of m: three products a link instead of four.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from planner.milp import Program, Solution
from planner.placement import Server, Sizes, Span

SOURCE, SINK = -1, -2


@dataclass(frozen=True, slots=True)
class BlocksAndRoutes:
    """The program's answer."""

    spans: tuple[Span, ...]
    """By server, of those that hold a block at all."""
    seconds: float
    """Per token, over all requests."""
    bound_s: float
    proved: bool


@dataclass(frozen=True, slots=True)
class _Columns:
    first: tuple[int, ...]
    end: tuple[int, ...]


def bprr(
    servers: Sequence[Server], sizes: Sizes, requests: int, limit_s: float
) -> BlocksAndRoutes | None:
    """The placement and routes of least total time per token; None where none is found.

    Requests have one client. Stopped after `limit_s` it gives the best found, not `proved`.

    Raises:
        MissingSolverError: HiGHS is not installed.
    """
    able = [s for s in servers if s.memory_bytes >= sizes.block_bytes + sizes.cache_bytes]
    program = Program()
    first = tuple(program.integer(0, sizes.blocks - 1) for _ in able)
    end = tuple(program.integer(1, sizes.blocks) for _ in able)
    for a, e in zip(first, end, strict=True):
        program.at_most(-1.0, (a, 1.0), (e, -1.0))
    return _solved(program, able, sizes, _Columns(first, end), (requests, limit_s))


def routed(
    spans: Sequence[Span], sizes: Sizes, requests: int, limit_s: float
) -> BlocksAndRoutes | None:
    """The routes of least total time over a placement that is given (equation 19)."""
    program = Program()
    first = tuple(program.integer(span.first, span.first) for span in spans)
    end = tuple(program.integer(span.end, span.end) for span in spans)
    servers = [span.server for span in spans]
    return _solved(program, servers, sizes, _Columns(first, end), (requests, limit_s))


def _solved(
    program: Program,
    servers: Sequence[Server],
    sizes: Sizes,
    columns: _Columns,
    asked: tuple[int, float],
) -> BlocksAndRoutes | None:
    requests, limit_s = asked
    load: list[list[tuple[int, float]]] = [[] for _ in servers]
    for _ in range(requests):
        _route(program, servers, sizes, columns, load)
    for j, server in enumerate(servers):
        held = ((columns.end[j], sizes.block_bytes), (columns.first[j], -sizes.block_bytes))
        program.at_most(server.memory_bytes, *held, *load[j])
    solution = program.solve("bprr", limit_s) if servers else None
    return _answer(servers, columns, solution) if solution else None


def _links(servers: int) -> Iterator[tuple[int, int]]:
    for j in range(servers):
        yield SOURCE, j
        yield j, SINK
        yield from ((i, j) for i in range(servers) if i != j)


def _route(
    program: Program,
    servers: Sequence[Server],
    sizes: Sizes,
    columns: _Columns,
    load: list[list[tuple[int, float]]],
) -> None:
    """One request's links; what it processes is added to the servers' `load`."""
    balance: dict[int, list[tuple[int, float]]] = {j: [] for j in range(len(servers))}
    source: list[tuple[int, float]] = []
    for i, j in _links(len(servers)):
        used = program.switch(servers[j].round_trip_s if j != SINK else 0.0)
        (source if i == SOURCE else balance[i]).append((used, 1.0))
        if j == SINK:  # end_i reaches the last block
            program.at_most(0.0, (used, float(sizes.blocks)), (columns.end[i], -1.0))
            continue
        balance[j].append((used, -1.0))
        _process(program, (servers[j], sizes), (columns, i, j), used, load[j])
    program.equal(1.0, *source)
    for terms in balance.values():
        program.equal(0.0, *terms)


def _process(
    program: Program,
    facts: tuple[Server, Sizes],
    place: tuple[_Columns, int, int],
    used: int,
    load: list[tuple[int, float]],
) -> None:
    """What a used link makes its target process: from where the source ends to its own end."""
    (server, sizes), (columns, i, j) = facts, place
    most = float(sizes.blocks)
    ends = program.product(used, columns.end[j], most)
    begins = program.product(used, columns.first[j], most)
    program.cost[ends] += server.block_s
    load.append((ends, sizes.cache_bytes))
    if i == SOURCE:  # the source has done nothing: its blocks start at 0
        program.at_most(0.0, (begins, 1.0))
        return
    done = program.product(used, columns.end[i], most)
    program.cost[done] -= server.block_s
    load.append((done, -sizes.cache_bytes))
    program.at_most(0.0, (begins, 1.0), (done, -1.0))
    program.at_most(0.0, (done, 1.0), (ends, -1.0), (used, 1.0))


def _answer(servers: Sequence[Server], columns: _Columns, solution: Solution) -> BlocksAndRoutes:
    spans = tuple(
        Span(server, round(solution.values[a]), round(solution.values[e]))
        for server, a, e in zip(servers, columns.first, columns.end, strict=True)
    )
    return BlocksAndRoutes(spans, solution.value, solution.bound, solution.proved)
