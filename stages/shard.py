"""A range of a model's layers, loaded and ready to compute steps; sockets are unknown here."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from planner.schedule import Step
from planner.windows import Window
from stages.architecture import (
    Model,
    body_of,
    cut,
    hollow,
    put_back,
    read_config,
    set_apart,
    whole_model,
)
from stages.attention import Probe, Seat, StepAttention
from stages.checkpoint import Checkpoint, Weights, fill, pages_apart, wanted_by
from stages.config import WeightKind
from stages.errors import NumericError, ProtocolError, UnsupportedModelError
from stages.ferry import Ferry
from stages.kv_cache import KvCache, LayerKv
from stages.quantize import quantize, quantized_shape, require_quantizable
from stages.step_index import ROUND_TOKENS, StepIndex
from stages.streaming import LayerStream, give_back_memory, spread

COMPUTE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """Which layers [first_layer, end_layer) of which model folder, computed in what, and where."""

    model: Path
    first_layer: int
    end_layer: int
    dtype: str
    """One of COMPUTE_DTYPES, to which stored weights are cast; or auto: as the checkpoint says."""
    device: str = "cpu"
    streamed_layers: int = 0
    """How many of the layers stream through two buffers in place of staying."""
    weights: WeightKind = "stored"
    """What its layers' linear weights are kept as."""


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """What others must know of a shard."""

    first_layer: int
    end_layer: int
    model_layers: int
    hidden: int
    vocab: int
    dtype: torch.dtype
    device: torch.device
    kv: tuple[LayerKv, ...]
    """The keys and values of each of its layers."""
    weight_bytes: int
    """Bytes of its weights, and of the buffers through which layers stream, on its device."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one position takes, over the shard's layers."""
        return sum(layer.bytes_per_token(self.dtype.itemsize) for layer in self.kv)


class Shard:
    """The layers of one stage: `transformers`' own modules, attention through the stage's KV cache.

    Owned by one thread: a step in progress sits on the modules.
    """

    def __init__(
        self, model: Model, seat: Seat, facts: ShardFacts, stream: LayerStream | None = None
    ) -> None:
        self.model = model
        self.stream = stream
        """Of the layers that do not stay; None if all do."""
        self._body = body_of(model)
        self._seat = seat
        self.facts = facts
        self.ferry = Ferry(facts.device)

    @classmethod
    def load(cls, spec: ShardSpec) -> "Shard":
        """Build the shard's modules and read its weights, and no others.

        Raises CheckpointError where the folder is at fault, UnsupportedModelError where we would
        have to guess how the model computes, StreamError where layers cannot be streamed from.
        """
        checkpoint, config = Checkpoint(spec.model), read_config(spec.model)
        device = torch.device(spec.device)
        dtype = _dtype(spec.dtype, config, checkpoint)
        model = whole_model(config, dtype)
        require_quantizable(body_of(model).layers, spec.weights, device, config.model_type)
        whole = dict(model.state_dict())
        cut(model, spec.first_layer, spec.end_layer)
        weights = Weights(checkpoint, wanted_by(model, whole, checkpoint), dtype, device)
        with pages_apart():
            stream, weight_bytes = _loaded(model, spec, weights)
            model.eval().requires_grad_(False)
            seat = Seat()
            for layer in body_of(model).layers[spec.first_layer : spec.end_layer]:
                seat.put_on(layer)
            facts = _facts(model, seat, spec, dtype, weight_bytes)
        return cls(model, seat, facts, stream)

    @property
    def is_first(self) -> bool:
        """Whether it turns token ids into hidden states."""
        return self.facts.first_layer == 0

    @property
    def is_last(self) -> bool:
        """Whether it turns hidden states into logits."""
        return self.facts.end_layer == self.facts.model_layers

    def new_cache(
        self,
        blocks: int,
        block_tokens: int,
        window: Window | None = None,
        frames: int | None = None,
    ) -> KvCache:
        """An empty KV cache for this shard's layers; see KvCache."""
        facts = self.facts
        return KvCache(facts.kv, blocks, block_tokens, facts.dtype, facts.device, window, frames)

    @torch.inference_mode()
    def embed(self, token_ids: Tensor) -> Tensor:
        """Hidden states [T, hidden] of token ids [T] that are the host's; of the first stage only."""
        assert self.is_first, "only the first stage holds the embedding"
        ids = token_ids.numpy()
        if ids.size and not 0 <= ids.min() <= ids.max() < self.facts.vocab:
            raise ProtocolError(f"a token id is not below the vocabulary's {self.facts.vocab}")
        there = self.ferry.to_device(token_ids)[None]
        embedded: Tensor = self.model.get_input_embeddings()(there)
        return embedded[0]

    @torch.inference_mode()
    def forward(self, step: Step, hidden: Tensor, kv: KvCache) -> Tensor:
        """The step's spans through these layers; the cache must have applied the step.

        `hidden` is [T, hidden], the spans' positions concatenated, on the device. The last stage
        answers logits [samples, vocab], a row for each span that samples, in their order; others
        [T, hidden]. Nothing here waits for the device; what it answers may hold a NaN: see
        `require_finite`. Raises ProtocolError for hidden states that do not fit the step, and what
        KvCache.bring does.
        """
        self._require_fit(step, hidden)
        kv.bring(step)
        index = StepIndex.of(step, kv, self.ferry)
        padding = len(index.positions) - step.tokens
        states = F.pad(hidden.to(self.facts.dtype), (0, 0, 0, padding))[None]
        with self._seat.taken_by(StepAttention(step, kv, index.write_at, self.facts.dtype)):
            if not self.is_last:
                return self._layers(states, index.positions)[: step.tokens]
            if not len(index.sampled):
                self._layers(states, index.positions)
                return states.new_empty(0, self.facts.vocab)
            answer = self.model(
                inputs_embeds=states,
                position_ids=index.positions[None],
                use_cache=False,
                logits_to_keep=index.sampled,
            )
            logits: Tensor = answer.logits[0]
            return logits[: sum(span.samples for span in step.spans)]

    def _layers(self, states: Tensor, positions: Tensor) -> Tensor:
        answer = self._body(inputs_embeds=states, position_ids=positions[None], use_cache=False)
        hidden: Tensor = answer.last_hidden_state
        return hidden[0]

    def _require_fit(self, step: Step, hidden: Tensor) -> None:
        if not step.spans or hidden.shape != (step.tokens, self.facts.hidden):
            raise ProtocolError(
                f"frame {step.frame}: hidden states {list(hidden.shape)} for {step.tokens} "
                f"positions of {self.facts.hidden}"
            )

    def require_finite(self, step: Step, are_finite: Sequence[bool]) -> None:
        """NumericError, with the layers and the sequences, for answers that are not finite.

        `are_finite` has an entry for each row of what `forward` answered.
        """
        if all(are_finite):
            return
        each = [int(span.samples) if self.is_last else span.tokens for span in step.spans]
        owners = (span.sequence for span, n in zip(step.spans, each, strict=True) for _ in range(n))
        named = sorted({owner for owner, fine in zip(owners, are_finite, strict=True) if not fine})
        raise NumericError(
            f"layers {self.facts.first_layer}-{self.facts.end_layer} made a NaN or an infinity in "
            f"{self.facts.dtype}, frame {step.frame}, for sequence {', '.join(map(str, named))}",
            tuple(named),
        )


def _dtype(name: str, config: PretrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    if name != "auto":
        return COMPUTE_DTYPES[name]
    stored = config.dtype or checkpoint.floating_dtype()
    if not isinstance(stored, torch.dtype) or stored not in COMPUTE_DTYPES.values():
        raise UnsupportedModelError(f"{checkpoint.folder}: cannot compute in {stored}")
    return stored


def _loaded(model: Model, spec: ShardSpec, weights: Weights) -> tuple[LayerStream | None, int]:
    """Fill a cut model; the stream of its layers that do not stay, and the bytes that all take.

    Layers that stream or are rounded are loaded one by one: none is whole in memory beside another.
    """
    streamed = spread(spec.first_layer, spec.end_layer, spec.streamed_layers)
    every = range(spec.first_layer, spec.end_layer)
    apart = set_apart(model, streamed if spec.weights == "stored" else every)
    stream = None
    if streamed:
        shapes = tuple(quantized_shape(apart[index], spec.weights) for index in streamed)
        stream = LayerStream(shapes, weights.device)
    weight_bytes = stream.buffer_bytes if stream is not None else 0
    for index, layer in _one_by_one(apart, model.config, weights):
        quantize(layer, spec.weights)
        if stream is not None and index in streamed:
            stream.keep(layer)
        else:
            weight_bytes += sum(weight.nbytes for weight in layer.parameters())
    fill(model, weights)
    weight_bytes += sum(weight.nbytes for weight in model.parameters())
    put_back(model, apart)
    if stream is not None:
        give_back_memory()
    return stream, weight_bytes


def _one_by_one(
    layers: Mapping[int, nn.Module], config: PretrainedConfig, weights: Weights
) -> Iterator[tuple[int, nn.Module]]:
    """Layers on meta, each filled just before it is handed out."""
    if not layers:
        return
    shell = whole_model(config, weights.dtype)
    hollow(shell)
    for index, layer in layers.items():
        put_back(shell, {index: layer})
        fill(shell, weights)
        yield index, layer
        set_apart(shell, [index])


def _facts(
    model: Model, seat: Seat, spec: ShardSpec, dtype: torch.dtype, weight_bytes: int
) -> ShardFacts:
    """What the loaded model says of itself, and what a step over nothing tells of its attention."""
    config = model.config
    return ShardFacts(
        first_layer=spec.first_layer,
        end_layer=spec.end_layer,
        model_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        dtype=dtype,  # model.dtype would be that of the first parameter, a quantized weight's too
        device=torch.device(spec.device),
        kv=_probed(model, seat, spec, dtype),
        weight_bytes=weight_bytes,
    )


@torch.inference_mode()
def _probed(model: Model, seat: Seat, spec: ShardSpec, dtype: torch.dtype) -> tuple[LayerKv, ...]:
    """The shape of each layer's keys and values; UnsupportedModelError unless it attends once."""
    probe, device = Probe(), torch.device(spec.device)
    states = torch.zeros(1, ROUND_TOKENS, model.config.hidden_size, dtype=dtype, device=device)
    positions = torch.arange(ROUND_TOKENS, device=device)[None]
    with seat.taken_by(probe):
        body_of(model)(inputs_embeds=states, position_ids=positions, use_cache=False)
    asked = [call.layer for call in probe.calls]
    for layer in range(spec.first_layer, spec.end_layer):
        if asked.count(layer) != 1:
            kind = type(body_of(model).layers[layer]).__name__
            raise UnsupportedModelError(
                f"layer {layer} ({kind}) asked for attention {asked.count(layer)} times, not once"
            )
    return tuple(probe.calls)
