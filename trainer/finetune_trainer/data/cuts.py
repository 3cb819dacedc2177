"""Where a text is best cut into pieces: at headings, paragraphs, sentences and lines, told from its tokens alone.

Each token of a vocabulary has a mark that says what it begins or ends, so that all places of a text are judged at once
by numpy, and no text has to be read a second time.
"""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Marks = npt.NDArray[np.uint16]  # by token: what it begins or ends

NEWLINE, PARAGRAPH, HEADING, SENTENCE, SPACE, FENCE = (1 << bit for bit in range(6))
_LEVEL_SHIFT = 8  # above the flags: how many # a token of headings has
MARK_TYPE = np.dtype(np.uint16)
_MAX_LEVEL = 6
_CONTEXT_SHARE = 4  # headings above a piece may take one token of so many
_SENTENCE_ENDS = (".", "!", "?", "…", "。", "\uff01", "\uff1f")
_CLOSING = "\"'”\u2019)]»"
# How vocabularies write what is no letter: byte-level ones, those of SentencePiece, and bytes as tokens.
_WRITTEN = {
    "Ġ": " ", "▁": " ", "Ċ": "\n", "č": "\r", "ĉ": "\t", "<0x0A>": "\n", "ãĢĤ": "。", "ï¼ģ": "\uff01", "ï¼Ł": "\uff1f",
    "âĢĿ": "”", "âĢĻ": "\u2019", "âĢ¦": "…",
}  # fmt: skip


class Strength:
    """How well a text may be cut before a token, the best last."""

    NONE, LINE, SENTENCE, PARAGRAPH, HEADING = range(5)


def mark_of(token: str) -> int:
    """Return the mark of a token, as its vocabulary writes it."""
    for written, meant in _WRITTEN.items():
        token = token.replace(written, meant)
    bare = token.rstrip(_CLOSING)
    hashes = len(token) if set(token) == {"#"} else 0
    flags = {
        NEWLINE: "\n" in token,
        PARAGRAPH: "\n\n" in token.replace(" ", "").replace("\r", ""),
        HEADING: hashes > 0,
        SENTENCE: bare.endswith(_SENTENCE_ENDS),
        SPACE: token[:1].isspace(),
        FENCE: token.startswith(("```", "~~~")),
    }
    return sum(flag for flag, is_set in flags.items() if is_set) | min(hashes, 255) << _LEVEL_SHIFT


def marks_of(vocabulary: Iterable[tuple[str, int]], size: int) -> Marks:
    """Return the marks of a vocabulary, by the number of each token."""
    marks = np.zeros(size, dtype=MARK_TYPE)
    for token, number in vocabulary:
        marks[number] = mark_of(token)
    return marks


def strengths(own: Marks) -> npt.NDArray[np.uint8]:
    """Return by token how well the text may be cut before it. own: (tokens,) the mark of each."""
    found = np.zeros(len(own), dtype=np.uint8)
    if len(own) < 2:
        return found
    before, here = own[:-1], own[1:]
    is_line = before & NEWLINE > 0
    two = np.r_[False, is_line[:-1]]  # the token before that one ends a line too
    ends = before & SENTENCE > 0
    ends_line = np.r_[False, ends[:-1]] & is_line
    found[1:][is_line] = Strength.LINE
    found[1:][(ends & (here & (SPACE | NEWLINE) == SPACE)) | ends_line] = Strength.SENTENCE
    found[1:][(before & PARAGRAPH > 0) | (is_line & two)] = Strength.PARAGRAPH
    found[1:][_headings(own)[1:]] = Strength.HEADING
    return found


def _headings(own: Marks) -> npt.NDArray[np.bool_]:
    """Return which tokens begin a heading: # at the beginning of a line, outside of a block of code."""
    begins = np.r_[True, own[:-1] & NEWLINE > 0]
    fences = np.cumsum(begins & (own & FENCE > 0))
    return begins & (own & HEADING > 0) & (fences % 2 == 0)


class _Heading(NamedTuple):
    """A heading's tokens, as a half-open range, and its level from 1."""

    begin: int
    end: int
    level: int


class Headings:
    """The headings of a text, by which the path to its places is told, one after another.

    own: (tokens,) the mark of each."""

    def __init__(self, ids: npt.NDArray[np.uint32], own: Marks) -> None:
        line_ends = np.flatnonzero(own & NEWLINE > 0) + 1
        self._ids = ids
        self._path: list[_Heading] = []  # of the last place
        self._next: deque[_Heading] = deque()  # behind it
        for begin in np.flatnonzero(_headings(own)).tolist():
            at = int(line_ends.searchsorted(begin, side="right"))
            end = int(line_ends[at]) if at < len(line_ends) else len(ids)
            self._next.append(_Heading(begin, end, _level(own, begin)))

    def above(self, place: int, most: int) -> npt.NDArray[np.uint32]:
        """Return the tokens of the headings that a place stands under, the innermost where all are too many.

        Each place lies behind the one that was asked for before."""
        while self._next and self._next[0].begin < place:
            heading = self._next.popleft()
            while self._path and self._path[-1].level >= heading.level:
                self._path.pop()
            self._path.append(heading)
        path = self._path
        if self._next and self._next[0].begin == place:
            path = [each for each in path if each.level < self._next[0].level]
        parts: list[npt.NDArray[np.uint32]] = []
        for heading in reversed(path):
            if heading.end > place or sum(map(len, parts)) + heading.end - heading.begin > most:
                break
            parts.append(self._ids[heading.begin : heading.end])
        return np.concatenate(parts[::-1]) if parts else self._ids[:0]


def _level(own: Marks, begin: int) -> int:
    level = 0
    for mark in own[begin : begin + _MAX_LEVEL].tolist():
        if not mark & HEADING:
            break
        level += mark >> _LEVEL_SHIFT
    return level


class Piece(NamedTuple):
    """A piece of a text: its tokens, and how many of them at its beginning are context alone."""

    ids: npt.NDArray[np.uint32]
    context: int


def split(ids: npt.NDArray[np.uint32], limit: int, marks: Marks, with_headings: bool = False) -> list[Piece]:
    """Split a text into pieces of at most `limit` tokens, each at the best place in its second half, the last of them.

    Each piece but the first begins with context: the headings above it, or the last token of the one before. So every
    token but the text's first is learned exactly once."""
    own = marks[ids]
    strength = strengths(own)
    headings = Headings(ids, own) if with_headings else None
    pieces: list[Piece] = []
    begin, context = 0, ids[:0]
    while len(ids) - begin > limit - len(context):
        room = limit - len(context)
        half = begin + max(1, room // 2)
        best = strength[half + 1 : begin + room + 1]
        end = half + len(best) - int(np.argmax(best[::-1])) if len(best) and best.max() else begin + room
        pieces.append(_piece(ids, begin, end, context))
        begin = end
        context = headings.above(begin, limit // _CONTEXT_SHARE) if headings is not None else ids[:0]
        if not len(context):
            context = ids[begin - 1 : begin]
    pieces.append(_piece(ids, begin, len(ids), context))
    return pieces


def _piece(ids: npt.NDArray[np.uint32], begin: int, end: int, context: npt.NDArray[np.uint32]) -> Piece:
    return Piece(np.concatenate((context, ids[begin:end])), max(1, len(context)))
