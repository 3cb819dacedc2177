"""Object storage: the only package that imports boto3.

One `Store` for `s3://` and `file://`, with the same promises for both: an object appears whole or not at all, a
conditional write has one winner, a stream is one version of an object from its first to its last byte.
"""

import contextlib
import copy
import hashlib
import io
import os
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.run import StorageConfig
from finetune_trainer.store.local import LocalFiles, fail_local, sync_folder
from finetune_trainer.store.objects import ObjectInfo, PreconditionFailed
from finetune_trainer.store.s3 import S3Files
from finetune_trainer.store.uri import compiled, fixed_prefix, is_pattern, is_s3, plain, reaches_below

__all__ = ["ObjectInfo", "PreconditionFailed", "Store", "open_store", "spec_field"]

_MIB = 1 << 20
Objects = list[ObjectInfo]  # within Store, `list` is its method


def open_store(storage: StorageConfig) -> "Store":
    return Store(storage)


@contextlib.contextmanager
def spec_field(field: str) -> Generator[None]:
    """Name the field of the spec that a missing bucket or object came from, e.g. `datasets[0].uri`."""
    try:
        yield
    except StageError as error:
        if "field" in error.args_by_name and error.fault in (Fault.BUCKET_NOT_FOUND, Fault.OBJECT_NOT_FOUND):
            raise StageError(error.fault, **(error.args_by_name | {"field": field})) from error
        raise


class Store:
    """Objects named by full URIs. Thread-safe.

    Every method may raise StageError with BUCKET_NOT_FOUND, ACCESS_DENIED, TOKEN_EXPIRED, NO_CREDENTIALS, or
    STORAGE_UNAVAILABLE after bounded retries; others are named where they belong."""

    def __init__(self, storage: StorageConfig) -> None:
        self._storage = storage
        self._lock = threading.Lock()
        self._beat: Callable[[], None] = lambda: None

    def telling(self, beat: Callable[[], None]) -> "Store":
        """Return the same store, which calls `beat` in the caller's thread with every part of an object that it has
        read or written. What `beat` raises ends the transfer, and nothing of it is left."""
        other = copy.copy(self)
        other._beat = beat
        return other

    def list(self, prefix_uri: str, limit: int = 10_000) -> Objects:
        """All objects whose URI begins with `prefix_uri`, sorted by URI.

        Raises StageError(TOO_MANY_FILES) beyond `limit`."""
        return _bounded(self._files(prefix_uri).list(prefix_uri), prefix_uri, limit)

    def match(self, uri: str, limit: int = 10_000) -> Objects:
        """The object `uri`, all below it when it ends in "/", or all it matches as a pattern; sorted, [] if none.

        `*` and `?` stay within a path segment, `**` crosses segments. `limit` is that of the matches. On this machine
        linked folders are followed, and a link to nothing is an object without an ETag."""
        if not is_pattern(uri) and not uri.endswith("/"):
            info = self.head(uri)
            return [info] if info else []
        deep = reaches_below(uri) if is_pattern(uri) else True
        files = self._files(uri)
        prefix = fixed_prefix(uri)
        found = (
            files.list(prefix, deep=deep, links=True)
            if isinstance(files, LocalFiles)
            else files.list(prefix, deep=deep)
        )
        if is_pattern(uri):
            pattern = compiled(plain(uri))
            found = (info for info in found if pattern.fullmatch(plain(info.uri)))
        return _bounded(found, uri, limit)

    def head(self, uri: str) -> ObjectInfo | None:
        """What the object is, or None when it does not exist."""
        return self._files(uri).head(uri)

    def leads_outside(self, uri: str, folder_uri: str) -> bool:
        """Return whether a file of a folder is a link to one that is not in it; False for objects of a bucket."""
        return not is_s3(uri) and LocalFiles().leads_outside(uri, folder_uri)

    def read(self, uri: str, *, max_bytes: int = 16 * _MIB, if_match: str | None = None) -> tuple[bytes, str]:
        """Content and ETag of a small object.

        Raises PreconditionFailed when its ETag is not `if_match`, StageError(OBJECT_NOT_FOUND, OBJECT_TOO_LARGE)."""
        stream, info = self._files(uri).open(uri, if_match)
        with stream:
            if info.size_bytes > max_bytes:
                raise StageError(Fault.OBJECT_TOO_LARGE, uri=uri, size_bytes=info.size_bytes, limit_bytes=max_bytes)
            content = stream.read(max_bytes)
        self._beat()
        return content, info.etag

    def open(self, uri: str, *, if_match: str | None = None) -> BinaryIO:
        """A stream from the first byte to the last, buffered; a cut connection is resumed.

        Raises StageError(OBJECT_NOT_FOUND), and INPUT_CHANGED when the object is not, or no longer, the version
        `if_match`, or changes while it is read."""
        stream = self._open(uri, if_match)[0]
        return io.BufferedReader(_ToldReader(stream, self._beat), _MIB)

    def download(self, uri: str, path: Path, *, if_match: str | None = None) -> str:
        """Copy to `path`, which appears whole and survives a crash; returns "sha256:…" of what was written.

        Raises as `open`, and StageError(DISK_FULL)."""
        stream, info = self._open(uri, if_match)
        digest = hashlib.sha256()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with stream, tempfile.NamedTemporaryFile(dir=path.parent, prefix=".finetune-", delete=False) as staged:
                try:
                    while chunk := stream.read(_MIB):
                        digest.update(chunk)
                        staged.write(chunk)
                        self._beat()
                    if staged.tell() != info.size_bytes:
                        raise StageError(Fault.CORRUPT_TRANSFER, uri=uri, tries=1)
                    staged.flush()
                    os.fsync(staged.fileno())
                    os.replace(staged.name, path)
                except BaseException:
                    os.unlink(staged.name)
                    raise
            sync_folder(path.parent)
        except OSError as error:
            fail_local(error, "write", path.as_uri())
        return f"sha256:{digest.hexdigest()}"

    def read_range(self, uri: str, offset: int, size_bytes: int, *, if_match: str | None = None) -> bytes:
        """Exactly `size_bytes` of the object from `offset` on; the object must hold as many.

        Raises as `open`."""
        try:
            content = self._files(uri).read_range(uri, offset, size_bytes, if_match)
        except PreconditionFailed as error:
            raise StageError(Fault.INPUT_CHANGED, file=uri) from error
        self._beat()
        return content

    def digest(self, uri: str) -> tuple[str, int]:
        """ "sha256:…" over the object's content, and its size in bytes; nothing is kept."""
        stream, info = self._open(uri, None)
        digest = hashlib.sha256()
        with stream:
            while chunk := stream.read(_MIB):
                digest.update(chunk)
                self._beat()
        return f"sha256:{digest.hexdigest()}", info.size_bytes

    def put(self, uri: str, data: bytes, *, if_none_match: bool = False, if_match: str | None = None) -> str:
        """Write a small object; returns its ETag.

        Raises PreconditionFailed when it exists (`if_none_match`) or is not the version `if_match`. Writing the
        same bytes that a lost answer was about succeeds. StageError(CONDITIONAL_WRITES_UNSUPPORTED)."""
        return self._files(uri).put(uri, data, if_none_match=if_none_match, if_match=if_match)

    def upload(self, path: Path, uri: str, *, if_none_match: bool = False) -> ObjectInfo:
        """Copy a file of any size to `uri` and verify its size there; keys are expected to be unique.

        Raises as `put`, and StageError(CORRUPT_TRANSFER)."""
        return self._files(uri).upload(path, uri, if_none_match=if_none_match, beat=self._beat)

    def delete(self, uri: str) -> None:
        """Remove the object; no error when it does not exist."""
        self._files(uri).delete(uri)

    def remove_unfinished(self, folder_uri: str) -> None:
        """Remove what writers that were killed have left in a folder of this machine, in which nobody writes now."""
        if not is_s3(folder_uri):
            LocalFiles().remove_unfinished(folder_uri)

    def _open(self, uri: str, if_match: str | None) -> tuple[io.BufferedReader, ObjectInfo]:
        try:
            return self._files(uri).open(uri, if_match)
        except PreconditionFailed as error:
            raise StageError(Fault.INPUT_CHANGED, file=uri) from error

    def _files(self, uri: str) -> S3Files | LocalFiles:
        if not is_s3(uri):
            return LocalFiles()
        with self._lock:
            return self._s3

    @cached_property
    def _s3(self) -> S3Files:
        return S3Files(self._storage)


class _ToldReader(io.RawIOBase):
    """A stream that calls `beat` with every part that is read."""

    def __init__(self, stream: io.BufferedReader, beat: Callable[[], None]) -> None:
        self._stream, self._beat = stream, beat

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        count = self._stream.readinto(buffer)
        if count:
            self._beat()
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


def _bounded(found: Iterator[ObjectInfo], uri: str, limit: int) -> Objects:
    objects: Objects = []
    for info in found:
        if len(objects) == limit:
            raise StageError(Fault.TOO_MANY_FILES, uri=uri, limit=limit)
        objects.append(info)
    return sorted(objects, key=lambda info: info.uri)
