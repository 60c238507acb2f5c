"""A model folder's weights: which file holds which tensor, and how they come into a model.

safetensors only, no pickle; a tensor is read when, and only if, a shard needs it, and the memory it
is read into is the shard's own.
"""

import ctypes
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from stages.architecture import Model
from stages.errors import CheckpointError, UnsupportedModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}
"""Stored types that can be read; others (8 bits and fewer) are quantized weights."""
TEXT_OF_COMPOSITE = {r"^(?:model\.)?language_model\.(?:model\.)?": "model."}
"""How a composite's checkpoint names its text model."""
OTHER_PARTS = ("vision_tower.", "multi_modal_projector.")
"""What a composite's checkpoint holds besides; may stand behind `model.`."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_SMALL_BYTES = 256 * 2**10
_MOST_FROM_HEAP_BYTES = 32 * 2**20  # the most that glibc allows


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint, not yet read."""

    name: str
    path: Path
    file: Any

    def __getitem__(self, _all: EllipsisType) -> Tensor:
        """Read it whole; CheckpointError if the file's bytes do not allow it."""
        try:
            stored = self.file.get_slice(self.name)
            if stored.get_dtype() not in DTYPES:
                raise UnsupportedModelError(
                    f"{self.path}: tensor {self.name} is {stored.get_dtype()}; "
                    "quantized weights are not supported"
                )
            return self.file.get_tensor(self.name)  # type: ignore[no-any-return]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: tensor {self.name}: {error}") from error


class Checkpoint:
    """The safetensors files of a folder; a file is opened when a tensor of it is first asked for.

    Raises CheckpointError, with the file, for pickled weights, a torn file or a wrong index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._file_of = dict(self._listing())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, whichever shard needs them."""
        return tuple(self._file_of)

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.folder / self._file_of[name]

    def tensor(self, name: str) -> StoredTensor:
        """The tensor of that name, unread; CheckpointError if its file is missing or lacks it."""
        file_name = self._file_of[name]
        file = self._open(file_name)
        if name not in file.keys():  # noqa: SIM118 - the file is no dict
            raise CheckpointError(f"{self.folder / file_name}: the index promises tensor {name}")
        return StoredTensor(name, self.folder / file_name, file)

    def floating_dtype(self) -> torch.dtype:
        """The type in which the first floating tensor is stored."""
        for name, file_name in self._file_of.items():
            dtype = DTYPES.get(self._open(file_name).get_slice(name).get_dtype())
            if dtype is not None and dtype.is_floating_point:
                return dtype
        raise CheckpointError(f"{self.folder}: no tensor is of a floating-point type")

    def _listing(self) -> Iterator[tuple[str, str]]:
        if (self.folder / INDEX).is_file():
            yield from _read_index(self.folder / INDEX).items()
        elif (self.folder / SINGLE).is_file():
            yield from ((name, SINGLE) for name in self._open(SINGLE).keys())  # noqa: SIM118
        else:
            pickled = sorted(path.name for path in self.folder.glob("*.bin"))
            what = f"only pickled weights ({pickled[0]})" if pickled else "no weights"
            raise CheckpointError(f"{self.folder}: {what}; needed: {SINGLE} or {INDEX}")

    def _open(self, file_name: str) -> Any:
        if file_name not in self._files:
            path = self.folder / file_name
            if not path.is_file():
                raise CheckpointError(f"{path}: the index names this file, but it is missing")
            try:
                # Read, not mapped: the weights stay right if the file is replaced under a worker.
                self._files[file_name] = safe_open(path, framework="pt", backend="pread")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error
        return self._files[file_name]


@contextmanager
def pages_apart() -> Iterator[None]:
    """Allocate whole pages for each tensor, that go back to the system with it, where glibc runs.

    What was read to be cast or rounded would else stay in holes between the weights: up to 2.5 times
    the bytes of weights in int8 were seen. Later tensors come from the heap again; those limits are
    the ones that glibc arrives at by itself, which stops adapting them once it is told any.
    """
    limit = getattr(ctypes.CDLL(None), "mallopt", None)
    if limit is None:
        yield
        return
    limit(_M_MMAP_THRESHOLD, _SMALL_BYTES)
    try:
        yield
    finally:
        limit(_M_MMAP_THRESHOLD, _MOST_FROM_HEAP_BYTES)
        limit(_M_TRIM_THRESHOLD, 2 * _MOST_FROM_HEAP_BYTES)


@dataclass(frozen=True, slots=True)
class Weights:
    """What a shard is to be filled from, at once or layer by layer."""

    checkpoint: Checkpoint
    wanted: dict[str, str]
    """The stored tensors that it needs, and for which of its own."""
    dtype: torch.dtype
    """What they are computed in, but for the few that their family computes in another."""
    device: torch.device


def fill(model: Model, weights: Weights) -> None:
    """Give a model on the meta device its weights, converted as its family asks for.

    The model may be a part of what the weights are for. Afterwards nothing of it is on meta and
    nothing is random. Raises CheckpointError for a missing, misplaced or misshapen tensor.
    """
    checkpoint, dtype = weights.checkpoint, weights.dtype
    own = model.state_dict()
    wanted = {name: target for name, target in weights.wanted.items() if target in own}
    found, _ = convert_and_load_state_dict_in_model(
        model,
        {name: checkpoint.tensor(name) for name in wanted},
        LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            device_map={"": weights.device},
            weight_mapping=_conversions(model),
        ),
    )
    for target, reason in found.conversion_errors.items():
        raise CheckpointError(f"{_where(checkpoint, wanted, target)}: {reason.splitlines()[-1]}")
    for target, stored, expected in sorted(found.mismatched_keys):
        raise CheckpointError(
            f"{_where(checkpoint, wanted, target)}: it is {list(stored)}, "
            f"the config asks for {list(expected)}"
        )
    model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
    _require_none(found.missing_keys, checkpoint)
    _rebuild_buffers(model, weights.device)


def require_whole(model: Model, checkpoint: Checkpoint) -> None:
    """CheckpointError unless the files hold every tensor of a whole model; reads headers only.

    A stage would find what is missing too, but only of its own layers and after a long start.
    """
    wanted = wanted_by(model, model.state_dict(), checkpoint)
    for name in wanted:
        checkpoint.tensor(name)
    stored = set(wanted.values())
    for shared, source in model.all_tied_weights_keys.items():
        if stored & {shared, source}:
            stored |= {shared, source}
    missing = model.state_dict().keys() - stored
    _require_none({*missing, *_made_of_too_few(wanted)}, checkpoint)


def _made_of_too_few(wanted: dict[str, str]) -> Iterator[str]:
    """Tensors that fewer stored ones become than the same tensor of another layer: of experts that
    are stored apart, one is lost."""
    parts = Counter(wanted.values())
    most: dict[str, int] = {}
    for target, count in parts.items():
        kind = re.sub(r"\d+", "N", target)
        most[kind] = max(count, most.get(kind, 0))
    return (target for target, n in parts.items() if n < most[re.sub(r"\d+", "N", target)])


def _require_none(missing: Iterable[str], checkpoint: Checkpoint) -> None:
    names = sorted(missing, key=dot_natural_key)
    if names:
        some = ", ".join(names[:3])
        raise CheckpointError(
            f"{checkpoint.folder}: {len(names)} tensors are missing, among them {some}"
        )


def wanted_by(model: Model, whole: dict[str, Tensor], checkpoint: Checkpoint) -> dict[str, str]:
    """Stored tensors that this model needs, and for which of its own; refuse one nobody needs.

    `whole` is the state dict of the uncut model, by which a tensor of another stage is told from a
    tensor that belongs nowhere, which is a CheckpointError.
    """
    transforms = _conversions(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    own = model.state_dict()
    wanted = {}
    for name in sorted(checkpoint.names, key=dot_natural_key):
        target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, whole)
        if target in own:
            wanted[name] = target
        elif target not in whole and not _may_be_ignored(model, name, target):
            raise CheckpointError(
                f"{checkpoint.path_of(name)}: tensor {name} is no part of a {type(model).__name__}"
            )
    return wanted


def _where(checkpoint: Checkpoint, wanted: dict[str, str], target: str) -> str:
    """The file and the stored name of what became a model's tensor."""
    name = next(name for name, its_target in wanted.items() if its_target == target)
    return f"{checkpoint.path_of(name)}: tensor {name}"


def _conversions(model: Model) -> list[Any]:
    """transformers' own renamings and conversions; fresh at each call, as some keep a state."""
    return get_model_conversion_mapping(model, key_mapping=TEXT_OF_COMPOSITE)


def _may_be_ignored(model: Model, name: str, target: str) -> bool:
    if name.removeprefix("model.").startswith(OTHER_PARTS) or "rotary_emb.inv_freq" in name:
        return True
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    return any(re.search(pattern, target) for pattern in patterns)


def _rebuild_buffers(model: Model, device: torch.device) -> None:
    """Compute what no checkpoint stores (rotary frequencies, scales) by the family's own code.

    Each such buffer is poisoned first, so that one which that code leaves out is found. What was
    rebuilt when another part was filled stands.
    """
    for name, buffer in list(model.named_non_persistent_buffers()):
        if not buffer.is_meta:
            continue
        owner, _, attribute = name.rpartition(".")
        poisoned = torch.full_like(buffer, _poison(buffer.dtype), device=device)
        model.get_submodule(owner)._buffers[attribute] = poisoned
    model.initialize_weights()
    for name, buffer in model.named_non_persistent_buffers():
        left = buffer.isnan() if buffer.is_floating_point() else buffer == _poison(buffer.dtype)
        if bool(left.any()):
            raise UnsupportedModelError(
                f"{type(model).__name__}: buffer {name} is in no checkpoint, and not rebuilt"
            )
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        assert tensor.device.type != "meta", f"{name} was neither loaded nor rebuilt"


def _poison(dtype: torch.dtype) -> float | int:
    """A value that no rebuilt buffer holds; for bool there is none, and so True is never kept."""
    if dtype == torch.bool:
        return True
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min


def _read_index(path: Path) -> dict[str, str]:
    """Tensor names to file names; CheckpointError unless each file is one of this folder."""
    try:
        weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not an index of safetensors files: {error!r}") from error
    for file in files.values():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {file!r} is not a safetensors file of this folder")
    return files
