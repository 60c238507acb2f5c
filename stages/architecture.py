"""From a model folder's config to the family's own modules, cut to a range of layers.

Everything here happens on the meta device: no weight is read or made. What we could only guess at
is refused by name, so that a shard which stands computes what `transformers` computes.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from stages.attention import ATTENTION
from stages.errors import CheckpointError, UnsupportedModelError

Model: TypeAlias = Any
"""A transformers.PreTrainedModel, whose methods mostly carry no types."""

LAYER_TYPES = {"full_attention", "sliding_attention"}
BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}
"""Frequencies that follow the longest row of the batch: a row's numbers would hang on others."""
TEXT_PART = {"gemma3"}
"""Composite models whose text part we know how to find in the checkpoint."""

FAMILY_ERRORS = (
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
)
"""What transformers' own classes raise for a config that makes no sense to them."""

_silence_progress_bars: Any = logging.disable_progress_bar
_silence_progress_bars()  # a stage's stderr is its log


class PassThrough(nn.Module):
    """Stands in a layer's place on a stage that does not hold it: hidden states go by unchanged."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, value in _plain_attributes(layer):
            setattr(self, name, value)

    def forward(self, hidden: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        return hidden


def read_config(folder: Path) -> PretrainedConfig:
    """The text model's config of a folder; a composite's text part where we know how.

    Raises CheckpointError if the folder has no readable config, UnsupportedModelError if it names
    an architecture, or a part of one, that we would have to guess.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: there is no config.json; a model is a folder that has one"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except OSError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    except FAMILY_ERRORS as error:
        raise UnsupportedModelError(f"{folder / 'config.json'}: {error}") from error
    text = _text_part(folder, config)
    refuse_what_we_would_guess(text)
    return text


def _text_part(folder: Path, config: PretrainedConfig) -> PretrainedConfig:
    """The config itself, or its text part with what the whole decides for it."""
    text: PretrainedConfig = config.get_text_config()
    if text is config:
        return config
    if config.model_type not in TEXT_PART:
        raise UnsupportedModelError(
            f"{folder}: {config.model_type} is made of several models; only a text model can be run"
        )
    text.tie_word_embeddings = config.tie_word_embeddings
    text.dtype = text.dtype or config.dtype
    text.quantization_config = getattr(config, "quantization_config", None)
    return text


def refuse_what_we_would_guess(config: PretrainedConfig) -> None:
    """UnsupportedModelError, with its name, for any flag or layer type that we do not compute."""
    name = config.model_type
    if getattr(config, "num_hidden_layers", 0) < 1:
        raise UnsupportedModelError(f"{name}: a model without layers is not supported")
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES)
    if unknown:
        raise UnsupportedModelError(
            f"{name}: layers of type {', '.join(unknown)} are not supported"
        )
    for rope in _rope_types(getattr(config, "rope_parameters", None)):
        if rope in BATCH_DEPENDENT_ROPE:
            raise UnsupportedModelError(
                f"{name}: rope type {rope} changes with the longest row of a batch; not supported"
            )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{name}: quantized weights (quantization_config) are not supported"
        )
    bidirectional = getattr(config, "use_bidirectional_attention", None)
    if config.is_encoder_decoder or bidirectional or getattr(config, "is_causal", None) is False:
        raise UnsupportedModelError(f"{name}: attention that is not causal is not supported")


def layer_windows(config: PretrainedConfig) -> tuple[int, ...]:
    """Positions that each layer sees, as the config has it; 0 is all.

    For plans only: a stage goes by what each layer's attention asks for.
    """
    window = int(getattr(config, "sliding_window", None) or 0)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * int(config.num_hidden_layers)
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def whole_model(config: PretrainedConfig, dtype: torch.dtype) -> Model:
    """The family's own causal language model on the meta device, attention through our function."""
    build: Any = AutoModelForCausalLM.from_config
    try:
        with torch.device("meta"):
            model: Model = build(
                config, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=False
            )
    except FAMILY_ERRORS as error:
        raise UnsupportedModelError(f"{config.model_type}: cannot be built: {error!r}") from error
    if not model._supports_attention_backend:
        raise UnsupportedModelError(
            f"{config.model_type}: {type(model).__name__} does not let its attention be replaced"
        )
    return model


def cut(model: Model, first_layer: int, end_layer: int) -> None:
    """Drop what the layers [first_layer, end_layer) do not need; layer indices stay the model's.

    Before: whole_model's answer. After: `model.layers` is as long as ever, but layers of other
    stages are pass-throughs; so are the embedding, the last norm and the head where not needed.
    """
    body = body_of(model)
    layers = body.layers
    if not 0 <= first_layer < end_layer <= len(layers):
        raise UnsupportedModelError(
            f"layers {first_layer}-{end_layer} are not in a model of {len(layers)} layers"
        )
    set_apart(model, [*range(first_layer), *range(end_layer, len(layers))])
    last = end_layer == len(layers)
    if not last:
        body.norm = nn.Identity()
        model.set_output_embeddings(nn.Identity())
        model.all_tied_weights_keys = {}
    if first_layer > 0 and not (last and model.all_tied_weights_keys):
        model.set_input_embeddings(nn.Identity())


def set_apart(model: Model, layers: Sequence[int]) -> dict[int, nn.Module]:
    """Take those layers out of a model, pass-throughs in their places; they come back by index."""
    held = body_of(model).layers
    taken = {index: held[index] for index in layers}
    for index, layer in taken.items():
        held[index] = PassThrough(layer)
    return taken


def put_back(model: Model, layers: Mapping[int, nn.Module]) -> None:
    """Put layers that were set apart in their places."""
    held = body_of(model).layers
    for index, layer in layers.items():
        held[index] = layer


def hollow(model: Model) -> None:
    """Drop all that has weights: what is left can hold single layers, one after another."""
    body = body_of(model)
    set_apart(model, range(len(body.layers)))
    body.norm = nn.Identity()
    model.set_output_embeddings(nn.Identity())
    model.set_input_embeddings(nn.Identity())
    model.all_tied_weights_keys = {}


def body_of(model: Model) -> Any:
    """The decoder inside a causal language model: `layers` between an embedding and a norm."""
    body = getattr(model, model.base_model_prefix, None)
    layers = getattr(body, "layers", None)
    whole = isinstance(layers, nn.ModuleList) and len(layers) == model.config.num_hidden_layers
    if not whole or not isinstance(getattr(body, "norm", None), nn.Module):
        raise UnsupportedModelError(
            f"{model.config.model_type}: {type(model).__name__} is not a list of layers and a norm"
        )
    return body


def _rope_types(parameters: object) -> Iterator[str]:
    """Rope types named anywhere in a config's rope parameters, one set or one per layer type."""
    if isinstance(parameters, dict):
        if isinstance(parameters.get("rope_type"), str):
            yield parameters["rope_type"]
        for value in parameters.values():
            yield from _rope_types(value)


def _plain_attributes(module: nn.Module) -> Iterator[tuple[str, object]]:
    """What a model's forward may ask of a layer besides running it: its own plain attributes."""
    for name, value in vars(module).items():
        if not name.startswith("_") and isinstance(value, (str, int, float, bool, type(None))):
            yield name, value
