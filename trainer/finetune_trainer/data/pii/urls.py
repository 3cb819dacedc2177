"""URLs with a user and a password before their host, from the scheme to the end of the host."""

import re
from collections.abc import Iterator

from finetune_api.pii import PiiType
from finetune_trainer.data.pii.recogniser import Recogniser, Regions
from finetune_trainer.data.pii.subject import Span, Subject, compiled

_URL = compiled(r"""(?i)\b[a-z][a-z0-9+.-]*://[^\s/?#@"'<>:]*:([^\s"'<>/]+)@[^\s/?#"'<>@,;)\]}]+""")
_LEFT_OPEN = re.compile(r"\$?\{?\{?[A-Z_.\s]+\}?\}?|\*+|[xX]+|\$\(.*\)|%[sd]|pass(?:word)?", re.DOTALL)


def _found(subject: Subject, regions: Regions) -> Iterator[Span]:  # noqa: ARG001 (of the interface)
    for match in _URL.finditer(subject.content):
        password = subject.said(Span(*match.span(1)))
        if not _LEFT_OPEN.fullmatch(password):
            yield Span(*match.span())


URL_CREDENTIALS = Recogniser(PiiType.URL_CREDENTIALS, r"://[^\s/]*@", _found)
