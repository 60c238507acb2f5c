"""A step that does not fit into memory is computed in parts; what torch calls that stays in here."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from planner.schedule import CHUNK_TOKENS, Span, Step
from stages.errors import KvRoomError, OutOfMemoryError

log = logging.getLogger(__name__)

T = TypeVar("T")

CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
"""How torch's RuntimeError begins to tell that the processor's memory is spent; it has no class."""
FORGIVEN_AFTER = 256
"""Steps in parts after which a part of twice the size is tried: others may have left memory."""


@contextmanager
def memory_for(what: str, sequences: Sequence[int] = ()) -> Iterator[None]:
    """Inside, a lack of memory is OutOfMemoryError, which names what it was for."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemoryError(f"no memory for {what}", tuple(sequences)) from error
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and CPU_ALLOCATOR not in str(error):
            raise
        raise OutOfMemoryError(f"no memory for {what}: {error}", tuple(sequences)) from error


class Halving:
    """Halves a micro-batch that does not fit, and remembers how much did; owned by one thread.

    Rows never see each other, and a row is cut only where its prefill chunks end, so parts give the
    bits of the whole; keys and values that are computed again are written over themselves.
    """

    def __init__(self) -> None:
        self.limit_tokens: int | None = None
        """Positions that a part may have; None while no step was too large."""
        self._in_parts = 0

    def run(self, step: Step, hidden: Tensor, compute: Callable[[Step, Tensor], T]) -> list[T]:
        """What `compute` makes of the step's parts, in order; hidden [step.tokens, ...] is cut alike.

        Raises OutOfMemoryError, which names the sequence, for one that does not fit alone.
        """
        self._forgive(step)
        done: list[T] = []
        waiting = [(step.spans, hidden)]
        while waiting:
            spans, states = waiting.pop()
            halves = _halves(spans)
            if halves is None or self._allows(states):
                part = self._attempt(replace(step, spans=spans), states, compute, halves is None)
                if part is not None:
                    done.append(part)
                    continue
            assert halves is not None, "a part that cannot be halved is computed, or raises"
            first = sum(span.tokens for span in halves[0])
            waiting += [(halves[1], states[first:]), (halves[0], states[:first])]
        return done

    def _allows(self, states: Tensor) -> bool:
        return self.limit_tokens is None or len(states) <= self.limit_tokens

    def _attempt(
        self, part: Step, states: Tensor, compute: Callable[[Step, Tensor], T], is_last_try: bool
    ) -> T | None:
        """None if the part did not fit and can be halved."""
        what = f"{part.tokens} positions of frame {part.frame}"
        try:
            with memory_for(what, [span.sequence for span in part.spans]):
                return compute(part, states)
        except KvRoomError:
            if is_last_try:
                raise
            return None
        except OutOfMemoryError:
            if is_last_try:
                raise
        # Only here has the error let go of the tensors that were in its way.
        self.limit_tokens, self._in_parts = max(1, part.tokens // 2), 0
        log.warning("step halved frame=%d tokens=%d", part.frame, part.tokens)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _forgive(self, step: Step) -> None:
        if self.limit_tokens is None or step.tokens <= self.limit_tokens:
            return
        self._in_parts += 1
        if self._in_parts > FORGIVEN_AFTER:
            self.limit_tokens, self._in_parts = 2 * self.limit_tokens, 0


def _halves(spans: tuple[Span, ...]) -> tuple[tuple[Span, ...], tuple[Span, ...]] | None:
    """Two parts of about as many positions; None for what no chunk's end divides."""
    if len(spans) == 1:
        return _cut(spans[0])
    half, first, count = sum(span.tokens for span in spans) / 2, 0, 0
    while count < len(spans) - 1 and (count == 0 or first + spans[count].tokens <= half):
        first += spans[count].tokens
        count += 1
    return spans[:count], spans[count:]


def _cut(span: Span) -> tuple[tuple[Span, ...], tuple[Span, ...]] | None:
    end = span.start + span.tokens
    first, last = span.start // CHUNK_TOKENS + 1, (end - 1) // CHUNK_TOKENS
    if last < first:
        return None
    cut = (first + last) // 2 * CHUNK_TOKENS
    before = Span(span.sequence, span.start, cut - span.start, samples=False)
    return (before,), (replace(span, start=cut, tokens=end - cut),)
