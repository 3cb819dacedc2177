"""The content of an HTML page as Markdown, by resiliparse: without navigation, with headings, lists, tables and code.

What is no content is told by the elements and names that pages use for it, and where a page says itself which part of
it is its content, that is taken. Nothing is left out for what it says.
"""

import html
import re
from pathlib import Path
from typing import Any

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding
from resiliparse.parse.html import HTMLTree

from finetune_trainer.data.documents.found import Found, tidy, titled

_NAMES = (  # of classes and ids
    *("nav", "navbar", "navigation", "menu", "sidebar", "breadcrumb", "breadcrumbs", "toolbar", "footer", "masthead"),
    *("cookies", "banner", "pagination", "pager", "sharing", "social", "advertisement", "newsletter", "site-header"),
)
_NO_CONTENT = (
    *("script", "style", "nav", "aside", "footer", "form", "button", "select", "dialog", "iframe", "noscript", "svg"),
    *("[role=navigation]", "[role=banner]", "[role=contentinfo]", "[role=search]", "[hidden]", "[aria-hidden=true]"),
    *("a.headerlink", "a.anchor", ".sphinxsidebar", "div.related", ".mw-editsection", "body > header"),
    *(f"#{name}, .{name}" for name in _NAMES),
)
_CONTENT = ("main", "[role=main]", "article", "#content", "#main", "div.body")  # the first that is there
_LEAST_SHARE = 0.3  # of a page's text: what holds less is not its content, but a part of that
_SURE_SHARE = 0.6  # of all that is in a page, menus and scripts included, from which on no more is asked
_CODE = re.compile(r"(<pre>.*?</pre>)", re.DOTALL)
_BOX = re.compile(  # around all of a cell or an item. Begins with a character, which is quickly looked for
    r"<(?:((?:t[dh]|li)\b[^>]{0,500}>)\s*<(?:p|div)\b[^>]{0,500}>|/(?:p|div)>\s*(?=</(?:t[dh]|li)>))", re.IGNORECASE
)
_OF_LISTS = re.compile(r"^[ ]*(?:</?(?:ul|ol|li)>)+[ ]*\n", re.MULTILINE)
_ITEM = re.compile(r"^(?:  )?([ ]*)<li>", re.MULTILINE)
_TAG = re.compile(r"</?([a-z][a-z0-9]{0,20})>")
_HEADINGS = {f"<h{level}>": "#" * level + " " for level in range(1, 7)}
_ROW = re.compile(r"^.*\t\t.*$", re.MULTILINE)


def read_html(path: Path) -> list[Found]:
    """Return the content of a page."""
    content = path.read_bytes()
    return [of_html(bytes_to_str(content, detect_encoding(content, from_html_meta=True) or "utf-8"))]


def of_html(text: str, main_content: bool = True) -> Found:
    """Return the content of a page and its title. main_content: whether it has navigation to be left out."""
    boxed = _BOX.sub(_without_box, text)
    tree: Any = HTMLTree.parse(boxed)
    title = titled(tree.title)
    if not main_content:
        return Found(_markdown(_written(tree, ("script", "style"))), title)
    whole: str | None = None
    size = 0 if tree.body is None else len(tree.body.text or "")
    for selector in _CONTENT:
        body = tree.body
        content = None if body is None else body.query_selector(selector)
        if body is None or content is None:
            continue
        content.remove()
        body.replace_children(content)  # takes a tenth of the time in which its HTML is parsed
        part = _written(tree, _NO_CONTENT)
        if len(part) >= _SURE_SHARE * size:
            return Found(_markdown(part), title)
        tree = HTMLTree.parse(boxed)
        whole = _written(tree, _NO_CONTENT) if whole is None else whole
        if len(part) >= _LEAST_SHARE * len(whole):
            return Found(_markdown(part), title)
    return Found(_markdown(_written(tree, _NO_CONTENT) if whole is None else whole), title)


def _without_box(found: re.Match[str]) -> str:
    return f"<{found[1]}" if found[1] else ""


def _written(tree: Any, skipped: tuple[str, ...]) -> str:
    """Return what a page says, in the few elements that tell its form."""
    return extract_plain_text(
        tree, preserve_formatting="minimal_html", main_content=False, alt_texts=False, skip_elements=skipped
    )


def _markdown(written: str) -> str:
    parts = _CODE.split(written)
    for at, part in enumerate(parts):
        if at % 2 == 0:
            listed = _ITEM.sub(r"\1- ", _OF_LISTS.sub(_end_of_list, part)) if "<" in part else part
            parts[at] = _ROW.sub(_row, listed) if "\t\t" in listed else listed
    return tidy(html.unescape(_TAG.sub(_of_tag, "".join(parts))))


def _end_of_list(line: re.Match[str]) -> str:
    """Return what stands for a line that begins or ends lists: an empty one where the outermost ends."""
    return "\n" if line[0].startswith("</") else ""


def _of_tag(tag: re.Match[str]) -> str:
    return _HEADINGS.get(tag[0], "")


def _row(line: re.Match[str]) -> str:
    return "| " + " | ".join(cell.strip() for cell in line[0].split("\t\t")) + " |"
