"""A query's result is printed as it is, whatever stands in it, or is refused with a reason."""

import csv
import io
import json
import os
from datetime import timedelta
from decimal import Decimal

import pyarrow as pa
import pytest

from flows.report import Tally, shown
from flows.tables import Format, print_json, print_table, say
from storage.errors import QueryError

Out = pytest.CaptureFixture[bytes]


def printed(table: pa.Table, fmt: Format, out: Out) -> str:
    print_table(table, fmt)
    return out.readouterr().out.decode()


def test_people_read_brackets_and_columns_of_one_name_as_they_are(capfdbinary: Out) -> None:
    table = pa.table([["list[int]", "[/x] [red]b"], [1, None], [b"\xff", b"x"]], ["[t]", "t", "t"])
    text = printed(table, Format.TABLE, capfdbinary)
    for cell in ("[t]", "list[int]", "[/x] [red]b", "1", r"\xff"):
        assert cell in text
    assert "None" not in text


def test_json_has_numbers_where_sql_has_them(capfdbinary: Out) -> None:
    table = pa.table(
        {"sum": [Decimal(80)], "price": [Decimal("1.5")], "blob": [b"x"], "list": [[1, 2]]}
    )
    [row] = json.loads(printed(table, Format.JSON, capfdbinary))
    assert row == {"sum": 80, "price": 1.5, "blob": "x", "list": [1, 2]}


def test_csv_has_lists_and_records_as_json(capfdbinary: Out) -> None:
    table = pa.table({"n": [1], "basis": [["a", "b, c"]], "record": [{"x": 1}]})
    [row] = csv.DictReader(io.StringIO(printed(table, Format.CSV, capfdbinary)))
    assert (json.loads(row["basis"]), json.loads(row["record"])) == (["a", "b, c"], {"x": 1})


@pytest.mark.parametrize("fmt", [Format.JSON, Format.CSV, Format.PARQUET])
def test_programs_get_no_two_columns_of_one_name(fmt: Format, capfdbinary: Out) -> None:
    with pytest.raises(QueryError, match="two columns are named n"):
        print_table(pa.table([[1], [2]], ["n", "n"]), fmt)
    assert capfdbinary.readouterr().out == b""


def test_what_a_format_cannot_hold_is_said_and_nothing_is_printed(capfdbinary: Out) -> None:
    table = pa.table(
        {"d": pa.array([timedelta(1)]), "i": pa.array([(1, 2, 3)], pa.month_day_nano_interval())}
    )
    with pytest.raises(QueryError, match=r"csv cannot hold this.*cast it"):
        print_table(table, Format.CSV)
    assert capfdbinary.readouterr().out == b""


def test_a_reader_who_leaves_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        reading, writing = os.pipe()
        os.close(reading)
        monkeypatch.setattr(f"sys.{name}", os.fdopen(writing, "w", buffering=1))
    with shown(Tally(rows=2, answered=1, failed=0, earlier=0)):
        pass  # the last line is written at the end
    say("a line")
    print_json({})
    print_table(pa.table({"n": [1]}), Format.TABLE)
    print_table(pa.table({"n": [1]}), Format.CSV)
