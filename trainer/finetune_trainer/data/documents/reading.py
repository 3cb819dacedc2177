"""Documents of a dataset to raw rows, in order: several are fetched and read at once, in bounded memory and disk."""

import re
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import NamedTuple

import orjson

from finetune_trainer.data.documents.extractor import Extractors
from finetune_trainer.data.file_kinds import DocumentKind
from finetune_trainer.data.files import HashingReader
from finetune_trainer.data.frames import read_frame
from finetune_trainer.data.problems import Drop, LeftOut, ReadDocument
from finetune_trainer.data.raw_rows import RawRow, raw_document, raw_left_out
from finetune_trainer.store import Store

MAX_DOCUMENT_BYTES = 512 * 2**20  # of an object: what is larger is hardly one document
_THREADS = 16  # that fetch them: a request takes tens of milliseconds, whatever it fetches
_AHEAD = 64  # documents that are fetched or read before their turn
_AHEAD_BYTES = 2**28  # of them, as they lie in the bucket, unless it is one alone
_MAX_RATIO = 2**15  # of text to what it is packed in: deflate makes 1,032 bytes of one, and XML refers to a text again
_MOST_ROWS_BYTES = 2**29  # of a document: its text and what JSON adds
_MAX_FRAME_BYTES = 2**28


def most_text_bytes(size_bytes: int) -> int:
    """Return what the rows of a document of that size cannot come to more than."""
    return min(_MOST_ROWS_BYTES, max(size_bytes, 1) * _MAX_RATIO)


PLAIN = "{text}"  # the template of a document that is learned as it is
_NAME = re.compile(r"[{](text|title|source)[}]")


def _filled(template: str, text: str, title: str, source: str) -> str:
    """Return a template with what its names stand for."""
    own = {"text": text, "source": source, "title": title or source.rpartition("/")[2].rpartition(".")[0]}
    return _NAME.sub(lambda name: own[name[1]], template)


class Document(NamedTuple):
    """An object that is one document."""

    uri: str
    size_bytes: int
    kind: DocumentKind
    source: str  # its path below the folder of datasets[].uri


@dataclass(frozen=True, slots=True)
class Extracted:
    """A document that was read. path: its rows, as frames; None where it is left out."""

    sha256: str
    size_bytes: int
    path: Path | None
    left_out: LeftOut | None = None
    source: str = ""

    def rows(self, template: str = PLAIN) -> Iterator[RawRow]:
        """Yield what it says, in the template, each row as a line of JSON; or one that says why it is left out."""
        if self.left_out is not None:
            yield raw_left_out(1, self.left_out, self.size_bytes)
            return
        assert self.path is not None
        with self.path.open("rb") as stream:
            number = 0
            while (frame := read_frame(stream, _MAX_FRAME_BYTES)) is not None:
                number += 1
                text, title, changes = orjson.loads(frame)
                if template != PLAIN:
                    text = _filled(template, text, title, self.source)
                yield raw_document(number, ReadDocument(text, tuple(changes)))


def extracted(store: Store, documents: Sequence[Document], folder: Path, processes: int) -> Generator[Extracted]:
    """Yield what each document says, in order; the file of one is removed once the next is asked for.

    folder: where they lie meanwhile. Raises what the store does, and MemoryError."""
    rmtree(folder, ignore_errors=True)
    folder.mkdir()
    waiting: deque[Future[Extracted]] = deque()
    ahead_bytes: deque[int] = deque()
    rest = deque(enumerate(documents))
    with ExitStack() as stack:
        stack.callback(rmtree, folder, ignore_errors=True)
        pool = ThreadPoolExecutor(max_workers=_THREADS)
        stack.callback(pool.shutdown, cancel_futures=True)
        extractors = Extractors(processes)
        stack.callback(extractors.close)  # first of all: what a thread waits for ends with it
        while rest or waiting:
            while rest and _has_room(ahead_bytes, rest[0][1]):
                number, document = rest.popleft()
                waiting.append(pool.submit(_one, store, document, folder / str(number), extractors))
                ahead_bytes.append(document.size_bytes)
            found = waiting.popleft().result()
            yield found
            ahead_bytes.popleft()
            if found.path is not None:
                found.path.unlink()


def _has_room(ahead_bytes: Sequence[int], document: Document) -> bool:
    """Whether one more document may be fetched before its turn."""
    if not ahead_bytes:
        return True
    return len(ahead_bytes) < _AHEAD and sum(ahead_bytes) + document.size_bytes <= _AHEAD_BYTES


def _one(store: Store, document: Document, path: Path, extractors: Extractors) -> Extracted:
    """Fetch one document and have it read."""
    with store.open(document.uri) as source, path.open("wb") as copy:
        reader = HashingReader(source)
        for chunk in reader:
            if reader.size_bytes <= MAX_DOCUMENT_BYTES:
                copy.write(chunk)
    out = path.with_suffix(".rows")
    if reader.size_bytes > MAX_DOCUMENT_BYTES:
        left_out = LeftOut(Drop.DOCUMENT_TOO_LARGE, f"more than {MAX_DOCUMENT_BYTES // 2**20} MiB")
    else:
        left_out = extractors.extract(path, document.kind, out)
    path.unlink()
    if left_out is not None:
        out.unlink(missing_ok=True)
    rows = out if left_out is None else None
    return Extracted(reader.digest, reader.size_bytes, rows, left_out, document.source)
