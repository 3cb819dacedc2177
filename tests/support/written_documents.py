"""Documents as people have them, made here: PDFs with columns, headers and tables, and pages with navigation."""

from collections.abc import Callable, Sequence
from email.message import EmailMessage
from io import BytesIO
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

from reportlab.lib.pagesizes import A4
from reportlab.lib.utils import ImageReader
from reportlab.pdfgen.canvas import Canvas

WIDTH, HEIGHT = A4
LEFT, SIZE, PITCH = 60, 10, 13


def pdf(draw: Callable[[Any], object], **options: Any) -> bytes:
    """Return the PDF that `draw` draws on a canvas."""
    written = BytesIO()
    canvas = Canvas(written, pagesize=A4, invariant=1, **options)
    draw(canvas)
    canvas.save()
    return written.getvalue()


def put_lines(canvas: Any, left: float, top: float, lines: Sequence[str], size: int = SIZE) -> float:
    """Write lines one below another; returns where the next would be."""
    canvas.setFont("Helvetica", size)
    for line in lines:
        canvas.drawString(left, top, line)
        top -= PITCH
    return top


def pages_pdf(pages: Sequence[Sequence[str]], header: str = "", footer: str = "") -> bytes:
    """Return a PDF of one column. header, footer: run along all pages; {page} is the number of each."""

    def draw(canvas: Any) -> None:
        for number, lines in enumerate(pages, 1):
            if header:
                put_lines(canvas, LEFT, HEIGHT - 40, [header.format(page=number)])
            put_lines(canvas, LEFT, HEIGHT - 90, lines)
            if footer:
                put_lines(canvas, WIDTH / 2, 30, [footer.format(page=number)])
            canvas.showPage()

    return pdf(draw)


def columns_pdf(title: str, columns: Sequence[Sequence[str]], in_turn: bool = False) -> bytes:
    """Return a page with a title over its columns. in_turn: written line by line across them, as some programs do."""

    def draw(canvas: Any) -> None:
        put_lines(canvas, LEFT, HEIGHT - 80, [title], 18)
        width = (WIDTH - 2 * LEFT) / len(columns)
        lines = [(at, line, text) for at, column in enumerate(columns) for line, text in enumerate(column)]
        for at, line, text in sorted(lines, key=lambda each: each[1]) if in_turn else lines:
            put_lines(canvas, LEFT + at * width, HEIGHT - 120 - line * PITCH, [text])

    return pdf(draw)


def table_pdf(before: str, rows: Sequence[Sequence[str]]) -> bytes:
    """Return a page with a sentence and a table below it."""

    def draw(canvas: Any) -> None:
        put_lines(canvas, LEFT, HEIGHT - 80, [before])
        for line, row in enumerate(rows):
            for at, cell in enumerate(row):
                put_lines(canvas, LEFT + at * 120, HEIGHT - 110 - line * 16, [cell])

    return pdf(draw)


def scanned_pdf() -> bytes:
    """Return a PDF of a picture."""
    from PIL import Image

    picture = BytesIO()
    Image.new("RGB", (40, 40), (200, 10, 10)).save(picture, "PNG")
    return pdf(lambda canvas: canvas.drawImage(ImageReader(BytesIO(picture.getvalue())), 50, 50, 200, 200))


def encrypted_pdf() -> bytes:
    """Return a PDF that asks for a password."""
    return pdf(lambda canvas: put_lines(canvas, LEFT, 700, ["secret"]), encrypt="sesame")


def docx_bytes() -> bytes:
    """Return a Word document with a heading, a list and a table."""
    import docx

    document: Any = docx.Document()
    document.core_properties.title = "All rivers"
    document.add_heading("Rivers", 1)
    document.add_paragraph("A river flows towards the sea.")
    for item in ("The Nile", "The Rhine"):
        document.add_paragraph(item, style="List Bullet")
    table = document.add_table(rows=2, cols=2)
    for at, text in enumerate(("River", "Length", "Nile", "6650 km")):
        table.cell(at // 2, at % 2).text = text
    document.add_paragraph("That is all.")
    written = BytesIO()
    document.save(written)
    return written.getvalue()


def epub_bytes(chapters: Sequence[str], names: Sequence[str] = ()) -> bytes:
    """Return a book. names: what its spine calls the chapters, where that is not where they are."""
    files = {f"OEBPS/c{at}.xhtml": f"<html><body>{each}</body></html>" for at, each in enumerate(chapters)}
    called = names or [f"c{at}.xhtml" for at in range(len(chapters))]
    items = "".join(
        f'<item id="i{at}" href="{name}" media-type="application/xhtml+xml"/>' for at, name in enumerate(called)
    )
    spine = "".join(f'<itemref idref="i{at}"/>' for at in reversed(range(len(called))))
    package = (
        '<package xmlns="http://www.idpf.org/2007/opf"><metadata xmlns:dc="http://purl.org/dc/elements/1.1/">'
        f"<dc:title>A book</dc:title></metadata><manifest>{items}</manifest><spine>{spine}</spine></package>"
    )
    container = '<container><rootfiles><rootfile full-path="OEBPS/p.opf"/></rootfiles></container>'
    written = BytesIO()
    with ZipFile(written, "w", ZIP_DEFLATED) as archive:
        for name, text in {"META-INF/container.xml": container, "OEBPS/p.opf": package, **files}.items():
            archive.writestr(name, text)
    return written.getvalue()


def mail_bytes(subject: str, plain: str = "", html: str = "", attachment: bytes = b"") -> bytes:
    """Return a mail."""
    message = EmailMessage()
    message["Subject"], message["From"] = subject, "a@example.org"
    if plain or not html:
        message.set_content(plain)
    if html:
        (message.add_alternative if plain else message.set_content)(html, subtype="html")
    if attachment:
        message.add_attachment(attachment, "application", "octet-stream", filename="a.bin")
    return message.as_bytes()


def page_html(body: str, title: str = "Rivers - Atlas") -> bytes:
    """Return a page with the navigation that all pages of a site have."""
    return f"""<!doctype html><html><head><title>{title}</title><style>.nav {{color: red}}</style>
<script>var tracking = "everything";</script></head><body>
<header class="site-header"><nav class="navbar"><ul><li><a href="/">Home</a></li><li><a href="/shop">Shop</a></li>
<li><a href="/login">Log in</a></li></ul></nav></header>
<main id="content"><article>{body}</article></main>
<aside class="sidebar"><h3>Most read</h3><ul><li><a href="/a">Ten tricks</a></li></ul></aside>
<footer class="footer">Copyright 2026 Atlas. <a href="/imprint">Imprint</a></footer>
</body></html>""".encode()
