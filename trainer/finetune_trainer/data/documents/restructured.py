"""reStructuredText, by docutils, whose page of HTML is read as any other."""

from pathlib import Path
from typing import Any

from docutils.core import publish_parts
from docutils.utils import SystemMessage

from finetune_trainer.data.documents.found import Found, titled
from finetune_trainer.data.documents.html_pages import of_html
from finetune_trainer.data.documents.plain_files import decoded

_MAX_CHARACTERS = 2**20  # docutils reads a tenth of that in a second
_NEVER = 5  # of levels of messages
# Nothing is read or run that a text names, and what it does not know stands in the text as it is.
_SETTINGS: dict[str, Any] = {
    "file_insertion_enabled": False,
    "raw_enabled": False,
    "report_level": _NEVER,
    "halt_level": _NEVER,
    "_disable_config": True,
    "syntax_highlight": "none",
    "embed_stylesheet": False,
    "doctitle_xform": True,
    "line_length_limit": 100_000,
}


def read_rst(path: Path) -> list[Found]:
    """Return a document; one that is too long, or that docutils cannot read, as it is written."""
    text = decoded(path.read_bytes())
    if len(text) > _MAX_CHARACTERS:
        return [Found(text)]
    try:
        found: Any = publish_parts(text, writer="html5", settings_overrides=_SETTINGS)
    except (SystemMessage, ValueError, IndexError, KeyError, AttributeError, AssertionError):
        return [Found(text)]
    page = of_html(f"<html><body>{found['html_body']}</body></html>", main_content=False)
    return [Found(page.text, titled(found["title"]))]
