"""Reads JSONL, OpenAI-batch JSONL and CSV a line at a time; numbers lines from 1, rows from 0."""

import csv
import io
from collections.abc import Iterator
from itertools import chain, count
from typing import BinaryIO, NoReturn, cast

from storage.errors import InputError
from storage.files import shown
from storage.prompts import (
    MAX_LINE_BYTES,
    TEXT_SAMPLING,
    FieldNames,
    PromptRow,
    PromptSource,
    RawRow,
    RowReader,
    parse_json,
)

BOM = b"\xef\xbb\xbf"
READ_BYTES = 2**20

OPENAI_KEYS = {"custom_id", "method", "url", "body"}
OPENAI_SAMPLING = {
    "max_completion_tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "stop": "stop",
    "seed": "seed",
}
OPENAI_NEUTRAL: dict[str, object] = {
    "n": 1,
    "stream": False,
    "logprobs": False,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}
"""Accepted only with the value that changes nothing; a parameter is never ignored."""


def _lines(source: PromptSource, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines, numbered from 1, with their line ends; a byte order mark is dropped."""
    buffered = io.BufferedReader(cast(io.RawIOBase, file), READ_BYTES)  # it asks for readinto only
    for number in count(1):
        line = buffered.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        if number == 1:
            line = line.removeprefix(BOM)
        if len(line) > MAX_LINE_BYTES:
            fault = f"is longer than {MAX_LINE_BYTES} bytes; are its line ends missing?"
            raise InputError(shown(source.uri), fault, line=number)
        yield number, line


def _decoded(source: PromptSource, row: int, line: int, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        fault = f"is not UTF-8 at byte {error.start} of the line"
        raise _bad_line(source, row, line, fault) from error


def _bad_line(
    source: PromptSource, row: int, line: int, reason: str, column: str | None = None
) -> InputError:
    return InputError(shown(source.uri), reason, row=row, line=line, column=column)


# JSONL


def jsonl_rows(source: PromptSource, file: BinaryIO) -> Iterator[PromptRow]:
    """Plain lines, or OpenAI-batch lines: told apart by the first line, if no column is named."""
    objects = _objects(source, file)
    first = next(objects, None)
    if first is None:
        return iter(())
    objects = chain([first], objects)
    if not source.content_column and {"custom_id", "body"} <= first[2].keys():
        return _openai_rows(source, objects)
    return map(RowReader.of(source).row, _line_rows(source, objects))


def _objects(source: PromptSource, file: BinaryIO) -> Iterator[tuple[int, int, dict[str, object]]]:
    """(row, line, object) of every line that is not blank."""
    row = 0
    for line, content in _lines(source, file):
        if not content.strip():
            continue
        text = _decoded(source, row, line, content)
        try:
            value = parse_json(text)
        except ValueError as error:
            raise _bad_line(source, row, line, f"is no valid JSON: {error}") from error
        if not isinstance(value, dict):
            raise _bad_line(source, row, line, "is no JSON object")
        yield row, line, value
        row += 1


def _line_rows(
    source: PromptSource, objects: Iterator[tuple[int, int, dict[str, object]]]
) -> Iterator[RawRow]:
    """Rows of plain lines. A sampling key may be absent from a line, but not from all of them."""
    needed = [name for name in (source.id_column, source.content_column) if name]
    unseen = set(source.sampling_columns.values())
    chat = source.messages_column is not None
    row = -1
    for row, line, value in objects:
        for name in needed:
            if name not in value:
                raise _bad_line(source, row, line, "has no such key", name)
        unseen.difference_update(value)
        sampling = {name: value.get(column) for name, column in source.sampling_columns.items()}
        content = value[source.content_column]
        custom_id = value[source.id_column] if source.id_column else None
        yield RawRow(row, line, custom_id, chat, content, sampling)
    if unseen and row >= 0:
        raise source.fault("no line has this key", min(unseen))


# OpenAI-batch JSONL


def _openai_rows(
    source: PromptSource, objects: Iterator[tuple[int, int, dict[str, object]]]
) -> Iterator[PromptRow]:
    if source.id_column or source.sampling_columns:
        raise source.fault(
            "an OpenAI-batch file names its ids and sampling itself; name no columns"
        )
    words = {ours: f"body.{theirs}" for theirs, ours in OPENAI_SAMPLING.items()}
    names = FieldNames("custom_id", "body.prompt", "body.messages", words)
    reader = RowReader(source, names, with_ids=True)
    return (reader.row(_openai_row(source, *numbered)) for numbered in objects)


def _openai_row(source: PromptSource, row: int, line: int, request: dict[str, object]) -> RawRow:
    def refuse(reason: str, column: str) -> NoReturn:
        raise _bad_line(source, row, line, reason, column)

    if unknown := request.keys() - OPENAI_KEYS:
        refuse("is no key of a batch request", min(unknown))
    if "custom_id" not in request:
        refuse("is missing", "custom_id")
    body = request.get("body")
    if not isinstance(body, dict):
        refuse("is no object", "body")
    if ("prompt" in body) == ("messages" in body):
        refuse("needs one of prompt and messages", "body")
    if body.keys() >= {"max_tokens", "max_completion_tokens"}:
        refuse("is given beside max_tokens", "body.max_completion_tokens")
    chat = "messages" in body
    sampling: dict[str, object] = {}
    for key, value in body.items():
        if key in OPENAI_SAMPLING:
            sampling[OPENAI_SAMPLING[key]] = value
        elif key in OPENAI_NEUTRAL:
            if value is not None and value != OPENAI_NEUTRAL[key]:
                refuse(f"is {value!r}; only {OPENAI_NEUTRAL[key]!r} is supported", f"body.{key}")
        elif key not in ("model", "prompt", "messages"):  # the job's model answers
            refuse("is no parameter that is supported here", f"body.{key}")
    content = body["messages"] if chat else body["prompt"]
    return RawRow(row, line, request["custom_id"], chat, content, sampling)


# CSV


def csv_rows(source: PromptSource, file: BinaryIO) -> Iterator[RawRow]:
    records = _records(source, file)
    _, _, header = next(records, (0, 0, list[str]()))
    source.require_columns(header)
    at = {name: header.index(name) for name in source.columns}
    chat = source.messages_column is not None
    for row, line, cells in records:
        if len(cells) != len(header):
            fault = f"has {len(cells)} cells under a header of {len(header)}"
            raise _bad_line(source, row, line, fault)
        sampling = {
            name: _sampling_cell(name, cells[at[column]])
            for name, column in source.sampling_columns.items()
        }
        custom_id = cells[at[source.id_column]] if source.id_column else None
        yield RawRow(row, line, custom_id, chat, cells[at[source.content_column]], sampling)


def _records(source: PromptSource, file: BinaryIO) -> Iterator[tuple[int, int, list[str]]]:
    """(row, first line, cells); the header is row -1. Blank lines are no records."""
    csv.field_size_limit(MAX_LINE_BYTES)  # the module's own limit, 128 KiB, is below long prompts
    row, line = -1, 1
    lines = _lines(source, file)
    texts = (_decoded(source, max(row, 0), number, content) for number, content in lines)
    reader = csv.reader(texts, strict=True)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise _bad_line(source, max(row, 0), line, f"is no valid CSV: {error}") from error
        if cells is None:
            return
        if cells:
            yield row, line, cells
            row += 1
        line = reader.line_num + 1


def _sampling_cell(name: str, cell: str) -> object:
    """What a cell spells: nothing, a number, a list of texts; for `stop`, text as it stands."""
    if not cell:
        return None
    if name == TEXT_SAMPLING and not cell.startswith("["):
        return cell
    try:
        return parse_json(cell)
    except ValueError:
        return cell
