"""Progress, figures and checkpoints, from what the trainer says to what the status shows. Pure."""

from collections.abc import Sequence
from datetime import datetime

from finetune_api.base import finite
from finetune_api.names import Stage
from finetune_api.quality import MAX_FIGURES
from finetune_api.run import Progress, RunResult
from finetune_api.status import (
    CheckpointStatus,
    FineTuneJobStatus,
    MethodFigure,
    MetricsStatus,
    PlanStatus,
    ProgressStatus,
)
from finetune_operator.clock import format_time, parse_time
from finetune_operator.observation import PodAnswer, PodSilence

STALE_AFTER_S = 120


def with_progress(status: FineTuneJobStatus, answer: PodAnswer) -> FineTuneJobStatus:
    """Return the status with the pod's answer in it; the newest attempt is the one that answered."""
    said = answer.progress
    if said.stage is Stage.PREPARE:
        return status.model_copy(update={"progress": progress_status(said, answer.at)})
    entry = status.attempts[-1].model_copy(update={"last_step": said.step, "resumed_from_step": said.resumed_from_step})
    return status.model_copy(
        update={
            "attempts": [*status.attempts[:-1], entry],
            "progress": progress_status(said, answer.at),
            "metrics": metrics_of_progress(status.metrics, said),
            "checkpoints": checkpoints(status.checkpoints, said.checkpoint),
        }
    )


def is_write_due(status: FineTuneJobStatus, answer: PodAnswer, interval_s: float) -> bool:
    """Return True if a newer answer is worth a status write: live figures are rationed, transitions are not.

    A pod that does not know its place yet must not wipe out how far the attempt before it has come. A preparation that
    takes no longer than the interval is not worth a write."""
    said = answer.progress
    if not (said.bytes_total if said.stage is Stage.PREPARE else said.total_steps):
        return False
    last = parse_time(status.progress.last_updated_time) if status.progress else None
    if last is None and said.stage is Stage.PREPARE:
        last = parse_time(status.attempts[-1].started_at)
    return last is None or (answer.at - last).total_seconds() >= interval_s


def is_unanswered(silence: PodSilence | None, interval_s: float) -> bool:
    """Return True if the running pod was asked in vain for a while."""
    return silence is not None and silence.unanswered_s > _stale_after_s(interval_s)


def with_age(
    status: FineTuneJobStatus, answer: PodAnswer | None, interval_s: float, now: datetime
) -> FineTuneJobStatus:
    """Return the status that says whether its figures are old; the time left of old ones is wrong.

    `answer` outlives status writes, not restarts."""
    if status.progress is None:
        return status
    last = parse_time(status.progress.last_updated_time)
    if answer is not None:
        last = answer.at if last is None else max(last, answer.at)
    stale = last is not None and (now - last).total_seconds() > _stale_after_s(interval_s)
    progress = status.progress.model_copy(update={"stale": stale})
    status = status.model_copy(update={"progress": progress})
    return without_eta(status) if stale else status


def _stale_after_s(interval_s: float) -> float:
    return max(STALE_AFTER_S, 3 * interval_s)


def progress_status(said: Progress, at: datetime) -> ProgressStatus:
    """Return what the status shows of an answer: how much of the data is read, or of the steps done."""
    if said.stage is Stage.PREPARE:
        text = f"{said.percentage}% of data" if said.bytes_total else ""
    else:
        text = f"{said.step}/{said.total_steps}" if said.total_steps else ""
    remaining = finite(said.eta_seconds)
    seconds = None if remaining is None else int(min(remaining, 10**9))
    rows_per_second = finite(said.rows_per_second)
    return ProgressStatus(
        step=said.step,
        total_steps=said.total_steps,
        percentage=said.percentage,
        text=text[:64],
        estimated_remaining_seconds=seconds,
        eta=None if seconds is None else human_seconds(seconds),
        rows_per_second=None if rows_per_second is None else round(max(0.0, rows_per_second), 1),
        figures=_figures(said) or None,
        last_updated_time=format_time(at),
    )


def _figures(said: Progress) -> list[MethodFigure]:
    """Return what the method measured in the last step, to four places."""
    finite_ones = [(name, value) for name, value in said.figures.items() if finite(value) is not None]
    return [MethodFigure(name=name, value=round(value, 4)) for name, value in finite_ones[:MAX_FIGURES]]


def without_eta(status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Return the status without time left and speed of reading, which nobody knows while no pod runs and answers."""
    if status.progress is None:
        return status
    unknown: dict[str, None] = dict.fromkeys(("estimated_remaining_seconds", "eta", "rows_per_second"))
    progress = status.progress.model_copy(update=unknown)
    return status.model_copy(update={"progress": progress})


def progress_of_result(
    old: ProgressStatus | None, plan: PlanStatus | None, result: RunResult, at: datetime
) -> ProgressStatus | None:
    """The last place of an attempt, from its result."""
    total = plan.steps if plan is not None else (old.total_steps if old else 0)
    if result.step is None or not total:
        return old
    said = Progress(stage=result.stage, attempt=result.attempt, activity="Done", step=result.step, total_steps=total)
    return progress_status(said, at).model_copy(update={"figures": old.figures if old is not None else None})


def metrics_of_progress(old: MetricsStatus | None, said: Progress) -> MetricsStatus:
    names = ("train_loss", "eval_loss", "base_eval_loss", "learning_rate", "tokens_per_second")
    return _merged(old, {name: finite(getattr(said, name)) for name in names})


def metrics_of_result(old: MetricsStatus | None, result: RunResult) -> MetricsStatus | None:
    if result.metrics is None:
        return old
    figures = result.metrics.model_dump(by_alias=False, exclude={"loss"})
    return _merged(old, {name: finite(value) for name, value in figures.items()})


def checkpoints(old: Sequence[CheckpointStatus], new: CheckpointStatus | None) -> list[CheckpointStatus]:
    """Return the checkpoint that the trainer relies on now, or what is known if it names none.

    It is the only one that is known to be there: what lies beside it is removed as the trainer saves others, which
    are not all seen here."""
    return list(old)[-1:] if new is None else [new]


def human_seconds(seconds: int) -> str:
    """As kubectl writes ages: 45s, 12m, 3h05m, 2d4h."""
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if seconds < 60:
        return f"{seconds}s"
    if hours < 1:
        return f"{minutes}m"
    return f"{hours}h{minutes % 60:02d}m" if days < 1 else f"{days}d{hours % 24}h"


def _merged(old: MetricsStatus | None, figures: dict[str, float | None]) -> MetricsStatus:
    known = {name: value for name, value in figures.items() if value is not None}
    merged = (old or MetricsStatus()).model_copy(update=known)
    loss = merged.train_loss
    return merged.model_copy(update={"loss": None if loss is None else f"{loss:.3f}"[:64]})
