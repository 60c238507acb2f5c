"""Quantized weights: what they change, what they leave alone, and what is refused in their name."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from planner.schedule import RingShape
from stages.config import DType, ProbeSpec, WeightKind
from stages.errors import MissingPackageError, ModelError, UnsupportedModelError
from stages.probe import probe
from stages.quantize import QuantizedLinear
from stages.shard import Shard, ShardSpec
from tests.models import write_random_model
from tests.test_shard import cut_into, generate, prefill, ragged_prompts

pytest.importorskip("torchao")

DTYPE: dict[WeightKind, DType] = {"int8": "float32", "int4": "bfloat16"}
"""What each level is computed in here; int4 is so nowhere else."""
INTERMEDIATE = 128
"""A multiple of what shares a scale in int4."""


@pytest.fixture(params=DTYPE)
def level(request: pytest.FixtureRequest) -> WeightKind:
    weights: WeightKind = request.param
    return weights


def test_greedy_tokens_are_the_same_in_any_plan(tmp_path: Path, level: WeightKind) -> None:
    write_random_model(tmp_path, "qwen3", seed=3, intermediate_size=INTERMEDIATE)
    prompts = ragged_prompts(12, vocab=320, longest=150)

    def answers(stages: int, slots: int, slot_rows: int, weights: WeightKind) -> list[list[int]]:
        shape = RingShape(slots, slot_rows, blocks=128, block_tokens=16, step_tokens=160)
        pipeline = cut_into(tmp_path, stages, 4, shape, DTYPE[level], weights)
        return generate(pipeline, shape, prompts)

    assert answers(1, 1, 12, level) == answers(3, 3, 2, level) != answers(1, 1, 12, "stored")


@torch.no_grad()
def test_a_model_with_the_rounded_weights_gives_the_same_logits(
    tmp_path: Path, level: WeightKind
) -> None:
    model = write_random_model(tmp_path, "llama", seed=3, intermediate_size=INTERMEDIATE)
    shape = RingShape(1, 8, blocks=64, block_tokens=16, step_tokens=200)
    pipeline = cut_into(tmp_path, 2, 4, shape, DTYPE[level], level)
    for shard in pipeline.shards:
        for name, module in shard.model.named_modules():
            if isinstance(module, QuantizedLinear):
                weight = model.get_submodule(name).weight
                one_by_one = torch.eye(weight.shape[1], dtype=shard.facts.dtype)
                rounded = module(one_by_one).T.float()
                assert_rounded(weight, rounded, level)
                weight.copy_(rounded)
    for prompt in ragged_prompts(8, vocab=320, longest=60):
        ours, theirs = prefill(pipeline, [prompt])[0], model(torch.tensor([prompt])).logits[0, -1]
        tolerance = {"int8": 1e-4, "int4": 0.1}[level]  # as bfloat16 allows
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def assert_rounded(weight: Tensor, rounded: Tensor, level: WeightKind) -> None:
    """A number is off by half a step at most, of a scale for each output; and some are by about that."""
    if level == "int8":
        step = 2 * weight.abs().amax(-1) / 255
    else:
        step = (weight.amax(-1) - weight.amin(-1)) / 15
    error = (weight - rounded).abs().amax(-1) / step
    assert (
        error.max() <= {"int8": 0.501, "int4": 0.6}[level]
    )  # int4's steps are bfloat16 themselves
    assert error.min() >= 0.4


def test_only_the_layers_linear_weights_change(tmp_path: Path) -> None:
    model = write_random_model(tmp_path, "phi3", seed=3)
    shard = Shard.load(ShardSpec(tmp_path, 3, 4, "bfloat16", weights="int8"))
    kinds = {name: type(each) for name, each in shard.model.named_modules() if "proj" in name}
    assert sum(kind is QuantizedLinear for kind in kinds.values()) == 4
    assert nn.Linear not in kinds.values()
    assert shard.facts.dtype == torch.bfloat16
    held, layer = shard.model, model.model.layers[3]
    for ours, theirs in [
        (held.lm_head, model.lm_head),
        (held.model.layers[3].input_layernorm, layer.input_layernorm),
    ]:
        assert torch.equal(ours.weight, theirs.weight.bfloat16())
    linears = [each for each in layer.modules() if isinstance(each, nn.Linear)]
    numbers = sum(each.weight.numel() for each in linears)
    scales = sum(each.out_features * (4 + 1) for each in linears)
    stored = sum(
        p.numel() for m in (model.lm_head, model.model.norm, layer) for p in m.parameters()
    )
    assert shard.facts.weight_bytes == 2 * (stored - numbers) + numbers + scales


def test_quantized_layers_stream_as_they_are(tmp_path: Path, level: WeightKind) -> None:
    write_random_model(tmp_path, "llama", seed=3, intermediate_size=INTERMEDIATE)
    shape = RingShape(1, 8, blocks=64, block_tokens=16, step_tokens=200)
    resident = cut_into(tmp_path, 1, 4, shape, DTYPE[level], level)
    spec = ShardSpec(tmp_path, 0, 4, DTYPE[level], streamed_layers=3, weights=level)
    streamed = replace(resident, shards=[Shard.load(spec)])
    for prompt in ragged_prompts(5, vocab=320, longest=60):
        assert torch.equal(prefill(streamed, [prompt])[0], prefill(resident, [prompt])[0])
    held, all_held = (each.shards[0].facts.weight_bytes for each in (streamed, resident))
    assert held < all_held, "the buffers have room for more than a quantized layer"


def test_a_probe_measures_the_layer_as_the_job_wants_it(tmp_path: Path, level: WeightKind) -> None:
    write_random_model(tmp_path, "llama", seed=3, intermediate_size=INTERMEDIATE)
    facts = probe(ProbeSpec(folder=tmp_path, dtype=DTYPE[level], weights=level, repeats=1))
    shard = Shard.load(ShardSpec(tmp_path, 1, 3, DTYPE[level], weights=level))
    assert facts.layer_bytes == shard.facts.weight_bytes / 2


@pytest.mark.parametrize(
    ("family", "weights", "dtype", "named"),
    [
        ("mixtral", "int8", "float32", r"layer 0 keeps mlp.experts.gate_up_proj \[4, 224, 64\]"),
        ("llama", "int4", "bfloat16", "layer 0's mlp.down_proj makes 64 outputs of 112 inputs"),
        ("llama", "int4", "float32", "q_proj is to compute in torch.float32 .* dtype: bfloat16"),
    ],
)
def test_what_a_level_would_not_make_smaller_or_not_soon_is_refused_by_name(
    tmp_path: Path, family: str, weights: WeightKind, dtype: str, named: str
) -> None:
    write_random_model(tmp_path, family, seed=3)
    with pytest.raises(UnsupportedModelError, match=f"^{family}: .*{named}"):
        Shard.load(ShardSpec(tmp_path, 0, 1, dtype, weights=weights))


def test_without_torchao_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_model(tmp_path, "llama", seed=3)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(MissingPackageError, match="extra `quantize`") as refusal:
        Shard.load(ShardSpec(tmp_path, 0, 1, "float32", weights="int8"))
    assert isinstance(refusal.value, ModelError)
    Shard.load(ShardSpec(tmp_path, 0, 1, "float32"))
