"""The ring's policy, run without a model: counts go in, steps come out."""

import random
from itertools import count, cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.blocks import BlockPool
from planner.schedule import CHUNK_TOKENS, Ring, RingShape, Step

SHAPE = RingShape(slots=3, slot_rows=4, blocks=64, block_tokens=16, step_tokens=4 + CHUNK_TOKENS)

rows = st.lists(st.tuples(st.integers(1, 400), st.integers(1, 40)), min_size=1, max_size=40)


def drain(ring: Ring, quotas: dict[int, int], depth: int) -> list[Step]:
    """Run the ring with up to `depth` steps in flight until every sequence has made its quota."""
    made = dict.fromkeys(quotas, 0)
    steps: list[Step] = []
    flying: list[Step] = []
    while True:
        step = ring.next_step() if len(flying) < depth else None
        if step is not None:
            flying.append(step)
            steps.append(step)
            continue
        if not flying:
            return steps
        back = flying.pop(0)
        for span in back.spans:
            made[span.sequence] += span.samples
        ring.returned(
            back.slot, [s.sequence for s in back.spans if made[s.sequence] == quotas[s.sequence]]
        )


def ring_of(shape: RingShape, lengths: list[tuple[int, int]]) -> tuple[Ring, dict[int, int]]:
    ring = Ring(shape)
    for number, (prompt, quota) in enumerate(lengths):
        ring.enqueue(number, prompt, prompt + quota)
    return ring, {number: quota for number, (_, quota) in enumerate(lengths)}


@given(rows, st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_every_row_is_computed_once_from_its_first_position_to_its_last(
    lengths: list[tuple[int, int]], depth: int
) -> None:
    ring, quotas = ring_of(SHAPE, lengths)
    computed = dict.fromkeys(quotas, 0)
    for step in drain(ring, quotas, depth):
        for span in step.spans:
            assert span.start == computed[span.sequence]
            computed[span.sequence] = span.start + span.tokens
    # The last sampled token is never computed: nothing follows it.
    assert computed == {n: prompt + quota - 1 for n, (prompt, quota) in enumerate(lengths)}
    assert ring.live == ring.queued == ring.in_flight == 0


@given(rows, st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_no_block_has_two_owners_and_every_position_has_a_block(
    lengths: list[tuple[int, int]], depth: int
) -> None:
    ring, quotas = ring_of(SHAPE, lengths)
    held: dict[int, tuple[int, ...]] = {}
    for step in drain(ring, quotas, depth):
        for number in step.ended:
            del held[number]
        for grant in step.grants:
            held[grant.sequence] = held.get(grant.sequence, ()) + grant.blocks
        owned = [block for blocks in held.values() for block in blocks]
        assert len(owned) == len(set(owned))
        for span in step.spans:
            assert len(held[span.sequence]) * SHAPE.block_tokens >= span.start + span.tokens


@given(rows)
@settings(max_examples=100, deadline=None)
def test_a_prompt_is_cut_only_at_fixed_positions(lengths: list[tuple[int, int]]) -> None:
    ring, quotas = ring_of(SHAPE, lengths)
    for step in drain(ring, quotas, depth=3):
        assert step.tokens <= SHAPE.step_tokens
        for span in step.spans:
            assert span.samples or (span.start + span.tokens) % CHUNK_TOKENS == 0


def busy(shape: RingShape, lengths: list[tuple[int, int]], stages: int) -> float:
    """The share of its time, in the middle half of all steps, that the last of equal stages computes.

    A step of n tokens takes each of them 15 + n; ways between them take nothing. Rows may make 120
    tokens, and nobody knows which end before.
    """
    ring, quotas = Ring(shape), {n: made for n, (_, made) in enumerate(lengths)}
    for number, (prompt, _) in enumerate(lengths):
        ring.enqueue(number, prompt, prompt + 120)
    free = [0] * stages
    flying: list[tuple[int, Step]] = []
    times: list[tuple[int, int]] = []
    while ring.live or ring.queued:
        step = None if flying and flying[0][0] <= free[0] else ring.next_step()
        if step is None:
            at, back = flying.pop(0)
            free[0] = max(free[0], at)
            for span in back.spans:
                quotas[span.sequence] -= span.samples
            ring.returned(back.slot, [s.sequence for s in back.spans if not quotas[s.sequence]])
            continue
        takes, end = 15 + step.tokens, 0
        for stage in range(stages):
            end = free[stage] = max(free[stage], end) + takes
        times.append((end - takes, end))
        flying.append((end, step))
    middle = times[len(times) // 4 : -len(times) // 4]
    return sum(end - start for start, end in middle) / (middle[-1][1] - middle[0][0])


def test_prompts_of_all_lengths_make_no_step_so_fat_that_stages_wait() -> None:
    dice = random.Random(1)
    lengths = [(dice.randint(16, 400), dice.randint(4, 120)) for _ in range(900)]
    shape = RingShape(12, 32, blocks=10**5, block_tokens=16, step_tokens=32 + 2 * CHUNK_TOKENS)
    assert busy(shape, lengths, stages=8) > 0.9


def test_steps_have_all_their_chunks_while_prompts_wait_in_every_slot() -> None:
    shape = RingShape(4, 8, blocks=10**5, block_tokens=16, step_tokens=8 + 3 * CHUNK_TOKENS)
    ring, quotas = ring_of(shape, [(4000, 2)] * 60)
    steps = drain(ring, quotas, depth=4)[40:-40]
    assert sum(step.tokens for step in steps) > 0.9 * shape.step_tokens * len(steps)


def test_a_ring_of_one_slot_fills_its_steps() -> None:
    shape = RingShape(1, 8, blocks=10**5, block_tokens=16, step_tokens=8 + 3 * CHUNK_TOKENS)
    step = ring_of(shape, [(90, 9)] * 8)[0].next_step()
    assert step is not None and step.tokens == 4 * 90


def test_few_rows_spread_over_the_slots() -> None:
    ring, _ = ring_of(SHAPE, [(5, 3)] * 6)
    steps = [ring.next_step() for _ in range(3)]
    assert [len(step.spans) if step else 0 for step in steps] == [2, 2, 2]


def test_short_memory_is_shared_evenly_by_the_slots() -> None:
    shape = RingShape(slots=4, slot_rows=32, blocks=32, block_tokens=16, step_tokens=256)
    ring, quotas = ring_of(shape, [(10, 4 + i % 7) for i in range(200)])
    steps = drain(ring, quotas, depth=4)
    sizes = [len(step.spans) for step in steps[40:-40]]
    assert max(sizes) <= 2 * min(sizes), "one slot has the rows that the others lack"


def test_what_one_step_grants_is_bounded() -> None:
    huge = RingShape(slots=1, slot_rows=64, blocks=2**17, block_tokens=16, step_tokens=1024)
    ring, _ = ring_of(huge, [(4, 16_000)] * 64)
    granted = []
    for _ in range(8):
        step = ring.next_step()
        assert step is not None
        granted.append(sum(len(grant.blocks) for grant in step.grants))
        ring.returned(step.slot, [])
    assert 0 < max(granted) <= 2**14
    assert sum(granted) == 64 * huge.blocks_for(16_004)


def test_slots_go_round_in_cyclic_order() -> None:
    ring, quotas = ring_of(SHAPE, [(5, 10)] * 12)
    slots = [step.slot for step in drain(ring, quotas, depth=3)]
    assert slots == [i % 3 for i in range(len(slots))]


def test_the_row_that_may_go_round_most_often_enters_first() -> None:
    ring, _ = ring_of(SHAPE, [(5, 3), (90, 3), (40, 3), (300, 1)])
    step = ring.next_step()
    assert step is not None and step.spans[0].sequence == 1


def test_a_row_that_waits_for_memory_is_not_overtaken() -> None:
    shape = RingShape(slots=1, slot_rows=4, blocks=4, block_tokens=16, step_tokens=512)
    ring = Ring(shape)
    ring.enqueue(0, 20, 40)
    step = ring.next_step()
    assert step is not None
    ring.enqueue(1, 20, 39)
    ring.enqueue(2, 2, 4)
    ring.returned(0, [])
    following = ring.next_step()
    assert following is not None and [s.sequence for s in following.spans] == [0]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from((8, 120))), min_size=9, max_size=40),
    st.lists(st.booleans(), min_size=1, max_size=9),
)
@settings(max_examples=30, deadline=None)
def test_the_oldest_row_never_makes_way_and_all_come_to_their_end(
    lengths: list[tuple[int, int]], returns: list[bool]
) -> None:
    """Rows may make 120 tokens, and the first that end make few: more enter than there is room for."""
    shape = RingShape(3, 2, blocks=14, block_tokens=16, step_tokens=130 + CHUNK_TOKENS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("planner.admission.LEARNED_ROWS", 2)
        ring, numbers, live = Ring(shape), count(), set[int]()
        left: dict[int, tuple[int, int, int]] = {}

        def enter(known: int, limit: int, end: int) -> None:
            number = next(numbers)
            left[number] = (known, limit, end)
            ring.enqueue(number, known, limit)

        for prompt, quota in lengths:
            enter(prompt, prompt + 120, prompt + quota)
        flying: list[Step] = []
        turns = cycle(returns)
        while left:
            step = ring.next_step()
            for number in ring.take_preempted():
                assert number > min(live), "the oldest made way"
                live.discard(number)
                enter(*left.pop(number))
            if step is not None:
                live.update(span.sequence for span in step.spans)
                flying.append(step)
            if step is None or next(turns):
                back = flying.pop(0)
                for span in back.spans:
                    if span.sequence in left and span.samples:
                        known, limit, end = left[span.sequence]
                        left[span.sequence] = (known + 1, limit, end)
                back_now = {span.sequence for span in back.spans} & left.keys()
                ended = [number for number in back_now if left[number][0] == left[number][2]]
                ring.returned(back.slot, ended)
                live.difference_update(ended)
                for number in ended:
                    del left[number]


def test_a_long_prompt_waits_for_no_one_and_stops_no_decode() -> None:
    ring, _ = ring_of(SHAPE, [(400, 5)] + [(1, 30)] * 11)
    seen: set[int] = set()
    for _ in range(3 * 4):
        step = ring.next_step()
        assert step is not None
        seen.update(span.sequence for span in step.spans if span.samples)
        ring.returned(step.slot, [])
    assert 0 in seen


@given(st.lists(st.integers(1, 9), max_size=30))
def test_the_pool_gives_each_block_to_one_owner_and_gets_all_back(
    wants: list[int],
) -> None:
    pool = BlockPool(40)
    held: list[tuple[int, ...]] = []
    for i, want in enumerate(wants):
        got = pool.take(want)
        if got is None:
            assert want > pool.free
            continue
        held.append(got)
        if i % 3 == 2:
            pool.give_back(held.pop(i % len(held)))
        owned = [block for blocks in held for block in blocks]
        assert len(owned) == len(set(owned)) == 40 - pool.free
    for blocks in held:
        pool.give_back(blocks)
    assert pool.take(40) == tuple(range(40))
