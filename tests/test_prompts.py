"""What the input may hold, and how each fault of it is named."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.errors import InputError
from storage.formats import read_rows
from storage.index import built_index
from storage.prompts import MAX_ID_CHARACTERS, PromptRow, PromptSource

Write = Callable[[str, bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return put


def plain(uri: str, **columns: str) -> PromptSource:
    return PromptSource(uri, id_column="id", prompt_column="prompt", sampling_columns=columns)


def chat(uri: str) -> PromptSource:
    return PromptSource(uri, id_column="id", messages_column="messages")


def rows_of(source: PromptSource) -> list[PromptRow]:
    return list(read_rows(source))


def parquet(path: Path, **columns: pa.Array) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def fault_of(source: PromptSource) -> InputError:
    """The fault that validation finds; whatever it is, it names the file."""
    with pytest.raises(InputError) as raised, built_index(source):
        pass
    assert raised.value.file == source.uri
    assert source.uri in str(raised.value)
    return raised.value


JSONL = b'{"id": "a", "prompt": "Say A."}\n{"id": "b", "prompt": "Sag \xc3\x84."}\n'
CSV = b"id,prompt\na,Say A.\nb,Sag \xc3\x84.\n"


def test_the_same_rows_are_read_from_parquet_jsonl_and_csv(tmp_path: Path, write: Write) -> None:
    ids, texts = pa.array(["a", "b"]), pa.array(["Say A.", "Sag Ä."])
    from_parquet = rows_of(plain(parquet(tmp_path / "p.parquet", id=ids, prompt=texts)))
    assert [(row.row_id, row.custom_id, row.prompt) for row in from_parquet] == [
        (0, "a", "Say A."),
        (1, "b", "Sag Ä."),
    ]
    assert rows_of(plain(write("p.jsonl", JSONL))) == from_parquet
    assert rows_of(plain(write("p.csv", CSV))) == from_parquet


def test_any_fsspec_uri_is_an_input() -> None:
    fsspec.filesystem("memory").pipe_file("/inputs/p.jsonl", JSONL)
    assert [row.custom_id for row in rows_of(plain("memory://inputs/p.jsonl"))] == ["a", "b"]


def test_the_format_shows_in_the_first_bytes_where_the_name_says_nothing(
    tmp_path: Path, write: Write
) -> None:
    parquet(tmp_path / "first", id=pa.array(["a"]), prompt=pa.array(["A"]))
    assert len(rows_of(plain(str(tmp_path / "first")))) == 1
    assert len(rows_of(plain(write("second", JSONL)))) == 2
    assert "unknown format" in fault_of(plain(write("third", b"what is this"))).reason


def test_byte_order_mark_crlf_and_blank_lines_change_nothing(write: Write) -> None:
    expected = rows_of(plain(write("plain.jsonl", JSONL)))
    windows = b"\xef\xbb\xbf\r\n" + JSONL.replace(b"\n", b"\r\n\r\n") + b"  \r\n"
    assert rows_of(plain(write("windows.jsonl", windows))) == expected
    windows = b"\xef\xbb\xbf" + CSV.replace(b"\n", b"\r\n") + b"\r\n"
    assert rows_of(plain(write("windows.csv", windows))) == expected


def test_messages_are_lists_of_objects_or_json_text(tmp_path: Path, write: Write) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    as_list = parquet(tmp_path / "l.parquet", id=pa.array(["a"]), messages=pa.array([turns]))
    as_text = parquet(
        tmp_path / "t.parquet", id=pa.array(["a"]), messages=pa.array([json.dumps(turns)])
    )
    line = json.dumps({"id": "a", "messages": turns}).encode()
    [row] = rows_of(chat(as_list))
    assert row.messages == turns
    assert (row.prompt, row.length) == (None, len("Be brief.Hi"))
    assert rows_of(chat(as_text)) == rows_of(chat(write("m.jsonl", line))) == [row]


def test_openai_batch_lines_are_known_by_their_keys(write: Write) -> None:
    body = {"model": "any", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    request = {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    completion = {"custom_id": "r2", "body": {"prompt": "Hello", "stop": "\n", "n": 1}}
    lines = "\n".join(map(json.dumps, (request, completion)))
    first, second = rows_of(PromptSource(write("batch.jsonl", lines.encode())))
    assert (first.custom_id, first.messages, first.sampling) == (
        "r1",
        [{"role": "user", "content": "Hi"}],
        {"max_new_tokens": 5},
    )
    assert (second.custom_id, second.prompt, second.sampling) == ("r2", "Hello", {"stop": ["\n"]})


@pytest.mark.parametrize(
    ("body", "column"),
    [
        ({"prompt": "x", "logit_bias": {}}, "body.logit_bias"),
        ({"prompt": "x", "n": 2}, "body.n"),
        ({"prompt": "x", "messages": []}, "body"),
        ({"prompt": ["x", "y"]}, "body.prompt"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "body.messages[0].content",
        ),
        ({"prompt": "x", "temperature": "hot"}, "body.temperature"),
        ("text", "body"),
    ],
)
def test_an_openai_parameter_that_we_cannot_honour_is_refused(
    write: Write, body: object, column: str
) -> None:
    good = json.dumps({"custom_id": "r1", "body": {"prompt": "x"}})
    bad = json.dumps({"custom_id": "r2", "body": body})
    fault = fault_of(PromptSource(write("batch.jsonl", f"{good}\n{bad}".encode())))
    assert (fault.row, fault.line, fault.column) == (1, 2, column)


def test_sampling_columns_override_where_they_hold_something(tmp_path: Path, write: Write) -> None:
    columns = {"max_new_tokens": "max_len", "temperature": "t", "stop": "end"}
    path = parquet(
        tmp_path / "p.parquet",
        id=pa.array(["a", "b"]),
        prompt=pa.array(["A", "B"]),
        max_len=pa.array([7, None]),
        t=pa.array([None, 0.5]),
        end=pa.array([["x", "y"], None]),
    )
    expected = [{"max_new_tokens": 7, "stop": ["x", "y"]}, {"temperature": 0.5}]
    assert [row.sampling for row in rows_of(plain(path, **columns))] == expected
    table = b'id,prompt,max_len,t,end\na,A,7,,"[""x"", ""y""]"\nb,B,,0.5,\n'
    assert [row.sampling for row in rows_of(plain(write("p.csv", table), **columns))] == expected


def test_sampling_is_part_of_what_a_row_asks(write: Write) -> None:
    lines = b'{"id": "a", "prompt": "A", "n": 1}\n{"id": "b", "prompt": "A", "n": 2}'
    first, second = rows_of(plain(write("p.jsonl", lines), max_new_tokens="n"))
    assert first.input_hash != second.input_hash
    assert first.prefix_hash == second.prefix_hash


def test_text_columns_of_every_kind_are_text(tmp_path: Path) -> None:
    kinds = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    for kind in kinds:
        texts = pa.array(["A", "B"]).cast(kind)
        path = parquet(tmp_path / "p.parquet", id=pa.array([10, 11]), prompt=texts)
        assert [(row.custom_id, row.prompt) for row in rows_of(plain(path))] == [
            ("10", "A"),
            ("11", "B"),
        ]


def test_an_empty_prompt_is_a_row_and_no_fault(write: Write) -> None:
    assert [row.prompt for row in rows_of(plain(write("p.csv", b'id,prompt\na,""\n')))] == [""]


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.parquet"])
def test_an_input_without_rows_is_valid(tmp_path: Path, write: Write, name: str) -> None:
    if name.endswith("parquet"):
        empty = pa.array([], pa.string())
        uri = parquet(tmp_path / name, id=empty, prompt=empty)
    else:
        uri = write(name, b"id,prompt\n" if name.endswith("csv") else b"\n")
    with built_index(plain(uri)) as index:
        assert index.rows == 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty (0 bytes)"),
        (b"hello", "starts with b'hell'"),
        (b"PAR1", "torn"),
        (b"PAR1" + bytes(500), "torn"),
        (b"PARE" + bytes(500), "encrypted"),
    ],
)
def test_what_is_no_parquet_file_is_refused(write: Write, content: bytes, reason: str) -> None:
    assert reason in fault_of(plain(write("p.parquet", content))).reason


def test_a_torn_parquet_file_is_refused(tmp_path: Path, write: Write) -> None:
    texts = pa.array([f"prompt {n}" for n in range(1000)])
    whole = Path(parquet(tmp_path / "p.parquet", id=texts, prompt=texts)).read_bytes()
    assert "torn" in fault_of(plain(write("half.parquet", whole[: len(whole) // 2]))).reason


def test_damaged_pages_are_named_by_row(tmp_path: Path, write: Write) -> None:
    texts = pa.array([f"{n:0200d}" for n in range(20_000)])
    pq.write_table(pa.table({"id": texts, "prompt": texts}), tmp_path / "p.parquet")
    content = bytearray((tmp_path / "p.parquet").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = b"\xff" * 2000
    fault = fault_of(plain(write("bad.parquet", bytes(content))))
    assert fault.row is not None


def test_parquet_under_a_name_of_text_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "p.csv", id=pa.array(["a"]), prompt=pa.array(["A"]))
    assert "rename it" in fault_of(plain(path)).reason


TEXT_ID, TEXT = pa.array(["a", "b"]), pa.array(["A", "B"])
NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"A\xff")]
)


@pytest.mark.parametrize(
    ("ids", "prompts", "row", "column"),
    [
        (TEXT_ID, pa.array(["A", None]), 1, "prompt"),
        (TEXT_ID, pa.array([None, None]), 0, "prompt"),
        (TEXT_ID, pa.array([1, 2]), 0, "prompt"),
        (TEXT_ID, pa.array([b"A", b"B"]), 0, "prompt"),
        (TEXT_ID, pa.array([["A"], ["B"]]), 0, "prompt"),
        (TEXT_ID, pa.array([{"x": "A"}, {"x": "B"}]), 0, "prompt"),
        (TEXT_ID, pa.array(["A", "B\0"]), 1, "prompt"),
        (TEXT_ID, NOT_UTF8, 1, "prompt"),
        (pa.array(["a", None]), TEXT, 1, "id"),
        (pa.array(["a", ""]), TEXT, 1, "id"),
        (pa.array(["a", "  "]), TEXT, 1, "id"),
        (pa.array(["a", "a"]), TEXT, 1, "id"),
        (pa.array(["a", "b" * (MAX_ID_CHARACTERS + 1)]), TEXT, 1, "id"),
        (pa.array([1.0, 2.0]), TEXT, 0, "id"),
        (pa.array([True, False]), TEXT, 0, "id"),
    ],
)
def test_a_bad_cell_is_named_by_row_and_column(
    tmp_path: Path, ids: pa.Array, prompts: pa.Array, row: int, column: str
) -> None:
    fault = fault_of(plain(parquet(tmp_path / "p.parquet", id=ids, prompt=prompts)))
    assert (fault.row, fault.column) == (row, column)


@pytest.mark.parametrize(
    ("line", "column", "reason"),
    [
        (b'{"id": "b", "prompt": "B"', None, "no valid JSON"),
        (b'["b", "B"]', None, "no JSON object"),
        (b'{"id": "b", "id": "c", "prompt": "B"}', None, "'id' is there twice"),
        (b'{"id": "b", "prompt": "\xff"}', None, "not UTF-8 at byte 23"),
        (b'{"id": "b", "prompt": "\\ud800"}', "prompt", "lone surrogate"),
        (b'{"id": "b\\u0000", "prompt": "B"}', "id", "NUL"),
        (b'{"id": "b"}', "prompt", "no such key"),
        (b'{"prompt": "B"}', "id", "no such key"),
        (b'{"id": "b", "prompt": 5}', "prompt", "holds a number"),
        (b'{"id": "b", "prompt": "B", "t": NaN}', "t", "finite"),
        (b'{"id": "b", "prompt": "B", "t": 1e999}', "t", "finite"),
        (b'{"id": "b", "prompt": "B", "t": true}', "t", "true or false"),
        (b'{"id": "b", "prompt": "B", "t": "hot"}', "t", "holds text"),
        (b"[" * 100_000, None, "no valid JSON"),
    ],
)
def test_a_bad_line_is_named_by_row_and_line(
    write: Write, line: bytes, column: str | None, reason: str
) -> None:
    lines = b'{"id": "a", "prompt": "A", "t": 1}\n\n' + line + b"\n"
    fault = fault_of(plain(write("p.jsonl", lines), temperature="t"))
    assert (fault.row, fault.line, fault.column) == (1, 3, column)
    assert reason in fault.reason


@pytest.mark.parametrize(
    ("turns", "column"),
    [
        (None, "messages"),
        ("not json", "messages"),
        ({"role": "user"}, "messages"),
        (["Hi"], "messages[0]"),
        ([{"role": "user", "content": "Hi"}, {"content": "Hi"}], "messages[1].role"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content"),
        ([{"role": "user", "content": "Hi", "tool_calls": [1]}], "messages[0].tool_calls"),
    ],
)
def test_bad_messages_are_named_to_the_turn(write: Write, turns: object, column: str) -> None:
    line = json.dumps({"id": "a", "messages": turns}).encode()
    assert fault_of(chat(write("m.jsonl", line))).column == column


@pytest.mark.parametrize(
    ("table", "row", "line", "reason"),
    [
        (b"id,prompt\na,A\nb\n", 1, 3, "1 cells under a header of 2"),
        (b'id,prompt\na,A\nb,"B\n', 1, 3, "no valid CSV"),
        (b"id,prompt\na,A\nb,\xff\n", 1, 3, "not UTF-8"),
        (b'id,prompt\na,"A\nA"\n,B\n', 1, 4, "no id"),
    ],
)
def test_a_bad_record_is_named_by_row_and_line(
    write: Write, table: bytes, row: int, line: int, reason: str
) -> None:
    fault = fault_of(plain(write("p.csv", table)))
    assert (fault.row, fault.line) == (row, line)
    assert reason in fault.reason


def test_nan_in_a_sampling_column_is_refused(tmp_path: Path, write: Write) -> None:
    floats = pa.array([0.5, math.nan])
    path = parquet(tmp_path / "p.parquet", id=TEXT_ID, prompt=TEXT, t=floats)
    fault = fault_of(plain(path, temperature="t"))
    assert (fault.row, fault.column) == (1, "t")
    fault = fault_of(plain(write("p.csv", b"id,prompt,t\na,A,NaN\n"), temperature="t"))
    assert (fault.row, fault.column) == (0, "t")


@pytest.mark.parametrize("name", ["p.parquet", "p.csv", "p.jsonl"])
def test_a_missing_column_is_named(tmp_path: Path, write: Write, name: str) -> None:
    uri = {
        "p.parquet": lambda: parquet(tmp_path / name, id=TEXT_ID, prompt=TEXT),
        "p.csv": lambda: write(name, CSV),
        "p.jsonl": lambda: write(name, JSONL),
    }[name]()
    assert fault_of(plain(uri, temperature="heat")).column == "heat"


def test_a_column_named_twice_is_refused(write: Write) -> None:
    assert fault_of(plain(write("p.csv", b"id,prompt,id\na,A,b\n"))).column == "id"


def test_one_column_may_serve_twice(tmp_path: Path) -> None:
    path = parquet(tmp_path / "p.parquet", prompt=pa.array(["A"]))
    [row] = rows_of(PromptSource(path, id_column="prompt", prompt_column="prompt"))
    assert (row.custom_id, row.prompt) == ("A", "A")


def test_a_source_needs_one_column_to_ask_from(write: Write) -> None:
    uri = write("p.jsonl", JSONL)
    assert "name one of" in fault_of(PromptSource(uri)).reason
    both = PromptSource(uri, prompt_column="prompt", messages_column="prompt")
    assert "name one of" in fault_of(both).reason


def test_a_file_that_cannot_be_opened_is_an_input_error(tmp_path: Path) -> None:
    assert "no such file" in fault_of(plain(str(tmp_path / "none.csv"))).reason
    assert "folder" in fault_of(plain(str(tmp_path))).reason
    assert "cannot be opened" in fault_of(plain("nosuchprotocol://x/p.csv")).reason


def test_no_message_carries_a_secret() -> None:
    source = plain("nosuchprotocol://user:secret@host/p.csv?signature=secret")
    with pytest.raises(InputError) as raised:
        rows_of(source)
    assert raised.value.file == "nosuchprotocol://host/p.csv"


def test_a_line_of_ten_megabytes_is_a_row(write: Write) -> None:
    line = json.dumps({"id": "a", "prompt": "x" * 10_000_000}).encode()
    assert rows_of(plain(write("p.jsonl", line)))[0].length == 10_000_000
    assert rows_of(plain(write("p.csv", b"id,prompt\na," + b"x" * 200_000)))[0].length == 200_000


PEAK = """
import resource, sys
from storage.formats import read_rows
from storage.prompts import PromptSource
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
rows = sum(1 for _ in read_rows(PromptSource(sys.argv[1], "id", "prompt")))
print(rows, peak() - before)
"""


@pytest.mark.parametrize("name", ["p.parquet", "p.jsonl", "p.csv"])
def test_a_large_file_never_sits_in_memory(tmp_path: Path, name: str) -> None:
    rows, path = 60_000, tmp_path / name
    ids, texts = [f"row-{n}" for n in range(rows)], [f"{n:02500d}" for n in range(rows)]
    if name == "p.parquet":  # a single row group: the hardest case
        pq.write_table(pa.table({"id": ids, "prompt": texts}), path, compression="none")
    else:
        with path.open("w") as file:
            file.write("id,prompt\n" if name == "p.csv" else "")
            for custom_id, text in zip(ids, texts, strict=True):
                line = {"id": custom_id, "prompt": text}
                file.write(f"{custom_id},{text}\n" if name == "p.csv" else json.dumps(line) + "\n")
    assert path.stat().st_size > 150_000_000
    output = subprocess.check_output([sys.executable, "-c", PEAK, str(path)], text=True)
    read, grown_bytes = map(int, output.split())
    assert read == rows
    assert grown_bytes < 60_000_000
