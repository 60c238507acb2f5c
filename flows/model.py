"""What the driver must know of a model folder, without torch: its digest, context and tokenizer."""

import json
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from flows.errors import JobError
from flows.job import Job
from stages.errors import ModelError, PromptError
from stages.generation import rules_of
from stages.prompt import PromptEncoder
from storage.prompts import PromptRow

_MAX_HEADER_BYTES = 100 * 2**20  # safetensors' own limit
_PIECE_BYTES = 2**16
_PIECE_EVERY_BYTES = 2**20
"""A digest reads one piece of each so many: any training changes nearly every weight."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A checkpoint on disk."""

    folder: Path
    digest: str
    """sha256 over every weight file's size, header and regular pieces, and over the config."""
    context_tokens: int
    """Positions that the model was made for."""
    vocabulary: int
    """Token ids that its embedding knows."""
    encoder: PromptEncoder

    def encode(self, row: PromptRow) -> list[int]:
        """The row's token ids; PromptError where they are the row's own fault."""
        if row.messages is not None:
            ids = self.encoder.encode_messages(row.messages)
        else:
            ids = self.encoder.encode(row.prompt or "")
        if len(ids) > self.context_tokens:
            raise PromptError(
                "prompt_too_long",
                f"{len(ids)} tokens; the model's context holds {self.context_tokens}",
            )
        if max(ids) >= self.vocabulary:
            raise PromptError(
                "unknown_token",
                f"token {max(ids)} is the tokenizer's alone; the model knows {self.vocabulary}",
            )
        return ids


def open_model(job: Job) -> ModelFolder:
    """Look into the job's model folder; JobError if it cannot be used, saying why."""
    folder = Path(job.model)
    if not folder.is_dir():
        raise JobError(f"{folder}: there is no such model folder")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = [path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"))]
        found = (
            f"found {pickles[0]}; convert it: pickle is never loaded" if pickles else "none found"
        )
        raise JobError(f"{folder}: weights must be safetensors ({found})")
    _require_whole(folder, weights)
    try:
        encoder = PromptEncoder.load(folder, job.prompts.special_tokens)
        _require_plain(folder, job.ignored_rules)
    except ModelError as error:
        raise JobError(str(error)) from error
    if job.prompts.messages_column and not encoder.has_template:
        raise JobError(f"{folder}: has no chat template, which messages_column needs")
    context_tokens = _config_count(folder, "max_position_embeddings")
    vocabulary = _config_count(folder, "vocab_size")
    return ModelFolder(folder, _digest(folder, weights), context_tokens, vocabulary, encoder)


def _require_plain(folder: Path, ignored: tuple[str, ...]) -> None:
    """JobError for a generation config by which `generate` would not take the likeliest tokens."""
    rules = {name: rule for name, rule in rules_of(folder).items() if name not in ignored}
    if rules:
        named = ", ".join(f"{name} {rule!r:.60}" for name, rule in rules.items())
        raise JobError(
            f"{folder}: its generation config asks for {named}, which is not applied here; to answer "
            f"without, write `ignored_rules: [{', '.join(rules)}]` into the job"
        )


def _config_count(folder: Path, name: str) -> int:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        count = config.get("text_config", config)[name]
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise JobError(f"{path}: no {name} in it: {error}") from error
    if not isinstance(count, int) or count < 1:
        raise JobError(f"{path}: {name} is {count!r}")
    return count


def _require_whole(folder: Path, weights: list[Path]) -> None:
    """JobError for a weight file that is missing or cut short: a stage would find it too late."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            missing = [name for name in named if not (folder / name).is_file()]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise JobError(f"{index}: is no index of safetensors files: {error!r}") from error
        if missing:
            raise JobError(f"{folder / missing[0]}: is missing; {index.name} names it")
    for path in weights:
        try:
            claimed = _claimed_bytes(path)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise JobError(f"{path}: is no safetensors file: {error!r}") from error
        if claimed != path.stat().st_size:
            raise JobError(
                f"{path}: holds {path.stat().st_size} bytes, its header promises {claimed}; "
                "fetch it again"
            )


def _claimed_bytes(path: Path) -> int:
    """The size that a safetensors file's own header gives it; ValueError and the like if torn."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {header_bytes} bytes")
        header = json.loads(file.read(header_bytes))
    ends: list[int] = [
        part["data_offsets"][1] for name, part in header.items() if name != "__metadata__"
    ]
    return 8 + header_bytes + max(ends, default=0)


def _digest(folder: Path, weights: list[Path]) -> str:
    state = [(path, path.stat()) for path in weights]
    config = folder / "config.json"
    return _digest_of(
        config.read_bytes() if config.is_file() else b"",
        tuple((path, found.st_size, found.st_mtime_ns) for path, found in state),
    )


@lru_cache(maxsize=1)
def _digest_of(config: bytes, weights: tuple[tuple[Path, int, int], ...]) -> str:
    """Of weight files with their sizes and times of change: what has not changed is read once."""
    digest = sha256(config)
    for path, size, _ in weights:
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for offset in range(0, size, _PIECE_EVERY_BYTES):
                file.seek(offset)
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()
