"""Telephone numbers: with the code of any country, or as they are dialled within one of the job's regions.

The plan of a country says which numbers there can be; how a number is written, and the words before it, say if it is
one: an order number has as many digits."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import phonenumbers
from phonenumbers import NumberParseException, ValidationResult

from finetune_api.pii import PiiType
from finetune_trainer.data.pii.recogniser import Recogniser, Regions
from finetune_trainer.data.pii.subject import Span, Subject, compiled

_RUN = compiled(
    r"(?:\(?\+ ?\(?|\(|\b)\d+\)?(?:[ .\-/]{0,3}\(?\d+\)?)*(?:\s?(?:x|#|ext\.?|extension|durchwahl|dw\.?)\s?\d{1,6}\b)?"
)
_WORD = re.compile(r"[^ ]+")
_EXTENSION = re.compile(r"\s?(?:x|#|ext\.?|extension|durchwahl|dw\.?)\s?\d{1,6}\Z")
_MOST_WORDS = 8  # of a number that is written in groups
_DIGITS = range(7, 16)
_CALLED = re.compile(
    r"(?:\btel|phone|\bfax|mobil|\bcell|\bcall|\bring\b|\bdial|whatsapp|signal|\bsms\b|\btext (?:me|us|him|her|them)\b|"
    r"hotline|handy|rufnummer|anruf|ruf\w* \w* ?an\b|erreich|portable|appel|joign|móvil|llam|cellular|chiam|numero di|"
    r"telef|bel\b|bellen|zadzwo|komórk|ring på|contact|reach \w+ (?:at|on|under)|number is|numéro)"
    r"(?:[^\d\n]{0,32}|[^\d\n]{0,8}:\s{0,4})\Z"
)
_NAMED_BEHIND = re.compile(r"\W{0,3}(?:cell|mobile|home|work|office|fax|tel|mobil|privat|portable|cellulare|móvil)\b")
_THINGS = (
    r"order|invoice|account|ticket|tracking|parcel|serial|isbn|issn|version|release|build|part|article|model|sku|"
    r"case|ref|reference|transaction|receipt|batch|policy|contract|patent|bestell\w*|rechnung\w*|auftrag\w*|kunden\w*|"
    r"commande|facture|pedido|factura|ordine|fattura|boundary"
)
_OF_ANOTHER = re.compile(
    rf"(?:(?:\b|_)(?:{_THINGS}|id|no|nr|number|nummer|nº|n°)|#)[^\w\n]{{0,3}}"
    r"(?:(?:no|nr|num|number|nummer|id|is|code)\b[^\w\n]{0,3}){0,2}\Z"
)
_NUMBERED = re.compile(rf"(?:\b|_)(?:{_THINGS})[ _-](?:no|nr|num|number|nummer)\b\W{{0,3}}(?:(?:is|ist)\W{{1,3}})?\Z")
_STATE = re.compile(r"\b[A-Z]{2}[ ]{1,3}\Z")
_ZIP = re.compile(r"\d{5}-\d{4}")
_VERSION = r"\d+(?:\.\d+){2,3}"
_VERSIONS = re.compile(rf"\(?{_VERSION}[ /]\(?{_VERSION}\)?|\d{{1,2}}\.\d\.\d+(?:\.\d+)*")
_COUNTED = ("01234567890123456789", "98765432109876543210")  # digits that nobody dials
_PAIRS = re.compile(r"\d\d(?: \d\d)+")
_PAIR = re.compile(r"\d\d")
_OF_A_HOST = re.compile(rb"\.[a-z]")  # behind it
_DATE = re.compile(
    r"\(?(?:(?:19|20)\d\d([-./])\d{1,2}\1\d{1,2}|\d{1,2}([-./])\d{1,2}\2(?:19|20)?\d\d|"
    r"(?:19|20)\d\d ?[-/] ?(?:19|20)\d\d)(?:\D.*)?",
    re.DOTALL,
)
_NUMBER = re.compile(r"\d+\.\d+|\d{1,3}(?:\.\d{1,3}){3}|\d{1,3}(?:[ .]\d{3})+")
_NANP = re.compile(r"(?:\+?1[-. ]{1,3})?(?:\([2-9]\d\d\)[-. ]{0,3}|[2-9]\d\d[-. ]{1,3})\d{3}[-. ]{1,3}\d{4}")
_NANP_REGIONS = frozenset(("US", "CA"))
_TRUNK = re.compile(r"\(?0[1-9]\d{0,5}(?:\)[-. /]{0,3}|[-. /]{1,3})\d[\d \-./()]*")
_BARE_TRUNK = re.compile(r"0[1-9]\d{8,9}")
_ABROAD = re.compile(r"\(?(?:\+|00(?=[1-9])|011(?=[-. ]?[1-9]))[\s(]*")


class _Written(NamedTuple):
    """How a number is written. is_called: whether a word beside it says that it is one."""

    text: str
    is_called: bool
    is_of_another: bool

    @property
    def has_groups(self) -> bool:
        return not self.text.lstrip("+").isdigit()


def _found(subject: Subject, regions: Regions) -> Iterator[Span]:
    for match in _RUN.finditer(subject.content):
        words = [
            Span(match.start() + each.start(), match.start() + each.end())
            for each in _WORD.finditer(subject.said(Span(*match.span())))
        ]
        first = taken = 0
        while first < len(words):
            if subject.said(words[first]) == "/":  # between two numbers
                first += 1
                continue
            is_behind_digits = first > 0 and not taken and subject.content[words[first].begin] not in b"+("
            taken = 0 if is_behind_digits else _longest(subject, words[first : first + _MOST_WORDS], regions)
            if taken:
                yield _bare(subject, Span(words[first].begin, words[first + taken - 1].end))
            first += taken or 1


def _longest(subject: Subject, words: list[Span], regions: Regions) -> int:
    """Return how many of the words are a number, the most that can be; 0 for none."""
    before = subject.content[words[0].begin - 1 : words[0].begin] if words[0].begin else b""
    begins_sure = subject.content[words[0].begin] in b"+("
    if before.isalnum() or before in (b"_", b"$") or (before in (b".", b"-", b"/") and not begins_sure):
        return 0
    said_before = subject.before(words[0].begin)
    if _is_minute(subject, words[0]) or (_NUMBERED.search(said_before) and not begins_sure):
        return 0
    is_of_another = _OF_ANOTHER.search(said_before) is not None
    called_before = _CALLED.search(said_before) is not None
    for count in range(len(words), 0, -1):
        begin, end = words[0].begin, words[count - 1].end
        text = _EXTENSION.sub("", subject.said(_bare(subject, Span(begin, end))))
        if (
            sum(map(str.isdigit, text)) not in _DIGITS
            or text.count("(") != text.count(")")
            or _is_cut(subject, words, count)
        ):
            continue
        is_called = called_before or _NAMED_BEHIND.match(subject.after(end, 16)) is not None
        if not is_called and _OF_A_HOST.match(subject.content[end : end + 2]):
            continue
        if (
            not is_called
            and _PAIRS.fullmatch(text)
            and count < len(words)
            and _PAIR.fullmatch(subject.said(words[count]))
        ):
            continue  # a list of such pairs
        if _ZIP.fullmatch(text) and _STATE.search(subject.said(Span(max(0, begin - 6), begin))):
            continue
        if _is_number(_Written(text, is_called, is_of_another and not is_called), regions):
            return count
    return 0


def _is_minute(subject: Subject, word: Span) -> bool:
    """Whether a word is the end of a time of the day."""
    content, begin = subject.content, word.begin
    return word.end - begin == 2 and content[begin - 1 : begin] == b":" and content[begin - 2 : begin - 1].isdigit()


def _is_cut(subject: Subject, words: list[Span], count: int) -> bool:
    """Whether the first words end within something else: a share, a name, a time of the day, the next number."""
    end = words[count - 1].end
    after = subject.content[end : end + 3]
    if after[:1] in (b"%", b"_") or (after[:1] == b":" and after[1:].isdigit() and len(after) == 3):
        return True
    slash = next((at for at in range(count) if subject.said(words[at]) == "/"), 0)
    return slash > 0 and sum(map(str.isdigit, subject.said(Span(words[0].begin, words[slash].begin)))) in _DIGITS


def _is_number(written: _Written, regions: Regions) -> bool:
    text = written.text
    digits = "".join(filter(str.isdigit, text))
    if _VERSIONS.fullmatch(text) or any(digits in counted for counted in _COUNTED):
        return False
    if written.is_of_another or _DATE.fullmatch(text) or (_NUMBER.fullmatch(text) and not written.is_called):
        return False
    abroad = _ABROAD.match(text)
    if abroad is not None:
        judged = _abroad("+" + text[abroad.end() :])
        if judged.is_valid or (judged.is_possible and "+" in abroad.group()):
            return written.is_called or written.has_groups or "+" in abroad.group()
        if "+" in abroad.group():
            return written.is_called
    is_american = _NANP.fullmatch(text) is not None
    is_formed = is_american or _TRUNK.fullmatch(text) is not None
    if not (written.is_called or is_formed or _BARE_TRUNK.fullmatch(text)):
        return False
    asked = regions & _NANP_REGIONS if is_american and not written.is_called else regions
    plans = [_plan(region) for region in sorted(asked)]
    if any(plan.has(digits) for plan in plans):
        return True
    if any(plan.may_have(digits) for plan in plans):
        return written.is_called or is_american or (is_formed and text.startswith("("))
    return written.is_called and written.has_groups and any(len(digits) in plan.local_lengths for plan in plans)


@dataclass(frozen=True)
class _Plan:
    """What a country's plan says of its numbers: their form and lengths without the prefix that is dialled before."""

    region: str
    prefix: str
    form: re.Pattern[str]
    lengths: frozenset[int]
    local_lengths: frozenset[int]

    def _significant(self, digits: str) -> tuple[str, str]:
        return digits, digits.removeprefix(self.prefix)

    def may_have(self, digits: str) -> bool:
        """Whether numbers are so long."""
        return any(len(each) in self.lengths for each in self._significant(digits))

    def has(self, digits: str) -> bool:
        """Whether the number may be somebody's, asked in full only where its form is right, as that takes time."""
        if not any(self.form.fullmatch(each) for each in self._significant(digits)):
            return False
        try:
            return phonenumbers.is_valid_number(phonenumbers.parse(digits, self.region))
        except NumberParseException:
            return False


@cache
def _plan(region: str) -> _Plan:
    plan = phonenumbers.PhoneMetadata.metadata_for_region(region)
    said = plan and plan.general_desc
    if plan is None or said is None:  # a country without telephones
        return _Plan(region, "", re.compile(r"(?!)"), frozenset(), frozenset())
    return _Plan(
        region,
        plan.national_prefix or "",
        re.compile(said.national_number_pattern or r"(?!)"),
        frozenset(said.possible_length),
        frozenset(said.possible_length_local_only),
    )


class _Judged(NamedTuple):
    """Whether a number with the code of a country has a right length, and whether it may be somebody's."""

    is_possible: bool
    is_valid: bool


def _abroad(text: str) -> _Judged:
    try:
        number = phonenumbers.parse(text, None)
    except NumberParseException:
        return _Judged(False, False)
    is_possible = phonenumbers.is_possible_number_with_reason(number) == ValidationResult.IS_POSSIBLE
    return _Judged(is_possible, phonenumbers.is_valid_number(number))


def _bare(subject: Subject, span: Span) -> Span:
    """Return a number without brackets around it that do not belong to a part of it."""
    begin, end = span
    said = subject.content[begin:end]
    if said.endswith(b")") and said.count(b")") > said.count(b"("):
        end -= 1
    elif said.startswith(b"(") and said.count(b"(") > said.count(b")"):
        begin += 1
    elif said.startswith(b"(") and said.endswith(b")") and said.count(b"(") == 1:
        begin, end = begin + 1, end - 1
    return Span(begin, end)


PHONE = Recogniser(PiiType.PHONE, r"\d(?:[ .\-/()]{0,4}\d){6}", _found)
