"""What stands on the pages of a PDF, in the order in which people read it, as paragraphs, headings and tables. Pure."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import numpy as np

_MIN_GUTTER = 5.0  # points between two columns
_MIN_COLUMN = 4  # segments of a column
_LONG_SEGMENT = 20  # characters: of a column of text, and not of a table
_TABLE_SWITCHES = 0.2  # of the steps from segment to segment, in the order they were written, that change the side
_FULL = 0.85  # of a column's width: a line that is as long goes on in the next
_HEADING = 1.15  # of the height of most lines
_MAX_HEADING = 200  # characters
_MAX_LEVEL = 6
_ALIGNED = 4.0  # points
_BULLET = re.compile(r"(?:[•◦▪‣●○■□*\u2013-]|\(?(?:\d{1,3}|[a-zA-Z]|[ivx]{1,5})[.)])")
_BULLET_ALONE = re.compile(r"[•◦▪‣●○■□]\s*")
_HYPHEN = re.compile(r"(\w+)[-\xad\u2010]$")
_WORD = re.compile(r"[\w'\u2019]+(?:[-\u2010][\w'\u2019]+)*")


class Segment(NamedTuple):
    """Words that follow one another on a line, and the box around them, in points from the page's left and bottom.

    A box without height: it is not written along a line."""

    text: str
    left: float
    bottom: float
    right: float
    top: float

    @property
    def height(self) -> float:
        return self.top - self.bottom

    def joined(self, word: str, space: str, right: float, bottom: float, top: float) -> "Segment":
        """Return the segment with one more word."""
        text = self.text + space + word
        return Segment(text, self.left, min(self.bottom, bottom), right, max(self.top, top))


class Page(NamedTuple):
    """A page from its bottom to its top, and what stands there, in the order in which it was written."""

    bottom: float
    top: float
    segments: list[Segment]
    is_picture: bool = False  # of nothing but pictures


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of a column. cells: its parts, far from one another; is_full: whether it ends where the column does."""

    cells: tuple[Segment, ...]
    is_full: bool
    region: int

    @property
    def text(self) -> str:
        return " ".join(cell.text for cell in self.cells)

    @property
    def left(self) -> float:
        return self.cells[0].left

    @property
    def bottom(self) -> float:
        return min(cell.bottom for cell in self.cells)

    @property
    def height(self) -> float:
        return max(cell.height for cell in self.cells)


def text_of(pages: Sequence[Page]) -> str:
    """Return what stands on the pages as Markdown."""
    lines: list[_Line] = []
    regions = 0
    for page in pages:
        upright = [each for each in page.segments if each.height]
        for region in in_order(upright):
            regions += 1
            lines += _lines(region, regions)
        regions += 1
        turned = tuple(each for each in page.segments if not each.height)
        lines += [_Line(turned, False, regions)] if turned else []
    return "".join(_Writer(lines).written())


def in_order(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Return the regions of a page in the order in which they are read: columns from left to right, and between two
    bands of columns what reaches over them."""
    found = _gutter(segments)
    if found is None:
        return [list(segments)] if segments else []
    regions: list[list[Segment]] = []
    columns: tuple[list[int], list[int]] = ([], [])
    across: list[Segment] = []

    def end_columns() -> None:
        for column in columns:
            regions.extend(in_order([segments[at] for at in sorted(column)]))  # in the order they were written
            column.clear()

    for at in sorted(range(len(segments)), key=lambda at: -segments[at].top):
        segment = segments[at]
        if segment.left < found < segment.right:
            end_columns()
            across.append(segment)
            continue
        if across:
            regions.append(across)
            across = []
        columns[segment.left >= found].append(at)
    regions += [across] if across else []
    end_columns()
    return regions


def _gutter(segments: Sequence[Segment]) -> float | None:
    """Return where an empty strip divides segments into two columns; None where nothing does."""
    if len(segments) < 2 * _MIN_COLUMN:
        return None
    lefts, rights = (np.array([each[at] for each in segments]) for at in (1, 3))
    begin, end = float(lefts.min()), float(rights.max())
    width = int(end - begin) + 2
    covered = np.zeros(width + 1, dtype=np.int32)
    np.add.at(covered, np.floor(lefts - begin).astype(int), 1)
    np.add.at(covered, np.ceil(rights - begin).astype(int), -1)
    inner = np.cumsum(covered)[width // 6 : width - width // 6]
    if not len(inner):
        return None
    free = np.flatnonzero(np.diff(np.r_[0, inner == inner.min(), 0]))
    starts, ends = free[::2], free[1::2]
    widest = int(np.argmax(ends - starts))
    if ends[widest] - starts[widest] < _MIN_GUTTER:
        return None
    gutter = begin + width // 6 + (int(starts[widest]) + int(ends[widest])) / 2
    return gutter if _are_columns(segments, gutter) else None


def _are_columns(segments: Sequence[Segment], gutter: float) -> bool:
    """Whether what stands on both sides of a strip is text of its own, and not rows of a table."""
    sides = [each.left >= gutter for each in segments if not each.left < gutter < each.right]
    left = [each for each in segments if each.right <= gutter]
    right = [each for each in segments if each.left >= gutter]
    if min(len(left), len(right)) < _MIN_COLUMN:
        return False
    bottom = max(min(each.bottom for each in side) for side in (left, right))
    top = min(max(each.top for each in side) for side in (left, right))
    least = min(max(each.top for each in side) - min(each.bottom for each in side) for side in (left, right))
    if top - bottom < least / 2:
        return False
    switches = sum(one != other for one, other in pairwise(sides))
    is_written_in_turn = switches > _TABLE_SWITCHES * len(sides)
    are_long = all(median(len(each.text) for each in side) >= _LONG_SEGMENT for side in (left, right))
    return are_long or not is_written_in_turn


def _lines(segments: Sequence[Segment], region: int) -> Iterator[_Line]:
    """Yield the lines of a region from its top to its bottom."""
    edge = max(each.right for each in segments)
    begin = min(each.left for each in segments)
    row: list[Segment] = []
    for segment in sorted(segments, key=lambda each: -(each.top + each.bottom)):
        if row and not _is_beside(row[0], segment):
            yield _line(row, begin, edge, region)
            row = []
        row.append(segment)
    if row:
        yield _line(row, begin, edge, region)


def _line(row: list[Segment], begin: float, edge: float, region: int) -> _Line:
    cells = tuple(sorted(row, key=lambda each: each.left))
    return _Line(cells, cells[-1].right >= begin + _FULL * (edge - begin), region)


def _is_beside(one: Segment, other: Segment) -> bool:
    """Whether two segments stand on one line."""
    return min(one.top, other.top) - max(one.bottom, other.bottom) > 0.5 * min(one.height, other.height)


class _Writer:
    """Lines to paragraphs, headings and rows of tables."""

    def __init__(self, lines: Sequence[_Line]) -> None:
        self._lines = lines
        heights: Counter[float] = Counter()
        for line in lines:
            heights[_rounded(line.height)] += len(line.text)
        self._body = heights.most_common(1)[0][0] if heights else 0.0
        large = sorted((height for height in heights if height >= _HEADING * self._body), reverse=True)
        self._levels = {height: min(level, _MAX_LEVEL) for level, height in enumerate(large, 1)}
        gaps = [one.bottom - other.bottom for one, other in pairwise(lines) if _follow(one, other)]
        self._pitch = median(gaps) if gaps else 1.2 * self._body
        self._tables = _rows_of_tables(lines)
        words = (word for line in lines for word in _WORD.findall(line.text))
        self._words = Counter(word.casefold() for word in words)

    def written(self) -> Iterator[str]:
        """Yield the text, a line or what is between two at a time."""
        held = ""
        for at in range(len(self._lines)):
            between = self._between(at) if at else ""
            text = self._text(at, is_more=between == " ")
            if not at:
                held = text
                continue
            if between == " " and (hyphen := _HYPHEN.search(held)) and text[:1].islower():
                held = held[: hyphen.start()] + self._unhyphenated(hyphen[1], text)
                continue
            yield held + between
            held = text
        yield held

    def _unhyphenated(self, begin: str, rest: str) -> str:
        """Return a word that was divided at the end of a line, and what follows it."""
        match = _WORD.match(rest)
        end = match[0] if match else ""
        joined, hyphened = (self._words[(begin + mark + end).casefold()] for mark in ("", "-"))
        return begin + ("-" if hyphened > joined else "") + rest

    def _text(self, at: int, *, is_more: bool) -> str:
        """Return what is written of a line. is_more: whether it goes on with the line before it."""
        line = self._lines[at]
        if at in self._tables:
            return "| " + " | ".join(cell.text for cell in line.cells) + " |"
        level = self._level(line)
        if level:
            return line.text if is_more else f"{'#' * level} {line.text}"
        return _BULLET_ALONE.sub("- ", line.text, count=1) if _BULLET_ALONE.match(line.text) else line.text

    def _level(self, line: _Line) -> int:
        return self._levels.get(_rounded(line.height), 0) if len(line.text) <= _MAX_HEADING else 0

    def _between(self, at: int) -> str:
        """Return what stands between a line and the one before it."""
        before, line = self._lines[at - 1], self._lines[at]
        if at in self._tables or at - 1 in self._tables:
            return "\n" if at in self._tables and at - 1 in self._tables and before.region == line.region else "\n\n"
        levels = self._level(before), self._level(line)
        if any(levels):
            is_one = levels[0] == levels[1] and _follow(before, line) and self._is_next(before, line)
            return " " if is_one else "\n\n"
        if not _follow(before, line):
            goes_on = before.is_full and line.text[:1].islower()
            return " " if goes_on or (before.is_full and _HYPHEN.search(before.text)) else "\n\n"
        if not self._is_next(before, line):
            return "\n\n"
        if _BULLET.match(line.text):
            return "\n"
        is_indented = line.left - before.left > line.height and not _BULLET.match(before.text)
        if not before.is_full:
            return "\n"
        return "\n\n" if is_indented else " "

    def _is_next(self, before: _Line, line: _Line) -> bool:
        """Whether a line is no farther below the one before it than lines are."""
        return before.bottom - line.bottom <= 1.4 * max(self._pitch, 1.1 * line.height)


def _rounded(height: float) -> float:
    return round(2 * height) / 2


def _follow(before: _Line, line: _Line) -> bool:
    """Whether a line stands below another one in the same region."""
    return before.region == line.region and line.bottom < before.bottom


def _rows_of_tables(lines: Sequence[_Line]) -> set[int]:
    """Return which lines are rows of tables: two or more, one below another, whose cells stand in columns."""
    found: set[int] = set()
    for at in range(1, len(lines)):
        before, line = lines[at - 1], lines[at]
        if min(len(before.cells), len(line.cells)) < 2 or not _follow(before, line):
            continue
        if _BULLET_ALONE.fullmatch(line.cells[0].text) or _BULLET_ALONE.fullmatch(before.cells[0].text):
            continue
        aligned = sum(any(_stand_below(one, other) for other in before.cells) for one in line.cells)
        if aligned >= 2:
            found |= {at - 1, at}
    return found


def _stand_below(one: Segment, other: Segment) -> bool:
    """Whether two cells begin, end or have their middle at the same place."""
    middles = (one.left + one.right) / 2 - (other.left + other.right) / 2
    return min(abs(one.left - other.left), abs(one.right - other.right), abs(middles)) <= _ALIGNED
