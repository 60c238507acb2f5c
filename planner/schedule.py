"""The ring's policy: which rows travel in which slot, when, and with how many tokens.

Pure decisions over counts. The head runs them on real frames and the simulator on imagined ones, so
neither can drift from the other. Token ids, text and sockets are unknown here.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import chain

from planner.blocks import BlockPool
from planner.prefixes import SHARE_TOKENS, Prefixes

CHUNK_TOKENS = 128
"""Prefill chunks end at multiples of this, so a row's numbers never depend on its neighbours."""

MAX_STEP_BLOCKS = 2**14
"""KV blocks that one step may grant, if to more than one row: a frame's header is bounded."""
MAX_STEP_ENDED = 4096


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive positions [start, start + tokens) of one sequence that a step computes."""

    sequence: int
    """The head's number of the sequence, unique within an epoch."""
    start: int
    """First position computed; as many tokens of the sequence are in the KV cache already."""
    tokens: int
    samples: bool
    """Whether the last position yields the sequence's next token."""


@dataclass(frozen=True, slots=True)
class Grant:
    """KV blocks added to the end of a sequence's block table, in order."""

    sequence: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One micro-batch's work, numbered: every stage computes frames strictly in that order."""

    frame: int
    slot: int
    spans: tuple[Span, ...]
    grants: tuple[Grant, ...] = ()
    ended: tuple[int, ...] = ()
    """Sequences that no later frame will name; what stages hold of them may go."""

    @property
    def tokens(self) -> int:
        """Positions that the step computes."""
        return sum(span.tokens for span in self.spans)


@dataclass(frozen=True, slots=True)
class RingShape:
    """The settings of one pipeline's ring, from the plan."""

    slots: int
    slot_rows: int
    blocks: int
    """KV blocks that every stage of the pipeline holds."""
    block_tokens: int
    step_tokens: int
    """Positions that one step may compute, decodes and prefill chunks together."""

    def __post_init__(self) -> None:
        if min(self.slots, self.slot_rows, self.blocks, self.block_tokens) < 1:
            raise ValueError(f"a ring needs at least one slot, row, block and token: {self}")
        if self.step_tokens < self.slot_rows + CHUNK_TOKENS:
            # Else a slot full of decodes would starve the prompt that waits beside them.
            raise ValueError(
                f"step_tokens is {self.step_tokens}; "
                f"{self.slot_rows} rows and one chunk need {self.slot_rows + CHUNK_TOKENS}"
            )
        if SHARE_TOKENS % self.block_tokens:
            raise ValueError(f"block_tokens is {self.block_tokens}; it must divide {SHARE_TOKENS}")

    def blocks_for(self, tokens: int) -> int:
        """Blocks that a sequence of so many tokens fills."""
        return -(-tokens // self.block_tokens)


@dataclass(slots=True)
class _Sequence:
    """What the policy knows of a row in flight; only the ring changes it."""

    known: int
    """Tokens whose ids are known: the prompt, and what has been sampled."""
    limit: int
    """Tokens that it may grow to."""
    marks: tuple[int, ...] = ()
    """Of the leading units of its prompt that may be shared; see planner.prefixes."""
    computed: int = 0
    """Positions whose keys and values are cached."""
    blocks: tuple[int, ...] = ()
    held: set[int] = field(default_factory=set)
    """Which of its units are shared, by place; the blocks of all others are its own."""


@dataclass(slots=True)
class _Slot:
    sequences: list[int] = field(default_factory=list)
    step: Step | None = None
    """The step in flight; a slot has at most one."""


class Ring:
    """Slots, admission and chunking of one pipeline; mutable, owned by its head.

    Call `enqueue` as rows come, `next_step` whenever the first stage is free, and `returned` once
    the step's samples are back.
    """

    def __init__(self, shape: RingShape) -> None:
        self.shape = shape
        self._slots = [_Slot() for _ in range(shape.slots)]
        self._sequences: dict[int, _Sequence] = {}
        self._queue: list[tuple[int, int]] = []
        self._pool = BlockPool(shape.blocks)
        self._prefixes = Prefixes(self._pool)
        self._next_slot = 0
        self._next_frame = 0
        self._ended: list[int] = []

    @property
    def live(self) -> int:
        """Sequences that hold KV blocks."""
        return sum(len(slot.sequences) for slot in self._slots)

    @property
    def queued(self) -> int:
        """Sequences that wait for a slot."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """Steps sent, not yet returned."""
        return sum(slot.step is not None for slot in self._slots)

    def fits(self, tokens: int) -> bool:
        """Whether a sequence that grows to `tokens` can ever be admitted."""
        return self.shape.blocks_for(tokens) <= self.shape.blocks

    def enqueue(
        self, sequence: int, known_tokens: int, limit_tokens: int, marks: tuple[int, ...] = ()
    ) -> None:
        """Queue a sequence of `known_tokens` ids that may grow to `limit_tokens`; longest first.

        `marks` name its leading units, SHARE_TOKENS each; equal marks mean equal tokens up to there.
        """
        assert 0 < known_tokens < limit_tokens, "a sequence needs a token to start and one to make"
        assert self.fits(limit_tokens), "the head refuses what can never fit"
        assert len(marks) * SHARE_TOKENS < known_tokens, "a sequence computes its last token itself"
        self._sequences[sequence] = _Sequence(known_tokens, limit_tokens, marks)
        heappush(self._queue, (-limit_tokens, sequence))

    def next_step(self) -> Step | None:
        """The next slot's work in cyclic order; None while every slot is empty or in flight."""
        for offset in range(self.shape.slots):
            number = (self._next_slot + offset) % self.shape.slots
            slot = self._slots[number]
            if slot.step is not None:
                continue
            step = self._fill(number, slot)
            if step is not None:
                self._next_slot = (number + 1) % self.shape.slots
                return step
        return None

    def returned(self, slot_number: int, ended: Iterable[int]) -> None:
        """The slot's step came back: every sampling span grew by a token, `ended` left the ring."""
        slot = self._slots[slot_number]
        assert slot.step is not None, "a step returns once"
        for span in slot.step.spans:
            sequence = self._sequences.get(span.sequence)
            if sequence is not None:  # else it had to leave while the step was on its way
                sequence.known += span.samples
        slot.step = None
        for number in ended:
            self._end(number)

    def failed(self, slot_number: int) -> tuple[int, ...]:
        """The slot's step was lost on its way: its sequences leave the ring, and so do all that
        share what it was to compute, whose steps in flight mean nothing now. Returns who left.

        What the step announced may not have reached every stage, so it is announced again.
        """
        slot = self._slots[slot_number]
        assert slot.step is not None, "a step fails once"
        step, slot.step = slot.step, None
        self._ended.extend(step.ended)
        left = {span.sequence for span in step.spans if span.sequence in self._sequences}
        unmade = self._prefixes.made_since(step.frame, left)
        left |= {n for n, each in self._sequences.items() if not unmade.isdisjoint(_shared(each))}
        # What those computed in later frames rests on what was lost, and whoever holds that too.
        unmade = self._prefixes.made_since(step.frame, left)
        for number in left:
            self._end(number)
        self._prefixes.forget(unmade)
        return tuple(sorted(left))

    def _end(self, number: int) -> None:
        sequence = self._sequences.pop(number)
        next(slot for slot in self._slots if number in slot.sequences).sequences.remove(number)
        self._prefixes.release(_shared(sequence))
        self._pool.give_back(self._own(sequence))
        self._ended.append(number)

    def _own(self, sequence: _Sequence) -> tuple[int, ...]:
        """The blocks that nobody shares with the sequence."""
        each = SHARE_TOKENS // self.shape.block_tokens
        return tuple(b for i, b in enumerate(sequence.blocks) if i // each not in sequence.held)

    def _fill(self, number: int, slot: _Slot) -> Step | None:
        spans = self._spans(slot)
        grants: list[Grant] = []
        budget = self.shape.step_tokens - sum(span.tokens for span in spans)
        blocks = 0
        while self._queue and len(slot.sequences) < self._target_rows():
            blocks += self.shape.blocks_for(-self._queue[0][0])
            if grants and blocks > MAX_STEP_BLOCKS:
                break
            admitted = self._admit(slot, budget)
            if admitted is None:
                break
            spans.append(admitted[0])
            grants.append(admitted[1])
            budget -= admitted[0].tokens
        if not spans:
            return None
        ended, self._ended = tuple(self._ended[:MAX_STEP_ENDED]), self._ended[MAX_STEP_ENDED:]
        slot.step = Step(self._next_frame, number, tuple(spans), tuple(grants), ended)
        self._next_frame += 1
        return slot.step

    def _target_rows(self) -> int:
        """Rows a slot should hold: few rows spread evenly, so no stage waits for a fat slot."""
        rows = self.live + self.queued
        if self._queue:
            # Where memory is short, the rows that it holds spread evenly, not the slots' capacity.
            each = self.shape.blocks_for(-self._queue[0][0])
            free = self._pool.free + self._prefixes.idle_blocks
            rows = min(rows, self.live + free // each)
        return min(self.shape.slot_rows, -(-rows // self.shape.slots))

    def _spans(self, slot: _Slot) -> list[Span]:
        """Spans of the rows already in the slot: decodes first, then prompts, within the budget."""
        rows = [(number, self._sequences[number]) for number in slot.sequences]
        rows.sort(key=lambda row: row[1].known - row[1].computed > 1)
        spans: list[Span] = []
        budget = self.shape.step_tokens
        for number, sequence in rows:
            span = _span(number, sequence, budget)
            if span is not None:
                spans.append(span)
                budget -= span.tokens
                self._compute(span)
        return spans

    def _admit(self, slot: _Slot, budget: int) -> tuple[Span, Grant] | None:
        """Move the queue's first row into the slot, if the budget and the KV blocks allow it.

        Nobody overtakes it: a long row would starve behind short ones. All the blocks that the row
        may ever need are granted at once, so a row that runs always ends.
        """
        number = self._queue[0][1]
        sequence = self._sequences[number]
        shared = self._prefixes.hold(sequence.marks)
        sequence.held = set(range(len(shared)))
        sequence.computed = len(shared) * SHARE_TOKENS
        blocks = tuple(chain.from_iterable(shared))
        span = _span(number, sequence, budget)
        wanted = self.shape.blocks_for(sequence.limit) - len(blocks)
        own = None if span is None else self._prefixes.take(wanted)
        if span is None or own is None:
            self._prefixes.release(_shared(sequence))
            sequence.held, sequence.computed = set(), 0
            return None
        heappop(self._queue)
        sequence.blocks = blocks + own
        slot.sequences.append(number)
        self._compute(span)
        return span, Grant(number, sequence.blocks)

    def _compute(self, span: Span) -> None:
        """The next frame computes the span: what it completes of the prompt may be shared now."""
        sequence = self._sequences[span.sequence]
        first, sequence.computed = sequence.computed // SHARE_TOKENS, span.start + span.tokens
        each = SHARE_TOKENS // self.shape.block_tokens
        whole = min(sequence.computed // SHARE_TOKENS, len(sequence.marks))
        for unit in range(first, whole):
            blocks = sequence.blocks[unit * each : (unit + 1) * each]
            if self._prefixes.add(sequence.marks[unit], blocks, span.sequence, self._next_frame):
                sequence.held.add(unit)


def _shared(sequence: _Sequence) -> list[int]:
    """Marks of the units that the sequence shares, from the first."""
    return [sequence.marks[unit] for unit in sorted(sequence.held)]


def _span(number: int, sequence: _Sequence, budget: int) -> Span | None:
    """What of the sequence fits into `budget` tokens; its end is known's end or a chunk's."""
    start, end = sequence.computed, sequence.known
    if end - start > budget:
        end = (start + budget) // CHUNK_TOKENS * CHUNK_TOKENS
    if end <= start:
        return None
    return Span(number, start, end - start, samples=end == sequence.known)
