"""Public addresses of IPv4 and IPv6. What looks like one and is a version, a time or a private address is none."""

import re
from collections.abc import Iterator
from ipaddress import AddressValueError, IPv4Address, IPv6Address

from finetune_api.pii import PiiType
from finetune_trainer.data.pii.recogniser import Recogniser, Regions
from finetune_trainer.data.pii.subject import Span, Subject, compiled

_V4 = r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}"
_ADDRESS = compiled(rf"\b{_V4}\b|::[fF]{{4}}:{_V4}\b|[0-9A-Fa-f:]*:[0-9A-Fa-f]{{0,4}}:[0-9A-Fa-f:]*(?:{_V4})?")
_IS_VERSION = re.compile(
    r"(?:\b(?:versions?|ver|v|release|rel|build|firmware|kernel|driver|chapter|section|clause|paragraph|kapitel|"
    r"abschnitt|schema|oid)|§+)\W{0,3}\Z"
)
_IS_ADDRESS = re.compile(
    r"\b(?:ip|ipv4|inet|addr|host|server|ping|from|client|gateway|dns|peer|remote|von|depuis|desde)"
)
_SMALL = 32  # four numbers below it are an address once in 4,000, and else a version
_UNICAST = range(0x2000, 0x4000)  # the first group of all IPv6 addresses that were given to anybody
_ALL_GROUPS = 7  # colons of an address that leaves nothing out


def _found(subject: Subject, regions: Regions) -> Iterator[Span]:  # noqa: ARG001 (of the interface)
    content = subject.content
    for match in _ADDRESS.finditer(content):
        begin, end = match.span()
        if b":" not in content[begin:end]:
            if _is_v4(subject, Span(begin, end)):
                yield Span(begin, end)
            continue
        while content[end - 1 : end] == b":" and content[end - 2 : end] != b"::":
            end -= 1
        before, after = content[begin - 1 : begin] if begin else b"", content[end : end + 1]
        is_part = before.isalnum() or after.isalnum() or before == b"_" or after == b"_"
        if not is_part and _is_v6(subject.said(Span(begin, end))):
            yield Span(begin, end)


def _is_v4(subject: Subject, span: Span) -> bool:
    content, (begin, end) = subject.content, span
    before, after = content[begin - 1 : begin] if begin else b"", content[end : end + 2]
    if before in (b".", b"-", b"_") or (after[:1] in (b".", b"-") and after[1:].isalnum()):
        return False
    try:
        is_public = IPv4Address(subject.said(span)).is_global
    except AddressValueError:
        return False
    if not is_public or _IS_VERSION.search(subject.before(begin, 16)):
        return False
    is_small = all(int(each) < _SMALL for each in subject.said(span).split("."))
    return not is_small or _IS_ADDRESS.search(subject.before(begin)) is not None


def _is_v6(said: str) -> bool:
    try:
        address = IPv6Address(said)
    except AddressValueError:
        return False
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_global
    is_hardware = all(len(each) == 2 for each in said.split(":"))  # EUI-64
    is_given = int(address) >> 112 in _UNICAST or (said.count(":") == _ALL_GROUPS and not is_hardware)
    return is_given and address.is_global


IP_ADDRESS = Recogniser(
    PiiType.IP_ADDRESS, r"\d\.\d{1,3}\.\d{1,3}\.\d|:[0-9A-Fa-f]{1,4}:|::[0-9A-Fa-f]|[0-9A-Fa-f]::", _found
)
