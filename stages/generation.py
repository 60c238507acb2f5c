"""What a model folder asks of whoever generates with it: end tokens, and rules; without torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from transformers import PreTrainedTokenizerFast

from stages.errors import CheckpointError

RULES: Final[Mapping[str, object]] = MappingProxyType(
    {
        "bad_words_ids": [],
        "begin_suppress_tokens": [],
        "constraints": [],
        "diversity_penalty": 0,
        "dola_layers": None,
        "exponential_decay_length_penalty": None,
        "force_words_ids": [],
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
        "guidance_scale": 1,
        "min_length": 0,
        "min_new_tokens": 0,
        "no_repeat_ngram_size": 0,
        "num_beam_groups": 1,
        "num_beams": 1,
        "penalty_alpha": 0,
        "repetition_penalty": 1,
        "sequence_bias": [],
        "stop_strings": [],
        "suppress_tokens": [],
        "token_healing": False,
        "watermarking_config": None,
    }
)
"""Settings by which `generate` does not simply take the likeliest token, and where they do nothing.

How tokens are drawn (temperature, top_p, ...) is not among them: the job says that itself.
"""


def rules_of(folder: Path) -> dict[str, Any]:
    """The rules that the folder's generation config, or else its config, sets; CheckpointError."""
    path = folder / "generation_config.json"
    settings = read_json(path if path.is_file() else folder / "config.json")
    return {
        name: settings[name]
        for name, neutral in RULES.items()
        if settings.get(name) is not None and settings[name] not in (neutral, [], {})
    }


def end_ids(folder: Path, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """From the first that names any, as `generate` has it: generation config, config, tokenizer."""
    config = read_json(folder / "config.json")
    sources = [read_json(folder / "generation_config.json"), config, config.get("text_config")]
    named: list[Any] = [source.get("eos_token_id") for source in sources if source]
    named.append(tokenizer.eos_token_id)
    found: Any = next((ids for ids in named if ids is not None), [])
    ids = found if isinstance(found, list) else [found]
    if not all(type(id) is int for id in ids):
        raise CheckpointError(f"{folder}: eos_token_id is {found!r}, which are no token ids")
    return frozenset(ids)


def read_json(path: Path) -> dict[str, Any]:
    """The file's object, empty if there is no such file; CheckpointError for anything else."""
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as broken:
        raise CheckpointError(f"{path} is broken: {broken}") from broken
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is broken: it holds no JSON object")
    return document
