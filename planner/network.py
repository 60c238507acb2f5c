"""Links as matrices over the nodes' order, and what they cost in one cell."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.cost import Cell, Floats, forward_link, return_link
from planner.facts import Cluster, CodecRate, ModelShape, Node, Workload


@dataclass(frozen=True, slots=True)
class Network:
    """One-way latency and usable bytes per second, shape (n, n); 0 bytes where no link is."""

    latency_s: Floats
    bytes_per_s: Floats


@dataclass(frozen=True, slots=True)
class NetworkCost:
    """Every link's cost per row in one cell: forward by codec (codecs, n, n), and return (n, n).

    Infinite where nothing can pass.
    """

    occupied_s: Floats
    hop_s: Floats
    return_occupied_s: Floats
    return_hop_s: Floats

    def among(self, order: Sequence[int]) -> "NetworkCost":
        """The links between some of the nodes, in that order."""
        to = np.ix_(list(order), list(order))
        occupied = np.stack([codec[to] for codec in self.occupied_s])
        hop = np.stack([codec[to] for codec in self.hop_s])
        return NetworkCost(occupied, hop, self.return_occupied_s[to], self.return_hop_s[to])


@dataclass(frozen=True, slots=True)
class PortCost:
    """What nodes' own ways out and in cost a row, with its coding: forward (codecs, n), return (n,).

    One link never costs less than its ports; of several that share one, each takes its part of it.
    """

    out_s: Floats
    into_s: Floats
    return_out_s: Floats
    return_into_s: Floats

    def among(self, order: Sequence[int]) -> "PortCost":
        """The ports of some of the nodes, in that order."""
        at = list(order)
        out, into = self.return_out_s[at], self.return_into_s[at]
        return PortCost(self.out_s[:, at], self.into_s[:, at], out, into)


def network(cluster: Cluster) -> Network:
    """The cluster's links; a node to itself costs nothing, and its NIC caps what a node sends.

    Loss is charged as the bytes that must go again: rate x (1 - loss).
    """
    n = len(cluster.nodes)
    default = cluster.default_link
    latency = np.full((n, n), default.latency_s if default else 0.0)
    rate = np.full((n, n), default.bytes_per_s * (1.0 - default.loss) if default else 0.0)
    at = {node.name: i for i, node in enumerate(cluster.nodes)}
    seen: set[tuple[int, int]] = set()
    for link in cluster.links:
        if link.source in at and link.target in at:
            i, j = at[link.source], at[link.target]
            # As Cluster.link: of two facts about one link, the first counts.
            if (i, j) not in seen:
                latency[i, j], rate[i, j] = link.latency_s, link.bytes_per_s * (1.0 - link.loss)
            seen.add((i, j))
    up = np.array([node.up_bytes_per_s for node in cluster.nodes])[:, None]
    down = np.array([node.down_bytes_per_s for node in cluster.nodes])[None, :]
    rate = np.minimum(np.minimum(rate, up), down)
    np.fill_diagonal(latency, 0.0)
    np.fill_diagonal(rate, np.inf)
    return Network(latency, rate)


def codec_options(work: Workload) -> tuple[tuple[str, CodecRate | None], ...]:
    """Codecs that a link may use, raw first."""
    return (("raw", None), *work.codec.items())


def network_cost(net: Network, model: ModelShape, work: Workload, cell: Cell) -> NetworkCost:
    """What every link costs a row, for each codec."""
    forward = [
        forward_link(net.latency_s, net.bytes_per_s, codec, model, work, cell)
        for _, codec in codec_options(work)
    ]
    back = return_link(net.latency_s, net.bytes_per_s, work, cell)
    return NetworkCost(
        np.stack([cost.occupied_s for cost in forward]),
        np.stack([cost.hop_s for cost in forward]),
        back.occupied_s,
        back.hop_s,
    )


def port_cost(nodes: Sequence[Node], model: ModelShape, work: Workload, cell: Cell) -> PortCost:
    """What a row costs the ports of these nodes, for each codec."""
    none = np.zeros(len(nodes))
    up, down = (
        np.array(rates, np.float64)
        for rates in ([n.up_bytes_per_s for n in nodes], [n.down_bytes_per_s for n in nodes])
    )
    forward = [
        [forward_link(none, rate, codec, model, work, cell).occupied_s for rate in (up, down)]
        for _, codec in codec_options(work)
    ]
    back = [return_link(none, rate, work, cell).occupied_s for rate in (up, down)]
    return PortCost(
        np.stack([out for out, _ in forward]), np.stack([into for _, into in forward]), *back
    )
