"""Rows of a text file of any notation: JSON Lines, other JSON, CSV."""

from collections.abc import Iterator

import orjson

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_trainer.data.csv_rows import csv_rows
from finetune_trainer.data.file_kinds import Notation
from finetune_trainer.data.files import lines
from finetune_trainer.data.json_values import Way, values, way_of
from finetune_trainer.data.problems import Broken
from finetune_trainer.data.raw_rows import Cut, RawRow, raw_broken, raw_line


def text_rows(chunks: Iterator[bytes], notation: Notation, file: str) -> Iterator[RawRow]:
    """Yield the rows of a stream of text, not decoded yet.

    Each comes with its number: its line in JSON Lines, else its place among the rows.

    Raises BROKEN_FILE with the row from which on the file cannot be read."""
    number = 0
    try:
        for row in _rows(chunks, notation, file):
            number = row.number
            yield row
    except StageError as error:
        if error.fault is Fault.BROKEN_FILE and error.args_by_name["row"] == 0:
            raise StageError(Fault.BROKEN_FILE, **{**error.args_by_name, "row": number + 1}) from error
        raise


def _rows(chunks: Iterator[bytes], notation: Notation, file: str) -> Iterator[RawRow]:
    if notation in (Notation.CSV, Notation.TSV):
        for number, value, size_bytes, held_bytes in csv_rows(chunks, notation, file):
            if isinstance(value, Broken):
                yield raw_broken(number, value, size_bytes)
            else:
                yield RawRow(number, Cut.CELLS, orjson.dumps([value, held_bytes]), size_bytes)
        return
    way, chunks = way_of(chunks, notation)
    for number, row in lines(chunks) if way is Way.LINES else values(chunks, way, file):
        yield raw_broken(number, row) if isinstance(row, Broken) else raw_line(number, row)
