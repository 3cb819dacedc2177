"""The operator and `finetune run` make the same attempts, and wait as long between them, whatever a stage ends with."""

import io
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import spec_cases
from finetune_api.defaults import MAX_RETRIES
from finetune_api.names import Stage
from finetune_api.reasons import EXIT_CODES, FAULTS, Fault, Reason
from finetune_api.reference import page
from finetune_api.run import RunResult
from finetune_api.status import DataStatus, FineTuneJobStatus, PlanStatus
from finetune_cli import run, stages
from finetune_operator.decide import decide
from finetune_operator.decision import CreateK8sJob
from finetune_operator.job_reader import is_finished, read_job
from finetune_operator.observation import CreatedK8sJob, Observation
from finetune_operator.observed import ObservedK8sJob, ObservedPod
from status_samples import DATA, PLAN

FAULT_OF = {FAULTS[fault].reason: fault for fault in Fault}
FAILURES = [reason for reason in EXIT_CODES if reason is not Reason.COMMITTED]
# Only the operator waits: a missing Secret or grant may be on its way to the cluster, but at a terminal somebody fixes
# it and calls again.
WAITED_FOR = {(Stage.PREPARE, Reason.DATA_NOT_FOUND), (Stage.PREPARE, Reason.ACCESS_DENIED)}
MAX_ROUNDS = 100
Plays = dict[Stage, list[Reason]]  # with what each stage's attempts end, the last one again and again
Played = list[tuple[Stage, float]]  # every attempt of a job, and the seconds waited before it


def ended(stage: Stage, attempt: int, plays: Plays) -> RunResult:
    """Return the attempt's result: prepared, where its stage plays nothing."""
    reason = plays.get(stage, [Reason.COMMITTED])[min(attempt, len(plays.get(stage, [Reason.COMMITTED]))) - 1]
    if reason is Reason.COMMITTED:
        plan, data = PlanStatus.model_validate(PLAN), DataStatus.model_validate(DATA)
        return RunResult(stage=stage, attempt=attempt, fault=Fault.PREPARED, exit_code=0, plan=plan, data=data)
    return RunResult(stage=stage, attempt=attempt, fault=FAULT_OF[reason], exit_code=EXIT_CODES[reason])


def by_operator(plays: Plays, spec: dict[str, Any]) -> Played:
    """Run a job whose pods end at once, on a clock that goes on as far as the operator asks to wait."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    body: dict[str, Any] = {
        "metadata": {"name": "bot", "namespace": "a", "uid": "1a2b3c4d", "generation": 1},
        "spec": spec,
    }
    jobs: list[ObservedK8sJob] = []
    pods: list[ObservedPod] = []
    played: Played = []
    waited_s = 0.0
    last: CreatedK8sJob | None = None
    for _ in range(MAX_ROUNDS):
        made = decide(read_job(body), Observation(tuple(jobs), tuple(pods), created=last), now)
        body["status"] = made.status.model_dump(mode="json", by_alias=True, exclude_none=True)
        if is_finished(FineTuneJobStatus.model_validate(body["status"])):
            return played
        created = [action for action in made.actions if isinstance(action, CreateK8sJob)]
        for action in created:
            name, result = f"{action.stage}-{action.attempt}", ended(action.stage, action.attempt, plays)
            outcome = "Failed" if result.exit_code else "Complete"
            jobs.append(ObservedK8sJob(name, name, action.stage, action.attempt, now, outcome=outcome, finished_at=now))
            pod = ObservedPod(name, name, action.stage, action.attempt, now, phase="Failed", started_at=now)
            pods.append(replace(pod, exit_code=result.exit_code, finished_at=now, result=result, owner_uid=name))
            last = CreatedK8sJob(action.stage, action.attempt, name)
            jobs[-1] = replace(jobs[-1], proof=name)
            played.append((action.stage, waited_s))
            waited_s = 0.0
        if not created and made.requeue_after_s:
            waited_s += made.requeue_after_s
            now += timedelta(seconds=made.requeue_after_s)
    raise AssertionError(f"no end: {played}")


def by_cli(plays: Plays, spec: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Played:
    played: Played = []
    waits: list[float] = []

    def run_stage(stage_run: stages.StageRun, *_: object) -> RunResult:
        played.append((stage_run.stage, sum(waits)))
        waits.clear()
        return ended(stage_run.stage, stage_run.attempt, plays)

    def pause(_: stages.Stop, seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(run, "run_stage", run_stage)
    monkeypatch.setattr(stages.Stop, "pause", pause)
    folder.mkdir()
    (folder / "job.yaml").write_text(json.dumps(spec_cases.base() | {"spec": spec}))
    run.run(folder / "job.yaml", None, Console(file=io.StringIO()))
    return played


def spec_with(recovery: dict[str, Any]) -> dict[str, Any]:
    return spec_cases.base()["spec"] | ({"recovery": recovery} if recovery else {})


@pytest.mark.parametrize("recovery", [{}, {"maxRetries": 0}, {"maxRetries": 6}], ids=str)
@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize("reason", FAILURES)
def test_operator_and_cli_try_alike(
    stage: Stage, reason: Reason, recovery: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = spec_with(recovery)
    plays = {stage: [reason]}
    of_operator = by_operator(plays, spec)
    of_cli = by_cli(plays, spec, tmp_path / "cli", monkeypatch)
    if (stage, reason) in WAITED_FOR:
        assert len(of_operator) > 10
        assert len(of_cli) == 1
    else:
        assert of_cli == of_operator


MIXED: list[Plays] = [
    {Stage.PREPARE: [Reason.UNKNOWN, Reason.UNKNOWN, Reason.COMMITTED], Stage.TRAIN: [Reason.STORAGE_TRANSIENT]},
    {Stage.PREPARE: [Reason.HOST_OOM, Reason.COMMITTED], Stage.TRAIN: [Reason.HOST_OOM]},
    {Stage.TRAIN: [Reason.HOST_OOM, Reason.GPU_FAULT, Reason.HOST_OOM]},
    {Stage.TRAIN: [Reason.SUPERSEDED, Reason.DIVERGED]},
]


@pytest.mark.parametrize("plays", MIXED, ids=str)
def test_operator_and_cli_count_over_the_whole_job(plays: Plays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = spec_with({})
    assert by_cli(plays, spec, tmp_path / "cli", monkeypatch) == by_operator(plays, spec)


def test_retries_are_those_of_the_job_and_not_of_each_stage():
    plays = MIXED[0]
    assert [stage for stage, _ in by_operator(plays, spec_with({}))].count(Stage.TRAIN) == 2


@pytest.mark.parametrize("reason", FAILURES)
def test_the_page_of_reasons_says_how_often_is_tried(reason: Reason):
    rows = [line.split(" | ") for line in page().splitlines() if f" | `{reason}` | " in line]
    said = {row[2] for row in rows}
    in_prepare, in_train = (len(by_operator({stage: [reason]}, spec_with({}))) for stage in Stage)
    in_train -= 1  # prepare went well
    if said == {"no: change something first"}:
        assert (in_prepare, in_train) == (1, 1)
    elif said == {"once in each stage, counted by `recovery.maxRetries`"}:
        assert (in_prepare, in_train) == (2, 2)
    elif said == {"yes, counted by `recovery.maxRetries`"}:
        assert (in_prepare, in_train) == (1 + MAX_RETRIES, 1 + MAX_RETRIES)
    elif said == {"yes, from prepare on; counted by `recovery.maxRetries` from the second time on"}:
        tried = [stage for stage, _ in by_operator({Stage.TRAIN: [reason]}, spec_with({}))]
        assert tried == [Stage.PREPARE, Stage.TRAIN] * (2 + MAX_RETRIES)
    else:
        assert said == {"in prepare for 15 minutes (`finetune run`: no), in train no"}
        assert (in_prepare > 10, in_train) == (True, 1)
