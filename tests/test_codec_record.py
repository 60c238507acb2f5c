"""What the codec's benchmark leaves behind."""

from pathlib import Path

import pytest

from benchmarks.codec import Claim, aimed_at, write

OURS: Claim = ("encode of fast over zstd-3", 1.5, 1.0, "ratio")
RIVAL: Claim = ("ratio of fast over zipnn", 1.006, 1.005, "ratio")
BESIDE: Claim = ("ratio of openzl", 1.2, None, "ratio")


def test_a_run_without_a_rival_that_we_aim_at_leaves_the_record_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "codec.json"
    write([OURS, RIVAL, BESIDE], path)
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="zipnn"):
        write([OURS, BESIDE], path)
    assert path.read_bytes() == before
    write([OURS, RIVAL], path)
    assert aimed_at(path) == {OURS[0], RIVAL[0]}
