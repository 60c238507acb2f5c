"""Random clusters of real kinds of machine in regions: fast links inside, slow ones across."""

import random
from dataclasses import replace

from planner.facts import Cluster, CodecRate, Lengths, Link, ModelShape, Node, Workload

# name, FLOP/s reached, bytes, bytes/s, host bytes
KINDS = (
    ("a100", 1.5e14, 8.0e10, 1.5e12, 1.28e11),
    ("4090", 8.0e13, 2.4e10, 9.0e11, 6.4e10),
    ("3090", 3.5e13, 2.4e10, 8.0e11, 6.4e10),
    ("t4", 2.5e13, 1.6e10, 2.8e11, 0.0),
)
MODEL_32 = ModelShape(32, 4096, 4.4e8, 4096.0, 2, 1.05e9, 1.05e9, 4.4e8)
MODEL_80 = ModelShape(80, 8192, 1.71e9, 4096.0, 2, 5.2e8, 5.2e8, 1.7e9)
MODEL_40 = ModelShape(40, 5120, 6.3e8, 20_480.0, 2, 3.3e8, 3.3e8, 6.3e8)
MODEL_126 = ModelShape(126, 16_384, 6.3e9, 4096.0, 2, 4.2e9, 4.2e9, 6.3e9)
WORK = Workload(
    10_000, Lengths(512, 1500), Lengths(128, 400), codec={"lossless": CodecRate(1.47, 8e8)}
)


def random_cluster(seed: int, nodes: int, regions: int) -> Cluster:
    """Nodes of random kinds and regions; every pair has a link of its own up to 200 nodes."""
    pick = random.Random(seed)
    machines = tuple(_node(pick, i, regions) for i in range(nodes))
    if nodes > 200:
        near = [
            _link(pick, a, b) for a in machines for b in machines if a != b and a.region == b.region
        ]
        return Cluster(machines, tuple(near), Link("", "", 0.06, 6e6))
    links = [_link(pick, a, b) for a in machines for b in machines if a != b]
    return Cluster(machines, tuple(links))


def shared_cluster(seed: int, nodes: int) -> Cluster:
    """The same with a share of each machine, none of which holds a model; two regions, or all apart."""
    cluster, pick = random_cluster(seed, nodes, nodes if seed % 2 else 2), random.Random(seed)
    machines = tuple(
        replace(
            n, memory_bytes=min(n.memory_bytes, 2.4e10) * pick.uniform(0.2, 0.5), host_bytes=0.0
        )
        for n in cluster.nodes
    )
    return replace(cluster, nodes=machines)


def _node(pick: random.Random, number: int, regions: int) -> Node:
    kind, flop, memory, memory_rate, host = pick.choice(KINDS)
    return Node(
        name=f"n{number}",
        flop_per_s=flop * pick.uniform(0.8, 1.0),
        memory_bytes=memory * pick.uniform(0.8, 0.95),
        memory_bytes_per_s=memory_rate * pick.uniform(0.8, 1.0),
        region=f"r{pick.randrange(regions)}",
        kind=kind,
        host_bytes=host * pick.choice([0.0, 1.0]),
        host_to_device_bytes_per_s=1.2e10,
    )


def _link(pick: random.Random, a: Node, b: Node) -> Link:
    if a.region == b.region:
        return Link(a.name, b.name, pick.uniform(0.0005, 0.003), pick.uniform(5e7, 1.2e8))
    return Link(a.name, b.name, pick.uniform(0.02, 0.12), pick.uniform(2e6, 1.2e7))
