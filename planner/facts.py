"""What was measured, as values: nodes, links, the model's shape and the work to do.

Bytes, seconds and floating-point operations everywhere; nothing here knows how a fact was measured.
"""

from dataclasses import dataclass, field


class InfeasibleError(ValueError):
    """No plan fits; the message says, with numbers, what is missing."""


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Profiled seconds of one layer; where given, they override the roofline of the node."""

    prefill: tuple[tuple[int, float], ...]
    """(tokens, seconds), by rising tokens."""
    decode: tuple[tuple[int, int, float], ...]
    """(rows, context tokens, seconds), by rising rows."""
    head: tuple[tuple[int, float], ...] = ()
    """(rows, seconds) of the LM head, by rising rows; empty: as a layer, in proportion to bytes."""


@dataclass(frozen=True, slots=True)
class Node:
    """One machine, or the share of one that a stage may use."""

    name: str
    flop_per_s: float
    memory_bytes: float
    """Free memory of the device that computes."""
    memory_bytes_per_s: float
    region: str = ""
    kind: str = ""
    host_bytes: float = 0.0
    """Host memory beside the device's, for offloading; 0 where they are the same."""
    host_to_device_bytes_per_s: float = 0.0
    disk_bytes_per_s: float = 0.0
    parked_kv_bytes_per_s: float = 0.0
    """Rate at which parked keys and values come back, with what goes out meanwhile, as measured."""
    up_bytes_per_s: float = float("inf")
    down_bytes_per_s: float = float("inf")
    layer_s: LayerTimes | None = None
    step_s: float = 0.0
    """Seconds that a step costs beside its layers: framing, queues, bookkeeping."""

    @property
    def stream_bytes_per_s(self) -> float:
        """Rate of offloaded weights: from host memory where there is some apart, else from disk."""
        return self.host_to_device_bytes_per_s if self.host_bytes else self.disk_bytes_per_s

    @property
    def kv_stream_bytes_per_s(self) -> float:
        """Rate of parked KV: as measured, else that of weights from host memory; 0 if it cannot be."""
        return self.parked_kv_bytes_per_s or (
            self.host_to_device_bytes_per_s if self.host_bytes else 0.0
        )


@dataclass(frozen=True, slots=True)
class Link:
    """A directed connection; `latency_s` is one way."""

    source: str
    target: str
    latency_s: float
    bytes_per_s: float
    loss: float = 0.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """The nodes, the links that were measured, and the link to assume where none was."""

    nodes: tuple[Node, ...]
    links: tuple[Link, ...] = ()
    default_link: Link | None = None

    def node(self, name: str) -> Node:
        """The node of that name; KeyError if there is none."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def link(self, source: str, target: str) -> Link | None:
        """The link from source to target, or None where no bytes can go."""
        for link in self.links:
            if link.source == source and link.target == target:
                return link
        if self.default_link is None:
            return None
        d = self.default_link
        return Link(source, target, d.latency_s, d.bytes_per_s, d.loss)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the planner must know of a model: equal layers between an embedding and a head."""

    layers: int
    hidden: int
    layer_bytes: float
    kv_bytes_per_token_layer: float
    activation_value_bytes: int
    embedding_bytes: float
    head_bytes: float
    flop_per_token_layer: float
    windows: tuple[int, ...] = ()
    """Positions that each layer sees, its own the last; 0 is all. Empty: every layer sees all."""

    @property
    def window(self) -> int:
        """Positions that the widest of the windowed layers sees; 0 if there is none."""
        return max(self.windows, default=0)

    def windowed_layers(self, first_layer: int, end_layer: int) -> int:
        """How many of these layers see a window."""
        return sum(seen > 0 for seen in self.windows[first_layer:end_layer])

    def seen(self, context: float) -> float:
        """Positions, of so many before it, that a position attends to: the mean over the layers."""
        if not self.windows:
            return context
        return sum(min(seen or context, context) for seen in self.windows) / len(self.windows)

    def seen_in_prompt(self, prompt: float) -> float:
        """The same as the mean over the positions of a prompt of so many tokens."""
        if not self.windows:
            return prompt / 2.0
        # Up to the window positions see all before them, and then the window.
        within = (min(seen or prompt, prompt) for seen in self.windows)
        return sum(w - w * w / (2.0 * prompt) for w in within) / len(self.windows)

    @property
    def activation_bytes_per_token(self) -> float:
        """Bytes that one token position puts on a link, uncompressed."""
        return float(self.hidden * self.activation_value_bytes)


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts: rates use the mean, memory uses the 95th percentile."""

    mean: float
    p95: float
    most: float = float("inf")
    """No row is longer: a job's `max_new_tokens`, say."""


@dataclass(frozen=True, slots=True)
class CodecRate:
    """What one codec level does to activations: raw bytes / coded bytes, and its speed."""

    ratio: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Workload:
    """The rows still to answer."""

    rows: int
    prompt_tokens: Lengths
    output_tokens: Lengths
    shared_prefix_fraction: float = 0.0
    acceptance: tuple[float, ...] = ()
    """Chance that the i-th drafted token is accepted, given that those before it were."""
    codec: dict[str, CodecRate] = field(default_factory=dict)
    """Codec levels to choose from, by name; raw is always possible."""
