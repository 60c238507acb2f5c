"""Slots dealt to replicas: who computes which, and what a ring with replicas costs.

A ring's nodes stand in ring order, stage by stage. The replicas of a stage share the ring's slots: each
slot passes one and the same of them on every round. So a replica holds KV of its own slots only, is busy
with these only, and a link between two stages' replicas carries the slots that both ends have.

Per row of the whole ring, a node with a share f of the slots is busy for f times its seconds per row,
and likewise a link; a row's life is the mean over the slots. Little's law with the mean life is exact
where all slots carry equally many rows; slots that go round sooner than others only carry more.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from planner.chain import Ring
from planner.cost import Cell, Floats
from planner.network import NetworkCost, PortCost

Dealt = tuple[tuple[int, ...], ...]
"""The slots of every node of a ring, in its order; empty where every node has all of them."""


def in_runs(counts: Sequence[int]) -> Dealt:
    """So many slots for each replica, one after the other: neighbours' runs meet in few pairs."""
    ends = np.cumsum(counts)
    return tuple(tuple(range(int(end) - n, int(end))) for end, n in zip(ends, counts, strict=True))


def in_turn(counts: Sequence[int]) -> Dealt:
    """The same counts, each spread evenly over the slots: the pairs with a neighbour's runs are many."""
    turns = sorted(((i + 0.5) / n, who) for who, n in enumerate(counts) for i in range(n))
    return tuple(
        tuple(slot for slot, (_, owner) in enumerate(turns) if owner == who)
        for who in range(len(counts))
    )


def stages_of(nodes: int, dealt: Dealt) -> tuple[tuple[int, ...], ...]:
    """Places of the nodes of each stage: replicas stand side by side until all slots are dealt."""
    if not dealt:
        return tuple((place,) for place in range(nodes))
    slots = len(set(chain.from_iterable(dealt)))
    stages: list[tuple[int, ...]] = []
    open_places: list[int] = []
    for place in range(nodes):
        open_places.append(place)
        if sum(len(dealt[p]) for p in open_places) == slots:
            stages.append(tuple(open_places))
            open_places = []
    assert not open_places, "every slot has one node in every stage"
    return tuple(stages)


def dealt_anew(nodes: int, dealt: Dealt, in_flight: int) -> Dealt | None:
    """The same shares of another number of slots, as near as whole slots can be; None if too few."""
    if not dealt:
        return ()
    found: list[tuple[int, ...]] = []
    for stage in stages_of(nodes, dealt):
        old = [dealt[place] for place in stage]
        if len(old) > in_flight:
            return None
        counts = shared(in_flight, [float(len(slots)) for slots in old])
        runs = all(slots[-1] - slots[0] == len(slots) - 1 for slots in old)
        # Runs keep the order in which they were dealt, which need not be that of the nodes.
        order = sorted(range(len(old)), key=lambda i: old[i]) if runs else list(range(len(old)))
        new = (in_runs if runs else in_turn)([counts[i] for i in order])
        found.extend(new[order.index(i)] for i in range(len(old)))
    return tuple(found)


def shared(slots: int, speeds: Sequence[float]) -> list[int]:
    """Slots for each in proportion to its speed, one at least, by largest remainders."""
    wanted = [slots * speed / sum(speeds) for speed in speeds]
    counts = [max(int(each), 1) for each in wanted]
    while sum(counts) < slots:
        short = max(range(len(counts)), key=lambda i: (wanted[i] - counts[i], -i))
        counts[short] += 1
    while sum(counts) > slots:
        rich = [i for i, n in enumerate(counts) if n > 1]
        counts[max(rich, key=lambda i: (counts[i] - wanted[i], i))] -= 1
    return counts


def dealt_ring(
    cell: Cell, busy_s: Floats, links: NetworkCost, ports: PortCost, dealt: Dealt
) -> Ring:
    """The costs of a ring whose slots are dealt so, all of it in the order of its nodes.

    `busy_s`, of shape (nodes, layers), is per row that the node computes, with its own slots' KV.
    """
    stages = stages_of(len(dealt), dealt)
    has = np.zeros((len(dealt), cell.in_flight))
    for place, slots in enumerate(dealt):
        has[place, list(slots)] = 1.0
    part = has.mean(axis=1)
    weighed = busy_s * part[:, None]
    flow = has @ has.T / cell.in_flight
    hops = []
    for number, stage in enumerate(stages):
        target = stages[(number + 1) % len(stages)]
        last = number == len(stages) - 1
        hops.append(hop_cost(links, ports, (stage, target), (part, flow), last))
    return Ring(
        np.stack([weighed[list(stage)].max(axis=0) for stage in stages]),
        np.stack([weighed[list(stage)].sum(axis=0) for stage in stages]),
        np.stack([occupied for occupied, _ in hops]),
        np.stack([hop for _, hop in hops]),
        cell.micro_batch_rows,
        cell.in_flight,
    )


def hop_cost(
    links: NetworkCost,
    ports: PortCost,
    ends: tuple[tuple[int, ...], tuple[int, ...]],
    shares: tuple[Floats, Floats],
    last: bool,
) -> tuple[Floats, Floats]:
    """(occupied, hop) seconds of a row between two stages, by codec; the last hop returns ids, raw.

    The busiest of all links, and of the ports that several links of one node share, counts.
    """
    source, target = (list(end) for end in ends)
    part, flow = shares
    pairs = np.ix_(source, target)
    carried = flow[pairs]
    if last:
        occupied, hop = links.return_occupied_s[pairs][None], links.return_hop_s[pairs][None]
        out, into = ports.return_out_s[None, source], ports.return_into_s[None, target]
    else:
        occupied = np.stack([codec[pairs] for codec in links.occupied_s])
        hop = np.stack([codec[pairs] for codec in links.hop_s])
        out, into = ports.out_s[:, source], ports.into_s[:, target]
    used = carried > 0
    with np.errstate(invalid="ignore"):  # a link that carries nothing may be none
        busiest = np.where(used, occupied * carried, 0.0).max(axis=(1, 2))
        mean = np.where(used, hop * carried, 0.0).sum(axis=(1, 2))
    busiest = np.maximum(busiest, (out * part[source]).max(axis=1))
    busiest = np.maximum(busiest, (into * part[target]).max(axis=1))
    if last:  # raw, whatever the codec's column
        wide = (0, len(links.occupied_s) - 1)
        busiest, mean = (np.pad(each, wide, constant_values=np.inf) for each in (busiest, mean))
    return busiest, mean
