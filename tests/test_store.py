"""A job's folder: begun once, known by its fingerprint, on any filesystem that can commit."""

import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
from pydantic import JsonValue

from storage.errors import (
    CorruptStoreError,
    FingerprintError,
    JobNotFoundError,
    StoreError,
    UnsupportedStoreError,
)
from storage.files import Files, LocalFiles, ObjectFiles, files_at
from storage.store import JobStore, stored_jobs
from tests.stored import FINGERPRINT, begun, prompts_at, run


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The root of a store, as a local folder with a space in its name and as an object store."""
    if request.param == "local":
        yield str(tmp_path / "a store")
    else:
        name = f"memory://store-{uuid4().hex}"
        yield name
        memory = fsspec.filesystem("memory")
        for path in memory.find(name):
            memory.rm_file(path)


@pytest.fixture
def files(root: str) -> Files:
    return files_at(root)


def test_what_is_written_is_read(files: Files, tmp_path: Path) -> None:
    (tmp_path / "content").write_bytes(b"from a file")
    files.write("folder/a", b"first")
    files.write("folder/a", b"second")
    files.write("folder/b", tmp_path / "content")
    assert files.read("folder/a") == b"second"
    assert files.read("folder/b") == b"from a file"
    assert files.names("folder") == ["a", "b"]
    files.remove("folder/a")
    files.remove("folder/a")
    assert not files.exists("folder/a")
    assert files.names("nowhere") == []


def test_only_one_of_many_creates_a_file(files: Files) -> None:
    files.create("log/1", b"first")
    with pytest.raises(FileExistsError):
        files.create("log/1", b"second")
    assert files.read("log/1") == b"first"
    files.require_exclusive_create()
    assert files.names("log") == ["1"]


def test_of_threads_that_create_one_file_one_wins(tmp_path: Path) -> None:
    files, won = LocalFiles(tmp_path), []

    def create(number: int) -> None:
        try:
            files.create("entry", str(number).encode())
            won.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(number).encode() for number in won] == [files.read("entry")]
    assert files.names("") == ["entry"]


def test_a_filesystem_that_overwrites_what_it_should_create_is_refused() -> None:
    class Forgetful(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]
        def pipe_file(self, path: str, value: bytes, mode: str = "", **_: object) -> None:
            super().pipe_file(path, value, mode="overwrite")

    files = ObjectFiles(Forgetful(skip_instance_cache=True), "/bucket", "forgetful://bucket")
    with pytest.raises(UnsupportedStoreError, match="forgetful://bucket"):
        JobStore(files, "demo").begin(FINGERPRINT, {})


def test_a_folder_without_hard_links_is_refused(tmp_path: Path) -> None:
    class NoLinks(LocalFiles):
        def _link(self, temporary: Path, target: Path) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

    with pytest.raises(UnsupportedStoreError, match="no hard links"):
        JobStore(NoLinks(tmp_path), "demo").begin(FINGERPRINT, {})


def test_a_job_is_taken_up_again_under_the_same_fingerprint(root: str) -> None:
    JobStore.create(root, "demo", FINGERPRINT, {"name": "demo"})
    again = JobStore.create(root, "demo", dict(reversed(FINGERPRINT.items())), {"name": "x"})
    assert again.job_file().document == {"name": "demo"}
    assert stored_jobs(root) == ["demo"]


def test_another_fingerprint_is_refused_field_by_field(root: str) -> None:
    JobStore.create(root, "demo", FINGERPRINT, {})
    changed: dict[str, JsonValue] = {"model": "sha-2", "dtype": "float32", "lossy": True}
    with pytest.raises(
        FingerprintError, match="lossy was 'nothing', is True; model was 'sha-1'"
    ) as e:
        JobStore.create(root, "demo", changed, {})
    assert e.value.fields == ("lossy", "model")


def test_a_job_that_is_not_there_is_named_with_those_that_are(root: str) -> None:
    JobStore.create(root, "demo", FINGERPRINT, {})
    with pytest.raises(JobNotFoundError, match="no job 'other'; jobs there: demo"):
        JobStore.open(root, "other")


@pytest.mark.parametrize("name", ["../demo", "", ".hidden", "a/b", "x" * 200, "a'b"])
def test_a_name_that_could_leave_the_store_is_refused(root: str, name: str) -> None:
    with pytest.raises(StoreError, match="cannot name a job"):
        JobStore.create(root, name, FINGERPRINT, {})


def test_a_damaged_job_file_is_named(tmp_path: Path) -> None:
    store = JobStore.create(str(tmp_path), "demo", FINGERPRINT, {})
    (tmp_path / "demo/job.json").write_text("{")
    with pytest.raises(CorruptStoreError, match=r"job\.json is damaged"):
        store.job_file()


def test_the_input_is_recorded_once_for_each_change(tmp_path: Path) -> None:
    source = prompts_at(tmp_path / "p.parquet", ["A", "B"])
    store = begun(str(tmp_path / "store"), source)
    begun(str(tmp_path / "store"), source)
    assert store.snapshot().number == 1
    begun(str(tmp_path / "store"), prompts_at(tmp_path / "p.parquet", ["A", "C"]))
    begun(str(tmp_path / "store"), prompts_at(tmp_path / "p.parquet", ["A", "B"]))
    assert store.snapshot().number == 3
    assert len(store.files.names("index")) == 2


def test_a_log_with_a_gap_is_refused(tmp_path: Path) -> None:
    source = prompts_at(tmp_path / "p.parquet", ["A", "B", "C"])
    store = begun(str(tmp_path / "store"), source)
    run(store, source, commit_rows=1)
    store.files.remove("_log/00000002.json")
    with pytest.raises(CorruptStoreError, match=r"00000002\.json is missing"):
        store.snapshot()


def test_a_damaged_log_entry_is_named(tmp_path: Path) -> None:
    store = begun(str(tmp_path / "store"), prompts_at(tmp_path / "p.parquet", ["A"]))
    store.files.write("_log/00000001.json", b'{"kind": "append"}')
    with pytest.raises(CorruptStoreError, match=r"00000001\.json is no log entry"):
        store.snapshot()
