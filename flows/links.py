"""What the ends of a run's links have counted and seen, a row for each link; for the run's summary."""

from collections.abc import Iterator, Mapping

from stages.control import Heartbeat, LinkReport

Row = dict[str, object]


def link_rows(
    vitals: Mapping[str, Heartbeat], driver: str, control: Mapping[str, LinkReport]
) -> Iterator[Row]:
    """
    Every link of the run: data as their senders report them, control as the driver does.

    `vitals` holds the stages' heartbeats and `control` the driver's own ends, by stage.
    """
    for name, beat in vitals.items():
        for report in beat.links:
            if report.payload_bytes_sent:  # else it is the other end, which acknowledges
                yield _data_row(name, report, beat, _acks_of(vitals.get(report.peer), name))
    for name, report in control.items():
        yield _control_row(driver, name, report.frames_sent, report.tls_bytes_sent)
        yield _control_row(name, driver, report.frames_received, report.tls_bytes_received)


def _data_row(source: str, report: LinkReport, beat: Heartbeat, ack_bytes: int) -> Row:
    return {
        "source": source,
        "target": report.peer,
        "level": report.level or None,
        "frames": report.frames_sent,
        "tokens": beat.tokens,
        "activation_bytes": report.activation_bytes,
        "payload_bytes": report.payload_bytes_sent,
        "framing_bytes": report.framing_bytes_sent,
        "control_bytes": report.control_bytes_sent,
        "ack_bytes": ack_bytes,
        "wire_bytes": report.tls_bytes_sent,
        "ratio": _share(report.activation_bytes, report.coded_bytes),
        "seen_bytes_per_s": report.bytes_per_s or None,
        "seen_rtt_s": report.rtt_s or None,
        "seen_loss": _share(report.segments_sent_again, report.segments_sent),
        "blocked_s": report.blocked_s,
        "frames_waiting": report.frames_waiting,
        "most_frames_waiting": report.most_frames_waiting,
        "frames_sent_again": report.frames_sent_again,
        "reconnects": report.reconnects,
        "congestion_control": report.congestion_control,
    }


def _control_row(source: str, target: str, frames: int, nbytes: int) -> Row:
    return {
        "source": source,
        "target": target,
        "frames": frames,
        "control_bytes": nbytes,
        "wire_bytes": nbytes,
    }


def _acks_of(target: Heartbeat | None, source: str) -> int:
    """Bytes that the target of a data link sent back to acknowledge frames."""
    reports = target.links if target is not None else ()
    return sum(report.ack_bytes_sent for report in reports if report.peer == source)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
