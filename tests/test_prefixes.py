"""Shared beginnings: whatever the ring shares, a stage reads what it would have computed itself."""

import random
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.prefixes import SHARE_TOKENS, marks
from planner.schedule import CHUNK_TOKENS, Ring, RingShape, Span, Step, holdings_of
from planner.windows import Window
from tests.models import write_random_model
from tests.ring import answers, plan_of, ring_settings, row

SHAPE = RingShape(slots=3, slot_rows=4, blocks=96, block_tokens=16, step_tokens=4 + CHUNK_TOKENS)


def windowed(tokens: int, spare_blocks: int = 0) -> RingShape:
    """The same with a window, and few blocks more than one row may need at once."""
    least = -(-Window(tokens, 0).most_tokens(SHAPE.step_tokens) // SHAPE.block_tokens)
    return replace(SHAPE, window=Window(tokens, least + spare_blocks))


@dataclass
class Row:
    """A row as its head knows it."""

    prompt: list[int]
    quota: int
    """Tokens that it may make."""
    makes: int
    """Tokens that it does make."""
    ids: list[int] = field(default_factory=list)
    _told: list[int] = field(default_factory=list)

    def told(self, position: int) -> int:
        """A hash of all tokens up to that one."""
        for token in self.ids[len(self._told) : position + 1]:
            self._told.append(hash((self._told[-1] if self._told else 0, token)))
        return self._told[position]


@dataclass
class Stage:
    """What one stage's KV cache holds: at each place, what was told up to the token computed there.

    Layers of both kinds, if there are two: places of the second lie behind those of the first.
    """

    shape: RingShape
    places: dict[int, int] = field(default_factory=dict)
    tables: dict[int, list[int]] = field(default_factory=dict)
    windowed: dict[int, dict[int, int]] = field(default_factory=dict)
    """A sequence's places in the windowed pool, by position."""

    def compute(self, step: Step, rows: dict[int, Row]) -> set[int]:
        """Write what the step's spans make, then read what they see: who sees what it should."""
        for number in step.ended:
            self.tables.pop(number, None)
            self.windowed.pop(number, None)
        starts = {span.sequence: span.start for span in step.spans}
        for grant in step.grants:
            each = self.shape.block_tokens
            places = [b * each + i for b in grant.blocks for i in range(each)]
            border = self.shape.blocks * each
            full = self.tables.setdefault(grant.sequence, [])
            full += [place for place in places if place < border]
            self._extend_window(
                grant.sequence,
                [place for place in places if place >= border],
                starts[grant.sequence],
            )
        for span in step.spans:
            for position in range(span.start, span.start + span.tokens):
                told = rows[span.sequence].told(position)
                self.places[self.tables[span.sequence][position]] = told
                if self.shape.window is not None:
                    self.places[self.windowed[span.sequence][position]] = told
        return {span.sequence for span in step.spans if self._sees_its_own(span, rows)}

    def _extend_window(self, number: int, places: list[int], start: int) -> None:
        if self.shape.window is not None:
            table = self.windowed.setdefault(number, {})
            first = max(table, default=self.shape.window.kept_from(start) - 1) + 1
            table.update(enumerate(places, start=first))

    def _sees_its_own(self, span: Span, rows: dict[int, Row]) -> bool:
        each, end = rows[span.sequence], span.start + span.tokens
        table = self.tables[span.sequence]
        sees = all(self.places.get(table[p]) == each.told(p) for p in range(end))
        if self.shape.window is None:
            return sees
        near, windowed = self.shape.window.tokens - 1, self.windowed[span.sequence]
        return sees and all(
            self.places.get(windowed.get(p, -1)) == each.told(p)
            for p in range(max(0, span.start - near), end)
        )


class Rehearsal:
    """A ring with its head and one stage, played without a model; steps may be lost on their way."""

    def __init__(
        self, wanted: list[Row], depth: int, losses: set[int], shape: RingShape = SHAPE
    ) -> None:
        self.ring = Ring(shape)
        self.stage = Stage(shape)
        self.rows: dict[int, Row] = {}
        self.ever: dict[int, Row] = {}
        self.finished: list[Row] = []
        self.positions = self.preempted = self.most_live = 0
        self.right: dict[int, set[int]] = {}
        self._losses = losses
        self._depth = depth
        for each in wanted:
            each.ids = list(each.prompt)
            self.enter(each)

    def enter(self, each: Row) -> None:
        number = len(self.ever)
        self.rows[number] = self.ever[number] = each
        limit = len(each.prompt) + each.quota
        self.ring.enqueue(number, len(each.ids), limit, marks(each.ids))

    def play(self) -> None:
        flying: list[Step] = []
        while True:
            step = self.next_step() if len(flying) < self._depth else None
            if step is not None:
                flying.append(step)
                self.send(step)
            elif flying:
                self.take_back(flying.pop(0))
            else:
                return

    def next_step(self) -> Step | None:
        step = self.ring.next_step()
        for number in self.ring.take_preempted():
            self.preempted += 1
            self.enter(self.rows.pop(number))
        self.most_live = max(self.most_live, self.ring.live)
        return step

    def send(self, step: Step) -> None:
        self.positions += step.tokens
        if step.frame not in self._losses:
            self.right[step.frame] = self.stage.compute(step, self.ever)

    def take_back(self, step: Step) -> None:
        if step.frame in self._losses:
            for number in self.ring.failed(step.slot):
                self.enter(self.rows.pop(number))
            return
        alive = [span for span in step.spans if span.sequence in self.rows]
        ended = []
        for span in alive:
            assert span.sequence in self.right[step.frame], "it rests on what was never computed"
            each = self.rows[span.sequence]
            if span.samples:
                each.ids.append(len(each.ids))
            if len(each.ids) == len(each.prompt) + each.makes:
                ended.append(span.sequence)
                self.finished.append(self.rows.pop(span.sequence))
        self.ring.returned(step.slot, ended)


def family_of(seed: int, lengths: list[tuple[int, int, int]]) -> list[Row]:
    """Rows of (which beginning, its length, tokens of their own)."""
    dice = random.Random(seed)
    beginnings = [[dice.randrange(9) for _ in range(300)] for _ in range(3)]
    return [
        Row(
            beginnings[which][:shared] + [dice.randrange(9) for _ in range(own)],
            quota=(quota := dice.randint(1, 90)),
            makes=quota if dice.random() < 0.2 else dice.randint(1, quota),
        )
        for which, shared, own in lengths
    ]


lengths = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 300), st.integers(1, 60)), min_size=1, max_size=25
)


shapes = st.just(SHAPE) | st.builds(windowed, st.integers(1, 150), st.integers(0, 20))


@given(
    st.integers(0, 9), lengths, st.integers(1, 3), st.sets(st.integers(0, 60), max_size=6), shapes
)
@settings(max_examples=300, deadline=None)
def test_every_row_sees_its_own_tokens_whatever_is_shared_preempted_or_lost(
    seed: int,
    drawn: list[tuple[int, int, int]],
    depth: int,
    losses: set[int],
    shape: RingShape,
) -> None:
    rows = family_of(seed, drawn)
    rehearsal = Rehearsal(rows, depth, losses, shape)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("planner.admission.LEARNED_ROWS", 3)  # so that few rows teach something
        rehearsal.play()
    assert len(rehearsal.finished) == len(rows)
    assert rehearsal.ring.live == rehearsal.ring.queued == rehearsal.ring.in_flight == 0
    # Nothing is held for ever: the whole cache can be had again.
    assert rehearsal.ring._holdings.free_blocks == SHAPE.blocks
    windows = rehearsal.ring._holdings.windows
    if shape.window is not None and windows is not None:
        assert windows.free_blocks == windows.unreserved_blocks == shape.window.blocks


def test_a_shared_beginning_is_computed_once_even_within_one_step() -> None:
    beginning = list(range(200))
    rows = [Row(beginning + [500 + i] * 5, 1, 1) for i in range(30)]
    rehearsal = Rehearsal(rows, 3, set())
    rehearsal.play()
    shared = len(beginning) // SHARE_TOKENS * SHARE_TOKENS
    # The second row overtakes the first one's second chunk, and so that one is computed twice.
    assert rehearsal.positions == shared + 30 * (205 - shared) + (shared - CHUNK_TOKENS)


def test_a_beginning_is_shared_while_the_window_before_its_end_is_kept() -> None:
    holdings = holdings_of(windowed(40))
    numbers = count()

    def cached(ids: list[int]) -> int:
        """Of a row that comes, is computed and leaves: tokens that it found."""
        number = next(numbers)
        found = holdings.cached(marks(ids))
        assert holdings.enter(number, len(ids) + 20, len(ids) + 20, len(ids), marks(ids))
        for start, end in ((0, CHUNK_TOKENS), (CHUNK_TOKENS, len(ids))):
            if end > found:
                holdings.computes(number, max(start, found), end, frame=number)
        holdings.leave(number)
        return found

    template, other = list(range(200)), list(range(500, 700))
    assert [cached(template), cached(template)] == [0, 192]
    assert cached(other) == 0
    # The pool is one row's: the other's window took the place of the template's.
    assert cached(template) == 0, "the blocks of layers that see all are of no use alone"
    assert cached(template) == 192, "it was computed again, and is shared again"


def test_who_builds_on_a_window_that_was_lost_leaves_though_the_rest_was_there_before() -> None:
    holdings = holdings_of(windowed(40, spare_blocks=13))
    template = list(range(200))

    def enters(number: int, ids: list[int], frame: int) -> int:
        found = holdings.cached(marks(ids))
        assert holdings.enter(number, len(ids) + 20, len(ids) + 20, len(ids), marks(ids))
        for start in range(found, len(ids), CHUNK_TOKENS):
            holdings.computes(number, start, min(start + CHUNK_TOKENS, len(ids)), frame)
        return found

    assert enters(0, template, frame=0) == 0
    holdings.leave(0)
    for number in (1, 2):  # two rows' windows fill the pool
        assert enters(number, [number] * 200, frame=number) == 0
    holdings.leave(1)
    holdings.leave(2)
    assert enters(3, template, frame=3) == 0, "it has to bring the window back"
    assert enters(4, template, frame=4) == 192
    assert holdings.lose(3, [3]) == {3, 4}
    assert enters(5, template, frame=5) == 0


def test_a_row_that_a_step_has_no_room_for_takes_no_beginning_from_others() -> None:
    """The second of two long rows must wait for a step; only the first takes idle blocks."""
    ring = Ring(RingShape(1, 8, blocks=22, block_tokens=16, step_tokens=8 + CHUNK_TOKENS))
    beginning = list(range(70))
    ring.enqueue(0, 70, 71, marks(beginning))
    assert ring.next_step() is not None
    ring.returned(0, [0])
    ring.enqueue(1, 100, 160)
    ring.enqueue(2, 140, 159)
    step = ring.next_step()
    assert step is not None and [span.sequence for span in step.spans] == [1]
    ring.returned(0, [1])
    ring.withdraw(1, {2})
    ring.enqueue(3, 70, 71, marks(beginning))
    step = ring.next_step()
    assert step is not None and [span.start for span in step.spans] == [64]


def test_more_rows_fit_where_they_share() -> None:
    """96 blocks hold four rows of 24 blocks; a row that shares 18 of them brings only six."""
    beginning = list(range(300))
    alone, together = [
        Rehearsal([Row([own * i, *beginning, *[i] * 60], 20, 20) for i in range(12)], 3, set())
        for own in (1, 0)
    ]
    for rehearsal in (alone, together):
        rehearsal.play()
    assert alone.most_live == 4
    assert together.most_live >= 9


def test_rows_that_end_early_leave_room_and_a_wrong_guess_costs_a_replay() -> None:
    """Rows may make 300 tokens and make 20, until some come that do make 300."""
    early = [Row([i] * 10, 300, 20) for i in range(100)]
    rehearsal = Rehearsal(early, 3, set())
    rehearsal.play()
    assert rehearsal.most_live == 12, "every slot is full; their limits would let in four rows"
    assert rehearsal.preempted == 0
    for i in range(8):
        each = Row([i] * 10, 299, 299)
        each.ids = list(each.prompt)
        rehearsal.enter(each)
    rehearsal.play()
    assert len(rehearsal.finished) == 108
    assert rehearsal.preempted > 0
    assert rehearsal.ring._holdings.free_blocks == SHAPE.blocks


def test_marks_tell_beginnings_apart_and_leave_the_row_two_tokens() -> None:
    ids = list(range(100))
    assert len(marks(ids)) == 3
    assert [len(marks(ids[:n])) for n in (1, 33, 34, 65, 66)] == [0, 0, 1, 1, 2]
    assert marks(ids)[:2] == marks(ids[:70])
    assert not set(marks([7, *ids[1:]])) & set(marks(ids)), "a mark is of all that stands before"


def test_rows_that_share_say_what_they_say_alone(tmp_path: Path) -> None:
    write_random_model(tmp_path, "gemma3", seed=5)
    torch.set_num_threads(1)
    dice = random.Random(1)
    beginning = [dice.randrange(256) for _ in range(150)]
    prompts = [
        beginning[: dice.choice((0, 40, 97, 150))]
        + [dice.randrange(256) for _ in range(dice.randint(1, 80))]
        for _ in range(32)
    ]
    rows = [row(i, ids, 8, temperature=0.8 * (i % 2)) for i, ids in enumerate(prompts)]
    together = answers(tmp_path, rows, plan_of(4, 2), ring_settings(3, 4))
    alone = {
        i: answers(tmp_path, [each], plan_of(4, 1), ring_settings(1, 1))[i]
        for i, each in enumerate(rows[:8])
    }
    assert {i: together[i].output_ids for i in alone} == {i: a.output_ids for i, a in alone.items()}
