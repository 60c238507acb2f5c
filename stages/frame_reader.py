"""Makes frames of bytes, which anybody may have written; knows no socket."""

import numpy as np

from stages.errors import FrameError, ProtocolError
from stages.frame import (
    PREFIX_BYTES,
    Bytes,
    Frame,
    Kind,
    Prefix,
    checksum_of,
    flat,
    read_prefix,
)

_ALIGNMENT = 64  # a payload starts at a multiple of it in its buffer, ready for vector loads


class FrameReader:
    """
    Turns bytes, however they are split, into frames.

    A socket writes straight into `buffer()` and reports with `advance()`; `feed` does both for
    bytes that lie elsewhere. Kinds that the connection is not for are refused by their prefix.
    After an error the reader stays broken: where one frame ends wrongly, no later byte can be
    trusted.
    """

    def __init__(self, kinds: frozenset[Kind] = frozenset(Kind)) -> None:
        self._kinds = kinds
        self._prefix_bytes = memoryview(bytearray(PREFIX_BYTES))
        self._broken: ProtocolError | None = None
        self._expect_prefix()

    def buffer(self) -> memoryview:
        """Where the next bytes belong; never empty, and never beyond the current frame."""
        if self._broken is not None:
            raise self._broken
        return self._target[self._filled :]

    def advance(self, count: int) -> Frame | None:
        """Take note of bytes written to `buffer()`; returns the frame that they complete."""
        self._filled += count
        if self._filled < len(self._target):
            return None
        try:
            if self._prefix is None:
                self._expect_body(read_prefix(self._prefix_bytes))
            return self._completed()
        except ProtocolError as error:
            self._broken = error
            raise

    def feed(self, piece: Bytes) -> list[Frame]:
        """The frames that these bytes complete, in order."""
        frames = []
        rest = flat(piece)
        while rest:
            room = self.buffer()
            count = min(len(room), len(rest))
            room[:count] = rest[:count]
            rest = rest[count:]
            frame = self.advance(count)
            if frame is not None:
                frames.append(frame)
        return frames

    @property
    def between_frames(self) -> bool:
        """Whether every byte so far belongs to a complete frame."""
        return self._prefix is None and self._filled == 0

    def finish(self) -> None:
        """No more bytes will come; raises FrameError if they stopped inside a frame."""
        if self._broken is not None:
            raise self._broken
        if not self.between_frames:
            raise FrameError("the bytes end inside a frame")

    def _expect_prefix(self) -> None:
        self._prefix: Prefix | None = None
        self._target = self._prefix_bytes
        self._filled = 0

    def _expect_body(self, prefix: Prefix) -> None:
        if prefix.label.kind not in self._kinds:
            raise FrameError(f"a {prefix.label.kind.name} frame has no place on this connection")
        padding = -prefix.header_bytes % _ALIGNMENT
        # Not zeroed: the kernel hands out pages only as bytes arrive, whatever length was claimed.
        space = np.empty(padding + prefix.header_bytes + prefix.payload_bytes, np.uint8)
        self._prefix = prefix
        self._target = space.data[padding:]
        self._filled = 0

    def _completed(self) -> Frame | None:
        prefix = self._prefix
        assert prefix is not None
        if self._filled < len(self._target):
            return None
        header = self._target[: prefix.header_bytes]
        payload = self._target[prefix.header_bytes :]
        if checksum_of(header, payload) != prefix.checksum:
            raise FrameError(f"{prefix.label.kind.name} frame {prefix.label.frame} is damaged")
        self._expect_prefix()
        return Frame(prefix.label, header, payload)
