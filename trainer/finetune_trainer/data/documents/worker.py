"""The child process that reads documents: a few bytes of one may become any amount of memory, and any amount of work.

`python -m finetune_trainer.data.documents.worker`, spoken to over stdin and stdout by `extractor`. What a document
says goes into a file beside it, a frame a row; the reply is empty, or says why nothing of it can be used.
"""

import errno
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import orjson

from finetune_trainer.data.child import allow_cpu, limit_data, streams
from finetune_trainer.data.documents.extractor import MAX_REQUEST_BYTES, NO_MEMORY, NO_SPACE, READY
from finetune_trainer.data.documents.found import Found, NoTextError, parts
from finetune_trainer.data.documents.kinds import READERS
from finetune_trainer.data.file_kinds import DocumentKind
from finetune_trainer.data.frames import read_frame, write_frame
from finetune_trainer.data.problems import LFS_POINTER, Drop

MAX_TEXT_BYTES = 256 * 2**20  # of one document: a thousand books


def _write(found: Iterable[Found], out: Path) -> None:
    """Write the rows of a document. Raises NoTextError where it has none, or too much."""
    written_bytes = 0
    with out.open("wb") as stream:
        for each in found:
            for part in parts(each.text):
                if not part.strip():
                    continue
                frame = orjson.dumps([part, each.title, each.changes])
                written_bytes += len(frame)
                if written_bytes > MAX_TEXT_BYTES:
                    raise NoTextError(Drop.DOCUMENT_TOO_LARGE, f"more than {MAX_TEXT_BYTES // 2**20} MiB of text")
                write_frame(stream, frame)
    if not written_bytes:
        raise NoTextError(Drop.EMPTY_DOCUMENT)


def _read(path: Path, kind: DocumentKind, out: Path) -> None:
    with path.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise NoTextError(
                Drop.BROKEN_DOCUMENT,
                "it is a Git LFS pointer, not the file itself; run git lfs pull where it was cloned",
            )
    try:
        _write(READERS[kind](path), out)
    except RecursionError as error:
        raise NoTextError(Drop.BROKEN_DOCUMENT, "it is nested too deep") from error


def _answer(request: dict[str, str]) -> bytes:
    """Return the reply to one request: nothing, or JSON of the reason and the words."""
    try:
        _read(Path(request["path"]), DocumentKind(request["kind"]), Path(request["out"]))
    except NoTextError as error:
        return orjson.dumps([error.drop, error.words])
    return b""


def main() -> int:
    requests, replies = streams()
    begin = read_frame(requests, MAX_REQUEST_BYTES)
    if begin is None:
        return 0
    limits = orjson.loads(begin)
    limit_data(limits["memory_bytes"])
    write_frame(replies, READY)
    while (request := read_frame(requests, MAX_REQUEST_BYTES)) is not None:
        allow_cpu(limits["cpu_s"])
        write_frame(replies, _answer(orjson.loads(request)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MemoryError:
        os._exit(NO_MEMORY)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        os._exit(NO_SPACE)
