"""Opens a model folder's tokenizer and says what its tokens are for; without torch."""

import hashlib
import json
import re
from pathlib import Path

from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from stages.errors import CheckpointError
from stages.generation import read_json

_DECIDING_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_NAMED_CLASSES = {"llama": LlamaTokenizer}
"""By model type: where transformers rebuilds the tokenizer by a class of its own, which splits
otherwise than the folder's tokenizer.json says. Every other is what that file says."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The folder's own tokenizer; CheckpointError if it is missing or broken."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing; load the model's tokenizer with transformers and save it there"
        )
    chosen = _tokenizer_class(folder)
    try:
        tokenizer: PreTrainedTokenizerFast = chosen.from_pretrained(folder, local_files_only=True)
    except Exception as broken:  # the library's Rust side raises no narrower class
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded: {broken}") from broken
    return tokenizer


def _tokenizer_class(folder: Path) -> type[PreTrainedTokenizerFast]:
    """The class that transformers' AutoTokenizer picks; that one itself would import torch."""
    named = str(read_json(folder / "tokenizer_config.json").get("tokenizer_class"))
    own = _NAMED_CLASSES.get(read_json(folder / "config.json").get("model_type", ""))
    if own is None or own.__name__ != named.removesuffix("Fast"):
        return PreTrainedTokenizerFast
    byte_level = b'"ByteLevel"' in (folder / "tokenizer.json").read_bytes()
    return PreTrainedTokenizerFast if byte_level else own


def written_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Added tokens that are not special, but stand in the template, which looks for them nowhere.

    What a template looks for in a message (`</think>`, say) is a message's to hold.
    """
    if tokenizer.chat_control_tokens is not None:
        return list(tokenizer.chat_control_tokens)
    templates = tokenizer.chat_template or ""
    template = templates if isinstance(templates, str) else "\n".join(templates.values())
    added = (str(t) for t in tokenizer.added_tokens_decoder.values() if not t.special)
    return [
        token
        for token in added
        if token in template and not token.isspace() and not _is_looked_for(token, template)
    ]


def _is_looked_for(token: str, template: str) -> bool:
    literal = rf"""['"][^'"]*{re.escape(token)}[^'"]*['"]"""
    looks = rf"(?:split|strip|startswith|endswith|replace|find)\(\s*{literal}"
    return re.search(rf"{looks}|{literal}\s+(?:not\s+)?in\b", template) is not None


def tokenizer_digest(folder: Path, ends: frozenset[int]) -> str:
    """sha256 of the tokenizer's files and the end tokens."""
    digest = hashlib.sha256(json.dumps(sorted(ends)).encode())
    for path in (folder / name for name in _DECIDING_FILES):
        content = path.read_bytes() if path.is_file() else b""
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()
