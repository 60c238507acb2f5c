"""Whole files, made durable, under one root: a local folder, or any other fsspec filesystem.

Knows bytes and names, not rows. A name is relative to the root and uses "/". The filesystem's own
errors become StoreError, save FileNotFoundError of a read and FileExistsError of a create: answers.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from storage.errors import StoreError, UnsupportedStoreError

NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class Files(Protocol):
    """What a store needs of a filesystem."""

    shown: str
    """The root, for messages: without passwords or signatures."""

    @property
    def root(self) -> Path | None:
        """The folder, if other code may open its files by their paths."""

    def read(self, name: str) -> bytes: ...
    def names(self, folder: str) -> list[str]: ...
    def exists(self, name: str) -> bool: ...
    def write(self, name: str, content: bytes | Path) -> None: ...
    def create(self, name: str, content: bytes) -> None: ...
    def remove(self, name: str) -> None: ...
    def require_writable(self) -> None: ...
    def require_exclusive_create(self) -> None: ...


def files_at(uri: str) -> Files:
    """The files under any fsspec URI or local path; StoreError if the filesystem is unknown."""
    try:
        filesystem, root = url_to_fs(uri)
    except (ValueError, ImportError, OSError) as error:
        raise StoreError(f"{shown(uri)}: cannot be opened as a store: {error}") from error
    if isinstance(filesystem, LocalFileSystem):
        return LocalFiles(Path(root))
    return ObjectFiles(filesystem, root, shown(uri))


def shown(uri: str) -> str:
    """The URI without user, password, query or fragment, so that no message carries a secret."""
    if "://" not in uri:
        return uri
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class LocalFiles:
    """A folder; a change is on disk before the call returns. The small methods are its steps."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shown = str(root)

    def read(self, name: str) -> bytes:
        """The whole file; FileNotFoundError if there is none."""
        with _stores(self.shown, name, FileNotFoundError):
            return (self.root / name).read_bytes()

    def names(self, folder: str) -> list[str]:
        """Sorted names in a folder; empty if there is no such folder."""
        try:
            with _stores(self.shown, folder, FileNotFoundError):
                return sorted(path.name for path in (self.root / folder).iterdir())
        except FileNotFoundError:
            return []

    def exists(self, name: str) -> bool:
        with _stores(self.shown, name):
            return (self.root / name).exists()

    def write(self, name: str, content: bytes | Path) -> None:
        """Write or replace a file: readers see the old one or the whole new one."""
        target = self.root / name
        with _stores(self.shown, name), self._temporary(target, content) as temporary:
            self._replace(temporary, target)
            self._sync_folder(target.parent)

    def create(self, name: str, content: bytes) -> None:
        """Write a file that must not exist; FileExistsError if somebody was first."""
        target = self.root / name
        answers = _stores(self.shown, name, FileExistsError)
        with answers, self._temporary(target, content) as temporary:
            try:
                self._link(temporary, target)
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                raise UnsupportedStoreError(
                    f"{self.shown}: no hard links here ({error.strerror}), so a commit could not"
                    " be exclusive; put the store on another filesystem"
                ) from error
            self._sync_folder(target.parent)

    def remove(self, name: str) -> None:
        """Delete a file if it is there."""
        with _stores(self.shown, name):
            self._unlink(self.root / name)

    def require_writable(self) -> None:
        """StoreError unless a file can be written here; one is, and all that this made is gone again."""
        with _stores(f"{self.shown}: cannot be written", ""):
            missing = [each for each in (self.root, *self.root.parents) if not each.is_dir()]
            try:
                with self._temporary(self.root / "trial", b""):
                    pass
            finally:
                for folder in missing:
                    with suppress(OSError):  # it was never made, or somebody else uses it by now
                        folder.rmdir()

    def require_exclusive_create(self) -> None:
        """Nothing to ask beforehand: a folder without hard links says so at the first link."""

    @contextmanager
    def _temporary(self, target: Path, content: bytes | Path) -> Iterator[Path]:
        """The content, durable under a name beside the target that is gone afterwards."""
        self._make_folder(target.parent)
        temporary = target.parent / f".writing-{uuid4().hex}"
        try:
            self._write(temporary, content)
            self._sync_file(temporary)
            yield temporary
        finally:
            self._unlink(temporary)

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            self._make_folder(folder.parent)
            try:
                folder.mkdir(exist_ok=True)
            except FileExistsError as error:  # a file, or a link to nowhere
                fault = f"{self.shown}: {folder} is no folder, so nothing can be kept in it"
                raise StoreError(fault) from error
            self._sync_folder(folder.parent)

    def _write(self, path: Path, content: bytes | Path) -> None:
        with path.open("xb") as file, _reading(content) as source:
            shutil.copyfileobj(source, file, 2**20)

    def _sync_file(self, path: Path) -> None:
        _fsync(path, os.O_RDONLY)

    def _sync_folder(self, path: Path) -> None:
        _fsync(path, os.O_RDONLY | os.O_DIRECTORY)

    def _replace(self, temporary: Path, target: Path) -> None:
        temporary.replace(target)

    def _link(self, temporary: Path, target: Path) -> None:
        target.hardlink_to(temporary)

    def _unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)


class ObjectFiles:
    """Any other fsspec filesystem: a put is whole by nature, a commit is one conditional create."""

    root = None

    def __init__(self, filesystem: fsspec.AbstractFileSystem, prefix: str, shown_root: str) -> None:
        self._filesystem = filesystem
        self._prefix = prefix.rstrip("/")
        self.shown = shown_root

    def read(self, name: str) -> bytes:
        """The whole object; FileNotFoundError if there is none."""
        with _stores(self.shown, name, FileNotFoundError):
            content: bytes = self._filesystem.cat_file(self._path(name))
            return content

    def names(self, folder: str) -> list[str]:
        """Sorted names below a prefix; empty if there are none."""
        path = self._path(folder)
        try:
            with _stores(self.shown, folder, FileNotFoundError):
                self._filesystem.invalidate_cache(path)
                listed = self._filesystem.ls(path, detail=False)
        except FileNotFoundError:
            return []
        return sorted(entry.rstrip("/").rpartition("/")[2] for entry in listed)

    def exists(self, name: str) -> bool:
        with _stores(self.shown, name):
            path = self._path(name)
            self._filesystem.invalidate_cache(self._filesystem._parent(path))
            return bool(self._filesystem.exists(path))

    def write(self, name: str, content: bytes | Path) -> None:
        """Put an object, in place of any that has the name."""
        with _stores(self.shown, name):
            if isinstance(content, Path):
                self._filesystem.put_file(str(content), self._path(name))
            else:
                self._filesystem.pipe_file(self._path(name), content)

    def create(self, name: str, content: bytes) -> None:
        """Put an object that must not exist; FileExistsError if somebody was first."""
        with _stores(self.shown, name, FileExistsError):
            try:
                self._create(self._path(name), content)
            except (NotImplementedError, ValueError, TypeError) as error:
                raise UnsupportedStoreError(self._no_exclusive_create(str(error))) from error

    def remove(self, name: str) -> None:
        """Delete an object if it is there."""
        with _stores(self.shown, name):
            try:
                self._filesystem.rm_file(self._path(name))
            except FileNotFoundError:
                return

    def require_writable(self) -> None:
        """StoreError unless an object can be put here; one is, and it is gone again."""
        name = f".trial-{uuid4().hex}"
        self.write(name, b"")
        self.remove(name)

    def require_exclusive_create(self) -> None:
        """Create one object twice: UnsupportedStoreError unless the second attempt is refused."""
        name = f".exclusive-{uuid4().hex}"
        self.create(name, b"1")
        try:
            self.create(name, b"2")
        except FileExistsError:
            return
        finally:
            self.remove(name)
        raise UnsupportedStoreError(
            self._no_exclusive_create("a second create overwrote the first")
        )

    def _path(self, name: str) -> str:
        return f"{self._prefix}/{name}" if name else self._prefix

    def _create(self, path: str, content: bytes) -> None:
        inherited = fsspec.AbstractFileSystem.pipe_file  # which looks first and then overwrites
        if getattr(self._filesystem.pipe_file, "__func__", None) is not inherited:
            self._filesystem.pipe_file(path, content, mode="create")
            return
        with self._filesystem.open(path, "xb") as file:
            file.write(content)

    def _no_exclusive_create(self, reason: str) -> str:
        return (
            f"{self.shown}: this filesystem cannot create a file exclusively ({reason}), so two"
            " writers could overwrite each other's commits; choose another for the store"
        )


@contextmanager
def _stores(root: str, name: str, *answers: type[OSError]) -> Iterator[None]:
    """Turn the filesystem's own errors into ours, save those that answer the question."""
    try:
        yield
    except answers:
        raise
    except OSError as error:
        place = f"{root}/{name}" if name else root
        raise StoreError(f"{place}: {error.strerror or error}") from error


def _reading(content: bytes | Path) -> BinaryIO:
    return content.open("rb") if isinstance(content, Path) else BytesIO(content)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
