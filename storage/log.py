"""The commit log as values: entries in, the state of a job's results out; no files here.

The log decides. A part that no entry names does not exist, whatever lies in the folder, and the
index that the last "input" entry names is the input of the job.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from storage.errors import CorruptStoreError
from storage.prompts import PromptSource


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Part(_Record):
    """One immutable Parquet file of result rows, sorted by row_id."""

    name: str
    rows: int
    errors: int
    """How many of its rows are error rows."""
    first_row_id: int
    last_row_id: int
    bytes: int
    sha256: str


class InputVersion(_Record):
    """One version of the input: its index is `index/<sha>.parquet`."""

    sha: str
    rows: int
    source: PromptSource


class Entry(_Record):
    """One commit."""

    id: str
    """Random: tells a writer whose put was answered with an error that the entry is its own."""
    kind: Literal["append", "compact", "input"]
    written_at: datetime
    added: tuple[Part, ...] = ()
    removed: tuple[str, ...] = ()
    input: InputVersion | None = None
    plan: str | None = None
    epoch: int | None = None

    def content(self) -> bytes:
        """The entry as it stands in its file."""
        return self.model_dump_json(indent=1, exclude_defaults=True).encode()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the first `number` entries of the log say."""

    number: int = 0
    input: InputVersion | None = None
    parts: dict[str, Part] = field(default_factory=dict)
    """Live parts by name, in the order of their commits."""
    removed: dict[str, datetime] = field(default_factory=dict)
    """When each part was removed that compaction has replaced."""


def parse_entry(name: str, content: bytes) -> Entry:
    """The entry in a log file; CorruptStoreError if it is none."""
    try:
        return Entry.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise CorruptStoreError(
            f"{name} is no log entry: {first['loc']}: {first['msg']}"
        ) from error


def replay(base: Snapshot, entries: Iterable[Entry]) -> Snapshot:
    """The state after further entries; CorruptStoreError if one contradicts those before it."""
    number, version = base.number, base.input
    parts, removed = dict(base.parts), dict(base.removed)
    for number, entry in enumerate(entries, base.number + 1):
        for name in entry.removed:
            if parts.pop(name, None) is None:
                raise CorruptStoreError(f"log entry {number} removes {name}, which is not live")
            removed[name] = entry.written_at
        for part in entry.added:
            if part.name in parts or part.name in removed:
                raise CorruptStoreError(f"log entry {number} adds {part.name} a second time")
            parts[part.name] = part
        version = entry.input or version
    return replace(base, number=number, input=version, parts=parts, removed=removed)


def new_parts(known: Snapshot, entries: Iterable[Entry]) -> list[Part]:
    """Live parts whose rows may be unknown to a reader of `known`, after further entries.

    A compaction moves rows and adds none, so its parts are known if those that it removed were.
    """
    known_names = set(known.parts)
    live = dict(known.parts)
    for entry in entries:
        if entry.kind == "compact" and known_names.issuperset(entry.removed):
            known_names.update(part.name for part in entry.added)
        for name in entry.removed:
            live.pop(name)
        live.update((part.name, part) for part in entry.added)
    return [part for part in live.values() if part.name not in known_names]
