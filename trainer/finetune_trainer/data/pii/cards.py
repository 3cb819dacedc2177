"""Payment cards, by issuer, length and check digit, in one piece or in the groups that stand on a card."""

import re
from collections.abc import Iterator

from stdnum import luhn

from finetune_api.pii import PiiType
from finetune_trainer.data.pii.recogniser import Recogniser, Regions
from finetune_trainer.data.pii.subject import Span, Subject, compiled

_DIGITS = compiled(r"\b\d(?:[ .-]?\d){11,}\b")
_GROUP = re.compile(r"\d+")
_MOST_GROUPS = 5
_ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})"  # Visa
    r"|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"  # Mastercard
    r"|3[47]\d{13}"  # American Express
    r"|3(?:0[0-5]|[689]\d)\d{11}"  # Diners Club
    r"|(?:6011|65\d\d|64[4-9]\d)\d{12}"  # Discover
    r"|62\d{14,17}"  # UnionPay
    r"|(?:35\d{14}|(?:2131|1800)\d{11})"  # JCB
    r"|(?:0604|5018|5020|5038|5[678]\d\d|6304|6390|6703|6759|676[1-3])\d{8,15}"  # Maestro
    r"|(?:60|81|82|508)\d{13,14}"  # RuPay
)
_OF_ANOTHER = re.compile(r"(?:order|invoice|tracking|parcel|ticket|serial|isbn|imei|sku|batch)\b\W*(?:\w+\W+){0,2}\Z")


def _found(subject: Subject, regions: Regions) -> Iterator[Span]:  # noqa: ARG001 (of the interface)
    for match in _DIGITS.finditer(subject.content):
        begin, end = match.span()
        is_decimal = subject.content[max(0, begin - 3) : begin] in (b" 0,", b"\n0,", b"0,")
        is_inside = is_decimal or (begin > 0 and subject.content[begin - 1 : begin] in (b".", b"+", b"#", b"_", b"-"))
        after = subject.content[end : end + 2]
        if is_inside or after[:1] == b"_" or (after[:1] == b"." and after[1:].isdigit()):
            continue
        groups = [
            Span(begin + each.start(), begin + each.end()) for each in _GROUP.finditer(subject.said(Span(begin, end)))
        ]
        first = 0
        while first < len(groups):
            found = _longest(subject, groups[first : first + _MOST_GROUPS])
            if (
                found
                and not _is_fraction(subject, groups, first, found)
                and not _OF_ANOTHER.search(subject.before(groups[first].begin))
            ):
                yield Span(groups[first].begin, groups[first + found - 1].end)
            first += found or 1


def _is_fraction(subject: Subject, groups: list[Span], first: int, count: int) -> bool:
    """Whether groups stand before or behind the point of a decimal number."""
    begin, end = groups[first].begin, groups[first + count - 1].end
    is_behind = first > 0 and subject.content[begin - 1 : begin] == b"."
    is_before = subject.content[end : end + 1] == b"." and subject.content[end + 1 : end + 2].isdigit()
    return is_behind or is_before


def _longest(subject: Subject, groups: list[Span]) -> int:
    """Return how many of the groups are a card, the most that can be; 0 for none."""
    for count in range(len(groups), 0, -1):
        digits = "".join(subject.said(each) for each in groups[:count])
        if _is_shape([each.end - each.begin for each in groups[:count]]) and _is_card(digits):
            return count
    return 0


def _is_card(digits: str) -> bool:
    return _ISSUERS.fullmatch(digits) is not None and luhn.is_valid(digits)


def _is_shape(sizes: list[int]) -> bool:
    return len(sizes) == 1 or (sizes[0] == 4 and all(4 <= each <= 6 for each in sizes[1:-1]) and sizes[-1] <= 7)


CARD = Recogniser(PiiType.CARD, r"\d(?:[ .-]?\d){11}", _found)
