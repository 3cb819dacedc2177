"""Files to checked rows, in order: which of them are broken, and when that ends the job."""

import logging
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

from finetune_api.data_files import MAX_UNPACKED_BYTES
from finetune_api.job import DatasetFormat, MethodType
from finetune_trainer.data import detect, files, parquet
from finetune_trainer.data.accounts import FileAccount, Ledger
from finetune_trainer.data.bad_rows import BadRows
from finetune_trainer.data.documents.reading import PLAIN, extracted
from finetune_trainer.data.field_names import METADATA
from finetune_trainer.data.file_kinds import FileKind, Notation, Packing
from finetune_trainer.data.kinds import content_hash, texts
from finetune_trainer.data.licenses import RowLicenses
from finetune_trainer.data.listing import Inputs
from finetune_trainer.data.problems import Broken, LeftOut, ReadDocument
from finetune_trainer.data.raw_rows import PlacedRow, RawRow, decode_row
from finetune_trainer.data.row_groups import group_hash
from finetune_trainer.data.rows import Row
from finetune_trainer.data.shapes import Found, RowChoices, read_row
from finetune_trainer.data.text_rows import text_rows
from finetune_trainer.data.unpacking import unpacked
from finetune_trainer.methods import method_of
from finetune_trainer.store import Store

log = logging.getLogger(__name__)

_PEEK_ROWS = 1000
_PEEK_BYTES = 32 * 2**20


DecodedRows = Iterator[tuple[int, files.Decoded]]  # each with the index of its file
Select = Callable[[DecodedRows], DecodedRows]  # which rows of a dataset are read, in order


def every_row(rows: DecodedRows) -> DecodedRows:
    """Return all of them."""
    return rows


class Checked(NamedTuple):
    """A valid row: index of its file, its number there, what it says, the hash of that, and its size in memory.

    group_hash: equal for rows that are held out together; empty where the job names no field for that."""

    file: int
    number: int
    row: Row
    content_hash: bytes
    held_bytes: int
    group_hash: bytes = b""

    def with_row(self, row: Row) -> "Checked":
        """Return it with the row that a stage has made of its own."""
        hashed = content_hash(row)
        if isinstance(hashed, Broken):
            raise AssertionError("a stage has made a row that has no hash")
        more = _size_of_texts(row) - _size_of_texts(self.row)
        return self._replace(row=row, content_hash=hashed, held_bytes=max(1, self.held_bytes + more))


def _size_of_texts(row: Row) -> int:
    return sum(map(len, texts(row).values()))


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
    template: str = PLAIN,
) -> Iterator[Checked]:
    """Valid rows of one dataset, in order; its format is appended to `formats` before the first.

    Rows that `select` leaves out are not counted, but its format is told from all rows as ever.

    Raises WRONG_FORMAT, BROKEN_ROW, BROKEN_FILE, INPUT_CHANGED.
    """
    choices = choices_for(inputs, choices)
    with closing(RawReader(store, ledger, inputs, unread_columns(choices), work_dir, template=template).rows()) as rows:
        peeked = list(peek(rows))
        found = shape_of(inputs, given, ledger, peeked, method, choices, len(formats))
        if found is None:
            _count_broken(ledger, bad, peeked, method, choices)
            raise bad.error()
        formats.append(found.shape)
        choices = replace(choices, told_by=found.told_by)
        decoded = ((file, decode_row(row)) for file, row in chain(_given_away(peeked), rows))
        yield from valid_rows(ledger, bad, select(decoded), found.shape, choices)


def choices_for(inputs: Inputs, choices: RowChoices) -> RowChoices:
    """Return what the job chose about the rows of files: those of documents have no names of columns."""
    return replace(choices, columns={}, ignored=frozenset()) if inputs.documents else choices


def shape_of(
    inputs: Inputs,
    given: DatasetFormat | None,
    ledger: Ledger,
    peeked: list[PlacedRow],
    method: MethodType,
    choices: RowChoices,
    dataset: int,
) -> detect.Detected | None:
    """Return the format of a dataset of this number; None when no row is an object.

    Raises WRONG_FORMAT, and what `check_preference` does."""
    if inputs.documents:
        found = detect.Detected(DatasetFormat.TEXT, "its files are documents, which have")
    else:
        found = detect.given_shape(given) if given else detect_format(ledger, peeked, method, choices)
    if found is not None and peeked and choices.preference.model_fields_set:
        detect.check_preference(found.shape, choices, dataset, (decode_row(row).value for _, row in peeked))
    return found


def unread_columns(choices: RowChoices) -> Collection[str]:
    """Return the names of columns that are passed over."""
    return METADATA.union(choices.ignored).difference(choices.columns, [choices.license_field, choices.group_field])


def peek(rows: Iterator[PlacedRow]) -> Iterator[PlacedRow]:
    """Yield the first rows, by which a dataset's format is told."""
    peeked_bytes = 0
    for count, item in enumerate(rows, 1):
        yield item
        peeked_bytes += decode_row(item.row).held_bytes
        if count >= _PEEK_ROWS or peeked_bytes >= _PEEK_BYTES:
            return


def _count_broken(
    ledger: Ledger, bad: BadRows, peeked: list[PlacedRow], method: MethodType, choices: RowChoices
) -> None:
    """Count the first rows of a dataset, none of which is an object."""
    for file, row in peeked:
        item = decode_row(row)
        ledger.count(file, item.size_bytes)
        broken = _check(item.value, method_of(method).formats[0], choices)
        assert isinstance(broken, Broken)
        bad.add(file, item.number, "read", broken, item.value)


def valid_rows(
    ledger: Ledger, bad: BadRows, rows: DecodedRows, data_format: DatasetFormat, choices: RowChoices
) -> Iterator[Checked]:
    """Yield the valid rows and count all. Raises BROKEN_ROW."""
    of_tables = replace(choices, nulls_are_absent=True)
    licenses = RowLicenses(choices.license_field, choices.licenses) if choices.license_field else None
    for file, (number, value, size_bytes, held_bytes) in rows:
        ledger.count(file, size_bytes)
        if isinstance(value, LeftOut):
            ledger.drop(file, number, "extract", value.drop, words=value.words)
            continue
        if isinstance(value, ReadDocument):
            ledger.change(file, number, value.changes)
            value = {"text": value.text}
        if licenses is not None and isinstance(value, dict):
            said = licenses.take(cast(dict[str, Any], value))
            if not bad.failing:
                ledger.license(file, number, said, licenses.field)
            if said.drop is not None:
                continue
        group = _group(value, choices)
        checked = _check(value, data_format, of_tables if ledger.files[file].is_table else choices)
        if isinstance(checked, Broken):
            bad.add(file, number, "read", checked, value)
        elif isinstance(group, Broken):
            bad.add(file, number, "read", group, value)
        elif not bad.failing:
            found, hashed = checked
            ledger.ignore_fields(sorted(found.passed_over))
            ledger.change(file, number, found.changes)
            yield Checked(file, number, found.row, hashed, held_bytes, group)
        if bad.failing and bad.counted_enough:
            break
    if bad.failing:
        raise bad.error()


def _group(value: object, choices: RowChoices) -> bytes | Broken:
    return b"" if choices.group_field is None else group_hash(value, choices.group_field)


def _check(value: object, data_format: DatasetFormat, choices: RowChoices) -> tuple[Found, bytes] | Broken:
    if isinstance(value, Broken):
        return value
    found = read_row(value, data_format, choices)
    if isinstance(found, Broken):
        return found
    hashed = content_hash(found.row)
    return hashed if isinstance(hashed, Broken) else (found, hashed)


def detect_format(
    ledger: Ledger, peeked: list[PlacedRow], method: MethodType, choices: RowChoices
) -> detect.Detected | None:
    """Return the dataset's format; None when no row is an object. Raises WRONG_FORMAT."""
    if not peeked:
        return detect.given_shape(method_of(method).formats[0])  # no rows, so it does not matter
    rows = [(file, decode_row(row)) for file, row in peeked]
    if not any(isinstance(item.value, dict) for _, item in rows):
        return None
    return detect.detect([(ledger.files[file].uri, item.number, item.value) for file, item in rows], method, choices)


class RawReader:
    """Reads the files of a dataset in order, each at one version. Only Parquet, which needs seeking, and documents,
    which are read ahead, go to disk.

    unread: names of columns that are passed over; processes: that read documents, at most; template: of
    their texts."""

    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        inputs: Inputs,
        unread: Collection[str],
        work_dir: Path,
        processes: int = 1,
        template: str = PLAIN,
    ) -> None:
        self._store, self._ledger, self._inputs = store, ledger, inputs
        self._unread, self._work_dir, self._processes = unread, work_dir, processes
        self._template = template
        self._path = work_dir / "input.parquet"
        self.row_bytes = 0  # of the rows so far, unpacked
        self._whole_bytes = 0  # of the files that are read to their end
        self._within: Callable[[], float] = lambda: 0.0

    @property
    def stored_bytes(self) -> int:
        """How much of the files, as they lie in the bucket, was read so far."""
        return self._whole_bytes + int(self._within())

    def rows(self) -> Generator[PlacedRow]:
        """Yield the rows, each with the index of its file."""
        if self._inputs.documents:
            yield from self._documents()
            return
        with parquet.ParquetDecoder(self._unread) as decoder:
            for index, kind in zip(self._inputs.files, self._inputs.kinds, strict=True):
                account = self._ledger.files[index]
                is_parquet = kind.notation is Notation.PARQUET
                for row in self._parquet(account, decoder) if is_parquet else self._text(account, kind):
                    self.row_bytes += row.size_bytes
                    yield PlacedRow(index, row)
                self._whole_bytes, self._within = self._whole_bytes + account.size_bytes, lambda: 0.0

    def _documents(self) -> Generator[PlacedRow]:
        folder = self._work_dir / "documents"
        with closing(extracted(self._store, self._inputs.documents, folder, self._processes)) as documents:
            for index, document in zip(self._inputs.files, documents, strict=True):
                account = self._ledger.files[index]
                account.sha256, account.size_bytes = document.sha256, document.size_bytes
                for row in document.rows(self._template):
                    self.row_bytes += row.size_bytes
                    yield PlacedRow(index, row)
                self._whole_bytes += account.size_bytes

    def _parquet(self, account: FileAccount, decoder: parquet.ParquetDecoder) -> Iterator[RawRow]:
        try:
            yield from self._parquet_rows(account, decoder)
        finally:  # the rows lie there as they were written
            self._path.unlink(missing_ok=True)

    def _parquet_rows(self, account: FileAccount, decoder: parquet.ParquetDecoder) -> Iterator[RawRow]:
        account.sha256 = self._store.download(account.uri, self._path)
        account.size_bytes = self._path.stat().st_size
        rows = 0
        self._within = lambda: account.size_bytes * rows / max(1, decoder.facts.rows)
        for item in decoder.rows(self._path, account.uri):
            account.most_rows = decoder.facts.rows
            rows += 1
            yield item
        if rows:
            self._ledger.ignore_fields([name for name in decoder.facts.names if name in decoder.unread], rows)

    def _text(self, account: FileAccount, kind: FileKind) -> Iterator[RawRow]:
        with self._store.open(account.uri) as stream:
            reader = files.HashingReader(stream)
            self._within = lambda: reader.size_bytes
            chunks = iter(reader)
            if kind.packing is not Packing.NONE:
                chunks = unpacked(chunks, kind.packing, account.uri, MAX_UNPACKED_BYTES)
            yield from text_rows(chunks, kind.notation, account.uri)
            account.sha256, account.size_bytes = reader.digest, reader.size_bytes


def _given_away(items: list[PlacedRow]) -> Iterator[PlacedRow]:
    """Yield the items and hold none that was taken: they may be large."""
    items.reverse()
    while items:
        yield items.pop()
