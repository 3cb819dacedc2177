"""JSON that is not a row a line: a list of rows, or rows one behind another, cut into the bytes of each row.

Only quotes, brackets and commas are looked at, so that a row that is no JSON is one broken row wherever its end can be
told. What is held is one row and one piece of the stream.
"""

import re
from collections.abc import Iterator
from enum import Enum
from itertools import chain

from finetune_api.row_words import MAX_DEPTH, MAX_LINE_BYTES
from finetune_trainer.data.file_kinds import BOM, Notation
from finetune_trainer.data.files import damaged
from finetune_trainer.data.problems import Broken, Problem

_TEXT = rb'"(?:[^"\\]++|\\.)*+"'
_TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|' + _TEXT + rb")*+", re.DOTALL)
_TO_COMMA = re.compile(rb'(?:[^"\[\]{},]++|' + _TEXT + rb")*+", re.DOTALL)
_TO_QUOTE = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_PAIRS = {ord("]"): ord("["), ord("}"): ord("{")}


class Way(Enum):
    """How rows follow one another."""

    LINES = "a row a line"
    LIST = "one list of rows"
    VALUES = "rows one behind another"


def way_of(chunks: Iterator[bytes], notation: Notation) -> tuple[Way, Iterator[bytes]]:
    """Return how the rows of a stream follow one another, and the stream from its first byte on."""
    begin = b""
    for chunk in chunks:
        begin += chunk
        line, _, rest = begin.lstrip().partition(b"\n")
        if len(begin) > MAX_LINE_BYTES or (line and rest.strip()):
            break
    return _way(begin.removeprefix(BOM).strip(), notation), chain([begin] if begin else [], chunks)


def _way(begin: bytes, notation: Notation) -> Way:
    """Return what a stream's first line, with what begins after it, says of the whole.

    What is packed closely, as JSON Lines are, is read by its lines: a broken row is then no more than its line."""
    line, _, rest = begin.partition(b"\n")
    if not line.startswith((b"{", b"[")):
        return Way.LINES
    end = _end(line)
    if line.startswith(b"["):
        return Way.LINES if end is not None and not line[end:].strip() and rest else Way.LIST
    if end is None:
        is_broken_line = not rest or rest.lstrip().startswith(b"{")
        return Way.LINES if notation is Notation.LINES and is_broken_line else Way.VALUES
    return Way.VALUES if notation is Notation.JSON and line[end:].strip() else Way.LINES


def _end(line: bytes) -> int | None:
    """Return where the list or object ends that a line begins with; None: not in this line."""
    depth = at = 0
    while True:
        at = _TO_BRACKET.match(line, at).end()  # pyright: ignore[reportOptionalMemberAccess]
        if at == len(line) or line[at] == ord('"'):
            return None
        depth += 1 if line[at] in b"[{" else -1
        at += 1
        if depth <= 0:
            return at


def values(chunks: Iterator[bytes], way: Way, file: str) -> Iterator[tuple[int, bytes | Broken]]:
    """Yield the rows of a list, or of values one behind another, with their numbers from 1.

    Raises BROKEN_FILE with the number of the row from which on it cannot be told where rows end."""
    in_list = way is Way.LIST
    data = b""
    begin = at = 0  # of the row; of what was not looked at yet
    number = 1
    depth = 0
    opened = bytearray()  # the brackets around, the outer MAX_DEPTH of them
    in_text = is_long = False
    for chunk in _begun(chunks, in_list):
        data, at, begin = data[begin:] + chunk, at - begin, 0
        while True:
            if in_text:
                at = _TO_QUOTE.match(data, at).end()  # pyright: ignore[reportOptionalMemberAccess]
                if at == len(data) or data[at] != ord('"'):
                    break
                in_text = False
                at += 1
            at = (_TO_BRACKET if depth or not in_list else _TO_COMMA).match(data, at).end()  # pyright: ignore[reportOptionalMemberAccess]
            if at == len(data):
                break
            mark = data[at]
            at += 1
            if mark == ord('"'):
                in_text = True
                continue
            if mark in b"[{":
                depth += 1
                if depth <= MAX_DEPTH:
                    opened.append(mark)
                continue
            is_end = mark == ord("]") and not depth and in_list
            if mark in b"]}" and not is_end:
                if not depth or (depth <= MAX_DEPTH and opened.pop() != _PAIRS[mark]):
                    raise damaged(file, number, f"a {chr(mark)} closes what was not opened")
                depth -= 1
            if not depth and (is_end or mark == ord(",") or not in_list):
                row = data[begin : at - 1 if in_list else at]
                if row.strip() or is_long or mark == ord(","):
                    yield number, _row(row, is_long)
                    number += 1
                begin, is_long = at, False
            if is_end:
                if data[at:].strip() or any(more.strip() for more in chunks):
                    raise damaged(file, number, "something follows the end of its list")
                return
        if at - begin > MAX_LINE_BYTES:
            is_long, begin = True, at
    if in_list or depth or in_text:
        raise damaged(file, number, "it is cut off: a list, an object or a text has no end")
    if data[begin:].strip():
        yield number, _row(data[begin:], is_long)


def _begun(chunks: Iterator[bytes], in_list: bool) -> Iterator[bytes]:
    """Yield a stream without what stands before its first row: a BOM, white space and, of a list, its bracket."""
    begin = b""
    for chunk in chunks:
        begin = (begin + chunk).removeprefix(BOM).lstrip()
        if begin:
            yield begin[1:] if in_list else begin
            break
    yield from chunks


def _row(content: bytes, is_long: bool) -> bytes | Broken:
    if is_long or len(content) > MAX_LINE_BYTES:
        return Broken(Problem.LINE_TOO_LONG)
    return content.strip()
