"""Reading an S3 object as a stream that survives cut connections."""

import io
import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from botocore.exceptions import BotoCoreError
from urllib3.exceptions import HTTPError

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_trainer.store import transport
from finetune_trainer.store.objects import PreconditionFailed

MAX_CUTS = 8  # in a row, each without PROGRESS_BYTES since the one before
PROGRESS_BYTES = 1 << 20
_READ_BYTES = 1 << 20  # at once: what a connection brought before it broke within one read is lost
_MAX_PAUSE_S = 20.0


class Body(Protocol):
    """The part of botocore's StreamingBody that is used."""

    def readinto(self, b: Any) -> int: ...
    def close(self) -> None: ...


class Answer(NamedTuple):
    """An answer to GET: the stream, and what the whole object is."""

    body: Body
    size_bytes: int
    etag: str


class ResumingReader(io.RawIOBase):
    """One object from its first to its last byte, all of the same version.

    A connection that breaks or crawls is replaced by a request for the rest (Range), on condition that the object is
    still the same (If-Match). Raises StageError(INPUT_CHANGED) when it is not, STORAGE_UNAVAILABLE after MAX_CUTS.
    `first` begins at byte `begin`; the stream ends before byte `end`, or with the object."""

    def __init__(
        self, uri: str, first: Answer, reopen: Callable[[int, str], Answer], begin: int = 0, end: int | None = None
    ) -> None:
        self._uri = uri
        self._answer = first
        self._size_bytes = first.size_bytes
        self._reopen = reopen  # (offset, ETag) -> the rest
        self._offset = begin
        self._end = first.size_bytes if end is None else min(end, first.size_bytes)
        self._cuts = 0
        self._offset_of_last_cut = begin
        self._started_s = time.monotonic()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        while self._offset < self._end and len(buffer):
            try:
                count = self._answer.body.readinto(memoryview(buffer)[: min(_READ_BYTES, self._end - self._offset)])
            except (BotoCoreError, HTTPError, OSError) as error:
                slow = transport.is_slow(error)
                self._resume(f"slower than {transport.SLOW_BYTES_PER_S >> 10} KiB/s" if slow else type(error).__name__)
                continue
            if not count:
                self._resume("it ended early")
                continue
            self._offset += count
            return count
        return 0

    def close(self) -> None:
        if not self.closed:
            self._answer.body.close()
        super().close()

    def _resume(self, problem: str) -> None:
        self._answer.body.close()
        if self._offset - self._offset_of_last_cut >= PROGRESS_BYTES:
            self._cuts = 0
        self._offset_of_last_cut = self._offset
        self._cuts += 1
        if self._cuts > MAX_CUTS:
            raise StageError(
                Fault.STORAGE_UNAVAILABLE,
                action="read",
                uri=self._uri,
                tries=self._cuts,
                seconds=round(time.monotonic() - self._started_s),
                problem=f"the connection broke after {self._offset} bytes ({problem})",
            )
        time.sleep(random.uniform(0, min(2.0 ** (self._cuts - 1), _MAX_PAUSE_S)))
        try:
            self._answer = self._reopen(self._offset, self._answer.etag)
        except PreconditionFailed as error:
            raise StageError(Fault.INPUT_CHANGED, file=self._uri) from error
        if self._answer.size_bytes != self._size_bytes:
            raise StageError(Fault.INPUT_CHANGED, file=self._uri)
