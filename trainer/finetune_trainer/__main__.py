"""One attempt of one stage: `python -m finetune_trainer {prepare|train} --config … --attempt N --result FILE`.

Run by the supervisor, which turns the result file and the exit code into the container's end.
"""

import argparse
import logging
import os
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry

from finetune_api import layout
from finetune_api.errors import StageError
from finetune_api.names import PORT_FILE, Stage
from finetune_api.reasons import Fault
from finetune_api.run import RunConfig, RunResult
from finetune_trainer import config as run_config
from finetune_trainer import logs, results
from finetune_trainer.context import StageContext
from finetune_trainer.patience import best_effort
from finetune_trainer.serve import Reporter
from finetune_trainer.stop import StopFlag, release
from finetune_trainer.store import open_store

log = logging.getLogger(__name__)

_LAST_UPLOAD_S = 60.0


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    stage: Stage
    config: Path
    attempt: int
    config_digest: str | None
    plan_digest: str | None
    result: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stage and writes its result; returns the exit code."""
    arguments = parse(argv)
    results.reserve(arguments.result)
    try:
        config = run_config.load(arguments.config, arguments.config_digest)
    except StageError as error:
        result = results.failed(arguments.stage, arguments.attempt, error, None, None)
        print(error, file=sys.stderr)  # noqa: T201 (there is no log yet)
    else:
        result = run(arguments, config)
    results.write(result, arguments.result)
    return result.exit_code


def parse(argv: Sequence[str] | None) -> Arguments:
    parser = argparse.ArgumentParser(prog="python -m finetune_trainer", description=__doc__)
    parser.add_argument("stage", type=Stage, choices=list(Stage))
    parser.add_argument("--config", type=Path, required=True, help="RunConfig as JSON")
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--config-digest", help="the digest of that file, as the operator wrote it")
    parser.add_argument("--plan-digest", help="train: the digest that prepare reported")
    parser.add_argument("--result", type=Path, required=True, help="where the RunResult goes")
    return Arguments(**vars(parser.parse_args(argv)))


def run(arguments: Arguments, config: RunConfig) -> RunResult:
    """One attempt from its first log line to its verdict."""
    stage, attempt = arguments.stage, arguments.attempt
    stop = StopFlag(config.grace_period_s)
    if stage is Stage.TRAIN:
        stop.install()  # before anything slow: a stop while loading must not kill
    release()  # prepare ends by the signal itself: whatever it has written so far, it writes again
    work_dir = Path(config.work_dir)
    log_file = work_dir / "logs" / f"{stage.value}-{attempt}.jsonl"
    log_prefix = layout.join(config.run_uri, layout.LOGS)
    log_uri = layout.join(log_prefix, log_file.name)
    reporter = Reporter(stage, attempt, CollectorRegistry())
    try:
        logs.configure(f"{config.job.namespace}/{config.job.name}", stage, attempt, not sys.stderr.isatty(), log_file)
        store = open_store(config.storage)
        context = StageContext(
            config=config,
            stage=stage,
            attempt=attempt,
            pod_uid=os.environ.get("POD_UID") or str(uuid.uuid4()),
            plan_digest=arguments.plan_digest,
            work_dir=work_dir,
            store=store,
            reporter=reporter,
            result_file=arguments.result,
        )
        uploader = logs.Uploader(store, log_prefix, [log_file])
        try:
            return _run(context, stop, log_uri)
        finally:
            uploader.close(min(_LAST_UPLOAD_S, stop.remaining_s()))
    except (StageError, OSError) as error:  # before there is a context: scratch or credentials are not usable
        known = error if isinstance(error, StageError) else results.of_unexpected(error)
        log.error("%s", known)
        return results.failed(stage, attempt, known, None, None)
    finally:
        reporter.close()


def _run(context: StageContext, stop: StopFlag, log_uri: str) -> RunResult:
    _serve(context)
    log.info("%s attempt %d starts", context.stage.value, context.attempt)
    try:
        result = _stage(context, stop)
    except StageError as error:
        known = results.for_stage(error, context.stage)
        log.error("%s", known)
    except Exception as error:
        log.critical("unexpected %s", type(error).__name__, exc_info=error)
        known = results.of_unexpected(error)
    else:
        return result.model_copy(update={"log_uri": log_uri})
    return results.failed(context.stage, context.attempt, known, context.reporter.progress(), log_uri)


def _stage(context: StageContext, stop: StopFlag) -> RunResult:
    # Imported here: prepare must not pay for torch, and an import that fails is reported like any other bug.
    if context.stage is Stage.PREPARE:
        from finetune_trainer import prepare

        return prepare.run(context)
    if stop.is_set():  # torch takes seconds to import
        raise StageError(Fault.STOPPED)
    from finetune_trainer import train

    return train.run(context, stop)


def _serve(context: StageContext) -> None:
    try:
        port = context.reporter.start(context.config.http_port)
    except OSError as error:
        log.warning("no /progress and /metrics: port %d: %s", context.config.http_port, error.strerror)
    else:
        log.info("/progress and /metrics on port %d", port)
        with best_effort(f"{PORT_FILE} cannot be written"):
            (context.work_dir / PORT_FILE).write_text(f"{port}\n")


if __name__ == "__main__":
    sys.exit(main())
