"""One job's folder in a store: its document, its log, and the files that the log names.

<root>/<job>/job.json               the job and its fingerprint, created once
             index/<sha>.parquet    one per version of the input
             _log/00000001.json ... the commits; an entry is created exclusively, never changed
             data/part-*.parquet    result rows; visible only if the log names them
             runs/<run>/*.json      plan, cluster and summary of each run
             _SUCCESS               written by `verify` alone
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Literal
from uuid import uuid4

import pyarrow as pa
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from storage.errors import (
    CommitConflictError,
    CorruptStoreError,
    FingerprintError,
    JobNotFoundError,
    StoreError,
)
from storage.files import Files, files_at, shown
from storage.index import BuiltIndex
from storage.log import Entry, InputVersion, Part, Snapshot, parse_entry, replay
from storage.parts import ScannedTable, table_of
from storage.prompts import PromptSource
from storage.schema import INDEX_SCHEMA, RESULT_SCHEMA

SUCCESS = "_SUCCESS"
MAX_RACES = 50  # lost in a row; writers commit every few seconds, so this is not bad luck
RunFile = Literal["plan", "cluster", "summary"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ENTRY = re.compile(r"(\d{8})\.json")


class JobFile(BaseModel):
    """job.json: what the job is. Whatever its results depend on is in the fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: str
    created_at: datetime
    fingerprint: dict[str, JsonValue]
    document: dict[str, JsonValue]


class JobStore:
    """Reads and commits; holds no state, so any number of them may work on one job."""

    def __init__(self, files: Files, job: str) -> None:
        self.files = files
        self.job = job

    @classmethod
    def create(
        cls,
        root_uri: str,
        job: str,
        fingerprint: Mapping[str, JsonValue],
        document: Mapping[str, JsonValue],
    ) -> "JobStore":
        """Begin the job, or take it up again; FingerprintError if the store holds another."""
        store = cls(files_at(_job_uri(root_uri, job)), job)
        store.begin(fingerprint, document)
        return store

    @classmethod
    def require_usable(cls, root_uri: str, job: str, fingerprint: Mapping[str, JsonValue]) -> None:
        """StoreError unless `create` would begin the job or take it up; nothing is left behind."""
        store = cls(files_at(_job_uri(root_uri, job)), job)
        store.files.require_writable()
        store.files.require_exclusive_create()
        if store.files.exists("job.json"):
            store._require_same(store.job_file().fingerprint, dict(fingerprint))

    @classmethod
    def open(cls, root_uri: str, job: str) -> "JobStore":
        """A job that is there; JobNotFoundError otherwise."""
        _require_name("job", job, JobNotFoundError)
        store = cls(files_at(_job_uri(root_uri, job)), job)
        if not store.files.exists("job.json"):
            there = ", ".join(stored_jobs(root_uri)) or "none"
            raise JobNotFoundError(f"{shown(root_uri)}: no job {job!r}; jobs there: {there}")
        return store

    def begin(
        self, fingerprint: Mapping[str, JsonValue], document: Mapping[str, JsonValue]
    ) -> None:
        """Write job.json if there is none; FingerprintError if the one there differs."""
        self.files.require_exclusive_create()
        begun = JobFile(
            job=self.job,
            created_at=datetime.now(UTC),
            fingerprint=dict(fingerprint),
            document=dict(document),
        )
        try:
            self.files.create("job.json", begun.model_dump_json(indent=1).encode())
        except FileExistsError:
            self._require_same(self.job_file().fingerprint, begun.fingerprint)

    def job_file(self) -> JobFile:
        """The job as it was begun; CorruptStoreError if job.json is damaged."""
        try:
            return JobFile.model_validate_json(self.files.read("job.json"))
        except ValidationError as error:
            raise CorruptStoreError(f"{self.files.shown}/job.json is damaged: {error}") from error

    def snapshot(self) -> Snapshot:
        """The state of the results now; it stays readable for compaction's grace period."""
        return replay(Snapshot(), self.entries_after(0))

    def entries_after(self, number: int) -> list[Entry]:
        """The log's entries after that number; CorruptStoreError if one is missing or damaged."""
        matches = map(_ENTRY.fullmatch, self.files.names("_log"))
        numbers = [int(match[1]) for match in matches if match and int(match[1]) > number]
        for expected, found in enumerate(numbers, number + 1):
            if found != expected:
                missing = _entry_name(expected)
                raise CorruptStoreError(f"{self.files.shown}/{missing} is missing from the log")
        return [self._entry(number) for number in numbers]

    def append(self, known: Snapshot, entry: Entry) -> Snapshot | None:
        """Commit an entry right after `known`; None if another entry has taken that number."""
        number = known.number + 1
        try:
            self.files.create(_entry_name(number), entry.content())
        except FileExistsError:
            # A put that succeeded may have been answered with an error, and then be put again.
            if self._entry(number).id != entry.id:
                return None
        return replay(known, [entry])

    def set_input(self, index: BuiltIndex) -> Snapshot:
        """Make this version of the input the current one; results of other versions stay."""
        name = _index_name(index.sha)
        if not self.files.exists(name):
            self.files.write(name, index.path)
        version = InputVersion(sha=index.sha, rows=index.rows, source=_recorded(index.source))
        for _ in range(MAX_RACES):
            known = self.snapshot()
            if known.input == version:
                return known
            if known.input is None or known.input.sha != version.sha:
                self.files.remove(SUCCESS)  # it spoke of another input
            done = self.append(known, new_entry("input", input=version))
            if done is not None:
                return done
        raise self.race_lost()

    def part_rows(self, snapshot: Snapshot) -> ScannedTable:
        """The rows of all live parts, superseded ones too; no glob, only what the log names."""
        return table_of(self.files, [f"data/{name}" for name in snapshot.parts], RESULT_SCHEMA)

    def index_rows(self, snapshot: Snapshot) -> ScannedTable:
        """The current index; no rows if the job has none yet."""
        names = [_index_name(snapshot.input.sha)] if snapshot.input else []
        return table_of(self.files, names, INDEX_SCHEMA)

    def index_file(self, version: InputVersion) -> pa.NativeFile:
        """An index, opened for streaming; CorruptStoreError if it is gone."""
        name = _index_name(version.sha)
        try:
            if self.files.root is not None:
                return pa.OSFile(str(self.files.root / name))
            return pa.BufferReader(self.files.read(name))
        except FileNotFoundError as error:
            raise CorruptStoreError(f"{self.files.shown}/{name} is missing") from error

    def write_run_file(self, run_id: str, name: RunFile, content: Mapping[str, object]) -> None:
        """Write or replace runs/<run_id>/<name>.json."""
        _require_name("run", run_id)
        text = json.dumps(content, indent=1)
        self.files.write(f"runs/{run_id}/{name}.json", text.encode())

    def run_ids(self) -> list[str]:
        """All runs that have written anything."""
        return self.files.names("runs")

    def read_run_file(self, run_id: str, name: RunFile) -> bytes | None:
        """runs/<run_id>/<name>.json as it stands, or None if that run has not written it."""
        try:
            return self.files.read(f"runs/{run_id}/{name}.json")
        except FileNotFoundError:
            return None

    def is_verified(self) -> bool:
        """Whether `verify` has found the job complete since its input last changed."""
        return self.files.exists(SUCCESS)

    def race_lost(self) -> CommitConflictError:
        """The error for a writer that loses every race."""
        return CommitConflictError(
            f"{self.files.shown}: {MAX_RACES} commits in a row were overtaken; is another run of"
            " this job going on?"
        )

    def _entry(self, number: int) -> Entry:
        name = _entry_name(number)
        return parse_entry(f"{self.files.shown}/{name}", self.files.read(name))

    def _require_same(self, stored: dict[str, JsonValue], given: dict[str, JsonValue]) -> None:
        missing = "nothing"
        fields = [
            name
            for name in sorted(stored.keys() | given.keys())
            if stored.get(name, missing) != given.get(name, missing)
        ]
        if fields:
            changes = "; ".join(
                f"{name} was {stored.get(name, missing)!r}, is {given.get(name, missing)!r}"
                for name in fields
            )
            raise FingerprintError(
                f"{self.files.shown}: this job was begun with other settings ({changes});"
                " give the job another name, or restore them",
                tuple(fields),
            )


def new_entry(
    kind: Literal["append", "compact", "input"],
    *,
    added: tuple[Part, ...] = (),
    removed: tuple[str, ...] = (),
    input: InputVersion | None = None,
    plan: str | None = None,
    epoch: int | None = None,
) -> Entry:
    """An entry of this moment."""
    return Entry(
        id=uuid4().hex,
        kind=kind,
        written_at=datetime.now(UTC),
        added=added,
        removed=removed,
        input=input,
        plan=plan,
        epoch=epoch,
    )


def stored_jobs(root_uri: str) -> list[str]:
    """Names of all jobs in a store."""
    files = files_at(root_uri)
    return [name for name in files.names("") if files.exists(f"{name}/job.json")]


def _job_uri(root_uri: str, job: str) -> str:
    _require_name("job", job)
    if not root_uri:
        raise StoreError("an empty text names no store; name a folder or an fsspec URI")
    return f"{root_uri.rstrip('/')}/{job}"


def _require_name(what: str, name: str, error: type[StoreError] = StoreError) -> None:
    """The error unless the name is safe as one step of a path."""
    if not _NAME.fullmatch(name):
        raise error(
            f"{name!r:.140} cannot name a {what}: use up to 128 letters, digits, '.', '_' and '-',"
            " starting with a letter or digit"
        )


def _entry_name(number: int) -> str:
    return f"_log/{number:08d}.json"


def _index_name(sha: str) -> str:
    return f"index/{sha}.parquet"


def _recorded(source: PromptSource) -> PromptSource:
    """The source as the log keeps it: absolute, for any process to find, and without secrets."""
    filesystem, path = url_to_fs(source.uri)
    uri = path if isinstance(filesystem, LocalFileSystem) else shown(source.uri)
    return replace(source, uri=uri)
