"""Starts the stages of a plan and speaks with them: rows to the heads, answers back.

Every stage dials the driver over TLS, with a key pair made for this run; the driver tells each where
the others listen. What stages say arrives in one mailbox, read by one thread.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import httpx
from prefect.exceptions import PrefectException

from flows.errors import FlowError, RunError, StageLostError
from flows.pacing import Pacer
from flows.stage import last_words, stage
from planner.cost import resident_kv
from planner.plan import Plan, StagePlan
from stages.codec import FAST, INT8, RAW
from stages.config import Address, Codec, Device, DType, ModelSpec, Ring, StageSpec, WeightKind
from stages.control import (
    Answer,
    Answers,
    Capacity,
    Heartbeat,
    Hello,
    LeasedRow,
    LinkReport,
    OpenSlots,
    Peer,
    Ready,
    Recall,
    Returned,
    Rows,
    StageFailed,
    Stop,
    Topology,
    decode,
    messages_of,
)
from stages.duplex import Duplex
from stages.errors import LinkError, LinkTimeoutError, StageError
from stages.greeting import Address as Place
from stages.identity import Identity, Member, make_identity
from stages.listener import Listener
from stages.mailbox import Arrival, LinkDown, Mail, Mailbox
from stages.trust import Trust
from storage.scratch import Scratch

log = logging.getLogger(__name__)

DRIVER = "driver"
EPOCH = 1
HOST = "127.0.0.1"
JOIN_S = 180.0
"""From the start of a stage's process to its first word: imports, on a busy machine."""
CODECS: dict[str, Codec] = {RAW: RAW, FAST: FAST, INT8: INT8}
"""A plan's words for a link's codec, as a stage is told them."""
STOP_S = 15.0
"""For a stage to leave after Stop; whoever stays goes when this process does."""
PACE_EVERY_S = 1.0
CAUSE_S = 1.0
"""When one stage dies its neighbours complain too; the dead one is known within this."""


@dataclass(frozen=True, slots=True)
class StageSettings:
    """What every stage of a run is told alike."""

    run: str
    model: Path
    dtype: DType
    threads: int
    weights: WeightKind = "stored"
    device: Device = "cpu"
    driver_host: str = HOST
    """Where the driver listens."""
    hosts: Mapping[str, str] = field(default_factory=dict)
    """Where each stage does; those not named do on this machine's loopback."""


@dataclass(frozen=True, slots=True)
class News:
    """What the head of a pipeline says of its rows; of nothing, nothing."""

    pipeline: int
    answers: tuple[Answer, ...] = ()
    returned: tuple[int, ...] | None = None
    """Rows that it gives back unbegun, if this is the answer to a recall."""


QUIET = News(-1)
"""No head said anything."""


@dataclass(slots=True)
class _Station:
    """One stage as the driver sees it; only the fleet's thread changes it."""

    plan: StagePlan
    pipeline: int
    codec: Codec
    """Of the link to the next stage."""
    incoming_codec: Codec
    identity: Identity
    spec_path: Path
    link: Duplex | None = None
    flow: threading.Thread | None = None
    ended: list[str] = field(default_factory=list)
    """How its flow ended, if not well."""

    @property
    def member(self) -> str:
        return self.plan.node


class Fleet:
    """The stages of one run, as a context: whatever happens inside, they are stopped at its end.

    One thread uses it.
    """

    def __init__(
        self,
        plan: Plan,
        rings: Sequence[Ring],
        settings: StageSettings,
        start: Callable[[str, str], object] = stage,
        reached_at: Callable[[str, Place], Place] = lambda _member, place: place,
    ) -> None:
        """
        `rings` are those of the plan's pipelines, in its order.

        `start(member, spec_path)` lives as long as that stage does, in a thread of its own.

        `reached_at(member, place)` is where others dial to reach the place at which a member listens:
        another one where a port is forwarded.
        """
        self._settings = settings
        self._reached_at = reached_at
        self._start = start
        self._pipelines = [tuple(s.node for s in p.stages) for p in plan.pipelines]
        self.rings = list(rings)
        """After `start`, with no more KV blocks than all stages of a pipeline can hold."""
        self._pacers = [Pacer(*each) for each in zip(self._pipelines, rings, strict=True)]
        self._paced_s = 0.0
        self._scratch = Scratch("run")  # it holds keys
        folder = self._scratch.path
        self._stations = {
            s.node: _Station(
                s,
                number,
                next((CODECS[link.codec] for link in pipeline.links if link.source == s.node), RAW),
                next((CODECS[link.codec] for link in pipeline.links if link.target == s.node), RAW),
                make_identity(s.node, folder),
                folder / f"{s.node}.json",
            )
            for number, pipeline in enumerate(plan.pipelines)
            for s in pipeline.stages
        }
        self._identity = make_identity(DRIVER, folder)
        members = [Member(s.member, s.identity.certificate_pem) for s in self._stations.values()]
        self._listener = Listener(Trust(self._identity, members), self._hello, settings.driver_host)
        self._mailbox = Mailbox()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()
        self._scratch.cleanup()

    def start(self) -> None:
        """Start every stage, wait until all are loaded and connected; StageLostError otherwise."""
        for station in self._stations.values():
            station.spec_path.write_text(self._spec(station).model_dump_json(), encoding="utf-8")
            station.flow = threading.Thread(
                target=copy_context().run, args=(self._supervise, station), daemon=True
            )
            station.flow.start()
        peers = {peer.name: peer for peer in (self._joined() for _ in self._stations)}
        held = dict(self._loaded() for _ in self._stations)
        for number, stages in enumerate(self._pipelines):
            least = _least([held[name] for name in stages])
            self.rings[number] = _holding(self.rings[number], least)
            topology = Topology(
                epoch=EPOCH, peers=tuple(peers[name] for name in stages), capacity=least
            )
            for name in stages:
                self._send(self._stations[name], topology)

    def _loaded(self) -> tuple[str, Capacity]:
        """The next stage that has its weights, and what it can hold beside them."""
        said = self._next(None)
        assert said is not None, "a word without a deadline comes"
        name, message = said
        if not isinstance(message, Ready):
            raise RunError(f"stage {name} said {type(message).__name__} before it was ready")
        return name, message.capacity

    def lease(self, pipeline: int, rows: Sequence[LeasedRow]) -> None:
        """Hand rows to a pipeline's head, in messages of bounded size."""
        head = self._stations[self._pipelines[pipeline][0]]
        for part in messages_of(rows):
            self._send(head, Rows(rows=part))

    def rows_in_flight(self, pipeline: int) -> int:
        """Rows that a pipeline's ring computes at once at most, by now."""
        return self._pacers[pipeline].slots * self.rings[pipeline].slot_rows

    def recall(self, pipeline: int, rows: int, most_tokens: int) -> None:
        """Ask a pipeline's head for so many rows that it has not begun; its news will say which."""
        head = self._stations[self._pipelines[pipeline][0]]
        self._send(head, Recall(rows=rows, most_tokens=most_tokens))

    def news(self, timeout_s: float) -> News:
        """What a head says next, QUIET if none does in time; StageLostError if a stage is lost."""
        deadline, said = time.monotonic() + timeout_s, None
        while said is None:
            self._pace()
            left = deadline - time.monotonic()
            said = self._next(max(0.0, min(left, PACE_EVERY_S)))
            if said is None and left <= PACE_EVERY_S:
                return QUIET
        name, message = said
        pipeline = self._stations[name].pipeline
        if isinstance(message, Answers):
            return News(pipeline, answers=message.answers)
        if isinstance(message, Returned):
            return News(pipeline, returned=message.rows)
        raise RunError(f"stage {name} said {type(message).__name__} in place of answers")

    def _pace(self) -> None:
        """Now and then, let each ring have as many micro-batches in flight as it is seen to need."""
        if time.monotonic() - self._paced_s < PACE_EVERY_S:
            return
        self._paced_s, vitals = time.monotonic(), self.vitals()
        for stages, pacer in zip(self._pipelines, self._pacers, strict=True):
            before = pacer.slots
            if pacer.heard(vitals):
                log.info("micro-batches head=%s now=%d before=%d", stages[0], pacer.slots, before)
                self._send(self._stations[stages[0]], OpenSlots(slots=pacer.slots))

    def vitals(self) -> dict[str, Heartbeat]:
        """Every stage's last heartbeat, by name; after `stop`, its final one."""
        return {s.member: s.link.heard for s in self._stations.values() if s.link and s.link.heard}

    def control(self) -> dict[str, LinkReport]:
        """What the driver's ends of the control connections have carried, by stage."""
        stations = self._stations.values()
        return {s.member: s.link.connection.report() for s in stations if s.link is not None}

    def stop(self) -> None:
        """Ask every stage to leave, and wait for it; who has not joined yet is told so at the door."""
        self._listener.turn_away("the run is over")
        for station in self._stations.values():
            if station.link is not None:
                with suppress(StageError):  # it is gone already: that was the aim
                    station.link.send(Stop(reason="the run is over"), timeout_s=1.0)
        deadline = time.monotonic() + STOP_S
        for station in self._stations.values():
            if station.flow is not None:
                station.flow.join(max(0.0, deadline - time.monotonic()))
                if station.flow.is_alive():
                    log.warning("stage does not leave member=%s", station.member)
        for station in self._stations.values():
            if station.link is not None:
                with suppress(StageError):  # it left first, as it should
                    station.link.close()
        self._listener.close()

    def _hello(self) -> Hello:
        return Hello(
            name=DRIVER, run=self._settings.run, epoch=EPOCH, incarnation=0, purpose="control"
        )

    def _spec(self, station: _Station) -> StageSpec:
        settings = self._settings
        host, port = self._reached_at(DRIVER, self._listener.address)
        pipeline, ring = self._pipelines[station.pipeline], self.rings[station.pipeline]
        known = [self._identity, *(self._stations[name].identity for name in pipeline)]
        return StageSpec(
            run=settings.run,
            epoch=EPOCH,
            member=station.member,
            pipeline=pipeline,
            model=ModelSpec(
                folder=settings.model,
                first_layer=station.plan.first_layer,
                end_layer=station.plan.end_layer,
                dtype=settings.dtype,
                weights=settings.weights,
                threads=settings.threads,
                device=settings.device,
                streamed_layers=station.plan.weights_offloaded,
                parked_kv=1.0 - resident_kv(station.plan.kv_offloaded, ring.slots),
            ),
            ring=ring,
            codec=station.codec,
            incoming_codec=station.incoming_codec,
            driver=DRIVER,
            driver_address=Address(host=host, port=port),
            listen=Address(host=settings.hosts.get(station.member, HOST), port=0),
            certificate=station.identity.certificate_path,
            key=station.identity.key_path,
            members={i.name: i.certificate_pem for i in known if i.name != station.member},
        )

    def _joined(self) -> Peer:
        """The next stage that dials in, and where it listens."""
        deadline = time.monotonic() + JOIN_S
        while time.monotonic() < deadline:
            ended = next((s for s in self._stations.values() if s.ended), None)
            if ended is not None:
                raise StageLostError(ended.ended[0])
            try:
                connection = self._listener.accept(timeout_s=0.5)
            except LinkTimeoutError:
                continue
            station = self._stations[connection.peer]
            station.link = Duplex(connection, self._mailbox, listener=self._listener)
            hello = connection.hello
            host, port = self._reached_at(station.member, (hello.host, hello.port))
            return Peer(name=station.member, host=host, port=port)
        missing = [s.member for s in self._stations.values() if s.link is None]
        raise StageLostError(f"stages {', '.join(missing)} said nothing in {JOIN_S:.0f} s")

    def _send(self, station: _Station, message: Topology | Rows | OpenSlots | Recall) -> None:
        assert station.link is not None, "stages are joined before they are spoken to"
        try:
            station.link.send(message)
        except StageError as error:
            raise self._lost(LinkDown(station.link.connection, error)) from error

    def _next(self, timeout_s: float | None) -> tuple[str, object] | None:
        """Who says what, or None if nobody does in time."""
        mail = self._mailbox.get(timeout_s)
        if mail is None:
            return None
        if isinstance(mail, LinkDown):
            raise self._lost(mail)
        message = decode(mail.frame)
        if isinstance(message, StageFailed):
            raise self._lost(mail)
        return mail.source.peer, message

    def _lost(self, first: Mail) -> FlowError:
        """Which stage is to blame, now that something went wrong: a silent death before complaints."""
        mails: list[Mail] = [first]
        deadline = time.monotonic() + CAUSE_S
        while (left := deadline - time.monotonic()) > 0:
            mail = self._mailbox.get(left)
            if mail is not None:
                mails.append(mail)
        complaints: dict[str, StageFailed] = {}
        for mail in mails:
            if isinstance(mail, Arrival):
                message = decode(mail.frame)
                if isinstance(message, StageFailed):
                    complaints.setdefault(mail.source.peer, message)
        for mail in mails:
            if isinstance(mail, LinkDown) and mail.source.peer not in complaints:
                return StageLostError(_obituary(self._stations[mail.source.peer], mail.error))
        name, failed = next(iter(complaints.items()))
        return StageLostError(f"stage {name} failed: {failed.error_type}: {failed.message}")

    def _supervise(self, station: _Station) -> None:
        """The thread of one stage; what it ends with is told to whoever waits for the stage."""
        try:
            self._start(station.member, str(station.spec_path))
        except (StageLostError, StageError) as error:
            self._note_end(station, str(error))
        except (httpx.HTTPError, PrefectException) as error:
            self._note_end(station, f"stage {station.member}: the Prefect server is gone: {error}")
        except OSError as error:
            self._note_end(station, f"stage {station.member} could not be started: {error}")

    def _note_end(self, station: _Station, reason: str) -> None:
        """A dead stage's connection may look as if it came back; that its process ended says no."""
        station.ended.append(reason)
        if station.link is not None:
            self._mailbox.report_down(LinkDown(station.link.connection, LinkError(reason)))


def _least(held: Sequence[Capacity]) -> Capacity:
    """What all of these stages can hold."""
    return Capacity(
        blocks=min(each.blocks for each in held),
        window_blocks=min(each.window_blocks for each in held),
        row_blocks=min(each.row_blocks or each.blocks for each in held),
    )


def _holding(ring: Ring, capacity: Capacity) -> Ring:
    """The ring with as many KV blocks as there is room for."""
    if capacity.blocks < ring.blocks:
        log.warning("fewer KV blocks planned=%d held=%d", ring.blocks, capacity.blocks)
    return ring.model_copy(update=capacity.model_dump())


def _obituary(station: _Station, error: StageError) -> str:
    """What is known of a stage's silent death: how its process ended, or what its link said."""
    if station.ended:
        return station.ended[0]
    words = last_words(station.spec_path.with_suffix(".log"))
    return f"stage {station.member} is lost: {error}; {words}"
