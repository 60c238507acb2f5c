"""
What is said once in a while: greetings, plans, leases, answers, failures; JSON, by pydantic.

A control message travels as the payload of a frame of its kind, so it shares the ring's checks of
length and sum. Sizes are bounded before the JSON is parsed; a field too many is an error.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Annotated, ClassVar, Literal, Self, TypeAlias, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from planner.schedule import RingShape
from stages.errors import FrameError
from stages.frame import (
    MAX_LEASE_BYTES,
    MAX_ROWS,
    ROOM_BYTES,
    Frame,
    Kind,
    Label,
    Packet,
    run_number,
    seal,
)
from stages.identity import NAME_PATTERN
from stages.wire import MAX_POSITION, Ack, ProfileFrame, ProfileHeld, SampleFrame, StepFrame

MAX_TEXT_CHARS = 4000  # of an error's message; the rest is cut, for the crash path must not crash
MAX_ROW_TOKENS = 2**20  # so that a row's ids, or its answer's with text, fit one message
MAX_LEASED = 4096  # rows or answers in one message
MAX_KEYS = 2**16  # in one message's JSON; to read one that is not wanted takes some 1 kB
MOST_FAULTS = 64  # of a message, that are looked at one by one
MAX_STOPS = 64
RECORD_BYTES, TOKEN_BYTES, CHAR_BYTES = 1024, 11, 6
"""The most that a row or answer without ids and text, an id, and a character take in JSON."""
MAX_MEMBERS = 1024
MAX_STRIPES = 16
MAX_RECALLED = 2**14  # rows that a head gives back at once: their numbers fit one message


_TO_THE_NEXT_KEYS_END = re.compile(
    rb'[^":]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"?[^":]*+)*+(?::|\Z)', re.DOTALL
)
"""JSON up to a colon that is in no string. It fits anywhere, so whatever the JSON, it is read once."""


def _bounded(text: object) -> object:
    """An error's text, cut to size and made writable as UTF-8."""
    if not isinstance(text, str):
        return text
    return text[:MAX_TEXT_CHARS].encode("utf-8", "replace").decode()


Name: TypeAlias = Annotated[str, StringConstraints(pattern=f"^{NAME_PATTERN}$")]
Short: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=200)]
StopText: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
Text: TypeAlias = Annotated[str, BeforeValidator(_bounded)]
Count: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
Word: TypeAlias = Annotated[int, Field(ge=0, lt=2**64)]
Sequence: TypeAlias = Annotated[int, Field(ge=0, lt=2**32)]
Epoch: TypeAlias = Annotated[int, Field(ge=0, lt=2**32)]
Port: TypeAlias = Annotated[int, Field(ge=0, lt=2**16)]
Seconds: TypeAlias = Annotated[float, Field(ge=0)]
Token: TypeAlias = Annotated[int, Field(ge=0, le=MAX_POSITION)]
Tokens: TypeAlias = Annotated[tuple[Token, ...], FailFast(), Field(max_length=MAX_ROW_TOKENS)]


def _bounded_json(body: bytes) -> bytes:
    """The same bytes; raises FrameError where reading them could take far more memory than they do."""
    stretches = _TO_THE_NEXT_KEYS_END.finditer(body)
    if next(islice(stretches, MAX_KEYS + 1, None), None) is not None:
        raise FrameError(f"a message of more than {MAX_KEYS} keys")
    return body


def _told(error: ValidationError) -> str:
    """A few of a message's faults; a peer that made very many is told how many, for each costs 1 kB."""
    if error.error_count() > MOST_FAULTS:
        return f"it has {error.error_count()} faults"
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in faults[:3])


class _Record(BaseModel):
    """Frozen, strict, and without room for what nobody declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _Message(_Record):
    """A record that is a frame of its own."""

    kind: ClassVar[Kind]

    def encode(self, run: int, epoch: int = 0) -> Packet:
        """The message's frame; raises FrameError when it is over its kind's size."""
        return seal(self._label(run, epoch), b"", self.model_dump_json().encode())

    def _label(self, run: int, epoch: int) -> Label:
        return Label(self.kind, run, epoch)

    @classmethod
    def decode(cls, frame: Frame) -> Self:
        """The message of a frame of this kind; raises FrameError where the JSON is not one."""
        if frame.label.kind is not cls.kind:
            raise FrameError(f"a {frame.label.kind.name} frame came in place of {cls.kind.name}")
        try:
            message = cls.model_validate_json(_bounded_json(bytes(frame.payload)))
        except ValidationError as error:
            raise FrameError(f"not a {cls.__name__} message: {_told(error)}") from None
        message.check_label(frame.label)
        return message

    def check_label(self, label: Label) -> None:
        """Raise FrameError where the frame's label contradicts the message."""


class Hello(_Message):
    """Who dials: sent first, and answered by Welcome or Refused before anything else is sent."""

    kind = Kind.HELLO
    name: Name
    run: Short
    epoch: Epoch
    incarnation: Word
    """Random, drawn when the process starts: the same one still holds its KV cache."""
    last_frame: int = Field(default=-1, ge=-1, lt=2**63)
    """Number of the last frame received from whom it greets; -1 before the first."""
    purpose: Literal["data", "control"]
    room_bytes: Count = ROOM_BYTES
    """Credit: the peer may send once fewer bytes than these are unacknowledged."""
    dense: bool = False
    """Whether it can come to decode frames of the codec's dense level."""
    stream: Word = 0
    """Random, alike for all connections that carry one stream of bytes."""
    stripe: int = Field(default=0, ge=0, lt=MAX_STRIPES)
    """Which of them this is."""
    stripes: int = Field(default=1, ge=1, le=MAX_STRIPES)
    in_turns: bool = False
    """Whether one at a time carries frames, in place of all at once."""
    host: str = Field(default="", max_length=255)
    """Where this process listens, for the plan; empty if nowhere."""
    port: Port = 0

    @model_validator(mode="after")
    def _is_one_of_its_stripes(self) -> Self:
        if self.stripe >= self.stripes:
            raise ValueError(f"stripe {self.stripe} of {self.stripes}")
        return self

    def greeting(self) -> Packet:
        """The frame of this hello, bearing its own run and epoch."""
        return self.encode(run_number(self.run), self.epoch)

    def check_label(self, label: Label) -> None:
        if (label.run, label.epoch) != (run_number(self.run), self.epoch):
            raise FrameError(f"the hello of {self.name} contradicts its own frame")


class Welcome(Hello):
    """The listener's hello back: the dialer may send."""

    kind = Kind.WELCOME


class Refused(_Message):
    """The listener's no. `epoch` is the plan that the listener knows."""

    kind = Kind.REFUSED
    reason: Text
    cause: Literal["name", "run", "epoch"]
    epoch: Epoch


class Peer(_Record):
    """A member of the plan and where it listens."""

    name: Name
    host: str = Field(min_length=1, max_length=255)
    port: Port


class Capacity(_Record):
    """KV blocks that a stage, or every stage of a pipeline, can hold; see RingShape."""

    blocks: int = Field(ge=1, lt=2**63)
    window_blocks: Count = 0
    """Of the layers that keep only a window; 0 where none do."""
    row_blocks: Count = 0
    """That one row may hold, where others are parked; 0: all."""

    @classmethod
    def of(cls, ring: RingShape) -> Self:
        """What a ring of that shape holds."""
        windowed = ring.window.blocks if ring.window else 0
        return cls(blocks=ring.blocks, window_blocks=windowed, row_blocks=ring.row_blocks)


class Topology(_Message):
    """The plan in force, as far as a pipeline goes: its stages in ring order, the head first."""

    kind = Kind.TOPOLOGY
    epoch: Epoch
    peers: Annotated[tuple[Peer, ...], FailFast()] = Field(max_length=MAX_MEMBERS)
    capacity: Capacity
    """Of the stage that can hold least: no more is ever granted."""

    @model_validator(mode="after")
    def _names_once(self) -> Self:
        if len({peer.name for peer in self.peers}) < len(self.peers):
            raise ValueError("a name occurs twice")
        return self


class Ready(_Message):
    """A stage has its weights and its KV cache; its links come next."""

    kind = Kind.READY
    epoch: Epoch
    capacity: Capacity


class LinkReport(_Record):
    """What one connection has carried so far, as its owner counts it."""

    peer: Name
    purpose: Literal["data", "control"]
    congestion_control: str = Field(max_length=32)
    frames_sent: Count
    frames_received: Count
    payload_bytes_sent: Count
    """Activations as coded, and token ids."""
    payload_bytes_received: Count
    framing_bytes_sent: Count
    """Prefixes and headers of what carries payload."""
    ack_bytes_sent: Count
    control_bytes_sent: Count
    """All else: heartbeats, leases, answers, profiles."""
    tls_bytes_sent: Count
    """Plain bytes handed to TLS: the four above."""
    tls_bytes_received: Count
    blocked_s: Seconds
    """Seconds in which there was something to send and the connection took nothing."""
    reconnects: Count
    frames_sent_again: Count
    duplicates_dropped: Count
    activation_bytes: Count = 0
    """Of the activations sent, before they were coded."""
    coded_bytes: Count = 0
    """Of the same, after."""
    level: str = Field(default="", max_length=16)
    """The codec's level of most of them; empty where there were none."""
    frames_waiting: Count = 0
    """Frames queued or not yet acknowledged."""
    most_frames_waiting: Count = 0
    """The most of them at any time."""
    bytes_per_s: float = Field(default=0, ge=0)
    """What the link carries while it has work, as acknowledgements tell; 0 until they do."""
    rtt_s: Seconds = 0.0
    """Smoothed by TCP, like the next two; 0 where the system does not say."""
    segments_sent: Count = 0
    segments_sent_again: Count = 0


class Heartbeat(_Message):
    """A stage's counters since it started; that it comes at all is the news."""

    kind = Kind.HEARTBEAT
    frames: Count = 0
    tokens: Count = 0
    busy_s: Seconds = 0.0
    compute_cpu_s: Seconds = 0.0
    """Of `busy_s`, the computing thread's processor time."""
    cpu_s: Seconds = 0.0
    """Processor time of the whole process, from its start."""
    links: Annotated[tuple[LinkReport, ...], FailFast()] = Field(default=(), max_length=MAX_MEMBERS)


class LeasedRow(_Record):
    """One prompt to answer, as token ids, and how to sample it."""

    row: Count
    key: Word
    seed: Word
    token_ids: Tokens
    max_new_tokens: Count
    temperature: float = Field(ge=0)
    top_p: float = Field(gt=0, le=1)
    top_k: int = Field(ge=0, lt=2**32)
    stop: tuple[StopText, ...] = Field(default=(), max_length=MAX_STOPS)

    @property
    def most_bytes(self) -> int:
        """It takes no more in a message."""
        ids = TOKEN_BYTES * len(self.token_ids)
        return RECORD_BYTES + ids + CHAR_BYTES * sum(map(len, self.stop))


class Rows(_Message):
    """The driver hands the head a lease of rows."""

    kind = Kind.ROWS
    rows: Annotated[tuple[LeasedRow, ...], FailFast()] = Field(max_length=MAX_LEASED)


class OpenSlots(_Message):
    """The driver has a head keep so many micro-batches in flight from now on."""

    kind = Kind.OPEN_SLOTS
    slots: int = Field(ge=1)


class Recall(_Message):
    """The driver asks a head for rows that it has not begun, those that it would begin last."""

    kind = Kind.RECALL
    rows: int = Field(ge=1, le=MAX_RECALLED)
    """At most so many,"""
    most_tokens: Count
    """and none that may grow beyond so many tokens: where they go, no more has room."""


class Returned(_Message):
    """The head's answer to each Recall: the rows that it has let go of, unbegun; maybe none."""

    kind = Kind.RETURNED
    rows: tuple[Count, ...] = Field(max_length=MAX_RECALLED)


class Answer(_Record):
    """How one row ended: an answer, or a typed error with its reason."""

    row: Count
    output_ids: Tokens
    text: str
    finish_reason: Literal["stop", "length", "error"]
    error_type: Short | None = None
    error_message: Text | None = None
    prompt_tokens: Count
    output_tokens: Count
    replayed_tokens: Count = 0
    """Positions that had to be computed again."""
    queued_s: Seconds
    prefill_s: Seconds
    decode_s: Seconds

    @property
    def most_bytes(self) -> int:
        """It takes no more in a message."""
        chars = len(self.text) + len(self.error_message or "")
        return RECORD_BYTES + TOKEN_BYTES * len(self.output_ids) + CHAR_BYTES * chars

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.finish_reason == "error") != (self.error_type is not None):
            raise ValueError("an error has a type, and an answer has none")
        if self.output_tokens != len(self.output_ids):
            raise ValueError("output_tokens does not count output_ids")
        return self


class Answers(_Message):
    """Rows that ended, from the head to the driver."""

    kind = Kind.ANSWERS
    answers: Annotated[tuple[Answer, ...], FailFast()] = Field(max_length=MAX_LEASED)


Leased = TypeVar("Leased", LeasedRow, Answer)


def messages_of(rows: Iterable[Leased]) -> Iterator[tuple[Leased, ...]]:
    """Rows or answers in their order, as many at a time as surely fit one message."""
    part: list[Leased] = []
    part_bytes = 0
    for row in rows:
        if part and (len(part) == MAX_LEASED or part_bytes + row.most_bytes > MAX_LEASE_BYTES):
            yield tuple(part)
            part, part_bytes = [], 0
        part.append(row)
        part_bytes += row.most_bytes
    if part:
        yield tuple(part)


class Stop(_Message):
    """End the process in good order."""

    kind = Kind.STOP
    reason: Text = ""


class Bye(_Message):
    """The last frame of a control connection: what ends after it was not broken."""

    kind = Kind.BYE


class StageFailed(_Message):
    """A stage cannot go on; said to the driver with the last breath."""

    kind = Kind.STAGE_FAILED
    node: Name
    error_type: Short
    message: Text


class StepFailed(_Message):
    """A step failed; it goes round the ring in the step's place, so that order holds."""

    kind = Kind.STEP_FAILED
    epoch: Epoch
    frame: Count
    slot: int = Field(ge=0, lt=2**16)
    sequences: tuple[Sequence, ...] = Field(max_length=MAX_ROWS)
    error_type: Short
    message: Text

    def _label(self, run: int, epoch: int) -> Label:
        return Label(self.kind, run, self.epoch, self.slot, self.frame)

    def check_label(self, label: Label) -> None:
        if (label.epoch, label.slot, label.frame) != (self.epoch, self.slot, self.frame):
            raise FrameError(f"the failure of frame {self.frame} contradicts its own label")


ControlMessage: TypeAlias = (
    Hello | Welcome | Refused | Topology | Ready | Heartbeat | Rows | OpenSlots | Recall | Returned
    | Answers | Stop | StageFailed | StepFailed | Bye
)  # fmt: skip
Message: TypeAlias = StepFrame | SampleFrame | Ack | ProfileFrame | ProfileHeld | ControlMessage

_BY_KIND: dict[Kind, type[Message]] = {
    Kind.STEP: StepFrame,
    Kind.SAMPLES: SampleFrame,
    Kind.ACK: Ack,
    Kind.PROFILE: ProfileFrame,
    Kind.PROFILE_HELD: ProfileHeld,
    **{
        message.kind: message
        for message in (
            Hello, Welcome, Refused, Topology, Ready, Heartbeat, Rows, OpenSlots, Recall, Returned,
            Answers, Stop, StageFailed, StepFailed, Bye,
        )
    },
}  # fmt: skip


def decode(frame: Frame) -> Message:
    """The message that a frame carries; raises FrameError where header or payload is not one."""
    return _BY_KIND[frame.label.kind].decode(frame)
