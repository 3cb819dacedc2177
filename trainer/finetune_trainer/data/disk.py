"""What prepare takes of its disk, by what it is, and that there is as much.

While rows are read: partitions in work, the table that they are cut out of, and what all rows before them became.
Then, beside these rows: what tells equal ones, the arrays that training reads, and the steps.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune_api.errors import StageError
from finetune_api.names import Stage
from finetune_api.reasons import DISK_FIELDS, MEMORY_FIELDS, Fault
from finetune_trainer.batches import ORDER_BYTES
from finetune_trainer.data.accounts import Ledger
from finetune_trainer.data.division import DIVIDING_BYTES, Division
from finetune_trainer.data.spool import COMPARED_FILES, EXAMPLE, ROW, SEGMENT, prepared_bytes
from finetune_trainer.step_plan import READ_BYTES, STEP_BYTES, StepPlan

_GIB = 2**30
_TOKEN_BYTES = 4 + 1  # its id, and whether it is learned
_PROCESS_BYTES = 2**28  # what prepare takes once its rows are read


class DiskUse(NamedTuple):
    """Bytes of disk. partitions: of those in work, at most; table: the largest; rows: all that were read; sketches: by
    which those that belong together are found."""

    decisions: int
    partitions: int
    table: int
    rows: int
    sketches: int
    dividing: int
    arrays: int

    @property
    def most(self) -> int:
        """Return what is taken at a time; rows are divided once all are read, and the partitions are gone."""
        return (
            self.decisions + self.rows + self.sketches + max(self.partitions + self.table, self.dividing + self.arrays)
        )

    def report(self) -> dict[str, int]:
        return self._asdict() | {"most": self.most}


def disk_use(partitions: int, sketches: int, ledger: Ledger, division: Division, steps: StepPlan) -> DiskUse:
    """Return what prepare takes in all. partitions: bytes of those in work; sketches: of these."""
    examples = division.examples
    tokens, segments = (int(examples[name].sum(dtype=np.int64)) for name in ("stored_tokens", "segments"))
    records = EXAMPLE.itemsize * len(examples)
    return DiskUse(
        decisions=ledger.decisions_bytes,
        partitions=partitions,
        table=largest_table(ledger),
        rows=_TOKEN_BYTES * tokens + SEGMENT.itemsize * segments + ROW.itemsize * len(division.rows) + records,
        sketches=sketches,
        dividing=DIVIDING_BYTES * len(division.rows),
        arrays=prepared_bytes(examples) + records + READ_BYTES * len(steps.examples) + STEP_BYTES * len(steps),
    )


def largest_table(ledger: Ledger) -> int:
    """Return the bytes of the largest file that lies on disk as a whole while its rows are read."""
    return max((account.size_bytes for account in ledger.files if account.is_table), default=0)


def require_tables_fit(ledger: Ledger, limit_bytes: int) -> None:
    """Raise PREPARE_TOO_SMALL where one table alone is larger than the disk.

    Of other files only the rows come to disk, of which any number may be left out, and any part of their fields."""
    _require(largest_table(ledger), limit_bytes, "disk for its largest Parquet file")


def require_rows_fit(partitions: Path, spool: Path, rows: int, limit_bytes: int) -> None:
    """Raise PREPARE_TOO_SMALL where what lies there, or will once the rows that were read are divided, is too much."""
    needed = size_of(spool) + max(size_of(partitions), DIVIDING_BYTES * rows)
    _require(needed, limit_bytes, f"disk for the first {rows:,} rows")


def require_pairs_fit(spool: Path, limit_bytes: int) -> None:
    """Raise PREPARE_TOO_SMALL where the rows do not fit beside the pairs that are made of them."""
    needed = 2 * size_of(spool) - sketch_bytes(spool)  # these are looked for before
    _require(needed, limit_bytes, "disk for rated answers and the pairs that are made of them")


def require_arrays_fit(spool: Path, division: Division, limit_bytes: int) -> None:
    """Raise PREPARE_TOO_SMALL where the rows, and the arrays that are about to be written, are beyond the disk."""
    kept = (chunk.examples[chunk.examples_of(~chunk.dropped)] for chunk in division.chunks())
    arrays = sum(prepared_bytes(each) - prepared_bytes(each[:0]) + each.nbytes for each in kept)
    _require(size_of(spool) + arrays, limit_bytes, f"disk for {len(division.rows):,} rows and their arrays")


def require_order_fits(examples: int, limit_bytes: int) -> None:
    """Raise PREPARE_TOO_SMALL where the memory does not suffice to draw the order of so many examples."""
    needed = ORDER_BYTES * examples + _PROCESS_BYTES
    what = f"memory, of which {ORDER_BYTES} bytes for each of {examples:,} examples while their order is drawn"
    _require(needed, limit_bytes, what, MEMORY_FIELDS[Stage.PREPARE])


def _require(needed_bytes: int, limit_bytes: int, what: str, field: str = DISK_FIELDS[Stage.PREPARE]) -> None:
    if needed_bytes > limit_bytes:
        needed_gib, limit_gib = (round(each / _GIB, 3) for each in (needed_bytes, limit_bytes))
        raise StageError(Fault.PREPARE_TOO_SMALL, needed_gib=needed_gib, limit_gib=limit_gib, what=what, field=field)


def sketch_bytes(spool: Path) -> int:
    """Return the bytes of what rows are compared by."""
    return sum(size_of(spool / name) for name in COMPARED_FILES)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder; of what is not there, or goes meanwhile, none."""
    try:
        if not path.is_dir():
            return path.stat().st_size
        return sum(size_of(each) for each in path.iterdir())
    except FileNotFoundError:
        return 0
