"""Ends of a stage as RunResult: known faults, bugs, and the figures known at that moment."""

import errno
import logging
import math
import os
import traceback
from pathlib import Path

from finetune_api.errors import StageError
from finetune_api.names import Stage
from finetune_api.printable import printable
from finetune_api.reasons import DISK_FIELDS, LARGEST_COUNT, MEMORY_FIELDS, Fault
from finetune_api.run import MAX_ARG_CHARS, MAX_ARGS, MAX_RESULT_BYTES, FaultArg, Progress, RunResult, Trouble
from finetune_api.status import MetricsStatus

log = logging.getLogger(__name__)

_NO_MEMORY = "DefaultCPUAllocator: "  # how torch says that the system has no memory to give
_ROOT = Path(__file__).parent.parent


def failed(stage: Stage, attempt: int, error: StageError, progress: Progress | None, log_uri: str | None) -> RunResult:
    """The result of a stage that ended for a known reason, with how far it had come."""
    error = for_stage(error, stage)
    result = RunResult(
        stage=stage,
        attempt=attempt,
        fault=error.fault,
        args=_args(error),
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


def for_stage(error: StageError, stage: Stage) -> StageError:
    """Return the error with the field of the job that gives this stage's pod more of what ran out."""
    fields = {Fault.HOST_OOM: MEMORY_FIELDS, Fault.DISK_FULL: DISK_FIELDS}.get(error.fault)
    if fields is None or "field" in error.args_by_name:
        return error
    return StageError(error.fault, **error.args_by_name, field=fields[stage])


def of_unexpected(error: BaseException) -> StageError:
    """What an exception that no stage translated stands for: full memory, full disk, or our bug.

    Only its type and place: its message may quote data."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY in str(error)):
        return StageError(Fault.HOST_OOM)
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return StageError(Fault.HOST_OOM)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StageError(Fault.DISK_FULL, what=Path(os.fsdecode(error.filename or "a file")).name)
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_ROOT)]
    last = (ours or frames)[-1] if frames else None
    place = "an unknown place" if last is None else f"{_short(last.filename)}:{last.lineno}"
    return StageError(Fault.BUG, exception=type(error).__name__, place=place)


def reserve(path: Path) -> None:
    """Take the room that `write` needs, so that a disk that fills up cannot keep a result from being told."""
    try:
        _reserved(path).write_bytes(b" " * MAX_RESULT_BYTES)
    except OSError as error:
        log.warning("no room could be kept for the result: %s", error.strerror)


def write(result: RunResult, path: Path) -> None:
    """Put the message at `path` whole or not at all."""
    staged = _reserved(path)
    with os.fdopen(os.open(staged, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(result.to_message())
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)


def _reserved(path: Path) -> Path:
    return path.with_name(f".{path.name}")


def _short(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else path.name


def trouble(error: StageError, since: float) -> Trouble:
    """Return what Progress says about work that fails and is tried again; `since` is Unix time."""
    return Trouble(fault=error.fault, args=_args(for_stage(error, Stage.TRAIN)), since=since)


def _args(error: StageError) -> dict[str, FaultArg]:
    return {name: _bounded(value) for name, value in list(error.args_by_name.items())[:MAX_ARGS]}


def _bounded(value: str | int | float) -> FaultArg:
    """Return the value as a result can hold it: finite, short, and printable."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return max(-LARGEST_COUNT, min(value, LARGEST_COUNT))
    return printable(value)[:MAX_ARG_CHARS]


def metrics_of(progress: Progress) -> MetricsStatus | None:
    if progress.train_loss is None and progress.eval_loss is None:
        return None
    return MetricsStatus(
        train_loss=progress.train_loss,
        eval_loss=progress.eval_loss,
        base_eval_loss=progress.base_eval_loss,
        learning_rate=progress.learning_rate,
        tokens_per_second=progress.tokens_per_second,
        loss=None if progress.train_loss is None else f"{progress.train_loss:.3f}"[:64],
    )
