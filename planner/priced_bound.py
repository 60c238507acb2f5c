"""A bound on all plans that knows of what is in flight: a price for every node.

If every ring's rate is at most the sum of its nodes' prices, then no set of disjoint rings is faster
than all prices together (linear programming duality for set packing). In a cell of in_flight m, a
ring of rate r over L layers with k_j of them on node j satisfies

    sum k_j = L    and, by Little's law,    sum r (busy_j(k_j) + hop_j / rows) <= m = m sum k_j / L

so with any weight w >= 0,  r <= sum over j of [k_j r + w (m k_j / L - r (busy_j + hop_j / rows))] / L,
and the greatest such term over cells, rates and k is a valid price. The LM head counts as `extra`
layers on the last node, as in `capped_compute_bound`.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from planner.bounds import Floor, head_in_layers
from planner.cost import Cell, Floats, Role, decode_rounds, forward_link, stage_table
from planner.network import codec_options
from planner.problem import Problem

WEIGHTS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 20.0)
"""Weights of Little's law that are tried, in units of a ring's rate times its layers over m."""
COARSE = 1.5
"""Ratio of the ends of the rate intervals that are looked at first."""
FINE = 1.01
"""Ratio of the ends of those that set a price in the end."""
MOST_WORK = 30_000
"""Nodes times layers above which the bound is too slow to be worth it."""


@dataclass(frozen=True, slots=True)
class _CellFacts:
    """What prices in one cell rest on; arrays of shape (nodes, choices) and (nodes, 1)."""

    in_flight: int
    counted: Floats
    """Layers of each choice, the LM head's share included."""
    share: Floats
    """Fraction of the model's layers of each choice."""
    busy_s: Floats
    hop_s: Floats
    """Least seconds per row on a hop, over the rows of a micro-batch."""
    linked_s: Floats
    """Least seconds per row that any link of the node is occupied; 0 where it may stand alone."""
    whole: float
    """All layers, the LM head included."""


def priced_bound(given: Problem, tried: tuple[Cell, ...]) -> float:
    """Rows per second that no plan over these cells can beat; infinite where it is not worth it."""
    if len(given.nodes) * given.model.layers > MOST_WORK:
        return float("inf")
    facts = [_cell_facts(given, cell) for cell in tried]
    intervals: list[tuple[int, float, float]] = []
    for number, cell in enumerate(facts):
        finite = cell.busy_s[np.isfinite(cell.busy_s)]
        if len(finite):
            high = 1.0 / float(finite.min())
            steps = int(np.ceil(np.log(high * float(finite.max()) * 50.0) / np.log(COARSE)))
            ends = high / COARSE ** np.arange(max(steps, 1) + 1)
            intervals.extend((number, float(lo), float(hi)) for hi, lo in pairwise(ends))
            intervals.append((number, 0.0, float(ends[-1])))
    if not intervals:
        return 0.0
    prices = np.stack([_prices(facts[i], lo, hi) for i, lo, hi in intervals])
    return float(_refined(facts, intervals, prices).max(axis=0).sum())


def _refined(
    facts: list[_CellFacts], intervals: list[tuple[int, float, float]], prices: Floats
) -> Floats:
    """Halve the intervals that set a node's price until they are fine enough to matter no more."""
    for _ in range(12):
        setting = {int(i) for i in prices.argmax(axis=0)}
        wide = {i for i in setting if intervals[i][1] and intervals[i][2] > FINE * intervals[i][1]}
        if not wide:
            break
        halves = []
        for i in wide:
            number, low, high = intervals[i]
            middle = float(np.sqrt(low * high))
            halves += [(number, low, middle), (number, middle, high)]
        keep = [i for i in range(len(intervals)) if i not in wide]
        finer = np.stack([_prices(facts[i], lo, hi) for i, lo, hi in halves])
        intervals = [intervals[i] for i in keep] + halves
        prices = np.concatenate([prices[keep], finer])
    return prices


def _prices(cell: _CellFacts, low: float, high: float) -> Floats:
    """Each node's price for rings of this cell with a rate in [low, high]."""
    # Compared as times: a rate of 0 fits whatever can run at all.
    longest_s = 1.0 / low if low else np.finfo(np.float64).max
    fits = (cell.busy_s <= longest_s) & (cell.linked_s <= longest_s)
    value = np.where(fits, cell.counted, 0.0) * (high / cell.whole)
    if not fits.any():
        return np.zeros(len(cell.busy_s))
    with np.errstate(invalid="ignore"):
        used = np.where(fits, low * (cell.busy_s + cell.hop_s), 0.0)
    slack = np.where(fits, cell.in_flight * cell.share - used, 0.0)
    best: Floats | None = None
    for weight in WEIGHTS:
        # A node may stay out of rings, so no price falls below zero.
        price = np.maximum((value + weight * high / cell.in_flight * slack).max(axis=1), 0.0)
        if best is None or price.sum() < best.sum():
            best = price
    assert best is not None
    return best


def _cell_facts(given: Problem, cell: Cell) -> _CellFacts:
    nodes, model, work = given.nodes, given.model, given.work
    middle = stage_table(nodes, model, work, cell, Role.MIDDLE).busy_s
    last = stage_table(nodes, model, work, cell, Role.LAST).busy_s
    extra = head_in_layers(Floor(middle, last))
    layers = np.arange(1.0, model.layers + 1.0)[None, :]
    counted = np.concatenate([layers, layers + extra], axis=1)
    share = np.concatenate([layers, layers], axis=1) / model.layers
    other = ~np.eye(len(nodes), dtype=bool)
    usable = other & (given.net.bytes_per_s > 0)
    latency = np.where(usable, given.net.latency_s, np.inf).min(axis=1, initial=np.inf)
    latency = np.where(np.isfinite(latency), latency, 0.0)
    rate = np.where(usable, given.net.bytes_per_s, 0.0)
    widest = np.maximum(rate.max(axis=1, initial=0.0), rate.max(axis=0, initial=0.0))
    costs = [
        forward_link(np.zeros(len(nodes)), widest, codec, model, work, cell)
        for _, codec in codec_options(work)
    ]
    occupied = np.min([cost.occupied_s for cost in costs], axis=0)[:, None]
    # A node that holds every layer may stand alone, without links.
    alone = share >= 1.0
    hop = (1.0 + decode_rounds(work, cell.draft_len)) * latency / cell.micro_batch_rows
    return _CellFacts(
        cell.in_flight,
        counted,
        share,
        np.concatenate([middle, last], axis=1),
        np.where(alone, 0.0, hop[:, None]),
        np.where(alone, 0.0, occupied),
        model.layers + extra,
    )
