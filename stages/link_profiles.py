"""The profiles that the two ends of a link share: learned, announced, held; knows no socket, no clock.

The sender learns them from the first rows that it codes, announces each once for a connection, and may
use it once the other end has said that it holds it: one for the level fast, and, where both ends have
compiled code, one without which there is no level dense.
"""

import contextlib
import logging
from dataclasses import dataclass

from stages import codec_compiled
from stages.codec import DENSE, AnyProfile
from stages.codec_profile import LEARNING_ROWS, Profile
from stages.frame import Packet
from stages.link_dense import Lesson
from stages.wire import ProfileFrame, ProfileHeld, StepFrame

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Shared:
    """A profile on its way to be shared with the other end."""

    profile: AnyProfile | None = None
    announced: bool = False
    """On this connection."""
    held: bool = False
    """By the other end, as it said on this connection."""
    relied_on: bool = False
    """Frames that wait to be sent again may need it."""

    def reconnected(self) -> None:
        self.announced = self.held = False


class SharedProfiles:
    """One outgoing link's profiles, over all its connections; the sending thread's alone."""

    def __init__(self, run: int, levels: tuple[str, ...]) -> None:
        self._run = run
        self._wants_dense = DENSE in levels
        self._rows: list[StepFrame] = []
        """What the fast level's profile is to be learned from."""
        self._epoch = 0
        self._learning = True
        self._lesson = Lesson() if self._wants_dense and codec_compiled.installed() else None
        self._peer_is_dense = False
        self._fast, self._dense = _Shared(relied_on=True), _Shared()

    @property
    def waiting_for_word(self) -> bool:
        """Whether a profile that frames rely on was announced here, and not acknowledged yet."""
        shared = (self._fast, self._dense)
        return any(each.relied_on and each.announced and not each.held for each in shared)

    def reconnected(self, peer_is_dense: bool) -> None:
        """A new connection: its other end holds no profile, and can decode dense frames or cannot."""
        self._fast.reconnected()
        self._dense.reconnected()
        self._peer_is_dense = peer_is_dense
        if self._wants_dense and not (self._lesson and peer_is_dense):
            lacking = "the peer's" if self._lesson else "this"
            log.info("no dense frames reason=%s installation lacks numba", lacking)

    def announcement(self) -> Packet | None:
        """A profile's frame, to be sent once for this connection as soon as there is the profile."""
        if self._lesson is not None:
            self._dense.profile = self._lesson.profile
        for shared in (self._fast, self._dense):
            if shared.profile is not None and not shared.announced:
                shared.announced = True
                return ProfileFrame(self._epoch, shared.profile.tobytes()).encode(self._run)
        return None

    def heard(self, word: ProfileHeld) -> bool:
        """The other end holds a profile; whether dense frames may be sent from now on."""
        for shared in (self._fast, self._dense):
            if shared.profile is not None and shared.profile.id == word.profile_id:
                shared.held = shared.relied_on = True
        return self._dense.held

    def usable(self, level: str) -> AnyProfile | None:
        """What to code with at that level; None where the other end holds no such profile."""
        shared = self._dense if level == DENSE else self._fast
        return shared.profile if shared.held else None

    def learn(self, step: StepFrame, *, dense_pays: bool) -> None:
        """Collect rows until they are enough for each profile; for the dense one where it pays."""
        dtype, (rows, channels) = described(step)
        if self._lesson is not None and self._peer_is_dense and dense_pays:
            self._lesson.add(step.payload, dtype, rows, channels)
        if self._learning:
            self._epoch = step.epoch
            self._rows.append(step)
            rows = sum(each.step.tokens for each in self._rows)
            if rows >= LEARNING_ROWS:
                self._make_profile(dtype, (rows, channels))

    def _make_profile(self, dtype: str, shape: tuple[int, int]) -> None:
        self._learning = False
        buffer = b"".join(each.payload for each in self._rows)
        self._rows.clear()
        with contextlib.suppress(ValueError):  # zeros among the numbers: there is nothing to learn
            self._fast.profile = Profile.learned(buffer, dtype, shape)


def described(step: StepFrame) -> tuple[str, tuple[int, int]]:
    """An activation's dtype and shape, as the codec takes them."""
    return step.dtype.name.lower(), (step.step.tokens, step.hidden)
