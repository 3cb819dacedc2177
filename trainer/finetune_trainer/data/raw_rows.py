"""Rows as they are cut out of files, before they are decoded: what partitions are made of."""

import struct
from collections.abc import Iterator
from enum import Enum
from os import SEEK_CUR
from typing import IO, Any, NamedTuple, cast

import orjson

from finetune_api.row_words import MAX_LINE_BYTES
from finetune_trainer.data.accounts import RowPlace
from finetune_trainer.data.files import Decoded, decoded
from finetune_trainer.data.problems import Broken, Drop, LeftOut, Problem, ReadDocument

_HEAD = struct.Struct("<cIQII")  # notation, file, number, size in the file, bytes that follow


class Cut(Enum):
    """How the bytes of a row are written."""

    LINE = b"l"  # JSON
    COLUMNS = b"c"  # of Parquet: JSON of problem and detail by column, and of the other columns
    CELLS = b"t"  # of CSV: JSON of the cells by name, and their size in memory
    BROKEN = b"b"  # JSON of problem, field and detail
    DOCUMENT = b"d"  # JSON of the text, and of what was left out
    LEFT_OUT = b"x"  # of a document: JSON of reason and words


class RawRow(NamedTuple):
    """A row that is not decoded yet. number: its place in the file; size_bytes: in the file, at least."""

    number: int
    cut: Cut
    content: bytes
    size_bytes: int


class PlacedRow(NamedTuple):
    """A raw row and the file it is of, as an index into the job's or the partition's files."""

    file: int
    row: RawRow


def raw_line(number: int, line: bytes) -> RawRow:
    """Return a row of JSON."""
    return RawRow(number, Cut.LINE, line, len(line))


def raw_broken(number: int, broken: Broken, size_bytes: int = MAX_LINE_BYTES) -> RawRow:
    """Return a row that cannot be decoded."""
    return RawRow(number, Cut.BROKEN, orjson.dumps([broken.problem, broken.field, broken.detail]), size_bytes)


def raw_document(number: int, document: ReadDocument) -> RawRow:
    """Return a row of a document's text."""
    if not document.changes:
        return raw_line(number, orjson.dumps({"text": document.text}))
    content = orjson.dumps([document.text, document.changes])
    return RawRow(number, Cut.DOCUMENT, content, len(content))


def raw_left_out(number: int, left_out: LeftOut, size_bytes: int) -> RawRow:
    """Return what stands for a document of which nothing can be used."""
    return RawRow(number, Cut.LEFT_OUT, orjson.dumps([left_out.drop, left_out.words]), size_bytes)


def decode_row(raw: RawRow) -> Decoded:
    """Return what a raw row says, or what is wrong with it."""
    number, cut, content, size_bytes = raw
    if cut is Cut.LINE:
        return decoded(number, content)
    parsed = orjson.loads(content)
    if cut is Cut.BROKEN:
        problem, field, detail = parsed
        return Decoded(number, Broken(Problem(problem), field, detail), size_bytes, 0)
    if cut is Cut.DOCUMENT:
        text, changes = parsed
        return Decoded(number, ReadDocument(text, tuple(changes)), size_bytes, size_bytes)
    if cut is Cut.LEFT_OUT:
        drop, words = parsed
        return Decoded(number, LeftOut(Drop(drop), words), size_bytes, 0)
    if cut is Cut.CELLS:
        value, held_bytes = parsed
        return Decoded(number, value, size_bytes, held_bytes)
    problems, sound = parsed
    broken = {name: Broken(Problem(code), name, detail) for name, (code, detail) in problems.items()}
    row = decoded(number, orjson.dumps(sound))
    if isinstance(row.value, dict):
        return row._replace(value=cast(dict[str, Any], row.value) | broken)
    return row


def write_row(stream: IO[bytes], placed: PlacedRow) -> bytes:
    """Write one row; returns the bytes that were written."""
    file, (number, cut, content, size_bytes) = placed
    written = _HEAD.pack(cut.value, file, number, size_bytes, len(content)) + content
    stream.write(written)
    return written


def read_sizes(stream: IO[bytes]) -> Iterator[tuple[RowPlace, int]]:
    """Yield the place of each row that was written, and its size in the file, without what it says."""
    while head := stream.read(_HEAD.size):
        _, file, number, size_bytes, length = _HEAD.unpack(head)
        stream.seek(length, SEEK_CUR)
        yield RowPlace(file, number), size_bytes


def read_rows(stream: IO[bytes]) -> Iterator[PlacedRow]:
    """Yield the rows that were written."""
    while head := stream.read(_HEAD.size):
        cut, file, number, size_bytes, length = _HEAD.unpack(head)
        yield PlacedRow(file, RawRow(number, Cut(cut), stream.read(length), size_bytes))
