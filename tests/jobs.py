"""Jobs as a user would have them, and the ways to run one: the ground under the end-to-end tests."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from stages.architecture import Model
from storage.catalog import query

Row = dict[str, Any]
WAGONWAY = (sys.executable, "-m", "flows")


def write_job(
    folder: Path, model: Path, rows: Sequence[Row], file_name: str, **settings: Any
) -> Path:
    """A job file beside its prompts, in the format that `file_name` says; returns the job file.

    `settings` are the job's own, by name; those of `prompts` are added to the uri and the id column.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(folder / file_name, rows)
    prompts = {"uri": file_name, "id_column": "id", **settings.pop("prompts", {})}
    job = {"name": "demo", "model": str(model), "dtype": "float32", "prompts": prompts, **settings}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    return path


def write_prompts(path: Path, rows: Sequence[Row]) -> None:
    """The rows as Parquet or as JSONL, as the name says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def results(store: Path, job: str = "demo") -> dict[str, Row]:
    """Every finished row of a job, by custom_id."""
    rows = query(str(store), "select * from results", job).to_pylist()
    assert len({row["custom_id"] for row in rows}) == len(rows), "a row has two results"
    return {row["custom_id"]: row for row in rows}


def log_names(store: Path, job: str = "demo") -> list[str]:
    """The entries of a job's log."""
    return sorted(path.name for path in (store / job / "_log").glob("*.json"))


def wagonway(
    *arguments: object, api_url: str = "", cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; `api_url` names a Prefect server, or it starts its own."""
    return subprocess.run(
        [*WAGONWAY, *map(str, arguments)],
        env=environment(api_url), cwd=cwd, capture_output=True, text=True, check=False,
    )  # fmt: skip


def environment(api_url: str) -> Mapping[str, str]:
    """This process's environment with that Prefect server in it, and the project on the path."""
    project = str(Path(__file__).resolve().parent.parent)
    return {**os.environ, "PREFECT_API_URL": api_url, "PYTHONPATH": project}


@torch.inference_mode()
def greedy_ids(model: Model, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """What transformers' own `generate` answers to one prompt, greedily, an end token included."""
    if new_tokens == 0:
        return []
    out = model.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    return [int(token) for token in out[0, len(prompt) :]]
