"""One execution of a job: its names, its counts, and what the store keeps of it."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from secrets import token_hex

from pydantic import JsonValue

from flows.job import Job
from flows.launch import DRIVER, EPOCH, Fleet
from flows.links import link_rows
from flows.measure import Measured
from flows.model import ModelFolder
from flows.report import Tally, finite
from planner.plan import Plan
from stages.codec import INT8
from storage.errors import JobNotFoundError
from storage.progress import Progress, unanswered
from storage.prompts import PromptRow, PromptSource
from storage.store import JobStore

RECORD_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run went; runs/<run>/summary.json holds it. Tokens and seconds are this run's alone."""

    run_id: str
    job: str
    started_at: str
    status: str = "running"
    """running, completed or failed; a killed run stays running."""
    finished_at: str | None = None
    rows: int = 0
    """Rows of the input."""
    rows_ok: int = 0
    rows_failed: int = 0
    rows_earlier: int = 0
    """Rows that earlier runs had finished."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    """From the first lease to the last commit."""
    tokens_per_s: float = 0.0
    rows_per_s: float = 0.0
    links: tuple[Mapping[str, object], ...] = ()
    stages: tuple[Mapping[str, object], ...] = ()


class Run:
    """Mutable; owned by the flow's thread."""

    def __init__(self, job: Job, model: ModelFolder, store: JobStore, done: Progress) -> None:
        now = datetime.now(UTC)
        self.job = job
        self.model = model
        self.store = store
        self.done = done
        """What was answered when the run began."""
        self.id = f"{now:%Y%m%dT%H%M%S}-{token_hex(3)}"
        self.plan_id = ""
        self._recorded_s = time.monotonic()
        self.activations = "exact"
        """What the plan's links make of activations: exact or int8."""
        self.unfit = 0
        """Rows that this run's plan had no memory for."""
        self.tally = Tally(done.rows, done.answered, done.failed, earlier=done.answered)
        self.summary = Summary(
            self.id, job.name, now.isoformat(), rows=done.rows, rows_earlier=done.answered
        )
        self._record()

    def prompts(self) -> Iterator[PromptRow]:
        """The rows that have no result yet, streamed."""
        return unanswered(self.store, prompt_source(self.job), self.done)

    def planned(self, plan: Plan, measured: Measured) -> None:
        """Keep the plan and the facts that it rests on."""
        if any(link.codec == INT8 for pipeline in plan.pipelines for link in pipeline.links):
            self.activations = INT8
        document = asdict(plan)
        self.plan_id = sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]
        document |= {"plan_id": self.plan_id, "epoch": EPOCH, "created_at": _now()}
        self.store.write_run_file(self.id, "plan", document)
        self.store.write_run_file(self.id, "cluster", finite(asdict(measured.cluster)))

    def worked(self, fleet: Fleet) -> None:
        """Keep what the stages say of their work so far."""
        vitals = fleet.vitals()
        self._recorded_s = time.monotonic()
        tally = self.tally
        seconds = tally.seconds
        made = tally.answered - tally.earlier
        self.summary = replace(
            self.summary,
            prompt_tokens=tally.prompt_tokens,
            output_tokens=tally.output_tokens,
            seconds=seconds,
            tokens_per_s=tally.output_tokens / seconds,
            rows_per_s=made / seconds,
            links=tuple(link_rows(vitals, DRIVER, fleet.control())),
            stages=tuple(
                {"node": name, "busy_s": beat.busy_s, "frames": beat.frames, "tokens": beat.tokens}
                for name, beat in vitals.items()
            ),
        )
        self._record()

    def due(self) -> bool:
        """Whether it is time again to keep what the stages say."""
        return time.monotonic() - self._recorded_s > RECORD_EVERY_S

    def ended(self, status: str) -> None:
        """Keep how the run ended."""
        tally = self.tally
        self.summary = replace(
            self.summary,
            status=status,
            finished_at=_now(),
            rows_ok=tally.answered - tally.failed,
            rows_failed=tally.failed,
        )
        self._record()

    def _record(self) -> None:
        self.store.write_run_file(self.id, "summary", asdict(self.summary))


def prompt_source(job: Job) -> PromptSource:
    """The job's prompts as storage reads them."""
    p = job.prompts
    return PromptSource(
        p.uri, p.id_column, p.prompt_column, p.messages_column, dict(p.sampling_columns)
    )


def is_begun(store_uri: str, job: Job) -> bool:
    """Whether the store has the job already."""
    try:
        JobStore.open(store_uri, job.name)
    except JobNotFoundError:
        return False
    return True


def fingerprint(job: Job, model: ModelFolder) -> dict[str, JsonValue]:
    """Everything that the answers depend on, besides the prompts."""
    answers: dict[str, JsonValue] = {
        "model": model.digest,
        "tokenizer": model.encoder.tokenizer_sha256,
        "template": model.encoder.template_sha256,
        "special_tokens": job.prompts.special_tokens,
        "dtype": job.dtype,
        "draft": job.draft,
        "sampling": job.sampling.model_dump(mode="json"),
    }
    if job.activations != "exact":  # what loses bits is named; what loses none changes no answer
        answers["activations"] = job.activations
    if job.weights != "stored":
        answers["weights"] = job.weights
    return answers


def _now() -> str:
    return datetime.now(UTC).isoformat()
