"""Rows of CSV and TSV files: RFC 4180, with a header, every value a text; an empty cell is no value.

A row's number is its place in the file, the header being row 1, as a spreadsheet counts.
"""

import csv
from collections.abc import Iterator

from finetune_api.row_words import MAX_LINE_BYTES
from finetune_trainer.data.file_kinds import BOM, Notation
from finetune_trainer.data.files import VALUE_BYTES, Decoded, damaged
from finetune_trainer.data.problems import Broken, Problem

MAX_COLUMNS = 1000
_DELIMITERS = {Notation.CSV: ",", Notation.TSV: "\t"}
_OTHERS = {";": "a semicolon", "\t": "a tab", "|": "a bar", ",": "a comma"}
csv.field_size_limit(MAX_LINE_BYTES)


class _Lines:
    """Lines of a file as texts, as many as the reader takes; a row of more than MAX_LINE_BYTES ends the file."""

    def __init__(self, chunks: Iterator[bytes], file: str) -> None:
        self._chunks, self._file = chunks, file
        self.next_row(1)

    def next_row(self, number: int) -> None:
        self.number, self.size_bytes, self.is_utf8 = number, 0, True

    def __iter__(self) -> Iterator[str]:
        rest = b""
        is_first = True
        for chunk in self._chunks:
            lines = (rest + chunk).split(b"\n")
            rest = lines.pop()
            for line in lines:
                yield self._text(line.removeprefix(BOM) if is_first else line) + "\n"
                is_first = False
            self._check(len(rest))
        if rest:
            yield self._text(rest.removeprefix(BOM) if is_first else rest)

    def _check(self, more_bytes: int) -> None:
        if self.size_bytes + more_bytes > MAX_LINE_BYTES:
            problem = f"the row is longer than {MAX_LINE_BYTES // 2**20} MiB, or a quote in it has no end"
            raise damaged(self._file, self.number, problem)

    def _text(self, line: bytes) -> str:
        self._check(len(line))
        self.size_bytes += len(line) + 1
        try:
            return line.decode()
        except UnicodeDecodeError:
            self.is_utf8 = False
            return line.decode(errors="surrogateescape")


def csv_rows(chunks: Iterator[bytes], notation: Notation, file: str) -> Iterator[Decoded]:
    """Yield the rows below the header.

    Raises BROKEN_FILE for a header that names nothing, or one column twice, and for a row whose end cannot be told, as
    its quotes are not those of RFC 4180."""
    lines = _Lines(chunks, file)
    reader = csv.reader(lines, delimiter=_DELIMITERS[notation], strict=True)
    header: list[str] | None = None
    while (cells := _next(reader, lines, file)) is not None:
        number = lines.number
        if header is None and cells:
            header = _header(cells, lines, file)
        elif header is not None and cells:
            value = _row(cells, header) if lines.is_utf8 else Broken(Problem.INVALID_UTF8)
            held_bytes = 0 if isinstance(value, Broken) else lines.size_bytes + VALUE_BYTES * len(cells)
            yield Decoded(number, value, lines.size_bytes, held_bytes)
        lines.next_row(number + 1)


def _next(reader: Iterator[list[str]], lines: _Lines, file: str) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        problem = "its quotes are not those of CSV: a quote within a quoted text is written twice"
        if "end of data" in str(error):
            problem = "a quote in it has no end"
        elif "new-line" in str(error):
            problem = "its lines end in a carriage return alone"
        raise damaged(file, lines.number, problem) from None


def _header(cells: list[str], lines: _Lines, file: str) -> list[str]:
    """Return the names of the columns."""
    names = [cell.strip() for cell in cells]
    problem = ""
    if not lines.is_utf8:
        problem = "its header is not UTF-8"
    elif len(names) > MAX_COLUMNS:
        problem = f"it has more than {MAX_COLUMNS} columns"
    elif len(set(names)) < len(names):
        problem = "two columns of its header have the same name"
    elif len(names) == 1 and (other := next((words for mark, words in _OTHERS.items() if mark in names[0]), "")):
        problem = f"its header is one column with {other} in its name: the delimiter of .csv is a comma, of .tsv a tab"
    if problem:
        raise damaged(file, lines.number, problem)
    return names


def _row(cells: list[str], header: list[str]) -> dict[str, str | None] | Broken:
    if len(cells) != len(header):
        return Broken(Problem.RAGGED, detail=f"{len(cells)} of {len(header)}")
    return {name: cell or None for name, cell in zip(header, cells, strict=True)}
