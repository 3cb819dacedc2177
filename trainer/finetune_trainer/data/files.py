"""Lines of JSON to decoded rows, and what is common to files of every kind.

A row that cannot be decoded comes out as Broken with its number. A file that cannot be read on (cut gzip stream, bad
Parquet footer, decompression bomb) raises BROKEN_FILE: how many rows are lost is unknown, so nothing may go on.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, cast

import orjson

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.row_words import MAX_DEPTH, MAX_LINE_BYTES, MAX_VALUES
from finetune_trainer.data.file_kinds import BOM
from finetune_trainer.data.problems import Broken, Problem, place

_CHUNK_BYTES = 2**20
_DENSE_BYTES = 12  # a line with fewer for each value takes many times its size in memory
VALUE_BYTES = 100  # that Python takes for a value of JSON, on the mean over objects, lists and numbers
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_KEY = re.compile(rb'"\s*:')
_AS_ZEROS = bytes.maketrans(b"123456789", b"0" * 9)
_MANY_DIGITS = b"0" * 19  # a whole number that has fewer is within 64 bits
_QUOTE, _QUOTE_AS_NUMBER = b'"', rb"\u0022"
_PLAIN_DEPTH = 16  # of rows as they mostly are
_UNSURE = -(2**32)  # more than all quotes of a line
_WHOLE_FLOAT = 2.0**63  # from which on a float may be a whole number that was beyond 64 bits
_KEY_END = b'":'
_ESCAPED = (rb"\u0022", rb"\u003a", rb"\u003A")  # a quote, and a colon
_BEFORE_COLON = (b" :", b"\t:", b"\n:", b"\r:")
_TOO_DEEP = b"\n" + MAX_DEPTH * b"  "  # begins the line of what is so deep, as indented


class Decoded(NamedTuple):
    """A row: its number in the file (line or record, from 1), the decoded value or what is wrong, its size in the file
    (at least), and in memory (roughly)."""

    number: int
    value: object
    size_bytes: int
    held_bytes: int


class HashingReader:
    """Reads a stream in chunks and keeps the SHA-256 and the size of what was read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._sha256 = hashlib.sha256()
        self.size_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self._stream.read(_CHUNK_BYTES):
            self._sha256.update(chunk)
            self.size_bytes += len(chunk)
            yield chunk

    @property
    def digest(self) -> str:
        return "sha256:" + self._sha256.hexdigest()


def damaged(file: str, row: int, problem: str) -> StageError:
    """Return what a file ends the job with that cannot be read from `row` on; row 0: it is not known yet."""
    return StageError(Fault.BROKEN_FILE, file=place(file), row=row, problem=problem)


def lines(chunks: Iterator[bytes]) -> Iterator[tuple[int, bytes | Broken]]:
    """Non-blank lines with their numbers. A line above the limit is passed over without being held."""
    number = 0
    rest = b""
    passing_over = False
    first = True
    for chunk in chunks:
        pieces = (rest + chunk).split(b"\n")
        if first:
            pieces[0] = pieces[0].removeprefix(BOM)
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


def _indented(value: object) -> bytes | None:
    """Return a value as JSON whose indent shows its depth; None where it is deeper than orjson goes."""
    try:
        return orjson.dumps(value, option=orjson.OPT_INDENT_2)
    except orjson.JSONEncodeError:
        return None


def _most_values(line: bytes) -> int:
    """Return what a line's JSON cannot have more values than; commas and brackets in texts count too."""
    return 1 + line.count(b",") + line.count(b"[") + line.count(b"{")


def _has_too_many_values(value: object) -> bool:
    waiting, found = [value], 0
    while waiting and found <= MAX_VALUES:
        item = waiting.pop()
        found += 1
        if isinstance(item, dict):
            waiting.extend(cast(dict[str, Any], item).values())
        elif isinstance(item, list):
            waiting.extend(cast(list[Any], item))
    return found > MAX_VALUES


def decode(line: bytes) -> object:
    """The line's JSON value, or Broken with the most telling name."""
    return _decoded(line, _most_values(line))


def _decoded(line: bytes, most_values: int) -> object:
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
        words = ", where NaN or Infinity may stand, which are no JSON; write null" if _is_json_of_python(line) else ""
        return Broken(Problem.NOT_JSON, detail=f"column {error.colno}{words}")
    if most_values > MAX_VALUES and _has_too_many_values(value):
        return Broken(Problem.TOO_MANY_VALUES)
    if _quotes(value, _PLAIN_DEPTH) == line.count(_QUOTE) and _QUOTE_AS_NUMBER not in line:
        return value  # a key that is repeated would have quotes of its own in the line
    written = _indented(value)  # at most 2 * MAX_DEPTH bytes more for each value that is not too deep
    if written is None or _TOO_DEEP in written:
        return Broken(Problem.TOO_DEEP)
    # orjson keeps the last of two equal keys. Texts may hold `":` too, so only a second reading is sure.
    if _may_repeat_a_key(line, written, value) and _repeats_a_key(line):
        return Broken(Problem.REPEATED_FIELD)
    # orjson makes a float of a whole number beyond 64 bits, and of its digits only the first 16 are kept.
    return json.loads(line) if _MANY_DIGITS in line.translate(_AS_ZEROS) else value


def _quotes(value: Any, most_depth: int) -> int:
    """Return the quotes that a value is written with, if none is written by its number; a negative number where the
    value is nested deeper, or has a number that was perhaps read otherwise than it was written."""
    kind = type(value)
    if kind is dict or kind is list:
        if not most_depth:
            return _UNSURE
        found, items = 0, value
        if kind is dict:
            found, items = 2 * len(value) + "".join(value).count('"'), value.values()
        for each in items:
            found += 2 + each.count('"') if type(each) is str else _quotes(each, most_depth - 1)
        return found
    if kind is str:
        return 2 + value.count('"')
    return _UNSURE if kind is float and not -_WHOLE_FLOAT < value < _WHOLE_FLOAT else 0


def _is_json_of_python(line: bytes) -> bool:
    """Whether Python reads a line that is no JSON: its `json` writes NaN and Infinity, and reads them."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _may_repeat_a_key(line: bytes, written: bytes, value: object) -> bool:
    """Whether a line has more ends of keys than its value. written: the value as JSON, in which they are counted
    faster than by a walk, where its texts stand there as they stand in the line."""
    if any(escaped in line for escaped in _ESCAPED) or any(space in line for space in _BEFORE_COLON):
        return len(_KEY.findall(line)) > _keys(value)
    return line.count(_KEY_END) > written.count(_KEY_END)


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


def decoded(number: int, line: bytes) -> Decoded:
    """Return the row that a line is."""
    most_values = _most_values(line)
    value = _decoded(line, most_values)
    is_dense = _DENSE_BYTES * most_values > len(line)
    held_bytes = len(line) + (VALUE_BYTES * most_values if is_dense else 0)
    return Decoded(number, value, len(line), 0 if isinstance(value, Broken) else held_bytes)
