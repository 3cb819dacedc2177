"""`finetune run`: prepare and train in processes of this machine, with the retries of the cluster."""

import importlib.util
import json
import os
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from finetune_api import layout, retry
from finetune_api.base import first_problem
from finetune_api.errors import StageError
from finetune_api.job import StartPolicy
from finetune_api.names import MAX_ATTEMPTS, Stage
from finetune_api.reasons import Fault, reason_of_exit
from finetune_api.run import RunConfig, RunResult
from finetune_api.status import AttemptStatus
from finetune_cli import local, show
from finetune_cli.errors import CommandError, Exit
from finetune_cli.load import load_job
from finetune_cli.stages import StageRun, Stop, run_stage
from finetune_cli.validate import problems

# A pod waits for data and grants that may be on their way; at a terminal, somebody fixes them and calls again.
PATIENCE_S = 0.0
MAX_SAMPLES = 3
INSTALL = "pip install --require-hashes -r requirements/trainer.txt"
_ONLY_IN_A_CLUSTER = ("suspend", "activeDeadlineSeconds", "runtime", "ttlSecondsAfterFinished")
MAX_SAMPLE_CHARS = 400


def run(path: Path, work_dir: Path | None, console: Console) -> int:
    """Run a job to its end, or go on with it; returns the exit code. Raises CommandError for what cannot start."""
    job = load_job(path)
    if wrong := problems(job):
        raise CommandError("\n".join([f"{path} is refused:", *(f"  {line}" for line in wrong)]), Exit.USAGE)
    if importlib.util.find_spec("torch") is None:
        raise CommandError(f"training needs more packages: {INSTALL}, in a checkout", Exit.USAGE)
    uid = local.local_uid(path, job)
    folder = work_dir.resolve() if work_dir else local.default_work_dir(path, job)
    with local.locked(folder) as lock, Stop(lambda times: _say_stopping(console, stop, times)) as stop:
        state = local.load_state(folder, uid, datetime.now(UTC))
        config = _config(job, state, folder)
        config_file = folder / "run.json"
        config_file.write_text(config.to_json())
        console.print(
            f"[bold]{config.job.name}[/] works in {escape(f'{folder} and writes to {config.run_uri}')}", soft_wrap=True
        )
        if idle := [name for name in _ONLY_IN_A_CLUSTER if job["spec"].get(name)]:
            console.print(f"[yellow]Note[/]    only a cluster heeds {', '.join(f'spec.{name}' for name in idle)}")
        if not stop.hears_ctrl_c:
            console.print(
                f"It runs in the background: {_how_to_stop(stop)} stops it once what is done is saved, not Ctrl-C"
            )
        stage_run = StageRun(config, config_file, Stage.PREPARE, 0, None, folder / "log", lock.fileno())
        attempts: tuple[AttemptStatus, ...] = ()
        while True:
            earlier = state.plan_digest is not None
            if earlier:
                show.show_prepared_earlier(console)
            else:
                ran = _with_retries(stage_run, state, attempts, stop, console)
                state, attempts, result = ran.state, ran.attempts, ran.result
                if result.exit_code != 0 or result.plan is None or result.data is None:
                    return _failed(result, stop, folder, console)
                show.show_prepared(console, result.data, result.plan)
                state = state.model_copy(update={"plan_digest": result.plan.digest})
                local.save_state(folder, state)
            policy = config.spec.start_policy
            if policy is StartPolicy.PLAN_ONLY or policy is StartPolicy.MANUAL:
                show.show_planned(console, policy)
                return Exit.SUCCEEDED
            train = replace(stage_run, stage=Stage.TRAIN, plan_digest=state.plan_digest)
            ran = _with_retries(train, state, attempts, stop, console)
            state, attempts, result = ran.state, ran.attempts, ran.result
            if result.exit_code == 0:
                break
            if ran.prepare_again:
                show.show_outdated(console)
            elif earlier and _is_gone(result, config):
                show.show_gone(console, config.run_uri)
            else:
                return _failed(result, stop, folder, console)
            state = state.model_copy(update={"plan_digest": None})
            local.save_state(folder, state)
    show.show_success(console, result, _samples(config, result), layout.join(config.run_uri, layout.METRICS))
    if earlier and (changed := _changed_data(config, state.plan_digest)):
        show.show_changed_data(console, changed)
    return Exit.SUCCEEDED


def _config(job: dict[str, Any], state: local.State, folder: Path) -> RunConfig:
    try:
        return local.run_config(job, state, folder, local.this_machine(folder), os.environ)
    except ValidationError as error:  # such as a very long path, or no free disk
        field, problem = first_problem(error)
        raise CommandError(f"this machine cannot run it, {field}: {problem}", Exit.USAGE) from error


def _is_gone(result: RunResult, config: RunConfig) -> bool:
    """Whether what prepare wrote is no longer there: somebody has emptied the output, or the bucket."""
    prepared = layout.join(config.run_uri, layout.JOB)[:256]  # arguments of a fault are no longer
    return result.fault is Fault.OBJECT_NOT_FOUND and str(result.args.get("uri")).startswith(prepared)


@dataclass(frozen=True)
class _Ran:
    """Where the attempts at a stage have led."""

    state: local.State
    attempts: tuple[AttemptStatus, ...]  # of this call, all stages: an earlier call's failures were a person's to judge
    result: RunResult
    prepare_again: bool = False  # the plan was of another release: prepare comes next, then another attempt


def _with_retries(
    run: StageRun, state: local.State, attempts: tuple[AttemptStatus, ...], stop: Stop, console: Console
) -> _Ran:
    """Make attempts until one succeeds, the retry rule ends the job, or we are asked to stop."""
    limits = retry.Limits.of(run.config.spec.recovery, PATIENCE_S)
    folder = Path(run.config.work_dir)
    while True:
        state = state.next_attempt(run.stage)
        attempt = state.attempts[run.stage]
        if attempt > MAX_ATTEMPTS:
            raise CommandError(f"{attempt - 1} attempts are enough; change the job", Exit.FAILED)
        local.save_state(folder, state)
        run = replace(run, attempt=attempt, log_file=log_file(folder, run.stage, attempt))
        with show.StageView(console, run.stage, attempt) as view:
            result = run_stage(run, stop, view.update)
        attempts = (*attempts, _ended(result, attempts))
        failures = sum(each.attempt_class == "Failure" for each in attempts)
        over = result.exit_code == 0 or retry.job_end(attempts, failures=failures, waited_s=0, limits=limits)
        if not (stop.requested or over) and retry.is_prepared_again(run.stage, result.exit_code):
            return _Ran(state, attempts, result, prepare_again=True)
        if stop.requested or over:
            return _Ran(state, attempts, result)
        delay_s = retry.delay_s(attempts)
        show.show_retry(console, result, failures, limits.max_retries, delay_s)
        stop.pause(delay_s)
        if stop.requested:
            return _Ran(state, attempts, result)


def _ended(result: RunResult, earlier: tuple[AttemptStatus, ...]) -> AttemptStatus:
    ended_as = "Succeeded" if result.exit_code == 0 else retry.failure_class(result.stage, result.exit_code, earlier)
    return AttemptStatus.model_validate(
        {
            "number": result.attempt,
            "stage": result.stage.value,
            "class": ended_as,
            "reason": reason_of_exit(result.exit_code).value,
            "exit_code": result.exit_code,
        }
    )


def log_file(folder: Path, stage: Stage, attempt: int) -> Path:
    """Where everything the stage prints goes; the trainer's own log lies beside it."""
    return folder / "logs" / f"{stage.value}-{attempt}.console"


def _failed(result: RunResult, stop: Stop, folder: Path, console: Console) -> int:
    if stop.requested:
        step = f" at step {result.step}" if result.step else ""
        place = "the beginning of prepare"
        if result.stage is Stage.TRAIN:  # where it was killed, nobody told whether it had saved one
            place = "the last checkpoint" if result.checkpoint else "the last checkpoint, if one was saved"
        console.print(f"[yellow]Stopped[/]{step}; the same command goes on from {place}")
        return Exit.INTERRUPTED
    show.show_failure(console, result, str(log_file(folder, result.stage, result.attempt)))
    return result.exit_code


def _how_to_stop(stop: Stop) -> str:
    return "Ctrl-C" if stop.hears_ctrl_c else f"`kill {os.getpid()}`"


def _say_stopping(console: Console, stop: Stop, times: int) -> None:
    again = f"Stopping once what is done is saved; {_how_to_stop(stop)} again stops at once"
    console.print(again if times == 1 else "Stopping at once")


def _changed_data(config: RunConfig, plan_digest: str | None) -> list[str]:
    """Files that are not what prepare read; none when it cannot be told, as the adapter counts.

    Asked at the end, when storage is known to answer: it could keep us waiting for minutes, deaf to Ctrl-C."""
    from finetune_trainer.data.listing import changed_files
    from finetune_trainer.methods import method_of
    from finetune_trainer.runplan import read_plan
    from finetune_trainer.store import open_store

    store = open_store(config.storage)
    try:
        planned = read_plan(store, config.run_uri, plan_digest).plan.inputs
        takes_documents = method_of(config.spec.method.type).takes_documents
        return changed_files(store, config.spec.datasets, planned, takes_documents=takes_documents)
    except StageError:
        return []


def _samples(config: RunConfig, result: RunResult) -> list[dict[str, str]]:
    """Answers of base and tuned model from eval.json; none when it cannot be read, as the adapter counts."""
    from finetune_trainer.store import open_store  # here, as `finetune wait` needs no storage

    if result.artifact is None:
        return []
    try:
        content, _etag = open_store(config.storage).read(layout.join(result.artifact.uri, "eval.json"))
        found = cast(list[dict[str, Any]], json.loads(content)["samples"])
        return [
            {
                "prompt": sample["prompt"][-MAX_SAMPLE_CHARS:],
                "base": sample["base"]["text"][:MAX_SAMPLE_CHARS],
                "tuned": sample["tuned"]["text"][:MAX_SAMPLE_CHARS],
            }
            for sample in found[:MAX_SAMPLES]
        ]
    except (StageError, ValueError, KeyError, TypeError):
        return []
