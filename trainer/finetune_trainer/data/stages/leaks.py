"""Leave out rows that say what an evaluation set says: a model that has learned them is not measured by it any more."""

from collections.abc import Sequence
from functools import partial

from finetune_api.duplicates import EvaluationSetSpec
from finetune_trainer.data.accounts import Action, FieldPlace
from finetune_trainer.data.kinds import compared
from finetune_trainer.data.problems import Drop
from finetune_trainer.data.reading import Checked
from finetune_trainer.data.shared_runs import SharedRuns
from finetune_trainer.data.stages.stage import Stage, Staged

NAME = "leaks"
_NAMED = 3  # sets, in a decision


def leaks_stages(specs: Sequence[EvaluationSetSpec] | None, runs: SharedRuns | None) -> tuple[Stage, ...]:
    """Return the stage of a job; none where it names no evaluation set. runs: of the sets, once they are read."""
    if not specs:
        return ()
    description = "leaves out rows that share a run of words with an evaluation set"
    return (Stage(NAME, description, partial(_run, [each.name for each in specs], runs)),)


def _run(names: Sequence[str], runs: SharedRuns | None, rows: Sequence[Checked]) -> Staged:
    assert runs is not None, "evaluation sets are read before rows are"
    staged = Staged([])
    said = [compared(item.row) for item in rows]
    for item, sets in zip(rows, runs.sets_of([[*each.asked, *each.said] for each in said]), strict=True):
        found = [name for at, name in enumerate(names) if sets & (1 << at)]
        if not found:
            staged.rows.append(item)
            continue
        for name in found:
            staged.count(name, FieldPlace(item.file, item.number, ""))
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        staged.decide(item, Action.DROP, Drop.IN_EVALUATION_SET, ", ".join(found[:_NAMED]) + more)
    return staged
