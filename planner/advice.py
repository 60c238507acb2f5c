"""What the next best changes to a cluster would bring, each by planning again."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from planner.exact import EXACT_NODES
from planner.facts import Cluster, Link, ModelShape, Node, Workload
from planner.finish import finish_s
from planner.grid import cells
from planner.large import HASTY
from planner.plan import LinkPlan, Pipeline, Plan
from planner.problem import Found, Problem, judged, problem
from planner.ring import rings_of
from planner.rounds import link_part
from planner.solve import FEW_JOB_ROWS, best_rings, suited

MOST_CHANGES = 8
"""Each is planned for, hastily on many nodes."""
WORTH = 0.005
"""What saves less of the time is not told."""


@dataclass(frozen=True, slots=True)
class Advice:
    """One change, and what the best plan found after it comes to."""

    change: str
    tokens_per_s: float
    finish_s: float
    saved: float
    """Fraction of the plan's own time to finish."""

    def __str__(self) -> str:
        return f"{self.change}: done in {self.finish_s:.4g} s ({-self.saved:+.0%})"


def advise(
    cluster: Cluster, model: ModelShape, workload: Workload, plan: Plan
) -> tuple[Advice, ...]:
    """The changes that help most, best first; each is planned for, from this plan on.

    Tried are one more node like the fastest and, pipeline by pipeline from the slowest, its busiest
    link twice as fast and half as much memory again on each of its nodes: MOST_CHANGES at most, of which
    those are told that save WORTH of the time.
    """
    given = problem(cluster, model, workload)
    slowest_first = sorted(plan.pipelines, key=lambda each: -judged(given, each).split.row_s)
    changes = [_one_more_node(cluster)]
    for pipeline in slowest_first:
        changes.extend(_faster_links(given, pipeline))
        changes.extend(_more_memory(cluster, stage.node) for stage in pipeline.stages)
    advice = []
    for words, changed in changes[:MOST_CHANGES]:
        then = problem(changed, model, workload)
        again_s, rings = min(
            ((finish_s(then, rings), rings) for rings in _options(then, plan)), key=lambda o: o[0]
        )
        tokens_per_s = sum(ring.rows_per_s for ring in rings) * workload.output_tokens.mean
        advice.append(Advice(words, tokens_per_s, again_s, 1.0 - again_s / plan.finish_s))
    return tuple(sorted((a for a in advice if a.saved >= WORTH), key=lambda a: a.finish_s))


def _options(given: Problem, plan: Plan) -> Iterator[list[Found]]:
    """The plan's own rings, the best found from them on, and, where a job of few rows is planned for
    exactly, those with no more in flight than the plan has."""
    known, tried = rings_of(given, plan), cells(given.work)
    yield known
    most = max(pipeline.micro_batch_rows * pipeline.in_flight for pipeline in plan.pipelines)
    grids = [tried]
    if given.work.rows <= FEW_JOB_ROWS and len(given.nodes) <= EXACT_NODES:
        grids.append(tuple(cell for cell in tried if most // 4 < cell.rows <= most))
    replicate = any(pipeline.replicated for pipeline in plan.pipelines)
    for some in grids:
        found = best_rings(given, some, known, replicate=replicate, effort=HASTY)
        yield suited(given, tried, found)


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
    """The busiest forward link of a pipeline, twice as fast."""
    heads = {stage.node for stage in pipeline.ranges[0]}
    forward = [link for link in pipeline.links if link.target not in heads]
    if not forward:
        return []
    at = {node.name: i for i, node in enumerate(given.nodes)}
    rates = given.net.bytes_per_s
    ratio = {name: codec.ratio for name, codec in given.work.codec.items()}

    def takes_s(link: LinkPlan) -> float:
        """Seconds of one raw byte."""
        rate = float(rates[at[link.source], at[link.target]]) * ratio.get(link.codec, 1.0)
        return link_part(pipeline, link) / rate

    slowest = max(forward, key=takes_s)
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
