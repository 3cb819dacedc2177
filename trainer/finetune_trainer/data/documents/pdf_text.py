"""The text of a PDF: its words and where they stand, by pdfium; `pdf_margins` and `pdf_layout` make a text of them."""

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pypdfium2
import pypdfium2.raw as pdfium

from finetune_trainer.data.documents.found import Found, NoTextError, tidy, titled
from finetune_trainer.data.documents.pdf_layout import Page, Segment, text_of
from finetune_trainer.data.documents.pdf_margins import without_margins
from finetune_trainer.data.problems import Change, Drop

_MAX_PAGES = 20_000
_MAX_CHARACTERS = 500_000  # of a page: a large sheet of figures has a tenth
_WORD = re.compile("[^\\s\x02\ufffe]+[\x02\ufffe]?")  # the last character: a hyphen at the end of a line
_GAP = 1.0  # heights of a line: what is farther from the word before it is another segment
_LIGATURES = str.maketrans(
    {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ft", "ﬆ": "st", "\ufffe": "\xad"}
)


def read_pdf(path: Path) -> list[Found]:
    """Return the text of a PDF. Raises NoTextError."""
    try:
        document: Any = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        if getattr(error, "err_code", None) == pdfium.FPDF_ERR_PASSWORD:
            raise NoTextError(Drop.ENCRYPTED) from error
        raise NoTextError(Drop.BROKEN_DOCUMENT, "no PDF can be read of it") from error
    try:
        if len(document) > _MAX_PAGES:
            raise NoTextError(Drop.DOCUMENT_TOO_LARGE, f"more than {_MAX_PAGES:,} pages")
        pages = [_page(document, number) for number in range(len(document))]
        title = titled(document.get_metadata_value("Title"))
    finally:
        document.close()
    if not any(page.segments for page in pages):
        raise NoTextError(Drop.NO_TEXT_LAYER if pages else Drop.EMPTY_DOCUMENT)
    changes = (Change.PICTURES_LEFT_OUT,) if any(page.is_picture for page in pages) else ()
    return [Found(tidy(text_of(without_margins(pages))), title, changes)]


def _page(document: Any, number: int) -> Page:
    """Return what stands on a page; nothing where it is damaged."""
    try:
        page = document[number]
        text = page.get_textpage()
    except pypdfium2.PdfiumError:
        return Page(0.0, 0.0, [])
    try:
        bottom, top = page.get_bbox()[1::2]
        segments = list(_segments(text))
        pictures = () if segments else page.get_objects(filter=[pdfium.FPDF_PAGEOBJ_IMAGE], max_depth=2)
        return Page(bottom, top, segments, is_picture=any(True for _ in pictures))
    finally:
        text.close()
        page.close()


def _characters(text: Any) -> str:
    """Return the characters of a page, one for each index that pdfium knows."""
    count = text.count_chars()
    if count > _MAX_CHARACTERS:
        raise NoTextError(Drop.DOCUMENT_TOO_LARGE, f"more than {_MAX_CHARACTERS:,} characters on a page")
    found = text.get_text_range() if count else ""
    if len(found) != count:  # it adds and leaves out some
        found = "".join(chr(pdfium.FPDFText_GetUnicode(text, at) or 32) for at in range(count))
    return found


class _Boxes:
    """Where the characters of a page stand: each in a box as high as its font and as wide as it moves the pen."""

    def __init__(self, text: Any) -> None:
        self._text, self._box = text, pdfium.FS_RECTF()
        self._reference = ctypes.byref(self._box)

    def of(self, first: int, last: int) -> tuple[float, float, float, float] | None:
        """Return left, bottom, right and top of a word; None where it is not written along a line."""
        box = self._box
        if not pdfium.FPDFText_GetLooseCharBox(self._text, first, self._reference):
            return None
        left, bottom, right, top = box.left, box.bottom, box.right, box.top
        if last > first:
            if not pdfium.FPDFText_GetLooseCharBox(self._text, last, self._reference):
                return None
            right = box.right
            if abs(box.bottom - bottom) > (top - bottom) / 2 or right < left:
                return None
        return (left, bottom, right, top) if top > bottom else None


def _segments(text: Any) -> Iterator[Segment]:
    """Yield what stands on a page, in the order in which it was written: words that follow one another on a line."""
    characters, boxes = _characters(text), _Boxes(text)
    held: Segment | None = None
    for match in _WORD.finditer(characters):
        begin, end = match.span()
        word = match[0] if match[0].isascii() else match[0].translate(_LIGATURES)
        word = word.replace("\x02", "\xad")
        box = boxes.of(begin, end - 1)
        if box is None:
            if held is not None:
                yield held
            held = None
            yield Segment(word, 0.0, 0.0, 0.0, 0.0)
            continue
        left, bottom, right, top = box
        if held is not None:
            height = max(held.top - held.bottom, top - bottom)
            is_on_line = abs(bottom - held.bottom) <= height / 4 or abs(top - held.top) <= height / 4
            gap = left - held.right
            if is_on_line and -height / 4 <= gap <= _GAP * height:
                space = " " if characters[begin - 1].isspace() or gap > height / 5 else ""
                held = held.joined(word, space, right, bottom, top)
                continue
            yield held
        held = Segment(word, left, bottom, right, top)
    if held is not None:
        yield held
