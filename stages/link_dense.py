"""The dense level's way into a link: rows to learn from, and a thread that makes a profile of them."""

import logging
import threading
from typing import Final

from stages import codec_compiled
from stages.codec_dense_profile import DenseProfile

log = logging.getLogger(__name__)

LEARNING_ROWS: Final = 8192  # what to wait for: half as many teach a fifth less
MAX_LEARNING_BYTES: Final = 16 * 2**20  # kept until then; wide models have fewer pivots to teach


class Lesson:
    """One boundary's dense profile in the making; for the thread that sends.

    Rows are added until they are enough. Then a thread of its own loads the compiled code and learns,
    which takes six times their memory for a moment, and `profile` is there some seconds later; or
    never, where it cannot be had.
    """

    def __init__(self) -> None:
        self.profile: DenseProfile | None = None
        self._pieces: list[memoryview] = []
        self._rows = 0
        self._nbytes = 0
        self._begun = False

    def add(self, piece: memoryview, dtype: str, rows: int, channels: int) -> None:
        """More of the boundary's rows, all of one dtype and width."""
        if self._begun:
            return
        self._pieces.append(piece)
        self._rows += rows
        self._nbytes += piece.nbytes
        if self._rows >= LEARNING_ROWS // 2:
            codec_compiled.prepare()
        if self._rows >= LEARNING_ROWS or self._nbytes >= MAX_LEARNING_BYTES:
            self._begun = True
            given = (dtype, (self._rows, channels))
            threading.Thread(
                target=self._learn, args=given, name="dense-lesson", daemon=True
            ).start()

    def _learn(self, dtype: str, shape: tuple[int, int]) -> None:
        buffer = b"".join(self._pieces)
        self._pieces.clear()
        codec_compiled.prepare()  # where bytes were many before rows were
        if not codec_compiled.await_ready():
            return
        from stages.codec_dense_learning import learned  # noqa: PLC0415  needs the compiled code

        try:
            self.profile = learned(buffer, dtype, shape)
        except ValueError as error:
            log.info("no dense profile reason=%s", error)
