"""Weight-only quantization of decoder layers, by torchao, which is imported when a job asks for it.

Only the weights of a layer's linear modules change. Embedding, norms, biases and LM head stay as
they are, and layers that keep weights elsewhere are refused, not half done.
"""

from collections.abc import Iterable
from copy import deepcopy
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.config import WeightKind
from stages.errors import MissingPackageError, UnsupportedModelError

INT4_GROUPS = (128, 64, 32)
"""Inputs that share a scale and a zero point: the most of these that divides a module's inputs."""
INT4_OUTPUTS = 16
"""The int4 kernel takes outputs in multiples of this."""


class QuantizedLinear(nn.Module):
    """A linear module whose weight torchao has rounded.

    What that is made of (integers, scales) are plain parameters here, so that their bytes can be
    counted and moved as any other weight's.
    """

    def __init__(self, linear: Any, weights: WeightKind) -> None:
        super().__init__()
        rounded: Any = _rounded(linear, weights)
        names, self._attributes = rounded.__tensor_flatten__()
        self._kind = type(rounded)
        self.parts = nn.ParameterDict(
            {name: nn.Parameter(getattr(rounded, name), requires_grad=False) for name in names}
        )
        self.bias = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(states, self.weight, self.bias)

    @property
    def weight(self) -> Tensor:
        """The weight as torchao's kind of tensor, over the same memory."""
        weight: Tensor = self._kind.__tensor_unflatten__(self.parts, self._attributes, None, None)
        return weight


def prepare(weights: WeightKind) -> None:
    """Import what that level takes; MissingPackageError where torchao is not installed."""
    if weights == "stored":
        return
    if find_spec("torchao") is None:
        raise MissingPackageError(
            f"weights: {weights} needs torchao, which is not installed here: install wagonway with "
            "its extra `quantize` on every node, or ask for weights: stored"
        )
    import_module("torchao.quantization")
    if weights == "int4":
        import_module("torchao.prototype.quantization.int4")


def quantize(layer: nn.Module, weights: WeightKind) -> None:
    """Round the layer's linear weights in place, one after another; each is then let go."""
    if weights == "stored":
        return
    for name in [name for name, each in layer.named_modules() if isinstance(each, nn.Linear)]:
        layer.set_submodule(name, QuantizedLinear(layer.get_submodule(name), weights))


def quantized_shape(layer: nn.Module, weights: WeightKind) -> nn.Module:
    """A layer on meta as it will be when quantized, on meta; the layer itself stays as it was."""
    shape = deepcopy(layer)
    quantize(shape, weights)
    return shape.to("meta")


def require_quantizable(
    layers: Iterable[nn.Module], weights: WeightKind, device: torch.device, family: str
) -> None:
    """Refuse, by name, what that level would not make smaller; the layers may be on meta.

    Raises UnsupportedModelError, and MissingPackageError where torchao is not installed.
    """
    if weights == "stored":
        return
    prepare(weights)
    for number, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            if parameter.ndim > 2:
                raise UnsupportedModelError(
                    f"{family}: weights: {weights} reaches linear modules alone, and layer {number} "
                    f"keeps {name} {list(parameter.shape)} elsewhere; ask for weights: stored"
                )
        for name, module in layer.named_modules():
            if weights == "int4" and isinstance(module, nn.Linear):
                _require_int4(module, device, f"{family}: layer {number}'s {name}")


def _require_int4(linear: nn.Linear, device: torch.device, name: str) -> None:
    dtype, outputs, inputs = linear.weight.dtype, linear.out_features, linear.in_features
    if device.type != "cpu" or dtype != torch.bfloat16:
        # In other types torch multiplies int4 number by number, forty times slower than unrounded.
        raise UnsupportedModelError(
            f"{name} is to compute in {dtype} on {device}; weights: int4 does in bfloat16 on the CPU "
            "alone: ask for dtype: bfloat16, or for weights: int8"
        )
    if outputs % INT4_OUTPUTS or inputs % min(INT4_GROUPS):
        raise UnsupportedModelError(
            f"{name} makes {outputs} outputs of {inputs} inputs; weights: int4 needs multiples of "
            f"{INT4_OUTPUTS} and of {min(INT4_GROUPS)}: ask for weights: int8"
        )


def _rounded(linear: Any, weights: WeightKind) -> Tensor:
    """The module's weight as a tensor of torchao's; one on meta as zeros of its shape would be."""
    prepare(weights)
    weight = (
        torch.zeros_like(linear.weight, device="cpu") if linear.weight.is_meta else linear.weight
    )
    if weights == "int8":
        from torchao.quantization import Int8Tensor, PerRow  # noqa: PLC0415

        return cast(Tensor, Int8Tensor.from_hp(weight, PerRow()))
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor  # noqa: PLC0415

    group = next(group for group in INT4_GROUPS if linear.in_features % group == 0)
    return cast(Tensor, Int4OpaqueTensor.from_hp(weight, [1, group]))
