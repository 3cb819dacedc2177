"""The texts of a row that people wrote or read, without those of programs; and which of them are rather code."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from finetune_trainer.data.kinds import texts
from finetune_trainer.data.rows import Row

# What functions are called, called with and found by: programs compare these texts, byte by byte.
_OF_PROGRAMS = re.compile(r"(?:^|\.)(?:tools|tool_calls|tool_call_id|name|chat_template_kwargs)(?:$|[.\[])")
_FENCED = re.compile(r"(^[ \t]*(```|~~~).*?(?:^[ \t]*\2[^\n]*$|\Z))", re.DOTALL | re.MULTILINE)
_LINE_OF_CODE = re.compile(
    r"[;{}]\s*$|^\s*(?:[})\]]|//|/\*|#include\b|#!|import\s+[\w.]+(?:\s+as\s+\w+)?\s*;?\s*$|from\s+\S+\s+import\b|def\s+\w+\(|class\s+\w+|"
    r"return(?:\s+[\w.\[\]()]+)?\s*$|"
    r"(?:var|let|const|func|fn|public|private|static|if|for|while|elif|else)\b.*[:{(]\s*$|\w+(?:\.\w+)*\s*[+-]?=\s*\S)"
)
_SHARE_OF_CODE = 0.3  # of the lines that are not empty, from which on a text is taken for code
_MAX_LINES_LOOKED_AT = 1000
_MAX_LINE_OF_CODE = 400  # characters; longer ones are paragraphs, or no program that a person wrote


class Part(NamedTuple):
    """A part of a text, and whether it is code."""

    text: str
    is_code: bool


def prose(row: Row) -> dict[str, str]:
    """Return the texts that people wrote or read, by the path of the field."""
    return {path: text for path, text in texts(row).items() if not _OF_PROGRAMS.search(path)}


def parts(text: str) -> Iterator[Part]:
    """Yield the parts of a text in order: what is fenced by ``` or ~~~ is code, and so is a text that looks like it."""
    if looks_like_code(text):
        yield Part(text, True)
        return
    end = 0
    for fenced in _FENCED.finditer(text):
        yield Part(text[end : fenced.start()], False)
        yield Part(fenced[0], True)
        end = fenced.end()
    yield Part(text[end:], False)


def looks_like_code(text: str) -> bool:
    """Return whether many lines of a text end or begin as those of programs do, by its first thousand lines."""
    if "```" in text or "~~~" in text:
        return False  # whoever wrote it has said where its code is
    lines = [line for line in text.split("\n", _MAX_LINES_LOOKED_AT)[:_MAX_LINES_LOOKED_AT] if line.strip()]
    return sum(1 for line in lines if _is_code(line)) > _SHARE_OF_CODE * len(lines)


def _is_code(line: str) -> bool:
    return len(line) <= _MAX_LINE_OF_CODE and bool(_LINE_OF_CODE.search(line))
