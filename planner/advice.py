"""What the next best changes to a cluster would bring, each by planning again."""

from dataclasses import dataclass, replace

from planner.facts import Cluster, Link, ModelShape, Node, Workload
from planner.grid import cells
from planner.plan import Pipeline, Plan
from planner.problem import Problem, judged, problem
from planner.ring import rings_of
from planner.solve import best_rings, suited


@dataclass(frozen=True, slots=True)
class Advice:
    """One change and the output tokens per second that the best plan has after it."""

    change: str
    tokens_per_s: float
    gain: float
    """Fraction above the plan's own speed."""

    def __str__(self) -> str:
        return f"{self.change}: {self.tokens_per_s:.4g} tokens/s ({self.gain:+.0%})"


def advise(
    cluster: Cluster, model: ModelShape, workload: Workload, plan: Plan
) -> tuple[Advice, ...]:
    """The changes that help most, best first; each is planned for, from this plan on.

    Tried are one more node like the fastest, the widest link of the slowest pipeline twice as
    fast, and half as much memory again on each node of that pipeline.
    """
    given = problem(cluster, model, workload)
    slowest = max(plan.pipelines, key=lambda pipeline: judged(given, pipeline).split.row_s)
    changes = [_one_more_node(cluster), *_faster_links(given, slowest)]
    changes.extend(_more_memory(cluster, stage.node) for stage in slowest.stages)
    advice = []
    for words, changed in changes:
        again = _tokens_per_s(problem(changed, model, workload), plan)
        advice.append(Advice(words, again, again / plan.tokens_per_s - 1.0))
    return tuple(sorted(advice, key=lambda a: -a.tokens_per_s))


def _tokens_per_s(given: Problem, plan: Plan) -> float:
    """What the best plan reaches here; certificates of what no plan would reach are left out."""
    tried = cells(given.work)
    replicate = any(pipeline.replicated for pipeline in plan.pipelines)
    best = best_rings(given, tried, rings_of(given, plan), replicate=replicate)
    rings = suited(given, tried, best)
    return sum(ring.rows_per_s for ring in rings) * given.work.output_tokens.mean


def _one_more_node(cluster: Cluster) -> tuple[str, Cluster]:
    fastest = max(cluster.nodes, key=lambda node: (node.flop_per_s, node.name))
    twin = replace(fastest, name=_unused_name(cluster, fastest))
    copies = [
        replace(link, source=twin.name) for link in cluster.links if link.source == fastest.name
    ]
    copies += [
        replace(link, target=twin.name) for link in cluster.links if link.target == fastest.name
    ]
    # Twins stand side by side: between them the best link that either has.
    best = max(copies, key=lambda link: link.bytes_per_s, default=cluster.default_link)
    if best:
        pair = ((twin.name, fastest.name), (fastest.name, twin.name))
        copies += [Link(a, b, best.latency_s, best.bytes_per_s, best.loss) for a, b in pair]
    return (
        f"one more node like {fastest.name}",
        replace(cluster, nodes=(*cluster.nodes, twin), links=(*cluster.links, *copies)),
    )


def _unused_name(cluster: Cluster, node: Node) -> str:
    names = {other.name for other in cluster.nodes}
    return next(n for i in range(2, len(names) + 3) if (n := f"{node.name}-{i}") not in names)


def _faster_links(given: Problem, pipeline: Pipeline) -> list[tuple[str, Cluster]]:
    """The slowest forward link of a pipeline, twice as fast."""
    heads = {stage.node for stage in pipeline.ranges[0]}
    forward = [link for link in pipeline.links if link.target not in heads]
    if not forward:
        return []
    at = {node.name: i for i, node in enumerate(given.nodes)}
    rates = given.net.bytes_per_s
    slowest = min(forward, key=lambda link: float(rates[at[link.source], at[link.target]]))
    old = given.cluster.link(slowest.source, slowest.target)
    if old is None:
        return []
    faster = replace(old, bytes_per_s=old.bytes_per_s * 2.0)
    nodes = tuple(
        replace(
            node,
            up_bytes_per_s=node.up_bytes_per_s * (2.0 if node.name == slowest.source else 1.0),
            down_bytes_per_s=node.down_bytes_per_s * (2.0 if node.name == slowest.target else 1.0),
        )
        for node in given.nodes
    )
    # The first fact about a link counts, so the faster one goes first.
    changed = replace(given.cluster, nodes=nodes, links=(faster, *given.cluster.links))
    return [(f"link {slowest.source} -> {slowest.target} twice as fast", changed)]


def _more_memory(cluster: Cluster, name: str) -> tuple[str, Cluster]:
    nodes = tuple(
        replace(node, memory_bytes=node.memory_bytes * 1.5) if node.name == name else node
        for node in cluster.nodes
    )
    return f"half as much memory again on {name}", replace(cluster, nodes=nodes)
