"""Files to decoded rows, a bounded piece at a time: JSONL, gzipped JSONL and Parquet.

A row that cannot be decoded comes out as Broken with its number. A file that cannot be read on (cut gzip stream, bad
Parquet footer, decompression bomb) raises BROKEN_FILE: how many rows are lost is unknown, so nothing may go on.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.row_words import MAX_DEPTH, MAX_LINE_BYTES
from finetune_trainer.data.problems import LFS_POINTER, Broken, Problem, place
from finetune_trainer.data.rows import FIELDS

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_CHUNK_BYTES = 2**20
_SLICE_BYTES = 2**16  # what is copied at the end of every gzip member
_MAX_GZIP_RATIO = 100
_PARQUET_ROWS = 256
_PARQUET_BYTES = 32 * 2**20  # of one batch, going by the mean row
_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_KEY = re.compile(rb'"\s*:')


class Decoded(NamedTuple):
    """A row: its number in the file (line or record, from 1), the decoded value or what is wrong, and its size."""

    number: int
    value: object
    size_bytes: int


def parquet_names(path: Path) -> list[str]:
    """All columns of a file that `parquet_rows` has read."""
    with pq.ParquetFile(path) as parquet:
        return list(parquet.schema_arrow.names)


class HashingReader:
    """Reads a stream in chunks and keeps the SHA-256 and the size of what was read."""

    def __init__(self, stream: BinaryIO, file: str) -> None:
        self._stream, self._file = stream, file
        self._sha256 = hashlib.sha256()
        self.size_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self._stream.read(_CHUNK_BYTES):
            if not self.size_bytes:
                refuse_pointer(chunk, self._file)
            self._sha256.update(chunk)
            self.size_bytes += len(chunk)
            yield chunk

    @property
    def digest(self) -> str:
        return "sha256:" + self._sha256.hexdigest()


def _damaged(file: str, row: int, problem: str) -> StageError:
    return StageError(Fault.BROKEN_FILE, file=place(file), row=row, problem=problem)


def refuse_pointer(begin: bytes, file: str) -> None:
    """Raise BROKEN_FILE for a file that Git LFS has left a pointer of: its few lines are no rows to put aside."""
    if begin.startswith(LFS_POINTER):
        raise _damaged(file, 1, "it is a Git LFS pointer, not the file itself; run git lfs pull where it was cloned")


def gunzip(chunks: Iterator[bytes], file: str) -> Iterator[bytes]:
    """Decompress a gzip stream of one or more members, which may be very many and small, into pieces below 2 MiB."""
    slices = (chunk[at : at + _SLICE_BYTES] for chunk in chunks for at in range(0, len(chunk), _SLICE_BYTES))
    held: list[bytes] = []
    size_bytes = 0
    try:
        for piece in _unpacked(slices, file):
            held.append(piece)
            size_bytes += len(piece)
            if size_bytes >= _CHUNK_BYTES:
                yield b"".join(held)
                held, size_bytes = [], 0
    except StageError:
        yield b"".join(held)  # the rows before the damage count
        raise
    yield b"".join(held)


def _unpacked(chunks: Iterator[bytes], file: str) -> Iterator[bytes]:
    member = zlib.decompressobj(wbits=31)
    taken = given = 0
    for chunk in chunks:
        taken += len(chunk)
        data = chunk
        while data:
            if member.eof:
                data = data.lstrip(b"\0")  # tar-style padding after the last member
                if not data:
                    break
                member = zlib.decompressobj(wbits=31)
            try:
                piece = member.decompress(data, _CHUNK_BYTES)
            except zlib.error as error:
                raise _damaged(file, 0, "the gzip stream is damaged") from error
            data = member.unused_data if member.eof else member.unconsumed_tail
            given += len(piece)
            if given > _MAX_GZIP_RATIO * taken + _CHUNK_BYTES:
                raise _damaged(file, 0, f"it unpacks to more than {_MAX_GZIP_RATIO} times its size")
            if piece:
                yield piece
    if not member.eof:  # nothing at all is cut off too: even an empty file has a header
        raise _damaged(file, 0, "the gzip stream is cut off")


def lines(chunks: Iterator[bytes], file: str) -> Iterator[tuple[int, bytes | Broken]]:
    """Non-blank lines with their numbers. A line above the limit is passed over without being held."""
    number = 0
    rest = b""
    passing_over = False
    first = True
    for chunk in chunks:
        if first and chunk.startswith(_UTF16_BOMS):
            raise _damaged(file, 1, "it is UTF-16; write it as UTF-8")
        pieces = (rest + chunk).split(b"\n")
        if first:
            pieces[0] = pieces[0].removeprefix(_BOM)
            first = False
        rest = pieces.pop()
        for piece in pieces:
            number += 1
            if passing_over or len(piece) > MAX_LINE_BYTES:
                passing_over = False
                yield number, Broken(Problem.LINE_TOO_LONG)
            elif piece and not piece.isspace():
                yield number, piece
        if len(rest) > MAX_LINE_BYTES:
            passing_over, rest = True, b""
    if passing_over:
        yield number + 1, Broken(Problem.LINE_TOO_LONG)
    elif rest and not rest.isspace():
        yield number + 1, rest


def _is_too_deep(value: object) -> bool:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (cast(dict[str, Any], item).values() if isinstance(item, dict) else cast(list[Any], item))
        ]
        if not level:
            return False
    return True


def decode(line: bytes) -> object:
    """The line's JSON value, or Broken with the most telling name."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError:
            return Broken(Problem.INVALID_UTF8)
        if "depth" in error.msg or "ecursion" in error.msg:
            return Broken(Problem.TOO_DEEP)
        if "surrogate" in error.msg and _SURROGATE.search(line):
            return Broken(Problem.LONE_SURROGATE)
        return Broken(Problem.NOT_JSON, detail=f"column {error.colno}")
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _is_too_deep(value):
        return Broken(Problem.TOO_DEEP)
    # orjson keeps the last of two equal keys. Texts may hold `":` too, so only a second reading is sure.
    if len(_KEY.findall(line)) > _keys(value) and _repeats_a_key(line):
        return Broken(Problem.REPEATED_FIELD)
    return value


def _keys(value: object) -> int:
    """Keys of all objects in the value; nesting is bounded."""
    if isinstance(value, dict):
        return len(value) + sum(_keys(item) for item in cast(dict[str, Any], value).values())
    if isinstance(value, list):
        return sum(_keys(item) for item in cast(list[Any], value))
    return 0


def _repeats_a_key(line: bytes) -> bool:
    repeated = False

    def pairs(found: list[tuple[str, Any]]) -> None:
        nonlocal repeated
        repeated = repeated or len({name for name, _ in found}) < len(found)

    json.loads(line, object_pairs_hook=pairs)
    return repeated


def jsonl_rows(chunks: Iterator[bytes], file: str) -> Iterator[Decoded]:
    """Rows of a JSONL stream."""
    number = 0
    try:
        for number, line in lines(chunks, file):
            if isinstance(line, Broken):
                yield Decoded(number, line, MAX_LINE_BYTES)
            else:
                yield Decoded(number, decode(line), len(line))
    except StageError as error:
        if error.fault is Fault.BROKEN_FILE and error.args_by_name["row"] == 0:
            raise StageError(Fault.BROKEN_FILE, **{**error.args_by_name, "row": number + 1}) from error
        raise


def parquet_rows(path: Path, file: str) -> Generator[Decoded, None, None]:
    """Rows of a Parquet file: only the fields a row can have are read."""
    number = 0
    with path.open("rb") as opened:
        refuse_pointer(opened.read(len(LFS_POINTER)), file)
    try:
        with pq.ParquetFile(path, buffer_size=_CHUNK_BYTES, pre_buffer=False) as parquet:
            names = parquet.schema_arrow.names
            columns = [name for name in names if name in FIELDS]
            if len(set(columns)) < len(columns):
                raise _damaged(file, 1, "two columns have the same name")
            if not columns:  # every row is there and counts; the error can say which fields they have
                for number in range(1, parquet.metadata.num_rows + 1):
                    yield Decoded(number, dict.fromkeys(names[:64]), 0)
                return
            batch_rows = _batch_rows(parquet.metadata)
            for batch in parquet.iter_batches(batch_size=batch_rows, columns=columns, use_threads=False):
                size = max(1, batch.nbytes // max(1, batch.num_rows))
                for value in _values(batch):
                    number += 1
                    too_long = size * _PARQUET_ROWS > MAX_LINE_BYTES and _text_bytes(value) > MAX_LINE_BYTES
                    yield Decoded(number, Broken(Problem.LINE_TOO_LONG) if too_long else value, size)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        # Arrow's own words can quote the file, so only the kind of error is told.
        problem = f"Parquet cannot be decoded ({type(error).__name__})"
        raise _damaged(file, number + 1, problem) from error


def _batch_rows(metadata: Any) -> int:
    """Rows to decode at once, so that a batch of long texts needs no more memory than one of short ones."""
    size_bytes = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    return max(1, min(_PARQUET_ROWS, _PARQUET_BYTES * metadata.num_rows // max(1, size_bytes)))


def _values(batch: Any) -> Iterator[object]:
    """The batch's rows as dicts; a row whose strings are not UTF-8 comes out as Broken."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield from batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError:
                yield Broken(Problem.INVALID_UTF8)


def _text_bytes(value: object) -> int:
    """Characters in all strings of a row; nesting is bounded by the file's schema."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_text_bytes(item) for item in cast(dict[str, Any], value).values())
    if isinstance(value, list):
        return sum(_text_bytes(item) for item in cast(list[Any], value))
    return 0
