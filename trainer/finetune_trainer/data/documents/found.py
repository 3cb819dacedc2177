"""What is found in a document, and how its reader tells it: rows of text, or why there are none."""

import re
from dataclasses import dataclass

from finetune_trainer.data.problems import Change, Drop

MAX_PART_BYTES = 4 * 2**20  # of a row's text: a longer text becomes several rows
_MAX_TITLE = 200  # characters
_NO_CHARACTER = re.compile("[\0\ud800-\udfff]")
_LINE_END = re.compile("\r\n?")
_BLANK_LINES = re.compile("\n[ \t\n]*\n")
_BREAKS = ("\n\n", "\n", " ")  # where a text is best cut, the best first


@dataclass(frozen=True, slots=True)
class Found:
    """A text that is one row, what it is called (an empty title where nothing says so), and what was left out."""

    text: str
    title: str = ""
    changes: tuple[Change, ...] = ()


class NoTextError(Exception):
    """A document is left out. words: what is wrong there, beyond the reason; never the document's own."""

    def __init__(self, drop: Drop, words: str = "") -> None:
        super().__init__(drop)
        self.drop, self.words = drop, words


def plain(text: str) -> str:
    """Return a text with lines as they end everywhere, and without what is no character."""
    lines = _LINE_END.sub("\n", text) if "\r" in text else text
    return lines if lines.isascii() and "\0" not in lines else _NO_CHARACTER.sub("", lines)


def tidy(text: str) -> str:
    """Return a text that was made of a layout: no spaces at the ends of lines, one empty line between paragraphs."""
    lines = [line.rstrip(" \t") for line in plain(text).split("\n")]
    return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip()


def titled(title: str | None) -> str:
    """Return a title as one line of bounded length."""
    return " ".join(plain(title or "").split())[:_MAX_TITLE]


def parts(text: str, most_bytes: int = MAX_PART_BYTES) -> list[str]:
    """Return a text in parts of at most so many bytes, cut behind a paragraph, a line or a word where there is one in
    a part's second half. All of them together are the text."""
    most = most_bytes // 4 if not text.isascii() else most_bytes  # characters
    found: list[str] = []
    begin = 0
    while len(text) - begin > most:
        ends = (text.rfind(each, begin + most // 2, begin + most) + len(each) for each in _BREAKS)
        end = next((end for end in ends if end > begin + most // 2), begin + most)
        found.append(text[begin:end])
        begin = end
    return [*found, text[begin:]]
