"""
What stages say to one another in the ring, as frames; bytes in, values out, no sockets.

A STEP header is four counts and packed records: a span takes 12 bytes, a granted block 8, an ended
sequence 4, an admission 40. With the prefix that is at most 64 + 24 bytes per row in a decode step.
"""

import math
import struct
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from typing import Self

from planner.schedule import Grant, Span, Step
from stages.errors import FrameError
from stages.frame import MAX_ROWS, RAW, Dtype, Frame, Kind, Label, Packet, pack, seal

MAX_BLOCKS = 2**16 - 1  # KV blocks that one step grants
MAX_POSITION = 2**31 - 1
MAX_US = 2**32 - 1  # over an hour; what took longer is said to have taken that

_COUNTS = struct.Struct("<4H")
_SPAN = struct.Struct("<3I")
_GRANT = struct.Struct("<2I")
_ENDED = struct.Struct("<I")
_ADMIT = struct.Struct("<IQQddI")
_TIMES = struct.Struct("<3I")
_SAMPLES_BIT = 1 << 31  # of a span's third number; the others count its tokens


@dataclass(frozen=True, slots=True)
class Admit:
    """How to sample a sequence, told in its first step; used by the last stage alone."""

    sequence: int
    key: int
    """64-bit hash of the row's custom id: one axis of the counter generator."""
    seed: int
    temperature: float
    """0 is greedy."""
    top_p: float
    top_k: int
    """0 is no limit."""


@dataclass(frozen=True, slots=True)
class StepFrame:
    """
    One micro-batch on its way to the next stage.

    `payload` is the activation [step.tokens, hidden] of `dtype`, in the order of the spans, as raw
    bytes or as the codec left it.
    """

    epoch: int
    step: Step
    hidden: int
    dtype: Dtype
    payload: memoryview
    codec: int = RAW
    admits: tuple[Admit, ...] = ()

    def encode(self, run: int) -> Packet:
        """The frame's bytes; the payload is not copied."""
        step = self.step
        _check_step(step, self.admits)
        shape = (step.tokens, self.hidden)
        label = Label(
            Kind.STEP, run, self.epoch, step.slot, step.frame, *shape, self.dtype, self.codec
        )
        return seal(label, _pack_header(step, self.admits), self.payload)

    @classmethod
    def decode(cls, frame: Frame) -> Self:
        """The step of a STEP frame; its payload shares the frame's buffer."""
        label = frame.label
        step, admits = _unpack_header(label, frame.header)
        _check_step(step, admits)
        if step.tokens != label.rows:
            raise FrameError(
                f"frame {label.frame} names {step.tokens} tokens and carries {label.rows}"
            )
        return cls(
            label.epoch, step, label.columns, label.dtype, frame.payload, label.codec, admits
        )


@dataclass(frozen=True, slots=True)
class SampleFrame:
    """Token ids that the last stage drew for a step, in the order of its sampling spans."""

    epoch: int
    frame: int
    slot: int
    tokens: tuple[int, ...]

    def encode(self, run: int) -> Packet:
        """The frame's bytes: 56 and 4 per token."""
        label = Label(
            Kind.SAMPLES, run, self.epoch, self.slot, self.frame, len(self.tokens), 1, Dtype.INT32
        )
        _check_tokens(label, self.tokens)
        return seal(label, b"", pack(f"<{len(self.tokens)}i", self.tokens))

    @classmethod
    def decode(cls, frame: Frame) -> Self:
        """The samples of a SAMPLES frame."""
        label = frame.label
        tokens = struct.unpack(f"<{label.rows}i", frame.payload)
        _check_tokens(label, tokens)
        return cls(label.epoch, label.frame, label.slot, tokens)


@dataclass(frozen=True, slots=True)
class Ack:
    """The receiver of a data connection holds every frame up to this one, which cost it so much."""

    epoch: int
    frame: int
    held_us: int = 0
    """From the frame's last byte to this acknowledgement: not the link's doing."""
    decode_us: int = 0
    """Of receiving and decoding it, without waiting for its bytes."""
    work_us: int = 0
    """The receiver's own work for such a frame, where decoding takes that work's CPU; else 0."""

    def encode(self, run: int) -> Packet:
        """The frame's bytes: 68."""
        label = Label(Kind.ACK, run, self.epoch, frame=self.frame)
        times = (min(us, MAX_US) for us in (self.held_us, self.decode_us, self.work_us))
        return seal(label, b"", _TIMES.pack(*times))

    @classmethod
    def decode(cls, frame: Frame) -> Self:
        """The acknowledgement of an ACK frame."""
        if len(frame.payload) != _TIMES.size:
            raise FrameError(f"an acknowledgement of {len(frame.payload)} bytes of times")
        return cls(frame.label.epoch, frame.label.frame, *_TIMES.unpack(frame.payload))


@dataclass(frozen=True, slots=True)
class ProfileFrame:
    """What the codec has learned of a boundary; holds for the connection that brings it."""

    epoch: int
    profile: bytes

    def encode(self, run: int) -> Packet:
        """The frame's bytes."""
        return seal(Label(Kind.PROFILE, run, self.epoch), b"", self.profile)

    @classmethod
    def decode(cls, frame: Frame) -> Self:
        """The profile of a PROFILE frame, which the codec is to parse."""
        return cls(frame.label.epoch, bytes(frame.payload))


@dataclass(frozen=True, slots=True)
class ProfileHeld:
    """The receiver can decode frames that were coded with this profile."""

    epoch: int
    profile_id: int

    def encode(self, run: int) -> Packet:
        """The frame's bytes."""
        return seal(Label(Kind.PROFILE_HELD, run, self.epoch, frame=self.profile_id), b"", b"")

    @classmethod
    def decode(cls, frame: Frame) -> Self:
        """The acknowledgement of a PROFILE_HELD frame."""
        return cls(frame.label.epoch, frame.label.frame)


def _check_tokens(label: Label, tokens: tuple[int, ...]) -> None:
    if tokens and min(tokens) < 0:
        raise FrameError(f"frame {label.frame} returns a negative token id")


def _pack_header(step: Step, admits: tuple[Admit, ...]) -> bytes:
    pairs = [(grant.sequence, block) for grant in step.grants for block in grant.blocks]
    counts = (len(step.spans), len(pairs), len(step.ended), len(admits))
    layout = f"<4H{3 * counts[0]}I{2 * counts[1]}I{counts[2]}I" + "IQQddI" * counts[3]
    spans = ((s.sequence, s.start, s.tokens | s.samples << 31) for s in step.spans)
    drawn = ((a.sequence, a.key, a.seed, a.temperature, a.top_p, a.top_k) for a in admits)
    return pack(layout, chain(counts, chain.from_iterable(chain(spans, pairs)), step.ended,
                               chain.from_iterable(drawn)))  # fmt: skip


def _unpack_header(label: Label, header: memoryview) -> tuple[Step, tuple[Admit, ...]]:
    if len(header) < _COUNTS.size:
        raise FrameError(f"frame {label.frame} has no header")
    counts = _COUNTS.unpack_from(header)
    ends = [_COUNTS.size]
    for record, count in zip((_SPAN, _GRANT, _ENDED, _ADMIT), counts, strict=True):
        ends.append(ends[-1] + record.size * count)
    if ends[-1] != len(header):
        raise FrameError(f"frame {label.frame}: {len(header)} bytes of header, not {ends[-1]}")
    spans, pairs, ended, admits = (header[start:end] for start, end in pairwise(ends))
    step = Step(
        label.frame,
        label.slot,
        tuple(
            Span(sequence, start, word & ~_SAMPLES_BIT, bool(word & _SAMPLES_BIT))
            for sequence, start, word in _SPAN.iter_unpack(spans)
        ),
        tuple(
            Grant(sequence, tuple(block for _, block in granted))
            for sequence, granted in groupby(_GRANT.iter_unpack(pairs), key=lambda pair: pair[0])
        ),
        tuple(sequence for (sequence,) in _ENDED.iter_unpack(ended)),
    )
    return step, tuple(Admit(*fields) for fields in _ADMIT.iter_unpack(admits))


def _check_step(step: Step, admits: tuple[Admit, ...]) -> None:
    """Raise FrameError, naming the frame and what is wrong, unless the step makes sense."""
    fault = (
        _fault_of_spans(step.spans)
        or _fault_of_grants(step.grants)
        or _fault_of_ended(step.ended)
        or _fault_of_admits(admits, {span.sequence for span in step.spans})
    )
    if fault:
        raise FrameError(f"frame {step.frame}: {fault}")


def _fault_of_spans(spans: tuple[Span, ...]) -> str:
    if len(spans) > MAX_ROWS:
        return f"{len(spans)} spans, more than {MAX_ROWS}"
    last: dict[int, Span] = {}
    for span in spans:
        end = span.start + span.tokens
        if span.tokens < 1 or span.start < 0 or end > MAX_POSITION:
            return f"sequence {span.sequence} claims positions [{span.start}, {end})"
        before = last.get(span.sequence)
        if before and (before.samples or before.start + before.tokens != span.start):
            return f"the spans of sequence {span.sequence} do not follow one another"
        last[span.sequence] = span
    return ""


def _fault_of_grants(grants: tuple[Grant, ...]) -> str:
    blocks = [grant.blocks for grant in grants]
    if sum(map(len, blocks)) > MAX_BLOCKS:
        return f"more than {MAX_BLOCKS} blocks are granted"
    if len({grant.sequence for grant in grants}) < len(grants):
        return "a sequence is granted blocks twice"
    for grant in grants:
        if not grant.blocks or len(set(grant.blocks)) < len(grant.blocks):
            return f"sequence {grant.sequence} is granted no block, or one twice"
    return ""


def _fault_of_ended(ended: tuple[int, ...]) -> str:
    if len(ended) > MAX_ROWS:
        return f"{len(ended)} sequences end, more than {MAX_ROWS}"
    return "a sequence ends twice" if len(set(ended)) < len(ended) else ""


def _fault_of_admits(admits: tuple[Admit, ...], present: set[int]) -> str:
    named = {admit.sequence for admit in admits}
    if len(named) < len(admits) or not named <= present:
        return "a sequence is admitted twice, or without a span"
    for admit in admits:
        if not (admit.temperature >= 0 and math.isfinite(admit.temperature)):
            return f"sequence {admit.sequence} has temperature {admit.temperature}"
        if not 0 < admit.top_p <= 1:
            return f"sequence {admit.sequence} has top_p {admit.top_p}"
    return ""
