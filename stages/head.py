"""The head of a pipeline: rows in, steps out; samples in, answers out.

It runs the ring's policy on real rows. It owns which row sits where, token ids, lengths, stop
conditions and text; it knows no tensor and no socket.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from planner.prefixes import marks
from planner.schedule import Ring, RingShape, Step
from stages.control import Answer, LeasedRow, StepFailed
from stages.errors import ProtocolError
from stages.prompt import PromptEncoder
from stages.sequence import Sequence
from stages.wire import Admit, SampleFrame


@dataclass(frozen=True, slots=True)
class Work:
    """One step with what the first and the last stage need to know of its rows."""

    step: Step
    token_ids: NDArray[np.int64]
    """[step.tokens], in the order of the spans."""
    admits: tuple[Admit, ...]


class Head:
    """Mutable; one thread calls it."""

    def __init__(
        self,
        shape: RingShape,
        encoder: PromptEncoder,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ring = Ring(shape)
        self._encoder = encoder
        self._clock = clock
        self._sequences: dict[int, Sequence] = {}
        self._numbers = count()

    @property
    def rows(self) -> int:
        """Rows taken and not yet answered."""
        return len(self._sequences)

    def lease(self, rows: Iterable[LeasedRow]) -> None:
        """Take rows to answer; the driver has seen to it that each can fit."""
        now = self._clock()
        for row in rows:
            stops = self._encoder.stop_scanner(row.stop) if row.stop else None
            self._enter(Sequence(row, list(row.token_ids), stops, leased_at=now))

    def give_back(self, count: int, most_tokens: int) -> tuple[int, ...]:
        """Let go of up to so many rows that have not begun and may grow to so many tokens at most:
        the numbers of their rows, which are somebody else's now."""
        unbegun = {
            number
            for number, sequence in self._sequences.items()
            if sequence.started_at is None and sequence.limit <= most_tokens
        }
        left = self._ring.withdraw(count, unbegun)
        return tuple(self._sequences.pop(number).row.row for number in left)

    def open_slots(self, slots: int) -> None:
        """Keep so many micro-batches in flight from now on."""
        self._ring.open(slots)

    def _replay(self, sequence: Sequence) -> None:
        """Queue a sequence again that has lost its keys and values, not its tokens."""
        sequence.replayed += sequence.computed
        sequence.computed = 0
        sequence.admitted = False
        self._enter(sequence)

    def _enter(self, sequence: Sequence) -> None:
        number = next(self._numbers)
        self._sequences[number] = sequence
        self._ring.enqueue(number, len(sequence.ids), sequence.limit, marks(sequence.ids))

    def next_work(self) -> Work | None:
        """The next step, or None while every slot is empty or in flight."""
        step = self._ring.next_step()
        for number in self._ring.take_preempted():
            self._replay(self._sequences.pop(number))
        if step is None:
            return None
        return Work(step, self._token_ids(step), tuple(self._admits(step)))

    def _token_ids(self, step: Step) -> NDArray[np.int64]:
        ids: list[int] = []
        for span in step.spans:
            ids += self._sequences[span.sequence].ids[span.start : span.start + span.tokens]
        return np.array(ids, np.int64)

    def _admits(self, step: Step) -> Iterable[Admit]:
        now = self._clock()
        for grant in step.grants:
            sequence = self._sequences[grant.sequence]
            if sequence.admitted:
                continue  # it has outgrown its blocks
            sequence.admitted = True
            if sequence.started_at is None:
                sequence.started_at = now
            row = sequence.row
            yield Admit(grant.sequence, row.key, row.seed, row.temperature, row.top_p, row.top_k)

    def sampled(self, frame: SampleFrame) -> list[Answer]:
        """Take a step's samples; returns the rows that ended with them."""
        step = self._returned(frame.frame, frame.slot)
        sampling = [span.sequence for span in step.spans if span.samples]
        if len(sampling) != len(frame.tokens):
            raise ProtocolError(
                f"frame {frame.frame} returns {len(frame.tokens)} tokens for {len(sampling)} rows"
            )
        now = self._clock()
        for span in step.spans:
            if span.sequence in self._sequences:
                self._sequences[span.sequence].computed = span.start + span.tokens
        ended: list[int] = []
        for number, token in zip(sampling, frame.tokens, strict=True):
            sequence = self._sequences.get(number)
            if sequence is not None:  # else it left the ring meanwhile, and has entered it anew
                sequence.grow(token, self._encoder.end_ids, now)
                if sequence.finish is not None:
                    ended.append(number)
        self._ring.returned(step.slot, ended)
        return [self._sequences.pop(number).answer(self._encoder, now) for number in ended]

    def failed(self, failure: StepFailed) -> list[Answer]:
        """Take a step's failure: the rows it names end as errors, others that it harms start again."""
        step = self._returned(failure.frame, failure.slot)
        now = self._clock()
        answers: list[Answer] = []
        for number in self._ring.failed(step.slot):
            sequence = self._sequences.pop(number)
            if number in failure.sequences:
                answers.append(sequence.failure(failure.error_type, failure.message, now))
            else:
                self._replay(sequence)
        return answers

    def _returned(self, frame: int, slot: int) -> Step:
        step = self._ring.step_in(slot)
        if step is None or step.frame != frame:
            raise ProtocolError(f"frame {frame} came back for slot {slot}, which waits for {step}")
        return step
