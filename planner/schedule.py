"""The ring's policy: which rows travel in which slot, when, and with how many tokens.

Pure decisions over counts. The head runs them on real frames and the simulator on imagined ones, so
neither can drift from the other. Token ids, text and sockets are unknown here.
"""

from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from itertools import chain

from planner.admission import GROWTH_TOKENS, Admission, Sequence
from planner.drafts import DraftCosts, Goodput
from planner.holdings import Holdings
from planner.prefixes import SHARE_TOKENS
from planner.windows import Window, Windows

CHUNK_TOKENS = 128
"""Prefill chunks end at multiples of this, so a row's numbers never depend on its neighbours."""

MAX_STEP_BLOCKS = 2**14
"""KV blocks that one step may grant, if to more than one row: a frame's header is bounded."""
MAX_STEP_ENDED = 4096
FEWER = 7 / 8
"""Share of its KV blocks that a ring is left with where a stage has no memory for all of them."""


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

    @property
    def decodes(self) -> bool:
        """Whether it is the one position behind which the next token comes."""
        return self.samples and self.tokens == 1


@dataclass(frozen=True, slots=True)
class Grant:
    """KV blocks added to the end of a sequence's block table, in order.

    Where layers see a window, numbers from RingShape.blocks on are of their pool, and add to the end
    of a table that begins with the first position that they keep.
    """

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
    """Micro-batches in flight, until `Ring.open` says otherwise."""
    slot_rows: int
    blocks: int
    """KV blocks that every stage of the pipeline holds."""
    block_tokens: int
    step_tokens: int
    """Positions that one step may compute at most, decodes and prefill chunks together; drafts come
    beside them."""
    most_slots: int = 0
    """Slots that may ever be open, if more than `slots`."""
    window: Window | None = None
    """Of the layers that see a window, where those keep only that."""
    row_blocks: int = 0
    """KV blocks that one row may hold, where those are fewer: some stage parks the others."""
    drafts: DraftCosts | None = None
    """Where rows' next tokens are drafted."""

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
        if self.window is not None:
            self._require_room(self.window)

    def _require_room(self, window: Window) -> None:
        """A windowed pool must hold what one row may need at once: nobody could make way for it."""
        needed = self._least_windowed(window)
        if window.tokens < 1 or window.blocks < needed:
            raise ValueError(
                f"{window.blocks} blocks for a window of {window.tokens} positions; a row that "
                f"computes {self.step_tokens} at once needs {needed}"
            )

    def _least_windowed(self, window: Window) -> int:
        return self.blocks_for(window.most_tokens(self.step_tokens))

    def holding(self, blocks: int, window_blocks: int, row_blocks: int = 0) -> "RingShape":
        """The same ring with so many KV blocks; windowed ones only where it has some."""
        window = self.window and replace(self.window, blocks=window_blocks)
        return replace(self, blocks=blocks, window=window, row_blocks=row_blocks)

    def with_fewer_blocks(self) -> "RingShape | None":
        """The same ring with some KV blocks less, or None where it cannot do with less."""
        blocks, windowed = int(FEWER * self.blocks), 0
        if self.window is not None:
            windowed = max(self._least_windowed(self.window), int(FEWER * self.window.blocks))
        return self.holding(blocks, windowed) if blocks else None

    @property
    def capacity(self) -> int:
        """Slots that there are, open or not."""
        return max(self.slots, self.most_slots)

    @property
    def row_tokens(self) -> int:
        """Tokens that one row may come to: all of it must lie where layers are computed."""
        return self.block_tokens * min(self.blocks, self.row_blocks or self.blocks)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that a sequence of so many tokens fills."""
        return -(-tokens // self.block_tokens)


@dataclass(slots=True)
class _Slot:
    sequences: list[int] = field(default_factory=list)
    step: Step | None = None
    """The step in flight; a slot has at most one."""
    draft_len: int = 0
    """Tokens that are verified in that step behind each row's next, all drafted."""


class Ring:
    """Slots, admission and chunking of one pipeline; mutable, owned by its head.

    Call `enqueue` as rows come, `next_step` whenever the first stage is free, and `returned` once
    the step's samples are back.
    """

    def __init__(self, shape: RingShape) -> None:
        self.shape = shape
        self._slots = [_Slot() for _ in range(shape.capacity)]
        self._open = shape.slots
        self._sequences: dict[int, Sequence] = {}
        self._queue: list[tuple[float, int]] = []
        self._prompts: set[int] = set()
        """Sequences in slots of whose prompts something is left to compute."""
        self._holdings = holdings_of(shape)
        self._admission = Admission(shape.blocks, self._holdings)
        self._places: int | None = None
        """Rows like the queue's first that may still enter; None until it is asked again."""
        self._goodput = Goodput(shape.drafts) if shape.drafts else None
        self._preempted: list[int] = []
        self._next_slot = 0
        self._next_frame = 0
        self._ended: list[int] = []

    @property
    def live(self) -> int:
        """Sequences that hold KV blocks."""
        return len(self._sequences) - len(self._queue)

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
        return tokens <= self.shape.row_tokens

    def open(self, slots: int) -> None:
        """Have rows enter that many slots; in others those that are there stay until they end."""
        self._open = min(max(1, slots), self.shape.capacity)
        self._places = None

    def enqueue(
        self, sequence: int, known_tokens: int, limit_tokens: int, marks: tuple[int, ...] = ()
    ) -> None:
        """Queue a sequence of `known_tokens` ids that may grow to `limit_tokens`; longest first.

        `marks` name its leading units, SHARE_TOKENS each; equal marks mean equal tokens up to there.
        """
        assert 0 < known_tokens < limit_tokens, "a sequence needs a token to start and one to make"
        assert self.fits(limit_tokens), "the head refuses what can never fit"
        assert len(marks) * SHARE_TOKENS < known_tokens, "a sequence computes its last token itself"
        self._sequences[sequence] = Sequence(known_tokens, limit_tokens, known_tokens, marks)
        rounds = most_rounds(known_tokens, limit_tokens - known_tokens)
        self._places = None
        heappush(self._queue, (-rounds, sequence))

    def withdraw(self, count: int, among: Container[int]) -> list[int]:
        """Up to so many of these sequences leave the queue, first those that would enter last."""
        leaving = [number for _, number in sorted(self._queue, reverse=True) if number in among]
        leaving = leaving[:count]
        gone = set(leaving)
        self._queue = [entry for entry in self._queue if entry[1] not in gone]
        heapify(self._queue)
        for number in leaving:
            del self._sequences[number]
        return leaving

    def next_step(self) -> Step | None:
        """The next slot's work in cyclic order; None while every slot is empty or in flight."""
        for offset in range(self.shape.capacity):
            number = (self._next_slot + offset) % self.shape.capacity
            slot = self._slots[number]
            if slot.step is not None:
                continue
            step = self._fill(number, slot)
            if step is not None:
                self._next_slot = (number + 1) % self.shape.capacity
                return step
        return None

    def step_in(self, slot_number: int) -> Step | None:
        """The step that a slot has in flight; None too where there is no such slot."""
        known = 0 <= slot_number < len(self._slots)
        return self._slots[slot_number].step if known else None

    def draft_len(self, slot_number: int) -> int:
        """Tokens to draft for each row that decodes in the step that a slot has in flight."""
        return self._slots[slot_number].draft_len

    def returned(
        self, slot_number: int, ended: Collection[int], held: Mapping[int, int] | None = None
    ) -> None:
        """The slot's step came back: every sampling span grew by a token, `ended` left the ring.

        `held` tells of each sequence that had drafts how many of them it keeps beside that token.
        """
        slot = self._slots[slot_number]
        assert slot.step is not None, "a step returns once"
        for span in slot.step.spans:
            sequence = self._sequences.get(span.sequence)
            if sequence is None:
                continue  # it had to leave while the step was on its way
            sequence.known += span.samples
            if self._goodput and slot.draft_len and span.decodes:
                kept = (held or {}).get(span.sequence, 0)
                sequence.known += kept
                sequence.computed += kept
                if span.sequence not in ended:  # else its end may have cut them off
                    self._goodput.saw(slot.draft_len, kept)
        slot.step = None
        for number in ended:
            sequence = self._sequences[number]
            self._admission.saw(sequence)
            self._leave(number)

    def failed(self, slot_number: int) -> tuple[int, ...]:
        """The slot's step was lost on its way: its sequences leave the ring, and so do all that
        share what it was to compute, whose steps in flight mean nothing now. Returns who left.

        What the step announced may not have reached every stage, so it is announced again.
        """
        slot = self._slots[slot_number]
        assert slot.step is not None, "a step fails once"
        step, slot.step = slot.step, None
        self._ended.extend(step.ended)
        own = [span.sequence for span in step.spans if span.sequence in self._sequences]
        left = sorted(self._holdings.lose(step.frame, own))
        for number in left:
            self._forget(number)
        return tuple(left)

    def take_preempted(self) -> list[int]:
        """Sequences that had to leave for want of KV blocks since this was last asked; their head
        queues them again, under new numbers and with all the tokens that they have by now."""
        taken, self._preempted = self._preempted, []
        return taken

    def _leave(self, number: int) -> None:
        self._holdings.leave(number)
        self._forget(number)

    def _forget(self, number: int) -> None:
        self._places = None
        self._prompts.discard(number)
        del self._sequences[number]
        next(slot for slot in self._slots if number in slot.sequences).sequences.remove(number)
        self._ended.append(number)

    def _fill(self, number: int, slot: _Slot) -> Step | None:
        budget = self._budget(number)
        slot.draft_len = self._goodput.draft_len(self.live) if self._goodput else 0
        spans, grants = self._go_on(slot, budget)
        budget -= sum(span.tokens for span in spans)
        blocks = sum(len(grant.blocks) for grant in grants)
        while self._queue and len(slot.sequences) < self._target_rows(number):
            blocks += self._wanted_blocks()
            if grants and blocks > MAX_STEP_BLOCKS:
                break
            span = self._admit(slot, budget)
            if span is None:
                break
            spans.append(span)
            grants.append(Grant(span.sequence, self._holdings.blocks(span.sequence)))
            budget -= span.tokens
        if not spans:
            return None
        ended, self._ended = tuple(self._ended[:MAX_STEP_ENDED]), self._ended[MAX_STEP_ENDED:]
        slot.step = Step(self._next_frame, number, tuple(spans), tuple(grants), ended)
        self._next_frame += 1
        return slot.step

    def _budget(self, slot_number: int) -> int:
        """Positions that a slot's next step may compute: its rows' decodes, and of the prompts that all
        slots are at, and those that this one has places for, an even share, rounded to chunks.

        So steps are alike, and no stage waits for a fat one; a ring of one slot has no other to wait.
        """
        if self._open == 1:
            return self.shape.step_tokens
        left = sum(self._sequences[number].prompt_left for number in self._prompts)
        if self._queue:
            places = self._target_rows(slot_number) - len(self._slots[slot_number].sequences)
            left += min(self.queued, max(0, places)) * self._sequences[self._queue[0][1]].known
        chunks = max(1, round(left / (self._open * CHUNK_TOKENS)))
        return min(self.shape.step_tokens, self.shape.slot_rows + chunks * CHUNK_TOKENS)

    def _target_rows(self, slot_number: int) -> int:
        """Rows a slot should hold: few rows spread evenly, so no stage waits for a fat slot."""
        if slot_number >= self._open:
            return 0
        rows = self.live + self.queued
        if self._queue:
            # Where memory is short, the rows that it holds spread evenly, not the slots' capacity.
            rows = min(rows, self.live + self._room())
        return min(self.shape.slot_rows, -(-rows // self._open))

    def _room(self) -> int:
        """How many rows like the queue's first could enter now, so that all come to their end."""
        if self._places is None:
            first = self._sequences[self._queue[0][1]]
            live = [(number, self._sequences[number]) for number in self._in_slots()]
            self._places = self._admission.places(first, live, self._most_rows)
        return self._places

    @property
    def _most_rows(self) -> int:
        """Rows that all open slots hold at most."""
        return self._open * self.shape.slot_rows

    def _wanted_blocks(self) -> int:
        """Blocks that the queue's first row would be granted at most."""
        sequence = self._sequences[self._queue[0][1]]
        kinds = 1 if self.shape.window is None else 2
        tokens = self._admission.tokens_for(sequence, self._most_rows)
        return kinds * self.shape.blocks_for(max(tokens, self._admission.ends(sequence)))

    def _go_on(self, slot: _Slot, budget: int) -> tuple[list[Span], list[Grant]]:
        """Spans of the rows already in the slot: decodes first, then prompts, within the budget;
        and the blocks that some of them need beyond what was expected."""
        spans: list[Span] = []
        grants: list[Grant] = []
        planned: set[int] = set()
        plain = self.shape.window is None and not slot.draft_len
        for number in sorted(slot.sequences, key=self._decodes_first):
            sequence = self._sequences.get(number)
            if sequence is None:
                continue  # it has made way for one before it
            decodes = sequence.known - sequence.computed == 1 and number not in self._prompts
            if decodes and plain and budget and self._holdings.covers(number, sequence.known):
                # What comes below, where nothing is added: most spans, and half of a simulation.
                spans.append(Span(number, sequence.computed, 1, samples=True))
                sequence.computed += 1
                planned.add(number)
                budget -= 1
                continue
            span = _span(number, sequence, budget)
            if span is None:
                continue
            added = self._room_to_draft(slot, span)
            if added is None:
                added = self._make_room(number, span.start + span.tokens, planned)
            if added is None:
                continue
            added += self._compute(slot, span)
            if added:
                grants.append(Grant(number, added))
            spans.append(span)
            planned.add(number)
            budget -= span.tokens
        return spans, grants

    def _room_to_draft(self, slot: _Slot, span: Span) -> tuple[int, ...] | None:
        """Blocks added for the drafts behind a decode; None if it has none, or too few are free.

        Nobody makes way for drafts: where memory is short, the slot's rows do without.
        """
        if not (slot.draft_len and span.decodes):
            return None
        reach = self._reach(slot, span)
        added = self._holdings.extend(span.sequence, reach, reach)
        if added is None:
            slot.draft_len = 0
        return added

    def _reach(self, slot: _Slot, span: Span) -> int:
        """The end of what a step computes of a sequence, drafts included."""
        drafts = slot.draft_len if span.decodes else 0
        return min(span.start + span.tokens + drafts, self._sequences[span.sequence].limit)

    def _decodes_first(self, number: int) -> tuple[bool, int]:
        sequence = self._sequences[number]
        return sequence.known - sequence.computed > 1, number

    def _make_room(self, number: int, tokens: int, planned: set[int]) -> tuple[int, ...] | None:
        """Blocks for a sequence that outgrows its own, the newest sequences making way for it.

        One in flight or planned for this step is left alone: None if only such are newer, and the
        sequence waits for a round; or if it is itself the newest, and has made way. The oldest of all
        therefore never does, and gets on.
        """
        if self._holdings.covers(number, tokens):
            return ()
        ends = self._admission.ends(self._sequences[number])
        better = max(tokens, min(tokens + GROWTH_TOKENS, ends))
        while True:
            added = self._holdings.extend(number, tokens, better)
            if added is not None:
                return added
            waiting = chain.from_iterable(s.sequences for s in self._slots if s.step is None)
            newest = max(each for each in waiting if each not in planned)
            if newest == number and max(self._in_slots()) > number:
                return None
            self._preempted.append(newest)
            self._leave(newest)
            if newest == number:
                return None

    def _in_slots(self) -> Iterator[int]:
        """Every sequence that is in a slot."""
        return chain.from_iterable(slot.sequences for slot in self._slots)

    def _admit(self, slot: _Slot, budget: int) -> Span | None:
        """Move the queue's first row into the slot, if the budget and the KV blocks allow it.

        Nobody overtakes it: a long row would starve behind short ones.
        """
        number = self._queue[0][1]
        sequence = self._sequences[number]
        if not self._room():
            return None
        ends = self._admission.ends(sequence)
        tokens = self._admission.tokens_for(sequence, self._most_rows)
        # Whoever enters may take the room of beginnings that nobody uses, so it must have a span.
        sequence.computed = self._holdings.cached(sequence.marks)
        span = _span(number, sequence, budget)
        if span is None or not self._holdings.enter(
            number, tokens, ends, sequence.known, sequence.marks
        ):
            sequence.computed = 0
            return None
        heappop(self._queue)
        self._places = None
        slot.sequences.append(number)
        self._compute(slot, span)
        return span

    def _compute(self, slot: _Slot, span: Span) -> tuple[int, ...]:
        """The next frame computes the span; the windowed blocks that are added for it."""
        sequence = self._sequences[span.sequence]
        sequence.computed = span.start + span.tokens
        if sequence.prompt_left:
            self._prompts.add(span.sequence)
        else:
            self._prompts.discard(span.sequence)
        end = self._reach(slot, span)
        return self._holdings.computes(span.sequence, span.start, end, self._next_frame)


def most_rounds(prompt_tokens: float, new_tokens: float) -> float:
    """Ways round the ring that a row may take: one for each chunk of its prompt, and each token."""
    return prompt_tokens / CHUNK_TOKENS + new_tokens


def holdings_of(shape: RingShape) -> Holdings:
    """An empty ledger of the blocks that a ring of this shape has."""
    if shape.window is None:
        return Holdings(shape.blocks, shape.block_tokens)
    windows = Windows(shape.window, shape.block_tokens, shape.step_tokens, shape.blocks)
    return Holdings(shape.blocks, shape.block_tokens, windows)


def _span(number: int, sequence: Sequence, budget: int) -> Span | None:
    """What of the sequence fits into `budget` tokens; its end is known's end or a chunk's."""
    start, end = sequence.computed, sequence.known
    if end - start > budget:
        end = (start + budget) // CHUNK_TOKENS * CHUNK_TOKENS
    if end <= start:
        return None
    return Span(number, start, end - start, samples=end == sequence.known)
