"""What a user submits: one job, as YAML or JSON, checked whole before anything starts."""

from collections.abc import Mapping
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from flows.errors import JobError
from flows.yaml_file import read_mapping
from stages.config import WeightKind
from storage.files import shown

REASONS = {
    "string_type": "must be text; put it in quotes",
    "model_type": "must be a mapping of settings",
    "invalid_key": "is no key; keys are text",
}
"""Pydantic's kinds of fault in words for who writes YAML; others have pydantic's own."""

SAMPLING_FIELDS = ("max_new_tokens", "temperature", "top_p", "top_k", "stop", "seed")


Uri = Annotated[str, Field(min_length=1), PlainSerializer(shown, when_used="json")]
"""Any fsspec URI or path. As JSON (in the store, in Prefect) it is without passwords or signatures."""


def _number(value: object) -> object:
    """Refuses what pydantic would read as a number: true is not 1, and "7" is text."""
    if isinstance(value, bool | str):
        raise ValueError(f"must be a number, not {value!r:.40}")
    return value


def _list(value: object) -> object:
    if not isinstance(value, list | tuple):
        raise ValueError('must be a list of texts, as in ["END"]')
    return value


Number = BeforeValidator(_number)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Prompts(_Strict):
    """Where the rows come from and which columns mean what."""

    uri: Uri
    """Parquet, JSONL, CSV or OpenAI-batch JSONL at any fsspec URI."""
    id_column: str | None = None
    prompt_column: str | None = None
    messages_column: str | None = None
    special_tokens: Literal["parse", "text"] = "parse"
    """Whether a control token typed into a plain prompt is one, or mere text."""
    sampling_columns: dict[Literal[SAMPLING_FIELDS], str] = {}  # type: ignore[valid-type]
    """Sampling settings that a column of the input overrides row by row."""

    @model_validator(mode="after")
    def _one_source_of_text(self) -> Self:
        if self.prompt_column and self.messages_column:
            raise ValueError("name prompt_column or messages_column, not both")
        return self


class Sampling(_Strict):
    """How tokens are drawn; temperature 0 is greedy."""

    max_new_tokens: Annotated[int, Number, Field(ge=0, le=1_000_000)] = 64
    temperature: Annotated[float, Number, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Number, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Number, Field(ge=0, le=1_000_000)] = 0
    """0 keeps the whole vocabulary."""
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=1_000)], ...],
        BeforeValidator(_list),
        Field(max_length=16),
    ] = ()
    seed: Annotated[int, Number, Field(ge=0, lt=2**63)] = 0

    def quota(self, own: Mapping[str, object]) -> int:
        """Tokens that a row with such settings of its own may make; what is no number says nothing."""
        asked = own.get("max_new_tokens")
        return max(0, int(asked)) if isinstance(asked, int | float) else self.max_new_tokens


class Job(_Strict):
    """A dataset of prompts to answer with one model."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,99}$")
    """Names the job in the store."""
    model: str = Field(min_length=1)
    """A folder with a config, a tokenizer and safetensors."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    draft: Literal["none"] = "none"
    activations: Literal["exact", "int8"] = "exact"
    """What stages pass to one another: the same bits, or, lossy, eight bits a number."""
    weights: WeightKind = "stored"
    """What stages keep of the layers' linear weights: as stored, or, lossy, eight or four bits each."""
    ignored_rules: tuple[str, ...] = ()
    """Settings of the model's generation config that this job does without, repetition_penalty say."""
    prompts: Prompts
    sampling: Sampling = Sampling()
    results: Uri | None = None
    """A folder or prefix where the finished table is also written, as results.parquet."""

    @field_validator("model")
    @classmethod
    def _is_here(cls, model: str) -> str:
        if "://" in model:
            raise ValueError(f"{model!r} is not supported: download it, and name its folder here")
        return model


def load_job(path: Path) -> Job:
    """Read and check a job file; relative paths count from its folder. Raises JobError."""
    try:
        job = Job.model_validate(read_mapping(path))
    except ValidationError as error:
        raise JobError(f"{path}: {sentences(error)}") from error
    folder = path.resolve().parent
    prompts = job.prompts.model_copy(update={"uri": _located(job.prompts.uri, folder)})
    update: dict[str, Any] = {"prompts": prompts, "model": _located(job.model, folder)}
    if job.results is not None:
        update["results"] = _located(job.results, folder)
    return job.model_copy(update=update)


def _located(uri: str, folder: Path) -> str:
    return uri if "://" in uri else str(folder / expanduser(uri))  # noqa: PTH111  (it never raises)


def sentences(error: ValidationError) -> str:
    """What is wrong with a job's settings, each fault with its name."""
    return "; ".join(
        f"{'.'.join(str(part) for part in fault['loc']) or 'job'}: {_reason(fault)}"
        for fault in error.errors()
    )


def _reason(fault: ErrorDetails) -> str:
    if fault["type"] == "value_error":  # ours, which pydantic would call a value error once more
        return str(fault["ctx"]["error"])
    return REASONS.get(fault["type"], fault["msg"])
