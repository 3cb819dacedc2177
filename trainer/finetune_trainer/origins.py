"""What a job says of its data beside the rows: carried from its spec into plan, report, manifest and card.

An adapter that goes on with another one has learned that one's data too, and says so."""

import math
from collections.abc import Iterable, Sequence

from pydantic import Field

from finetune_api.base import Str64, Str256, Uri, WireModel
from finetune_api.governance import MAX_LICENSES, Confidentiality
from finetune_api.job import DatasetSpec

MAX_EARLIER = 200  # datasets of earlier adapters: ten jobs, each of which went on with the one before


class DataOrigin(WireModel):
    """What is said of one dataset; None where a job says nothing. licenses: by which its rows were chosen."""

    uri: Uri
    name: Str64 | None = None
    license: Str256 | None = None
    licenses: list[Str64] = Field(default=[], max_length=MAX_LICENSES)
    source: Str256 | None = None
    confidentiality: Confidentiality | None = None
    copyright_holder: Str256 | None = None

    @property
    def under(self) -> str | None:
        """Return what its rows are under, in words."""
        rows = f"rows under {', '.join(self.licenses)}" if self.licenses else None
        return "; ".join(part for part in (self.license, rows) if part is not None) or None


def origins_of(datasets: Iterable[DatasetSpec]) -> list[DataOrigin]:
    """Return what is said of each dataset, in order."""
    return [DataOrigin.model_validate(each.model_dump(by_alias=False, exclude_none=True)) for each in datasets]


def highest(origins: Iterable[DataOrigin]) -> Confidentiality | None:
    """Return how confidential what learned all of this is; None where that is not said of some of it."""
    said = [each.confidentiality for each in origins]
    known = [each for each in said if each is not None]
    return max(known, key=lambda each: each.rank) if known and len(known) == len(said) else None


def joined(own: Sequence[DataOrigin], earlier: Sequence[DataOrigin]) -> list[DataOrigin]:
    """Return both without repetition, the own first, and so many that a chain of jobs does not grow for ever.

    Those of which it is not said how confidential they are, and the most confidential ones, are kept before others:
    so `highest` of what is kept is that of all."""
    found = list({each.model_dump_json(): each for each in (*own, *earlier)}.values())
    if len(found) > MAX_EARLIER:
        found.sort(key=_caution, reverse=True)
    return found[:MAX_EARLIER]


def _caution(origin: DataOrigin) -> float:
    """Return how much `highest` depends on it."""
    return math.inf if origin.confidentiality is None else origin.confidentiality.rank


def as_record(origin: DataOrigin) -> dict[str, object]:
    """Return what is said, as reports and manifests hold it."""
    return origin.model_dump(mode="json", exclude_defaults=True)
