"""Places on earth: degrees, minutes and seconds, or decimal degrees where something says that they are a place."""

import re
from collections.abc import Iterator

from finetune_api.pii import PiiType
from finetune_trainer.data.pii.recogniser import Recogniser, Regions
from finetune_trainer.data.pii.subject import Span, Subject, compiled

_DEGREES = (
    r"""\d{1,3}\s?°\s?\d{1,2}(?:\.\d+)?\s?['\x{2032}\x{2019}](?:\s?\d{1,2}(?:\.\d+)?\s?(?:["\x{2033}\x{201D}]|''))?"""
)
_SEXAGESIMAL = compiled(rf"\b{_DEGREES}\s?[NSns]\b[,;/]?\s{{0,3}}{_DEGREES}\s?[EWOewo]\b")
_DECIMAL = r"[+-]?\d{1,3}\.\d{3,}"
_WITH_LETTERS = compiled(r"\b\d{1,2}\.\d{3,}\s?°?\s?[NS]\b[,;/]?\s{0,3}\d{1,3}\.\d{3,}\s?°?\s?[EWO]\b")
_PAIR = compiled(rf"({_DECIMAL})\s?°?(?:,\s{{0,2}}|;\s{{0,2}}|\s/\s|/|\s)({_DECIMAL})")
_NAMED = compiled(
    rf"""(?i)\blat(?:itude)?["']?\s?[:=]?\s?["']?({_DECIMAL})["']?[,;&\s]{{0,24}}"""
    rf"""["']?(?:lon|lng|long|longitude)["']?\s?[:=]?\s?["']?({_DECIMAL})"""
)
_CUE = re.compile(
    r"(?:\bgps\b|\blat|\blo?ng?\b|\bgeo|coord|koordinat|posi[tz]ion|location|located|standort|ubicaci|posición|@)"
)
_BEHIND = 16  # bytes behind a pair in which a word may say so
_LEAST_DECIMALS = 4  # of a pair that nothing but a word before it calls a place
_MOST_LATITUDE, _MOST_LONGITUDE = 90.0, 180.0


def _found(subject: Subject, regions: Regions) -> Iterator[Span]:  # noqa: ARG001 (of the interface)
    for pattern in (_SEXAGESIMAL, _WITH_LETTERS):
        yield from (Span(*match.span()) for match in pattern.finditer(subject.content))
    for match in _NAMED.finditer(subject.content):
        if _is_place(subject, Span(*match.span(1)), Span(*match.span(2))):
            yield Span(*match.span(1))
            yield Span(*match.span(2))
    for match in _PAIR.finditer(subject.content):
        begin, end = match.span()
        decimals = min(len(match.group(at).partition(b".")[2]) for at in (1, 2))
        is_listed = _follows_number(subject, begin) or subject.content[end : end + 1].isalnum()
        is_said = _CUE.search(subject.before(begin)) or _CUE.search(subject.after(end, _BEHIND))
        if is_listed or decimals < _LEAST_DECIMALS or not is_said:
            continue
        if _is_place(subject, Span(*match.span(1)), Span(*match.span(2))):
            yield Span(begin, end)


def _follows_number(subject: Subject, begin: int) -> bool:
    """Whether the value is one of a list of numbers, or the end of a longer one."""
    return re.search(r"[\d.][\s,;]{0,2}\Z", subject.before(begin, 4)) is not None


def _is_place(subject: Subject, one: Span, other: Span) -> bool:
    """Whether the numbers are a place, in either order: maps say the latitude first, GeoJSON the longitude."""
    low, high = sorted(abs(float(subject.said(each))) for each in (one, other))
    return low <= _MOST_LATITUDE and high <= _MOST_LONGITUDE


COORDINATES = Recogniser(
    PiiType.COORDINATES,
    r"""\d\.\d{3,}\s?°?\s?[NSns]?["',;/&\s]|\d\s?°\s?\d{1,2}(?:\.\d+)?\s?['\x{2032}\x{2019}]""",
    _found,
)
