"""The best ring through given nodes, in one cell: their order, split, codecs and offload, exactly."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from planner.bounds import head_s
from planner.chain import Split, best_split, convex_minorant, fill, least_fill_s
from planner.cost import Floats, Role
from planner.orders import path_s, path_table, short_path, trace_path
from planner.plan import Plan
from planner.problem import CellCosts, Found, Problem, judged

QUICK_STARTS = 3
"""Nodes from which a short path is tried before the table of all subsets is built."""


def rings_of(given: Problem, plan: Plan) -> list[Found]:
    """A plan's rings as they run here: those whose nodes are all there and can still carry them."""
    names = {node.name for node in given.nodes}
    rings = []
    for pipeline in plan.pipelines:
        if all(stage.node in names for stage in pipeline.stages):
            ring = judged(given, pipeline)
            if np.isfinite(ring.split.row_s):
                rings.append(ring)
    return rings


@dataclass(frozen=True, slots=True)
class _Members:
    """One cell's costs of the members alone, in the members' own numbering."""

    first_s: Floats
    middle_s: Floats
    last_s: Floats
    first_hull_s: Floats
    middle_hull_s: Floats
    last_hull_s: Floats
    """The tables' convex minorants, for bounds."""
    occupied_s: Floats
    hop_s: Floats
    return_occupied_s: Floats
    return_hop_s: Floats
    rows: int
    micro_batch_rows: int


@dataclass(frozen=True, slots=True)
class _Way:
    """An order of the members and the life that it gives."""

    life_s: float
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Within:
    """What a threshold leaves open: cheapest usable hops, and bounds by (first, last) node."""

    longest_s: float
    hops: Floats
    back: Floats
    least_s: Floats
    """A life's lower bound; infinite where the layers do not fit or no link is usable."""
    compute_s: Floats
    """Of that the compute part."""


def solve_ring(
    costs: CellCosts, members: tuple[int, ...], floor_s: float = 0.0, beat_s: float = np.inf
) -> Found | None:
    """The ring through exactly these nodes of least seconds per row, or None if not below `beat_s`.

    As `best_split`, but at each threshold the least life is sought over all orders too. `floor_s`
    is a known lower bound of the answer and only saves time.
    """
    if len(members) == 1:
        return _single(costs, members[0], beat_s)
    own = _members(costs, members)
    values = _thresholds(own, floor_s, beat_s)
    if not len(values) or not _way(own, float(values[-1]), beat_s, beat_s):
        return None
    low, high = 0, len(values)
    way: _Way | None = None
    while low < high:
        middle = (low + high) // 2
        reached = _way(own, float(values[middle]), float(values[middle]), float(values[middle]))
        if reached:
            way, high = reached, middle
        else:
            low = middle + 1
    if low:  # just below the crossing the life alone decides
        limit = float(values[low]) if low < len(values) else beat_s
        way = _way(own, float(values[low - 1]), 0.0, limit) or way
    return _found(costs, members, own, way, beat_s)


def _found(
    costs: CellCosts, members: tuple[int, ...], own: _Members, way: _Way | None, beat_s: float
) -> Found | None:
    if way is None:
        return None
    order = tuple(members[i] for i in way.order)
    split = best_split(costs.ring(order))
    return Found(costs.cell, order, split) if split and split.row_s < beat_s else None


def _single(costs: CellCosts, node: int, beat_s: float) -> Found | None:
    ring = costs.ring((node,))
    busy = float(ring.busy_s[0, -1])
    # One node computes one micro-batch at a time: its life is its own busy time.
    if not busy < beat_s:
        return None
    life = busy * ring.micro_batch_rows
    return Found(costs.cell, (node,), Split(busy, life, (ring.busy_s.shape[1],), ()))


def _members(costs: CellCosts, members: tuple[int, ...]) -> _Members:
    at = list(members)
    square = np.ix_(at, at)
    links = costs.links
    first, middle, last = (
        costs.stages[role].busy_s[at] for role in (Role.FIRST, Role.MIDDLE, Role.LAST)
    )
    return _Members(
        first,
        middle,
        last,
        convex_minorant(first),
        convex_minorant(middle),
        convex_minorant(last),
        np.stack([codec[square] for codec in links.occupied_s]),
        np.stack([codec[square] for codec in links.hop_s]),
        links.return_occupied_s[square],
        links.return_hop_s[square],
        costs.cell.rows,
        costs.cell.micro_batch_rows,
    )


def _thresholds(own: _Members, floor_s: float, beat_s: float) -> Floats:
    """Values that the longest busy time can take, from the last one below the floor."""
    tables = (own.first_s, own.middle_s, own.last_s, own.occupied_s, own.return_occupied_s)
    values = np.unique(np.concatenate([table.ravel() for table in tables]))
    values = values[(values > 0) & (values < beat_s)]
    start = max(int(np.searchsorted(values, floor_s * (1 - 1e-9))) - 1, 0)
    return np.asarray(values[start:], np.float64)


def _way(own: _Members, longest_s: float, enough_s: float, limit_s: float) -> _Way | None:
    """An order within the threshold of at most `limit_s` per row; the best, or one of `enough_s`.

    Bounds and short paths settle most questions; the table of all subsets settles the rest.
    """
    enough, limit = (s * own.rows * (1 + 1e-12) for s in (enough_s, limit_s))
    within = _within(own, longest_s)
    if within is None or not within.least_s.min() <= limit:
        return None
    quick = _quick(own, within, enough)
    if quick and quick.life_s <= enough:
        return quick
    best = _best_way(own, within, limit)
    return best if best and best.life_s <= limit else None


def _within(own: _Members, longest_s: float) -> _Within | None:
    layers = own.middle_s.shape[1]
    middle, first, last = (
        (t <= longest_s).sum(axis=1) for t in (own.middle_s, own.first_s, own.last_s)
    )
    held = middle.sum() + (first - middle)[:, None] + (last - middle)[None, :]
    if held.max() < layers or middle.min() < 1 or len(middle) > layers:
        return None
    # The middle role's tables are the least; where its layers do not add up, no role's do.
    if middle.sum() < layers:
        return None
    stages_s = least_fill_s(own.middle_hull_s, middle, layers)[0]
    usable = own.occupied_s <= longest_s
    hops = np.where(usable, own.hop_s, np.inf).min(axis=0)
    np.fill_diagonal(hops, np.inf)
    back = np.where(own.return_occupied_s <= longest_s, own.return_hop_s, np.inf).T
    extra_s = np.where(last > 0, head_s(own.middle_s, own.last_s), np.inf)[None, :]
    # The last node has no step onward, so its cheapest one is free.
    onward = hops.min(axis=1)
    with np.errstate(invalid="ignore"):
        links_s = np.where(np.isfinite(onward), onward, 0.0).sum() - onward[None, :]
    stuck = np.isinf(onward)
    if stuck.sum() > 1:
        return None
    links_s = np.where(stuck[None, :], np.where(np.isfinite(onward), onward, 0.0).sum(), links_s)
    if stuck.any():  # who has no way onward can only be last
        links_s = np.where(stuck[None, :], links_s, np.inf)
    compute = own.micro_batch_rows * (stages_s + extra_s)
    least = compute + links_s + back
    least = np.where((held >= layers) & (first > 0)[:, None], least, np.inf)
    np.fill_diagonal(least, np.inf)
    return _Within(longest_s, hops, back, least, compute)


def _quick(own: _Members, within: _Within, enough_s: float) -> _Way | None:
    """The first short path that is good enough, starting from the most promising ends."""
    firsts = np.argsort(within.least_s.min(axis=1), kind="stable")[:QUICK_STARTS]
    for first in firsts:
        if not within.least_s[first].min() <= enough_s:
            return None
        order = short_path(within.hops, int(first))
        life = path_s(within.hops, order) + within.back[first, order[-1]]
        if not life <= enough_s or np.isinf(life):
            continue
        left_s, ends = enough_s - life, (int(first), order[-1])
        life += _compute_life(own, within.longest_s, ends, left_s, left_s)
        if life <= enough_s:
            return _Way(float(life), order)
    return None


def _best_way(own: _Members, within: _Within, limit_s: float) -> _Way | None:
    """The order of least life, from the table of all subsets."""
    table = _known_paths(within.hops.tobytes(), len(within.hops))
    paths = table[-1] + within.back
    # A pair of ends can give no less than its bound, so the best bounds are looked at first.
    least = np.where(np.isfinite(within.least_s), paths + within.compute_s, np.inf)
    best_s, ends = limit_s * (1 + 1e-12), None
    for at in np.argsort(least, axis=None, kind="stable"):
        first, last = divmod(int(at), len(paths))
        if not least[first, last] <= best_s or np.isinf(least[first, last]):
            break
        pair, left_s = (first, last), best_s - paths[first, last]
        compute_s = _compute_life(own, within.longest_s, pair, -np.inf, left_s)
        whole = float(paths[first, last]) + compute_s
        if whole < best_s or (ends is None and whole <= best_s):
            best_s, ends = whole, pair
    if ends is None:
        return None
    return _Way(best_s, trace_path(table, within.hops, *ends))


@lru_cache(maxsize=64)
def _known_paths(hops: bytes, nodes: int) -> Floats:
    """The table of paths; many cells and thresholds ask for the same one."""
    return path_table(np.frombuffer(hops, np.float64).reshape(nodes, nodes))


def _compute_life(
    own: _Members, longest_s: float, ends: tuple[int, int], enough_s: float, limit_s: float
) -> float:
    """The compute part of a life: the least over all splits, or one of at most `enough_s`.

    Infinite where the layers do not fit, or surely above `limit_s`.
    """
    first, last = ends
    if first == last:
        return np.inf
    busy, hull = own.middle_s.copy(), own.middle_hull_s.copy()
    busy[first], busy[last] = own.first_s[first], own.last_s[last]
    hull[first], hull[last] = own.first_hull_s[first], own.last_hull_s[last]
    most, layers = (busy <= longest_s).sum(axis=1), busy.shape[1]
    if most.min() < 1 or most.sum() < layers or len(most) > layers:
        return np.inf
    least, split = least_fill_s(hull, most, layers)
    if least * own.micro_batch_rows > limit_s:
        return np.inf
    suggested = float(busy[np.arange(len(busy)), np.array(split) - 1].sum())
    if suggested > least * (1 + 1e-12) and suggested * own.micro_batch_rows > enough_s:
        exact = fill(busy, most, layers)
        assert exact is not None, "the layers were counted a moment ago"
        suggested = float(busy[np.arange(len(busy)), np.array(exact) - 1].sum())
    return suggested * own.micro_batch_rows
