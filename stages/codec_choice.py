"""Which codec level a link's next frame should take, by what was measured; pure, it reads no clock.

A level pays as long as it takes less time than the bytes that it saves. With B the link's bytes/s,
and of a level its ratio r and its encoding and decoding speeds C and D (raw bytes/s):

    serial       1 / (1/C + 1/(r B) + 1/D)        one after the other
    overlapped   min(C, D, r B)                   chunks follow one another through the three

Where the stage's own work holds the CPU that the codec would use, that work adds to 1/C and 1/D.
"""

import math
from dataclasses import dataclass, field

from stages.codec import FAST, RAW

NEWEST_SHARE = 0.2  # of a running mean: five observations make the most of it
SLOWEST_FRAME = 2.0  # of the mean time a frame takes: what takes longer has waited for a core
TO_SWITCH = 1.05  # a level must promise this much more than the one in use
TO_SHRINK = 1.02  # the same where both wait for the link alone: its noise is in both
THE_SAME = 1.01  # what costs no more than this is taken for equal, and sends fewer bytes
FIRST_PROBES = 2  # frames of each level before the first choice
PROBE_EVERY = 64
PROBING_SHARE = 0.002  # of the link's time: a level that loses by far is tried the more rarely
_CLASS_BITS = (13, 16, 19)  # below 8 KiB, 64 KiB, 512 KiB, and above


@dataclass(slots=True)
class _Seen:
    """Running means of one level at one size; 0 where nothing was seen yet."""

    frames: int = 0
    frame_bytes_per_byte: float = 1.0
    encode_s_per_byte: float = 0.0
    decode_s_per_byte: float = 0.0
    idle_frames: int = 0
    """Frames of this size since this level was last tried."""


@dataclass(slots=True)
class _SizeClass:
    """What is known of frames of one size; changed by its chooser alone."""

    seen: dict[str, _Seen]
    level: str


@dataclass(slots=True)
class LevelChooser:
    """One link's choice; fed by the link's sending thread, which alone may touch it.

    `levels` are those that the job allows and both ends are ready for. `overlapped` says whether coding
    and sending run side by side. `compute_s_per_byte`: seconds of the stage's own work for a byte of
    activation, where that work and the codec share a CPU; 0 where they do not. The receiver says the
    same of itself.
    """

    levels: tuple[str, ...] = (RAW, FAST)
    overlapped: bool = True
    compute_s_per_byte: float = 0.0
    peer_compute_s_per_byte: float = 0.0
    start: str = RAW
    """The level to use until the link's speed is known; one of `levels`."""
    link_s_per_byte: float = 0.0
    """Running mean of `delivered`; 0 until the first."""
    _classes: dict[int, _SizeClass] = field(default_factory=dict)

    def offer(self, level: str) -> None:
        """One more level to choose among, from now on."""
        if level not in self.levels:
            self.levels += (level,)
            for size in self._classes.values():
                size.seen[level] = _Seen()

    def choose(self, raw_bytes: int) -> str:
        """The level for the next frame of that many bytes; counts the frame."""
        size = self._class(raw_bytes)
        for seen in size.seen.values():
            seen.idle_frames += 1
        tried = self._due(size) or self._best(size)
        size.seen[tried].idle_frames = 0
        return tried

    def encoded(self, level: str, raw_bytes: int, frame_bytes: int, encode_s: float) -> None:
        """A frame was coded; `level` is the one chosen, even if the frame fell back to raw."""
        seen = self._class(raw_bytes).seen[level]
        first = seen.frames == 0
        seen.frames += 1
        seen.frame_bytes_per_byte = _mean(seen.frame_bytes_per_byte, frame_bytes / raw_bytes, first)
        seen.encode_s_per_byte = _usual(seen.encode_s_per_byte, encode_s / raw_bytes)

    def decoded(self, level: str, raw_bytes: int, decode_s: float) -> None:
        """The receiver reports how long decoding a frame took."""
        seen = self._class(raw_bytes).seen[level]
        seen.decode_s_per_byte = _usual(seen.decode_s_per_byte, decode_s / raw_bytes)

    def delivered(self, frame_bytes: int, busy_s: float) -> None:
        """So many bytes were acknowledged in so many seconds in which the link had work."""
        first = self.link_s_per_byte == 0
        self.link_s_per_byte = _mean(self.link_s_per_byte, busy_s / frame_bytes, first)

    def predicted_bytes_per_s(self, level: str, raw_bytes: int) -> float:
        """Goodput in bytes of activation, of a level at that size; infinite where nothing costs."""
        cost_s = self._s_per_byte(self._class(raw_bytes).seen[level])
        return 1 / cost_s if cost_s else float("inf")

    def _class(self, raw_bytes: int) -> _SizeClass:
        number = sum(raw_bytes >> bits > 0 for bits in _CLASS_BITS)
        if number not in self._classes:
            self._classes[number] = _SizeClass(
                {level: _Seen() for level in self.levels}, self.start
            )
        return self._classes[number]

    def _s_per_byte(self, seen: _Seen) -> float:
        send_s = seen.frame_bytes_per_byte * self.link_s_per_byte
        encode_s = seen.encode_s_per_byte + self.compute_s_per_byte
        decode_s = seen.decode_s_per_byte + self.peer_compute_s_per_byte
        steps = (encode_s, send_s, decode_s)
        return max(steps) if self.overlapped else sum(steps)

    def _waits_for_link(self, seen: _Seen) -> bool:
        """Whether nothing but the link decides how fast a level is."""
        return self._s_per_byte(seen) == seen.frame_bytes_per_byte * self.link_s_per_byte

    def _due(self, size: _SizeClass) -> str | None:
        """A level of which too little is known, or that was not tried for long enough."""
        usual_s = self._s_per_byte(size.seen[size.level])
        for level, seen in size.seen.items():
            extra_s = self._s_per_byte(seen) - usual_s
            rarely_enough = seen.idle_frames * PROBING_SHARE * usual_s >= extra_s
            if seen.frames < FIRST_PROBES or (seen.idle_frames >= PROBE_EVERY and rarely_enough):
                return level
        return None

    def _best(self, size: _SizeClass) -> str:
        """The level in use, or another that costs enough less; raw once it costs less."""
        if not self.link_s_per_byte:
            return size.level
        cost_s = {level: self._s_per_byte(seen) for level, seen in size.seen.items()}
        best = min(cost_s, key=cost_s.__getitem__)
        both = (size.seen[best], size.seen[size.level])
        enough = TO_SHRINK if all(map(self._waits_for_link, both)) else TO_SWITCH
        if enough * cost_s[best] < cost_s[size.level]:
            size.level = best
        if THE_SAME * cost_s.get(RAW, math.inf) <= cost_s[size.level]:
            size.level = RAW
        return size.level


def _mean(mean: float, newest: float, first: bool) -> float:
    return newest if first else mean + NEWEST_SHARE * (newest - mean)


def _usual(mean_s: float, newest_s: float) -> float:
    """The running mean of what frames take, which one that was kept waiting lifts by little."""
    if not mean_s:
        return newest_s
    return _mean(mean_s, min(newest_s, SLOWEST_FRAME * mean_s), False)
