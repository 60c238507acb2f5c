"""How frames go round an imagined ring: past stations that do one thing at a time.

Without replicas frames keep their order at every stage, codec and link, so each of these is free again
when the frame before has left it, and a step's whole way round follows from when they become free. With
replicas frames overtake one another, so every arrival at a stage is an event of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Protocol

from planner.facts import CodecRate
from planner.plan import Pipeline
from planner.problem import Problem
from planner.schedule import Step


@dataclass(slots=True)
class Station:
    """Something that does one thing at a time: a stage, a codec, a link or a port."""

    name: str
    free_s: float = 0.0
    busy_s: float = 0.0

    def serve(self, arrives_s: float, takes_s: float) -> float:
        """When work that arrives then is done."""
        done = (self.free_s if self.free_s > arrives_s else arrives_s) + takes_s
        self.free_s = done
        self.busy_s += takes_s
        return done

    def let_in(self, arrives_s: float, takes_s: float) -> float:
        """When something is in that would arrive then, had nothing else arrived meanwhile."""
        self.free_s = max(arrives_s, self.free_s + takes_s)
        self.busy_s += takes_s
        return self.free_s


@dataclass(frozen=True, slots=True)
class Load:
    """What a step asks of the stations."""

    takes_s: tuple[float, ...]
    """Of every stage of the pipeline."""
    raw_bytes: float
    """To the next stage, before coding."""
    id_bytes: float
    """Back to the first one."""
    header_bytes: float


@dataclass(frozen=True, slots=True)
class Hop:
    """What lies between two stages."""

    encoder: Station
    wire: Station
    codec: CodecRate | None
    bytes_per_s: float
    latency_s: float

    def sent(self, raw_bytes: float, header_bytes: float) -> float:
        """Bytes on the wire."""
        return raw_bytes / (self.codec.ratio if self.codec else 1.0) + header_bytes

    def cross(self, at_s: float, raw_bytes: float, header_bytes: float) -> float:
        """When a frame that leaves then is decoded at the other end."""
        coding_s = raw_bytes / self.codec.bytes_per_s if self.codec else 0.0
        if coding_s:
            at_s = self.encoder.serve(at_s, coding_s)
        sent = self.sent(raw_bytes, header_bytes)
        return self.wire.serve(at_s, sent / self.bytes_per_s) + self.latency_s + coding_s


class Way(Protocol):
    """Stages and links of one ring, and the frames that are on them; only its line moves it."""

    stages: list[Station]

    @property
    def in_flight(self) -> int:
        """Steps sent, not yet taken back."""
        ...

    @property
    def first_free_s(self) -> float:
        """When a first stage can take another frame."""
        ...

    @property
    def next_s(self) -> float:
        """When the next step is back, as far as that is known; infinite if it is not."""
        ...

    @property
    def moves_s(self) -> float:
        """When the way must be looked at for its own sake; infinite if never."""
        ...

    def wires(self) -> list[Station]:
        """The links."""
        ...

    def send(self, at_s: float, step: Step, load: Load) -> None:
        """Send a step round the ring."""
        ...

    def back(self, now_s: float) -> list[tuple[float, Step]]:
        """Steps that are back by now, and since when."""
        ...


class InOrder:
    """A ring without replicas: a step's whole way round is known when it is sent."""

    def __init__(self, given: Problem, pipeline: Pipeline, starts_s: float) -> None:
        self.stages = [Station(stage.node, starts_s) for stage in pipeline.stages]
        self._hops = list(_hops(given, pipeline).values())
        self._returns: list[tuple[float, int, Step]] = []

    @property
    def in_flight(self) -> int:
        """Steps sent, not yet taken back."""
        return len(self._returns)

    @property
    def first_free_s(self) -> float:
        """When the first stage can take another frame."""
        return self.stages[0].free_s

    @property
    def next_s(self) -> float:
        """When the next step is back; infinite if none is on its way."""
        return self._returns[0][0] if self._returns else float("inf")

    @property
    def moves_s(self) -> float:
        """Never."""
        return float("inf")

    def wires(self) -> list[Station]:
        """The links."""
        return [hop.wire for hop in self._hops]

    def send(self, at_s: float, step: Step, load: Load) -> None:
        """Send a step round the ring."""
        last = len(self.stages) - 1
        for stage, station in enumerate(self.stages):
            at_s = station.serve(at_s, load.takes_s[stage])
            if stage < len(self._hops):
                raw = load.id_bytes if stage == last else load.raw_bytes
                at_s = self._hops[stage].cross(at_s, raw, load.header_bytes)
        heappush(self._returns, (at_s, step.frame, step))

    def back(self, now_s: float) -> list[tuple[float, Step]]:
        """Steps that are back by now, and since when."""
        found = []
        while self._returns and self._returns[0][0] <= now_s:
            at_s, _, step = heappop(self._returns)
            found.append((at_s, step))
        return found


class Overtaking:
    """A ring with replicas: every slot has its own way, and stations take frames as they come."""

    def __init__(self, given: Problem, pipeline: Pipeline, starts_s: float) -> None:
        self.stages = [Station(stage.node, starts_s) for stage in pipeline.stages]
        self.in_flight = 0
        self._hops = _hops(given, pipeline)
        self._ports = [_Ports(given, stage.node) for stage in pipeline.stages]
        self._ways = [_way(pipeline, slot) for slot in range(pipeline.in_flight)]
        self._firsts = [self.stages[i] for i in sorted({way[0] for way in self._ways})]
        self._moves: list[tuple[float, int, int, Step, Load]] = []
        """(when, frame, stage of its way, ...): frames that arrive at a stage, or are back."""

    @property
    def first_free_s(self) -> float:
        """When some replica of the first stage can take another frame."""
        return min(station.free_s for station in self._firsts)

    @property
    def next_s(self) -> float:
        """When the next frame arrives anywhere."""
        return self.moves_s

    @property
    def moves_s(self) -> float:
        """The same: each arrival decides when the next one is."""
        return self._moves[0][0] if self._moves else float("inf")

    def wires(self) -> list[Station]:
        """The links."""
        return [hop.wire for hop in self._hops.values()]

    def send(self, at_s: float, step: Step, load: Load) -> None:
        """Send a step on its slot's way."""
        self.in_flight += 1
        self._serve(at_s, 0, step, load)

    def back(self, now_s: float) -> list[tuple[float, Step]]:
        """Move all frames as far as they get by now; gives the steps that are back, and since when."""
        found = []
        while self._moves and self._moves[0][0] <= now_s:
            at_s, _, stage, step, load = heappop(self._moves)
            way = self._ways[step.slot]
            at_s = self._let_in(at_s, stage, step, load)
            if stage < len(way):
                self._serve(at_s, stage, step, load)
            else:
                self.in_flight -= 1
                found.append((at_s, step))
        return found

    def _serve(self, at_s: float, stage: int, step: Step, load: Load) -> None:
        """Compute at a stage and go on to the next, or back to the first."""
        way = self._ways[step.slot]
        here, to = way[stage], way[(stage + 1) % len(way)]
        at_s = self.stages[here].serve(at_s, load.takes_s[here])
        hop = self._hops[here, to]
        raw = load.id_bytes if stage == len(way) - 1 else load.raw_bytes
        takes_s = hop.sent(raw, load.header_bytes) / self._ports[here].up_bytes_per_s
        out_s = self._ports[here].out.serve(at_s, takes_s)
        at_s = max(hop.cross(at_s, raw, load.header_bytes), out_s + hop.latency_s)
        heappush(self._moves, (at_s, step.frame, stage + 1, step, load))

    def _let_in(self, at_s: float, stage: int, step: Step, load: Load) -> float:
        """When a frame is in, of all that come in by one port."""
        way = self._ways[step.slot]
        here, to = way[stage - 1], way[stage % len(way)]
        raw = load.id_bytes if stage == len(way) else load.raw_bytes
        sent, ports = self._hops[here, to].sent(raw, load.header_bytes), self._ports[to]
        return ports.into.let_in(at_s, sent / ports.down_bytes_per_s)


class _Ports:
    """A node's own ways out and in, which all of its links share."""

    def __init__(self, given: Problem, name: str) -> None:
        node = given.cluster.node(name)
        self.out, self.into = Station(f"out of {name}"), Station(f"into {name}")
        self.up_bytes_per_s, self.down_bytes_per_s = node.up_bytes_per_s, node.down_bytes_per_s


def way_of(given: Problem, pipeline: Pipeline, starts_s: float) -> Way:
    """The way that a pipeline's frames go."""
    return (Overtaking if pipeline.replicated else InOrder)(given, pipeline, starts_s)


def _way(pipeline: Pipeline, slot: int) -> tuple[int, ...]:
    """The places, among the pipeline's stages, of those that compute a slot."""
    return tuple(
        place
        for place, stage in enumerate(pipeline.stages)
        if not stage.slots or slot in stage.slots
    )


def _hops(given: Problem, pipeline: Pipeline) -> Mapping[tuple[int, int], Hop]:
    """What lies between two stages, by their places; a stage encodes for all of its links."""
    at = {node.name: i for i, node in enumerate(given.nodes)}
    place = {stage.node: i for i, stage in enumerate(pipeline.stages)}
    encoders = {name: Station(f"codec of {name}") for name in place}
    hops = {}
    for link in pipeline.links:
        i, j = at[link.source], at[link.target]
        hops[place[link.source], place[link.target]] = Hop(
            encoders[link.source],
            Station(f"{link.source} -> {link.target}"),
            given.work.codec.get(link.codec),
            float(given.net.bytes_per_s[i, j]),
            float(given.net.latency_s[i, j]),
        )
    return hops


def busy_fractions(ways: Sequence[Way], end_s: float) -> dict[str, float]:
    """Busy fraction of every stage (by node) and link (`a -> b`) until then."""
    busy: dict[str, float] = {}
    for way in ways:
        for station in (*way.stages, *way.wires()):
            busy[station.name] = busy.get(station.name, 0.0) + station.busy_s / end_s
    return busy
