"""Files to checked rows, in order: which of them are broken, and when that ends the job."""

import logging
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from finetune_api.data_files import MAX_UNPACKED_BYTES
from finetune_api.errors import StageError
from finetune_api.job import DatasetFormat, MethodType
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_api.run import MAX_ARG_CHARS
from finetune_trainer.data import detect, files, parquet
from finetune_trainer.data.accounts import FileAccount, Ledger
from finetune_trainer.data.field_names import METADATA
from finetune_trainer.data.file_kinds import FileKind, Notation, Packing
from finetune_trainer.data.kinds import content_hash
from finetune_trainer.data.listing import Inputs
from finetune_trainer.data.problems import Broken, place
from finetune_trainer.data.rows import Row
from finetune_trainer.data.shapes import Found, RowChoices, read_row
from finetune_trainer.data.text_rows import text_rows
from finetune_trainer.data.unpacking import unpacked
from finetune_trainer.store import Store

log = logging.getLogger(__name__)

_PEEK_ROWS = 1000
_PEEK_BYTES = 32 * 2**20
_MAX_BROKEN = 1000
_MAX_ROWS_AFTER_BROKEN = 100_000  # how far a failing job counts on: a few seconds


DecodedRows = Iterator[tuple[int, files.Decoded]]  # each with the index of its file
Select = Callable[[DecodedRows], DecodedRows]  # which rows of a dataset are read, in order


def every_row(rows: DecodedRows) -> DecodedRows:
    """Return all of them."""
    return rows


class Checked(NamedTuple):
    """A valid row: index of its file, its number there, what it says, the hash of that, and its size in memory."""

    file: int
    number: int
    row: Row
    content_hash: bytes
    held_bytes: int


class BadRows:
    """Broken rows are put aside and counted, or end the job."""

    def __init__(self, ledger: Ledger, quarantine: bool, max_broken_fraction: float) -> None:
        self._ledger = ledger
        self.quarantine = quarantine
        self._max_fraction = max_broken_fraction
        self._first: tuple[str, int, Broken] | None = None
        self._first_at = 0
        self._count = 0

    def add(self, file: int, number: int, stage: str, broken: Broken) -> None:
        """Row `number` of a file is broken.

        Raises BROKEN_ROW once more are than will be allowed, were all rows that are still to come good."""
        self._ledger.drop(file, number, stage, broken.problem, broken.field)
        self._count += 1
        if self._first is None:
            self._first = (self._ledger.files[file].uri, number, broken)
            self._first_at = self._ledger.rows_read
        if self.quarantine and self._count % _MAX_BROKEN == 0:
            most_rows = self._ledger.rows_read + sum(each.most_good_rows_to_come for each in self._ledger.files)
            if self._count > self._max_fraction * most_rows:
                raise self.error()

    @property
    def failing(self) -> bool:
        return self._first is not None and not self.quarantine

    @property
    def counted_enough(self) -> bool:
        """Whether a failing job has read on far enough to say how many rows are broken."""
        return self._count >= _MAX_BROKEN or self._ledger.rows_read - self._first_at >= _MAX_ROWS_AFTER_BROKEN

    def check(self) -> None:
        """Raises BROKEN_ROW when more rows are broken than allowed."""
        allowed = self._max_fraction * self._ledger.rows_read if self.quarantine else 0
        if self._count > allowed:
            raise self.error()

    def error(self) -> StageError:
        """The first broken row, and how many there are. There must be one."""
        assert self._first is not None
        file, number, broken = self._first
        return StageError(
            Fault.BROKEN_ROW,
            file=place(file),
            row=number,
            field=f", field {shortened(broken.field, 200)}" if broken.field else "",
            problem=shortened(broken.words, MAX_ARG_CHARS),
            broken=self._count,
            rows=self._ledger.rows_read,
            remedy=self._remedy(),
        )

    def _remedy(self) -> str:
        """Return how to go on without the broken rows."""
        if not self.quarantine:
            return "go on without them by preprocessing.onBadRow: Quarantine and preprocessing.maxBrokenFraction"
        return f"raise preprocessing.maxBrokenFraction, which allows {self._max_fraction:g} of all rows"


def checked_rows(
    store: Store,
    ledger: Ledger,
    bad: BadRows,
    inputs: Inputs,
    given: DatasetFormat | None,
    method: MethodType,
    choices: RowChoices,
    work_dir: Path,
    formats: list[DatasetFormat],
    select: Select = every_row,
) -> Iterator[Checked]:
    """Valid rows of one dataset, in order; its format is appended to `formats` before the first.

    Rows that `select` leaves out are not counted, but its format is told from all rows as ever.

    Raises WRONG_FORMAT, BROKEN_ROW, BROKEN_FILE, INPUT_CHANGED.
    """
    unread = METADATA.union(choices.ignored).difference(choices.columns)
    with closing(_decoded_rows(store, ledger, inputs, unread, work_dir)) as decoded:
        yield from _checked(ledger, bad, decoded, given, method, choices, formats, select)


def _checked(
    ledger: Ledger,
    bad: BadRows,
    decoded: DecodedRows,
    given: DatasetFormat | None,
    method: MethodType,
    choices: RowChoices,
    formats: list[DatasetFormat],
    select: Select,
) -> Iterator[Checked]:
    peeked: list[tuple[int, files.Decoded]] = []
    peeked_bytes = 0
    for item in decoded:
        peeked.append(item)
        peeked_bytes += item[1].held_bytes
        if len(peeked) >= _PEEK_ROWS or peeked_bytes >= _PEEK_BYTES:
            break
    of_tables = replace(choices, nulls_are_absent=True)
    data_format = given or _detect(ledger, bad, peeked, method, choices)
    formats.append(data_format)
    for file, (number, value, size_bytes, held_bytes) in select(chain(_given_away(peeked), decoded)):
        ledger.count(file, size_bytes)
        checked = _check(value, data_format, of_tables if ledger.files[file].is_table else choices)
        if isinstance(checked, Broken):
            bad.add(file, number, "read", checked)
        elif not bad.failing:
            found, hashed = checked
            ledger.ignore_fields(found.passed_over)
            ledger.change(file, number, found.changes)
            yield Checked(file, number, found.row, hashed, held_bytes)
        if bad.failing and bad.counted_enough:
            break
    if bad.failing:
        raise bad.error()


def _check(value: object, data_format: DatasetFormat, choices: RowChoices) -> tuple[Found, bytes] | Broken:
    if isinstance(value, Broken):
        return value
    found = read_row(value, data_format, choices)
    if isinstance(found, Broken):
        return found
    hashed = content_hash(found.row)
    return hashed if isinstance(hashed, Broken) else (found, hashed)


def _detect(
    ledger: Ledger,
    bad: BadRows,
    peeked: list[tuple[int, files.Decoded]],
    method: MethodType,
    choices: RowChoices,
) -> DatasetFormat:
    """The dataset's format; when no row is an object, what is wrong with the first."""
    if not peeked:
        return detect.FORMATS[method][0]  # no rows, so it does not matter
    if not any(isinstance(item.value, dict) for _, item in peeked):
        for file, item in peeked:
            ledger.count(file, item.size_bytes)
            broken = _check(item.value, detect.FORMATS[method][0], choices)
            assert isinstance(broken, Broken)
            bad.add(file, item.number, "read", broken)
        raise bad.error()
    rows = [(ledger.files[file].uri, item.number, item.value) for file, item in peeked]
    return detect.detect(rows, method, choices)


def _decoded_rows(
    store: Store, ledger: Ledger, inputs: Inputs, unread: Collection[str], work_dir: Path
) -> Generator[tuple[int, files.Decoded]]:
    """Rows of the files in order, each file at one version. Only Parquet, which needs seeking, goes to disk."""
    with parquet.ParquetDecoder(unread) as decoder:
        for index, kind in zip(inputs.files, inputs.kinds, strict=True):
            account = ledger.files[index]
            size_bytes = 0
            if kind.notation is Notation.PARQUET:
                rows = _parquet_rows(store, ledger, account, decoder, work_dir / "input.parquet")
            else:
                rows = _text_rows(store, account, kind)
            for item in rows:
                size_bytes += item.size_bytes
                yield index, item
            account.most_bytes = size_bytes


def _parquet_rows(
    store: Store, ledger: Ledger, account: FileAccount, decoder: parquet.ParquetDecoder, path: Path
) -> Iterator[files.Decoded]:
    account.sha256 = store.download(account.uri, path)
    account.size_bytes = path.stat().st_size
    rows = 0
    for item in decoder.rows(path, account.uri):
        account.most_rows = decoder.facts.rows
        rows += 1
        yield item
    if rows:
        ledger.ignore_fields([name for name in decoder.facts.names if name in decoder.unread], rows)
    path.unlink()


def _text_rows(store: Store, account: FileAccount, kind: FileKind) -> Iterator[files.Decoded]:
    with store.open(account.uri) as stream:
        reader = files.HashingReader(stream)
        chunks = iter(reader)
        if kind.packing is not Packing.NONE:
            chunks = unpacked(chunks, kind.packing, account.uri, MAX_UNPACKED_BYTES)
        yield from text_rows(chunks, kind.notation, account.uri)
        account.sha256, account.size_bytes = reader.digest, reader.size_bytes


def _given_away(items: list[tuple[int, files.Decoded]]) -> DecodedRows:
    """Yield the items and hold none that was taken: they may be large."""
    items.reverse()
    while items:
        yield items.pop()
