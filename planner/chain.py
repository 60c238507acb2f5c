"""The best split of layers over stages in a fixed order, exactly.

Busy tables never fall with layers, so for a time per row T stage j may hold at most g_j(T) layers.
Raising T loosens every choice, so the row's life can only shrink; the optimum of
max(T, life / rows in flight) therefore lies where the two cross, found by bisection over the
finitely many values that T can take.
"""

from dataclasses import dataclass

import numpy as np

from planner.cost import Floats, Ints


@dataclass(frozen=True, slots=True)
class Ring:
    """Stages in ring order and the links between them, as costs of one cell.

    `busy_s` has shape (stages, layers); `occupied_s` and `hop_s` have shape (links, codecs), one
    link after every stage, or none at all for a single stage.
    """

    busy_s: Floats
    """Seconds per row that a stage is busy; of replicas, the busiest."""
    stay_s: Floats
    """Seconds per row that a row spends being computed there: the same, but for replicas the mean."""
    occupied_s: Floats
    hop_s: Floats
    micro_batch_rows: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class Split:
    """Layers of each stage and codec of each link, and the seconds per row that follow."""

    row_s: float
    life_s: float
    layers: tuple[int, ...]
    codecs: tuple[int, ...]


def best_split(ring: Ring) -> Split | None:
    """The split and codecs of least `row_s`; of those, the least life. None if nothing fits."""
    candidates = _candidates(ring)
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        split = split_within(ring, candidates[middle])
        if split is not None and split.row_s <= candidates[middle] * (1 + 1e-12):
            high = middle
        else:
            low = middle + 1
    around = [split_within(ring, candidates[i]) for i in (low - 1, low) if 0 <= i < len(candidates)]
    return min((s for s in around if s), key=lambda s: (s.row_s, s.life_s), default=None)


def _candidates(ring: Ring) -> Floats:
    """Values that the longest busy time of a stage or link can take, rising."""
    values = np.unique(np.concatenate([ring.busy_s.ravel(), ring.occupied_s.ravel()]))
    values = values[np.isfinite(values)]
    floor = ring.busy_s[:, 0].max()
    if ring.occupied_s.size:
        floor = max(floor, ring.occupied_s.min(axis=1).max())
    return np.asarray(values[values >= floor], np.float64)


def split_within(ring: Ring, longest_s: float) -> Split | None:
    """The split of least life in which no stage or link is busy for longer than `longest_s`."""
    most = (ring.busy_s <= longest_s).sum(axis=1)
    layers = fill(ring.stay_s, most, ring.busy_s.shape[1])
    if layers is None:
        return None
    if not ring.occupied_s.size:
        return split_as(ring, layers, ())
    hops = np.where(ring.occupied_s <= longest_s, ring.hop_s, np.inf)
    if not np.isfinite(hops.min(axis=1)).all():
        return None
    return split_as(ring, layers, tuple(int(c) for c in hops.argmin(axis=1)))


def split_as(ring: Ring, layers: tuple[int, ...], codecs: tuple[int, ...]) -> Split:
    """What follows of these layers and codecs; infinite where the ring cannot run so."""
    stages = np.arange(len(layers)), np.array(layers) - 1
    links = np.arange(len(codecs)), np.array(codecs, np.int64)
    life_s = float(ring.stay_s[stages].sum()) * ring.micro_batch_rows
    life_s += float(ring.hop_s[links].sum())
    longest_s = max(
        float(ring.busy_s[stages].max()), float(ring.occupied_s[links].max(initial=0.0))
    )
    row_s = max(longest_s, life_s / (ring.micro_batch_rows * ring.in_flight))
    return Split(row_s, life_s, layers, codecs)


def fill(stay_s: Floats, most: Ints, layers: int) -> tuple[int, ...] | None:
    """Layers per stage, at least one and at most so many each, of least total time."""
    if most.min() < 1 or most.sum() < layers or len(most) > layers:
        return None
    if _convex(stay_s, most):
        return _fill_fastest_first(stay_s, most, layers)
    return _fill_by_table(stay_s, most, layers)


def _convex(busy_s: Floats, most: Ints) -> bool:
    """Whether each further layer of a stage costs at least as much as the one before it."""
    inside = np.arange(busy_s.shape[1])[None, 2:] < most[:, None]
    with np.errstate(invalid="ignore"):
        bend = np.diff(busy_s, 2)
    return not bool((inside & (bend < -1e-12 * busy_s[:, :1])).any())


def _fill_fastest_first(busy_s: Floats, most: Ints, layers: int) -> tuple[int, ...]:
    """Convex tables: the cheapest next layer first is optimal (Gross 1956)."""
    with np.errstate(invalid="ignore"):
        steps = np.diff(busy_s, 1)
    open_steps = np.arange(1, busy_s.shape[1])[None, :] < most[:, None]
    stage, step = np.nonzero(open_steps)
    order = np.argsort(steps[stage, step], kind="stable")[: layers - len(most)]
    return tuple(int(n) for n in 1 + np.bincount(stage[order], minlength=len(most)))


def least_fill_s(hull_s: Floats, most: Ints, layers: int) -> tuple[float, tuple[int, ...]]:
    """A lower bound of a fill's total busy time by convex minorants, and the fill that it suggests."""
    split = _fill_fastest_first(hull_s, most, layers)
    return float(hull_s[np.arange(len(most)), np.array(split) - 1].sum()), split


def convex_minorant(busy_s: Floats) -> Floats:
    """The greatest convex table below each row's finite part (its lower hull)."""
    hulls = busy_s.copy()
    for row, hull in zip(busy_s, hulls, strict=True):
        finite = int(np.isfinite(row).sum())
        if finite > 2 and (np.diff(row[:finite], 2) < -1e-12 * row[0]).any():
            corners = _lower_corners(row[:finite].tolist())
            hull[:finite] = np.interp(np.arange(finite), corners, row[corners])
    return hulls


def _lower_corners(values: list[float]) -> list[int]:
    corners: list[int] = []
    for x, y in enumerate(values):
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            if (values[b] - values[a]) * (x - a) < (y - values[a]) * (b - a):
                break
            corners.pop()
        corners.append(x)
    return corners


def _fill_by_table(busy_s: Floats, most: Ints, layers: int) -> tuple[int, ...]:
    """Any tables: least[l] after each stage is the least total busy time of l layers."""
    least = np.full(layers + 1, np.inf)
    least[0] = 0.0
    chosen = np.zeros((len(most), layers + 1), np.int64)
    # Row l of the window is least[l - 1], least[l - 2], ...: what each count of layers leaves.
    window = np.arange(layers + 1)[:, None] - np.arange(1, layers + 1)[None, :]
    outside, window = window < 0, np.maximum(window, 0)
    for stage, cap in enumerate(np.minimum(most, layers)):
        before = np.where(outside[:, :cap], np.inf, least[window[:, :cap]])
        total = before + busy_s[stage, None, :cap]
        chosen[stage] = total.argmin(axis=1) + 1
        least = total[np.arange(layers + 1), chosen[stage] - 1]
    split: list[int] = []
    left = layers
    for stage in range(len(most) - 1, -1, -1):
        split.append(int(chosen[stage, left]))
        left -= split[-1]
    return tuple(reversed(split))
