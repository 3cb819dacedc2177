"""Take credentials out of texts before anybody sees them: in faults, in log lines, in what a pod waits for. Pure.

Texts come from libraries that were handed credentials and quote them, each in its own form: a header, a query, JSON,
XML, an environment. No value is known here, so they are told by their names and by their looks. Redaction comes before
any cut: half a token is no longer told from a word.
"""

import re
from typing import NamedTuple

MAX_CHARS = 65_536  # of a text; more of it is not looked at, and not shown
_HIDDEN = "***"

_NAMES = "|".join(
    (
        "secret[-_ ]?access[-_ ]?key|secret[-_]?key|private[-_]?key|account[-_]?key|customer[-_]?key",
        "(?:session|security|access|refresh|identity|id|auth|authorization|hf|hub|huggingface)[-_]?token",
        "x-(?:amz|goog)-(?:signature|credential)",
        "aws[-_]?access[-_]?key[-_]?id",
        "client[-_]?secret|api[-_]?key",
        "password|passwd",
    )
)
_IN_NAMES = "key token secret passw x-amz- x-goog-"
# As it is, within a text of JSON or Python (once or more often), in HTML, in a URL.
_QUOTE = r"""(?:\\{0,8}["']|&quot;|&\#0?39;|&apos;|%2[27])"""
_SPACE = r"(?:\s|%20|\+)*"
_IS = r"(?:[:=>]{1,2}|->|%3[AD]|&gt;)"
# Between a name and its value: what says that it is its value, or a comma between both in quotes, or, as Kubernetes
# and XML say it, "value" or an attribute.
_BETWEEN = (
    rf"(?:{_QUOTE}?[\s,]+(?:-\s+)?{_QUOTE}?value{_QUOTE}?{_SPACE}{_IS}{_SPACE}|"
    rf"{_QUOTE}?(?:\s[^<>\n]{{0,100}}(?=>))?{_SPACE}{_IS}{_SPACE}b?|{_QUOTE}{_SPACE},{_SPACE}b?(?={_QUOTE}))"
)
# All up to the quote that closes it, or to what ends a word.
_VALUE = (
    r"""(?:"(?:\\.|[^"\\])*|'(?:\\.|[^'\\])*|\\{1,8}["'](?:(?!\\{1,8}["']).)*|"""
    r"""(?:\[\]byte|&quot;|&\#0?39;|&apos;)?(?!["'])[^\s"'<]+)"""
)
_START = r"(?:(?<![A-Za-z0-9])|(?<=%[0-9A-Fa-f]{2}))"  # of a word, also in a URL


class _Secret(NamedTuple):
    looks: re.Pattern[str]
    shown: str
    holds: tuple[str, ...]  # one of these, in small letters, is in each text in which it is found


_SECRETS = tuple(
    _Secret(re.compile(pattern, (re.IGNORECASE if any_case else 0) | re.DOTALL), shown, tuple(holds.split()))
    for pattern, shown, any_case, holds in (
        (r"(-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----).*?(?=-----END|\Z)", rf"\1{_HIDDEN}", False, "private"),
        # To the end of the line: schemes, keys and signatures follow each other.
        (
            rf"((?:(?:proxy-)?authorization|(?:set-)?cookie){_QUOTE}?{_SPACE}(?:[:=,]|%3[AD]){_SPACE})[^\n]+",
            rf"\1{_HIDDEN}",
            True,
            "authorization cookie",
        ),
        # In a query the next parameter follows; elsewhere a value may hold an ampersand.
        (rf"([?&](?:{_NAMES})=)[^\s\"'<>&]+", rf"\1{_HIDDEN}", True, _IN_NAMES),
        (rf"((?:{_NAMES}){_BETWEEN})(?!{re.escape(_HIDDEN)}&){_VALUE}", rf"\1{_HIDDEN}", True, _IN_NAMES),
        # Of container credentials.
        (rf"(({_QUOTE})token\2\s*[:,]\s*b?{_QUOTE})[^\"'\\]+", rf"\1{_HIDDEN}", True, "token"),
        (r"([?&](?:signature|sig|token)=)[^\s\"'<>&]+", rf"\1{_HIDDEN}", True, "sig token"),
        (
            rf"({_START}(?:signature|token){_QUOTE}?{_SPACE}{_IS}{_SPACE}{_QUOTE}?)[\w.~+/=%-]{{16,}}",
            rf"\1{_HIDDEN}",
            True,
            "signature token",
        ),
        (rf"({_START}bearer(?:\s|%20|\+)+)[\w.~+/=%-]{{8,}}", rf"\1{_HIDDEN}", True, "bearer"),
        (r"(://)[^/\s\"'<>?#]+@", rf"\1{_HIDDEN}@", False, "@"),
        # A password with a slash, as keys of S3 have, which is no port with a path.
        (r"(://)(?![^/\s]*:[0-9]{1,5}/)[^/\s\"'<>?#:]*:[^\s\"'<>]{1,1024}@", rf"\1{_HIDDEN}@", False, "@"),
        # As paths shorten it.
        (r"(:/|(?<![^\s\"'<>(=])//)[^/\s\"'<>?#:]+:[^/\s\"'<>?#]+@", rf"\1{_HIDDEN}@", False, "@"),
        (r"(%3A%2F%2F)[^\s\"'<>/]{1,1024}?%40", rf"\1{_HIDDEN}%40", True, "%40"),
        (
            rf"{_START}(?:AKIA|ASIA|ABIA|ACCA|AROA|AIDA)[0-9A-Z]{{16,}}",
            _HIDDEN,
            True,
            "akia asia abia acca aroa aida",
        ),
        # Of the Hugging Face Hub, GitHub, GitLab, Google, Slack, and those that begin with sk.
        (
            rf"(?:{_START}|(?<=_))(?:(?:hf|api_org|gh[pousr]|github_pat)_[A-Za-z0-9_]{{16,}}|"
            r"(?:glpat-|ya29\.|sk-|xox[abeprs]-)[\w-]{16,})",
            _HIDDEN,
            False,
            "hf_ api_org_ ghp_ gho_ ghu_ ghs_ ghr_ github_pat_ glpat- ya29. sk- xox",
        ),
        (
            r"(?:(?<![\w-])|(?<=%[0-9A-Fa-f]{2}))eyJ[\w-]{10,}\.[\w-]{10,}(?:\.[\w-]+)?",
            _HIDDEN,
            False,
            "eyj",
        ),  # a JSON web token
    )
)


def without_secrets(text: str) -> str:
    """Return the text with `***` in the place of credentials.

    Of a text beyond MAX_CHARS the beginning is returned, up to a space, so that no secret is cut in two."""
    if len(text) > MAX_CHARS:
        text = text[:MAX_CHARS]
        text = text[: len(text) - len(re.split(r"\s", text)[-1])]
    # Most texts hold no secret, and to look for each kind by its pattern takes ten times as long as for its words. What
    # is put in for one makes no new words. ASCII only: a pattern takes a long s for an s in any case, lower() does not.
    small = text.lower() if text.isascii() else None
    for secret in _SECRETS:
        if small is None or any(word in small for word in secret.holds):
            text = secret.looks.sub(secret.shown, text)
    return text


def shortened(text: str, max_chars: int) -> str:
    """Return the beginning of the text, cut after its credentials were taken out."""
    return without_secrets(text)[:max_chars]
