"""
Frames, as bytes: the envelope of all that stages say; knows no message, socket or tensor.

A frame is a fixed prefix of 56 bytes, a header of packed records and a payload. The prefix has a
check of its own, so a flipped length is found before anything is allocated for it; a second sum
covers header and payload. Reading is strict: bytes that this module would not have written raise
FrameError. All numbers are little-endian.

ProtocolError
  FrameError             torn, flipped, inconsistent or over a limit
  VersionMismatchError   a whole frame of another version of this format
  RunMismatchError       a whole frame of another run
  EpochMismatchError     a whole frame of a plan that is no longer, or not yet, in force
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TypeAlias

import xxhash

from stages.errors import FrameError, ProtocolError

Bytes: TypeAlias = bytes | bytearray | memoryview

MAGIC = b"WW"
VERSION = 1
MAX_FRAME_BYTES = 256 * 2**20  # above any micro-batch we plan; a larger claim is a broken peer
MAX_HEADER_BYTES = 2**20
MAX_ROWS = 4096  # records of one kind in a step
MAX_CONTROL_BYTES = 2**20
MAX_LEASE_BYTES = 16 * 2**20  # rows or answers; JSON takes several times its size to read
MAX_ACK_BYTES = 16
ROOM_BYTES = 64 * 2**20  # above what a link of 500 Mbit/s and a second's round trip has under way
MAX_GREETING_BYTES = 2**14  # read from a peer that has proved its key but not yet its place

_PREFIX = struct.Struct("<2sBBBBHQQIIIIIQ")
_FRAME_FIELD = 7
_CHECK = struct.Struct("<I")
PREFIX_BYTES = _PREFIX.size + _CHECK.size


class VersionMismatchError(ProtocolError):
    """The peer speaks another version of this format; install the same release at both ends."""


class RunMismatchError(ProtocolError):
    """The frame belongs to another run."""


class EpochMismatchError(ProtocolError):
    """The frame belongs to a plan that is not in force here."""


class Kind(IntEnum):
    """What a frame says. Below 16: the ring's own, one per micro-batch step."""

    STEP = 1
    SAMPLES = 2
    STEP_FAILED = 3
    ACK = 4
    PROFILE = 5
    PROFILE_HELD = 6
    TURN = 7
    HELLO = 16
    WELCOME = 17
    REFUSED = 18
    TOPOLOGY = 19
    READY = 20
    HEARTBEAT = 21
    ROWS = 22
    ANSWERS = 23
    STOP = 25
    STAGE_FAILED = 26
    BYE = 27
    OPEN_SLOTS = 28
    RECALL = 29
    RETURNED = 30


class Dtype(IntEnum):
    """The type of a payload's elements, as a tag."""

    NONE = 0
    FLOAT32 = 1
    BFLOAT16 = 2
    FLOAT16 = 3
    INT32 = 4

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _ITEMSIZE[self]


_ITEMSIZE = (0, 4, 2, 2, 4)
_ACTIVATION_DTYPES = frozenset({Dtype.FLOAT32, Dtype.BFLOAT16, Dtype.FLOAT16})
_KINDS = {int(kind): kind for kind in Kind}
_DTYPES = {int(dtype): dtype for dtype in Dtype}
RING_KINDS = frozenset({Kind.STEP, Kind.SAMPLES, Kind.STEP_FAILED, Kind.PROFILE})
TURN_KINDS = frozenset({Kind.TURN})
GREETING_KINDS = frozenset({Kind.HELLO, Kind.WELCOME, Kind.REFUSED})
PAYLOAD_KINDS = frozenset({Kind.STEP, Kind.SAMPLES})
ACK_KINDS = frozenset({Kind.ACK, Kind.PROFILE_HELD})
CONTROL_KINDS = frozenset(Kind) - RING_KINDS - TURN_KINDS - GREETING_KINDS - ACK_KINDS | {Kind.ACK}
_NUMBERLESS = GREETING_KINDS | {Kind.BYE}
_LIMITS = (
    dict.fromkeys(PAYLOAD_KINDS, MAX_FRAME_BYTES)
    | dict.fromkeys((Kind.ROWS, Kind.ANSWERS), MAX_LEASE_BYTES)
    | dict.fromkeys(ACK_KINDS, MAX_ACK_BYTES)
    | dict.fromkeys(GREETING_KINDS, MAX_GREETING_BYTES)
    | dict.fromkeys(TURN_KINDS, 0)
)
"""Bytes of payload, of kinds that may not have MAX_CONTROL_BYTES."""
RAW = 0
"""Codec tag of a payload that is the array itself; any other tag is the codec's business."""


@dataclass(frozen=True, slots=True)
class Label:
    """What the prefix says of a frame, without lengths and sums."""

    kind: Kind
    run: int
    epoch: int
    slot: int = 0
    frame: int = 0
    """The head's number of the step; on a control connection the message's own, from 1 on, or 0."""
    rows: int = 0
    columns: int = 0
    dtype: Dtype = Dtype.NONE
    codec: int = RAW


@dataclass(frozen=True, slots=True)
class Packet:
    """A frame to be sent: prefix and header in one piece, the payload where it already lay."""

    head: bytes
    payload: memoryview
    kind: Kind
    frame: int
    """The number in its label."""

    @property
    def size(self) -> int:
        """Bytes on the connection, before TLS."""
        return len(self.head) + len(self.payload)

    def __bytes__(self) -> bytes:
        return b"".join((self.head, self.payload))


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame that passed every check of the format; header and payload share one buffer."""

    label: Label
    header: memoryview
    payload: memoryview

    @property
    def size(self) -> int:
        """Bytes on the connection, before TLS."""
        return PREFIX_BYTES + len(self.header) + len(self.payload)


def run_number(run: str) -> int:
    """The 64-bit number under which frames carry a run's name."""
    return int(xxhash.xxh3_64_intdigest(run.encode()))


def check_place(label: Label, run: int, epoch: int | None) -> None:
    """Raise unless the frame belongs to this run and, where an epoch is given, to that epoch."""
    if label.run != run:
        raise RunMismatchError(f"a frame of run {label.run:016x} came to run {run:016x}")
    if epoch is not None and label.epoch != epoch:
        raise EpochMismatchError(f"frame {label.frame} is of epoch {label.epoch}, not {epoch}")


def seal(label: Label, header: bytes, payload: Bytes) -> Packet:
    """The packet of a frame; raises FrameError where a peer would refuse it."""
    body = flat(payload)
    _check_label(label, len(header), len(body))
    prefix = _packed(label, len(header), len(body), checksum_of(header, body))
    head = b"".join((prefix, _CHECK.pack(_prefix_check(prefix)), header))
    return Packet(head, body, label.kind, label.frame)


def numbered(packet: Packet, frame: int) -> Packet:
    """The same frame under another number."""
    fields = list(_PREFIX.unpack_from(packet.head))
    fields[_FRAME_FIELD] = frame
    prefix = pack(_PREFIX.format, fields)
    head = b"".join((prefix, _CHECK.pack(_prefix_check(prefix)), packet.head[PREFIX_BYTES:]))
    return replace(packet, head=head, frame=frame)


def _packed(label: Label, header_bytes: int, payload_bytes: int, checksum: int) -> bytes:
    tags = (MAGIC, VERSION, label.kind, label.dtype, label.codec, label.slot, label.run)
    sizes = (label.rows, label.columns, header_bytes, payload_bytes)
    return pack(_PREFIX.format, (*tags, label.frame, label.epoch, *sizes, checksum))


def pack(layout: str, values: Iterable[object]) -> bytes:
    """`struct.pack`; raises FrameError for a number that does not fit."""
    try:
        return struct.pack(layout, *values)
    except struct.error as error:
        raise FrameError(f"a number does not fit its place in a frame: {error}") from error


def flat(payload: Bytes) -> memoryview:
    """The payload as bytes, without a copy; it must be contiguous."""
    view = memoryview(payload)
    return view.cast("B") if view.nbytes else memoryview(b"")


def _prefix_check(prefix: Bytes) -> int:
    return int(xxhash.xxh3_64_intdigest(prefix)) & 0xFFFFFFFF


def checksum_of(header: Bytes, payload: Bytes) -> int:
    """The sum that a prefix bears over what follows it."""
    digest = xxhash.xxh3_64(header)
    digest.update(payload)
    return int(digest.intdigest())


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first bytes of a frame, read and checked: what follows, and how much of it."""

    label: Label
    header_bytes: int
    payload_bytes: int
    checksum: int


def read_prefix(raw: Bytes) -> Prefix:
    """What PREFIX_BYTES bytes say; raises ProtocolError where this module would not have said it."""
    magic, version, kind, dtype, codec, *numbers, checksum = _PREFIX.unpack_from(raw)
    if magic != MAGIC:
        raise FrameError("the peer does not send frames: wrong magic")
    if _CHECK.unpack_from(raw, _PREFIX.size)[0] != _prefix_check(raw[: _PREFIX.size]):
        raise FrameError("the prefix of a frame is damaged")
    if version != VERSION:
        raise VersionMismatchError(f"the peer sends frames of version {version}, not {VERSION}")
    if kind not in _KINDS or dtype not in _DTYPES:
        raise FrameError(f"a frame of unknown kind {kind} or dtype {dtype}")
    slot, run, frame, epoch, rows, columns, header_bytes, payload_bytes = numbers
    label = Label(
        _KINDS[kind], run, epoch, slot, frame, rows, columns, _DTYPES[dtype], codec
    )  # in the order of its fields
    _check_label(label, header_bytes, payload_bytes)
    return Prefix(label, header_bytes, payload_bytes, checksum)


def _check_label(label: Label, header_bytes: int, payload_bytes: int) -> None:
    """Raise FrameError unless sizes, tags and shape agree with one another and with the limits."""
    limit_bytes = _LIMITS.get(label.kind, MAX_CONTROL_BYTES)
    if header_bytes > MAX_HEADER_BYTES or payload_bytes > limit_bytes:
        claim = f"{header_bytes} + {payload_bytes} bytes"
        raise FrameError(f"a {label.kind.name} frame claims {claim}, over its limit")
    if label.kind is Kind.STEP:
        fits = _is_activation(label, payload_bytes)
    elif label.kind is Kind.SAMPLES:
        fits = _is_samples(label, payload_bytes) and header_bytes == 0
    else:
        shape = (label.rows, label.columns, label.dtype, label.codec, header_bytes)
        fits = shape == (0, 0, Dtype.NONE, RAW, 0)
    if label.kind >= Kind.HELLO:
        fits = fits and label.slot == 0 and (label.frame == 0 or label.kind not in _NUMBERLESS)
    if not fits:
        raise FrameError(f"sizes and tags contradict one another: {label}, {payload_bytes} bytes")


def _is_activation(label: Label, payload_bytes: int) -> bool:
    array_bytes = label.rows * label.columns * label.dtype.itemsize
    if label.dtype not in _ACTIVATION_DTYPES or not label.columns or array_bytes > MAX_FRAME_BYTES:
        return False
    if label.codec == RAW:
        return payload_bytes == array_bytes
    return (payload_bytes > 0) == (array_bytes > 0)


def _is_samples(label: Label, payload_bytes: int) -> bool:
    tags_fit = label.dtype is Dtype.INT32 and label.codec == RAW and label.columns == 1
    return tags_fit and label.rows <= MAX_ROWS and payload_bytes == 4 * label.rows
