"""Text of HTML and PDF: words found, noise and order against a known source, and speed, beside other extractors.

The pages are rendered here: PDFs of two columns with running headers and a table, HTML with navigation. Every word is
there once, so that what is found, and in which order, is counted, not judged. Peers run in environments of their own.
"""

import argparse
import json
import random
import subprocess
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import tables
from bench.environments import python_with
from finetune_trainer.data.documents.html_pages import read_html
from finetune_trainer.data.documents.pdf_text import read_pdf

OURS = "finetune-operator"
_TIMEOUT_S = 1800
_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
_READ = """
import json, sys, time
{load}
paths = json.load(sys.stdin)
path = paths[0]  # what is loaded with the first does not count
{read}
begin_s = time.process_time()
texts = []
for path in paths:
    texts.append({read} or "")
print(json.dumps(dict(texts=texts, cpu_s=time.process_time() - begin_s)))
"""
_MARKITDOWN = ("from markitdown import MarkItDown\nconvert = MarkItDown().convert", "convert(path).text_content")
# By name: packages, what is imported, and the expression that reads `path`, by the ending of documents.
PEERS: dict[str, tuple[list[str], dict[str, tuple[str, str]]]] = {
    "trafilatura": (
        ["trafilatura==2.0.0", "lxml_html_clean"],
        {".html": ("from trafilatura import extract", "extract(open(path, 'rb').read(), include_tables=True)")},
    ),
    "resiliparse": (
        ["resiliparse>=2.0"],
        {
            ".html": (
                "from resiliparse.extract.html2text import extract_plain_text\n"
                "from resiliparse.parse.html import HTMLTree",
                "extract_plain_text(HTMLTree.parse_from_bytes(open(path, 'rb').read()), main_content=True)",
            )
        },
    ),
    "pypdf": (
        ["pypdf>=6"],
        {".pdf": ("from pypdf import PdfReader", "'\\n'.join(page.extract_text() for page in PdfReader(path).pages)")},
    ),
    "markitdown": (["markitdown[pdf]"], {".html": _MARKITDOWN, ".pdf": _MARKITDOWN}),
}


@dataclass(frozen=True)
class Rendered:
    """A document with the words of its content, in order."""

    path: Path
    words: list[str]
    pages: int


@dataclass(frozen=True)
class Read:
    """What one program made of all documents, and the seconds of CPU that it took."""

    texts: list[str]
    cpu_s: float


def _words(draw: random.Random) -> Iterator[str]:
    """Yield words without end, none of them twice."""
    used: set[str] = set()
    while True:
        word = "".join(draw.choices(_SYLLABLES, k=draw.choice((2, 3, 3, 4))))
        if word not in used:
            used.add(word)
            yield word


def _taken(words: Iterator[str], count: int) -> list[str]:
    return [next(words) for _ in range(count)]


def html_page(folder: Path, number: int) -> Rendered:
    """Write a page with navigation, sidebar and footer around an article with a list and a table."""
    words = _words(random.Random(number))
    parts = [_taken(words, count) for count in (4, 60, 3, 50, 30, 12, 80)]
    title, first, second, more, items, cells, last = parts
    listed = "".join(f"<li>{' '.join(items[at : at + 6])}</li>" for at in range(0, len(items), 6))
    rows = "".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells[at : at + 3]) + "</tr>" for at in range(0, len(cells), 3)
    )
    noise = [f'<li><a href="/{word}">{word}</a></li>' for word in _taken(words, 40)]
    text = (
        f"<!doctype html><html><head><title>{' '.join(title)}</title></head><body><header><nav class=navbar><ul>"
        f"{''.join(noise[:15])}</ul></nav></header><main><article><h1>{' '.join(title)}</h1><p>{' '.join(first)}.</p>"
        f"<h2>{' '.join(second)}</h2><p>{' '.join(more)}.</p><ul>{listed}</ul><table>{rows}</table>"
        f"<p>{' '.join(last)}.</p></article></main><aside class=sidebar><ul>{''.join(noise[15:30])}</ul></aside>"
        f"<footer><ul>{''.join(noise[30:])}</ul></footer></body></html>"
    )
    path = folder / f"{number:04}.html"
    path.write_text(text)
    return Rendered(path, [word for part in parts for word in part], 1)


def pdf_paper(folder: Path, number: int, pages: int = 6) -> Rendered:
    """Write a paper of two columns, each page with a running header, its number and a table at the end."""
    from reportlab.lib.pagesizes import A4
    from reportlab.pdfgen.canvas import Canvas

    words, found = _words(random.Random(number)), list[str]()
    header = " ".join(_taken(words, 4))
    path = folder / f"{number:04}.pdf"
    canvas: Any = Canvas(str(path), pagesize=A4, invariant=1)
    width, height = A4

    def put(left: float, top: float, line: list[str], size: int = 10) -> None:
        canvas.setFont("Helvetica", size)
        canvas.drawString(left, top, " ".join(line))
        found.extend(line)

    for page in range(1, pages + 1):
        canvas.setFont("Helvetica", 9)
        canvas.drawString(60, height - 40, header)
        canvas.drawString(width / 2, 30, str(page))
        put(60, height - 80, _taken(words, 5), 16)
        for left in (60, width / 2 + 10):
            for line in range(36):
                put(left, height - 120 - 13 * line, _taken(words, 5))
        for row in range(4):
            for column in range(4):
                put(60 + 120 * column, height - 630 - 16 * row, _taken(words, 1))
        canvas.showPage()
    canvas.save()
    return Rendered(path, found, pages)


def ours(documents: Sequence[Rendered], reader: Callable[[Path], Sequence[Any]]) -> Read:
    """Read the documents here."""
    reader(documents[0].path)
    begin_s = time.process_time()
    texts = ["\n".join(each.text for each in reader(document.path)) for document in documents]
    return Read(texts, time.process_time() - begin_s)


def peer(name: str, ending: str, documents: Sequence[Rendered]) -> Read:
    """Read the documents by a peer, in its environment, which is made the first time."""
    packages, programs = PEERS[name]
    load, read = programs[ending]
    ran = subprocess.run(
        [str(python_with(packages)), "-c", _READ.format(load=load, read=read)],
        input=json.dumps([str(each.path) for each in documents]),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if ran.returncode != 0:
        raise SystemExit(f"{name} failed:\n{ran.stderr[-3000:]}")
    answer = json.loads(ran.stdout)
    return Read(answer["texts"], answer["cpu_s"])


def _in_order(places: Sequence[int]) -> int:
    """Return how many of some places are the longest part of them that rises."""
    ends: list[int] = []
    for place in places:
        at = bisect_left(ends, place)
        ends[at : at + 1] = [place]
    return len(ends)


def row(name: str, documents: Sequence[Rendered], read: Read) -> list[str]:
    """Return a row of the table: words found, noise among what is said, words in order, speed."""
    words = found = noise = said = in_order = 0
    for document, text in zip(documents, read.texts, strict=True):
        place = {word: at for at, word in enumerate(document.words)}
        tokens = "".join(c if c.isalpha() else " " for c in text).split()
        places = [place[token] for token in tokens if token in place]
        words, found, said = words + len(place), found + len(set(places)), said + len(tokens)
        noise += len(tokens) - len(places)
        in_order += _in_order(list(dict.fromkeys(places)))
    size_bytes = sum(each.path.stat().st_size for each in documents)
    speed = [f"{size_bytes / 1e6 / read.cpu_s:.1f}", f"{sum(each.pages for each in documents) / read.cpu_s:.0f}"]
    shares = [f"{100 * found / words:.2f} %", f"{100 * noise / max(1, said):.2f} %", f"{100 * in_order / words:.2f} %"]
    return [name, *shares, *speed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=200, help="of each kind")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    asked = parser.parse_args()
    body: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        for ending, write, reader in ((".html", html_page, read_html), (".pdf", pdf_paper, read_pdf)):
            documents = [write(Path(name), number) for number in range(asked.documents)]
            rows = [row(OURS, documents, ours(documents, reader))]
            for each in asked.peers:
                if ending in PEERS[each][1]:
                    rows.append(row(each, documents, peer(each, ending, documents)))
            header = [ending[1:].upper(), "words found", "noise", "words in order", "MB/s", "pages/s"]
            body.append(tables.table(header, rows))
    title = "Extraction of text, by seconds of CPU"
    tables.write(
        "extraction",
        title,
        f"python -m bench.extraction --documents {asked.documents}",
        ["pypdfium2", "resiliparse"],
        "\n\n".join(body),
    )


if __name__ == "__main__":
    main()
