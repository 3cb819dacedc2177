"""Which rows are broken, and when that ends the job: with the first of them, or once too many are."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_api.run import MAX_ARG_CHARS
from finetune_trainer.data.accounts import FileAccount, Ledger, RowPlace
from finetune_trainer.data.problems import Broken, place
from finetune_trainer.data.redacted_shape import redacted_shape

_JUDGED_EVERY = (
    1000  # broken rows: how often it is judged whether there is hope, and where a failing job stops counting
)
_MAX_ROWS_AFTER_BROKEN = 100_000  # how far a failing job counts on: a few seconds


class BrokenRow(NamedTuple):
    """Where a broken row is, and what is wrong with it. file: as an index into the ledger."""

    file: int
    number: int
    broken: Broken


class BadRows:
    """Broken rows are put aside and counted, or end the job."""

    def __init__(self, ledger: Ledger, quarantine: bool, max_broken_fraction: float) -> None:
        self._ledger = ledger
        self.quarantine = quarantine
        self._max_fraction = max_broken_fraction
        self.first: BrokenRow | None = None
        self.first_at = 0  # rows read then
        self.count = 0

    def add(self, file: int, number: int, stage: str, broken: Broken, value: object = None) -> None:
        """Row `number` of a file is broken. value: what it decodes to, of which its shape is told.

        Raises BROKEN_ROW once more are than will be allowed, were all rows that are still to come good."""
        words = shortened(broken.detail, MAX_ARG_CHARS)
        shape = "" if value is None or isinstance(value, Broken) else redacted_shape(value)
        self._ledger.drop(file, number, stage, broken.problem, broken.field, words=words, shape=shape)
        self.count += 1
        if self.first is None:
            self.first, self.first_at = BrokenRow(file, number, broken), self._ledger.rows_read
        if self.count % _JUDGED_EVERY == 0 and not self._has_hope(self._ledger.files, self._ledger.file_read, 0, 0):
            raise self.error()

    def take(self, first: BrokenRow | None, first_at: int, count: int) -> None:
        """Add the broken rows of a partition, before its rows are added to the ledger.

        first_at: rows that the partition had read then."""
        if self.first is None and first is not None:
            self.first, self.first_at = first, self._ledger.rows_read + first_at
        self.count += count

    def rows_until_hopeless(self, rows: Iterable[tuple[RowPlace, int]], broken: Sequence[RowPlace]) -> int | None:
        """Return how many of a partition's rows are read until too many are broken; None where that is never known.

        rows: all of the partition, none of which is counted yet, with their bytes; broken: those that are, in order."""
        judged = {place: count for count, place in enumerate(broken, 1) if (self.count + count) % _JUDGED_EVERY == 0}
        if not judged:
            return None
        files = list(self._ledger.files)
        for read, (where, size_bytes) in enumerate(rows, 1):
            account = files[where.file]
            files[where.file] = replace(account, rows_in=account.rows_in + 1, bytes_in=account.bytes_in + size_bytes)
            if where in judged and not self._has_hope(files, where.file, read, judged[where]):
                return read
        return None

    def _has_hope(self, files: Sequence[FileAccount], current: int, more_rows: int, more_broken: int) -> bool:
        """Return whether few enough are broken if all rows that are still to come are good.

        files: the job's, those before the current being read; more_rows, more_broken: what is not counted yet."""
        to_come = files[current].most_good_rows_to_come + sum(each.most_rows_by_size for each in files[current + 1 :])
        rows = self._ledger.rows_read + more_rows + to_come
        return not self.quarantine or self.count + more_broken <= self._max_fraction * rows

    @property
    def failing(self) -> bool:
        return self.first is not None and not self.quarantine

    @property
    def counted_enough(self) -> bool:
        """Whether a failing job has read on far enough to say how many rows are broken."""
        return self.count >= _JUDGED_EVERY or self._ledger.rows_read - self.first_at >= _MAX_ROWS_AFTER_BROKEN

    def check(self) -> None:
        """Raises BROKEN_ROW when more rows are broken than allowed."""
        allowed = self._max_fraction * self._ledger.rows_read if self.quarantine else 0
        if self.count > allowed:
            raise self.error()

    def error(self) -> StageError:
        """The first broken row, and how many there are. There must be one."""
        assert self.first is not None
        file, number, broken = self.first
        uri = self._ledger.files[file].uri
        return StageError(
            Fault.BROKEN_ROW,
            file=place(uri),
            row=number,
            field=f", field {shortened(broken.field, 200)}" if broken.field else "",
            problem=shortened(broken.words, MAX_ARG_CHARS),
            broken=self.count,
            rows=self._ledger.rows_read,
            remedy=self._remedy(),
        )

    def _remedy(self) -> str:
        """Return how to go on without the broken rows."""
        if not self.quarantine:
            return "go on without them by preprocessing.onBadRow: Quarantine and preprocessing.maxBrokenFraction"
        if self._max_fraction >= 1:  # a dataset whose first rows are no rows at all
            return "leave the file out"
        return f"raise preprocessing.maxBrokenFraction, which allows {self._max_fraction:g} of all rows"
