"""
Every error of a stage, as a tree that tells the caller what to do.

StageError
  LinkError                worth relaunching: unfinished rows are computed again
    PeerClosedError        the other end went away
    LinkTimeoutError       nothing was heard for too long
  PeerRefusedError         never retried: the other end is not who the plan names
  ProtocolError            never retried: the two ends disagree about the wire
    FrameError             bytes that are no frame of ours: torn, flipped, or from a stranger
  ModelError               never retried: the model cannot be loaded or is not computed rightly here
    CheckpointError        a file or weight is missing, torn, or not safetensors
    UnsupportedModelError  a layer or flag that we would have to guess
    MissingPackageError    a package that the job's settings need is not installed on this node
  StepError                the step fails, and the rows that it names say so; the stage goes on
    NumericError           a NaN or infinity in an activation
    OutOfMemoryError       a row that does not fit into memory, not even alone
      KvRoomError          its keys and values do not, where a part of all of them is parked
  StreamError              never retried here: what leaves memory cannot be kept or read back
  PromptError              a row's own fault: it becomes that row's error
"""

from typing import ClassVar


class StageError(Exception):
    """Base of every error that a stage raises."""


class LinkError(StageError):
    """A connection failed; unfinished rows are computed again after a relaunch."""


class PeerClosedError(LinkError):
    """The other end closed the connection."""


class LinkTimeoutError(LinkError):
    """Nothing was heard from the other end for too long."""


class PeerRefusedError(StageError):
    """The other end is not the member that the plan names for that place."""


class ProtocolError(StageError):
    """The two ends disagree about the wire."""


class FrameError(ProtocolError):
    """Bytes that are no frame of ours."""


class ModelError(StageError):
    """The model cannot be loaded, or not computed rightly by this code."""


class CheckpointError(ModelError):
    """A file or weight of the checkpoint is missing, torn, or not safetensors."""


class UnsupportedModelError(ModelError):
    """A layer, flag or attention argument that we do not know; the message names it."""


class MissingPackageError(ModelError):
    """The job asks for what an extra of this project brings, and this node has not got it."""


class StreamError(StageError):
    """What leaves memory, layers or keys and values, cannot be kept elsewhere, or not be read back."""


class StepError(StageError):
    """A step cannot be computed for `sequences`; `kind` is the error_type of their rows."""

    kind: ClassVar[str]

    def __init__(self, message: str, sequences: tuple[int, ...]) -> None:
        super().__init__(message)
        self.sequences = sequences


class NumericError(StepError):
    """A NaN or infinity in an activation or a logit."""

    kind = "numeric_error"


class OutOfMemoryError(StepError):
    """No memory, for one row's part of a step or for what a stage holds for all of them."""

    kind = "out_of_memory"


class KvRoomError(OutOfMemoryError):
    """Keys and values that a part of a step sees do not fit at once: it says nothing of the next."""


class PromptError(StageError):
    """A row's own fault; `kind` is the row's error_type."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
