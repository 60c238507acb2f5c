"""
Every error of the driver, as a tree that tells the user what to do.

FlowError
  JobError           the job, its model or its input is wrong: mend it; nothing was started
  RunError           the run failed; committed rows are safe, run the same command again
    StageLostError   a stage process died or fell silent
    ServerError      the Prefect server did not start or went away
"""


class FlowError(Exception):
    """Base of the driver's errors."""


class JobError(FlowError):
    """The job, its model or its input is wrong; nothing was started."""


class RunError(FlowError):
    """The run failed; committed rows are safe and the same command continues."""


class StageLostError(RunError):
    """A stage process died or fell silent."""


class ServerError(RunError):
    """The Prefect server did not start or went away."""
