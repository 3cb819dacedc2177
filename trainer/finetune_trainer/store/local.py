"""`file://`: the same promises as object storage on a local file system.

Objects appear whole (written beside the target, then linked or renamed over it). An ETag is made of mtime, size
and inode: every put makes a new inode. Writers to one folder exclude each other by a lock on it.
"""

import contextlib
import errno
import fcntl
import io
import os
import stat
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from finetune_api.errors import StageError
from finetune_api.layout import JOB
from finetune_api.reasons import Fault
from finetune_trainer.store.objects import ObjectInfo, PreconditionFailed
from finetune_trainer.store.uri import local_name, local_path

_HIDDEN = ".finetune-"  # temporary files, which are not objects
# No such file: also where a name is too long, or a link leads to itself.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
_COPY_BYTES = 1 << 20
LOCK_TIMEOUT_S = 60  # a writer holds it while it renames one file
_LOCK_POLL_S = 0.01
os.umask(_UMASK := os.umask(0o077))  # which can only be read by setting it: here, where no thread writes files yet


def fail_local(error: OSError, action: str, uri: str) -> NoReturn:
    """Turn an error of the file system into the fault it stands for."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise StageError(Fault.DISK_FULL, what=uri) from error
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        raise StageError(Fault.ACCESS_DENIED, action=action, uri=uri) from error
    if error.errno in (*_NO_FILE, errno.EISDIR):
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

    def list(self, prefix_uri: str, *, deep: bool = True, links: bool = False) -> Iterator[ObjectInfo]:
        """All files whose path begins with the prefix, in no particular order; not deep: in its folder alone.

        links: also the files of linked folders, but for those that hold the link itself, and links that lead to no
        file, without an ETag. Raises StageError(ACCESS_DENIED) for a folder that may not be read: its files would be
        missing unseen."""
        folder_uri = prefix_uri[: prefix_uri.rindex("/") + 1]
        folder, stem = local_path(folder_uri), local_path(prefix_uri).name if prefix_uri != folder_uri else ""

        def refuse(error: OSError) -> None:
            if error.errno not in _NO_FILE:
                fail_local(error, "read", f"file://{local_name(os.fspath(error.filename))}")

        inside: dict[str, frozenset[tuple[int, int]]] = {}  # the folders that one lies in, as they are
        for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=links):
            if not deep:
                folders.clear()
            elif links:
                around = inside.pop(parent, frozenset[tuple[int, int]]()) | _identities(parent)
                inside |= {os.path.join(parent, name): around for name in folders}
                folders[:] = [name for name in folders if not around & _identities(os.path.join(parent, name))]
            for name in names:
                path = os.path.join(parent, name)
                below = os.path.relpath(path, folder)
                if name.startswith(_HIDDEN) or not below.startswith(stem):
                    continue
                uri = folder_uri + local_name(below)
                if info := self.head(uri):
                    yield info
                elif links and os.path.islink(path):
                    yield ObjectInfo(uri, 0, "")

    def leads_outside(self, uri: str, folder_uri: str) -> bool:
        """Return whether a file in a folder is a link to one that is not.

        A snapshot in the Hub's cache consists of links into the `blobs` beside it, which are its own."""
        try:
            folder, target = local_path(folder_uri).resolve(), local_path(uri).resolve()
        except (OSError, RuntimeError):  # a link to itself, which leads nowhere
            return True
        inside = [folder]
        if folder.parent.name == "snapshots":
            inside.append(folder.parent.parent / "blobs")
        return not any(target.is_relative_to(each) for each in inside)

    def head(self, uri: str) -> ObjectInfo | None:
        try:
            found = local_path(uri).stat()
        except OSError as error:
            if error.errno in _NO_FILE:
                return None
            fail_local(error, "read", uri)
        return ObjectInfo(uri, found.st_size, _etag(found)) if local_path(uri).is_file() else None

    def open(self, uri: str, if_match: str | None) -> tuple[io.BufferedReader, ObjectInfo]:
        """The open file and what it is.

        Raises PreconditionFailed when it is not the version asked for."""
        try:
            file = _Version(local_path(uri), uri)
        except OSError as error:
            fail_local(error, "read", uri)
        if if_match is not None and if_match != file.etag:
            file.close()
            raise PreconditionFailed(uri)
        return io.BufferedReader(file, _COPY_BYTES), ObjectInfo(uri, file.size_bytes, file.etag)

    def read_range(self, uri: str, offset: int, size_bytes: int, if_match: str | None) -> bytes:
        """Raises PreconditionFailed as `open`, INPUT_CHANGED when the file is shorter or written to."""
        stream, _info = self.open(uri, if_match)
        with stream:
            try:
                stream.seek(offset)
                content = stream.read(size_bytes)
            except OSError as error:
                fail_local(error, "read", uri)
        if len(content) < size_bytes:
            raise StageError(Fault.INPUT_CHANGED, file=uri)
        return content

    def put(self, uri: str, data: bytes, *, if_none_match: bool, if_match: str | None) -> str:
        with self._staged(uri) as (staged, target):
            staged.write(data)
            return _publish(staged, target, uri, if_none_match=if_none_match, if_match=if_match)

    def upload(self, path: Path, uri: str, *, if_none_match: bool, beat: Callable[[], None]) -> ObjectInfo:
        with path.open("rb") as source, self._staged(uri) as (staged, target):
            while chunk := source.read(_COPY_BYTES):
                staged.write(chunk)
                beat()
            size_bytes = staged.tell()
            etag = _publish(staged, target, uri, if_none_match=if_none_match, if_match=None)
            return ObjectInfo(uri, size_bytes, etag)

    def delete(self, uri: str) -> None:
        try:
            local_path(uri).unlink(missing_ok=True)
        except OSError as error:
            fail_local(error, "delete", uri)

    def remove_unfinished(self, folder_uri: str) -> None:
        """Remove what writers that were killed have left in a folder; what is being written there is lost too."""
        folder = local_path(folder_uri)
        try:
            for path in folder.glob(_HIDDEN + "*"):
                path.unlink(missing_ok=True)
        except OSError as error:
            fail_local(error, "delete", folder_uri)

    @contextlib.contextmanager
    def _staged(self, uri: str) -> Generator[tuple[IO[bytes], Path]]:
        """A temporary file in the target's folder; it is gone afterwards unless it was published."""
        target = local_path(uri)
        try:
            _make_folder(target.parent)
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix=_HIDDEN, delete=False) as staged:
                try:
                    yield staged.file, target
                finally:
                    with contextlib.suppress(OSError):  # gone, or left: what was published counts
                        os.unlink(staged.name)
        except OSError as error:
            fail_local(error, "write", uri)


def _identities(folder: str) -> frozenset[tuple[int, int]]:
    """Return what tells a folder from all others, by whatever name; nothing where it is gone."""
    try:
        found = os.stat(folder)
    except OSError:  # os.walk tells of it
        return frozenset()
    return frozenset([(found.st_dev, found.st_ino)])


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it; what a run keeps for itself, such as tokens of the rows, is its owner's."""
    own = next((each for each in (folder, *folder.parents) if each.name == JOB), None)
    if own is not None:
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


class _Version(io.FileIO):
    """An open file that was not written to from its first byte to its last; else INPUT_CHANGED, as in a bucket."""

    def __init__(self, path: Path, uri: str) -> None:
        super().__init__(path, "rb", opener=_open_at_once)
        self._uri = uri
        found = os.fstat(self.fileno())
        if not stat.S_ISREG(found.st_mode):
            self.close()
            raise OSError(errno.ENOENT, "no regular file")  # nor is it one for `head`
        self.size_bytes, self.etag = found.st_size, _etag(found)

    def readinto(self, buffer: Any, /) -> int | None:
        try:
            count = super().readinto(buffer)
        except OSError as error:
            fail_local(error, "read", self._uri)
        if not count or self.tell() > self.size_bytes:  # somebody may write to it for ever, and faster than we read
            self._check()
        return count

    def readall(self) -> bytes:
        content = b""
        while part := self.read(max(0, self.size_bytes + 1 - self.tell())):
            content += part
        self._check()
        return content

    def _check(self) -> None:
        if _etag(os.fstat(self.fileno())) != self.etag:
            raise StageError(Fault.INPUT_CHANGED, file=self._uri)


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting: a pipe that nobody writes to would hold us for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


def _publish(staged: IO[bytes], target: Path, uri: str, *, if_none_match: bool, if_match: str | None) -> str:
    staged.flush()
    os.fsync(staged.fileno())
    os.fchmod(staged.fileno(), 0o666 & ~_UMASK)
    etag = _etag(os.fstat(staged.fileno()))
    with _locked(target.parent, uri):
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
def _locked(folder: Path, uri: str) -> Generator[None]:
    """Keep other writers out of a folder. Raises StageError(STORAGE_UNAVAILABLE) when one does not leave."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    deadline_s = time.monotonic() + LOCK_TIMEOUT_S
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline_s:
                    problem = "another process holds a lock on the folder"
                    args = {"action": "write", "uri": uri, "problem": problem}
                    raise StageError(Fault.STORAGE_UNAVAILABLE, tries=1, seconds=LOCK_TIMEOUT_S, **args) from None
                time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _etag(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns:x}-{found.st_size:x}-{found.st_ino:x}"
