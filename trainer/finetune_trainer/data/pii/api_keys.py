"""Keys and tokens of services, told by how they begin, and random words that a word before them calls a secret."""

import math
import re
from collections import Counter
from collections.abc import Iterator

from finetune_api.pii import PiiType
from finetune_trainer.data.pii.recogniser import Recogniser, Regions
from finetune_trainer.data.pii.subject import Span, Subject, compiled

_KNOWN = (
    r"(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}",  # AWS
    r"gh[pousr]_[A-Za-z0-9]{36,}",  # GitHub
    r"github_pat_[A-Za-z0-9_]{22,}",
    r"gl(?:pat|dt|rt|cbt|ptt|oas)-[A-Za-z0-9_-]{20,}",  # GitLab
    r"xox[abeprs]-[A-Za-z0-9-]{10,}",  # Slack
    r"xapp-[0-9]-[A-Za-z0-9-]{20,}",
    r"https://hooks\.slack\.com/(?:services|workflows)/[A-Za-z0-9_/-]{20,}",
    r"(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,}",  # Stripe
    r"whsec_[A-Za-z0-9+/]{24,}",
    r"sk-(?:[a-z0-9]+-)*[A-Za-z0-9_-]{20,}",  # OpenAI, Anthropic
    r"AIza[A-Za-z0-9_-]{35}",  # Google
    r"ya29\.[A-Za-z0-9_-]{20,}",
    r"GOCSPX-[A-Za-z0-9_-]{20,}",
    r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",  # a JSON web token
    r"(?:hf|api_org)_[A-Za-z0-9]{30,}",  # Hugging Face
    r"npm_[A-Za-z0-9]{36}",
    r"pypi-[A-Za-z0-9_-]{50,}",
    r"SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}",  # SendGrid
    r"do[opr]_v1_[0-9a-f]{64}",  # DigitalOcean
    r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}",  # Shopify
    r"dckr_pat_[A-Za-z0-9_-]{20,}",  # Docker
    r"[0-9]{8,10}:AA[A-Za-z0-9_-]{33}",  # a Telegram bot
    r"(?:AC|SK)[0-9a-f]{32}",  # Twilio
    r"key-[0-9a-f]{32}",  # Mailgun
    r"sq0(?:atp|csp)-[A-Za-z0-9_-]{22,}",  # Square
    r"AGE-SECRET-KEY-1[0-9A-Z]{58}",
)
_BY_FORM = compiled(rf"\b(?:{'|'.join(_KNOWN)})")
_NAMES = (
    r"(?:api|app|access|secret|auth|account|client|consumer|signing|encryption|storage|service|master)"
    r"[ _-]?(?:key|token|secret|password)(?:[ _-]?(?:id|value))?|secret(?:[ _-]access[ _-]key)?|token|bearer"
    r"|\bkey|passw(?:or)?d|passphrase|pwd|credentials?|passwort|contraseña|mot de passe|parola d'ordine"
)
_CUE = rf"(?i:{_NAMES})"
_IS = r"""(?:\\*["'\]]?\s?(?::=|=>|[:=])\s?|\s(?i:is|lautet|ist|est|es)[: ]\s?|(?i:bearer)\s)"""
_BY_CUE = compiled(rf"""{_CUE}{_IS}(?:(?i:bearer)\s)?["'`]?([A-Za-z0-9_+/=.~!$%^&*#@-]{{12,}})""")
_LEAST_BITS = 3.0  # of a character, over the whole word
_LEAST_CHARS = 16  # of a word of letters and digits; with other signs in it, _LEAST_WITH_SIGNS
_LEAST_WITH_SIGNS, _MOST_CHARS = 12, 512
_NAME = re.compile(
    r"[A-Za-z_.\-/]+|(?:[A-Za-z]+[_.\-/])+[A-Za-z0-9]{1,4}|\d[\d.,:/-]*|[a-z]+://.*|(?:[\w-]+\.)+[a-z]{2,}/.*",
    re.DOTALL,
)


def _found(subject: Subject, regions: Regions) -> Iterator[Span]:  # noqa: ARG001 (of the interface)
    for match in _BY_FORM.finditer(subject.content):
        if _bits(subject.said(Span(*match.span()))) >= _LEAST_BITS / 1.2:
            yield Span(*match.span())
    for match in _BY_CUE.finditer(subject.content):
        begin, end = match.span(1)
        value = subject.said(Span(begin, end)).rstrip(".,")
        if _is_random(value):
            yield Span(begin, begin + len(value))


def _is_random(word: str) -> bool:
    """Whether a word is nothing that a person reads: a name, a path, a number, an example that says so."""
    has_digit, has_letter = any(map(str.isdigit, word)), any(map(str.isalpha, word))
    least = _LEAST_CHARS if word.isalnum() else _LEAST_WITH_SIGNS
    return (
        least <= len(word) <= _MOST_CHARS
        and has_digit
        and has_letter
        and not _NAME.fullmatch(word)
        and _bits(word) >= _LEAST_BITS
    )


def _bits(word: str) -> float:
    """Return the entropy of a word's characters, in bits for each."""
    counts, size = Counter(word), len(word)
    return -sum(count / size * math.log2(count / size) for count in counts.values())


_TRIGGER = (
    r"(?:A[KSBC][IC]A|gh[pousr]_|github_pat_|gl[a-z]+-|xox[a-z]-|xapp-|https://hooks\.slack|[srp]k_(?:live|test)_|"
    r"whsec_|sk-|AIza|ya29\.|GOCSPX-|eyJ|hf_|api_org_|npm_|pypi-|SG\.|do[opr]_v1|shp|dckr_pat|\d{8,10}:AA|"
    rf"AC[0-9a-f]{{4}}|SK[0-9a-f]{{4}}|key-|sq0|AGE-S)|{_CUE}{_IS}"
)
API_KEY = Recogniser(PiiType.API_KEY, _TRIGGER, _found)
