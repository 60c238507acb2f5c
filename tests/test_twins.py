"""Rows that ask the same are computed once, and only where the answer must be the same."""

import pytest

from flows.dealing import Told
from flows.job import Sampling
from flows.lease import Lease, question
from flows.twins import REMEMBERED, Twins
from stages.control import Answer, LeasedRow
from storage.prompts import PromptRow
from tests.ring import row


def lease(number: int, ids: tuple[int, ...] = (1, 2), new_tokens: int = 4, **own: float) -> Lease:
    prompt = PromptRow(number, str(number), "hash", "p", None, {}, "prefix", 1)
    return of(prompt, row(number, ids, new_tokens, **own))


def of(prompt: PromptRow, leased: LeasedRow) -> Lease:
    return Lease(prompt, leased, Sampling(), cut_short=False, question=question(leased))


def answer(number: int) -> Told:
    said = Answer(
        row=number, output_ids=(5,), text="said", finish_reason="stop", prompt_tokens=2,
        output_tokens=1, queued_s=0.0, prefill_s=0.0, decode_s=0.0,
    )  # fmt: skip
    return Told(3, said)


def test_twins_wait_for_the_first_and_later_ones_have_its_answer() -> None:
    twins, first = Twins(), lease(0)
    assert not twins.waits(first)
    waiting = [lease(1), lease(2)]
    assert all(twins.waits(each) for each in waiting)
    assert twins.answered(first, answer(0)) == waiting
    assert twins.answer_to(lease(3)) == answer(0)
    assert not twins.waits(lease(4, ids=(1, 3)))


@pytest.mark.parametrize(
    "other",
    [
        lease(1, ids=(1, 2, 3)),
        lease(1, new_tokens=5),
        of(lease(1).prompt, lease(1).row.model_copy(update={"stop": ("x",)})),
        lease(1, temperature=0.5),
    ],
)
def test_who_asks_otherwise_is_no_twin(other: Lease) -> None:
    twins, first = Twins(), lease(0)
    assert not twins.waits(first)
    assert not twins.waits(other)
    twins.answered(first, answer(0))
    assert twins.answer_to(other) is None


def test_sampled_rows_have_no_twins() -> None:
    twins = Twins()
    rows = [lease(n, temperature=1.0) for n in range(2)]
    assert not any(twins.waits(each) for each in rows)
    assert twins.answered(rows[0], answer(0)) == []
    assert twins.answer_to(rows[1]) is None


def test_want_of_memory_is_no_answer_for_twins_to_come() -> None:
    twins, first = Twins(), lease(0)
    assert not twins.waits(first) and twins.waits(lease(1))
    lacking = answer(0).answer.model_copy(update={"error_type": "out_of_memory"})
    assert [each.row.row for each in twins.answered(first, Told(3, lacking))] == [1]
    assert twins.answer_to(lease(2)) is None


def test_only_so_many_answers_are_remembered() -> None:
    twins = Twins()
    for number in range(REMEMBERED + 1):
        each = lease(number, ids=(number, 1))
        assert not twins.waits(each)
        twins.answered(each, answer(number))
    assert twins.answer_to(lease(0, ids=(0, 1))) is None
    assert twins.answer_to(lease(0, ids=(1, 1))) == answer(1)
