"""`wagonway doctor`: what it looks at, what it advises, what a script reads."""

import json
import resource
import socket

import pytest

from flows.cli import exit_status
from flows.doctor import Finding, examine
from stages.tcp import BBR_BUNDLE, OTHER_BUNDLE, link_habits, tune


def test_everything_is_looked_at_and_what_is_not_right_has_advice() -> None:
    found = {finding.name: finding for finding in examine()}
    expected = {
        "congestion control",
        "send buffer",
        "receive buffer",
        "clock",
        "open files",
        "memory",
    }
    assert expected | {"scratch folder", "Python", "torch", "prefect", "duckdb"} <= found.keys()
    assert all(bool(f.advice) == (f.verdict != "ok") for f in found.values())
    assert found["torch"].verdict == found["prefect"].verdict == "ok"


def test_what_it_says_of_links_is_what_links_do() -> None:
    found = {finding.name: finding for finding in examine()}
    habits = link_habits()
    assert found["congestion control"].found.startswith(habits.congestion_control)
    assert habits.bundle == (BBR_BUNDLE if habits.congestion_control == "bbr" else OTHER_BUNDLE)
    with socket.socket() as raw:
        tune(raw)
        assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= habits.send_bytes
        assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) <= habits.receive_bytes


def test_a_script_reads_findings_and_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    status = exit_status(["doctor", "--json"])
    findings = [Finding(**each) for each in json.loads(capsys.readouterr().out)]
    assert status == int(any(finding.verdict == "problem" for finding in findings))


def test_too_few_open_files_are_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        status = exit_status(["doctor"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    said = capsys.readouterr().out
    assert status == 1
    assert "problem open files: up to 256\n          `ulimit -n 1024`" in said
