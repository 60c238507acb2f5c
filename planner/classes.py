"""Prices for nodes that no ring is worth more than, by linear programming duality.

If every ring's rate is at most the sum of its nodes' prices, no set of disjoint rings is faster than
all prices together. Rings of one class share a cell and a rate in [low, high]. In a ring with k_j
layers on node j, by Little's law

    sum k_j = L    and    sum u_j <= 1,    u_j = low (b busy_j(k_j) + hop_j) / (b in_flight + low hop)

(the last node's hop, which is back to the first, allowed for by one hop more)

so with any weight w >= 0 its rate is at most  high [ (1 + w) sum k_j / L - w sum u_j ],  and the
greatest  high [ (1 + w) k / L - w u_j(k) ]  over classes and k is a valid price of node j. The weights
are free, one for each class; they are chosen together, so that the sum of all prices is small. Rings
have no replicas here: the layers of these would add up to more.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from planner.cost import Cell, Floats, Role, forward_link, stage_table
from planner.network import codec_options
from planner.problem import Problem

RATIO = 1.1
"""Ratio of the ends of a class's rates; those that set a price are cut finer."""
FINE = 1.01
SLOWEST = 60.0
"""Rates down to the fastest over this; a cell's slower rings form one class."""
FIRST_WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
STEPS = 100
"""Steps of the descent that chooses the weights."""
LEARNING = (0.1, 0.01)
"""Its step, at its start and at its end, in units of 1 + w."""
SOFTNESS = (0.5, 0.002)
"""How far below a node's price a class still counts, as a fraction of the mean price."""


@dataclass(frozen=True, slots=True)
class _Rings:
    """One cell's costs; busy_s has shape (nodes, layers), the others (nodes,)."""

    cell: Cell
    busy_s: Floats
    hop_s: Floats
    """Least seconds of a row's life on any link out of the node, up to `allowed_s`."""
    linked_s: Floats
    """Least seconds per row that any link of the node is occupied."""
    allowed_s: float


@dataclass(frozen=True, slots=True)
class RingClass:
    """Rings of one cell with a rate in [low, high]."""

    rings: _Rings
    low: float
    high: float


def ring_classes(given: Problem, tried: tuple[Cell, ...], most_rate: float) -> list[RingClass]:
    """All classes of rings of at most `most_rate` rows per second."""
    rings = (_rings(given, cell) for cell in tried)
    return [one for costs in rings for one in _classes(costs, most_rate, given.model.layers)]


def node_prices(classes: list[RingClass], matters: Floats) -> Floats:
    """Valid prices for rings of these classes, low above all where `matters` is high; (nodes,)."""
    if not classes:
        return np.zeros(len(matters))
    weights = _weights(classes, matters)
    found = np.stack([_prices(c, w) for c, w in zip(classes, weights, strict=True)])
    return np.asarray(_refined(classes, weights.tolist(), found).max(axis=0), np.float64)


def _rings(given: Problem, cell: Cell) -> _Rings:
    nodes, model, work, net = given.nodes, given.model, given.work, given.net
    busy = stage_table(nodes, model, work, cell, Role.MIDDLE).busy_s
    usable = ~np.eye(len(nodes), dtype=bool) & (net.bytes_per_s > 0)
    latency = np.where(usable, net.latency_s, np.inf).min(axis=1, initial=np.inf)
    latency = np.where(np.isfinite(latency), latency, 0.0)
    rate = np.where(usable, net.bytes_per_s, 0.0)
    out, into = rate.max(axis=1, initial=0.0), rate.max(axis=0, initial=0.0)
    codecs = [codec for _, codec in codec_options(work)]
    leave = [forward_link(latency, out, codec, model, work, cell) for codec in codecs]
    enter = [forward_link(latency, into, codec, model, work, cell) for codec in codecs]
    linked = np.min([link.occupied_s for link in (*leave, *enter)], axis=0)
    hop = np.min([link.hop_s for link in leave], axis=0)
    # A ring's last stage sends token ids only: no hop counts for more than is allowed for it.
    finite = hop[np.isfinite(hop)]
    allowed = float(np.median(finite)) if len(finite) else 0.0
    return _Rings(cell, busy, np.minimum(hop, allowed), linked, allowed)


def _classes(rings: _Rings, most_rate: float, layers: int) -> list[RingClass]:
    """A cell's classes, fast to slow, without those that cannot hold all layers."""
    if np.isfinite(rings.busy_s).sum() < layers:
        return []
    count = np.arange(1.0, layers + 1.0)
    fastest = float((count / rings.busy_s).max(axis=1).sum()) / layers
    top = min(most_rate, fastest)
    ends = top / RATIO ** np.arange(np.ceil(np.log(SLOWEST) / np.log(RATIO)) + 1)
    found = [
        RingClass(rings, float(low), float(high))
        for high, low in pairwise(ends)
        if (_layers_within(rings, float(low))).sum() >= layers
    ]
    return [*found, RingClass(rings, 0.0, float(ends[-1]))]


def _layers_within(rings: _Rings, low: float) -> Floats:
    """Layers that each node passes at this rate; only whole models without a usable link."""
    longest_s = 1.0 / low if low else np.finfo(np.float64).max
    held = (rings.busy_s <= longest_s).sum(axis=1).astype(np.float64)
    held[(rings.linked_s > longest_s) & (held < rings.busy_s.shape[1])] = 0.0
    return np.asarray(held, np.float64)


def _weights(classes: list[RingClass], matters: Floats) -> Floats:
    """The classes' weights, chosen together by descent on a softened maximum."""
    share, used = _largest(classes)
    high: Floats = np.array([c.high for c in classes])
    tries = np.stack([_sum_of_prices(share, used, high, w, matters) for w in FIRST_WEIGHTS])
    weights = np.array(FIRST_WEIGHTS)[tries.argmin(axis=0)]
    slope = high[:, None] * (share - used)
    mean = np.zeros(len(classes))
    square = np.zeros(len(classes))
    best, best_sum = weights, np.inf
    for step in range(STEPS):
        done = step / (STEPS - 1)
        value = high[:, None] * share + weights[:, None] * slope
        top = np.maximum(value.max(axis=0), 0.0)
        if (total := float((matters * top).sum())) < best_sum:
            best, best_sum = weights, total
        soft = SOFTNESS[0] * (SOFTNESS[1] / SOFTNESS[0]) ** done * max(float(top.mean()), 1e-300)
        near = np.exp(np.maximum((value - top) / soft, -50.0))
        near /= near.sum(axis=0) + np.exp(np.maximum(-top / soft, -50.0))
        gradient = (near * slope * matters).sum(axis=1)
        mean = 0.8 * mean + 0.2 * gradient
        square = np.maximum(0.95 * square, gradient**2)
        rate = LEARNING[0] * (LEARNING[1] / LEARNING[0]) ** done
        move = rate * (1.0 + weights) * mean / np.sqrt(square + 1e-300)
        weights = np.maximum(weights - move, 0.0)
    return np.asarray(best, np.float64)


def _largest(classes: list[RingClass]) -> tuple[Floats, Floats]:
    """Shares of layers, and of what is in flight, of stages as large as they can be."""
    share, used = [], []
    for one in classes:
        held = _layers_within(one.rings, one.low)
        at = np.maximum(held - 1, 0).astype(np.int64)
        taken = _in_flight(one)[np.arange(len(at)), at]
        share.append(held / one.rings.busy_s.shape[1])
        used.append(np.where(held > 0, taken, 0.0))
    return np.stack(share), np.stack(used)


def _in_flight(one: RingClass) -> Floats:
    """Share of a ring's slots that k layers take at the class's least rate; (nodes, layers)."""
    rings, cell = one.rings, one.rings.cell
    hop = np.repeat(rings.hop_s[:, None], rings.busy_s.shape[1], axis=1)
    hop[:, -1] = 0.0  # who holds every layer may stand alone
    busy = np.where(np.isfinite(rings.busy_s), rings.busy_s, 0.0)
    slots_s = cell.rows + one.low * rings.allowed_s
    return np.asarray(one.low * (cell.micro_batch_rows * busy + hop) / slots_s, np.float64)


def _sum_of_prices(
    share: Floats, used: Floats, high: Floats, weight: float, matters: Floats
) -> Floats:
    """Each class's own sum of prices with this weight."""
    value = np.maximum((1.0 + weight) * share - weight * used, 0.0)
    return np.asarray(high * (value * matters).sum(axis=1), np.float64)


def _prices(one: RingClass, weight: float) -> Floats:
    """Each node's price for rings of this class, over all counts of layers."""
    layers = one.rings.busy_s.shape[1]
    longest_s = 1.0 / one.low if one.low else np.finfo(np.float64).max
    fits = one.rings.busy_s <= longest_s
    fits[:, :-1] &= (one.rings.linked_s <= longest_s)[:, None]
    share = np.arange(1.0, layers + 1.0)[None, :] / layers
    value = (1.0 + weight) * share - weight * _in_flight(one)
    return np.asarray(one.high * np.where(fits, value, 0.0).max(axis=1, initial=0.0), np.float64)


def _refined(classes: list[RingClass], weights: list[float], found: Floats) -> Floats:
    """Cut the classes that set a node's price until they are fine enough to matter no more."""
    for _ in range(8):
        setting = {int(i) for i in found.argmax(axis=0)}
        wide = {i for i in setting if classes[i].low and classes[i].high > FINE * classes[i].low}
        if not wide:
            break
        halves: list[tuple[RingClass, float]] = []
        for i in wide:
            one = classes[i]
            middle = float(np.sqrt(one.low * one.high))
            halves.append((RingClass(one.rings, one.low, middle), weights[i]))
            halves.append((RingClass(one.rings, middle, one.high), weights[i]))
        keep = [i for i in range(len(classes)) if i not in wide]
        found = np.concatenate([found[keep], np.stack([_prices(c, w) for c, w in halves])])
        classes = [classes[i] for i in keep] + [c for c, _ in halves]
        weights = [weights[i] for i in keep] + [w for _, w in halves]
    return found
