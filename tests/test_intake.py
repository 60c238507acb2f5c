"""Rows wait in order, a pipeline keeps to one beginning, and all of them come out once."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from flows.dealing import Told
from flows.intake import TOKEN_CHARACTERS, WINDOW_CHARACTERS, WINDOW_ROWS, Intake, Waiting
from flows.job import Job, Sampling
from flows.lease import Clerk, RunNames
from flows.model import open_model
from planner.schedule import CHUNK_TOKENS
from stages.control import Answer
from storage.prompts import PromptRow


def asking(row_id: int, length: int, prefix: str) -> PromptRow:
    return PromptRow(row_id, f"r{row_id}", "hash", "x" * length, None, {}, prefix, length)


def waiting(*rows: tuple[int, str]) -> Waiting:
    asked = [asking(n, length, prefix) for n, (length, prefix) in enumerate(rows)]
    return Waiting(iter(asked), len(asked), Sampling())


def drained(rows: Waiting, pipelines: list[int]) -> list[PromptRow]:
    """All rows, the pipelines taking turns as told."""
    found: list[PromptRow] = []
    while (row := rows.take(pipelines[len(found) % len(pipelines)])) is not None:
        found.append(row)
    assert len(rows) == 0
    return found


def test_rows_go_longest_first_with_their_prefix_behind_them() -> None:
    rows = waiting((3, "a"), (9, "b"), (5, "c"), (7, "a"))
    assert [row.length for row in drained(rows, [0])] == [9, 7, 3, 5]


def test_rows_that_may_say_more_go_first_and_a_chunk_of_prompt_counts_as_a_token() -> None:
    chunk = TOKEN_CHARACTERS * CHUNK_TOKENS
    asked = [
        asking(0, 10 * chunk, "a"),
        replace(asking(1, 10, "b"), sampling={"max_new_tokens": 90}),
        replace(asking(2, 5 * chunk, "c"), sampling={"max_new_tokens": 80}),
        replace(asking(3, 10, "d"), sampling={"max_new_tokens": 5}),
    ]
    rows = Waiting(iter(asked), len(asked), Sampling(max_new_tokens=64))
    assert [row.row_id for row in drained(rows, [0])] == [1, 2, 0, 3]


def test_a_twin_of_a_row_that_found_no_memory_is_leased_itself(tiny_model: Path) -> None:
    job = Job.model_validate({"name": "a", "model": str(tiny_model), "prompts": {"uri": "p"}})
    clerk = Clerk(job, open_model(job), RunNames("run", "plan", 1, "exact"), 1000)
    same = [asking(n, 5, "a") for n in range(2)]
    intake = Intake(Waiting(iter(same), 2, job.sampling), clerk)
    first = intake.take(0)
    assert first is not None and intake.take(0) is None, "the second waits for the first"
    lacking = Answer(
        row=first.row, output_ids=(), text="", finish_reason="error", prompt_tokens=5,
        output_tokens=0, queued_s=0.0, prefill_s=0.0, decode_s=0.0,
        error_type="out_of_memory", error_message="no memory",
    )  # fmt: skip
    assert [row.row_id for row in intake.answered(Told(0, lacking))] == [first.row]
    assert len(intake) == 1
    second = intake.take(0)
    assert second is not None and second.row != first.row
    assert len(intake) == 0


def test_a_beginning_stays_with_one_pipeline_until_only_others_rows_are_left() -> None:
    rows = waiting(*[(9, "a")] * 6, *[(8, "b")] * 2, *[(7, "c")] * 2)
    took = [(n, row.prefix_hash) for n in [0, 1] * 5 if (row := rows.take(n)) is not None]
    assert [prefix for n, prefix in took if n == 0] == ["a"] * 5
    assert [prefix for n, prefix in took if n == 1] == ["b", "b", "c", "c", "a"]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from("abcd")), max_size=40),
    st.lists(st.integers(0, 3), min_size=1, max_size=5),
)
def test_every_row_comes_out_once_whoever_asks(
    rows: list[tuple[int, str]], pipelines: list[int]
) -> None:
    found = drained(waiting(*rows), pipelines)
    assert sorted(row.row_id for row in found) == list(range(len(rows)))


def test_no_more_rows_are_held_than_are_put_in_order_at_once() -> None:
    read = Counter[str]()

    def rows_read() -> Iterator[PromptRow]:
        for n in range(3 * WINDOW_ROWS):
            read["rows"] += 1
            yield asking(n, 1 + n % 7, str(n % 3))

    rows = Waiting(rows_read(), 3 * WINDOW_ROWS, Sampling())
    for n in range(WINDOW_ROWS):
        assert rows.take(n % 2) is not None
    assert read["rows"] == WINDOW_ROWS
    assert len(rows) == 2 * WINDOW_ROWS


def test_no_more_of_long_prompts_is_held_than_is_put_in_order_at_once() -> None:
    length = WINDOW_CHARACTERS // 4
    long = PromptRow(0, "r", "hash", "only its length counts", None, {}, "a", length)
    unread = iter([replace(long, row_id=n) for n in range(10)])
    rows = Waiting(unread, 10, Sampling())
    assert rows.take(0) is not None
    assert [row.row_id for row in unread] == [4, 5, 6, 7, 8, 9]
