"""The command line: reads what the user typed, calls one function, prints what came of it.

Exit status: 0 done, 1 some rows failed or the run failed, 2 the job, its input or the usage is wrong,
130 interrupted.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from flows.batch import run_batch
from flows.doctor import examine
from flows.embedded import control_plane
from flows.errors import JobError, RunError
from flows.imagine import (
    OURS,
    REHEARSED,
    REPLICATED,
    Course,
    job_workload,
    read_what_if,
    write_trace,
)
from flows.job import load_job
from flows.layout import MOST_PROCESSES, layout_of
from flows.measure import measure
from flows.planning import NOTHING, make_plan
from flows.ready import require_ready
from flows.tables import Format, print_json, print_table, say
from planner.advice import Advice, advise
from planner.baselines import METHODS, policy_of
from planner.explain import explain
from planner.leases import Policy
from planner.plan import Plan, as_mapping
from planner.simulate import Simulated
from storage.catalog import query as sql_query
from storage.errors import (
    FingerprintError,
    InputError,
    JobNotFoundError,
    QueryError,
    StorageError,
)
from storage.store import JobStore
from storage.verify import verify as verify_store

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
CONTINUES = "wagonway: finished rows are kept; the same command continues\n"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="A job file (YAML or JSON).")]
WHAT_IF = "A cluster that somebody imagines (YAML), in place of this machine."
OptionalJob = Annotated[Path | None, typer.Argument(metavar="[JOB]", help="A job file.")]
WhatIf = Annotated[Path | None, typer.Option("--what-if", help=WHAT_IF)]
Method = Annotated[
    str,
    typer.Option(
        help=f"How to plan for --what-if: {OURS} (most rows per second), {REPLICATED} (the same, but "
        f"nodes may share the work of a stage), {REHEARSED} (the first done in simulations), or as "
        f"published: {', '.join(METHODS)}."
    ),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="A job file, or a job's name.")]
OptionalName = Annotated[
    str | None, typer.Argument(metavar="[JOB]", help="A job file, or a job's name.")
]


def _named(store: str) -> str:
    """The store as it was given; JobError for none at all, which would mean the file system's root."""
    if not store:
        raise JobError("--store is empty; name a folder or an fsspec URI")
    return store


STORE = "The store: a folder or an fsspec URI."
Store = Annotated[str, typer.Option(help=STORE, callback=_named)]
Stages = Annotated[
    int | None,
    typer.Option(
        min=1, max=MOST_PROCESSES, metavar="N", show_default="1",
        help="Stage processes of a pipeline on this machine; they share its layers.",
    ),
]  # fmt: skip
Pipelines = Annotated[
    int | None,
    typer.Option(
        min=1, max=MOST_PROCESSES, metavar="K", show_default="1",
        help="Pipelines, each of --stages processes; they share the rows.",
    ),
]  # fmt: skip
Processes = Annotated[
    int | None,
    typer.Option(
        min=1, max=MOST_PROCESSES, metavar="P", show_default=False,
        help="Stage processes, in the pipelines that are planned to be fastest.",
    ),
]  # fmt: skip
StageMemory = Annotated[
    float | None,
    typer.Option(
        min=1e-3,
        metavar="GB",
        help="Memory that each stage may take; what it cannot hold of the model goes to disk.",
        show_default="its share of what is free",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]


@app.callback()
def wagonway() -> None:
    """Large offline LLM jobs on a few unequal nodes joined by slow links."""


@app.command()
def run(
    job_file: JobFile,
    store: Store = "store",
    stages: Stages = None,
    pipelines: Pipelines = None,
    processes: Processes = None,
    stage_memory: StageMemory = None,
    as_json: AsJson = False,
) -> None:
    """Answer every row of a job; safe to repeat: finished rows are not computed again."""
    layout = layout_of(stages, pipelines, processes, _bytes(stage_memory))
    job = load_job(job_file)
    _require_lasting(store)
    require_ready(job, store)  # before a server starts, which takes its time
    with control_plane():
        summary = run_batch(job, store, layout)
    if as_json:
        print_json(asdict(summary))
    else:
        rate = f"{summary.tokens_per_s:,.0f} tokens/s, {3600 * summary.rows_per_s:,.0f} rows/hour"
        say(
            f"{summary.job}: {summary.rows_ok:,} rows answered, {summary.rows_failed:,} failed, "
            f"{summary.rows_earlier:,} of them by earlier runs; {summary.seconds:.1f} s, {rate}"
        )
    raise typer.Exit(FAILED if summary.rows_failed else DONE)


@app.command()
def plan(
    job_file: OptionalJob = None,
    stages: Stages = None,
    pipelines: Pipelines = None,
    processes: Processes = None,
    stage_memory: StageMemory = None,
    cluster: WhatIf = None,
    method: Method = OURS,
    as_json: AsJson = False,
) -> None:
    """Say what a run would do and how long it would take, starting nothing.

    With --what-if, for a cluster that a YAML file describes instead of this machine.
    """
    job = load_job(job_file) if job_file else None
    advice: tuple[Advice, ...] = ()
    if cluster is not None:
        given = read_what_if(cluster, job)
        planned = given.plan(method)
        if method in {OURS, REPLICATED} and not as_json:
            advice = advise(given.cluster, given.model, given.work, planned)
    elif job is not None:
        layout = layout_of(stages, pipelines, processes, _bytes(stage_memory))
        work = job_workload(job)
        planned = make_plan(measure(job, layout), work, layout) if work.rows else NOTHING
    else:
        raise JobError("name a job, or a cluster with --what-if")
    if as_json:
        print_json(as_mapping(planned))
    else:
        say(explain(planned, advice))


@app.command(name="simulate")
def simulate_plan(  # noqa: PLR0913, PLR0917  a command's options are its parameters
    cluster: Annotated[Path, typer.Option("--what-if", help=WHAT_IF)],
    job_file: OptionalJob = None,
    method: Method = OURS,
    arrivals: Annotated[
        float | None,
        typer.Option(
            min=1e-9, help="Rows per second that come, as a Poisson process; else all wait."
        ),
    ] = None,
    policy: Annotated[
        Policy | None,
        typer.Option(
            help="Who takes the next row; ws-rr gives rows out as they come.",
            show_default="the method's own",
        ),
    ] = None,
    leave: Annotated[
        list[str] | None,
        typer.Option(metavar="NODE@SECONDS", help="A node leaves then; repeatable."),
    ] = None,
    join: Annotated[
        list[str] | None,
        typer.Option(metavar="NODE@SECONDS", help="A node of the file is there from then on only."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write every event there, one JSON object a line.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the rows' lengths and arrivals.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Play a plan event by event on imagined nodes: throughput, latencies, who is busy."""
    given = read_what_if(cluster, load_job(job_file) if job_file else None)
    course = Course(
        seed, arrivals, policy or policy_of(method), leave or (), join or (), trace is not None
    )
    planned = given.at_first(course).plan(method)
    seen = given.play(planned, course)
    if trace is not None:
        write_trace(trace, seen.trace)
    if as_json:
        document = asdict(replace(seen, trace=()))
        document |= {"tokens_per_s": seen.tokens_per_s, "rows_per_s": seen.rows_per_s}
        print_json(as_mapping(planned) | {"simulated": document})
        return
    say(_run_words(planned, seen))


def _run_words(planned: Plan, seen: Simulated) -> str:
    """A simulated run for people."""
    middle, late, last = seen.row_latency_s
    lines = [
        f"{seen.rows:,} rows in {seen.finish_s:,.1f} s: {seen.tokens_per_s:,.1f} output tokens/s "
        f"(the plan says {planned.tokens_per_s:,.1f}, and {planned.finish_s:,.1f} s)",
        f"a row takes {middle:,.2f} s; 95 % at most {late:,.2f} s, 99 % at most {last:,.2f} s; "
        f"its first token {seen.first_token_s[0]:,.2f} s, 95 % at most {seen.first_token_s[1]:,.2f} s",
    ]
    if seen.replans:
        times = "once" if seen.replans == 1 else f"{seen.replans} times"
        lines.append(f"planned again {times}; {seen.rows_again:,} rows were prefilled again")
    lines.extend(f"  {name}: busy {share:.0%}" for name, share in seen.busy.items())
    return "\n".join(lines)


@app.command()
def status(job: OptionalName = None, store: Store = "store", as_json: AsJson = False) -> None:
    """How far each job of the store is, or one job."""
    name = _job_name(job, store) if job else None
    print_table(sql_query(store, _STATUS, name), Format.JSON if as_json else Format.TABLE)
    if name is not None and not as_json:
        links = sql_query(store, _LINKS, name)
        if links.num_rows:
            print_table(links, Format.TABLE)


_STATUS = """
    select j.job, j.rows, j.rows_ok, j.rows_failed, j.rows_pending, j.verified,
           r.status as last_run, round(r.tokens_per_s, 1) as tokens_per_s, r.started_at
    from jobs j left join (
        select job, arg_max(status, started_at) as status, arg_max(tokens_per_s, started_at)
               as tokens_per_s, max(started_at) as started_at from runs group by job
    ) r using (job) order by j.job
"""

_LINKS = """
    select source, target, level, round(ratio, 2) as ratio, round(payload_bytes / 1e6, 1) as mb,
           round(seen_bytes_per_s * 8 / 1e6, 1) as mbit_per_s, round(seen_rtt_s * 1e3, 1) as rtt_ms,
           round(100 * seen_loss, 2) as loss_percent, frames_waiting as waiting,
           most_frames_waiting as at_most, frames_sent_again as sent_again, reconnects
    from links where payload_bytes > 0 and run_id = (select max(run_id) from links)
    order by source, target
"""


@app.command()
def query(
    sql: Annotated[str, typer.Argument(metavar="SQL", help="One statement that reads.")],
    store: Store = "store",
    job: Annotated[str | None, typer.Option(help="One job; all of the store otherwise.")] = None,
    fmt: Annotated[
        Format, typer.Option("--format", help="How to print the result.")
    ] = Format.TABLE,
) -> None:
    """Ask questions in SQL about prompts, results, errors, pending, jobs, runs, stages, links, nodes."""
    print_table(sql_query(store, sql, job), fmt)


@app.command()
def verify(job: JobName, store: Store = "store", as_json: AsJson = False) -> None:
    """Prove that every row of a job has exactly one result and that every file is whole."""
    found = verify_store(JobStore.open(store, _job_name(job, store)))
    if as_json:
        print_json(asdict(found) | {"complete": found.complete})
    else:
        lines = found.problems() or [f"{found.rows:,} rows, each with one result; all parts whole"]
        say("\n".join(lines))
    raise typer.Exit(DONE if found.complete else FAILED)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what of this host makes links slow or runs fail, and what to do about it."""
    findings = examine()
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            say(f"{finding.verdict:8}{finding.name}: {finding.found}")
            if finding.advice:
                say(f"{'':8}  {finding.advice}")
    wrong = any(finding.verdict == "problem" for finding in findings)
    raise typer.Exit(FAILED if wrong else DONE)


def _bytes(gigabytes: float | None) -> float | None:
    return None if gigabytes is None else gigabytes * 1e9


def _require_lasting(store: str) -> None:
    """JobError for a store that would be gone with this process."""
    if store.startswith("memory:"):
        raise JobError(f"{store}: would be gone when this command ends; name a folder or a bucket")


def _job_name(job: str, store: str) -> str:
    """A job's name, from its file or as the store has it; JobNotFoundError if there is neither."""
    if os.path.isfile(job):  # noqa: PTH113  (Path's raises for a name that is too long for a file)
        return load_job(Path(job)).name
    try:
        return JobStore.open(store, job).job
    except JobNotFoundError as error:
        raise JobNotFoundError(f"{error}; nor is there a job file of that name") from error


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `wagonway` and `python -m flows`."""
    status = exit_status(arguments)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):  # who read it has left; the work is done
            stream.flush()
    # Everything is closed by now. An ordinary exit would wait for Prefect's background threads, and
    # they keep DuckDB's types alive, of which its binding then complains for fifty lines.
    os._exit(status)


def exit_status(arguments: Sequence[str] | None = None) -> int:
    """Run the command: our errors become one line and a status; others are bugs, with traceback."""
    try:
        app(arguments)
    except SystemExit as ended:  # how typer ends every command, and refuses wrong usage
        status = int(ended.code or DONE)
        if status == INTERRUPTED:
            _complain(f"interrupted\n{CONTINUES}")
        return status
    except (JobError, InputError, FingerprintError, JobNotFoundError, QueryError) as error:
        _complain(f"{error}\n")
        return USAGE
    except RunError as error:
        _complain(f"{error}\n{CONTINUES}")
        return FAILED
    except StorageError as error:
        _complain(f"{error}\n")
        return FAILED
    raise AssertionError("typer ends every command by SystemExit")


def _complain(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody reads it; the exit status says it too
        sys.stderr.write(f"wagonway: {text}")


if __name__ == "__main__":
    main()
