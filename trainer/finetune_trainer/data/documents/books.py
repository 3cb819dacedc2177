"""EPUB books: the chapters in the order of their spine, each a page of HTML."""

import posixpath
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

from finetune_trainer.data.documents.archives import Archive
from finetune_trainer.data.documents.found import Found, NoTextError, titled
from finetune_trainer.data.documents.html_pages import of_html
from finetune_trainer.data.documents.plain_files import decoded
from finetune_trainer.data.problems import Drop

_CONTAINER = "META-INF/container.xml"
_CHAPTERS = ("application/xhtml+xml", "text/html")
_MAX_CHAPTERS = 10_000


def read_epub(path: Path) -> list[Found]:
    """Return a book."""
    archive = Archive(path)
    rootfile = _parsed(archive.read(_CONTAINER)).find(".//{*}rootfile")
    package = "" if rootfile is None else rootfile.get("full-path", "")
    root = _parsed(archive.read(package))
    items = {each.get("id"): each for each in root.iterfind(".//{*}manifest/{*}item")}
    chapters: list[str] = []
    for reference in root.findall(".//{*}spine/{*}itemref")[:_MAX_CHAPTERS]:
        item = items.get(reference.get("idref"))
        if item is None or item.get("media-type") not in _CHAPTERS or "nav" in item.get("properties", "").split():
            continue
        name = posixpath.normpath(posixpath.join(posixpath.dirname(package), unquote(item.get("href", ""))))
        if name in archive.names:  # a name that climbs out of the book is none of its own
            chapters.append(of_html(decoded(archive.read(name)), main_content=False).text)
    title = root.findtext(".//{*}metadata/{http://purl.org/dc/elements/1.1/}title")
    return [Found("\n\n".join(each for each in chapters if each), titled(title))]


def _parsed(content: bytes) -> ElementTree.Element:
    """Return a file's XML. What it refers to is not read, and expat refuses what expands without end."""
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise NoTextError(Drop.BROKEN_DOCUMENT, "its XML cannot be read") from error
