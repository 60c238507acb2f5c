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
    layers = fill(ring.busy_s, longest_s, ring.busy_s.shape[1])
    if layers is None:
        return None
    codecs: tuple[int, ...] = ()
    links_s = longest = 0.0
    if ring.occupied_s.size:
        hops = np.where(ring.occupied_s <= longest_s, ring.hop_s, np.inf)
        chosen = hops.argmin(axis=1)
        at = np.arange(len(chosen))
        links_s, longest = float(hops[at, chosen].sum()), float(ring.occupied_s[at, chosen].max())
        codecs = tuple(int(c) for c in chosen)
    if not np.isfinite(links_s):
        return None
    stages_s = ring.busy_s[np.arange(len(layers)), np.array(layers) - 1]
    life_s = float(stages_s.sum()) * ring.micro_batch_rows + links_s
    row_s = max(longest, float(stages_s.max()), life_s / (ring.micro_batch_rows * ring.in_flight))
    return Split(row_s, life_s, layers, codecs)


def fill(busy_s: Floats, longest_s: float, layers: int) -> tuple[int, ...] | None:
    """Layers per stage, at least one each, of least total busy time with none above `longest_s`."""
    most = (busy_s <= longest_s).sum(axis=1)
    if most.min() < 1 or most.sum() < layers or len(most) > layers:
        return None
    if _convex(busy_s, most):
        return _fill_fastest_first(busy_s, most, layers)
    return _fill_by_table(busy_s, most, layers)


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
