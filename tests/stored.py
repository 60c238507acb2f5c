"""Small jobs for the tests of storage: inputs, answers, and the plainest driver there can be."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from storage.index import built_index
from storage.progress import progress, unanswered
from storage.prompts import PromptRow, PromptSource
from storage.results import ResultRow, ResultWriter
from storage.store import JobStore

FINGERPRINT = {"model": "sha-1", "dtype": "float32"}


def prompts_at(path: Path, texts: Sequence[str], first: int = 0) -> PromptSource:
    """A Parquet input with ids row-<n>."""
    ids = [f"row-{first + number}" for number in range(len(texts))]
    pq.write_table(pa.table({"id": ids, "prompt": pa.array(texts, pa.string())}), path)
    return PromptSource(str(path), id_column="id", prompt_column="prompt")


def begun(root_uri: str, source: PromptSource, job: str = "demo") -> JobStore:
    """A job whose input is set."""
    with built_index(source) as index:
        store = JobStore.create(root_uri, job, FINGERPRINT, {"name": job})
        store.set_input(index)
    return store


def answer(row: PromptRow, job: str = "demo", run_id: str = "run-1") -> ResultRow:
    """A right answer: the prompt in capitals; error rows for empty prompts."""
    failed = not row.prompt
    return ResultRow(
        row_id=row.row_id,
        custom_id=row.custom_id,
        input_hash=row.input_hash,
        status="error" if failed else "ok",
        text=None if failed else str(row.prompt).upper(),
        finish_reason="error" if failed else "stop",
        sampling='{"temperature": 0.0}',
        model="tiny",
        job=job,
        run_id=run_id,
        finished_at=datetime.now(UTC),
        output_tokens=0 if failed else 3,
        error_type="empty_prompt" if failed else None,
        error_message="the prompt is empty" if failed else None,
        plan="plan-1",
        epoch=1,
        pipeline=0,
    )


def run(
    store: JobStore, source: PromptSource, run_id: str = "run-1", commit_rows: int = 1000
) -> ResultWriter:
    """Answer whatever is unanswered."""
    done = progress(store)
    writer = ResultWriter(store, done)
    for row in unanswered(store, source, done):
        writer.append(answer(row, store.job, run_id))
        if writer.pending == commit_rows:
            writer.commit()
    writer.commit()
    return writer
