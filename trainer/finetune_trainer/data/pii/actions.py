"""What a job does about values of each type: what it says of the type, else of all, else the default."""

from finetune_api import defaults
from finetune_api.pii import PiiAction, PiiSpec, PiiType


def action_of(spec: PiiSpec | None, type_: PiiType) -> PiiAction:
    """Return what becomes of values of a type. spec: None where the job says nothing of them."""
    given = spec or PiiSpec()
    of_type = getattr(given.types, type_.lower()) if given.types else None
    return PiiAction(defaults.given(of_type, defaults.given(given.action, PiiAction(defaults.PII_ACTION))))


def needs_key(spec: PiiSpec | None) -> bool:
    """Whether values of any type get pseudonyms."""
    return any(action_of(spec, each) is PiiAction.PSEUDONYMISE for each in PiiType)
