"""Put something else in the place of values that were found: placeholders by type, or pseudonyms by a keyed hash."""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from finetune_api.pii import PiiType
from finetune_trainer.data.pii.find import Found
from finetune_trainer.data.pii.subject import Span

Name = Callable[[Found], str]  # what stands in the place of a value

_PSEUDONYM_BYTES = 8  # of a hash: of ten million values of a type two share a name once in 400,000 data sets
_SIGNS = re.compile(r"[\W_]+")
_SAME_IN_ANY_CASE = frozenset(
    (PiiType.EMAIL, PiiType.IBAN, PiiType.MAC_ADDRESS, PiiType.IP_ADDRESS, PiiType.NATIONAL_ID)
)
_SIGNS_SAY_NOTHING = frozenset((PiiType.PHONE, PiiType.CARD, PiiType.IBAN, PiiType.MAC_ADDRESS, PiiType.NATIONAL_ID))
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def placeholder(found: Found) -> str:
    """Return the name of its type, such as <EMAIL>."""
    return f"<{found.type}>"


def pseudonym(key: bytes, found: Found) -> str:
    """Return a name that the same value has everywhere, such as <EMAIL_0a1b2c3d4e5f6a7b>, which nobody makes without
    the key. Values that differ in spaces, hyphens or capitals alone, where these say nothing, are the same."""
    value = _SIGNS.sub("", found.value) if found.type in _SIGNS_SAY_NOTHING else found.value
    value = value.lower() if found.type in _SAME_IN_ANY_CASE else value
    said = f"{found.type}\0{value}".encode()
    return f"<{found.type}_{hashlib.blake2b(said, key=key, digest_size=_PSEUDONYM_BYTES).hexdigest()}>"


def replaced(text: str, every: Sequence[Found], name: Name) -> str:
    """Return the text with names in the place of values, which are in order; JSON stays JSON."""
    strings = _strings(text)
    parts: list[str] = []
    at = 0
    for each in every:
        said = name(each)
        parts += (text[at : each.begin], said if strings is None or _is_within(strings, each) else f'"{said}"')
        at = each.end
    return "".join((*parts, text[at:]))


def _strings(text: str) -> list[Span] | None:
    """Return where the strings of a text of JSON are; None for a text of anything else."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        said: Any = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return [Span(*match.span()) for match in _STRING.finditer(text)] if isinstance(said, dict | list) else None


def _is_within(strings: list[Span], found: Found) -> bool:
    at = bisect_right(strings, found.begin, key=lambda each: each.begin) - 1
    return at >= 0 and found.end <= strings[at].end
