"""Find personal data and secrets in a text: which families may have something there, what they find, what overlaps."""

from bisect import bisect_left
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import re2

from finetune_api.pii import PiiType
from finetune_trainer.data.pii.api_keys import API_KEY
from finetune_trainer.data.pii.births import DATE_OF_BIRTH
from finetune_trainer.data.pii.cards import CARD
from finetune_trainer.data.pii.coordinates import COORDINATES
from finetune_trainer.data.pii.emails import EMAIL
from finetune_trainer.data.pii.ibans import IBAN
from finetune_trainer.data.pii.ip_addresses import IP_ADDRESS
from finetune_trainer.data.pii.mac_addresses import MAC_ADDRESS
from finetune_trainer.data.pii.national_ids import NATIONAL_ID
from finetune_trainer.data.pii.phones import PHONE
from finetune_trainer.data.pii.private_keys import PRIVATE_KEY
from finetune_trainer.data.pii.recogniser import EVERYWHERE, Recogniser, Regions
from finetune_trainer.data.pii.subject import Span, Subject, gated
from finetune_trainer.data.pii.urls import URL_CREDENTIALS

_ALL = (
    PRIVATE_KEY,
    URL_CREDENTIALS,
    API_KEY,
    EMAIL,
    IBAN,
    CARD,
    MAC_ADDRESS,
    IP_ADDRESS,
    COORDINATES,
    DATE_OF_BIRTH,
    NATIONAL_ID,
    PHONE,
)
RECOGNISERS: dict[PiiType, Recogniser] = {each.type: each for each in _ALL}
_ORDER = {type_: at for at, type_ in enumerate(PiiType)}
_GATE_BYTES = 64 * 2**20  # of memory that the gate may take for its states


class Found(NamedTuple):
    """A value in a text, by its characters; value: its plain form, with digits of all scripts as 0 to 9."""

    type: PiiType
    begin: int
    end: int
    value: str


class _Typed(NamedTuple):
    type: PiiType
    span: Span


@cache
def _gate() -> Any:
    """Return all triggers as one set, which tells in one pass over a text which of them are in it."""
    options = re2.Options()
    options.max_mem = _GATE_BYTES
    gate = re2.Set.SearchSet(options)
    for recogniser in _ALL:
        gate.Add(recogniser.trigger)
    gate.Compile()
    return gate


def find(text: str, regions: Regions = EVERYWHERE, field: str = "") -> list[Found]:
    """Return what is found in a text, in order, no two at one place: of those that overlap the longest, then by type.

    regions: the countries whose telephone numbers without a country code, and whose national numbers, are told;
    field: the name of the field that the text is of, where that may say what it holds, as `phone` does."""
    said = f"{field}: " if field else ""
    triggered = _gate().Match(gated(said + text))
    if triggered is None:
        return []
    subject = Subject(said + text)
    spans = [_Typed(_ALL[at].type, span) for at in triggered for span in _ALL[at].find(subject, regions)]
    apart = _apart(list(_joined(spans)))
    found: list[Found] = []
    for (type_, span), (begin, end) in zip(apart, subject.in_text(each.span for each in apart), strict=True):
        if begin >= len(said):
            found.append(Found(type_, begin - len(said), end - len(said), subject.said(span)))
    return found


def _joined(spans: list[_Typed]) -> Iterator[_Typed]:
    """Yield the parts of the text that are of one type: where two of a type overlap, the end of one must not stay."""
    last: _Typed | None = None
    for each in sorted(spans, key=lambda each: (_ORDER[each.type], each.span)):
        if last is not None and last.type is each.type and each.span.begin < last.span.end:
            last = _Typed(last.type, Span(last.span.begin, max(last.span.end, each.span.end)))
            continue
        if last is not None:
            yield last
        last = each
    if last is not None:
        yield last


def _apart(spans: list[_Typed]) -> list[_Typed]:
    """Return those that stay where some overlap, in the order of the text."""
    spans.sort(key=lambda each: (each.span.begin - each.span.end, _ORDER[each.type], each.span.begin))
    taken: list[_Typed] = []
    begins: list[int] = []
    for each in spans:
        at = bisect_left(begins, each.span.begin)
        is_free_before = at == 0 or taken[at - 1].span.end <= each.span.begin
        if is_free_before and (at == len(taken) or each.span.end <= taken[at].span.begin):
            taken.insert(at, each)
            begins.insert(at, each.span.begin)
    return taken
