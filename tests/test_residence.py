"""Blocks come back to the device as they were, whoever had their frames meanwhile."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.residence import Moves, Residence


class Bytes:
    """What lies in frames and outside, as a stage would copy it, beside what ought to be there."""

    def __init__(self, frames: int) -> None:
        self.residence = Residence(frames)
        self.device: dict[int, object] = {}
        self.host: dict[int, object] = {}
        self.truth: dict[int, object] = {}
        self.moved = 0

    def move(self, moves: Moves | None) -> bool:
        if moves is None:
            return False
        for block, frame in moves.out:
            self.host[block] = self.device[frame]
        for block, frame in moves.back:
            self.device[frame] = self.host[block]
        self.moved += len(moves.out) + len(moves.back)
        return True

    def compute(self, slot: int, sequence: int, blocks: list[int], places: list[int]) -> None:
        """Seat a sequence, read all that was written of it, write some of its blocks."""
        assert self.move(self.residence.seat([sequence], set(), slot))
        frames = self.residence.frames_of(sequence)
        assert len(set(frames)) == len(frames)
        for block, frame in zip(blocks, frames, strict=True):
            if block in self.truth:
                assert self.device[frame] == self.truth[block]
        for place in places:
            self.residence.changes(sequence, place, place + 1)
            self.truth[blocks[place]] = self.device[frames[place]] = object()


@given(seed=st.integers(0, 10**6), frames=st.integers(6, 40), slots=st.integers(1, 5))
def test_a_sequence_finds_what_it_and_those_it_shares_with_have_written(
    seed: int, frames: int, slots: int
) -> None:
    dice, there = random.Random(seed), Bytes(frames)
    live: dict[int, tuple[int, list[int]]] = {}
    free = list(range(60))
    for step in range(60):
        slot = step % slots
        ended = [n for n in live if dice.random() < 0.1]
        for number in ended:
            _, blocks = live.pop(number)
            there.residence.drop(number)
            held = {b for _, others in live.values() for b in others}
            free += [b for b in dict.fromkeys(blocks) if b not in held and b not in free]
        if dice.random() < 0.6 and len(free) >= 6:
            shared = next(iter(live.values()))[1][:2] if live and dice.random() < 0.5 else []
            shared = [b for b in shared if b in there.truth]
            own = [free.pop(0) for _ in range(dice.randint(1, 6 - len(shared)))]
            for block in own:
                there.truth.pop(block, None)
            live[step] = (slot, shared + own)
            there.residence.extend(slot, step, shared + own, len(shared))
        now = [n for n, (s, _) in live.items() if s == slot]
        for number in now:
            blocks = live[number][1]
            own_places = [i for i, b in enumerate(blocks) if b not in free]
            there.compute(slot, number, blocks, [dice.choice(own_places)])
        kept = there.residence.blocks_of(now[-1:])
        for number in there.residence.after(slot):
            if not there.move(there.residence.seat([number], kept, slot)):
                break
            kept |= there.residence.blocks_of([number])


def moved(slots: int, frames: int, rounds: int) -> tuple[float, float]:
    """Blocks moved in a round of slots of ten blocks each: while one waits, and beside it."""
    there, waited = Bytes(frames), 0
    every = [list(range(10 * slot, 10 * slot + 10)) for slot in range(slots)]
    for slot, blocks in enumerate(every):
        there.residence.extend(slot, slot, blocks, 0)
    for step in range((rounds + 2) * slots):
        if step == 2 * slots:
            there.moved = waited = 0
        slot, before = step % slots, there.moved
        there.compute(slot, slot, every[slot], [9] if step >= slots else list(range(10)))
        waited += there.moved - before
        for number in there.residence.after(slot):
            there.move(there.residence.seat([number], there.residence.blocks_of([slot]), slot))
    return waited / rounds, (there.moved - waited) / rounds


@pytest.mark.parametrize("resident", [2, 3, 4, 6, 8])
def test_nobody_waits_where_two_slots_fit_and_no_more_moves_than_must(
    resident: int,
) -> None:
    slots = 8
    waited, beside = moved(slots, 10 * resident, rounds=7 * 4)
    assert waited == 0
    # Belady's share of slots that are gone when their turn comes, if one waited; with a slot less.
    least, most = (1.0 - (resident - spare) / (slots - 1) for spare in (1, 2))
    if resident == slots:
        most = 0.0
    assert slots * least * 11 <= beside <= slots * most * 11


def test_what_does_not_fit_changes_nothing() -> None:
    residence = Residence(10)
    residence.extend(0, 1, range(8), 0)
    residence.extend(1, 2, range(8, 16), 0)
    assert residence.seat([1], set(), 0) == Moves((), ())
    residence.changes(1, 0, 8)
    frames = residence.frames_of(1)
    assert residence.seat([2], residence.blocks_of([1]), 0) is None
    assert residence.seat([1, 2], set(), 0) is None
    assert residence.frames_of(1) == frames
    moves = residence.seat([2], set(), 1)
    assert moves is not None
    assert len(moves.out) == 6, "as many as were in the way"
