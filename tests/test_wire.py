"""Frames and messages as bytes: what goes in comes out, and nothing else gets in."""

import ast
import itertools
import random
import struct
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.schedule import Grant, Span, Step
from stages.control import (
    Answer,
    Answers,
    Bye,
    Capacity,
    ControlMessage,
    Heartbeat,
    Hello,
    LeasedRow,
    LinkReport,
    Message,
    OpenSlots,
    Peer,
    Ready,
    Recall,
    Refused,
    Returned,
    Rows,
    StageFailed,
    StepFailed,
    Stop,
    Topology,
    Welcome,
    decode,
)
from stages.errors import FrameError, ProtocolError
from stages.frame import (
    MAX_FRAME_BYTES,
    MAX_HEADER_BYTES,
    PREFIX_BYTES,
    RING_KINDS,
    TURN_KINDS,
    Dtype,
    EpochMismatchError,
    Frame,
    Kind,
    Label,
    RunMismatchError,
    VersionMismatchError,
    check_place,
    run_number,
)
from stages.frame_reader import FrameReader
from stages.wire import Ack, Admit, ProfileFrame, ProfileHeld, SampleFrame, StepFrame

RUN = run_number("run-1")
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
HELLO = Hello(name="a", run="run-1", epoch=3, incarnation=2**64 - 1, purpose="data", port=4)


def step_frame(rows: int = 3, hidden: int = 8, **changes: object) -> StepFrame:
    spans = tuple(Span(10 + row, row, 1, row % 2 == 0) for row in range(rows))
    step = Step(9, 2, spans, (Grant(10, (1, 2)), Grant(11, (3,))), (4, 5))
    payload = memoryview(bytes(i % 251 for i in range(4 * hidden * rows)))
    admits = (Admit(10, 2**64 - 1, 17, 0.7, 0.95, 40),)
    parts: dict[str, object] = {"step": step, "payload": payload, "admits": admits}
    return StepFrame(epoch=3, hidden=hidden, dtype=Dtype.FLOAT32, **{**parts, **changes})  # type: ignore[arg-type]


CONTROL: tuple[ControlMessage, ...] = (
    HELLO,
    Welcome(name="b", run="run-1", epoch=3, incarnation=0, last_frame=7, purpose="control"),
    Refused(reason="stranger", cause="name", epoch=3),
    Topology(
        epoch=3, peers=(Peer(name="a", host="h", port=1),), capacity=Capacity(blocks=2**63 - 1)
    ),
    Ready(epoch=3, capacity=Capacity(blocks=1, window_blocks=9)),
    Heartbeat(
        frames=5,
        links=(
            LinkReport(
                peer="b",
                purpose="data",
                congestion_control="bbr",
                frames_sent=1,
                frames_received=2,
                payload_bytes_sent=3,
                payload_bytes_received=4,
                framing_bytes_sent=3,
                ack_bytes_sent=2,
                control_bytes_sent=1,
                tls_bytes_sent=5,
                tls_bytes_received=6,
                blocked_s=0.25,
                reconnects=1,
                frames_sent_again=2,
                duplicates_dropped=3,
            ),
        ),
    ),
    Rows(
        rows=(
            LeasedRow(
                row=0,
                key=2**64 - 1,
                seed=1,
                token_ids=(1, 2**31 - 1),
                max_new_tokens=8,
                temperature=0.7,
                top_p=0.9,
                top_k=0,
                stop=("\n\n", "Ω"),
            ),
        ),
    ),
    Answers(
        answers=(
            Answer(
                row=0,
                output_ids=(5, 6),
                text="naïve 🚂",
                finish_reason="stop",
                prompt_tokens=2,
                output_tokens=2,
                queued_s=0.1,
                prefill_s=0.2,
                decode_s=0.3,
            ),
        )
    ),
    Stop(reason="done"),
    Bye(),
    StageFailed(node="a", error_type="NumericError", message="NaN in layer 3"),
    StepFailed(
        epoch=3,
        frame=9,
        slot=2,
        sequences=(10, 2**32 - 1),
        error_type="NumericError",
        message="NaN",
    ),
    OpenSlots(slots=7),
    Recall(rows=5, most_tokens=640),
    Returned(rows=(7, 2**63 - 1)),
)
MESSAGES: tuple[Message, ...] = (
    step_frame(),
    SampleFrame(3, 9, 2, (1, 2**31 - 1, 0)),
    Ack(3, 9, 1, 2**32 - 1, 0),
    ProfileFrame(3, bytes(range(99))),
    ProfileHeld(3, 2**32 - 1),
    *CONTROL,
)


def packed(message: Message) -> bytes:
    if isinstance(message, Hello):
        return bytes(message.greeting())
    return bytes(message.encode(RUN))


def read(raw: bytes) -> Frame:
    """The one frame of these bytes, fed at once."""
    reader = FrameReader()
    frames = reader.feed(raw)
    reader.finish()
    assert len(frames) == 1
    return frames[0]


def resealed(raw: bytes, **changes: int) -> bytes:
    """A frame with other numbers in its prefix and right sums: what a liar would send."""
    names = ["magic", "version", "kind", "dtype", "codec", "slot", "run", "frame", "epoch"]
    names += ["rows", "columns", "header", "payload"]
    layout = struct.Struct("<2sBBBBHQQIIIII")
    numbers = dict(zip(names, layout.unpack_from(raw), strict=True)) | changes
    prefix = layout.pack(*numbers.values()) + struct.pack("<Q", xxhash.xxh3_64_intdigest(raw[56:]))
    check = struct.pack("<I", xxhash.xxh3_64_intdigest(prefix) & 0xFFFFFFFF)
    return prefix + check + raw[PREFIX_BYTES:]


def named(message: Message) -> str:
    return type(message).__name__


every_message = pytest.mark.parametrize("message", MESSAGES, ids=named)


def test_every_kind_is_among_the_messages_of_these_tests() -> None:
    assert {read(packed(message)).label.kind for message in MESSAGES} == set(Kind) - TURN_KINDS


@every_message
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    assert decode(read(packed(message))) == message


@every_message
def test_a_message_comes_back_whole_from_single_bytes(message: Message) -> None:
    reader = FrameReader()
    raw = packed(message) * 2
    frames = [frame for i in range(len(raw)) for frame in reader.feed(raw[i : i + 1])]
    assert [decode(frame) for frame in frames] == [message, message]


@every_message
def test_every_truncation_is_an_error(message: Message) -> None:
    raw = packed(message)
    for length in range(1, len(raw)):
        with pytest.raises(FrameError):
            read(raw[:length])


@every_message
def test_every_flipped_byte_is_an_error(message: Message) -> None:
    raw = packed(message)
    for place in range(len(raw)):
        for mask in (0x01, 0x80, 0xFF):
            flipped = bytearray(raw)
            flipped[place] ^= mask
            with pytest.raises(FrameError):
                read(bytes(flipped))


def test_a_reader_stays_broken_after_an_error() -> None:
    reader = FrameReader()
    good = packed(Stop())
    with pytest.raises(FrameError):
        reader.feed(b"x" * PREFIX_BYTES)
    with pytest.raises(FrameError):
        reader.feed(good)


def test_a_step_with_nothing_but_ended_sequences_comes_back() -> None:
    message = step_frame(0, step=Step(9, 2, (), (), (4, 5)), admits=(), payload=memoryview(b""))
    assert decode(read(packed(message))) == message


def test_a_payload_is_neither_copied_on_its_way_out_nor_on_its_way_in() -> None:
    array = np.arange(3 * 8, dtype=np.float32)
    packet = step_frame(payload=array.data).encode(RUN)
    assert np.shares_memory(np.frombuffer(packet.payload, np.float32), array)
    frame = read(bytes(packet))
    message = decode(frame)
    assert isinstance(message, StepFrame)
    assert np.shares_memory(np.frombuffer(message.payload), np.frombuffer(frame.payload))


@given(
    st.lists(
        st.tuples(st.integers(0, 2**30), st.integers(1, 3), st.booleans(), U32),
        min_size=1,
        max_size=20,
        unique_by=lambda span: span[3],
    ),
    st.dictionaries(U32, st.lists(U32, min_size=1, max_size=5, unique=True), max_size=5),
    st.sets(U32, max_size=5),
    st.tuples(U64, U64, st.floats(0, 100), st.floats(0, 1, exclude_min=True), U32),
    st.sampled_from([(Dtype.FLOAT32, 4), (Dtype.BFLOAT16, 2), (Dtype.FLOAT16, 2)]),
)
@settings(max_examples=150, deadline=None)
def test_any_step_comes_back(
    spans: list[tuple[int, int, bool, int]],
    grants: dict[int, list[int]],
    ended: set[int],
    drawn: tuple[int, int, float, float, int],
    dtype: tuple[Dtype, int],
) -> None:
    step = Step(
        2**63,
        2**16 - 1,
        tuple(Span(sequence, start, tokens, samples) for start, tokens, samples, sequence in spans),
        tuple(Grant(sequence, tuple(blocks)) for sequence, blocks in grants.items()),
        tuple(ended),
    )
    payload = memoryview(bytes(step.tokens * 5 * dtype[1]))
    admits = (Admit(spans[0][3], *drawn),)
    message = StepFrame(2**32 - 1, step, 5, dtype[0], payload, admits=admits)
    assert decode(read(packed(message))) == message


@given(U32, st.integers(0, 2**63), st.lists(st.integers(0, 2**31 - 1), max_size=50))
@settings(max_examples=50, deadline=None)
def test_any_samples_come_back(epoch: int, number: int, tokens: list[int]) -> None:
    message = SampleFrame(epoch, number, 1, tuple(tokens))
    assert decode(read(packed(message))) == message


@given(st.text(max_size=50), st.lists(st.text(min_size=1, max_size=9), max_size=3))
@settings(max_examples=50, deadline=None)
def test_any_text_comes_back(text: str, stops: list[str]) -> None:
    leased = next(message for message in CONTROL if isinstance(message, Rows))
    row = leased.rows[0].model_copy(update={"stop": tuple(stops)})
    for message in (Rows(rows=(row,)), Stop(reason=text)):
        assert decode(read(packed(message))) == message


@pytest.mark.parametrize("rows", [1, 8, 32, 256])
def test_a_step_is_framed_in_64_bytes_and_24_per_row(rows: int) -> None:
    spans = tuple(Span(i, 100, 1, True) for i in range(rows))
    grants = tuple(Grant(i, (i,)) for i in range(rows))
    step = Step(1, 0, spans, grants, tuple(range(1000, 1000 + rows)))
    packet = StepFrame(1, step, 4, Dtype.FLOAT16, memoryview(bytes(8 * rows))).encode(RUN)
    assert len(packet.head) <= 64 + 24 * rows


def test_samples_return_in_16_bytes_a_token_at_32_rows() -> None:
    assert SampleFrame(1, 1, 0, tuple(range(32))).encode(RUN).size <= 16 * 32


SPAN = Span(10, 0, 3, True)
BAD_STEPS = {
    "no tokens": Step(9, 2, (Span(10, 0, 0, True), SPAN)),
    "past the last position": Step(9, 2, (Span(10, 2**31 - 2, 3, True),)),
    "a gap between the spans of a sequence": Step(
        9, 2, (Span(10, 0, 1, False), Span(10, 2, 2, True))
    ),
    "spans of a sequence in the wrong order": Step(
        9, 2, (Span(10, 1, 2, False), Span(10, 0, 1, True))
    ),
    "a span after a sampled one": Step(9, 2, (Span(10, 0, 1, True), Span(10, 1, 2, True))),
    "granted twice": Step(9, 2, (SPAN,), (Grant(1, (1,)), Grant(2, (2,)), Grant(1, (3,)))),
    "a block twice": Step(9, 2, (SPAN,), (Grant(1, (1, 1)),)),
    "no block": Step(9, 2, (SPAN,), (Grant(1, ()),)),
    "ended twice": Step(9, 2, (SPAN,), (), (1, 1)),
    "a sequence past 32 bits": Step(9, 2, (Span(2**32, 0, 3, True),)),
    "a slot past 16 bits": Step(9, 2**16, (SPAN,)),
    "a negative frame": Step(-1, 2, (SPAN,)),
    "more tokens than the payload": Step(9, 2, (Span(10, 0, 4, True),)),
    "too many spans": Step(9, 2, tuple(Span(i, 0, 1, True) for i in range(4097))),
}


@pytest.mark.parametrize("step", BAD_STEPS.values(), ids=BAD_STEPS)
def test_a_step_that_makes_no_sense_is_not_sent(step: Step) -> None:
    with pytest.raises(FrameError):
        step_frame(step=step, admits=()).encode(RUN)


@pytest.mark.parametrize(
    "admit",
    [
        Admit(10, 0, 0, float("nan"), 1.0, 0),
        Admit(10, 0, 0, float("inf"), 1.0, 0),
        Admit(10, 0, 0, -0.1, 1.0, 0),
        Admit(10, 0, 0, 0.0, 0.0, 0),
        Admit(10, 0, 0, 0.0, 1.1, 0),
        Admit(10, 0, 0, 0.0, 1.0, -1),
        Admit(10, 2**64, 0, 0.0, 1.0, 0),
        Admit(99, 0, 0, 0.0, 1.0, 0),
    ],
    ids=repr,
)
def test_an_admission_that_makes_no_sense_is_not_sent(admit: Admit) -> None:
    with pytest.raises(FrameError):
        step_frame(admits=(admit,)).encode(RUN)


GOLDEN_STEP = {
    "tags": "5757010101000200",
    "run and frame": "083ce54e1b9165900900000000000000",
    "epoch, shape and sizes": "0300000003000000080000007400000060000000",
    "sum": "5e9bc1c12593bce4",
    "check of these": "c69772f0",
    "counts": "0300030002000100",
    "spans": "0a00000000000000010000800b00000001000000010000000c0000000200000001000080",
    "grants": "0a000000010000000a000000020000000b00000003000000",
    "ended": "0400000005000000",
    "admits": "0a000000ffffffffffffffff1100000000000000666666666666e63f666666666666ee3f28000000",
}


def test_the_wire_format_of_a_step_has_not_drifted() -> None:
    """Byte for byte, version 1: a new layout needs a new version number."""
    head = packed(step_frame())[: -4 * 8 * 3]
    ends = itertools.accumulate((8, 16, 20, 8, 4, 8, 3 * 12, 3 * 8, 2 * 4, 40), initial=0)
    parts = [head[start:end].hex() for start, end in itertools.pairwise(ends)]
    assert dict(zip(GOLDEN_STEP, parts, strict=True)) == GOLDEN_STEP
    assert len(head) == PREFIX_BYTES + 116


LIES = {
    "magic": {"magic": b"XX"},
    "kind": {"kind": 99},
    "dtype": {"dtype": 99},
    "no activation": {"dtype": Dtype.INT32},
    "rows": {"rows": 4},
    "columns": {"columns": 9},
    "no columns": {"columns": 0},
    "shape past the limit": {"rows": 2**31, "columns": 2**31, "codec": 1},
    "no header": {"header": 0},
    "header": {"header": 8},
    "huge header": {"header": MAX_HEADER_BYTES + 1},
    "huge payload": {"payload": MAX_FRAME_BYTES + 1, "codec": 1},
    "payload of a codec without rows": {"rows": 0, "codec": 1},
    "another kind": {"kind": Kind.SAMPLES},
    "control with a shape": {"kind": Kind.STOP},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_lie_in_a_rightly_summed_prefix_is_an_error(lie: dict[str, int]) -> None:
    with pytest.raises(FrameError):
        decode(read(resealed(packed(step_frame()), **lie)))


@pytest.mark.parametrize("size", [MAX_FRAME_BYTES + 1, 2**32 - 1])
@pytest.mark.parametrize("kind", Kind)
def test_a_lying_length_allocates_nothing(kind: Kind, size: int) -> None:
    raw = resealed(packed(Stop()), kind=kind, payload=size)
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            FrameReader().feed(raw)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**10
    finally:
        tracemalloc.stop()


def test_a_kind_without_a_place_on_the_connection_is_refused_by_its_prefix() -> None:
    with pytest.raises(FrameError, match="no place"):
        FrameReader(RING_KINDS).feed(packed(Rows(rows=()))[:PREFIX_BYTES])


def test_another_version_is_told_from_damage() -> None:
    with pytest.raises(VersionMismatchError):
        read(resealed(packed(Stop()), version=2))


def test_another_run_and_another_epoch_are_told_apart() -> None:
    label = read(packed(step_frame())).label
    check_place(label, RUN, 3)
    check_place(label, RUN, None)
    with pytest.raises(RunMismatchError):
        check_place(label, RUN + 1, 3)
    with pytest.raises(EpochMismatchError):
        check_place(label, RUN, 4)


JSON_LIES: dict[str, tuple[type[ControlMessage], bytes]] = {
    "no JSON": (Stop, b"{"),
    "no UTF-8": (Stop, b'{"reason": "\xff"}'),
    "a field too many": (Stop, b'{"pickle": 1}'),
    "a field missing": (Refused, b'{"reason": "", "cause": "run"}'),
    "a number as text": (Refused, b'{"reason": "", "cause": "run", "epoch": "3"}'),
    "NaN": (Heartbeat, b'{"busy_s":NaN}'),
    "a fraction": (Heartbeat, b'{"frames":1.5}'),
    "two peers of one name": (
        Topology,
        b'{"epoch":3,"peers":[{"name":"a","host":"h","port":1},{"name":"a","host":"h","port":2}],'
        b'"capacity":{"blocks":1}}',
    ),
    "a label that disagrees": (
        StepFailed,
        b'{"epoch":3,"frame":9,"slot":2,"sequences":[],"error_type":"E","message":""}',
    ),
    "nesting": (Stop, b"[" * 100_000),
}


@pytest.mark.parametrize(("message", "body"), JSON_LIES.values(), ids=JSON_LIES)
def test_json_that_is_no_message_is_an_error(message: type[ControlMessage], body: bytes) -> None:
    frame = Frame(Label(message.kind, RUN, 3), memoryview(b""), memoryview(body))
    with pytest.raises(FrameError):
        decode(frame)


def test_an_answer_counts_its_tokens_and_an_error_has_a_type() -> None:
    fields = CONTROL[7].answers[0].model_dump()  # type: ignore[union-attr]
    for lie in ({"output_tokens": 3}, {"finish_reason": "error"}, {"error_type": "E"}):
        with pytest.raises(ValueError, match=r"output_tokens|error"):
            Answer(**(fields | lie))


def test_an_errors_long_or_unwritable_text_still_travels() -> None:
    failed = StageFailed(node="a", error_type="E", message="\ud800" + "x" * 10**6)
    assert decode(read(packed(failed))) == failed


def mutations(count: int, seed: int) -> Iterator[bytes]:
    """Frames with bytes changed, cut, doubled or swapped; half of them with right sums again."""
    chance = random.Random(seed)
    frames = [packed(message) for message in MESSAGES]
    for number in range(count):
        raw = bytearray(chance.choice(frames))
        for _ in range(chance.randint(1, 3)):
            start = chance.randrange(len(raw))
            end = min(len(raw), start + chance.choice((1, 1, 4, 16)))
            change = chance.randrange(4)
            if change == 0:
                raw[start:end] = chance.randbytes(end - start)
            elif change == 1 and len(raw) > PREFIX_BYTES + 16:
                del raw[start:end]
            elif change == 2:
                raw[start:start] = raw[start:end]
            else:
                raw[start:end] = bytes(end - start)
        yield resealed(bytes(raw)) if number % 2 and len(raw) >= PREFIX_BYTES else bytes(raw)


def outcome(raw: bytes) -> str:
    try:
        decode(read(raw))
    except ProtocolError:
        return "refused"
    return "read"


def test_a_hundred_thousand_mutated_frames_are_read_or_refused() -> None:
    outcomes = Counter(outcome(raw) for raw in mutations(100_000, seed=20))
    assert outcomes["refused"] > 75_000


def test_mutated_frames_are_read_or_refused_in_bounded_memory() -> None:
    tracemalloc.start()
    try:
        for raw in mutations(2_000, seed=21):
            outcome(raw)
        # A claim within the limits may reserve its room; nothing may stay behind.
        assert tracemalloc.get_traced_memory()[0] < 16 * 2**20
    finally:
        tracemalloc.stop()


CODE_BEARING = {
    *("pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"),
    *("runpy", "code", "codeop"),
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__"),
    *("torch.load", "torch.jit", "torch.hub", "torch.package", "torch.serialization"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load"),
    *("yaml.full_load_all", "yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader"),
    *("numpy.load", "numpy.lib", "pandas.read_pickle"),
}
"""What makes code of bytes, by its full name; what lies below such a name is none the better."""
NAMES_OF_ALL = {"eval", "exec", "compile", "__import__"}


def code_bearing(tree: ast.AST) -> Iterator[str]:
    """Names in a program, whatever it calls them, by which bytes from elsewhere could become code."""
    aliases = {name: f"builtins.{name}" for name in NAMES_OF_ALL} | dict(imported(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from filter(is_code_bearing, (name for _, name in imported(node)))
        elif isinstance(node, ast.Name | ast.Attribute):
            first, dot, rest = ast.unparse(node).partition(".")
            name = aliases.get(first, "") + dot + rest
            if is_code_bearing(name):
                yield f"{name} in line {node.lineno}"


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What each import makes known, and the full name of that; of a star, what it may hide."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                yield each.asname or each.name.partition(".")[0], each.name
                if not each.asname:
                    yield each.name.partition(".")[0], each.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module:
            stars = [name for name in CODE_BEARING if name.rpartition(".")[0] == node.module]
            for each in node.names:
                names = stars if each.name == "*" else [f"{node.module}.{each.name}"]
                yield from ((each.asname or each.name, name) for name in names)


def is_code_bearing(name: str) -> bool:
    return any(name == each or name.startswith(each + ".") for each in CODE_BEARING)


@pytest.mark.parametrize("room", ["stages", "storage"])
def test_nothing_that_is_read_can_become_code(room: str) -> None:
    files = sorted((Path(__file__).parent.parent / room).rglob("*.py"))
    assert files
    found = {file.name: list(code_bearing(ast.parse(file.read_text()))) for file in files}
    assert not {name: what for name, what in found.items() if what}


@pytest.mark.parametrize(
    "program",
    [
        "import pickle",
        "import _pickle as p",
        "from cloudpickle import loads",
        "eval('1')",
        "import builtins\nbuiltins.eval('1')",
        "from builtins import eval as f",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')",
        "from torch import load",
        "from torch import nn, load as restored",
        "import torch\nread = torch.load",
        "import torch.jit\ntorch.jit.load('x')",
        "import torch.jit as j",
        "from torch import jit",
        "from torch.jit import load",
        "from yaml import load",
        "from yaml import *",
        "import yaml\nyaml.load('', yaml.Loader)",
        "import pandas as pd\npd.read_pickle('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
    ],
)
def test_that_check_would_see(program: str) -> None:
    assert list(code_bearing(ast.parse(program)))


@pytest.mark.parametrize(
    "program",
    [
        "import re\nre.compile('x')",
        "model.eval()",
        "import torch\nshard.load(torch.zeros(1))",
        "import yaml\nyaml.safe_load('')",
    ],
)
def test_that_check_would_let_pass(program: str) -> None:
    assert not list(code_bearing(ast.parse(program)))
