"""Dates of birth: dates behind a word that says so, in nine languages. Other dates are nobody's."""

from collections.abc import Iterator
from itertools import chain

from finetune_api.pii import PiiType
from finetune_trainer.data.pii.recogniser import Recogniser, Regions
from finetune_trainer.data.pii.subject import Span, Subject, compiled

_CUE = (
    r"(?:\bborn\b|birth|\bd\.?o\.?b\b|geboren|geburt|\bgeb\.|naissance|\bnée?\b|nacid|nacimiento|nascit|"
    r"\bnat[oa] (?:il|a\b)|nascid|geboorte|urodz|\bur\.|född|fødselsdato|född(?:elsedatum)?|\bbday\b)"
)
_MONTHS = (
    r"(?:jan|feb|m[aä]r|apr|ma[iyjg]|jun|jul|aug|sep|o[ck]t|nov|de[cz]|"
    r"f[ée]v|avr|juin|juil|ao[uû]|déc|ene|abr|ago|dic|gen|mag|giu|lug|set|ott|mrt|mei|"
    r"sty|lut|kwi|maj|cze|lip|sie|wrz|paź|lis|gru|out|dez)\p{L}*\.?"
)
_DATES = (
    r"\d{4}[-./]\d{1,2}[-./]\d{1,2}",
    r"\d{1,2}[-./ ]{1,2}\d{1,2}[-./ ]{1,2}(?:\d{4}|\d{2}\b)",
    rf"\d{{1,2}}(?:st|nd|rd|th|er|\.|º)?[ -](?:of |de |di )?{_MONTHS},?[ -](?:de |del )?\d{{4}}",
    rf"{_MONTHS} \d{{1,2}}(?:st|nd|rd|th)?,? \d{{4}}",
)
_DATE = f"({'|'.join(_DATES)})"
_BORN = (compiled(rf"(?i){_CUE}[^\d\n]{{0,40}}?{_DATE}"), compiled(rf"(?i)\b{_DATE}[^\d\n]{{1,10}}?{_CUE}"))
_YEARS = range(1890, 2100)


def _found(subject: Subject, regions: Regions) -> Iterator[Span]:  # noqa: ARG001 (of the interface)
    for match in chain.from_iterable(pattern.finditer(subject.content) for pattern in _BORN):
        begin, end = match.span(1)
        numbers = [
            int(each) for each in "".join(c if c.isdigit() else " " for c in subject.said(Span(begin, end))).split()
        ]
        if subject.content[end : end + 1].isdigit() or not numbers:
            continue
        year = max(numbers, key=lambda each: (each > 31, each))
        if year in _YEARS or (len(numbers) == 3 and year < 100):
            yield Span(begin, end)


DATE_OF_BIRTH = Recogniser(PiiType.DATE_OF_BIRTH, rf"(?i){_CUE}", _found)
