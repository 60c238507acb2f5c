"""A model that we would compute wrongly is refused before a job starts, and told why."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from stages.architecture import read_config
from stages.errors import CheckpointError, ModelError, UnsupportedModelError
from stages.selfcheck import LENGTHS, TOLERANCE, check, narrowed

torch.set_num_threads(1)  # cores are shared with the stages of other tests

LINEAR = {"rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def write_config(folder: Path, model_type: str, **flags: Any) -> Path:
    AutoConfig.for_model(model_type, **flags).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model_type", "flags"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": LINEAR | LLAMA3, "num_key_value_heads": 8}),
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 64}),
        ("qwen3", {}),
        ("gemma3_text", {"final_logit_softcapping": 5.0}),
        ("phi3", {}),
        ("mixtral", {}),
        ("qwen3_moe", {}),
        ("gemma2", {}),
        ("gemma2", {"attn_logit_softcapping": 2.0}),
        ("gpt_oss", {}),
        ("granite", {"logits_scaling": 8.0, "residual_multiplier": 0.3}),
    ],
)
def test_a_model_that_we_compute_as_transformers_does_passes_in_three_seconds(
    tmp_path: Path, model_type: str, flags: dict[str, Any]
) -> None:
    folder = write_config(tmp_path, model_type, **flags)
    began = time.process_time()
    assert check(folder) <= TOLERANCE
    assert time.process_time() - began < 3.0


@pytest.mark.parametrize(
    ("model_type", "flags", "named"),
    [
        ("mamba2", {}, "linear_attention"),
        ("falcon_h1", {}, "hybrid"),
        ("llama4_text", {}, "chunked_attention"),
        ("gpt2", {}, "GPT2LMHeadModel"),
        ("bloom", {}, "BloomForCausalLM"),
        ("rwkv", {}, "rwkv"),
        ("llama", {"rope_parameters": LINEAR | {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "not causal"),
        ("granite", {"embedding_multiplier": 12.0}, "GraniteDecoderLayer"),
        ("llava", {}, "llava is made of several models"),
        ("t5", {}, "t5"),
    ],
)
def test_what_we_would_have_to_guess_is_refused_by_name(
    tmp_path: Path, model_type: str, flags: dict[str, Any], named: str
) -> None:
    folder = write_config(tmp_path, model_type, **flags)
    with pytest.raises(UnsupportedModelError, match=named):
        check(folder)


def test_code_from_a_model_folder_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.O"}}'
    )
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError):
        check(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": 3}', '{"hidden_size": 4}'])
def test_a_config_that_is_none_is_a_model_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=str(tmp_path)):
        check(tmp_path)


def test_a_folder_without_a_config_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        check(tmp_path)


def test_the_likeness_keeps_both_kinds_of_layers_and_windows_that_bite(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path, "gemma3_text", sliding_window=512))
    small = narrowed(config)
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert small.sliding_window < max(LENGTHS)
    assert small.head_dim == config.head_dim
    assert small.query_pre_attn_scalar == config.query_pre_attn_scalar
