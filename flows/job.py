"""What a user submits: one job, as YAML or JSON, checked whole before anything starts."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from flows.errors import JobError
from storage.files import shown

SAMPLING_FIELDS = ("max_new_tokens", "temperature", "top_p", "top_k", "stop", "seed")


Uri = Annotated[str, Field(min_length=1), PlainSerializer(shown, when_used="json")]
"""Any fsspec URI or path. As JSON (in the store, in Prefect) it is without passwords or signatures."""


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

    max_new_tokens: Annotated[int, Field(ge=0, le=1_000_000)] = 64
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """0 keeps the whole vocabulary."""
    stop: tuple[Annotated[str, Field(min_length=1, max_length=1_000)], ...] = Field(
        default=(), max_length=16
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


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
    ignored_rules: tuple[str, ...] = ()
    """Settings of the model's generation config that this job does without, repetition_penalty say."""
    prompts: Prompts
    sampling: Sampling = Sampling()
    results: Uri | None = None
    """A folder or prefix where the finished table is also written, as results.parquet."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML where a key given twice is an error, not the last one's silent victory."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file's top-level mapping; JobError if it is none."""
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: is neither YAML nor JSON: {error}") from error
    if not isinstance(document, dict):
        raise JobError(f"{path}: must be a mapping of settings, found {type(document).__name__}")
    return document


def load_job(path: Path) -> Job:
    """Read and check a job file; relative paths count from its folder. Raises JobError."""
    try:
        job = Job.model_validate(read_mapping(path))
    except ValidationError as error:
        raise JobError(f"{path}: {sentences(error)}") from error
    folder = path.resolve().parent
    prompts = job.prompts.model_copy(update={"uri": _located(job.prompts.uri, folder)})
    update: dict[str, Any] = {"prompts": prompts, "model": str(folder / job.model)}
    if job.results is not None:
        update["results"] = _located(job.results, folder)
    return job.model_copy(update=update)


def _located(uri: str, folder: Path) -> str:
    return uri if "://" in uri else str(folder / uri)


def sentences(error: ValidationError) -> str:
    """What is wrong with a job's settings, each fault with its name."""
    return "; ".join(
        f"{'.'.join(str(part) for part in fault['loc']) or 'job'}: {fault['msg']}"
        for fault in error.errors()
    )
