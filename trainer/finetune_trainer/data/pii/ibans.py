"""Bank accounts (IBAN), by the form of their country and their check digits; in one piece, or in groups."""

from collections.abc import Iterator

from stdnum import iban

from finetune_api.pii import PiiType
from finetune_trainer.data.pii.recogniser import Recogniser, Regions
from finetune_trainer.data.pii.subject import Span, Subject, compiled

_ACCOUNT = compiled(r"\b[A-Za-z]{2}\d\d(?:[ -]?[A-Za-z0-9]){11,30}")
_LEAST_CHARS = 15  # Norway's


def _found(subject: Subject, regions: Regions) -> Iterator[Span]:  # noqa: ARG001 (of the interface)
    for match in _ACCOUNT.finditer(subject.content):
        begin, end = match.span()
        for at in range(end, begin + _LEAST_CHARS - 1, -1):
            following = subject.content[at : at + 1]
            if following.isalnum() or not subject.content[at - 1 : at].isalnum():
                continue  # not the end of a group
            if iban.is_valid(subject.said(Span(begin, at)), check_country=False):
                yield Span(begin, at)
                break


IBAN = Recogniser(PiiType.IBAN, r"[A-Za-z]{2}\d\d[ -]?[A-Za-z0-9]{2}", _found)
