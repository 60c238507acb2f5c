"""Tiny random models for tests, written to a folder as a user would have them.

Weights are spread wider than a fresh initialisation, so that every flag and every bias matters.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from stages.architecture import Model
from stages.checkpoint import INDEX
from stages.selfcheck import randomise

torch.set_num_threads(1)  # cores are shared with the stages of other tests

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 24, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    ),
    "gemma2": ("gemma2", {"sliding_window": 24, "query_pre_attn_scalar": 16}),
    "phi3": ("phi3", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "sliding_window": 24}),
}
"""Family to transformers' model type and what it needs beside SMALL."""
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>")
"""Ids 256 and up; a byte's id is itself."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_random_model(
    folder: Path,
    family: str,
    seed: int,
    *,
    stored: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **config: Any,
) -> Model:
    """Write a random model of the family and a byte tokenizer; the model comes back, for reference.

    `config` overrides SMALL; a small `max_shard_size` ("100KB") splits it into several files.
    """
    model = random_model(family, seed, **config).to(stored)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(folder)
    return model


def write_big_model(folder: Path) -> None:
    """A random Llama of 8 layers in two files, stored in bf16: 411 MB once in float32."""
    width = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}
    config = AutoConfig.for_model("llama", **{**SMALL, **width, **heads})
    config.save_pretrained(folder)
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build(config).state_dict().items()}
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for file, some in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        stored = {name: torch.rand(shapes[name]).bfloat16() for name in some}
        save_file(stored, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(some, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def random_model(family: str, seed: int, **config: Any) -> Model:
    """A random model in float32 and evaluation mode."""
    model_type, own = FAMILIES.get(family, (family, {}))
    settings: PretrainedConfig = AutoConfig.for_model(model_type, **{**SMALL, **own, **config})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        build: Any = AutoModelForCausalLM.from_config
        model: Model = build(settings, dtype=torch.float32)
        randomise(model)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are bytes, with a beginning, an end and a chat template."""
    alphabet = _byte_letters()
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    wrap: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = wrap(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _byte_letters() -> list[str]:
    """The letter that byte-level pre-tokenization uses for each byte, by byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in plain else next(spare)) for byte in range(256)]
