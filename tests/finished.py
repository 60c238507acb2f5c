"""One job that has run to its end: most of what a prompt row can be, answered by two stages."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from flows.batch import run_batch
from flows.job import load_job
from flows.layout import Layout
from flows.run import Summary
from stages.architecture import Model
from stages.prompt import PromptEncoder
from tests.conftest import TINY_CONTEXT
from tests.jobs import Row, greedy_ids, write_job

NEW_TOKENS = 8
ORDINARY = 24
"""Rows that have nothing special about them."""
COLUMNS = {"max_new_tokens": "quota", "stop": "until", "temperature": "warmth"}


@dataclass(frozen=True, slots=True)
class FinishedJob:
    """What a test may look at; who wants to change something copies it first."""

    job_file: Path
    store: Path
    summary: Summary
    rows: dict[str, Row]
    """The input, by id."""
    model: Model
    encoder: PromptEncoder

    def greedy(self, row: Row) -> list[int]:
        """The ids that transformers answers to a row's prompt, within the row's limits."""
        prompt = self.encoder.encode(row["prompt"])
        quota = NEW_TOKENS if row["quota"] is None else row["quota"]
        return greedy_ids(self.model, prompt, min(quota, TINY_CONTEXT - len(prompt)))


def answer_prompts(model_folder: Path, folder: Path) -> FinishedJob:
    """Make the job and run it."""
    torch.set_num_threads(1)
    model: Model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model.eval()
    encoder = PromptEncoder.load(model_folder, "parse")
    rows = [*ordinary_rows(), *_special_rows(), _stopped_row(model, encoder)]
    job_file = write_job(
        folder / "job", model_folder, rows, "prompts.parquet",
        prompts={"prompt_column": "prompt", "sampling_columns": COLUMNS},
        sampling={"max_new_tokens": NEW_TOKENS, "seed": 7},
        results="out",
    )  # fmt: skip
    summary = run_batch(load_job(job_file), str(folder / "store"), Layout(2))
    by_id = {row["id"]: row for row in rows}
    return FinishedJob(job_file, folder / "store", summary, by_id, model, encoder)


def prompt_row(
    name: str,
    prompt: str,
    quota: int | None = None,
    until: str | None = None,
    warmth: float | None = None,
) -> Row:
    """A row of the input; None leaves a setting to the job."""
    return {"id": name, "prompt": prompt, "quota": quota, "until": until, "warmth": warmth}


def ordinary_rows(seed: int = 0, count: int = ORDINARY) -> list[Row]:
    """Random prompts of 1 to 60 tokens."""
    rng = random.Random(seed)
    texts = ("".join(rng.choices("abcdefgh .", k=rng.randint(1, 60))) for _ in range(count))
    return [prompt_row(f"ordinary-{seed}-{n}", text) for n, text in enumerate(texts)]


def _special_rows() -> Iterator[Row]:
    full = TINY_CONTEXT
    yield prompt_row("nothing-wanted", "some words", quota=0)
    yield prompt_row("two-wanted", "some words", quota=2)
    yield prompt_row("empty", "")
    yield prompt_row("one-too-long", "l" * (full + 1))
    yield prompt_row("no-room", "n" * full)
    yield prompt_row("little-room", "r" * (full - NEW_TOKENS + 3))
    yield prompt_row("just-fits", "f" * (full - NEW_TOKENS))
    yield prompt_row("twin-a", "the same words")
    yield prompt_row("twin-b", "the same words")
    yield prompt_row("too-cold", "some words", warmth=-1.0)


def _stopped_row(model: Model, encoder: PromptEncoder) -> Row:
    """A prompt whose answer says two plain letters in a row, after others: those are its stop."""
    for number in range(1000):
        prompt = f"say {number}"
        said = encoder.decode(greedy_ids(model, encoder.encode(prompt), 24))
        for start in range(1, len(said) - 1):
            pair = said[start : start + 2]
            if pair.isascii() and pair.isprintable() and said.find(pair) == start:
                return prompt_row("stopped", prompt, quota=24, until=pair)
    raise AssertionError("this model never says two plain letters")
