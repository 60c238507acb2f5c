"""The head on imagined stages: rows in, steps out; samples in, answers out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.schedule import RingShape
from stages.control import Answer, StepFailed
from stages.errors import ProtocolError
from stages.head import Head, Work
from stages.prompt import PromptEncoder
from stages.wire import SampleFrame
from tests.models import byte_tokenizer
from tests.ring import row

END = 257


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return PromptEncoder.load(folder, "parse")


class Clock:
    """Seconds that pass when the test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def head_of(encoder: PromptEncoder, slots: int = 2, clock: Clock | None = None) -> Head:
    shape = RingShape(slots=slots, slot_rows=2, blocks=64, block_tokens=16, step_tokens=256)
    return Head(shape, encoder, clock or Clock())


def next_work(head: Head) -> Work:
    work = head.next_work()
    assert work is not None
    return work


def samples(work: Work, *tokens: int) -> SampleFrame:
    return SampleFrame(1, work.step.frame, work.step.slot, tokens)


def failure(work: Work, *sequences: int) -> StepFailed:
    return StepFailed(
        epoch=1, frame=work.step.frame, slot=work.step.slot, sequences=sequences,
        error_type="numeric_error", message="a NaN",
    )  # fmt: skip


def run_to_end(head: Head, token: int) -> list[Answer]:
    """Every sample is that token."""
    answers: list[Answer] = []
    while (work := head.next_work()) is not None:
        sampling = sum(span.samples for span in work.step.spans)
        answers += head.sampled(samples(work, *[token] * sampling))
    return answers


def test_a_step_carries_the_ids_of_its_spans_and_admits_new_rows_once(
    encoder: PromptEncoder,
) -> None:
    head = head_of(encoder, slots=1)
    head.lease([row(5, [10, 11, 12], 3)])
    first = next_work(head)
    assert first.token_ids.tolist() == [10, 11, 12]
    [admit] = first.admits
    assert admit.key == row(5, [1], 1).key
    head.sampled(samples(first, 42))
    second = next_work(head)
    assert second.token_ids.tolist() == [42]
    assert second.admits == ()


def test_an_answer_counts_and_times_its_row(encoder: PromptEncoder) -> None:
    clock = Clock()
    head = head_of(encoder, slots=1, clock=clock)
    head.lease([row(5, [10, 11, 12], 2)])
    clock.now += 1.0
    work = next_work(head)
    clock.now += 2.0
    assert head.sampled(samples(work, 65)) == []
    work = next_work(head)
    clock.now += 4.0
    [answer] = head.sampled(samples(work, 66))
    assert (answer.row, answer.text, answer.finish_reason) == (5, "AB", "length")
    assert (answer.prompt_tokens, answer.output_tokens) == (3, 2)
    assert (answer.queued_s, answer.prefill_s, answer.decode_s) == (1.0, 2.0, 4.0)
    assert head.rows == 0


def test_an_end_token_ends_a_row_before_its_limit(encoder: PromptEncoder) -> None:
    head = head_of(encoder)
    head.lease([row(0, [10], 9)])
    [answer] = head.sampled(samples(next_work(head), END))
    assert (answer.finish_reason, answer.text, answer.output_tokens) == ("stop", "", 1)


def test_a_failed_step_ends_the_rows_it_names_and_starts_the_others_again(
    encoder: PromptEncoder,
) -> None:
    head = head_of(encoder, slots=1)
    head.lease([row(0, [10, 11], 4), row(1, [20, 21, 22], 4)])
    work = next_work(head)
    head.sampled(samples(work, 65, 65))
    work = next_work(head)
    by_row = {span.sequence: span for span in work.step.spans}
    poisoned = next(n for n, span in by_row.items() if span.start == 2)
    [failed] = head.failed(failure(work, poisoned))
    assert (failed.row, failed.finish_reason, failed.error_type) == (0, "error", "numeric_error")
    again = next_work(head)
    assert again.token_ids.tolist() == [20, 21, 22, 65], "prompt and what was sampled"
    assert set(by_row) <= set(again.step.ended), "stages may let go of both"
    assert len(again.admits) == 1
    answers = head.sampled(samples(again, 66)) + run_to_end(head, 66)
    [survivor] = answers
    assert (survivor.text, survivor.replayed_tokens) == ("ABBB", 3)


def test_what_a_lost_step_announced_is_announced_again(encoder: PromptEncoder) -> None:
    head = head_of(encoder, slots=1)
    head.lease([row(0, [10], 1), row(1, [20], 4)])
    first = next_work(head)
    [ended] = head.sampled(samples(first, 65, 65))
    second = next_work(head)
    assert len(second.step.ended) == 1
    head.failed(failure(second))
    assert set(second.step.ended) < set(next_work(head).step.ended)
    assert ended.row == 0


def test_samples_that_no_step_waits_for_are_refused(encoder: PromptEncoder) -> None:
    head = head_of(encoder)
    head.lease([row(0, [10], 4)])
    work = next_work(head)
    with pytest.raises(ProtocolError, match="slot 1"):
        head.sampled(SampleFrame(1, work.step.frame, 1, (65,)))
    head.sampled(samples(work, 65))
    with pytest.raises(ProtocolError, match="came back"):
        head.sampled(samples(work, 65))


def test_samples_of_another_count_are_refused(encoder: PromptEncoder) -> None:
    head = head_of(encoder)
    head.lease([row(0, [10], 4)])
    with pytest.raises(ProtocolError, match="2 tokens for 1"):
        head.sampled(samples(next_work(head), 65, 66))


def test_a_row_that_begins_as_it_is_asked_back_stays(encoder: PromptEncoder) -> None:
    head = head_of(encoder, slots=1)  # for two rows
    head.lease([row(n, [10], 9 - n) for n in range(5)])
    next_work(head)
    assert head.give_back(9, most_tokens=100) == (4, 3, 2)
    assert head.give_back(9, most_tokens=100) == ()
    assert head.rows == 2


def test_rows_go_back_that_would_begin_last_and_have_room_elsewhere(
    encoder: PromptEncoder,
) -> None:
    head = head_of(encoder, slots=1)
    head.lease([row(n, [10], 3 + n) for n in range(6)])  # the longest begin first
    assert head.give_back(2, most_tokens=100) == (0, 1)
    assert head.give_back(9, most_tokens=7) == (2, 3)
    assert [answer.row for answer in run_to_end(head, 65)] == [4, 5]


def test_a_row_that_must_start_again_has_begun(encoder: PromptEncoder) -> None:
    head = head_of(encoder, slots=1)
    head.lease([row(0, [10, 11], 4), row(1, [20], 4)])
    head.failed(failure(next_work(head)))
    assert head.rows == 2
    assert head.give_back(9, most_tokens=100) == ()
    assert len(run_to_end(head, 65)) == 2


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 30))
def test_every_row_is_answered_or_given_back_and_never_both(
    encoder: PromptEncoder, turns: list[int], rows: int
) -> None:
    head, flying = head_of(encoder), list[Work]()
    head.lease([row(n, [10] * (1 + n % 40), 1 + n % 4) for n in range(rows)])
    ended: list[int] = []

    def take_one_back() -> None:
        work = flying.pop(0)
        sampling = sum(span.samples for span in work.step.spans)
        ended.extend(a.row for a in head.sampled(samples(work, *[65] * sampling)))

    for turn in turns:
        if turn == 0:
            ended += head.give_back(2, most_tokens=60)
        elif turn == 1 and flying:
            take_one_back()
        elif (work := head.next_work()) is not None:
            flying.append(work)
    while head.rows:
        if not flying:
            flying.append(next_work(head))
        take_one_back()
    assert sorted(ended) == list(range(rows))
