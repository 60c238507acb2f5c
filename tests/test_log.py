"""The log as pure values, and the store against a model of it under any order of events."""

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal
from uuid import uuid4

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from storage.catalog import query
from storage.compact import compact
from storage.errors import CorruptStoreError
from storage.log import Entry, Part, Snapshot, new_parts, parse_entry, replay
from storage.progress import progress, unanswered
from storage.prompts import PromptRow, PromptSource
from storage.results import ResultWriter
from storage.store import JobStore, new_entry
from storage.verify import verify
from tests.stored import answer, begun, prompts_at


def part(name: str) -> Part:
    return Part(name=name, rows=1, errors=0, first_row_id=0, last_row_id=0, bytes=9, sha256=name)


@st.composite
def logs(draw: st.DrawFn) -> list[Entry]:
    """Any log that writers and compactions could have made."""
    entries: list[Entry] = []
    live: list[str] = []
    for number in range(draw(st.integers(0, 12))):
        wanted = st.lists(st.sampled_from(live), unique=True) if live else st.just(list[str]())
        removed = tuple(draw(wanted))
        name = f"part-{number}"
        live = [old for old in live if old not in removed] + [name]
        kind: Literal["append", "compact"] = "compact" if removed else "append"
        entries.append(new_entry(kind, added=(part(name),), removed=removed))
    return entries


@given(logs())
def test_an_entry_is_what_its_file_says(entries: list[Entry]) -> None:
    assert [parse_entry("log", entry.content()) for entry in entries] == entries


@given(logs(), st.data())
def test_reading_a_log_in_two_steps_gives_what_one_gives(
    entries: list[Entry], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(entries)))
    whole = replay(Snapshot(), entries)
    assert replay(replay(Snapshot(), entries[:cut]), entries[cut:]) == whole
    assert whole.number == len(entries)
    assert not whole.parts.keys() & whole.removed.keys()


@given(logs(), st.data())
def test_a_reader_misses_no_part_whose_rows_it_has_not_seen(
    entries: list[Entry], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(entries)))
    known, now = replay(Snapshot(), entries[:cut]), replay(Snapshot(), entries)
    rows = {name: {name} for name in known.parts}  # a part holds its own row, or those it merged
    for entry in entries[cut:]:
        merged = set().union(*(rows.pop(name) for name in entry.removed))
        for added in entry.added:
            rows[added.name] = merged or {added.name}
    told = {name for found in new_parts(known, entries[cut:]) for name in rows[found.name]}
    assert told >= {row for name in now.parts for row in rows[name]} - known.parts.keys()


@pytest.mark.parametrize(
    ("added", "removed"), [((part("a"),), ()), ((part("gone"),), ()), ((), ("nowhere",))]
)
def test_an_entry_that_contradicts_the_log_is_refused(
    added: tuple[Part, ...], removed: tuple[str, ...]
) -> None:
    first = new_entry("append", added=(part("a"), part("gone")))
    second = new_entry("compact", removed=("gone",))
    with pytest.raises(CorruptStoreError, match="log entry 3"):
        replay(Snapshot(), [first, second, new_entry("compact", added=added, removed=removed)])


class StoreMachine(RuleBasedStateMachine):
    """Two drivers, compaction and a changing input on one store, against a dict of what is done."""

    @initialize()
    def begin(self) -> None:
        self.root = f"memory://machine-{uuid4().hex}"
        self.folder = TemporaryDirectory()
        self.texts = ["a", "b", "c"]
        self.finished: set[str] = set()
        self.set_input()

    def set_input(self) -> None:
        path = Path(self.folder.name) / f"{uuid4().hex}.parquet"
        self.source: PromptSource = prompts_at(path, self.texts)
        self.store: JobStore = begun(self.root, self.source)
        self.drivers = [self.driver(), self.driver()]

    def driver(self) -> tuple[ResultWriter, list[PromptRow]]:
        done = progress(self.store)
        return ResultWriter(self.store, done), list(unanswered(self.store, self.source, done))

    @rule(number=st.integers(0, 1), rows=st.integers(1, 3))
    def answer(self, number: int, rows: int) -> None:
        writer, left = self.drivers[number]
        for _ in range(min(rows, len(left))):
            writer.append(answer(left.pop(0)))

    @rule(number=st.integers(0, 1))
    def commit(self, number: int) -> None:
        writer, left = self.drivers[number]
        writer.commit()
        waiting = {row.custom_id for row in left}
        ids = [f"row-{row}" for row in range(len(self.texts))]
        self.finished |= {custom_id for custom_id in ids if custom_id not in waiting}

    @rule(number=st.integers(0, 1))
    def die_and_begin_again(self, number: int) -> None:
        self.drivers[number] = self.driver()

    @rule()
    def compact(self) -> None:
        compact(self.store, grace_s=0.0)

    @precondition(lambda self: len(self.texts) < 8)
    @rule()
    def grow(self) -> None:
        self.texts = [*self.texts, f"text-{len(self.texts)}"]
        self.set_input()

    @rule(row=st.integers(0, 2))
    def change(self, row: int) -> None:
        self.texts[row] += "!"
        self.finished.discard(f"row-{row}")
        self.set_input()

    @rule()
    def look(self) -> None:
        """Every row is done once, rightly, or pending."""
        rows = query(self.root, "select custom_id, text from results").to_pylist()
        expected = {f"row-{row}": text.upper() for row, text in enumerate(self.texts)}
        assert len(rows) == len({row["custom_id"] for row in rows})
        assert {row["custom_id"]: row["text"] for row in rows}.items() <= expected.items()
        assert {row["custom_id"] for row in rows} >= self.finished
        assert verify(self.store).complete == (len(rows) == len(self.texts))

    def teardown(self) -> None:
        self.look()
        memory = fsspec.filesystem("memory")
        with suppress(FileNotFoundError):
            for path in memory.find(self.root):
                memory.rm_file(path)
        self.folder.cleanup()


StoreMachine.TestCase.settings = settings(max_examples=10, stateful_step_count=12, deadline=None)
test_no_order_of_events_loses_or_repeats_a_row = StoreMachine.TestCase
