"""DuckDB over Arrow tables, datasets and streams: the one place that opens a connection."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import duckdb

from storage.errors import StoreError
from storage.scratch import Scratch


@contextmanager
def connection(tables: Mapping[str, object]) -> Iterator[duckdb.DuckDBPyConnection]:
    """An in-memory database that sees `tables` by name and no variable of the caller.

    What does not fit into memory spills to a scratch folder that is gone afterwards.
    """
    with (
        Scratch("sql") as scratch,
        duckdb.connect(":memory:", config={"temp_directory": str(scratch)}) as opened,
    ):
        opened.sql("set python_enable_replacements = false")
        opened.sql("set TimeZone = 'UTC'")
        for name, table in tables.items():
            opened.register(name, table)
        yield opened


@contextmanager
def own_query(subject: str) -> Iterator[None]:
    """For our own SQL: it fails only if a file or the machine does."""
    try:
        yield
    except duckdb.Error as error:
        first_line = str(error).splitlines()[0]
        raise StoreError(f"{subject}: {first_line}; `verify` names damaged files") from error
