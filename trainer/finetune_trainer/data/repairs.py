"""Put damaged characters of a text right: what a wrong encoding made, control characters, line ends, Unicode form.

In code only line ends and a byte order mark are looked at: there the other characters may be meant, as in a table of
them. What is no character at all, half of a surrogate pair, does not come here: its row is broken.
"""

import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

import re2
from ftfy import TextFixerConfig, fix_encoding
from ftfy.chardata import UTF8_CLUES

from finetune_trainer.data.problems import Change
from finetune_trainer.data.prose import parts

# Kept are tab, line feed and form feed, and ESC, with which the colours of a terminal begin.
_CONTROLS = bytes([*range(0x09), 0x0B, *range(0x0E, 0x1B), *range(0x1C, 0x20), 0x7F])
_SUSPECT_ASCII = _CONTROLS + b"\r"
_REPLACED = (
    dict.fromkeys((*_CONTROLS, *range(0x80, 0xA0)), "")
    | {0x0B: "\n"}  # the end of a line in a text processor
    | dict.fromkeys(range(0x1C, 0x20), " ")  # they separate fields
)
_LINE_ENDS = re.compile("\r\n?")
_OVERSTRUCK = re.compile("[^\n\x08]\x08")  # as manual pages write bold and underlined letters
_HIGH_CONTROLS = re.compile("[\x80-\x9f]")
# What ftfy may take for UTF-8 that was read as something else, or for Windows-1252. Lines without go past it.
_GARBLED = re2.compile(
    "[\x80-\x9f]|[{utf8_first_of_2}][{utf8_continuation}]|[{utf8_first_of_3}][{utf8_continuation}]{{2}}|"
    "[{utf8_first_of_4}][{utf8_continuation}]{{3}}".format(**UTF8_CLUES)
)
_MILD = TextFixerConfig(
    unescape_html=False,
    remove_terminal_escapes=False,
    replace_lossy_sequences=False,  # with characters that say that something is lost
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    fix_line_breaks=False,
    fix_surrogates=False,
    remove_control_chars=False,
    normalization=None,
    explain=False,
)


class Repaired(NamedTuple):
    """A text and what was done to it."""

    text: str
    changes: tuple[Change, ...]


def repaired(text: str) -> Repaired:
    """Return the text with what is damaged put right. One of which nothing would be left stays as it is."""
    if text.isascii() and not _has_any(text, _SUSPECT_ASCII):
        return Repaired(text, ())
    found, changes = text, list[Change]()
    for change, repair in _REPAIRS:
        before, found = found, repair(found)
        if found != before:
            changes.append(change)
    return Repaired(found, tuple(changes)) if found.strip() else Repaired(text, ())


def _has_any(text: str, characters: bytes) -> bool:
    data = text.encode()
    return len(data.translate(None, characters)) < len(data)


def _in_prose(text: str, repair: Callable[[str], str]) -> str:
    return "".join(each.text if each.is_code else repair(each.text) for each in parts(text))


def _without_mark(text: str) -> str:
    return text.removeprefix("\ufeff")


def _with_plain_line_ends(text: str) -> str:
    return _LINE_ENDS.sub("\n", text) if "\r" in text else text


def _read_as_written(text: str) -> str:
    """Return a text with what a wrong encoding made of its lines put right: each may have come another way."""
    if text.isascii() or not _GARBLED.search(text):
        return text
    return _in_prose(text, lambda part: "\n".join(map(_line_as_written, part.split("\n"))))


def _line_as_written(line: str) -> str:
    return fix_encoding(line, _MILD) if _GARBLED.search(line) else line


def _without_controls(text: str) -> str:
    if not _has_any(text, _CONTROLS) and (text.isascii() or not _HIGH_CONTROLS.search(text)):
        return text
    return _in_prose(text, lambda part: _OVERSTRUCK.sub("", part).translate(_REPLACED))


def _composed(text: str) -> str:
    if unicodedata.is_normalized("NFC", text):
        return text
    return _in_prose(text, lambda part: unicodedata.normalize("NFC", part))


_REPAIRS = (
    (Change.BYTE_ORDER_MARK, _without_mark),
    (Change.LINE_ENDS, _with_plain_line_ends),
    (Change.MOJIBAKE, _read_as_written),  # before some of its characters are taken for control characters
    (Change.CONTROL_CHARACTERS, _without_controls),
    (Change.UNICODE_FORM, _composed),
)
