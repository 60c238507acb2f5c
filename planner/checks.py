"""Whether facts make sense at all, before anything is planned from them."""

import math
from collections import Counter
from dataclasses import fields, replace

from planner.facts import (
    Cluster,
    InfeasibleError,
    LayerTimes,
    Lengths,
    Link,
    ModelShape,
    Node,
    Workload,
)
from planner.lengths import MOST_TOKENS

LARGEST = 1e24
"""No byte, operation or second of ours comes near; a larger number is a slip of the unit."""

MOST = {
    "layers": 10_000,
    "hidden": 10**7,
    "activation_value_bytes": 64,
    "rows": 10**12,
    "mean": MOST_TOKENS,
    "p95": MOST_TOKENS,
}
"""Of these even less is absurd, and a plan for it would take for ever."""

_POSITIVE = {
    "flop_per_s",
    "memory_bytes",
    "memory_bytes_per_s",
    "layers",
    "hidden",
    "layer_bytes",
    "activation_value_bytes",
    "ratio",
}


def check_facts(cluster: Cluster, model: ModelShape, work: Workload) -> None:
    """Refuse impossible facts in one sentence that names the fact and its number.

    Raises:
        InfeasibleError: no nodes, a NaN, a negative or absurd number, a name twice, no bandwidth.
    """
    if not cluster.nodes:
        raise InfeasibleError("the cluster has no nodes; a plan needs at least one")
    names = [node.name for node in cluster.nodes]
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise InfeasibleError(f"{times} nodes are called {name!r}; every node needs its own name")
    for node in cluster.nodes:
        _check(f"node {node.name}", node)
        if node.layer_s:
            _check_profile(node.name, node.layer_s)
    for link in (*cluster.links, *([cluster.default_link] if cluster.default_link else [])):
        _check_link(link)
    _check("the model", model)
    _check("the workload", work)
    if work.rows < 1:
        raise InfeasibleError(f"the workload has {work.rows} rows; there is nothing to plan for")
    if work.shared_prefix_fraction > 1:
        raise InfeasibleError(
            f"shared_prefix_fraction is {work.shared_prefix_fraction:g}; it is at most 1"
        )
    for which, lengths in (("prompt", work.prompt_tokens), ("output", work.output_tokens)):
        _check_lengths(which, lengths)
    for name, rate in work.codec.items():
        _check(f"codec {name}", rate)
        if rate.bytes_per_s == 0:
            raise InfeasibleError(f"codec {name}: bytes_per_s is 0; it must be above 0")
    for i, chance in enumerate(work.acceptance):
        if not 0.0 <= chance <= 1.0:
            raise InfeasibleError(
                f"acceptance of draft {i + 1} is {chance}; it is a chance, 0 to 1"
            )


def smoothed(node: Node) -> Node:
    """The node with its profile made to rise: more tokens, rows or context never take less time.

    A dip in a profile is noise of the measurement, and would make the planner chase it.
    """
    if node.layer_s is None:
        return node
    kept = node.layer_s
    decode = sorted(
        (rows, context, max(s for r, c, s in kept.decode if r <= rows and c <= context))
        for rows, context, _ in kept.decode
    )
    times = LayerTimes(_rising(sorted(kept.prefill)), tuple(decode), _rising(sorted(kept.head)))
    return replace(node, layer_s=times)


def uneven(node: Node) -> list[str]:
    """Which of the node's profiles have dips."""
    old, new = node.layer_s, smoothed(node).layer_s
    if old is None or new is None:
        return []
    kinds = ("prefill", "decode", "head")
    return [kind for kind in kinds if sorted(getattr(old, kind)) != list(getattr(new, kind))]


def _rising(points: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    highest, rising = 0.0, []
    for x, seconds in points:
        highest = max(highest, seconds)
        rising.append((x, highest))
    return tuple(rising)


def _check(what: str, record: object) -> None:
    for slot in fields(record):  # type: ignore[arg-type]
        value = getattr(record, slot.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            _check_number(f"{what}: {slot.name}", slot.name, float(value))


def _check_number(what: str, name: str, value: float) -> None:
    if math.isnan(value):
        raise InfeasibleError(f"{what} is NaN; measure it again")
    if value < 0:
        raise InfeasibleError(f"{what} is {value:g}; it cannot be negative")
    if value == 0 and name in _POSITIVE:
        raise InfeasibleError(f"{what} is 0; it must be above 0")
    if name in MOST and value > MOST[name]:
        raise InfeasibleError(f"{what} is {value:g}, absurdly large; it is at most {MOST[name]:,}")
    unlimited = (name.endswith("bytes_per_s") or name == "most") and math.isinf(value)
    if value > LARGEST and not unlimited:
        raise InfeasibleError(f"{what} is {value:g}, absurdly large; check its unit")


def _check_link(link: Link) -> None:
    what = f"link {link.source or 'any'} -> {link.target or 'any'}"
    _check(what, link)
    if link.loss >= 1.0:
        raise InfeasibleError(f"{what}: loss is {link.loss:g}; at 1 nothing arrives")


def _check_profile(name: str, profile: LayerTimes) -> None:
    for kind in ("prefill", "decode", "head"):
        seen: set[tuple[float, ...]] = set()
        for point in getattr(profile, kind):
            *shape, seconds = point
            if not all(math.isfinite(x) and x >= 0 for x in point) or seconds <= 0 or shape[0] <= 0:
                raise InfeasibleError(
                    f"node {name}: {kind} profile has the impossible point {point}"
                )
            if tuple(shape) in seen:
                raise InfeasibleError(f"node {name}: {kind} profile measures {shape} twice")
            seen.add(tuple(shape))


def _check_lengths(which: str, lengths: Lengths) -> None:
    _check(f"{which} tokens", lengths)
    if lengths.mean <= 0:
        raise InfeasibleError(f"{which} tokens: mean is {lengths.mean:g}; it must be above 0")
    if lengths.p95 < lengths.mean * 0.5:
        raise InfeasibleError(
            f"{which} tokens: p95 is {lengths.p95:g}, far below the mean of {lengths.mean:g}"
        )
