"""Cut the rows of a dataset into partitions: the unit in which prepare works on many cores, and goes on after a kill.

Where rows are cut, and how many processes work on them, changes nothing that is made of them. A partition is a file in
the work folder; its name among those of earlier attempts is made of its rows, so that only the same rows are the same.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune_api.errors import StageError
from finetune_trainer.data.raw_rows import PlacedRow, write_row
from finetune_trainer.data.reading import RawReader

MIN_PARTITION_BYTES = 4 * 2**20
MAX_PARTITION_BYTES = 64 * 2**20
MAX_PARTITION_ROWS = 100_000  # what a partition's decisions, and the rows that are broken in vain, are bounded by
AHEAD = 2  # partitions that are cut and wait for a worker
_PER_WORKER = 4  # partitions of a job, so that the last of them do not leave workers idle for long
# Of a partition in flight to its rows: these, and 5 bytes a token, of which a byte makes one at most. What a row has in
# JSON beside its words, and its head in the file, leaves room for the records of rows and what a template adds.
_DISK_RATIO = 6
_DISK_SHARE = 8  # of the disk; the rest is for all rows' tokens and arrays


@dataclass(frozen=True)
class Partition:
    """Rows of one dataset, one behind another, as a file of `raw_rows`.

    first_file, files: the job's files that they are of; stored_bytes: of these files, as they lie in the bucket;
    sha256: of the rows."""

    dataset: int
    path: Path
    first_file: int
    files: int
    rows: int
    stored_bytes: int
    sha256: str

    @property
    def is_full(self) -> bool:
        """Whether it is as large as partitions are, so that there may be more of its dataset."""
        return self.rows >= MAX_PARTITION_ROWS or self.path.stat().st_size >= MIN_PARTITION_BYTES


def partition_bytes(stored_bytes: int, workers: int, disk_bytes: int) -> int:
    """Return how large partitions are. stored_bytes: of all files of the job; disk_bytes: that the pod has.

    A little more or less disk changes nothing, so that another attempt finds the partitions of the one before."""
    by_disk = disk_bytes // (_DISK_SHARE * in_flight_bytes(1, workers))
    most = min(MAX_PARTITION_BYTES, 2 ** max(0, by_disk.bit_length() - 1))
    return max(MIN_PARTITION_BYTES, min(most, stored_bytes // (_PER_WORKER * workers)))


def in_flight_bytes(size_bytes: int, workers: int) -> int:
    """Return what partitions of that size take on disk from when they are cut until they are merged and kept.

    Beside those at work and those that wait, one is being cut and one merged."""
    return (workers + AHEAD + 2) * _DISK_RATIO * size_bytes


class _Writing:
    """The partition that rows are written to."""

    def __init__(self, path: Path, first_file: int) -> None:
        self.path, self.first_file, self.last_file = path, first_file, first_file
        self.rows = self.size_bytes = 0
        self._sha256 = hashlib.sha256()
        self._stream = path.open("wb")

    def add(self, placed: PlacedRow) -> None:
        written = write_row(self._stream, PlacedRow(placed.file - self.first_file, placed.row))
        self._sha256.update(written)
        self.last_file = placed.file
        self.rows += 1
        self.size_bytes += len(written)

    def end(self, dataset: int, stored_bytes: int) -> Partition:
        self._stream.close()
        files = self.last_file - self.first_file + 1
        return Partition(dataset, self.path, self.first_file, files, self.rows, stored_bytes, self._sha256.hexdigest())


def cut(
    dataset: int, reader: RawReader, rows: Iterator[PlacedRow], folder: Path, size_bytes: int
) -> Iterator[Partition]:
    """Yield partitions of about `size_bytes`, in order; what ends the reading is raised behind the rows before it.

    rows: those of the reader."""
    count = told_bytes = cut_bytes = 0
    writing: _Writing | None = None
    error: StageError | None = None
    while error is None:
        try:
            placed = next(rows, None)
        except StageError as caught:
            placed, error = None, caught
        if placed is not None:
            if writing is None:
                writing = _Writing(folder / f"{dataset}-{count}.rows", placed.file)
                count += 1
            writing.add(placed)
            cut_bytes += placed.row.size_bytes
            if writing.size_bytes < size_bytes and writing.rows < MAX_PARTITION_ROWS:
                continue
        if writing is not None:
            # Of what was read, as much as its rows are of all: some may have been read to tell the format.
            stored_bytes = max(told_bytes, int(reader.stored_bytes * cut_bytes / max(1, reader.row_bytes)))
            yield writing.end(dataset, stored_bytes - told_bytes)
            told_bytes, writing = stored_bytes, None
        if placed is None:
            break
    if error is not None:
        raise error
