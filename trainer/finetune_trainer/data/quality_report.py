"""What the rules of quality found in a job's rows, for its report, and whether that is too much to leave out."""

from typing import Any

from finetune_api import defaults
from finetune_api.errors import StageError
from finetune_api.job import FineTuneJobSpec
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_api.run import MAX_ARG_CHARS
from finetune_api.text_quality import RULES
from finetune_trainer.data.accounts import FieldPlace, Ledger, most_first
from finetune_trainer.data.stages.quality import JUDGED, LANGUAGE, STAGE, judge_of, quality_of

_PLACES_IN_WORDS = 2
_REASONS = tuple(dict.fromkeys(rule.reason for rule in RULES.values()))


def quality_parts(spec: FineTuneJobSpec, ledger: Ledger) -> dict[str, Any]:
    """Return the parts of report.json about quality."""
    return {"quality": quality_report(spec, ledger), "languages": language_report(ledger)}


def quality_report(spec: FineTuneJobSpec, ledger: Ledger) -> dict[str, Any]:
    """Return what was found, most first. drops: whether these rows are left out; share: of the rows judged."""
    judge, counted = judge_of(spec), ledger.counted[STAGE]
    judged = counted[JUDGED]
    return {
        "preset": judge.preset,
        "drops": judge.drops,
        "rows": judged,
        "max_dropped_fraction": _max_fraction(spec) if judge.drops else None,
        "found": [
            {
                "reason": reason,
                "rows": counted[reason],
                "share": round(counted[reason] / judged, 4),
                "places": [_place(ledger, where) for where in ledger.places[STAGE].get(reason, ())],
            }
            for reason in _found(ledger)
        ],
    }


def language_report(ledger: Ledger) -> dict[str, int]:
    """Return how many rows are in which language, most first; `und` where it cannot be told."""
    counts = {
        name.removeprefix(LANGUAGE): rows for name, rows in ledger.counted[STAGE].items() if name.startswith(LANGUAGE)
    }
    return most_first(counts)


def require_few_poor(spec: FineTuneJobSpec, ledger: Ledger) -> None:
    """Raises TOO_MANY_POOR_ROWS where the rules leave out more rows than the job allows."""
    judge, counted = judge_of(spec), ledger.counted[STAGE]
    dropped = sum(counted[reason] for reason in _REASONS)
    allowed = _max_fraction(spec)
    if not judge.drops or dropped <= allowed * counted[JUDGED]:
        return
    raise StageError(
        Fault.TOO_MANY_POOR_ROWS,
        preset=judge.preset,
        dropped=dropped,
        rows=counted[JUDGED],
        percent=f"{100 * dropped / counted[JUDGED]:.3g}",
        table=shortened("; ".join(_words(ledger, reason) for reason in _found(ledger)), MAX_ARG_CHARS),
        allowed=f"{100 * allowed:g}",
    )


def _max_fraction(spec: FineTuneJobSpec) -> float:
    return defaults.given(quality_of(spec).max_dropped_fraction, defaults.MAX_POOR_FRACTION)


def _found(ledger: Ledger) -> list[str]:
    counted = ledger.counted[STAGE]
    return sorted((reason for reason in _REASONS if counted[reason]), key=lambda reason: -counted[reason])


def _place(ledger: Ledger, where: FieldPlace) -> dict[str, Any]:
    return {"uri": ledger.files[where.file].uri, "row": where.number}


def _words(ledger: Ledger, reason: str) -> str:
    places = ledger.places[STAGE].get(reason, ())[:_PLACES_IN_WORDS]
    rows = ", ".join(f"{ledger.files[each.file].uri.rpartition('/')[2]} row {each.number}" for each in places)
    return f"{ledger.counted[STAGE][reason]:,} {reason} ({shortened(rows, 80)})"
