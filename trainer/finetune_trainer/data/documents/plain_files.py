"""Plain text and Markdown: which encoding a file has, and what it is called."""

import re
from pathlib import Path

from resiliparse.parse.encoding import bytes_to_str, detect_encoding

from finetune_trainer.data.documents.found import Found, NoTextError, plain, titled
from finetune_trainer.data.problems import Drop

_MARKS = (  # of encodings, at a file's beginning; the longer ones first
    (b"\xff\xfe\0\0", "utf-32-le"),
    (b"\0\0\xfe\xff", "utf-32-be"),
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
_FRONT_MATTER = re.compile(r"\A---\n(.{0,20000}?)\n(?:---|\.\.\.)(?:\n|\Z)", re.DOTALL)
_FRONT_TITLE = re.compile(r"^title:[ \t]*(['\"]?)(.{1,500}?)\1[ \t]*$", re.MULTILINE)
_HEADING = re.compile(r"^#{1,6}[ \t]+(.{1,500}?)[ \t#]*$", re.MULTILINE)


def decoded(content: bytes) -> str:
    """Return what bytes say: by their byte order mark, as UTF-8, or in the older encoding that fits best.

    Raises NoTextError where they are no text."""
    mark, encoding = next((each for each in _MARKS if content.startswith(each[0])), (b"", "utf-8"))
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        if mark:
            raise NoTextError(Drop.BROKEN_DOCUMENT, f"it is no valid {encoding}, as its first bytes say") from error
        text = bytes_to_str(content, detect_encoding(content) or "windows-1252", fallback_encodings=("windows-1252",))
    if "\0" in text:
        raise NoTextError(Drop.BROKEN_DOCUMENT, "it holds NUL characters, so it is no text")
    return plain(text)


def read_text(path: Path) -> list[Found]:
    """Return a file of plain text."""
    return [Found(decoded(path.read_bytes()))]


def read_markdown(path: Path) -> list[Found]:
    """Return a file of Markdown without its front matter."""
    text = decoded(path.read_bytes())
    front = _FRONT_MATTER.match(text)
    title = None if front is None else _FRONT_TITLE.search(front[1])
    body = text if front is None else text[front.end() :]
    heading = _HEADING.search(body)
    return [Found(body.strip("\n"), titled(title[2] if title else heading[1] if heading else ""))]
