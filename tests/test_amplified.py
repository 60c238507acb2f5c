"""Control messages that are made to cost their reader far more than their bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.control import Answers, LeasedRow, Rows, decode, messages_of
from stages.frame import MAX_CONTROL_BYTES, MAX_LEASE_BYTES, run_number
from stages.frame_reader import FrameReader
from tests.linked import answer

READER = """
import resource
import sys
import time
from stages.control import decode
from stages.errors import FrameError
from stages.frame import Frame, Kind, Label, seal

kind, limit, opening, piece, closing = sys.argv[1], int(sys.argv[2]), *map(str.encode, sys.argv[3:])
if piece == b"keys":
    inside = b",".join(b'"%x":0' % number for number in range(limit // 11))
else:
    inside = (piece + b",") * ((limit - len(opening) - len(closing)) // (len(piece) + 1) - 1) + piece
body = opening + inside + closing
packet = seal(Label(Kind[kind], 1, 1), b"", body)
frame = Frame(Label(Kind[kind], 1, 1), memoryview(b""), packet.payload)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started_s = time.process_time()
try:
    decode(frame)
except FrameError as error:
    assert len(str(error)) < 500
else:
    raise SystemExit("it was read")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(len(body), peak * 1024, time.process_time() - started_s)
"""
ROW = (
    '{"rows":[{"row":1,"key":1,"seed":1,"max_new_tokens":1,"temperature":0.0,"top_p":1.0,"top_k":0,'
    '"token_ids":['
)
HOSTILE = {
    "lists": ("ROWS", MAX_LEASE_BYTES, '{"rows":[', "[]", "]}"),
    "numbers": ("ANSWERS", MAX_LEASE_BYTES, '{"answers":[', "0", "]}"),
    "objects": ("ROWS", MAX_LEASE_BYTES, '{"rows":[', '{"a":0}', "]}"),
    "empty objects": ("ROWS", MAX_LEASE_BYTES, '{"rows":[', "{}", "]}"),
    "strings": ("ROWS", MAX_LEASE_BYTES, '{"rows":[', '""', "]}"),
    "quotes": ("ROWS", MAX_LEASE_BYTES, '{"rows":["', '\\"', ""),
    "keys": ("ROWS", MAX_LEASE_BYTES, '{"rows":[{', "keys", "}]}"),
    "ids": ("ROWS", MAX_LEASE_BYTES, ROW, "0", "]}]}"),
    "lists in place of ids": ("ROWS", MAX_LEASE_BYTES, ROW, "[]", "]}]}"),
    "keys of a report": ("HEARTBEAT", MAX_CONTROL_BYTES, '{"links":[{', "keys", "}]}"),
    "objects in place of reports": ("HEARTBEAT", MAX_CONTROL_BYTES, '{"links":[', "{}", "]}"),
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_a_message_made_to_swell_takes_bounded_memory_and_time(
    body: tuple[str, int, str, str, str],
) -> None:
    told = subprocess.run(
        [sys.executable, "-c", READER, *map(str, body)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    body_bytes, peak_bytes, cpu_s = map(float, told.stdout.split())
    assert body_bytes > 0.5 * body[1]
    assert peak_bytes < 40 * MAX_LEASE_BYTES
    assert cpu_s < 5


def leased(row: int, tokens: int, stop: str = "") -> LeasedRow:
    return LeasedRow(
        row=row, key=0, seed=0, token_ids=(2**31 - 1,) * tokens, max_new_tokens=1,
        temperature=0.0, top_p=1.0, top_k=0, stop=(stop,) * 64 if stop else (),
    )  # fmt: skip


def test_leases_are_split_into_messages_that_their_reader_takes() -> None:
    rows = [
        *(leased(number, 400_000) for number in range(5)),
        leased(5, 2**20, stop="\x01" * 4096),
        *(leased(number, 1) for number in range(6, 10_000)),
    ]
    parts = list(messages_of(rows))
    read: list[LeasedRow] = []
    for part in parts:
        packet = Rows(rows=part).encode(run_number("run-1"))
        (frame,) = FrameReader().feed(bytes(packet))
        message = decode(frame)
        assert isinstance(message, Rows)
        read += message.rows
    assert read == rows
    assert len(parts) < 10


def test_answers_are_split_into_messages_that_their_reader_takes() -> None:
    answers = [answer(number, "\x01" * 1_000_000) for number in range(6)]
    parts = list(messages_of(answers))
    for part in parts:
        Answers(answers=part).encode(run_number("run-1"))
    assert [each for part in parts for each in part] == answers
    assert 1 < len(parts) < 6
