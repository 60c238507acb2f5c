"""An imagined cluster, from an already loaded mapping to facts; every slip is named by its place.

```yaml
nodes:
  - {name: a, region: eu, flop_per_s: 1.5e14, memory_bytes: 8.0e10, memory_bytes_per_s: 1.5e12,
     layer_s: {prefill: [[128, 0.004]], decode: [[1, 512, 0.0008]]}}  # [tokens, s], [rows, context, s]
links:
  - {from: a, to: b, latency_s: 0.020, bytes_per_s: 1.25e7, loss: 0.0}
default_link: {latency_s: 0.050, bytes_per_s: 1.25e7}
model: {layers: 80, hidden: 8192, layer_bytes: 1.71e9, ...}           # or from the job
workload: {rows: 10000, prompt_tokens: {mean: 512, p95: 1500}, ...}   # or from the job
```
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, TypeVar

from planner.facts import (
    Cluster,
    CodecRate,
    LayerTimes,
    Lengths,
    Link,
    ModelShape,
    Node,
    Workload,
)
from planner.plan import RAW

T = TypeVar("T")


class WhatIfError(ValueError):
    """The mapping is not a cluster; the message names the place and what belongs there."""


@dataclass(frozen=True, slots=True)
class WhatIf:
    """What a file imagines; the model and the workload may come from a job instead."""

    cluster: Cluster
    model: ModelShape | None
    workload: Workload | None


def what_if(mapping: object) -> WhatIf:
    """Facts from a mapping of nodes, links, default_link, model and workload.

    Raises:
        WhatIfError: an unknown or missing key, or a value of the wrong kind.
    """
    top = _mapping("the file", mapping)
    _only("the file", top, {"nodes", "links", "default_link", "model", "workload"}, {"nodes"})
    nodes = tuple(_node(f"nodes[{i}]", n) for i, n in enumerate(_list("nodes", top["nodes"])))
    names = {node.name for node in nodes}
    cluster = Cluster(
        nodes,
        _links(top.get("links") or [], names),
        _default_link(top["default_link"]) if top.get("default_link") else None,
    )
    model = _model("model", top["model"]) if top.get("model") else None
    work = _workload("workload", top["workload"]) if top.get("workload") else None
    return WhatIf(cluster, model, work)


def _model(place: str, value: object) -> ModelShape:
    model = _record(place, value, ModelShape, {"windows": _windows})
    if model.windows and len(model.windows) != model.layers:
        raise WhatIfError(
            f"{place}.windows has {len(model.windows)} numbers; there are {model.layers} layers"
        )
    return model


def _windows(place: str, value: object) -> tuple[int, ...]:
    seen = tuple(_whole(f"{place}[{i}]", x) for i, x in enumerate(_list(place, value)))
    if min(seen, default=0) < 0:
        raise WhatIfError(
            f"{place} has {min(seen)}; a layer sees a number of positions, or 0 for all"
        )
    return seen


def _node(place: str, value: object) -> Node:
    return _record(place, value, Node, {"layer_s": _layer_times})


def _layer_times(place: str, value: object) -> LayerTimes | None:
    if value is None:
        return None
    curves = _mapping(place, value)
    _only(place, curves, {"prefill", "decode", "head"}, {"prefill", "decode"})
    return LayerTimes(
        *(
            _points(f"{place}.{kind}", curves.get(kind) or [], width)
            for kind, width in (("prefill", 2), ("decode", 3), ("head", 2))
        )
    )


def _points(place: str, value: object, width: int) -> tuple[Any, ...]:
    points = []
    for i, point in enumerate(_list(place, value)):
        where, numbers = f"{place}[{i}]", _list(f"{place}[{i}]", point)
        if len(numbers) != width:
            raise WhatIfError(f"{where} has {len(numbers)} numbers; it takes {width}")
        points.append((*(_whole(where, x) for x in numbers[:-1]), _number(where, numbers[-1])))
    return tuple(sorted(points))


def _link(place: str, value: object, names: set[str]) -> Link:
    renamed = dict(_mapping(place, value))
    for key, field_name in (("from", "source"), ("to", "target")):
        if field_name in renamed:
            raise WhatIfError(f"{place}: {field_name!r} is not a key; say {key!r}")
        if key not in renamed:
            raise WhatIfError(f"{place}: {key!r} is missing")
        if _word(f"{place}.{key}", renamed[key]) not in names:
            raise WhatIfError(f"{place}: {key} is {renamed[key]!r}, which no node is called")
        renamed[field_name] = renamed.pop(key)
    if renamed["source"] == renamed["target"]:
        raise WhatIfError(f"{place} leads from {renamed['source']} to itself; no plan would use it")
    return _record(place, renamed, Link, {})


def _links(value: object, names: set[str]) -> tuple[Link, ...]:
    """All links, of which no two have the same ends."""
    links = tuple(_link(f"links[{i}]", link, names) for i, link in enumerate(_list("links", value)))
    first: dict[tuple[str, str], int] = {}
    for i, link in enumerate(links):
        if (ends := (link.source, link.target)) in first:
            raise WhatIfError(
                f"links[{i}] is from {ends[0]} to {ends[1]}, as links[{first[ends]}] is; keep one"
            )
        first[ends] = i
    return links


def _default_link(value: object) -> Link:
    given = dict(_mapping("default_link", value))
    _only("default_link", given, {"latency_s", "bytes_per_s", "loss"}, set())
    # Its ends are any two nodes, which a Link writes as empty names.
    link = _record("default_link", {"source": "any", "target": "any", **given}, Link, {})
    return replace(link, source="", target="")


def _workload(place: str, value: object) -> Workload:
    readers: dict[str, Callable[[str, object], object]] = {
        "prompt_tokens": lambda p, v: _record(p, v, Lengths, {}),
        "output_tokens": lambda p, v: _record(p, v, Lengths, {}),
        "acceptance": lambda p, v: tuple(
            _number(f"{p}[{i}]", x) for i, x in enumerate(_list(p, v))
        ),
        "codec": _codecs,
    }
    return _record(place, value, Workload, readers)


def _codecs(place: str, value: object) -> dict[str, CodecRate]:
    given = _mapping(place, value)
    if RAW in given:
        raise WhatIfError(f"{place}: {RAW!r} is the name of a link without a codec; choose another")
    return {
        _word(f"a name in {place}", name): _record(f"{place}.{name}", rate, CodecRate, {})
        for name, rate in given.items()
    }


def _record(
    place: str,
    value: object,
    kind: Callable[..., T],
    readers: Mapping[str, Callable[[str, object], object]],
) -> T:
    """A dataclass of numbers and words, with a reader for each field that is neither."""
    given = _mapping(place, value)
    slots = {slot.name: slot for slot in fields(kind)}  # type: ignore[arg-type]
    needed = {
        name
        for name, slot in slots.items()
        if slot.default is MISSING and slot.default_factory is MISSING
    }
    _only(place, given, set(slots), needed)
    values: dict[str, object] = {}
    for name, raw in given.items():
        where = f"{place}.{name}"
        if name in readers:
            values[name] = readers[name](where, raw)
        elif slots[name].type in {str, "str"}:
            values[name] = _word(where, raw)
        elif slots[name].type in {int, "int"}:
            values[name] = _whole(where, raw)
        else:
            values[name] = _number(where, raw)
    return kind(**values)


def _only(place: str, given: Mapping[str, object], known: set[str], needed: set[str]) -> None:
    for key in given:
        if key not in known:
            raise WhatIfError(f"{place}: {key!r} is not a key; keys are {', '.join(sorted(known))}")
    for key in sorted(needed):
        if key not in given:
            raise WhatIfError(f"{place}: {key!r} is missing")


def _mapping(place: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise WhatIfError(f"{place} is {value!r}; it takes keys and values")
    return value


def _list(place: str, value: object) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise WhatIfError(f"{place} is {value!r}; it takes a list")
    return value


def _number(place: str, value: object) -> float:
    """A number; words such as 8.0e10, which YAML 1.1 reads as a string, count."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError as error:
            raise WhatIfError(f"{place} is {value!r}; it takes a number") from error
    raise WhatIfError(f"{place} is {value!r}; it takes a number")


def _whole(place: str, value: object) -> int:
    number = _number(place, value)
    if not number.is_integer():
        raise WhatIfError(f"{place} is {value!r}; it takes a whole number")
    return int(number)


def _word(place: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise WhatIfError(f"{place} is {value!r}; it takes a word")
    return value
