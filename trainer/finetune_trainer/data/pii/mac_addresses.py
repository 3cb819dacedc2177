"""Hardware addresses of network cards, in pairs by colons or hyphens, or in fours by dots."""

from collections.abc import Iterator

from finetune_api.pii import PiiType
from finetune_trainer.data.pii.recogniser import Recogniser, Regions
from finetune_trainer.data.pii.subject import Span, Subject, compiled

_X = "[0-9A-Fa-f]"
_FORMS = (rf"{_X}{{2}}(?::{_X}{{2}})+", rf"{_X}{{2}}(?:-{_X}{{2}})+", rf"{_X}{{4}}(?:\.{_X}{{4}})+")
_ADDRESS = compiled(rf"\b(?:{'|'.join(_FORMS)})\b")
_DIGITS = 12
_OF_NOBODY = (b"000000000000", b"ffffffffffff")


def _found(subject: Subject, regions: Regions) -> Iterator[Span]:  # noqa: ARG001 (of the interface)
    for match in _ADDRESS.finditer(subject.content):
        begin, end = match.span()
        digits = subject.content[begin:end].translate(None, b":-.").lower()
        before = subject.content[begin - 1 : begin] if begin else b""
        is_part = before in (b":", b"-", b".") or subject.content[end : end + 1] in (b":", b"-")
        if len(digits) == _DIGITS and digits not in _OF_NOBODY and not is_part:
            yield Span(begin, end)


MAC_ADDRESS = Recogniser(
    PiiType.MAC_ADDRESS, rf"(?:{_X}{{2}}[:-]){{5}}{_X}{{2}}|{_X}{{4}}\.{_X}{{4}}\.{_X}{{4}}", _found
)
