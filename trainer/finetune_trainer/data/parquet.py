"""Rows of Parquet files, from the child process of `parquet_worker`, which is replaced when a file ends it."""

from collections.abc import Collection, Generator, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import orjson

from finetune_api.row_words import MAX_LINE_BYTES
from finetune_trainer.data import child
from finetune_trainer.data.files import damaged
from finetune_trainer.data.frames import read_frame, write_frame
from finetune_trainer.data.problems import Broken, Problem
from finetune_trainer.data.raw_rows import Cut, RawRow, raw_broken, raw_line

_MODULE = "finetune_trainer.data.parquet_worker"
MEMORY_BYTES = 2**30  # the child's address space, of which Python and the libraries take a quarter
NO_MEMORY = 35  # the child's exit code
MAX_FRAME_BYTES = 16 * 2**20  # a frame is sent once it has a MiB, and the longest row has 8
BATCH_ROWS = (256, 16, 1)  # rows decoded at once; the next where memory did not suffice
MAX_RATIO = 1000  # of the rows to the file; one long text in every row is stored once
MIN_RATIO_BYTES = 64 * 2**20  # rows that any file may have, however small it is
READY = b"ready"  # its first message
# Other allocators reserve a GiB of addresses before they need it.
_FRUGAL = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}


def most_bytes(file_bytes: int) -> int:
    """Return what the rows of a file of that size may come to, each as a line of JSON."""
    return MAX_RATIO * file_bytes + MIN_RATIO_BYTES


class Facts(NamedTuple):
    """What a file says of itself: how many rows its row groups have, and the first thousand names of its columns."""

    rows: int
    names: list[str]


class ParquetDecoder:
    """The child process, started with the first file. Not thread-safe.

    unread: names of columns that are passed over."""

    def __init__(self, unread: Collection[str]) -> None:
        self.unread = unread
        self._process: child.Process | None = None
        self.facts = Facts(0, [])  # of the file that is read

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def rows(self, path: Path, file: str) -> Generator[RawRow]:
        """Yield the rows of a file, each as the line that it would be in a JSONL file.

        Of a file without such a column every row comes with the names of its columns. Raises BROKEN_FILE, and
        MemoryError when the kernel, or somebody else, kills the child."""
        self.facts = Facts(0, [])
        allowed_bytes = most_bytes(path.stat().st_size)
        number = size_bytes = 0
        for batch_rows in BATCH_ROWS:
            for line in self._lines(path, file, number, batch_rows):
                number += 1
                row = _row(number, line)
                size_bytes += row.size_bytes
                if size_bytes > allowed_bytes:
                    raise damaged(file, number, f"it unpacks to more than {MAX_RATIO} times its size")
                yield row
            if self._process is not None:
                return
            if self.facts.rows - number == 1:  # it was alone already
                break
        raise damaged(file, number + 1, f"Parquet cannot be decoded in {MEMORY_BYTES // 2**20} MiB of memory")

    def _lines(self, path: Path, file: str, from_row: int, batch_rows: int) -> Iterator[bytes]:
        """Yield the lines after `from_row` as they come; where the file ends the child, there is none afterwards."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        request = {"path": str(path), "unread": sorted(self.unread), "from_row": from_row, "batch_rows": batch_rows}
        with suppress(BrokenPipeError):  # it has ended, and says nothing
            write_frame(process.stdin, orjson.dumps(request))
        number = from_row
        is_at_end = False
        try:
            while (frame := read_frame(process.stdout, MAX_FRAME_BYTES)) is not None:
                kind, content = frame[:1], frame[1:]
                is_at_end = kind in (b"e", b"x")
                if kind == b"e":
                    return
                if kind == b"x":
                    raise damaged(file, number + 1, content.decode(errors="replace"))
                if kind == b"i":
                    self.facts = Facts(**orjson.loads(content))
                    continue
                for line in content.split(b"\n"):
                    number += 1
                    yield line
            if child.was_killed(process):
                raise MemoryError(f"{_MODULE} was killed")
        finally:
            if not is_at_end:
                self._end()

    def _start(self) -> child.Process:
        """Raises RuntimeError: before it has seen a file, its end is no file's fault."""
        process = child.start(_MODULE, _FRUGAL)
        if child.exchange(process, max_bytes=MAX_FRAME_BYTES) != [READY]:
            child.end(process)
            raise RuntimeError(f"{_MODULE} did not start ({process.returncode})")
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            child.end(process)


def _row(number: int, line: bytes) -> RawRow:
    if line.startswith(b"!"):
        problem, field, detail = orjson.loads(line[1:])
        broken = Broken(Problem(problem), field, detail)
        return raw_broken(number, broken, MAX_LINE_BYTES if broken.problem is Problem.LINE_TOO_LONG else len(line))
    if line.startswith(b"?"):
        return RawRow(number, Cut.COLUMNS, line[1:], len(line))
    return raw_line(number, line)
