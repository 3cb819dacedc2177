"""The partitions of a job: all its datasets cut into them, in order, and what is to be done with each."""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from shutil import rmtree

from finetune_api.errors import StageError
from finetune_trainer.data.accounts import RowPlace
from finetune_trainer.data.bad_rows import BadRows
from finetune_trainer.data.listing import Inputs
from finetune_trainer.data.partition_messages import Task
from finetune_trainer.data.partition_runner import NoRowsError, extractors_for
from finetune_trainer.data.partitions import MAX_PARTITION_BYTES, Partition, cut, in_flight_bytes, partition_bytes
from finetune_trainer.data.raw_rows import PlacedRow, decode_row, read_rows, read_sizes
from finetune_trainer.data.reading import (
    DecodedRows,
    RawReader,
    choices_for,
    peek,
    shape_of,
    unread_columns,
    valid_rows,
)
from finetune_trainer.reading_steps import PrepareStage, dataset_choices, document_template

FEW = 2  # partitions for which more than one process, and keeping them finished, may pay


class JobPartitions:
    """Cuts all datasets into partitions, as files in the work folder."""

    def __init__(self, stage: PrepareStage, inputs: list[Inputs], bad: BadRows, workers: int, disk_bytes: int) -> None:
        self._stage, self._inputs, self._bad = stage, inputs, bad
        self._cut = 0  # the dataset that is cut
        self.folder = stage.ctx.work_dir / "partitions"
        rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.total_bytes = sum(each.size_bytes for each in stage.ledger.files)
        self._size_bytes = partition_bytes(self.total_bytes, workers, disk_bytes)
        self.in_flight_bytes = in_flight_bytes(self._size_bytes, workers)
        most_bytes = sum(each.most_bytes for each in stage.ledger.files)
        self.most_partitions = FEW + most_bytes // self._size_bytes
        given = zip(inputs, dataset_choices(stage), strict=True)
        self._choices = [choices_for(each, choices) for each, choices in given]
        self._extractors = extractors_for(stage.resources.cpu_count, stage.resources.memory_bytes)

    def partitions(self) -> Generator[Partition]:
        """Yield the partitions of all datasets, in order. Raises NoRowsError and what reading raises."""
        stage, ctx = self._stage, self._stage.ctx
        method = ctx.config.spec.method.type
        for number, (dataset, inputs) in enumerate(zip(ctx.config.spec.datasets, self._inputs, strict=True)):
            choices, self._cut = self._choices[number], number
            unread = unread_columns(choices)
            template = document_template(stage.preprocessing)
            reader = RawReader(ctx.store, stage.ledger, inputs, unread, ctx.work_dir, self._extractors, template)
            with closing(reader.rows()) as rows:
                peeked, error = _peeked(rows)
                found = shape_of(inputs, dataset.format, stage.ledger, peeked, method, choices, number)
                stage.formats.append(found.shape if found else stage.method.formats[0])
                if found is not None:
                    self._choices[number] = replace(choices, told_by=found.told_by)
                else:
                    yield from cut(number, reader, iter(peeked), self.folder, MAX_PARTITION_BYTES)
                    raise error or NoRowsError
                yield from cut(number, reader, _given(peeked, error, rows), self.folder, self._size_bytes)

    def tidy(self) -> None:
        """Remove all partitions, and what they have become so far."""
        rmtree(self.folder, ignore_errors=True)

    def task(self, partition: Partition) -> Task:
        """Return what is to be done with a partition."""
        files = self._stage.ledger.files[partition.first_file : partition.first_file + partition.files]
        choices = self._choices[partition.dataset]
        return Task(
            rows=str(partition.path),
            out=str(partition.path.with_suffix(".out")),
            files=[each.uri for each in files],
            tables=[each.is_table for each in files],
            data_format=self._stage.formats[partition.dataset],
            columns=dict(choices.columns),
            ignored=sorted(choices.ignored),
            system_messages=choices.system_messages,
            same_role=choices.same_role,
            learns_all=choices.learns_all,
            told_by=choices.told_by,
            preference=choices.preference.model_dump(mode="json", exclude_none=True),
            license_field=choices.license_field,
            licenses=list(choices.licenses),
            group_field=choices.group_field,
        )

    def rows_of(self, partition: Partition) -> DecodedRows:
        """Yield the rows of a partition, decoded."""
        with partition.path.open("rb") as stream:
            for file, row in read_rows(stream):
                yield partition.first_file + file, decode_row(row)

    def sizes_of(self, partition: Partition) -> Iterator[tuple[RowPlace, int]]:
        """Yield the place of each row of a partition, and its bytes in the file."""
        with partition.path.open("rb") as stream:
            for where, size_bytes in read_sizes(stream):
                yield where._replace(file=partition.first_file + where.file), size_bytes

    def count_on(self, partitions: Iterator[Partition], dataset: int) -> None:
        """Count the rows behind a broken one that ends the job, as far as that is done.

        Raises BROKEN_ROW, or what ends the reading of the dataset before enough is counted."""
        if self._bad.counted_enough:
            raise self._bad.error()

        def rows() -> DecodedRows:
            try:
                for partition in partitions:
                    if partition.dataset != dataset:
                        return
                    yield from self.rows_of(partition)
            except NoRowsError:
                return
            except StageError:
                if self._cut == dataset:
                    raise

        found, choices = self._stage.formats[dataset], self._choices[dataset]
        for _ in valid_rows(self._stage.ledger, self._bad, rows(), found, choices):
            pass


def _peeked(rows: Iterator[PlacedRow]) -> tuple[list[PlacedRow], StageError | None]:
    """Return the first rows, and what ended them."""
    peeked: list[PlacedRow] = []
    try:
        for row in peek(rows):
            peeked.append(row)
    except StageError as error:
        return peeked, error
    return peeked, None


def _given(peeked: list[PlacedRow], error: StageError | None, rows: Iterator[PlacedRow]) -> Iterator[PlacedRow]:
    """Yield the first rows and the others, holding none; raises in its turn what ended them."""
    peeked.reverse()
    while peeked:
        yield peeked.pop()
    if error is not None:
        raise error
    yield from rows
