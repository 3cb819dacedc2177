"""`file://`: the same promises as object storage on a local file system.

Objects appear whole (written beside the target, then linked or renamed over it). An ETag is made of mtime, size
and inode: every put makes a new inode. Writers to one folder exclude each other by a lock on it.
"""

import contextlib
import errno
import fcntl
import io
import os
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, NoReturn

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_trainer.store.objects import ObjectInfo, PreconditionFailed
from finetune_trainer.store.uri import local_path

_HIDDEN = ".finetune-"  # temporary files, which are not objects
_COPY_BYTES = 1 << 20


def fail_local(error: OSError, action: str, uri: str, needed_bytes: int = 0) -> NoReturn:
    """Turn an error of the file system into the fault it stands for."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise StageError(Fault.DISK_FULL, what=uri, needed_gib=round(needed_bytes / 2**30, 2)) from error
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        raise StageError(Fault.ACCESS_DENIED, action=action, uri=uri) from error
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        raise StageError(Fault.OBJECT_NOT_FOUND, uri=uri, field="its URI in the job") from error
    problem = os.strerror(error.errno) if error.errno else type(error).__name__
    raise StageError(Fault.STORAGE_UNAVAILABLE, action=action, uri=uri, tries=1, seconds=0, problem=problem) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LocalFiles:
    """Objects are files; a prefix is a folder or the beginning of a name."""

    def list(self, prefix_uri: str) -> Iterator[ObjectInfo]:
        """All files whose path begins with the prefix, in no particular order."""
        path = local_path(prefix_uri)
        folder = path if prefix_uri.endswith("/") else path.parent
        stem = "" if prefix_uri.endswith("/") else str(path)
        for parent, _folders, names in os.walk(folder):
            for name in names:
                full = os.path.join(parent, name)
                if name.startswith(_HIDDEN) or not full.startswith(stem):
                    continue
                if info := self.head(f"file://{full}"):
                    yield info

    def head(self, uri: str) -> ObjectInfo | None:
        try:
            found = local_path(uri).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            fail_local(error, "read", uri)
        return ObjectInfo(uri, found.st_size, _etag(found)) if local_path(uri).is_file() else None

    def open(self, uri: str, if_match: str | None) -> tuple[io.BufferedReader, ObjectInfo]:
        """The open file and what it is.

        Raises PreconditionFailed when it is not the version asked for."""
        try:
            stream = local_path(uri).open("rb")
        except OSError as error:
            fail_local(error, "read", uri)
        found = os.fstat(stream.fileno())
        if if_match is not None and if_match != _etag(found):
            stream.close()
            raise PreconditionFailed(uri)
        return stream, ObjectInfo(uri, found.st_size, _etag(found))

    def put(self, uri: str, data: bytes, *, if_none_match: bool, if_match: str | None) -> str:
        with self._staged(uri, len(data)) as (staged, target):
            staged.write(data)
            return _publish(staged, target, uri, if_none_match=if_none_match, if_match=if_match)

    def upload(self, path: Path, uri: str, *, if_none_match: bool) -> ObjectInfo:
        with path.open("rb") as source, self._staged(uri, path.stat().st_size) as (staged, target):
            while chunk := source.read(_COPY_BYTES):
                staged.write(chunk)
            size_bytes = staged.tell()
            etag = _publish(staged, target, uri, if_none_match=if_none_match, if_match=None)
            return ObjectInfo(uri, size_bytes, etag)

    def delete(self, uri: str) -> None:
        try:
            local_path(uri).unlink(missing_ok=True)
        except OSError as error:
            fail_local(error, "delete", uri)

    @contextlib.contextmanager
    def _staged(self, uri: str, size_bytes: int) -> Generator[tuple[IO[bytes], Path]]:
        """A temporary file in the target's folder; it is gone afterwards unless it was published."""
        target = local_path(uri)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix=_HIDDEN, delete=False) as staged:
                try:
                    yield staged.file, target
                finally:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(staged.name)
        except OSError as error:
            fail_local(error, "write", uri, size_bytes)


def _publish(staged: IO[bytes], target: Path, uri: str, *, if_none_match: bool, if_match: str | None) -> str:
    staged.flush()
    os.fsync(staged.fileno())
    os.fchmod(staged.fileno(), 0o644)
    etag = _etag(os.fstat(staged.fileno()))
    with _locked(target.parent):
        if if_none_match:
            try:
                os.link(staged.name, target)  # unlike rename, fails when the target exists
            except FileExistsError as error:
                raise PreconditionFailed(uri) from error
        else:
            if if_match is not None and (not target.exists() or _etag(target.stat()) != if_match):
                raise PreconditionFailed(uri)
            os.replace(staged.name, target)
        sync_folder(target.parent)
    return etag


@contextlib.contextmanager
def _locked(folder: Path) -> Generator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _etag(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns:x}-{found.st_size:x}-{found.st_ino:x}"
