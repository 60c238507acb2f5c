"""A bound on all plans as one integer program over where in the model each node's layers begin.

Nodes of kind t that hold layers [s, s + k) are counted by x, and rows flow through them. With rate_t(k)
what one such node passes at best, and U what all nodes together cannot exceed,

    maximise  sum of f over s = 0      with  0 <= f[t,s,k] <= min(rate_t(k), U) x[t,s,k],
    flow in = flow out at every s inside,    sum over s and k of x[t,s,k] <= nodes of kind t.

Every plan is such a flow: of rings, each node passes its ring's rows; of replicas, each its share. So no
plan beats it, with replicas or without. What links and slots cost it does not know. Of the same form as
Helix's flow (Mei et al. 2025), with counts in place of nodes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.bounds import Floor, capped_compute_bound
from planner.cost import Floats
from planner.milp import Program

Terms = list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class _Kind:
    """Nodes of equal costs: rows per second that one passes, by layers, inside and at the end."""

    nodes: int
    middle: Floats
    ending: Floats


def flow_bound(floor: Floor, limit_s: float) -> float:
    """Rows per second that no plan can beat; never above `capped_compute_bound`.

    Stopped after `limit_s` seconds, it is what was proved by then.

    Raises:
        MissingSolverError: HiGHS is not installed.
    """
    most, layers = capped_compute_bound(floor), floor.middle_s.shape[1]
    program, into, out = Program(), _places(layers), _places(layers)
    for kind in _kinds(floor):
        used: Terms = []
        for first, end, rate in _spans(kind, layers):
            count = program.integer(0, kind.nodes)
            flow = program.number(0.0, most * kind.nodes, cost=float(first == 0))
            program.at_most(0.0, (flow, 1.0), (count, -min(rate, most)))
            used.append((count, 1.0))
            out[first].append((flow, 1.0))
            into[end].append((flow, -1.0))
        program.at_most(float(kind.nodes), *used)
    for place in range(1, layers):
        program.equal(0.0, *into[place], *out[place])
    solution = program.solve("flow bound", limit_s, maximise=True)
    return min(solution.bound, most) if solution else most


def _places(layers: int) -> list[Terms]:
    return [[] for _ in range(layers + 1)]


def _spans(kind: _Kind, layers: int) -> Iterator[tuple[int, int, float]]:
    """Every (first layer, end layer, rows per second) that a node of the kind can have."""
    for first in range(layers):
        for end in range(first + 1, layers + 1):
            rates = kind.ending if end == layers else kind.middle
            if rates[end - first - 1] > 0:
                yield first, end, float(rates[end - first - 1])


def _kinds(floor: Floor) -> list[_Kind]:
    """Nodes that cost the same are of one kind."""
    both = np.concatenate([floor.middle_s, floor.ending_s], axis=1)
    costs, nodes = np.unique(both, axis=0, return_counts=True)
    with np.errstate(divide="ignore"):
        rates = np.split(1.0 / costs, 2, axis=1)
    return [_Kind(int(n), *of) for n, *of in zip(nodes, *rates, strict=True)]
