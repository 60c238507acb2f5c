"""What can be said of a job at once: no server and no node is asked, and nothing is left behind."""

from flows.errors import JobError
from flows.job import Job
from flows.model import ModelFolder, open_model
from flows.run import fingerprint, prompt_source
from storage.errors import CorruptStoreError, FingerprintError, StoreError
from storage.export import require_own, require_target
from storage.formats import read_rows
from storage.store import JobStore


def require_ready(job: Job, store_uri: str) -> ModelFolder:
    """The job's model, if its prompts open and its store and target can be written.

    JobError or InputError otherwise, or FingerprintError where the store holds another job under
    this name. Of the prompts only the first row is read.
    """
    model = open_model(job)
    next(read_rows(prompt_source(job)), None)
    try:
        JobStore.require_usable(store_uri, job.name, fingerprint(job, model))
    except (FingerprintError, CorruptStoreError):
        raise
    except StoreError as error:
        raise JobError(f"store: {error}") from error
    if job.results is not None:
        try:
            require_target(job.results)
            require_own(job.results, job.name)
        except StoreError as error:
            raise JobError(f"results: {error}") from error
    return model
