"""What report.json says of personal data: by type what was found, changed and dropped, where, and what to do."""

from collections.abc import Mapping, Sequence
from typing import Any

from finetune_api.pii import PiiAction, PiiSpec, PiiType
from finetune_trainer.data.accounts import FieldPlace
from finetune_trainer.data.pii.actions import action_of
from finetune_trainer.data.stages.pii import CHANGED, FOUND, ROWS, ROWS_DROPPED

_ADVICE = (
    "{types} remain in the rows that are trained on, and the model may repeat them; set preprocessing.pii.action to "
    "Redact, Pseudonymise or Drop, or preprocessing.pii.types for single types, and look at the places first"
)


def pii_figures(
    spec: PiiSpec | None, counted: Mapping[str, int], places: Mapping[str, Sequence[FieldPlace]], uris: Sequence[str]
) -> dict[str, Any]:
    """Return the types that were found, most first. counted, places: of the stage; uris: of the job's files."""
    found = sorted(
        (each for each in PiiType if counted.get(f"{FOUND}.{each}")), key=lambda each: -counted[f"{FOUND}.{each}"]
    )
    remaining = [each for each in found if action_of(spec, each) is PiiAction.REPORT]
    return {
        "types": [
            {
                "type": type_,
                "action": action_of(spec, type_),
                **{name: counted.get(f"{name}.{type_}", 0) for name in (FOUND, CHANGED, ROWS, ROWS_DROPPED)},
                "places": [
                    {"uri": uris[file], "row": number, "field": field} for file, number, field in places.get(type_, ())
                ],
            }
            for type_ in found
        ],
        "advice": _ADVICE.format(types=", ".join(remaining)) if remaining else "",
    }
