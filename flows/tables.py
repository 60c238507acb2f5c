"""How a query's result leaves: a table for people, JSON, CSV or Parquet for programs."""

import json
import sys
from collections import Counter
from contextlib import suppress
from decimal import Decimal
from enum import StrEnum

import pyarrow as pa
from pyarrow import csv as pa_csv
from pyarrow import parquet as pa_parquet
from rich.table import Table
from rich.text import Text

from flows.report import Screen, finite
from storage.errors import QueryError


class Format(StrEnum):
    """How a query's result is printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"


def say(text: str) -> None:
    """A text on standard output, as it is; who has stopped reading (`head`) misses the rest."""
    with suppress(BrokenPipeError):
        sys.stdout.write(text + "\n")


def print_json(document: object) -> None:
    """A document on standard output; what JSON lacks as text, but for numbers."""
    say(json.dumps(finite(document), indent=1, default=_as_json))


def print_table(table: pa.Table, fmt: Format) -> None:
    """A query's result on standard output; QueryError for what the format cannot hold."""
    if fmt is Format.TABLE:
        _print_for_people(table)
        return
    twice = [name for name, count in Counter(table.column_names).items() if count > 1]
    if twice:
        raise QueryError(f"two columns are named {twice[0]}; give one another name with `as`")
    try:
        if fmt is Format.JSON:
            print_json(table.to_pylist())
            return
        written = pa.BufferOutputStream()
        if fmt is Format.CSV:
            pa_csv.write_csv(_flat(table), written)
        else:
            pa_parquet.write_table(table, written)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise QueryError(f"{fmt} cannot hold this: {error}; cast it, to varchar say") from error
    with suppress(BrokenPipeError):
        sys.stdout.buffer.write(written.getvalue())


def _print_for_people(table: pa.Table) -> None:
    shown = Table()
    for name in table.column_names:
        shown.add_column(Text(name))
    for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
        # As text, for what stands in brackets would be taken for a colour.
        shown.add_row(*(Text("" if value is None else _plain(value)) for value in row))
    screen = Screen()
    # What is not read on a terminal is cut nowhere.
    (screen if screen.is_terminal else Screen(width=10_000)).print(shown)


def _flat(table: pa.Table) -> pa.Table:
    """Lists and records as JSON, for a format of lines."""
    for at, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):
            cells = table.column(at).to_pylist()
            texts = [None if c is None else json.dumps(finite(c), default=_as_json) for c in cells]
            table = table.set_column(at, field.name, pa.array(texts, pa.string()))
    return table


def _as_json(value: object) -> object:
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return _plain(value)


def _plain(value: object) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
