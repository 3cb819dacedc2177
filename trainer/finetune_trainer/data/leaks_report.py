"""What report.json says of rows that evaluation sets have too: of each set how many, where, and what to look at."""

from typing import Any

from finetune_api.row_words import SHARED_WORDS
from finetune_trainer.data.accounts import Ledger
from finetune_trainer.data.evaluation_sets import EvaluationSet
from finetune_trainer.data.stages.leaks import NAME

_MANY_FOUND = 0.1  # of all rows, from which on a set may begin its rows in the words of the job's own
_ADVICE = (
    "{rows:,} of {all:,} rows share {words} words in a row with the evaluation set {name}: look at the places; where "
    "that is a question in the same words before every row, take it out of the set, or remove the set from "
    "preprocessing.decontaminateAgainst"
)
_SHORT_ADVICE = (
    "{rows:,} of {all:,} rows of the evaluation set {name} have no text of {words} words, so that none of them is "
    "found among the rows that are trained on"
)


def leaks_report(sets: tuple[EvaluationSet, ...], ledger: Ledger) -> dict[str, Any]:
    """Return what was found; nothing where the job names no set. left_out: rows, each counted with every set that has
    some of it."""
    if not sets:
        return {}
    counted, places = ledger.counted[NAME], ledger.places[NAME]
    return {
        "words": SHARED_WORDS,
        "sets": [
            {
                **each._asdict(),
                "left_out": counted[each.name],
                "places": [
                    {"uri": ledger.files[where.file].uri, "row": where.number} for where in places.get(each.name, ())
                ],
            }
            for each in sets
        ],
        "advice": _advice(sets, ledger),
    }


def _advice(sets: tuple[EvaluationSet, ...], ledger: Ledger) -> str:
    """Return what is worth a look, the worst first; nothing where nothing is."""
    rows, counted = ledger.rows_read, ledger.counted[NAME]
    most = max(sets, key=lambda each: counted[each.name])
    if rows and counted[most.name] > _MANY_FOUND * rows:
        return _ADVICE.format(rows=counted[most.name], all=rows, words=SHARED_WORDS, name=most.name)
    shortest = max(sets, key=lambda each: each.short_rows / each.rows)
    if 2 * shortest.short_rows > shortest.rows:
        return _SHORT_ADVICE.format(rows=shortest.short_rows, all=shortest.rows, words=SHARED_WORDS, name=shortest.name)
    return ""
