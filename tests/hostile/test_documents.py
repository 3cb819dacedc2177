"""Documents that become larger than they are, never end, or lie about what they are: each costs itself alone."""

import zlib
from collections.abc import Callable
from contextlib import closing
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest

from finetune_trainer.data.documents import extractor
from finetune_trainer.data.documents.extractor import Extractors
from finetune_trainer.data.file_kinds import document_of
from finetune_trainer.data.problems import Drop, LeftOut

MIB = 2**20


def _object(number: int, content: bytes) -> bytes:
    return b"%d 0 obj\n" % number + content + b"\nendobj\n"


def _pdf(*objects: bytes) -> bytes:
    """Return a PDF of objects from 1 on, the first being its catalog."""
    written, places = b"%PDF-1.7\n", list[int]()
    for number, content in enumerate(objects, 1):
        places.append(len(written))
        written += _object(number, content)
    table = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    table += b"".join(b"%010d 00000 n \n" % place for place in places)
    trailer = b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, len(written))
    return written + table + trailer


CATALOG, PAGES = b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>"
PAGE = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 4 0 R /Resources << /Font << /F 5 0 R >> >> >>"
FONT = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"


def _stream(content: bytes, filters: bytes = b"") -> bytes:
    return b"<< /Length %d %s >>\nstream\n" % (len(content), filters) + content + b"\nendstream"


def _pdf_bomb() -> bytes:
    """A page whose content is 400 MiB of spaces, deflated twice."""
    content = zlib.compress(zlib.compress(b" " * (400 * MIB), 9), 9)
    assert len(content) < MIB
    return _pdf(CATALOG, PAGES, PAGE, _stream(content, b"/Filter [/FlateDecode /FlateDecode]"), FONT)


def _letters_bomb() -> bytes:
    """A page with 40 million letters, deflated."""
    content = zlib.compress(b"BT /F 10 Tf 10 10 Td (" + b"a b " * (10 * MIB) + b") Tj ET", 9)
    return _pdf(CATALOG, PAGES, PAGE, _stream(content, b"/Filter /FlateDecode"), FONT)


def _circle() -> bytes:
    """Pages that are their own children."""
    return _pdf(CATALOG, b"<< /Type /Pages /Kids [2 0 R 2 0 R] /Count 2000000000 >>")


def _many_pages() -> bytes:
    """As many pages as a number may say, of which there is one."""
    return _pdf(CATALOG, b"<< /Type /Pages /Kids [3 0 R] /Count 100000 >>", PAGE, _stream(b""), FONT)


def _deep_html() -> bytes:
    return b"<div>" * 2_000_000 + b"words" + b"</div>" * 2_000_000


def _deep_table() -> bytes:
    return b"<table><tr><td>" * 300_000 + b"words"


def _many_headings() -> bytes:
    return b"<h1>" * 3_000_000 + b"words"


def _zip_bomb() -> bytes:
    written = BytesIO()
    with ZipFile(written, "w", ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", bytes(400 * MIB))
    return written.getvalue()


def _expanding_book() -> bytes:
    """A container whose entities refer to one another, a billion times in all."""
    entities = "".join(f'<!ENTITY e{at} "{f"&e{at - 1};" * 10}">' for at in range(1, 10))
    written = BytesIO()
    with ZipFile(written, "w", ZIP_DEFLATED) as archive:
        archive.writestr("META-INF/container.xml", f'<!DOCTYPE c [<!ENTITY e0 "lol">{entities}]><c>&e9;</c>')
    return written.getvalue()


def _nested_mail(levels: int) -> bytes:
    return b"Content-Type: message/rfc822\n\n" * levels + b"Subject: a\n\nwords"


ENDED = {Drop.EXTRACTION_ENDED, Drop.DOCUMENT_TOO_LARGE, Drop.BROKEN_DOCUMENT, Drop.EMPTY_DOCUMENT, Drop.NO_TEXT_LAYER}
# What is made, and whether anything may be read of it.
ATTACKS: dict[str, tuple[str, Callable[[], bytes], bool]] = {
    "a PDF of spaces": ("a.pdf", _pdf_bomb, False),
    "a PDF of letters": ("a.pdf", _letters_bomb, True),
    "pages in a circle": ("a.pdf", _circle, False),
    "more pages than there are": ("a.pdf", _many_pages, False),
    "HTML two million levels deep": ("a.html", _deep_html, True),
    "tables in tables": ("a.html", _deep_table, True),
    "three million headings": ("a.html", _many_headings, True),
    "a PDF of nothing but objects": ("a.pdf", lambda: b"%PDF-1.7\n" + b"1 0 obj\n<<\n" * 500_000, False),
    "a text that is one line": ("a.txt", lambda: b"a" * (300 * MIB), False),
    "half of a page": ("a.html", lambda: b"<!doctype html><html><body><p>wor", True),
    "a Word document of 400 MiB of zeros": ("a.docx", _zip_bomb, False),
    "a book whose XML expands": ("a.epub", _expanding_book, False),
    "mail in mail": ("a.eml", lambda: _nested_mail(3000), True),
    "nothing but zeros": ("a.pdf", lambda: bytes(MIB), False),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_document_ends_within_bounds_and_the_next_one_is_read(
    tmp_path: Path, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, make, may_be_read = ATTACKS[attack]
    path, out = tmp_path / name, tmp_path / "out"
    path.write_bytes(make())
    monkeypatch.setattr(extractor, "DOCUMENT_CPU_S", 20)
    kind = document_of(name)
    assert kind is not None
    with closing(Extractors(1)) as extractors:
        left_out = extractors.extract(path, kind, out)
        assert isinstance(left_out, LeftOut) or may_be_read
        if left_out is not None:
            assert left_out.drop in ENDED
        (tmp_path / "b.txt").write_bytes(b"words")
        text = document_of("b.txt")
        assert text is not None
        assert extractors.extract(tmp_path / "b.txt", text, out) is None
