"""The codec of one link: what its sending thread codes with, and its receiving thread decodes with.

Neither touches a socket. The encoder chooses each frame's level by what the link was seen to do, and
codes with the profiles that both ends share by then. The decoder holds the profiles that its connection
brought, and forgets them with the connection.
"""

import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Final

from stages import codec_compiled
from stages.codec import DENSE, FAST, LEVELS, RAW, AnyProfile, decode, encode
from stages.codec_choice import LevelChooser
from stages.codec_dense_profile import DenseProfile
from stages.codec_profile import Profile
from stages.control import LinkReport
from stages.cpu_share import CpuShare
from stages.errors import FrameError
from stages.frame import Frame, Kind, Packet
from stages.link_meter import LinkMeter, TcpState
from stages.link_profiles import SharedProfiles, described
from stages.wire import Ack, ProfileFrame, ProfileHeld, StepFrame

LOSSLESS: Final = (RAW, FAST, DENSE)
"""Among these a link chooses; dense is on offer once both ends are ready for it."""
DENSE_PAYS_BYTES_PER_S: Final = 100e6  # a link as fast as this waits for what codes densely
DENSE_PAYS_BUSY: Final = 0.5  # of its time: for a link that rests more, nobody waits
MAX_CHANNELS: Final = 2**17  # of a profile that a peer announces


@dataclass(frozen=True, slots=True)
class _Sent:
    """A coded frame that is under way."""

    level: str
    nbytes: int
    """Before it was coded."""
    coded_bytes: int
    cost_s: float
    """Of coding."""


class LinkEncoder:
    """
    One outgoing link's codec and meter, over all its connections; the sending thread's alone.

    It chooses among `levels`; `start` is the plan's one, until the link's speed is known.
    """

    def __init__(
        self,
        run: int,
        levels: tuple[str, ...] = LOSSLESS,
        start: str = RAW,
        cpu: CpuShare | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.meter = LinkMeter()
        self.activation_bytes = dict.fromkeys(LEVELS, 0)
        """Of the activations sent, before they were coded, by their level."""
        self.coded_bytes = 0
        """Of all of them, after."""
        self._run = run
        offered = tuple(level for level in levels if level != DENSE)
        self._chooser = LevelChooser(offered, start=start if start in offered else offered[0])
        self._cpu = cpu or CpuShare()
        self._clock = clock
        self._sent: dict[int, _Sent] = {}
        self._last: _Sent | None = None
        self._thread_s = 0.0
        """The sending thread's processor time when it began to send."""
        self._profiles = SharedProfiles(run, levels)

    @property
    def bytes_per_s(self) -> float:
        """What the link carries while it has work; 0 while that is unknown."""
        s_per_byte = self._chooser.link_s_per_byte
        return 1 / s_per_byte if s_per_byte else 0.0

    @property
    def waiting_for_word(self) -> bool:
        """Whether a profile that frames rely on was announced here, and not acknowledged yet."""
        return self._profiles.waiting_for_word

    def report(self, carried: LinkReport) -> LinkReport:
        """What the link was seen to do, beside what its connections have carried."""
        activation_bytes = sum(self.activation_bytes.values())
        level = max(self.activation_bytes, key=self.activation_bytes.__getitem__)
        seen = {
            "activation_bytes": activation_bytes,
            "coded_bytes": self.coded_bytes,
            "level": level if activation_bytes else "",
            "bytes_per_s": self.bytes_per_s,
            "rtt_s": self.meter.tcp.rtt_s,
            "segments_sent": self.meter.segments_sent,
            "segments_sent_again": self.meter.segments_sent_again,
        }
        return carried.model_copy(update=seen)

    def reconnected(self, peer_is_dense: bool = False) -> None:
        """A new connection: its other end holds no profile, and can decode dense frames or cannot."""
        self._profiles.reconnected(peer_is_dense)
        self.meter.reconnected()

    def announcement(self) -> Packet | None:
        """A profile's frame, to be sent once for this connection as soon as there is the profile."""
        return self._profiles.announcement()

    def packet(self, message: Packet | StepFrame) -> Packet:
        """The message as a packet: an activation is coded here, all else is one already."""
        if isinstance(message, Packet):
            return message
        coded = self._coded(message)
        raw_bytes = message.payload.nbytes
        self.activation_bytes[LEVELS[coded.codec]] += raw_bytes
        self.coded_bytes += coded.payload.nbytes
        self._chooser.compute_s_per_byte = self._cpu.s_per_byte(raw_bytes)
        if LEVELS[coded.codec] == FAST:
            slow = 0 < self.bytes_per_s < DENSE_PAYS_BYTES_PER_S
            busy = self.meter.busy_share >= DENSE_PAYS_BUSY
            self._profiles.learn(message, dense_pays=slow and busy)
        return coded.encode(self._run)

    def sending(self, packet: Packet) -> None:
        """A packet that will be acknowledged is about to be sent."""
        self.meter.sending(packet, self._clock())
        self._thread_s = self._cpu.thread_s()

    def sent(self) -> None:
        """That packet is out: what it cost is known, for one thread codes and then sends it.

        Not by the wall, since sending waits for the link. What the thread does besides, such as to hear
        words, comes in bursts, and is much the same at each level.
        """
        last, self._last = self._last, None
        if last is not None:
            cost_s = last.cost_s + self._cpu.thread_s() - self._thread_s
            self._chooser.encoded(last.level, last.nbytes, last.coded_bytes, cost_s)

    def heard(self, word: Ack | ProfileHeld, tcp: TcpState) -> None:
        """Learn from what the peer says of the frames it got."""
        if isinstance(word, ProfileHeld):
            if self._profiles.heard(word):
                self._chooser.offer(DENSE)
            return
        seen = self.meter.acknowledged(word.frame, word.held_us / 1e6, self._clock(), tcp)
        if seen is not None:
            self._chooser.delivered(seen.nbytes, seen.busy_s)
        sent = self._sent.get(word.frame)
        for number in [number for number in self._sent if number <= word.frame]:
            del self._sent[number]
        if sent is not None:
            self._chooser.decoded(sent.level, sent.nbytes, word.decode_us / 1e6)
            self._chooser.peer_compute_s_per_byte = word.work_us / 1e6 / sent.nbytes

    def _coded(self, step: StepFrame) -> StepFrame:
        """The frame at the level that suits the link now."""
        raw_bytes = step.payload.nbytes
        level = self._chooser.choose(raw_bytes)
        started = self._cpu.started()
        coded = step if level == RAW else self._shrunk(step, level)
        self._last = _Sent(level, raw_bytes, coded.payload.nbytes, self._cpu.cost_s(started))
        self._sent[step.step.frame] = self._last
        return coded

    def _shrunk(self, step: StepFrame, level: str) -> StepFrame:
        """The frame coded, or as it is where that makes it no smaller."""
        coded = encode(step.payload, *described(step), level, self._profiles.usable(level))
        if coded.level == RAW:
            return step
        payload = memoryview(coded.tobytes())
        return replace(step, payload=payload, codec=LEVELS.index(coded.level))


class LinkDecoder:
    """
    One incoming link's codec; used by its receiving thread alone.

    Frames at other `levels` are refused: what is lossy comes only where the job asked for it.
    """

    def __init__(
        self,
        levels: Collection[str] = LOSSLESS,
        cpu: CpuShare | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._levels = frozenset(levels)
        self._cpu = cpu or CpuShare()
        self._clock = clock
        self._profiles: dict[int, AnyProfile] = {}
        self._unready: tuple[int, DenseProfile] | None = None
        """An epoch, and a profile that came before the compiled code that it takes."""
        self._words: deque[ProfileHeld] = deque()
        self._came_s = 0.0
        self._decode_s = 0.0
        self._work_s = 0.0
        self._thread_s: float | None = None
        """The receiving thread's processor time when it last acknowledged a frame."""

    def reconnected(self) -> None:
        """A new connection brings its own profiles."""
        self._profiles.clear()
        self._unready = None
        self._words.clear()

    def came(self) -> None:
        """A frame's last byte has arrived."""
        self._came_s = self._clock()
        self._decode_s = self._work_s = 0.0

    def learn(self, frame: Frame) -> None:
        """Hold a profile from now on, in place of another of its kind; `word` answers."""
        announced = ProfileFrame.decode(frame)
        if DenseProfile.announced_in(announced.profile):
            dense = DenseProfile.parsed(announced.profile, MAX_CHANNELS)
            self._unready = announced.epoch, dense
            codec_compiled.prepare()
        else:
            profile = Profile.parsed(announced.profile, MAX_CHANNELS)
            self._hold(profile)
            self._words.append(ProfileHeld(announced.epoch, profile.id))

    def word(self) -> ProfileHeld | None:
        """What to tell the sender of a profile that it may use from now on, if there is one."""
        if self._unready is not None and codec_compiled.ready():
            epoch, profile = self._unready
            self._unready = None
            self._hold(profile)
            self._words.append(ProfileHeld(epoch, profile.id))
        return self._words.popleft() if self._words else None

    def _hold(self, profile: AnyProfile) -> None:
        others = {i: each for i, each in self._profiles.items() if type(each) is not type(profile)}
        self._profiles = others | {profile.id: profile}

    def opened(self, frame: Frame) -> Frame:
        """The frame with its activation as it was before coding; FrameError if it cannot be."""
        label = frame.label
        if label.kind is not Kind.STEP:
            return frame
        raw_bytes = label.rows * label.columns * label.dtype.itemsize
        started = self._cpu.started()
        if self._thread_s is not None:  # one thread receives a frame and then decodes it
            self._decode_s = started[1] - self._thread_s
        if label.codec != LEVELS.index(RAW):
            frame = self._decoded(frame, raw_bytes)
            self._decode_s += self._cpu.cost_s(started)
        self._work_s = self._cpu.s_per_byte(raw_bytes) * raw_bytes
        return frame

    def acknowledgement(self, epoch: int, last_frame: int) -> Ack:
        """What to tell the sender of the frame that came last."""
        self._thread_s = self._cpu.thread_s()
        seconds = (self._clock() - self._came_s, self._decode_s, self._work_s)
        return Ack(epoch, last_frame, *(round(1e6 * s) for s in seconds))

    def _decoded(self, frame: Frame, raw_bytes: int) -> Frame:
        label = frame.label
        decoded = decode(frame.payload, max_bytes=raw_bytes, profiles=self._profiles)
        if decoded.level not in self._levels or LEVELS.index(decoded.level) != label.codec:
            raise FrameError(f"frame {label.frame} has no right to the level {decoded.level}")
        named = (label.dtype.name.lower(), (label.rows, label.columns))
        if (decoded.dtype, decoded.shape) != named:
            raise FrameError(
                f"frame {label.frame} says {named[0]} {named[1]}, "
                f"and its payload {decoded.dtype} {decoded.shape}"
            )
        return replace(
            frame, label=replace(label, codec=LEVELS.index(RAW)), payload=decoded.buffer.data
        )
