"""Prompt rows become leases, or results where nothing is to be computed; nothing is guessed."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flows.job import Job
from flows.lease import Clerk, Lease, RunNames
from flows.model import ModelFolder, open_model
from storage.prompts import PromptRow
from storage.results import ResultRow
from tests.conftest import TINY_CONTEXT

NAMES = RunNames("run", "plan", 1, "exact")


@pytest.fixture
def job(tiny_model: Path) -> Job:
    return Job.model_validate(
        {"name": "a", "model": str(tiny_model), "prompts": {"uri": "p"},
         "sampling": {"max_new_tokens": 20, "seed": 5}}
    )  # fmt: skip


@pytest.fixture
def model(job: Job) -> ModelFolder:
    return open_model(job)


def asking(prompt: str, row_id: int = 0) -> PromptRow:
    return PromptRow(row_id, f"r{row_id}", "hash", prompt, None, {}, "p", len(prompt))


def test_a_row_is_leased_with_its_own_settings_over_the_jobs(job: Job, model: ModelFolder) -> None:
    lease = Clerk(job, model, NAMES, 1000).lease(
        replace(asking("abc"), sampling={"temperature": 0.5, "seed": 9})
    )
    assert isinstance(lease, Lease)
    assert lease.row.token_ids == (97, 98, 99)
    assert (lease.row.max_new_tokens, lease.row.temperature, lease.row.seed) == (20, 0.5, 9)


def test_the_key_of_a_draw_is_the_rows_id_alone(job: Job, model: ModelFolder) -> None:
    clerk = Clerk(job, model, NAMES, 1000)
    here, there = clerk.lease(asking("abc", 3)), clerk.lease(replace(asking("xyz", 3), row_id=8))
    assert isinstance(here, Lease)
    assert isinstance(there, Lease)
    assert here.row.key == there.row.key


@pytest.mark.parametrize(
    ("prompt", "sampling", "error"),
    [
        ("", {}, "empty_prompt"),
        ("a" * (TINY_CONTEXT + 1), {}, "prompt_too_long"),
        ("a", {"temperature": -1}, "invalid_sampling"),
    ],
)
def test_a_rows_own_fault_is_its_result(
    job: Job,
    model: ModelFolder,
    prompt: str,
    sampling: dict[str, int | float | list[str]],
    error: str,
) -> None:
    row = Clerk(job, model, NAMES, 1000).lease(replace(asking(prompt), sampling=sampling))
    assert isinstance(row, ResultRow)
    assert (row.status, row.error_type) == ("error", error)


def test_a_token_that_only_the_tokenizer_knows_is_its_rows_error(
    job: Job, model: ModelFolder
) -> None:
    small = replace(model, vocabulary=98)
    row = Clerk(job, small, NAMES, 1000).lease(asking("abc"))
    assert isinstance(row, ResultRow)
    assert row.error_type == "unknown_token"
    assert "99" in (row.error_message or "")


def test_a_row_that_this_plan_cannot_hold_has_no_result_yet(job: Job, model: ModelFolder) -> None:
    assert Clerk(job, model, NAMES, kv_tokens=30).lease(asking("a" * 15)) is None
    assert isinstance(Clerk(job, model, NAMES, kv_tokens=35).lease(asking("a" * 15)), Lease)


def test_the_context_cuts_an_answer_and_says_so(job: Job, model: ModelFolder) -> None:
    lease = Clerk(job, model, NAMES, 1000).lease(asking("a" * (TINY_CONTEXT - 5)))
    assert isinstance(lease, Lease)
    assert (lease.row.max_new_tokens, lease.cut_short) == (5, True)


def test_a_file_of_the_users_folder_is_no_module_of_a_worker(tmp_path: Path) -> None:
    (tmp_path / "secrets.py").write_text("raise SystemExit('a stranger ran')", encoding="utf-8")
    worker = subprocess.run(
        [sys.executable, "-P", "-m", "stages.worker", "nowhere.json"],
        cwd=tmp_path, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "a stranger ran" not in worker.stderr
    assert "nowhere.json" in worker.stderr
