"""What a job does with rows that say the same as others, or nearly so: as it says, or by default for its method."""

from dataclasses import dataclass

from finetune_api import defaults
from finetune_api.duplicates import Copies, DeduplicationSpec
from finetune_api.job import FineTuneJobSpec
from finetune_trainer.methods import method_of


@dataclass(frozen=True, kw_only=True)
class Deduplication:
    """What becomes of copies, of near copies, and how much of what two rows say is the same in near copies."""

    exact: Copies
    near: Copies
    similarity: float


def deduplication_of(spec: FineTuneJobSpec) -> Deduplication:
    """Return what a job does. It follows from the spec alone: every worker process does the same."""
    given = (spec.preprocessing and spec.preprocessing.deduplication) or DeduplicationSpec()
    exact = Copies(defaults.given(given.exact, defaults.EXACT_COPIES))
    drops = exact is Copies.DROP and method_of(spec.method.type).drops_near_copies
    near = Copies(defaults.CPT_NEAR_COPIES if drops else defaults.NEAR_COPIES)
    return Deduplication(
        exact=exact,
        near=defaults.given(given.near, near),
        similarity=defaults.given(given.similarity, defaults.SIMILARITY),
    )
