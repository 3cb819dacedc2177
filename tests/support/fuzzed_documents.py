"""Small valid documents of each kind for `make fuzz`, and what must hold of whatever is read of them once changed."""

import io
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from finetune_trainer.data.documents.extractor import Extractors
from finetune_trainer.data.documents.reading import Extracted, most_text_bytes
from finetune_trainer.data.file_kinds import DocumentKind
from finetune_trainer.data.problems import LeftOut, ReadDocument
from finetune_trainer.data.raw_rows import decode_row
from written_documents import LEFT, docx_bytes, epub_bytes, mail_bytes, page_html, pdf, put_lines

_LINES = 12
_AS_IT_IS = {DocumentKind.TEXT, DocumentKind.MARKDOWN}


def texts(said: str) -> Mapping[str, Callable[[], bytes]]:
    """Return how to make what is changed, by the name of its file. said: stands in each of its lines."""
    lines = [f"Line {number} says {said}." for number in range(_LINES)]
    body = "<h1>Rivers</h1>" + "".join(f"<p>{line}</p>" for line in lines) + f"<table><tr><td>{said}</td></tr></table>"
    mail = partial(mail_bytes, f"About {said}", "\n".join(lines), f"<p>{said}</p>", said.encode())
    made: dict[str, Callable[[], bytes]] = {
        "a.txt": "\n".join(lines).encode,
        "a.md": "\n\n".join(["---\ntitle: Rivers\n---", "# Rivers", *lines, f"| {said} |\n|---|\n| 1 |"]).encode,
        "a.html": partial(page_html, body),
        "a.pdf": partial(pdf, lambda canvas: put_lines(canvas, LEFT, 700, lines), pageCompression=0),
        "a.rst": "\n".join(
            ["Rivers", "======", "", *lines, "", f"* {said}", "", ".. note:: x", "", "::", "", "  x"]
        ).encode,
        "a.eml": mail,
        "a.mbox": lambda: b"From a@example.org Sat Nov 28 00:00:00 2026\n" + mail() + b"\n",
        "a.docx": lambda: _member(docx_bytes(), _WORD).replace(b"river", said.encode()),
        "a.epub": lambda: f"<html><body>{body}</body></html>".encode(),
    }
    return {name: cache(make) for name, make in made.items()}


_WORD, _CHAPTER = "word/document.xml", "OEBPS/c0.xhtml"


def _packed(name: str, content: bytes) -> bytes:
    """Return the archive that a file of that name is, with the content in it."""
    archive, member = _archives()[name]
    written = io.BytesIO()
    with ZipFile(io.BytesIO(archive)) as source, ZipFile(written, "w", ZIP_DEFLATED) as target:
        for each in source.namelist():
            target.writestr(each, content if each == member else source.read(each))
    return written.getvalue()


@cache
def _archives() -> Mapping[str, tuple[bytes, str]]:
    """By name of the file: the archive, and the name of what is changed in it."""
    return {"a.docx": (docx_bytes(), _WORD), "a.epub": (epub_bytes([""]), _CHAPTER)}


# By name of the file, what makes the archive that it is of the content.
PACKED: Mapping[str, Callable[[bytes], bytes]] = {name: partial(_packed, name) for name in ("a.docx", "a.epub")}


def _member(archive: bytes, name: str) -> bytes:
    with ZipFile(io.BytesIO(archive)) as source:
        return source.read(name)


def read_document(path: Path, kind: DocumentKind, out: Path, extractors: Extractors, said: str) -> LeftOut | int:
    """Return why a document is left out, else how many rows it is. out: for its rows, as a file.

    Raises AssertionError for what must not be, whatever the document is."""
    content = path.read_bytes()
    left_out = extractors.extract(path, kind, out)
    if left_out is not None:
        assert said not in left_out.words, f"data in the words of {left_out.drop}"
        assert left_out.words != FAILS, "a reader ended that should have said why"
        return left_out
    found = [decode_row(each) for each in Extracted("", len(content), out).rows()]
    assert [each.number for each in found] == list(range(1, len(found) + 1)), "numbers of rows have gaps"
    rows = [_text(each.value) for each in found]
    assert 0 < sum(len(each.encode()) for each in rows) <= most_text_bytes(len(content))
    if kind in _AS_IT_IS:
        _require_untouched(content, "".join(rows), said)
    return len(rows)


FAILS = "what reads it fails on it"


def _text(value: object) -> str:
    if isinstance(value, ReadDocument):
        return value.text
    assert isinstance(value, dict)
    assert set(value) == {"text"}
    return value["text"]


def _require_untouched(content: bytes, read: str, said: str) -> None:
    """What is said below the front matter of a text in UTF-8 is read as often as it stands there."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return  # the bytes are of another encoding, or of none
    below = text.rpartition("\n---")[2] if text.startswith("---") else text
    assert read.count(said) >= below.count(said), "what was said is lost"
