"""Rates that no plan can beat, whatever its pipelines: the other half of a plan's certificate."""

from dataclasses import dataclass

import numpy as np

from planner.cost import Cell, Floats, Role, stage_table
from planner.facts import ModelShape, Node, Workload

ROUNDING = 1e-12
"""Where nodes carry just what they must, a sum's last bits are not to say that they do not."""


@dataclass(frozen=True, slots=True)
class Floor:
    """The least seconds per row of (node, layers) over a grid of cells, shape (nodes, layers).

    `ending_s` is for a stage that also has the LM head.
    """

    middle_s: Floats
    ending_s: Floats

    def below(self, other: "Floor") -> "Floor":
        """The least of both, element by element."""
        return Floor(
            np.minimum(self.middle_s, other.middle_s), np.minimum(self.ending_s, other.ending_s)
        )


def floor_of(nodes: tuple[Node, ...], model: ModelShape, work: Workload, cell: Cell) -> Floor:
    """What stages cost in this cell at least, wherever in the ring they stand."""
    middle = stage_table(nodes, model, work, cell, Role.MIDDLE).busy_s
    return Floor(middle, stage_table(nodes, model, work, cell, Role.LAST).busy_s)


def capped_compute_bound(floor: Floor) -> float:
    """Rows per second that all nodes together cannot exceed.

    The largest F with sum over nodes of max over k of k x min(rate at k layers, F) >= layers x F:
    every row crosses every layer once, on one node, and no node passes more rows than there are: so
    with replicas too, where the floor allows each a single slot. The LM head
    counts as `extra` layers, the least it costs on any node, and as so many more where it is held.
    """
    extra = head_in_layers(floor)
    layers = floor.middle_s.shape[1]
    k = np.arange(1.0, layers + 1.0)[None, :]
    held = np.concatenate([np.broadcast_to(k, floor.middle_s.shape)] * 2, axis=1)
    held[:, layers:] += extra
    with np.errstate(divide="ignore"):
        rate = 1.0 / np.concatenate([floor.middle_s, floor.ending_s], axis=1)
    low, high = 0.0, float((held * rate).max(axis=1).sum() / (layers + extra))
    for _ in range(60):
        middle = (low + high) / 2.0
        carried = float((held * np.minimum(rate, middle)).max(axis=1).sum())
        enough = (layers + extra) * middle * (1.0 - ROUNDING)
        low, high = (middle, high) if carried >= enough else (low, middle)
    return high


def cut_bound(floor: Floor, parted: tuple[float, list[tuple[int, ...]]] | None) -> float:
    """Rows per second that all nodes cannot exceed where slow links part them into groups.

    Rings faster than the links between groups lie in one group; where a group does not hold all
    layers, none of its nodes passes more rows per second than those links. Of rings without replicas
    only: with them many links between groups may share what crosses.
    """
    if parted is None:
        return float("inf")
    slow, groups = parted
    layers = floor.middle_s.shape[1]
    k = np.arange(1.0, layers + 1.0)[None, :]
    held = np.isfinite(floor.middle_s).sum(axis=1)
    most = np.full(len(held), slow)
    for group in groups:
        if held[list(group)].sum() >= layers:
            most[list(group)] = np.inf
    with np.errstate(divide="ignore"):
        rate = np.minimum(1.0 / floor.middle_s, most[:, None])
    return float((k * rate).max(axis=1).sum() / layers)


def head_in_layers(floor: Floor) -> float:
    """The LM head's cost in layers, on the node where it weighs least."""
    k = np.arange(1.0, floor.middle_s.shape[1] + 1.0)[None, :]
    both = np.isfinite(floor.ending_s) & np.isfinite(floor.middle_s) & (floor.middle_s > 0)
    if not both.any():
        return 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        extra = (floor.ending_s - floor.middle_s) * k / floor.middle_s
    return max(float(extra[both].min()), 0.0)


def head_s(middle: Floats, last: Floats) -> Floats:
    """What the LM head adds to a stage of each node at least; infinite where it cannot be."""
    fits = np.isfinite(last)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(fits, last - middle, np.inf).min(axis=1), np.float64)
