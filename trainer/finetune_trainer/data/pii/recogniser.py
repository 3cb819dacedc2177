"""What a recogniser is: the type that it finds, what no text with it is without, and a function that finds it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from finetune_api.pii import PII_REGIONS, PiiType
from finetune_trainer.data.pii.subject import Span, Subject

Regions = frozenset[str]  # countries, by two letters of ISO 3166
EVERYWHERE: Regions = frozenset(PII_REGIONS)


@dataclass(frozen=True, slots=True)
class Recogniser:
    """Finds values of one type; places are of the subject's content. A model that knows names would be another one.

    trigger: a pattern of RE2 that matches wherever `find` finds something: texts without any are not looked at."""

    type: PiiType
    trigger: str
    find: Callable[[Subject, Regions], Iterator[Span]]
