"""Hardware addresses of network cards, in pairs, in fours by dots, or in one piece where a word says so."""

import re
from collections.abc import Iterator

from finetune_api.pii import PiiType
from finetune_trainer.data.pii.recogniser import Recogniser, Regions
from finetune_trainer.data.pii.subject import Span, Subject, compiled

_X = "[0-9A-Fa-f]"
_FORMS = (rf"{_X}{{2}}(?::{_X}{{2}})+", rf"{_X}{{2}}(?:-{_X}{{2}})+", rf"{_X}{{4}}(?:\.{_X}{{4}})+")
_ADDRESS = compiled(rf"\b(?:{'|'.join(_FORMS)})\b")
_IN_ONE = r"""(?i:\bmac(?:[ _-]?addr(?:ess)?)?["']?\s?[:=]?\s?["']?)"""
_NAMED = compiled(rf"{_IN_ONE}({_X}{{12}})\b")
_DIGITS = (12, 16)  # of EUI-48 and EUI-64
_CUE = re.compile(r"\bmac\b|ether|\bhw|hardware|physical|bssid|wi-?fi|\bnic\b|lladdr")  # before one without a letter
_OF_NOBODY = (b"000000000000", b"ffffffffffff")


def _found(subject: Subject, regions: Regions) -> Iterator[Span]:  # noqa: ARG001 (of the interface)
    for match in _ADDRESS.finditer(subject.content):
        begin, end = match.span()
        digits = subject.content[begin:end].translate(None, b":-.").lower()
        before = subject.content[begin - 1 : begin] if begin else b""
        is_part = before in (b":", b"-", b".") or subject.content[end : end + 1] in (b":", b"-")
        is_sure = not digits.isdigit() or subject.content[begin + 2 : begin + 3] == b":"
        if len(digits) not in _DIGITS or digits in _OF_NOBODY or is_part:
            continue
        if is_sure or _CUE.search(subject.before(begin)):
            yield Span(begin, end)
    yield from (Span(*match.span(1)) for match in _NAMED.finditer(subject.content))


MAC_ADDRESS = Recogniser(
    PiiType.MAC_ADDRESS,
    rf"(?:{_X}{{2}}[:-]){{5}}{_X}{{2}}|{_X}{{4}}\.{_X}{{4}}\.{_X}{{4}}|(?i:mac)[^\n]{{0,10}}{_X}{{12}}",
    _found,
)
