"""One child process that reads documents, which is replaced when a document ends it."""

import errno
import os
import signal
import threading
import time
from pathlib import Path
from queue import SimpleQueue

import orjson

from finetune_trainer.data import child
from finetune_trainer.data.file_kinds import DocumentKind
from finetune_trainer.data.problems import Drop, LeftOut

_MODULE = "finetune_trainer.data.documents.worker"
MAX_REQUEST_BYTES = 2**16
READY = b"ready"  # its first message
NO_MEMORY, NO_SPACE = 70, 71  # its exit codes
MEMORY_BYTES = 2**30  # of the child's data, of which Python and the libraries take a tenth
DOCUMENT_CPU_S = 120  # of one document: thousands of pages of a PDF take a few seconds
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}


class _EndedError(Exception):
    """Nobody waits for the document any more."""


class Extractor:
    """The child process, started with the first document. One document at a time."""

    def __init__(self) -> None:
        self._process: child.Process | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    def extract(self, path: Path, kind: DocumentKind, out: Path) -> LeftOut | None:
        """Write what a document says to `out`, or return why nothing of it can be used.

        Raises MemoryError when the kernel, or somebody else, kills the child, and OSError where the disk is full."""
        process = self._running()
        request = orjson.dumps({"path": str(path), "kind": kind, "out": str(out)})
        began_s = time.monotonic()
        replies = child.exchange(process, request, max_bytes=MAX_REQUEST_BYTES)
        if replies is not None:
            return _told(replies[0]) if replies[0] else None
        waited_s = time.monotonic() - began_s
        was_killed = child.was_killed(process) and waited_s < child.REPLY_TIMEOUT_S
        self._end()
        if was_killed:
            raise MemoryError(f"{_MODULE} was killed")
        if process.returncode == NO_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))
        return _of_end(process.returncode, waited_s)

    def close(self) -> None:
        """End the process, in the middle of a document too."""
        with self._lock:
            self._is_closed = True
        self._end()

    def _running(self) -> child.Process:
        """Raises RuntimeError: before it has seen a document, its end is no document's fault."""
        with self._lock:
            if self._is_closed:
                raise _EndedError
            if self._process is not None:
                return self._process
            process = self._process = child.start(_MODULE, _ENVIRONMENT)
        limits = orjson.dumps({"memory_bytes": MEMORY_BYTES, "cpu_s": DOCUMENT_CPU_S})
        if child.exchange(process, limits, max_bytes=MAX_REQUEST_BYTES) != [READY]:
            self._end()
            raise RuntimeError(f"{_MODULE} did not start ({process.returncode})")
        return process

    def _end(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            child.end(process)


def _told(reply: bytes) -> LeftOut:
    drop, words = orjson.loads(reply)
    return LeftOut(Drop(drop), words)


def _of_end(code: int | None, waited_s: float) -> LeftOut:
    """Return what a document is left out for that ended the process which read it."""
    if code == -signal.SIGPROF or waited_s >= child.REPLY_TIMEOUT_S:
        return LeftOut(Drop.EXTRACTION_ENDED, f"it takes more than {DOCUMENT_CPU_S} s to read it")
    if code in (NO_MEMORY, -signal.SIGABRT):
        return LeftOut(Drop.EXTRACTION_ENDED, f"it takes more than {MEMORY_BYTES // 2**20} MiB of memory to read it")
    return LeftOut(Drop.EXTRACTION_ENDED, "what reads it fails on it")


class Extractors:
    """Several child processes, for as many threads. Thread-safe."""

    def __init__(self, processes: int) -> None:
        self._all = [Extractor() for _ in range(processes)]
        self._idle: SimpleQueue[Extractor] = SimpleQueue()
        for each in self._all:
            self._idle.put(each)

    def extract(self, path: Path, kind: DocumentKind, out: Path) -> LeftOut | None:
        """Have the next process that is idle read a document, as Extractor.extract does."""
        extractor = self._idle.get()
        try:
            return extractor.extract(path, kind, out)
        finally:
            self._idle.put(extractor)

    def close(self) -> None:
        """End all of them."""
        for each in self._all:
            each.close()
