"""E-mail addresses, also with letters beyond ASCII, at an IP address, and with `(at)` for `@`."""

import re
from collections.abc import Iterator

from finetune_api.pii import PiiType
from finetune_trainer.data.pii.recogniser import Recogniser, Regions
from finetune_trainer.data.pii.subject import Span, Subject, compiled

_LETTER = r"\p{Latin}\p{Greek}\p{Cyrillic}\p{N}"
_LOCAL = rf"[{_LETTER}_][{_LETTER}._+'~-]*"
_ADDRESS = compiled(
    rf"{_LOCAL}@[{_LETTER}-]+(?:\.[{_LETTER}-]+)+"
    rf"|(?i:{_LOCAL}\s?[(\[{{]\s?at\s?[)\]}}]\s?[{_LETTER}-]+"
    rf"(?:(?:\.|\s?[(\[{{]\s?(?:dot|punkt|point|\.)\s?[)\]}}]\s?)[{_LETTER}-]+)+)"
)
_AT_IP = compiled(rf"{_LOCAL}@(?:\[\d{{1,3}}(?:\.\d{{1,3}}){{3}}\]|\d{{1,3}}(?:\.\d{{1,3}}){{3}}\b)")
# As lists of mail write them: in brackets, or with both signs as words.
_SPELT = (
    compiled(rf"[(<]({_LOCAL} at [{_LETTER}-]+(?:\.[{_LETTER}-]+)+)[)>]"),
    compiled(rf"(?i)\b({_LOCAL} at [{_LETTER}-]+(?: dot [{_LETTER}-]+)+)\b"),
)
_SMALL = 32  # four numbers below it are the version of a package
_LAST_LABEL = re.compile(r"(?:[^\W\d_]{2,}|xn--[a-z0-9-]+)\Z", re.IGNORECASE)
_PARTS = re.compile(r"\.| dot |\s?[(\[{]\s?(?:dot|punkt|point|\.)\s?[)\]}]\s?", re.IGNORECASE)
_FILES = frozenset(
    ("png", "jpg", "jpeg", "gif", "svg", "webp", "ico", "bmp", "css", "js", "ts", "py", "html", "htm", "json", "pdf")
)


def _found(subject: Subject, regions: Regions) -> Iterator[Span]:  # noqa: ARG001 (of the interface)
    for match in _ADDRESS.finditer(subject.content):
        begin, end = match.span()
        while subject.content[end - 1 : end] == b"-":
            end -= 1
        last = _last_label(subject, Span(begin, end))
        if _LAST_LABEL.match(last) and last.lower() not in _FILES:
            yield Span(begin, end)
    for span in (Span(*match.span()) for match in _AT_IP.finditer(subject.content)):
        octets = [int(each) for each in subject.said(span).rpartition("@")[2].strip("[]").split(".")]
        if _SMALL <= max(octets) < 256:
            yield span
    for span in (Span(*match.span(1)) for spelt in _SPELT for match in spelt.finditer(subject.content)):
        if _LAST_LABEL.match(_last_label(subject, span)):
            yield span


def _last_label(subject: Subject, address: Span) -> str:
    return _PARTS.split(subject.said(address))[-1]


_TRIGGER = r"(?i:[^\s@\"'(<>\[{,;:]@[^\s@]|[(\[{]\s?at\s?[)\]}]| at [^\s()<>]+\.[^\s()<>]+[)>]| at [^\s]+ dot )"
EMAIL = Recogniser(PiiType.EMAIL, _TRIGGER, _found)
