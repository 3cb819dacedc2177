"""E-mail addresses, also with letters beyond ASCII, in URLs (`%40`), and with `(at)` in the place of `@`."""

import re
from collections.abc import Iterator

from finetune_api.pii import PiiType
from finetune_trainer.data.pii.recogniser import Recogniser, Regions
from finetune_trainer.data.pii.subject import Span, Subject, compiled

_LETTER = r"\p{Latin}\p{Greek}\p{Cyrillic}\p{N}"
_LOCAL = rf"[{_LETTER}_][{_LETTER}._+'~-]*"
_ADDRESS = compiled(
    rf"{_LOCAL}(?:@|%40)[{_LETTER}-]+(?:\.[{_LETTER}-]+)+"
    rf"|(?i:{_LOCAL}\s?[(\[{{]\s?at\s?[)\]}}]\s?[{_LETTER}-]+"
    rf"(?:(?:\.|\s?[(\[{{]\s?(?:dot|punkt|point)\s?[)\]}}]\s?)[{_LETTER}-]+)+)"
)
_LAST_LABEL = re.compile(r"(?:[^\W\d_]{2,}|xn--[a-z0-9-]+)\Z", re.IGNORECASE)
_PARTS = re.compile(r"\.|\s?[(\[{]\s?(?:dot|punkt|point)\s?[)\]}]\s?", re.IGNORECASE)
_FILES = frozenset(
    ("png", "jpg", "jpeg", "gif", "svg", "webp", "ico", "bmp", "css", "js", "ts", "py", "html", "htm", "json", "pdf")
)


def _found(subject: Subject, regions: Regions) -> Iterator[Span]:  # noqa: ARG001 (of the interface)
    for match in _ADDRESS.finditer(subject.content):
        begin, end = match.span()
        while subject.content[end - 1 : end] == b"-":
            end -= 1
        last = _PARTS.split(subject.said(Span(begin, end)))[-1]
        if _LAST_LABEL.match(last) and last.lower() not in _FILES:
            yield Span(begin, end)


EMAIL = Recogniser(PiiType.EMAIL, r"(?i:[^\s@\"'(<>\[{,;:]@[^\s@]|%40|[(\[{]\s?at\s?[)\]}])", _found)
