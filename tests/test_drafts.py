"""How many tokens are drafted: the most a second by what rounds cost, and never for another's room."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.cost import tokens_per_round
from planner.drafts import FORESEEN_TRIES, DraftCosts, Goodput
from planner.facts import Cluster, Lengths, Link, ModelShape, Node, Workload
from planner.plan import LinkPlan, Pipeline, Plan, StagePlan
from planner.schedule import CHUNK_TOKENS, Ring, RingShape, Step
from planner.simulate import Simulated, simulate

LENGTHS = (0, 1, 2, 4)
FREE = DraftCosts((1,), LENGTHS, ((1.0,) * 4,), (0.9,) * 4)
"""A round takes as long with drafts as without."""


def by_the_position(rows: tuple[int, ...]) -> DraftCosts:
    """Each position takes its time, as on a saturated link."""
    seconds = tuple(tuple(float(n * (length + 1)) for length in LENGTHS) for n in rows)
    return DraftCosts(rows, LENGTHS, seconds, (0.9,) * 4)


def test_nothing_is_drafted_where_each_position_takes_its_time() -> None:
    assert Goodput(by_the_position((1, 8))).draft_len(8) == 0


def test_as_much_as_can_be_is_drafted_where_positions_are_free() -> None:
    assert Goodput(FREE).draft_len(1) == 4


chances = st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4).map(tuple)
seconds = st.lists(st.floats(0.1, 10.0), min_size=4, max_size=4).map(tuple)


@given(chances, seconds, seconds, st.integers(1, 40))
def test_no_other_length_commits_more_tokens_a_second(
    chances: tuple[float, ...], few: tuple[float, ...], many: tuple[float, ...], rows: int
) -> None:
    goodput = Goodput(DraftCosts((4, 32), LENGTHS, (few, many), chances))
    took = few if rows <= 4 else many
    rates = [tokens_per_round(chances, n) / s for n, s in zip(LENGTHS, took, strict=True)]
    chosen = LENGTHS.index(goodput.draft_len(rows))
    assert rates[chosen] == pytest.approx(max(rates))


def test_drafts_that_do_not_hold_as_foreseen_are_given_up_and_those_that_do_are_not() -> None:
    costs = replace(FREE, round_s=((1.0, 1.1, 1.2, 1.4),))
    refused, kept = Goodput(costs), Goodput(costs)
    for _ in range(20 * FORESEEN_TRIES):
        refused.saw(refused.draft_len(1), 0)
        kept.saw(4, 4)
    assert (refused.draft_len(1), kept.draft_len(1)) == (0, 4)


def test_what_came_behind_a_refused_draft_tells_nothing() -> None:
    goodput = Goodput(FREE)
    goodput.saw(4, 1)
    first, second, *others = goodput.chances
    assert first > 0.9 > second
    assert others == [pytest.approx(0.9)] * 2


def test_costs_that_fit_no_chances_are_refused() -> None:
    with pytest.raises(ValueError, match="one for each chance"):
        DraftCosts((1,), LENGTHS, ((1.0,) * 4,), (0.9,))


def shape(blocks: int, drafts: DraftCosts | None) -> RingShape:
    return RingShape(3, 4, blocks, 16, 4 + CHUNK_TOKENS, drafts=drafts)


def drained(ring: Ring, quotas: dict[int, int], seed: int) -> tuple[list[Step], list[int]]:
    """Run the ring until every sequence has made its quota, some of its drafts held; what it took.

    Checks that each step goes on where the sequence's last token is, with room for all it computes.
    """
    pick, flying, steps, drafted = random.Random(seed), [], [], []  # type: ignore[var-annotated]
    prompts = {n: ring._sequences[n].known for n in quotas}
    made, blocks = dict.fromkeys(quotas, 0), dict.fromkeys(quotas, 0)
    while True:
        step = ring.next_step() if len(flying) < 2 else None
        if step is not None:
            flying.append(step)
            steps.append(step)
            drafted.append(ring.draft_len(step.slot))
            for grant in step.grants:
                blocks[grant.sequence] += len(grant.blocks)
            for span in step.spans:
                n, drafts = span.sequence, drafted[-1] if span.decodes else 0
                if made[n]:
                    assert (span.start, span.tokens) == (prompts[n] + made[n] - 1, 1)
                end = min(span.start + span.tokens + drafts, prompts[n] + quotas[n])
                assert 16 * blocks[n] >= end
            continue
        if not flying:
            return steps, drafted
        back = flying.pop(0)
        length, held = ring.draft_len(back.slot), {}
        for span in back.spans:
            n = span.sequence
            if length and span.decodes:
                held[n] = min(pick.randint(0, length), quotas[n] - made[n] - 1)
            made[n] += span.samples + held.get(n, 0)
        ring.returned(
            back.slot,
            [s.sequence for s in back.spans if made[s.sequence] == quotas[s.sequence]],
            held,
        )


@pytest.mark.parametrize("seed", range(8))
def test_rows_with_drafts_go_on_behind_those_that_held_and_come_to_their_quota(seed: int) -> None:
    pick = random.Random(seed)
    ring, quotas = Ring(shape(400, FREE)), {n: pick.randint(1, 60) for n in range(20)}
    for number, quota in quotas.items():
        prompt = pick.randint(1, 300)
        ring.enqueue(number, prompt, prompt + quota)
    _, drafted = drained(ring, quotas, seed)
    assert max(drafted) == 4
    assert ring.live == ring.queued == ring.in_flight == 0
    assert ring._holdings.free_blocks == 400


def test_nobody_makes_way_for_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first row ends at once, so two more have one block of 16 places each, and fill it; there is
    # no third for what is drafted beyond.
    monkeypatch.setattr("planner.admission.LEARNED_ROWS", 1)
    ring = Ring(replace(shape(2, FREE), slots=1))
    ring.enqueue(0, 1, 31)
    drained(ring, {0: 1}, 0)
    for number in (1, 2):
        ring.enqueue(number, 12, 28)
    steps, drafted = drained(ring, {1: 4, 2: 4}, 0)
    assert ring.take_preempted() == []
    beside = [n for step, n in zip(steps, drafted, strict=True) if len(step.spans) == 2]
    assert len(beside) > 1 and set(beside[1:]) == {0}


MODEL = ModelShape(12, 2048, 4e8, 2048.0, 2, 1e8, 1e8, 4e8)
TWO = Cluster(
    tuple(Node(name, 2e13, 6e9, 4e11) for name in ("a", "b")), (), Link("", "", 0.050, 2e6)
)
WORK = Workload(64, Lengths(100, 100), Lengths(60, 150), acceptance=(0.8, 0.7, 0.6, 0.5))


def imagined(work: Workload) -> Simulated:
    stages = StagePlan("a", 0, 6), StagePlan("b", 6, 12)
    links = LinkPlan("a", "b"), LinkPlan("b", "a")
    plan = Plan((Pipeline(stages, links, 16, 2),), 1.0, 1.0, 1.0, 1.0, "")
    return simulate(plan, TWO, MODEL, work, trace=True)


def test_a_job_is_done_about_as_soon_as_with_the_best_one_length_and_sooner_than_with_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 32 rows fill the link, 16 a frame; the few rows of the tail only wait for it to be crossed.
    following = imagined(WORK)
    always_s = []
    for length in LENGTHS:
        with monkeypatch.context() as patched:
            patched.setattr(Goodput, "draft_len", lambda self, rows, length=length: length)
            always = imagined(WORK)
        assert always.output_tokens == following.output_tokens
        always_s.append(always.finish_s)
    best_s, second_s, *_ = sorted(always_s)
    assert following.finish_s < 1.02 * best_s
    assert following.finish_s < second_s


def test_drafts_that_never_hold_are_not_made() -> None:
    plain = imagined(replace(WORK, acceptance=()))
    assert imagined(replace(WORK, acceptance=(0.0,) * 4)).finish_s == plain.finish_s
