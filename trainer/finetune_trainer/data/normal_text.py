"""What is not told apart when rows are compared: Unicode form, line ends, and blanks where lines and texts end.

All else is: case, punctuation, and blanks within and before words, which say something in code and in tables.
"""

import unicodedata
from collections.abc import Mapping
from typing import Any, cast

_BLANKS = " \t"


def normal_text(text: str) -> str:
    """Return a text as it is compared: in NFC, with line feeds alone, without blanks at the ends of its lines and of
    itself."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)  # which looks first whether anything is to be done
    if any(f"{blank}\n" in text for blank in _BLANKS):
        text = "\n".join(line.rstrip(_BLANKS) for line in text.split("\n"))
    return text.strip()


def normalised(value: object) -> object:
    """Return a value of JSON with all its texts as they are compared; names of fields stay."""
    if isinstance(value, str):
        return normal_text(value)
    if isinstance(value, Mapping):
        return {name: normalised(each) for name, each in cast(Mapping[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [normalised(each) for each in cast(list[Any], value)]
    return value
