"""Ends of a stage as RunResult: known faults, bugs, and the figures known at that moment."""

import errno
import math
import os
import tempfile
import traceback
from pathlib import Path

from finetune_api.errors import StageError
from finetune_api.names import Stage
from finetune_api.reasons import Fault
from finetune_api.run import Progress, RunResult
from finetune_api.status import MetricsStatus

_MAX_ARG_CHARS = 256
_ROOT = Path(__file__).parent.parent


def failed(stage: Stage, attempt: int, error: StageError, progress: Progress | None, log_uri: str | None) -> RunResult:
    """The result of a stage that ended for a known reason, with how far it had come."""
    result = RunResult(
        stage=stage,
        attempt=attempt,
        fault=error.fault,
        args={name: _bounded(value) for name, value in error.args_by_name.items()},
        exit_code=error.exit_code,
        log_uri=log_uri,
    )
    if progress is None:
        return result
    return result.model_copy(
        update={
            "step": progress.step if progress.total_steps else None,
            "resumed_from_step": progress.resumed_from_step,
            "checkpoint": progress.checkpoint,
            "metrics": metrics_of(progress),
        }
    )


def of_unexpected(error: BaseException) -> StageError:
    """What an exception that no stage translated stands for: full memory, full disk, or our bug.

    Only its type and place: its message may quote data."""
    if isinstance(error, MemoryError):
        return StageError(Fault.HOST_OOM)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StageError(Fault.DISK_FULL, what=Path(os.fsdecode(error.filename or "a file")).name)
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_ROOT)]
    last = (ours or frames)[-1] if frames else None
    place = "an unknown place" if last is None else f"{_short(last.filename)}:{last.lineno}"
    return StageError(Fault.BUG, exception=type(error).__name__, place=place)


def write(result: RunResult, path: Path) -> None:
    """Put the message at `path` whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as staged:
        staged.write(result.to_message())
        staged.flush()
        os.fsync(staged.fileno())
    os.replace(staged.name, path)


def _short(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else path.name


def _bounded(value: str | int | float) -> str | int | float:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value[:_MAX_ARG_CHARS] if isinstance(value, str) else value


def metrics_of(progress: Progress) -> MetricsStatus | None:
    if progress.train_loss is None and progress.eval_loss is None:
        return None
    return MetricsStatus(
        train_loss=progress.train_loss,
        eval_loss=progress.eval_loss,
        base_eval_loss=progress.base_eval_loss,
        learning_rate=progress.learning_rate,
        tokens_per_second=progress.tokens_per_second,
        loss=None if progress.train_loss is None else f"{progress.train_loss:.3f}",
    )
