"""How a run is laid out on this machine: stage processes, and the pipelines that they form."""

from dataclasses import dataclass

from flows.errors import JobError

MOST_PROCESSES = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """What the user asks for; JobError for more processes than any machine should have."""

    stages: int = 1
    """Stage processes: of each pipeline, or in all where the planner forms the pipelines."""
    pipelines: int | None = 1
    """Pipelines that share the rows; None: as the planner finds fastest."""
    stage_bytes: float | None = None
    """What each may take in all of the memory that it computes in; None: its share of what is free."""

    def __post_init__(self) -> None:
        if self.processes > MOST_PROCESSES:
            raise JobError(
                f"{self.pipelines} pipelines of {self.stages} stages are {self.processes} "
                f"processes; at most {MOST_PROCESSES} may run here"
            )

    @property
    def processes(self) -> int:
        """Stage processes in all."""
        return self.stages * (self.pipelines or 1)

    @property
    def orders(self) -> tuple[tuple[int, ...], ...] | None:
        """The numbers of each pipeline's processes, in ring order; None: the planner's choice."""
        if self.pipelines is None:
            return None
        firsts = range(0, self.processes, self.stages)
        return tuple(tuple(range(first, first + self.stages)) for first in firsts)


def layout_of(
    stages: int | None, pipelines: int | None, processes: int | None, stage_bytes: float | None
) -> Layout:
    """The layout of what was typed, None where nothing was; JobError for what does not go together."""
    if processes is None:
        return Layout(stages or 1, pipelines or 1, stage_bytes)
    if stages is not None or pipelines is not None:
        raise JobError(
            "--processes leaves stages and pipelines to the planner; "
            "name it alone, or --stages and --pipelines"
        )
    return Layout(processes, None, stage_bytes)
