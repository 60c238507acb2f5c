"""What a worker or a probe is told before it starts: checked once, here, then trusted.

The launcher writes a spec to a file and passes its path; keys travel as paths, never as text.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from planner.schedule import RingShape
from planner.windows import Window

DType = Literal["auto", "float32", "bfloat16", "float16"]
Count = Annotated[int, Field(ge=1)]
Device = Literal["cpu", "cuda"]
"""What a stage's layers are computed by: the processor, or the accelerator that torch sees."""
WeightKind = Literal["stored", "int8", "int4"]
"""What a layer's linear weights are kept as: the job's, and all but the first are lossy."""
Codec = Literal["raw", "fast", "int8"]
"""A link's codec level. Which of the first two is a link's own choice; int8 is the job's, and lossy."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Ring(_Strict):
    """The pipeline's ring; every stage of it is told the same."""

    slots: Count
    slot_rows: Count
    blocks: Count
    block_tokens: Count
    step_tokens: Count
    most_slots: int = Field(default=0, ge=0)
    """Slots that the driver may come to open; it begins with `slots`."""
    window_tokens: int = Field(default=0, ge=0)
    """Positions that windowed layers keep, and in how many blocks; 0: every layer keeps all."""
    window_blocks: int = Field(default=0, ge=0)
    row_blocks: int = Field(default=0, ge=0)
    """KV blocks that one row may hold, where some stage parks the others; 0: all."""

    def shape(self) -> RingShape:
        """The same, as the policy takes it."""
        window = Window(self.window_tokens, self.window_blocks) if self.window_tokens else None
        counts = self.model_dump(exclude={"window_tokens", "window_blocks"})
        return RingShape(**counts, window=window)

    @model_validator(mode="after")
    def _is_a_shape(self) -> Self:
        self.shape()  # a ValueError says what does not go together
        return self


class Address(_Strict):
    """Where a member listens."""

    host: str = Field(min_length=1)
    port: int = Field(ge=0, le=65535)


class ModelSpec(_Strict):
    """Which layers of which model, and how they are computed."""

    folder: Path
    first_layer: int = Field(ge=0)
    end_layer: int = Field(ge=1)
    dtype: DType = "auto"
    weights: WeightKind = "stored"
    threads: Count = 1
    device: Device = "cpu"
    streamed_layers: int = Field(default=0, ge=0)
    """How many of the layers stream through two buffers in place of staying in memory."""
    parked_kv: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the ring's KV blocks for which there is no room where the layers are computed."""

    @model_validator(mode="after")
    def _streams_what_it_has(self) -> Self:
        if self.streamed_layers > self.end_layer - self.first_layer:
            raise ValueError(
                f"{self.streamed_layers} layers cannot stream of layers "
                f"{self.first_layer}-{self.end_layer}"
            )
        return self


class StageSpec(_Strict):
    """One stage worker of one run."""

    run: str
    epoch: int = Field(ge=1)
    member: str
    """This stage's name in the plan; its certificate carries it."""
    pipeline: tuple[str, ...] = Field(min_length=1)
    """Member names in ring order; the first is the head."""
    model: ModelSpec
    ring: Ring
    codec: Codec = "raw"
    """Of the link to the next stage: int8, or what to use until the link itself was measured."""
    incoming_codec: Codec = "raw"
    """Of the link from the previous stage."""
    driver: str
    driver_address: Address
    listen: Address
    certificate: Path
    key: Path
    members: dict[str, str]
    """Certificate (PEM) of every member that the plan lets this stage talk to, by name."""
    lost_after_s: float = Field(default=20.0, gt=0)
    """Silence of a peer after which it is lost."""
    driver_lost_after_s: float = Field(default=60.0, gt=0)
    """Silence of the driver after which the stage exits."""

    @model_validator(mode="after")
    def _knows_its_peers(self) -> Self:
        if self.member not in self.pipeline:
            raise ValueError(f"{self.member} is no stage of the pipeline {self.pipeline}")
        missing = {self.driver, *self.pipeline} - {self.member} - set(self.members)
        if missing:
            raise ValueError(f"no certificate was given for {', '.join(sorted(missing))}")
        return self

    @property
    def is_head(self) -> bool:
        """Whether this stage owns the rows and the order of frames."""
        return self.pipeline[0] == self.member

    @property
    def is_last(self) -> bool:
        """Whether this stage samples."""
        return self.pipeline[-1] == self.member

    @property
    def next(self) -> str:
        """The member that this stage sends to; the last stage's is the head."""
        place = self.pipeline.index(self.member)
        return self.pipeline[(place + 1) % len(self.pipeline)]

    @property
    def previous(self) -> str:
        """The member that this stage receives from; the head's is the last stage."""
        return self.pipeline[self.pipeline.index(self.member) - 1]


class ProbeSpec(_Strict):
    """What to measure on a node: the job's own layers, at one prefill and one decode shape."""

    folder: Path
    dtype: DType = "auto"
    weights: WeightKind = "stored"
    threads: Count = 1
    device: Device | None = None
    """What to measure; None: the accelerator where there is one, else the processor."""
    prefill_tokens: Count = 128
    decode_rows: Count = 32
    context_tokens: Count = 128
    repeats: Count = 5
    codec: Codec = "fast"
    """The codec level to measure."""


REFUSED = 3
"""A probe's exit status for a model that must not be run."""


class ProbeFacts(_Strict):
    """What a probe measured: medians of one layer, on one node, with the spec's threads."""

    dtype: DType
    device: Device
    """What computed it, and what a stage here should compute with."""
    layers: Count
    hidden: Count
    layer_bytes: Count
    """In memory, as the job wants its weights."""
    embedding_bytes: Count
    head_bytes: Count
    """As many as the embedding's where they share weights, and twice in memory on two stages."""
    kv_bytes_per_token_layer: float
    windows: tuple[Annotated[int, Field(ge=0)], ...]
    """Positions that each layer sees; 0 is all."""
    flop_per_token_layer: float
    prefill_s: float
    """One layer, `prefill_tokens` of one row."""
    decode_s: float
    """One layer, one token each of `decode_rows` rows that hold `context_tokens`."""
    head_s: float
    """From hidden states to the ids of `decode_rows` greedy tokens."""
    memory_bytes_per_s: float
    """Of the device, like the times above."""
    device_free_bytes: Count
    """Memory of the device that nobody uses."""
    host_to_device_bytes_per_s: float
    """Of pinned memory; 0 where the processor computes, which has no other memory."""
    disk_bytes_per_s: float
    """At which layers of this size stream from this node's disk; 0 where none can."""
    parked_kv_bytes_per_s: float
    """At which keys and values of a layer come back from where they are parked; 0 where none can."""
    disk_obstacle: str = ""
    """Why none can."""
    process_bytes: Count
    """Memory of a stage's process beside its weights, its keys and values and its activations."""
    codec_ratio: float
    """Raw bytes over coded bytes of the spec's codec, for the first layer's own output."""
    codec_bytes_per_s: float
    """Raw bytes a second of its slower side, on one thread."""
    loopback_latency_s: float
    loopback_bytes_per_s: float
    """Plain TCP from one thread to another on this node."""
