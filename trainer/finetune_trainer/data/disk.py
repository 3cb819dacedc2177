"""What prepare takes of its disk, by what it is, and that there is as much.

While rows are read: partitions in work, the table that they are cut out of, and what all rows before them became.
Then, beside these rows: what tells equal ones, the arrays that training reads, and the steps.
"""

from typing import NamedTuple

import numpy as np

from finetune_trainer.data.accounts import Ledger
from finetune_trainer.data.division import DIVIDING_BYTES, Division
from finetune_trainer.data.spool import EXAMPLE, ROW, SEGMENT, prepared_bytes
from finetune_trainer.step_plan import READ_BYTES, STEP_BYTES, StepPlan

_GIB = 2**30


class DiskUse(NamedTuple):
    """Bytes of disk. partitions: of those in work, at most; table: the largest; rows: all that were read."""

    partitions: int
    table: int
    rows: int
    dividing: int = 0
    arrays: int = 0

    @property
    def most(self) -> int:
        """Return what is taken at a time; rows are divided once all are read, and the partitions are gone."""
        return self.rows + max(self.partitions + self.table, self.dividing + self.arrays)

    def report(self) -> dict[str, int]:
        return self._asdict() | {"most": self.most}


def disk_use(partitions: int, ledger: Ledger, division: Division, steps: StepPlan | None) -> DiskUse:
    """Return what prepare takes in all. partitions: bytes of those in work; steps: None before they are planned."""
    examples = division.examples
    tokens, segments = (int(examples[name].sum(dtype=np.int64)) for name in ("stored_tokens", "segments"))
    records = EXAMPLE.itemsize * len(examples)
    return DiskUse(
        partitions=partitions,
        table=largest_table(ledger),
        rows=5 * tokens + SEGMENT.itemsize * segments + ROW.itemsize * len(division.rows) + records,
        dividing=DIVIDING_BYTES * len(division.rows),
        arrays=prepared_bytes(examples) + records + _steps_bytes(steps),
    )


def _steps_bytes(steps: StepPlan | None) -> int:
    return 0 if steps is None else READ_BYTES * len(steps.examples) + STEP_BYTES * len(steps)


def largest_table(ledger: Ledger) -> int:
    """Return the bytes of the largest file that lies on disk as a whole while its rows are read."""
    return max((account.size_bytes for account in ledger.files if account.is_table), default=0)
