"""Private keys in PEM, whole, and without an end where a text breaks off."""

from collections.abc import Iterator

from finetune_api.pii import PiiType
from finetune_trainer.data.pii.recogniser import Recogniser, Regions
from finetune_trainer.data.pii.subject import Span, Subject, compiled

_WHAT = r"(?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
_HEADERS = r"(?:\s*[A-Za-z-]+: [^\n]*\n)*"  # such as Proc-Type
_KEY = compiled(rf"-----BEGIN {_WHAT}{_HEADERS}([A-Za-z0-9+/=\s]*)(?:-----END {_WHAT})?")
_LEAST_BYTES = 32  # of what lies between: less is a text that speaks of keys


def _found(subject: Subject, regions: Regions) -> Iterator[Span]:  # noqa: ARG001 (of the interface)
    for match in _KEY.finditer(subject.content):
        begin, end = match.span()
        if len(match.group(1).strip()) >= _LEAST_BYTES:
            yield Span(begin, begin + len(subject.content[begin:end].rstrip()))


PRIVATE_KEY = Recogniser(PiiType.PRIVATE_KEY, r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY", _found)
