"""Progress, figures and checkpoints, from what the trainer says to what the status shows. Pure."""

from collections.abc import Sequence
from datetime import datetime

from finetune_api.base import finite
from finetune_api.run import Progress, RunResult
from finetune_api.status import CheckpointStatus, FineTuneJobStatus, MetricsStatus, PlanStatus, ProgressStatus
from finetune_operator.clock import format_time, parse_time
from finetune_operator.seen import SeenProgress

STALE_AFTER_S = 120


def with_progress(status: FineTuneJobStatus, seen: SeenProgress) -> FineTuneJobStatus:
    """The status with the pod's answer in it; the newest attempt is the one that answered."""
    said = seen.progress
    entry = status.attempts[-1].model_copy(update={"last_step": said.step, "resumed_from_step": said.resumed_from_step})
    return status.model_copy(
        update={
            "attempts": [*status.attempts[:-1], entry],
            "progress": progress_status(said, seen.at),
            "metrics": metrics_of_progress(status.metrics, said),
            "checkpoints": checkpoints(status.checkpoints, said.checkpoint),
        }
    )


def is_write_due(status: FineTuneJobStatus, seen: SeenProgress, interval_s: float) -> bool:
    """Whether a newer answer is worth a status write: live figures are rationed, transitions are not.

    A pod that does not know its place yet must not wipe out how far the attempt before it has come."""
    if seen.progress.total_steps == 0:
        return False
    last = parse_time(status.progress.last_updated_time) if status.progress else None
    return last is None or (seen.at - last).total_seconds() >= interval_s


def is_stale(status: FineTuneJobStatus, seen: SeenProgress | None, interval_s: float, now: datetime) -> bool:
    """Whether the running pod has not answered for a while. `seen` survives between writes, not restarts."""
    last = parse_time(status.progress.last_updated_time) if status.progress else None
    if seen is not None:
        last = seen.at if last is None else max(last, seen.at)
    return last is not None and (now - last).total_seconds() > max(STALE_AFTER_S, 3 * interval_s)


def progress_status(said: Progress, at: datetime) -> ProgressStatus:
    total = said.total_steps
    remaining = finite(said.eta_seconds)
    seconds = None if remaining is None else int(min(remaining, 10**9))
    return ProgressStatus(
        step=said.step,
        total_steps=total,
        percentage=min(100, 100 * said.step // total) if total else 0,
        text=f"{said.step}/{total}"[:64] if total else "",
        estimated_remaining_seconds=seconds,
        eta=None if seconds is None else human_seconds(seconds),
        last_updated_time=format_time(at),
    )


def progress_of_report(
    old: ProgressStatus | None, plan: PlanStatus | None, report: RunResult, at: datetime
) -> ProgressStatus | None:
    """The last place of an attempt, from its result."""
    total = plan.steps if plan is not None else (old.total_steps if old else 0)
    if report.step is None or not total:
        return old
    said = Progress(stage=report.stage, attempt=report.attempt, activity="Done", step=report.step, total_steps=total)
    return progress_status(said, at)


def metrics_of_progress(old: MetricsStatus | None, said: Progress) -> MetricsStatus:
    names = ("train_loss", "eval_loss", "base_eval_loss", "learning_rate", "tokens_per_second")
    return _merged(old, {name: finite(getattr(said, name)) for name in names})


def metrics_of_report(old: MetricsStatus | None, report: RunResult) -> MetricsStatus | None:
    if report.metrics is None:
        return old
    figures = report.metrics.model_dump(by_alias=False, exclude={"loss"})
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
