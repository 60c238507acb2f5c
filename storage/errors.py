"""
Every error of storage, as a tree that tells the caller what to do.

StorageError
  InputError               the prompts are at fault: mend the file, row and column that it names
  StoreError               the store cannot be used like this; the message says what to do
    JobNotFoundError       no such job in this store
    FingerprintError       the store holds that job with another model, template or sampling
    CorruptStoreError      a file of the store is not what the log says was written
    UnsupportedStoreError  the filesystem cannot create a file exclusively: choose another
    CommitConflictError    other writers won every race: stop one of them, then run again
  DuplicateRowError        one writer was given the same row twice: a bug of the caller
  QueryError               the SQL is at fault, or asks for what queries may not do
"""


class StorageError(Exception):
    """Base of every error that storage raises."""


class InputError(StorageError):
    """Bad prompts. `row` counts from 0 as row_id does, `line` from 1; None where it has none."""

    def __init__(
        self,
        file: str,
        reason: str,
        *,
        row: int | None = None,
        line: int | None = None,
        column: str | None = None,
    ) -> None:
        self.file, self.row, self.line, self.column, self.reason = file, row, line, column, reason
        super().__init__(f"{file}{_place(row, line, column)}: {reason}")


class StoreError(StorageError):
    """The store cannot be used like this."""


class JobNotFoundError(StoreError):
    """No job of that name in the store."""


class FingerprintError(StoreError):
    """The store holds that job with another fingerprint; `fields` are those that differ."""

    def __init__(self, message: str, fields: tuple[str, ...]) -> None:
        super().__init__(message)
        self.fields = fields


class CorruptStoreError(StoreError):
    """A file of the store is missing, torn, or not what the log says."""


class UnsupportedStoreError(StoreError):
    """The filesystem under the store cannot create a file exclusively."""


class CommitConflictError(StoreError):
    """Other writers won the race for a log entry too often."""


class DuplicateRowError(StorageError):
    """The same row was appended twice to one writer."""


class QueryError(StorageError):
    """The SQL is wrong, or asks for what queries may not do."""


def _place(row: int | None, line: int | None, column: str | None) -> str:
    """Where in the file, in words; empty if only the file is known."""
    place = ""
    if row is not None:
        place += f", row {row} (counted from 0)"
    if line is not None:
        place += f", line {line}"
    if column is not None:
        place += f", column {column!r}"
    return place
