"""Numbers that states give to their people, by form and check digit, and where both are weak by a word before them."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import re2
from stdnum.au import tfn
from stdnum.be import nn
from stdnum.br import cpf
from stdnum.ca import sin
from stdnum.ch import ssn as ahv
from stdnum.cz import rc
from stdnum.de import idnr
from stdnum.dk import cpr
from stdnum.es import dni, nie
from stdnum.fi import hetu
from stdnum.fr import nir
from stdnum.gb import nhs
from stdnum.ie import pps
from stdnum.in_ import aadhaar, pan
from stdnum.it import codicefiscale
from stdnum.kr import rrn
from stdnum.mx import curp
from stdnum.nl import bsn
from stdnum.no import fodselsnummer
from stdnum.pl import pesel
from stdnum.pt import nif
from stdnum.ro import cnp
from stdnum.se import personnummer
from stdnum.tr import tckimlik
from stdnum.us import itin, ssn
from stdnum.za import idnr as za_idnr

from finetune_api.pii import PiiType
from finetune_trainer.data.pii.recogniser import Recogniser, Regions
from finetune_trainer.data.pii.subject import Span, Subject, compiled


class NationalId(NamedTuple):
    """One number of one country. cue: words before it, one of which must be there; none where the form says enough."""

    region: str
    name: str
    pattern: str  # of RE2
    is_valid: Callable[[str], bool]
    cue: str = ""


_RVNR_WEIGHTS = (2, 1, 2, 5, 7, 1, 2, 1, 2, 1, 2, 1)


def _is_rvnr(number: str) -> bool:
    """Whether the check digit of a German pension insurance number is right."""
    said = re.sub(r"\W", "", number).upper()
    digits = said[:8] + f"{ord(said[8]) - ord('A') + 1:02d}" + said[9:]
    products = (int(digit) * weight for digit, weight in zip(digits[:12], _RVNR_WEIGHTS, strict=True))
    return sum(sum(map(int, str(product))) for product in products) % 10 == int(digits[12])


_NOT_A_NINO = frozenset(("BG", "GB", "KN", "NK", "NT", "TN", "ZZ"))


def _is_nino(number: str) -> bool:
    return number[:2].upper() not in _NOT_A_NINO


_HEXADECIMAL = re.compile("[0-9A-F]+")


def _is_pan(number: str) -> bool:
    """Whether it is a PAN, and not the id of a message, which has no letter behind F."""
    return pan.is_valid(number) and not _HEXADECIMAL.fullmatch(number)


_S = "[ -]?"
_NINO = r"(?i:[a-ceghj-prstw-z][a-ceghj-nprstw-z] ?\d{2} ?\d{2} ?\d{2} ?[a-d])"
_CODICE = r"(?i:[a-z]{6}[0-9lmnp-v]{2}[abcdehlmprst][0-9lmnp-v]{2}[a-z][0-9lmnp-v]{3}[a-z])"
NATIONAL_IDS = (
    NationalId("AU", "tax file number", rf"\d{{3}}{_S}\d{{3}}{_S}\d{{3}}", tfn.is_valid, r"tfn|tax file"),
    NationalId("BE", "national number", r"\d{2}\.\d{2}\.\d{2}-\d{3}\.\d{2}", nn.is_valid),
    NationalId("BR", "CPF", r"\d{3}\.\d{3}\.\d{3}-\d{2}", cpf.is_valid),
    NationalId("BR", "CPF", r"\d{11}", cpf.is_valid, r"cpf"),
    NationalId("CA", "social insurance number", r"\d{3}[ -]\d{3}[ -]\d{3}", sin.is_valid, r"\bsin\b|social|\bnas\b"),
    NationalId("CH", "AHV number", r"756[.]?\d{4}[.]?\d{4}[.]?\d{2}", ahv.is_valid),
    NationalId("CZ", "birth number", r"\d{6}/\d{3,4}", rc.is_valid),
    NationalId("DE", "tax number", r"\d{2} ?\d{3} ?\d{3} ?\d{3}", idnr.is_valid, r"steuer|idnr|\btin\b|tax"),
    NationalId("DE", "pension insurance number", r"\d{2} ?\d{6} ?[A-Z] ?\d{3}", _is_rvnr),
    NationalId("DK", "CPR number", r"\d{6}-\d{4}", cpr.is_valid),
    NationalId("ES", "DNI", rf"\d{{8}}{_S}[A-HJ-NP-TV-Z]", dni.is_valid),
    NationalId("ES", "NIE", rf"[XYZ]{_S}\d{{7}}{_S}[A-HJ-NP-TV-Z]", nie.is_valid),
    NationalId("FI", "personal identity code", r"\d{6}[-+A-FU-Y]\d{3}[0-9A-Y]", hetu.is_valid),
    NationalId("FR", "NIR", r"[12] ?\d{2} ?\d{2} ?\d[\dAB] ?\d{3} ?\d{3}[ /-]?\d{2}", nir.is_valid),
    NationalId("GB", "national insurance number", _NINO, _is_nino),
    NationalId("GB", "NHS number", rf"\d{{3}}{_S}\d{{3}}{_S}\d{{4}}", nhs.is_valid, r"\bnhs\b"),
    NationalId("IE", "PPS number", r"\d{7}[A-W][ABHW]?", pps.is_valid),
    NationalId("IN", "Aadhaar", rf"[2-9]\d{{3}}{_S}\d{{4}}{_S}\d{{4}}", aadhaar.is_valid, r"aadhaar|aadhar|uidai"),
    NationalId("IN", "PAN", r"[A-Z]{3}[ABCFGHJLPT][A-Z]\d{4}[A-Z]", _is_pan),
    NationalId("IT", "codice fiscale", _CODICE, codicefiscale.is_valid),
    NationalId("KR", "resident registration number", r"\d{6}-[1-8]\d{6}", rrn.is_valid),
    NationalId("MX", "CURP", r"[A-Z]{4}\d{6}[HMX][A-Z]{5}[0-9A-Z]\d", curp.is_valid),
    NationalId("NL", "BSN", r"\d{4}[. ]?\d{2}[. ]?\d{2,3}|\d{9}", bsn.is_valid, r"bsn|burgerservice|sofi"),
    NationalId("NO", "birth number", r"\d{6} ?\d{5}", fodselsnummer.is_valid, r"fødsels|personnummer|fnr"),
    NationalId("PL", "PESEL", r"\d{11}", pesel.is_valid, r"pesel"),
    NationalId("PT", "NIF", r"\d{3} ?\d{3} ?\d{3}", nif.is_valid, r"\bnif\b|contribuinte"),
    NationalId("RO", "CNP", r"[1-9]\d{12}", cnp.is_valid, r"\bcnp\b|cod numeric"),
    NationalId("SE", "personal number", r"(?:19|20)?\d{6}[-+]\d{4}", personnummer.is_valid),
    NationalId("TR", "identity number", r"[1-9]\d{10}", tckimlik.is_valid, r"kimlik|\btckn?\b"),
    NationalId("US", "social security number", r"\d{3}-\d{2}-\d{4}", ssn.is_valid),
    NationalId("US", "social security number", r"\d{3} \d{2} \d{4}|\d{9}", ssn.is_valid, r"\bssn\b|social security"),
    NationalId("US", "taxpayer identification number", r"9\d{2}-\d{2}-\d{4}", itin.is_valid),
    NationalId("ZA", "identity number", r"\d{13}", za_idnr.is_valid, r"\bid\b|identity"),
)  # fmt: skip
COUNTRIES = tuple(sorted({each.region for each in NATIONAL_IDS}))
_PATTERNS = tuple(compiled(rf"\b(?:{each.pattern})\b") for each in NATIONAL_IDS)
_CUES = tuple(re.compile(each.cue) for each in NATIONAL_IDS)


def _set() -> Any:
    found = re2.Set.SearchSet()
    for each in NATIONAL_IDS:
        found.Add(rf"\b(?:{each.pattern})\b")
    found.Compile()
    return found


_EVERY = _set()


def _found(subject: Subject, regions: Regions) -> Iterator[Span]:
    for index in _EVERY.Match(subject.content) or ():
        each = NATIONAL_IDS[index]
        if each.region not in regions:
            continue
        for match in _PATTERNS[index].finditer(subject.content):
            begin, end = match.span()
            if _is_part(subject, Span(begin, end)) or not _CUES[index].search(subject.before(begin)):
                continue
            if each.is_valid(subject.said(Span(begin, end))):
                yield Span(begin, end)


def _is_part(subject: Subject, span: Span) -> bool:
    """Whether it is a piece of something longer, such as a decimal, a path or a number in groups."""
    before = subject.content[span.begin - 1 : span.begin] if span.begin else b""
    after = subject.content[span.end : span.end + 2]
    return before in (b".", b"-", b"+", b"/") or (after[:1] in (b".", b"-", b"/") and after[1:].isdigit())


_TRIGGER = (  # six digits, or the letters and digits of numbers with fewer in a row
    r"\d(?:[ ./-]?\d){5}|[A-Z]{5}\d{4}[A-Z]|(?i:[a-z]{6}[0-9lmnp-v]{2}[abcdehlmprst][0-9lmnp-v]{2}[a-z][0-9lmnp-v]{3})"
)
NATIONAL_ID = Recogniser(PiiType.NATIONAL_ID, _TRIGGER, _found)
