"""Take credentials out of texts before anybody sees them: in faults, in log lines, in what a pod waits for. Pure.

Texts come from libraries that were handed credentials and quote them, each in its own form: a header, a query, JSON,
XML, an environment. No value is known here, so they are told by their names and by their looks. Redaction comes before
any cut: half a token is no longer told from a word.
"""

import re

MAX_CHARS = 65_536  # of a text; more of it is not looked at, and not shown
_HIDDEN = "***"

_NAMES = "|".join(
    (
        "secret_?access_?key",
        "session_?token",
        "(?:x-amz-)?security-?token",
        "x-(?:amz|goog)-(?:signature|credential)",
        "aws_?access_?key_?id",
        "hf_token|hub_token|access_?token|refresh_?token|client_?secret|api_?key",
        "password|passwd",
    )
)
# A value ends where none of these forms goes on. A quote before it may be that of bytes in Python's words.
_VALUE = r"""[^\s"'<>&,;)}\]]+"""
_PATTERNS = tuple(
    (re.compile(pattern, re.IGNORECASE if any_case else 0), shown)
    for pattern, shown, any_case in (
        # To the end of the line: schemes, keys and signatures follow each other.
        (r"""((?:proxy-)?authorization["']?\s*[:=,]\s*).+""", rf"\1{_HIDDEN}", True),
        (rf"""((?:{_NAMES})["']?\s*[:=>,]\s*(?:b?["'])?){_VALUE}""", rf"\1{_HIDDEN}", True),
        (r"""(["']token["']\s*[:,]\s*b?["'])[^"']+""", rf"\1{_HIDDEN}", True),  # of container credentials
        (rf"([?&](?:signature|sig|token)=){_VALUE}", rf"\1{_HIDDEN}", True),
        (r"(\bbearer\s+)[\w.~+/=-]{8,}", rf"\1{_HIDDEN}", True),
        (r"(://)[^/\s\"'<>?#]+@", rf"\1{_HIDDEN}@", False),
        # A password with a slash, as keys of S3 have, which is no port with a path.
        (r"(://)(?![^/\s]*:[0-9]{1,5}/)[^/\s\"'<>?#:]*:[^\s\"'<>]{1,1024}@", rf"\1{_HIDDEN}@", False),
        (r"\b(?:AKIA|ASIA|ABIA|ACCA|AROA|AIDA)[0-9A-Z]{16,}", _HIDDEN, True),
        (r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}", _HIDDEN, False),
        (r"\beyJ[\w-]{10,}\.[\w-]{10,}(?:\.[\w-]+)?", _HIDDEN, False),  # a JSON web token
    )
)


def without_secrets(text: str) -> str:
    """Return the text with `***` in the place of credentials.

    Of a text beyond MAX_CHARS the beginning is returned, up to a space, so that no secret is cut in two."""
    if len(text) > MAX_CHARS:
        text = text[:MAX_CHARS]
        text = text[: len(text) - len(re.split(r"\s", text)[-1])]
    for pattern, shown in _PATTERNS:
        text = pattern.sub(shown, text)
    return text
