"""A text as recognisers read it: digits of all scripts as 0 to 9, one kind of space and hyphen, nothing invisible.

What JSON, HTML or a URL write as an escape, such as `\\u0040`, `&#64;` or `%40`, is read as the character that it
stands for."""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import re2

Pattern = Any  # of re2, which has no types

_CONTEXT_BYTES = 48  # before a value, in which a word may say what it is
_INVISIBLE = (0x00AD, 0x180E, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF)
_SPACES = (0x00A0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000)
_HYPHENS = (*range(0x2010, 0x2014), 0x2212, 0xFE58, 0xFE63)
_FULL_WIDTH = range(0xFF01, 0xFF5F)  # the letters, digits and signs of ASCII, for use among Chinese ones
_LAST_DIGITS = 0x20000  # no digit lies behind
_REMOVED = "\x7f"  # stands for what is taken out
_IS_OTHERWISE = re.compile(
    r"""\\+(?:u([0-9A-Fa-f]{4})|([nrt/"']))|\x7f+|%(40|2[0Bb])|&#(?:[xX]([0-9A-Fa-f]{2})|([0-9]{2,3}));"""
)
_OF_WEB = re.compile(r"%(?:40|2[0Bb])|&#")  # how escapes begin that triggers would not see
_ESCAPED = {"n": "\n", "r": "\n", "t": "\t"}


def compiled(pattern: str) -> Pattern:
    """Return a pattern for the UTF-8 of a text, which takes time in proportion to it. No look-around, no \\1."""
    options = re2.Options()
    options.log_errors = False
    return re2.compile(pattern, options)


def _table() -> dict[int, str]:
    digits = (code for code in range(0x80, _LAST_DIGITS) if unicodedata.category(chr(code)) == "Nd")
    return (
        {code: str(unicodedata.decimal(chr(code))) for code in digits}
        | {code: chr(code - 0xFEE0) for code in _FULL_WIDTH}
        | dict.fromkeys(_SPACES, " ")
        | dict.fromkeys(_HYPHENS, "-")
        | dict.fromkeys(_INVISIBLE, _REMOVED)
    )


def _any_of(codes: Iterable[int]) -> Pattern:
    return compiled("[" + "".join(f"\\x{{{code:X}}}" for code in sorted(codes)) + "]")


_PLAIN = _table()
_PLAIN_OF = {chr(code): plain for code, plain in _PLAIN.items()}
_DISGUISE = _any_of(_PLAIN)


class Span(NamedTuple):
    """A part of a text, in characters, or of a subject's content, in bytes."""

    begin: int
    end: int


class Subject:
    """A text in its plain form, as UTF-8: `content`, whose places recognisers speak of."""

    __slots__ = ("_pieces", "_plain", "content")

    def __init__(self, text: str) -> None:
        self._plain = _translated(text)
        self._pieces: _Pieces | None = None  # where the plain form has other characters than the text
        if _IS_OTHERWISE.search(self._plain) is not None:
            self._pieces = _Pieces(self._plain)
            self._plain = self._pieces.plain
        self.content = self._plain.encode()

    def in_text(self, spans: Iterable[Span]) -> Iterator[Span]:
        """Yield the characters of the text at which parts of the content lie. spans: in order, none over another."""
        at = characters = 0
        for span in spans:
            characters += len(self.content[at : span.begin].decode(errors="ignore"))
            begin, characters = characters, characters + len(self.said(span))
            end, at = characters, span.end
            if self._pieces is not None:
                begin, end = self._pieces.source(begin).begin, self._pieces.source(end - 1).end
            yield Span(begin, end)

    def before(self, begin: int, size: int = _CONTEXT_BYTES) -> str:
        """Return what stands before a place, in small letters."""
        return self.content[max(0, begin - size) : begin].decode(errors="ignore").lower()

    def after(self, end: int, size: int = _CONTEXT_BYTES) -> str:
        """Return what stands behind a place, in small letters."""
        return self.content[end : end + size].decode(errors="ignore").lower()

    def said(self, span: Span) -> str:
        """Return the plain form of a part."""
        return self.content[span.begin : span.end].decode(errors="ignore")


def gated(text: str) -> bytes:
    """Return what triggers are looked for in: the content of the text's subject, but that simple escapes may be left.

    No trigger asks what stands before it, so that those of the content are among those of this."""
    plain = _translated(text)
    is_escaped = "\\u" in plain or _REMOVED in plain or (("%" in plain or "&#" in plain) and _OF_WEB.search(plain))
    return Subject(text).content if is_escaped else plain.encode()


def _translated(text: str) -> str:
    if text.isascii() or _DISGUISE.search(text.encode()) is None:
        return text
    for disguised in _PLAIN_OF.keys() & set(text):  # a few kinds at most: five times as fast as str.translate
        text = text.replace(disguised, _PLAIN_OF[disguised])
    return text


class _Pieces:
    """A text of which some parts are read as one character each, and others as none."""

    def __init__(self, text: str) -> None:
        parts: list[str] = []
        self._begins: list[int] = []  # of pieces, in the plain form
        self._sources: list[int] = []  # where each begins in the text
        self._escapes: dict[int, int] = {}  # by the place in the plain form, where an escape ends in the text
        size = at = 0

        def piece(begin: int, end: int) -> None:
            nonlocal size
            self._begins.append(size)
            self._sources.append(begin)
            parts.append(text[begin:end])
            size += end - begin

        for match in _IS_OTHERWISE.finditer(text):
            piece(at, match.start())
            at = match.end()
            meant = _meant(match)
            if meant:
                self._begins.append(size)
                self._sources.append(match.start())
                self._escapes[size] = at
                parts.append(meant)
                size += 1
        piece(at, len(text))
        self.plain = "".join(parts)

    def source(self, at: int) -> Span:
        """Return the part of the text that one character of the plain form stands for."""
        if at in self._escapes:
            return Span(self._sources[bisect_right(self._begins, at) - 1], self._escapes[at])
        piece = bisect_right(self._begins, at) - 1
        begin = self._sources[piece] + at - self._begins[piece]
        return Span(begin, begin + 1)


def _meant(escape: re.Match[str]) -> str:
    """Return the character that an escape stands for; none for what nobody sees."""
    code, sign, of_url, of_html, decimal = escape.groups()
    if sign is not None:
        return _ESCAPED.get(sign, sign)
    hexadecimal = code or of_url or of_html
    if hexadecimal is None and decimal is None:
        return ""
    meant = chr(int(hexadecimal, 16) if hexadecimal else int(decimal))
    plain = _PLAIN.get(ord(meant), meant)
    return " " if plain in ("", _REMOVED) or "\ud800" <= plain <= "\udfff" else plain
