"""What a ring through each subset of a few nodes cannot exceed, for all subsets at once.

Whatever adds up over nodes is built for 2^n subsets by doubling: those with node i are those
without, plus what i adds. In one cell, and for a row every T seconds, a ring through S needs

    sum g_j(T) >= L                        the layers that each node passes within T
    C(T) + hops(S) <= T x rows in flight   Little's law, with C >= sum a_j(T, price) + price x L

for every price of a layer, where a_j = min over k <= g_j of (seconds of k layers - price x k):
Lagrange's bound on the least seconds of L layers. Every node has layers of its own here: rings with
replicas are not bounded so.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from planner.bounds import head_s
from planner.cost import Cell, Floats, Role, decode_rounds
from planner.network import network_cost
from planner.orders import least_rings
from planner.problem import CellCosts, Problem

Over = Callable[[Floats], Floats]

TIMES = 32
"""Seconds per row that are tried in each cell; a bound is at most one step of them too high."""
NONE: Floats = np.zeros(0)
PRICES = 4
"""Prices of a layer that are tried: the nodes' own seconds per layer, spread evenly."""


@dataclass(frozen=True, slots=True)
class LeastHops:
    """For every subset, least latency and least wire seconds of a row on a way round it."""

    latency_s: Floats
    wire_s: Floats


def least_hops(given: Problem, draft_len: int) -> LeastHops:
    """The least ways round all subsets, below what any cell of this draft length pays."""
    # So large a micro-batch that frames weigh nothing: below every cell's own cost.
    links = network_cost(given.net, given.model, given.work, Cell(10**9, 1, draft_len))
    passes = 1.0 + decode_rounds(given.work, draft_len)
    latency = np.where(given.net.bytes_per_s > 0, passes * given.net.latency_s, np.inf)
    wire = links.occupied_s.min(axis=0)
    return LeastHops(least_rings(latency, latency), least_rings(wire, links.return_occupied_s))


def subset_bounds(given: Problem, costs: CellCosts, widest: Floats, hops: LeastHops) -> Floats:
    """Rows per second that a ring through a subset cannot exceed in this cell; shape (2^n,)."""
    middle, last = costs.stages[Role.MIDDLE].busy_s, costs.stages[Role.LAST].busy_s
    if not np.isfinite(middle).any():
        return np.zeros(len(widest))
    sizes = over_subsets(np.ones((1, len(middle))))[0]
    ring_s = np.where(sizes > 1, hops.latency_s + costs.cell.micro_batch_rows * hops.wire_s, 0.0)
    slowest_link_s = _widest_row_s(costs, given, widest)
    times = row_times(middle, last)
    row_s = np.maximum(least_row_s(costs.cell, (middle, last), times, ring_s), slowest_link_s)
    row_s[0] = np.inf
    row_s[sizes > given.model.layers] = np.inf
    return np.asarray((1.0 / row_s) * (1.0 + 1e-12), np.float64)


def over_subsets(added: Floats) -> Floats:
    """Sums over all subsets of what each node adds; (.., n) becomes (.., 2^n)."""
    n = added.shape[-1]
    total = np.zeros((*added.shape[:-1], 1 << n))
    for node in range(n):
        size = 1 << node
        total[..., size : 2 * size] = total[..., :size] + added[..., node, None]
    return total


def most_over_subsets(values: Floats) -> Floats:
    """As `over_subsets`, the greatest instead of the sum; the empty subset has minus infinity."""
    n = values.shape[-1]
    most = np.full((*values.shape[:-1], 1 << n), -np.inf)
    for node in range(n):
        size = 1 << node
        most[..., size : 2 * size] = np.maximum(most[..., :size], values[..., node, None])
    return most


def row_times(middle: Floats, last: Floats, count: int = TIMES) -> Floats:
    """Seconds per row from less than any ring of these nodes to more than any stage takes."""
    finite = np.concatenate([middle[np.isfinite(middle)], last[np.isfinite(last)]])
    fastest = fastest_row_s(middle)
    return np.append(np.geomspace(fastest * 0.999, finite.max() * 1.001, count), np.inf)


def fastest_row_s(middle: Floats) -> float:
    """Seconds per row with all nodes at their best, busy all the time."""
    layers = np.arange(1.0, middle.shape[1] + 1.0)
    return float(middle.shape[1] / (layers / middle).max(axis=1).sum())


def all_members(added: Floats) -> Floats:
    """The sum over all nodes alone, in the place of `over_subsets`; (.., n) becomes (.., 1)."""
    return np.asarray(added.sum(axis=-1, keepdims=True), np.float64)


def most_of_members(values: Floats) -> Floats:
    """The greatest over all nodes, in the place of `most_over_subsets`."""
    return np.asarray(values.max(axis=-1, keepdims=True), np.float64)


SUBSETS = (over_subsets, most_over_subsets)
MEMBERS = (all_members, most_of_members)


def least_row_s(
    cell: Cell,
    stages: tuple[Floats, Floats],
    times: Floats,
    ring_s: Floats,
    over: tuple[Over, Over] = SUBSETS,
    spare_s: Floats = NONE,
    prices: int = PRICES,
) -> Floats:
    """Seconds per row that each subset needs at least, looking at its stages, hops and slots.

    `stages` are the busy times of middle and last stages. Within [T, T'] a row takes T at least,
    and its life is that at T' at least; infinite if it takes longer than all of `times`. The last
    nodes, with hops of `spare_s`, may be in any ring: they add what they hold, and cost no more
    than they save.
    """
    middle, last = stages
    total, greatest = over
    layers, own = middle.shape[1], len(middle) - len(spare_s)
    most, ending = held_within(middle, times), held_within(last, times)
    held = total(np.where(most > 0, most, -float(layers) * len(middle))[:, :own])
    held += most[:, own:].sum(axis=1, keepdims=True)
    held += _greatest(greatest, ending - most, own)
    compute_s = np.zeros(held.shape)
    for price, least in priced_layers(middle, prices):
        stages_s = at_most_held(least, most)
        saved = np.minimum(stages_s[:, own:] + spare_s / cell.micro_batch_rows, 0.0)
        fixed = saved.sum(axis=1, keepdims=True) + price * layers
        np.maximum(compute_s, total(stages_s[:, :own]) + fixed, out=compute_s)
    compute_s -= _greatest(greatest, -head_s(middle, last), own)
    life_s = cell.micro_batch_rows * compute_s + ring_s
    row_s = np.maximum(life_s / cell.rows, np.insert(times, 0, 0.0)[:-1, None])
    return np.asarray(np.where(held >= layers, row_s, np.inf).min(axis=0), np.float64)


def _greatest(greatest: Over, values: Floats, own: int) -> Floats:
    """The greatest over a subset of the first nodes and all spare ones."""
    spare = values[..., own:].max(axis=-1, keepdims=True, initial=-np.inf)
    return np.asarray(np.maximum(greatest(values[..., :own]), spare), np.float64)


def least_life_s(cell: Cell, middle: Floats, hop_s: Floats, times: Floats) -> Floats:
    """Seconds that a row of any ring of these nodes lives at least, for every time per row."""
    most = held_within(middle, times)
    hops = hop_s[None, :] / cell.micro_batch_rows
    lives = [
        np.minimum(at_most_held(least, most) + hops, 0.0).sum(axis=1) + price * middle.shape[1]
        for price, least in priced_layers(middle)
    ]
    return np.asarray(np.max(lives, axis=0) * cell.micro_batch_rows, np.float64)


def at_most_held(least: Floats, most: Floats) -> Floats:
    """What a table has for so many layers; shape (times, nodes)."""
    at = np.maximum(most - 1, 0).astype(np.int64)
    return np.take_along_axis(least, at.T, axis=1).T


def held_within(busy_s: Floats, times: Floats) -> Floats:
    """Layers that fit within each time, shape (times, nodes)."""
    finite = np.isfinite(busy_s).sum(axis=1)
    found = np.stack([np.searchsorted(row, times, side="right") for row in busy_s], axis=1)
    return np.asarray(np.minimum(found, finite), np.float64)


def priced_layers(middle: Floats, count: int = PRICES) -> list[tuple[float, Floats]]:
    """Prices of a layer, and the least of seconds minus price of up to k layers, for every k."""
    layers = np.arange(1.0, middle.shape[1] + 1.0)[None, :]
    slopes = np.sort((middle / layers).min(axis=1))
    slopes = slopes[np.isfinite(slopes)]
    prices = np.quantile(slopes, np.linspace(0.0, 1.0, count))
    return [
        (float(price), np.minimum.accumulate(middle - price * layers, axis=1))
        for price in np.unique(prices)
    ]


def _widest_row_s(costs: CellCosts, given: Problem, widest: Floats) -> Floats:
    """Seconds per row of the slowest link on the widest path; links of more bytes/s cost less."""
    occupied = costs.links.occupied_s.min(axis=0)
    rate = given.net.bytes_per_s
    order = np.argsort(rate.ravel(), kind="stable")
    at = np.searchsorted(rate.ravel()[order], widest)
    slowest = occupied.ravel()[order][np.minimum(at, len(order) - 1)]
    return np.where(np.isinf(widest), 0.0, np.where(widest > 0, slowest, np.inf))
