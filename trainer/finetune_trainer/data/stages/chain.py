"""The order of the stages, and the way of rows through them: in bounded batches of one kind, every row counted."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby

from finetune_api.errors import StageError
from finetune_api.job import FineTuneJobSpec, PreprocessingSpec
from finetune_trainer.data.accounts import Action, Ledger, RowPlace
from finetune_trainer.data.reading import Checked
from finetune_trainer.data.shared_runs import SharedRuns
from finetune_trainer.data.stages.leaks import leaks_stages
from finetune_trainer.data.stages.pii import pii_stage
from finetune_trainer.data.stages.quality import quality_of, quality_stages
from finetune_trainer.data.stages.repair import REPAIR
from finetune_trainer.data.stages.stage import Stage
from finetune_trainer.data.stages.unanswered import UNANSWERED
from finetune_trainer.data.stages.weightless import WEIGHTLESS

_MAX_ROWS = 256  # of a batch
_MAX_BYTES = 2**20  # of a batch in memory, but for its last row


def chain_of(
    spec: FineTuneJobSpec, pii_key: bytes | None = None, evaluation: SharedRuns | None = None
) -> tuple[Stage, ...]:
    """Return the stages of a job, in order. They follow from the spec, and from the key of its pseudonyms and what its
    evaluation sets say where it has any: every worker process has the same."""
    given = spec.preprocessing or PreprocessingSpec()
    repair = () if quality_of(spec).repair is False else (REPAIR,)
    leaks = leaks_stages(given.decontaminate_against, evaluation)
    return (*repair, WEIGHTLESS, UNANSWERED, *leaks, *quality_stages(spec), pii_stage(given.pii, pii_key))


def through(chain: Sequence[Stage], rows: Iterable[Checked], ledger: Ledger) -> Iterator[Checked]:
    """Yield the rows that all stages pass on, in order; decisions and counts go to the ledger."""
    for batch in _batches(rows):
        for stage in chain:
            batch = _through_one(stage, batch, ledger)
        yield from batch


def _through_one(stage: Stage, batch: list[Checked], ledger: Ledger) -> list[Checked]:
    passed: list[Checked] = []
    for _, group in groupby(batch, key=lambda item: type(item.row)):
        given = list(group)
        staged = stage.run(given)
        for each in staged.decisions:
            take = ledger.drop if each.action is Action.DROP else partial(ledger.decide, action=each.action)
            take(each.file, each.row, stage.name, reason=each.reason, detail=each.detail, ref=each.ref)
            ledger.changes.update([each.reason] if each.action is Action.CHANGE else ())
        ledger.take_places(stage.name, staged.places)
        ledger.passed(stage.name, map(_place, given), map(_place, staged.rows), staged.counters)
        passed += staged.rows
    return passed


def _place(item: Checked) -> RowPlace:
    return RowPlace(item.file, item.number)


def _batches(rows: Iterable[Checked]) -> Iterator[list[Checked]]:
    """Yield the rows in batches; what ends them is raised behind those that came before it."""
    batch: list[Checked] = []
    held_bytes = 0
    error: StageError | None = None
    try:
        for item in rows:
            batch.append(item)
            held_bytes += item.held_bytes
            if len(batch) >= _MAX_ROWS or held_bytes >= _MAX_BYTES:
                yield batch
                batch, held_bytes = [], 0
    except StageError as caught:
        error = caught
    if batch:
        yield batch
    if error is not None:
        raise error
