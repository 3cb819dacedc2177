"""Text from outside, made fit for people to read: names, values and answers that somebody else wrote.

They reach terminals, conditions, logs and the model card. A terminal obeys escape sequences, and marks that turn the
direction of writing let a name read as another one. What enters a fault's words, a condition, a log line, a card or a
screen goes through here.
"""

import re

_REPLACEMENT = "\ufffd"
# Join and part letters of Persian or Hindi and the pictures of emoji, and steer no terminal: ZWNJ, ZWJ, LRM, RLM.
_HARMLESS = "\u200c\u200d\u200e\u200f"
_LINE_ENDS = re.compile(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
# What Markdown reads within a line. An underscore between letters is none of it, and names have many.
_MARKUP = re.compile(r"[\\`*\[\]<>&|~$]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.")
_AS_ENTITY = frozenset("<>&|:.")  # a backslash does not keep these from being HTML, a table's column or a link


def printable(text: str) -> str:
    """Return the text on one line: other white space as spaces, all that shows no letter as U+FFFD."""
    return text if text.isprintable() else "".join(_shown(letter) for letter in text)


def printable_lines(text: str) -> str:
    """Return the text with its lines, each of them printable."""
    return "\n".join(printable(line) for line in _LINE_ENDS.split(text))


def markdown(text: str) -> str:
    """Return the text as Markdown, within a line, that shows its letters alone: no link, table column or HTML of it."""
    return _MARKUP.sub(_as_letter, printable(text))


def markdown_code(text: str) -> str:
    """Return the text as a code span, outside tables."""
    shown = printable(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{fence}{shown}{fence}" if len(fence) == 1 else f"{fence} {shown} {fence}"


def _as_letter(found: re.Match[str]) -> str:
    return f"&#{ord(found[0])};" if found[0] in _AS_ENTITY else f"\\{found[0]}"


def _shown(letter: str) -> str:
    if letter.isprintable() or letter in _HARMLESS:
        return letter
    return " " if letter.isspace() else _REPLACEMENT
