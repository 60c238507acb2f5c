"""Prompt rows on their way to a head and back: encoded just ahead, leased, ended as result rows."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import xxhash
from pydantic import ValidationError

from flows.dealing import Told
from flows.job import Job, Sampling, sentences
from flows.model import ModelFolder
from stages.control import MAX_ROW_TOKENS, LeasedRow
from stages.errors import PromptError
from storage.prompts import PromptRow
from storage.results import ResultRow


@dataclass(frozen=True, slots=True)
class Lease:
    """A row that is with a head, and what its result row will say besides the answer."""

    prompt: PromptRow
    row: LeasedRow
    sampling: Sampling
    cut_short: bool
    """Whether the model's context leaves less room than max_new_tokens."""
    question: int | None
    """A digest of all that its answer depends on; None where that is the row's own seed too."""


@dataclass(frozen=True, slots=True)
class RunNames:
    """What every result row of a run says of where it comes from."""

    run: str
    plan: str
    epoch: int
    activations: str
    """What links made of activations: exact or int8."""


class Clerk:
    """Turns prompt rows into leases or row errors, and answers into result rows; holds no state."""

    def __init__(self, job: Job, model: ModelFolder, names: RunNames, kv_tokens: int) -> None:
        self._job = job
        self._model = model
        self._names = names
        self._kv_tokens = min(kv_tokens, MAX_ROW_TOKENS)
        """Of one row, in the pipeline that has room for most, and in a message to it."""

    def lease(self, prompt: PromptRow) -> Lease | ResultRow | None:
        """The row as its head takes it; or its result at once, where nothing is to be computed.

        None for a row that no pipeline of this plan can hold: another plan may, so it has no result.
        """
        sampling = self._job.sampling
        try:
            sampling = self._sampling(prompt)
            ids = self._model.encode(prompt)
        except PromptError as error:
            blank = self._blank(prompt, sampling)
            return replace(
                blank,
                status="error",
                text=None,
                finish_reason="error",
                error_type=error.kind,
                error_message=str(error),
            )
        new_tokens = min(sampling.max_new_tokens, self._model.context_tokens - len(ids))
        if len(ids) + new_tokens > self._kv_tokens:
            return None
        row = LeasedRow(
            row=prompt.row_id,
            key=xxhash.xxh3_64_intdigest(prompt.custom_id.encode()),
            seed=sampling.seed,
            token_ids=tuple(ids),
            max_new_tokens=new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop=sampling.stop,
        )
        cut_short = new_tokens < sampling.max_new_tokens
        if new_tokens == 0:
            blank = self._blank(prompt, sampling)
            return replace(blank, prompt_tokens=len(ids), truncated=cut_short)
        return Lease(prompt, row, sampling, cut_short, question(row))

    def ended(self, lease: Lease, told: Told) -> ResultRow:
        """The result row of an answer."""
        answer = told.answer
        failed = answer.error_type is not None
        return replace(
            self._blank(lease.prompt, lease.sampling),
            status="error" if failed else "ok",
            text=None if failed else answer.text,
            finish_reason=answer.finish_reason,
            error_type=answer.error_type,
            error_message=answer.error_message,
            prompt_tokens=answer.prompt_tokens,
            output_tokens=answer.output_tokens,
            activations=self._names.activations,
            weights=self._job.weights,
            replayed_tokens=answer.replayed_tokens,
            truncated=lease.cut_short and answer.finish_reason == "length",
            pipeline=told.pipeline,
            queued_s=answer.queued_s,
            prefill_s=answer.prefill_s,
            decode_s=answer.decode_s,
        )

    def _sampling(self, prompt: PromptRow) -> Sampling:
        """The job's sampling with the row's own settings over it."""
        if not prompt.sampling:
            return self._job.sampling
        try:
            return Sampling.model_validate({**self._job.sampling.model_dump(), **prompt.sampling})
        except ValidationError as error:
            raise PromptError("invalid_sampling", sentences(error)) from error

    def _blank(self, prompt: PromptRow, sampling: Sampling) -> ResultRow:
        """The result row of an answer that has no tokens."""
        return ResultRow(
            row_id=prompt.row_id,
            custom_id=prompt.custom_id,
            input_hash=prompt.input_hash,
            status="ok",
            text="",
            finish_reason="length",
            sampling=sampling.model_dump_json(),
            model=self._model.folder.name,
            model_revision=self._model.digest,
            job=self._job.name,
            run_id=self._names.run,
            finished_at=datetime.now(UTC),
            seed=sampling.seed,
            plan=self._names.plan,
            epoch=self._names.epoch,
        )


def question(row: LeasedRow) -> int | None:
    """What greedy rows must have in common to have one answer, as a digest; None for sampled rows."""
    if row.temperature > 0:
        return None
    digest = xxhash.xxh3_128(np.array(row.token_ids, np.int64).tobytes())
    digest.update(repr((row.max_new_tokens, row.stop)).encode())
    return digest.intdigest()
