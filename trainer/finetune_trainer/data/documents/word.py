"""Word documents: headings, paragraphs, lists and tables in their order, by python-docx."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docx
from docx.opc.exceptions import PackageNotFoundError
from docx.table import Table
from docx.text.paragraph import Paragraph

from finetune_trainer.data.documents.archives import DAMAGED, Archive
from finetune_trainer.data.documents.found import Found, NoTextError, tidy, titled
from finetune_trainer.data.problems import Drop

_HEADING = re.compile(r"heading ([1-9])", re.IGNORECASE)
_MAX_LEVEL = 6
# What python-docx ends with where the file or its XML is damaged, or its elements are not those that it looks for.
_NO_WORD = (*DAMAGED, PackageNotFoundError, AttributeError, KeyError, SyntaxError, ValueError)
_OLD_FORMAT = b"\xd0\xcf\x11\xe0"  # of Word before 2007, and of what has a password


def read_docx(path: Path) -> list[Found]:
    """Return a document."""
    with path.open("rb") as stream:
        if stream.read(len(_OLD_FORMAT)) == _OLD_FORMAT:
            raise NoTextError(Drop.ENCRYPTED, "or of Word before 2007; save it as .docx without a password")
    Archive(path).require_bounded()
    try:
        document: Any = docx.Document(str(path))
        text = "".join(_written(list(document.iter_inner_content())))
        title = document.core_properties.title
    except _NO_WORD as error:
        raise NoTextError(Drop.BROKEN_DOCUMENT, "no Word document can be read of it") from error
    return [Found(tidy(text), titled(title))]


def _written(blocks: list[Any]) -> Iterator[str]:
    was_item = False
    for block in blocks:
        if isinstance(block, Table):
            yield "\n" * was_item
            yield from (f"| {' | '.join(row)} |\n" for row in _rows(block))
            yield "\n"
            was_item = False
            continue
        text = block.text.strip()
        if not text:
            continue
        mark = _mark(block)
        is_item = mark == "- "
        if was_item and not is_item:
            yield "\n"
        yield f"{mark}{text}\n" if is_item else f"{mark}{text}\n\n"
        was_item = is_item


def _mark(paragraph: Paragraph) -> str:
    """Return what Markdown begins such a paragraph with."""
    name = str(getattr(paragraph.style, "name", None) or "")
    heading = _HEADING.match(name)
    if heading or name == "Title":
        return "#" * min(_MAX_LEVEL, int(heading[1]) if heading else 1) + " "
    properties: Any = paragraph._p.pPr  # pyright: ignore[reportPrivateUsage]
    is_listed = properties is not None and properties.numPr is not None
    return "- " if is_listed or name.startswith("List") else ""


def _rows(table: Table) -> Iterator[list[str]]:
    """Yield the cells of each row; of merged cells there is one."""
    for row in table._tbl.tr_lst:  # pyright: ignore[reportPrivateUsage]
        yield [" ".join(part.text for part in cell.p_lst) for cell in row.tc_lst]
