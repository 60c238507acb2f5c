"""A shard reads its own weights, exactly, and a folder that is at fault says where."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from stages.architecture import Model, read_config, whole_model
from stages.checkpoint import INDEX, SINGLE, Checkpoint, require_whole
from stages.errors import CheckpointError, UnsupportedModelError
from stages.selfcheck import randomise
from stages.shard import Shard, ShardSpec
from tests.models import FAMILIES, SMALL, write_random_model

LAYERS = 4
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def load(folder: Path, first: int = 0, end: int = LAYERS, dtype: str = "float32") -> Shard:
    return Shard.load(ShardSpec(folder, first, end, dtype))


def tensors(model: Model) -> dict[str, Tensor]:
    return dict(chain(model.named_parameters(), model.named_buffers()))


def from_pretrained(folder: Path, dtype: torch.dtype) -> Model:
    read: Any = AutoModelForCausalLM.from_pretrained
    return read(folder, dtype=dtype)


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama", {}),
        ("llama", {"rope_parameters": LLAMA3, "attention_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("gemma3", {"tie_word_embeddings": True}),
        ("mixtral", {}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_of_a_shard_is_the_one_that_from_pretrained_has(
    tmp_path: Path, family: str, flags: dict[str, Any], dtype: str
) -> None:
    write_random_model(tmp_path, family, 1, stored=torch.bfloat16, **flags)
    theirs = tensors(from_pretrained(tmp_path, getattr(torch, dtype)))
    for first, end in [(0, 4), (0, 2), (1, 3), (3, 4)]:
        ours = tensors(load(tmp_path, first, end, dtype).model)
        assert {name for name in ours if ".layers." in name} == {
            name for name in theirs if any(f".layers.{i}." in name for i in range(first, end))
        }
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name


def test_auto_computes_in_the_type_that_the_checkpoint_is_stored_in(tmp_path: Path) -> None:
    write_random_model(tmp_path, "llama", 1, stored=torch.bfloat16)
    assert load(tmp_path, dtype="auto").facts.dtype == torch.bfloat16


def test_a_shard_needs_no_file_that_holds_only_other_layers(tmp_path: Path) -> None:
    write_random_model(tmp_path, "llama", 1, max_shard_size="60KB")
    files = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    own = {file for name, file in files.items() if "layers.1." in name}
    for file in set(files.values()) - own:
        (tmp_path / file).unlink()
    assert load(tmp_path, 1, 2).facts.weight_bytes > 0


def test_the_text_part_of_a_gemma_3_checkpoint_is_found(tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**SMALL, **FAMILIES["gemma3"][1]},
        vision_config={**vision, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    build: Any = AutoModelForImageTextToText.from_config
    whole = build(config)
    randomise(whole)
    whole.save_pretrained(tmp_path)
    ours, theirs = tensors(load(tmp_path).model), tensors(whole)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name.replace("model.", "model.language_model.")]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_is_known_to_be_whole_from_its_headers(
    tmp_path: Path, family: str, tied: bool
) -> None:
    write_random_model(tmp_path, family, 1, tie_word_embeddings=tied, max_shard_size="60KB")
    model = whole_model(read_config(tmp_path), torch.float32)
    require_whole(model, Checkpoint(tmp_path))
    listing = json.loads((tmp_path / INDEX).read_text())
    lost = next(name for name in listing["weight_map"] if name.startswith("model.layers.3."))
    del listing["weight_map"][lost]
    (tmp_path / INDEX).write_text(json.dumps(listing))
    with pytest.raises(CheckpointError, match=r"1 tensors .* model\.layers\.3"):
        require_whole(model, Checkpoint(tmp_path))


def rewrite(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """A fault that changes the tensors of a single-file checkpoint."""

    def inflict(folder: Path) -> None:
        stored = load_file(folder / SINGLE)
        change(stored)
        save_file(stored, folder / SINGLE, {"format": "pt"})

    return inflict


def tear(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-1000])


def pickle_only(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def index(weight_map: object) -> Callable[[Path], None]:
    def inflict(folder: Path) -> None:
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return inflict


NORM = "model.layers.1.input_layernorm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (rewrite(lambda stored: stored.pop(NORM)), [NORM]),
        (rewrite(lambda stored: stored.pop("lm_head.weight")), ["lm_head.weight"]),
        (rewrite(lambda s: s.update({UP: s[UP][1:]})), [SINGLE, UP, "[111, 64]", "[112, 64]"]),
        (
            rewrite(lambda s: s.update({"model.layers.0.odd": s[UP] + 1})),
            [SINGLE, "model.layers.0.odd"],
        ),
        (rewrite(lambda s: s.update({"model.layers.4.up.weight": s[UP] + 1})), ["layers.4"]),
        (tear, [SINGLE]),
        (lambda folder: (folder / SINGLE).write_bytes(b""), [SINGLE]),
        (lambda folder: (folder / SINGLE).write_bytes(b"\xff" * 64), [SINGLE]),
        (lambda folder: (folder / SINGLE).unlink(), ["no weights"]),
        (pickle_only, ["pytorch_model.bin", "safetensors"]),
        (index({UP: "lost.safetensors"}), ["lost.safetensors", "missing"]),
        (index({UP: "../stolen.safetensors"}), [INDEX, "../stolen.safetensors"]),
        (index({UP: "model.bin"}), [INDEX, "model.bin"]),
        (index({UP: SINGLE, "model.norm.weight": SINGLE}), ["tensors are missing"]),
        (index([UP]), [INDEX]),
        (lambda folder: (folder / INDEX).write_text("{"), [INDEX]),
    ],
)
def test_a_faulty_checkpoint_is_refused_by_file_and_tensor(
    tmp_path: Path, fault: Callable[[Path], object], named: list[str]
) -> None:
    write_random_model(tmp_path, "llama", 1)
    fault(tmp_path)
    with pytest.raises(CheckpointError) as refused:
        load(tmp_path)
    assert all(part in str(refused.value) for part in [str(tmp_path), *named])


def test_an_index_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    write_random_model(tmp_path, "llama", 1, max_shard_size="60KB")
    promised = json.loads((tmp_path / INDEX).read_text())
    first, other = sorted(set(promised["weight_map"].values()))[:2]
    shutil.copy(tmp_path / other, tmp_path / first)
    with pytest.raises(CheckpointError, match=f"{first}: the index promises tensor"):
        load(tmp_path)


def test_eight_bit_weights_are_refused(tmp_path: Path) -> None:
    write_random_model(tmp_path, "llama", 1)
    rewrite(lambda stored: stored.update({UP: stored[UP].to(torch.int8)}))(tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"{UP} is I8"):
        load(tmp_path)


def test_layers_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    write_random_model(tmp_path, "llama", 1)
    with pytest.raises(UnsupportedModelError, match="layers 2-5"):
        load(tmp_path, 2, 5)


MEASURE = """
import os, resource, sys
from pathlib import Path
import psutil
from stages.shard import Shard, ShardSpec
for end, weights in ((4, "stored"), (8, "stored"), (8, "int8")):
    if os.fork() == 0:
        if weights == "int8":
            import torchao.quantization  # 100 MB by itself
        empty = psutil.Process().memory_info().rss
        shard = Shard.load(ShardSpec(Path(sys.argv[1]), 0, end, "float32", weights=weights))
        held = psutil.Process().memory_info().rss
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(held - empty, peak - empty, shard.facts.weight_bytes, flush=True)
        os._exit(0)
    os.wait()
"""
"""Bytes that half of the model's layers, then all, then all in int8, add to an empty worker; the
most that they added while they were loaded; and their weights."""
LAYER_BYTES = 4 * (4 * 1024 * 1024 + 3 * 1024 * 2816)
"""One layer of the big model in float32."""


def test_a_shard_takes_the_memory_of_its_weights_and_no_more(big_model: Path) -> None:
    pytest.importorskip("torchao")
    command = [sys.executable, "-c", MEASURE, str(big_model)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    half, whole, in_int8 = (tuple(map(int, line.split())) for line in printed.splitlines())
    held, _, weights = whole
    assert weights >= 400e6
    assert half[0] <= 0.6 * held
    assert half[0] <= half[2] + 80e6, "a copy of something was kept"
    held, peak, weights = in_int8
    assert weights <= 0.26 * whole[2]
    assert held <= weights + 60e6
    assert peak <= weights + 2 * LAYER_BYTES + 60e6, "layers were not rounded one by one"
