"""Take running headers, footers and page numbers off the pages of a PDF: what stands at the edge of several pages.

Text is only taken off where the same one, but for its numbers, stands at the same height of several pages, or where
nothing else than a number stands at the edge.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_trainer.data.documents.pdf_layout import Page, Segment

_EDGE = 0.15  # of a page's height
_MAX_HEADER = 80  # characters, where it is that of one page
_MAX_LINES = 3  # of a header, and of a footer
_ENOUGH_PAGES = 3  # on which the same stands, or all of a shorter document
_HEIGHT = 6.0  # points within which it stands at the same height
_NUMBERS = re.compile(r"\d+")
_ROMAN = re.compile(r"[ivxlc]{1,8}", re.IGNORECASE)
_PAGE_NUMBER = re.compile(
    r"(?:page|seite|p\.)?\s*[-\u2013\u2014\[(]?\s*(?:\d{1,5}|[ivxlc]{1,8})\s*[-\u2013\u2014\])]?"
    r"(?:\s*(?:of|von|/)\s*\d{1,5})?",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class _Edge:
    """The outermost line of a page. key: what it says but for its numbers, and at which height."""

    segments: list[Segment]
    text: str
    key: tuple[str, int]


def without_margins(pages: Sequence[Page]) -> list[Page]:
    """Return the pages without what runs along them."""
    found = list(pages)
    for at_top in (True, False):
        for _ in range(_MAX_LINES):
            edges = [_edge(page, at_top) for page in found]
            taken = _running(edges)
            if not any(taken):
                break
            found = [
                _without(page, edge) if take else page for page, edge, take in zip(found, edges, taken, strict=True)
            ]
    return found


def _running(edges: Sequence[_Edge | None]) -> list[bool]:
    """Return which of the outermost lines run along the pages."""
    counts = Counter(edge.key for edge in edges if edge is not None)
    enough = max(2, min(_ENOUGH_PAGES, len(edges)))
    running = {key for key, count in counts.items() if count >= enough}
    pages_at = Counter[int]()
    for key in running:
        pages_at[key[1]] += counts[key]
    heights = {height for height, count in pages_at.items() if 2 * count >= len(edges)}
    return [
        edge is not None
        and (
            edge.key in running
            or (edge.key[1] in heights and len(edge.text) <= _MAX_HEADER)
            or _PAGE_NUMBER.fullmatch(edge.text) is not None
        )
        for edge in edges
    ]


def _edge(page: Page, at_top: bool) -> _Edge | None:
    """Return the first or last line of a page, where it stands at the edge and is not all of it."""
    upright = [each for each in page.segments if each.height]
    if not upright:
        return None
    outermost = max(upright, key=lambda each: each.bottom) if at_top else min(upright, key=lambda each: each.bottom)
    reach = _EDGE * (page.top - page.bottom)
    if (outermost.bottom < page.top - reach) if at_top else (outermost.top > page.bottom + reach):
        return None
    row = [each for each in upright if abs(each.bottom - outermost.bottom) <= outermost.height / 2]
    if len(row) == len(upright) and len(upright) > 1:
        return None
    row.sort(key=lambda each: each.left)
    text = " ".join(each.text for each in row).strip()
    said = "#" if _ROMAN.fullmatch(text) else _NUMBERS.sub("#", text).casefold()
    return _Edge(row, text, (said, round(outermost.bottom / _HEIGHT)))


def _without(page: Page, edge: _Edge | None) -> Page:
    taken = set() if edge is None else {id(each) for each in edge.segments}
    return page._replace(segments=[each for each in page.segments if id(each) not in taken])
