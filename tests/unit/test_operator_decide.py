"""The specification of `decide`: what the operator does and says in every state of the fault table."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from finetune_api.names import MAX_NAME_LENGTH, Stage, child_name
from finetune_api.reasons import EXIT_CODES, FAULTS, Fault, Reason
from finetune_api.run import Progress, RunResult
from finetune_api.status import FINAL_PHASES, Artifact, ConditionType, Phase
from finetune_operator.clock import format_time
from finetune_operator.close_attempts import wants_live_pods
from finetune_operator.decide import PARENT_ASKED_EVERY_S, decide
from finetune_operator.decision import CreateK8sJob, DeleteK8sJob, JobEvent, SetK8sJobTtl
from finetune_operator.job_reader import FineTuneJob, read_job
from finetune_operator.observation import Blocked, CreatedK8sJob, Observation, PodAnswer, PodSilence
from finetune_operator.observed import ObservedK8sJob, ObservedPod, as_gone
from finetune_operator.parent_job import ParentJob
from status_samples import ARTIFACT, CHECKPOINT, DATA, DIGEST, PLAN, SPEC

START = datetime(2026, 1, 1, tzinfo=UTC)
PREPARE, TRAIN = Stage.PREPARE, Stage.TRAIN


def report(stage: Stage, attempt: int, fault: Fault, **more: Any) -> RunResult:
    code = EXIT_CODES[FAULTS[fault].reason]
    return RunResult.model_validate({"stage": stage, "attempt": attempt, "fault": fault, "exit_code": code, **more})


def heard(progress: Progress, at: datetime) -> PodAnswer:
    """The answer of a pod of the attempt's own Kubernetes Job."""
    return PodAnswer(progress, at, f"uid-{progress.stage.value}-{progress.attempt}")


class World:
    """A cluster of one FineTuneJob: does what `plan` asks for, and is told what becomes of the pods."""

    def __init__(self, **spec: Any) -> None:
        self.now = START
        self.spec = SPEC | spec
        self.meta: dict[str, Any] = {"name": "bot", "namespace": "team-a", "uid": "1a2b3c4d", "generation": 1}
        self.status: dict[str, Any] = {}
        self.jobs: dict[str, ObservedK8sJob] = {}
        self.pods: dict[str, ObservedPod] = {}
        self.progress: PodAnswer | None = None
        self.strangers: tuple[PodAnswer, ...] = ()  # of pods that somebody else made
        self.silence: PodSilence | None = None
        self.blocked: Blocked | None = None
        self.runtime_changed = False
        self.parent: ParentJob | None = None
        self.events: list[JobEvent] = []
        self.writes = 0
        self.created: list[str] = []
        self.last_created: CreatedK8sJob | None = None
        self.requeue_after_s: float | None = None

    @property
    def view(self) -> FineTuneJob:
        return read_job({"metadata": self.meta, "spec": self.spec, "status": self.status})

    @property
    def seen(self) -> Observation:
        jobs, pods = tuple(self.jobs.values()), tuple(self.pods.values())
        return Observation(
            jobs,
            pods,
            self.strangers + ((self.progress,) if self.progress is not None else ()),
            self.blocked,
            silences=(self.silence,) if self.silence is not None else (),
            created=self.last_created,
            runtime_changed=self.runtime_changed,
            parent=self.parent,
            pods_listed=True,
        )

    def step(self, after_s: float = 0) -> "World":
        """Plan and apply until nothing changes any more."""
        self.now += timedelta(seconds=after_s)
        for _ in range(8):
            made = decide(self.view, self.seen, self.now)
            dumped = made.status.model_dump(mode="json", by_alias=True, exclude_none=True)
            changed = dumped != self.status
            self.status, self.requeue_after_s = dumped, made.requeue_after_s
            if changed:
                self.writes += 1
                self.events += made.events
                assert all(event.message for event in made.events), "an event without words tells nobody anything"
            acted = False
            for action in made.actions:
                acted = True
                match action:
                    case CreateK8sJob(stage, attempt, _):
                        if self.blocked is None:
                            self._create(stage, attempt)
                    case DeleteK8sJob(name, _):
                        self.jobs[name] = replace(self.jobs[name], deleting=True)
                    case SetK8sJobTtl(name, _, seconds):
                        self.jobs[name] = replace(self.jobs[name], ttl_seconds=seconds)
            if not changed and (not acted or self.blocked is not None):
                return self
        raise AssertionError(f"does not settle: {self.status}")

    def _create(self, stage: Stage, attempt: int) -> None:
        name = f"{stage.value}-{attempt}"
        assert name not in self.jobs
        assert not any(job.live for job in self.jobs.values()), "two live Jobs"
        self.created.append(name)
        self.jobs[name] = ObservedK8sJob(name, f"uid-{name}", stage, attempt, self.now, proof=f"proof of {name}")
        self.last_created = CreatedK8sJob(stage, attempt, f"proof of {name}")
        self.status["record"]["runDigest"] = DIGEST  # as the shell notes it

    def pod(self, name: str, number: int = 0, **fields: Any) -> "World":
        """Create or change a pod of the Job `name`."""
        job, key = self.jobs.get(name), f"{name}-{number}"
        stage, attempt = name.split("-")
        born = job.created_at if job else self.now
        new = ObservedPod(key, f"uid-{key}", Stage(stage), int(attempt), born, gpus=int(stage == TRAIN))
        new = replace(new, owner_uid=f"uid-{name}")
        old = self.pods.get(key) or new
        self.pods[key] = replace(old, **fields)
        return self

    def run(self, name: str, number: int = 0) -> "World":
        return self.pod(name, number, scheduled=True, phase="Running", started_at=self.now, ip="10.0.0.1").step()

    def end(
        self, name: str, number: int = 0, fault: Fault | None = None, code: int | None = None, **more: Any
    ) -> "World":
        """The pod's container ends, and the Job with it; with `fault`, it leaves a report."""
        stage, attempt = name.split("-")
        fields = {key: more.pop(key) for key in ("disrupted", "evicted", "oom_killed", "bad_result") if key in more}
        said = report(Stage(stage), int(attempt), fault, **more) if fault is not None else None
        exit_code = said.exit_code if said is not None and code is None else code
        phase = "Succeeded" if exit_code == 0 else "Failed"
        self.pod(
            name, number, scheduled=True, phase=phase, finished_at=self.now, exit_code=exit_code, result=said, **fields
        )
        if name in self.jobs:
            outcome = "Complete" if exit_code == 0 else "Failed"
            self.jobs[name] = replace(self.jobs[name], outcome=outcome, finished_at=self.now)
        return self

    def gone(self, name: str) -> "World":
        """The Job and its pods are deleted; pods are remembered in their last state."""
        self.jobs.pop(name, None)
        self.pods = {k: as_gone(p) if k.startswith(name) else p for k, p in self.pods.items()}
        return self

    def prepared(self) -> "World":
        """At the moment when the train Job has been created."""
        return self.step().run("prepare-1").end("prepare-1", fault=Fault.PREPARED, plan=PLAN, data=DATA).step()

    def training(self) -> "World":
        return self.prepared().run("train-1")

    def say(self, attempt: int = 1, **progress: Any) -> "World":
        """The running training pod answers."""
        fields = {"stage": TRAIN, "attempt": attempt, "activity": "Training", "total_steps": 40} | progress
        self.progress = heard(Progress.model_validate(fields), self.now)
        return self

    def condition(self, kind: ConditionType) -> tuple[str, str]:
        found = next(c for c in self.status["conditions"] if c["type"] == kind)
        return found["status"], found["reason"]

    def message(self, kind: ConditionType) -> str:
        return next(c for c in self.status["conditions"] if c["type"] == kind)["message"]

    @property
    def phase(self) -> str:
        return self.status["phase"]

    @property
    def verdict(self) -> tuple[str, str]:
        return self.condition(ConditionType.SUCCEEDED)

    @property
    def last(self) -> dict[str, Any]:
        return self.status["attempts"][-1]

    def reasons(self) -> list[str]:
        return [event.reason.value for event in self.events]


def test_a_new_job_is_accepted_and_gets_a_prepare_job():
    world = World().step()
    assert world.created == ["prepare-1"]
    assert world.phase == Phase.PENDING
    assert world.condition(ConditionType.READY) == ("True", "Accepted")
    assert world.condition(ConditionType.PLANNED) == ("Unknown", "Preparing")
    assert world.reasons() == ["Accepted"]


def test_the_attempt_is_written_before_its_job_is_created():
    made = decide(World().view, Observation(), START)
    assert [(a.stage, a.number, a.attempt_class) for a in made.status.attempts] == [("prepare", 1, "Running")]
    assert made.actions == (CreateK8sJob(PREPARE, 1),)


def test_an_operator_killed_before_the_job_was_created_creates_it_after_the_restart():
    world = World()
    made = decide(world.view, Observation(), START)
    world.status = made.status.model_dump(mode="json", by_alias=True, exclude_none=True)
    world.step()
    assert world.created == ["prepare-1"]
    assert len(world.status["attempts"]) == 1


def test_a_kubernetes_job_that_the_operator_did_not_create_is_removed_and_never_believed():
    world = World()
    world.jobs["prepare-1"] = ObservedK8sJob("prepare-1", "forged", PREPARE, 1, START)
    world.step()
    assert world.jobs["prepare-1"].deleting
    assert world.created == []  # two writers at a time are never wanted, whoever made the first
    del world.jobs["prepare-1"]
    world.step()
    assert world.created == ["prepare-1"]


def test_an_ended_kubernetes_job_of_somebody_else_does_not_keep_an_attempt_from_its_name():
    world = World()
    world.jobs["prepare-1"] = ObservedK8sJob("prepare-1", "forged", PREPARE, 1, START, outcome="Complete")
    made = decide(world.view, world.seen, world.now)
    world.status = made.status.model_dump(mode="json", by_alias=True, exclude_none=True)
    number = made.status.attempts[-1].number
    assert number == 2  # a number that nobody has used
    world.jobs["prepare-2"] = ObservedK8sJob("prepare-2", "forged too", PREPARE, 2, START, outcome="Complete")
    again = decide(world.view, world.seen, world.now)
    assert DeleteK8sJob("prepare-2", "forged too") in again.actions


def test_a_success_counts_only_from_pods_of_the_job_whose_uid_the_status_holds():
    forged = {"scheduled": True, "started_at": START, "exit_code": 0, "phase": "Succeeded", "finished_at": START}
    told = report(PREPARE, 1, Fault.PREPARED, plan=PLAN, data=DATA)
    world = World().step().run("prepare-1")
    assert world.last["jobUid"] == "uid-prepare-1"
    world.pod("prepare-1", 1, **forged, result=told, owner_uid="uid-of-another").step()
    assert world.view.status.plan is None
    world.jobs["prepare-1"] = replace(world.jobs["prepare-1"], uid="uid-of-another", outcome="Complete")
    world.step()
    assert world.view.status.plan is None


def test_an_operator_that_forgot_the_job_it_created_before_its_pod_was_scheduled_makes_it_anew():
    world = World().step()
    world.last_created = None  # killed before the status held its UID
    world.step()
    assert world.jobs["prepare-1"].deleting
    del world.jobs["prepare-1"]
    world.step().run("prepare-1")
    assert world.created == ["prepare-1", "prepare-1"]
    assert (world.last["number"], world.last["class"]) == (1, "Running")
    world.last_created = None  # from now on the status knows
    world.step()
    assert not world.jobs["prepare-1"].deleting


def test_a_job_whose_pod_ran_while_no_operator_did_is_known_by_its_proof():
    world = World().step()
    world.last_created = None
    world.status["attempts"][0]["jobProof"] = "sha256:" + hashlib.sha256(b"secret").hexdigest()
    world.jobs["prepare-1"] = replace(world.jobs["prepare-1"], proof="secret")
    world.run("prepare-1")
    assert not world.jobs["prepare-1"].deleting
    assert world.last["jobUid"] == "uid-prepare-1"
    assert "jobProof" not in world.last
    world.jobs["prepare-1"] = replace(world.jobs["prepare-1"], uid="uid-of-a-copy")  # the proof is no secret any more
    world.step()
    assert world.jobs["prepare-1"].deleting


def test_a_job_of_an_operator_that_kept_no_uids_goes_on():
    world = World().step().run("prepare-1")
    del world.status["record"]["runDigest"], world.status["attempts"][0]["jobUid"]
    world.last_created = None
    world.step().end("prepare-1", fault=Fault.PREPARED, plan=PLAN, data=DATA).step()
    assert world.created == ["prepare-1", "train-1"]


def test_an_attempt_that_waits_is_given_up_for_one_with_the_mended_runtime():
    world = World().step().pod("prepare-1", scheduled=True, waiting_reason="ErrImagePull").step(60)
    assert world.condition(ConditionType.DEGRADED) == ("True", "ImagePull")
    world.runtime_changed = True
    world.step()
    assert world.jobs["prepare-1"].deleting
    world.runtime_changed = False
    del world.jobs["prepare-1"]
    world.pod("prepare-1", gone=True).step()
    assert world.created == ["prepare-1", "prepare-2"]
    assert world.status["attempts"][0]["class"] == "Superseded"
    assert world.status["failures"] == 0


def test_an_attempt_that_a_queue_holds_keeps_its_place_whatever_the_runtime_is_by_then():
    world = World().step()
    world.jobs["prepare-1"] = replace(world.jobs["prepare-1"], suspended="admitted by no queue yet")
    world.runtime_changed = True
    world.step(60)
    assert world.condition(ConditionType.ADMITTED) == ("False", "JobSuspended")
    assert not world.jobs["prepare-1"].deleting


def test_an_attempt_that_runs_is_not_given_up_for_another_runtime():
    world = World().step().run("prepare-1")
    world.runtime_changed = True
    world.step()
    assert not world.jobs["prepare-1"].deleting


@pytest.mark.parametrize("reason", ["ErrImagePull", "ImagePullBackOff"])
def test_an_image_that_cannot_be_pulled_is_waited_for_as_long_as_it_takes(reason: str):
    world = World().step().pod("prepare-1", scheduled=True, waiting_reason=reason).step(60).step(7 * 86400)
    assert "cannot be pulled" in world.message(ConditionType.DEGRADED)
    assert world.condition(ConditionType.DEGRADED) == ("True", "ImagePull")
    assert world.condition(ConditionType.FINISHED) == ("False", "Preparing")


def test_preparing_shows_once_the_pod_runs():
    world = World().step().run("prepare-1")
    assert world.phase == Phase.PREPARING
    assert world.condition(ConditionType.RUNNING) == ("True", "Preparing")
    assert world.condition(ConditionType.ADMITTED)[0] == "True"


def test_a_prepared_job_shows_plan_and_data_and_trains_what_was_prepared():
    world = World().step().run("prepare-1").end("prepare-1", fault=Fault.PREPARED, plan=PLAN, data=DATA, step=0)
    made = decide(world.view, world.seen, world.now)
    assert made.actions == (CreateK8sJob(TRAIN, 1, DIGEST),)
    world.step()
    assert world.status["plan"]["steps"] == 100
    assert world.status["data"]["rowsUsed"] == 9
    prepared = world.status["attempts"][0]
    assert (prepared["class"], prepared["reason"], prepared.get("lastStep")) == ("Succeeded", "Prepared", None)
    assert world.condition(ConditionType.PLANNED) == ("True", "Prepared")
    assert "10 rows: 9 to train on, 1 held out" in world.message(ConditionType.PLANNED)


def test_a_pod_that_has_ended_changes_nothing_until_its_job_has():
    world = World().training()
    before = dict(world.status)
    world.pod("train-1", phase="Succeeded", finished_at=START, exit_code=0).step(after_s=1)
    assert world.status == before


def test_a_committed_adapter_is_success():
    world = World().training().end("train-1", fault=Fault.COMMITTED, artifact=ARTIFACT, step=100).step()
    assert world.phase == Phase.SUCCEEDED
    assert world.verdict == ("True", "Succeeded")
    assert world.condition(ConditionType.FINISHED) == ("True", "Succeeded")
    assert world.condition(ConditionType.RUNNING) == ("False", "Succeeded")
    assert world.status["artifacts"][0]["digest"] == DIGEST
    assert world.status["progress"]["percentage"] == 100
    assert world.reasons() == ["Accepted", "Preparing", "Prepared", "Training", "Succeeded"]


def test_gpu_seconds_are_those_of_the_training_pods():
    world = World().training()
    world.now += timedelta(seconds=90)
    world.end("train-1", fault=Fault.COMMITTED, artifact=ARTIFACT).step()
    assert world.status["usage"] == {"seconds": 90, "gpuSeconds": 90}


def test_gpu_seconds_of_an_attempt_whose_job_was_deleted_count_too():
    world = World().training()
    world.spec["suspend"] = True
    world.step(after_s=60).end("train-1", fault=Fault.INTERRUPTED).gone("train-1").step()
    assert world.status["usage"]["gpuSeconds"] == 60


def test_gpu_seconds_of_the_attempt_that_the_deadline_stops_count_too():
    world = World(activeDeadlineSeconds=3600).training().step(after_s=3600)
    assert world.verdict == ("False", "DeadlineExceeded")
    assert world.status["usage"] == {"seconds": 3600, "gpuSeconds": 3600}


def test_the_ttl_is_put_on_the_jobs_only_after_the_verdict_is_stored():
    world = World(ttlSecondsAfterFinished=60).training()
    world.end("train-1", fault=Fault.COMMITTED, artifact=ARTIFACT)
    made = decide(world.view, world.seen, world.now)
    assert made.status.phase == Phase.SUCCEEDED
    assert not any(isinstance(action, SetK8sJobTtl) for action in made.actions)
    world.step()
    assert {job.ttl_seconds for job in world.jobs.values()} == {60}


def test_a_finished_job_is_never_started_again_when_its_jobs_vanish():
    world = World().training().end("train-1", fault=Fault.COMMITTED, artifact=ARTIFACT).step()
    before = dict(world.status)
    world.gone("train-1").gone("prepare-1").step(after_s=100_000)
    assert world.status == before
    assert world.created == ["prepare-1", "train-1"]


FINAL_TRAIN = [fault for fault, text in FAULTS.items() if 10 <= EXIT_CODES[text.reason] < 30]


@pytest.mark.parametrize("fault", FINAL_TRAIN)
def test_a_final_fault_in_train_ends_the_job_with_its_reason(fault: Fault):
    world = World().training().end("train-1", fault=fault).step()
    assert world.phase == Phase.FAILED
    assert world.verdict == ("False", FAULTS[fault].reason.value)
    assert world.condition(ConditionType.STALLED)[0] == "True"
    assert world.condition(ConditionType.READY)[0] == "False"
    assert world.last["exitCode"] == EXIT_CODES[FAULTS[fault].reason]
    assert world.created == ["prepare-1", "train-1"]


def test_broken_rows_end_the_job_naming_file_and_row_and_the_log():
    args = {"file": "a.jsonl", "row": 17, "field": " field messages", "problem": "not a list", "broken": 1, "rows": 90}
    world = World().step().run("prepare-1")
    world.end("prepare-1", fault=Fault.BROKEN_ROW, args=args, log_uri="s3://out/bot/log").step()
    assert world.verdict == ("False", "DataInvalid")
    for part in ("a.jsonl row 17", "not a list", "preprocessing.onBadRow", "log: s3://out/bot/log"):
        assert part in world.message(ConditionType.SUCCEEDED)
    assert world.events[-1].type == "Warning"
    assert world.events[-1].reason == Reason.DATA_INVALID


def test_contract_skew_ends_in_prepare():
    world = World().step().run("prepare-1")
    world.end("prepare-1", fault=Fault.CONTRACT_SKEW, args={"operator": 1, "trainer": 2}).step()
    assert world.verdict == ("False", "ConfigInvalid")
    assert "contract version 1, the trainer image 2" in world.message(ConditionType.SUCCEEDED)


@pytest.mark.parametrize(
    "fault", [Fault.INTERRUPTED, Fault.STORAGE_UNAVAILABLE, Fault.STALLED, Fault.GPU_FAULT, Fault.BUG]
)
def test_a_retryable_fault_is_counted_and_tried_again(fault: Fault):
    world = World().training().end("train-1", fault=fault).step()
    assert world.created[-1] == "train-2"
    assert world.status["failures"] == 1
    assert world.status["attempts"][-2]["reason"] == FAULTS[fault].reason.value
    assert world.condition(ConditionType.RUNNING) == ("False", FAULTS[fault].reason.value)
    assert world.verdict[0] == "Unknown"


def test_retries_run_out_with_the_last_reason_in_words():
    world = World(recovery={"maxRetries": 2}).prepared()
    for attempt in (1, 2, 3):
        world.run(f"train-{attempt}")
        args = {"action": "read", "uri": "s3://d/x", "tries": 5, "seconds": 60, "problem": "503"}
        world.end(f"train-{attempt}", fault=Fault.STORAGE_UNAVAILABLE, args=args).step().step(after_s=200)
    assert world.created[-1] == "train-3"
    assert world.verdict == ("False", "RetriesExhausted")
    assert "StorageTransient" in world.message(ConditionType.SUCCEEDED)
    assert "could not read s3://d/x" in world.message(ConditionType.SUCCEEDED)


def test_later_retries_wait_before_they_start():
    world = World(recovery={"maxRetries": 9}).prepared()
    for attempt in (1, 2):
        world.run(f"train-{attempt}").end(f"train-{attempt}", code=1).step()
    assert world.created[-1] == "train-2"
    assert world.requeue_after_s == 15
    assert world.step(after_s=15).created[-1] == "train-3"


@pytest.mark.parametrize(
    ("code", "reason", "words"),
    [
        (1, "Unknown", "exit code 1"),
        (137, "Unknown", "signal SIGKILL"),
        (143, "Unknown", "signal SIGTERM"),
        (31, "StorageTransient", "code 31"),
    ],
)
def test_a_trainer_that_dies_without_a_message_is_judged_by_its_exit_code(code: int, reason: str, words: str):
    world = World().training().end("train-1", code=code).step()
    assert world.status["attempts"][-2]["reason"] == reason
    assert world.status["failures"] == 1
    assert words in world.message(ConditionType.RUNNING)


def test_an_unknown_final_exit_code_of_a_newer_trainer_is_final():
    world = World().training().end("train-1", code=29).step()
    assert world.phase == Phase.FAILED


def test_an_oom_killed_pod_is_tried_again_once_and_then_names_the_memory_limit():
    world = World().training().pod("train-1", memory_limit="16 GiB").end("train-1", code=137, oom_killed=True).step()
    assert world.created[-1] == "train-2"
    world.run("train-2").pod("train-2", memory_limit="16 GiB").end("train-2", code=137, oom_killed=True).step()
    assert world.verdict == ("False", "HostOOM")
    assert "16 GiB" in world.message(ConditionType.SUCCEEDED)


def test_a_pod_over_its_disk_limit_is_tried_again_once_and_then_ends_the_job():
    world = World().training().end("train-1", code=137, evicted=True).step()
    assert world.created[-1] == "train-2"
    world.run("train-2").end("train-2", code=137, evicted=True).step()
    assert world.verdict == ("False", "DiskLimit")


@pytest.mark.parametrize(
    "fault", [Fault.OBJECT_NOT_FOUND, Fault.BUCKET_NOT_FOUND, Fault.ACCESS_DENIED, Fault.NO_CREDENTIALS]
)
def test_missing_or_denied_storage_in_prepare_is_degraded_and_tried_again_with_a_growing_delay(fault: Fault):
    world = World().step()
    delays: list[float] = []
    for attempt in (1, 2, 3, 4):
        world.run(f"prepare-{attempt}").end(f"prepare-{attempt}", fault=fault, args={"bucket": "chat"}).step()
        assert world.condition(ConditionType.DEGRADED) == ("True", FAULTS[fault].reason.value)
        assert world.verdict[0] == "Unknown"
        assert world.requeue_after_s is not None
        delays.append(world.requeue_after_s)
        world.step(after_s=world.requeue_after_s)
    assert delays == [15, 30, 60, 60]
    assert world.status.get("failures") == 0
    assert "trying again until 2026-01-01T00:15:00Z" in world.message(ConditionType.DEGRADED)


def test_storage_that_comes_back_makes_the_job_healthy_again():
    world = World().step().run("prepare-1").end("prepare-1", fault=Fault.OBJECT_NOT_FOUND).step().step(after_s=15)
    world.run("prepare-2")
    assert world.condition(ConditionType.DEGRADED) == ("True", "DataNotFound")
    world.end("prepare-2", fault=Fault.PREPARED, plan=PLAN, data=DATA).step()
    assert world.condition(ConditionType.DEGRADED) == ("False", "Healthy")
    assert world.reasons()[-2:] == ["Prepared", "Healthy"]


def test_storage_that_stays_away_ends_the_job_after_15_minutes_with_its_reason():
    world = World().step()
    for attempt in range(1, 40):
        world.run(f"prepare-{attempt}")
        world.end(f"prepare-{attempt}", fault=Fault.ACCESS_DENIED, args={"action": "read", "uri": "s3://d/x"}).step()
        if world.phase == Phase.FAILED:
            break
        world.step(after_s=world.requeue_after_s or 0)
    assert world.verdict == ("False", "AccessDenied")
    assert "may not read s3://d/x" in world.message(ConditionType.SUCCEEDED)
    assert timedelta(minutes=15) <= world.now - START < timedelta(minutes=17)
    assert len(world.status["attempts"]) <= 10


def test_a_job_suspended_to_mend_its_storage_has_all_the_time_and_then_15_minutes_again():
    world = World().step().run("prepare-1").end("prepare-1", fault=Fault.ACCESS_DENIED).step()
    world.spec["suspend"] = True
    assert world.step().step(after_s=3600).phase == Phase.SUSPENDED
    world.spec["suspend"] = False
    world.step()
    assert world.created[-1] == "prepare-2"
    world.run("prepare-2").end("prepare-2", fault=Fault.ACCESS_DENIED).step(after_s=890)
    assert world.verdict[0] == "Unknown"
    world.run("prepare-3").end("prepare-3", fault=Fault.ACCESS_DENIED).step(after_s=20)
    assert world.verdict == ("False", "AccessDenied")


def test_a_container_that_cannot_start_is_degraded_and_final_after_15_minutes():
    world = World().step()
    world.pod("prepare-1", scheduled=True, waiting_reason="CreateContainerConfigError", waiting_message="no").step()
    assert world.condition(ConditionType.DEGRADED) == ("True", "MissingRef")
    assert "cannot start" in world.message(ConditionType.DEGRADED)
    assert world.phase == Phase.PENDING
    world.step(after_s=899)
    assert world.verdict[0] == "Unknown"
    world.step(after_s=1)
    assert world.verdict == ("False", "MissingRef")
    assert world.jobs["prepare-1"].deleting


def test_a_missing_secret_is_named_and_the_job_goes_on_when_it_is_there():
    world = World().step().pod("prepare-1", scheduled=True, waiting_reason="ContainerCreating")
    world.blocked = Blocked(Reason.MISSING_REF, "Secret team-a/s3 does not exist")
    world.step(after_s=20)
    assert world.message(ConditionType.DEGRADED) == "Secret team-a/s3 does not exist"
    world.blocked = None
    world.run("prepare-1")
    assert world.condition(ConditionType.DEGRADED) == ("False", "Healthy")
    assert world.condition(ConditionType.RUNNING) == ("True", "Preparing")
    assert "storageWaitSince" not in world.status["record"]


def test_an_unschedulable_pod_waits_without_end_and_keeps_the_first_words_of_the_scheduler():
    world = World().prepared().pod("train-1", unschedulable="0/3 nodes have nvidia.com/gpu").step()
    assert world.condition(ConditionType.ADMITTED) == ("False", "Unschedulable")
    assert world.phase == Phase.PENDING
    before = dict(world.status)
    world.pod("train-1", unschedulable="0/4 nodes have nvidia.com/gpu").step(after_s=100_000)
    assert world.status == before


@pytest.mark.parametrize(
    "reason", [Reason.QUOTA_EXCEEDED, Reason.FORBIDDEN, Reason.NAME_COLLISION, Reason.RUNTIME_NOT_FOUND]
)
def test_a_refused_creation_is_degraded_until_it_succeeds(reason: Reason):
    world = World()
    world.blocked = Blocked(reason, "refused")
    world.step()
    assert world.condition(ConditionType.DEGRADED) == ("True", reason.value)
    assert decide(world.view, replace(world.seen, blocked=None), world.now).status == world.view.status
    world.blocked = None
    world.step().run("prepare-1")
    assert world.created == ["prepare-1"]
    assert world.condition(ConditionType.DEGRADED) == ("False", "Healthy")


def test_a_manifest_that_the_server_refuses_is_degraded_until_somebody_mends_it():
    world = World()
    world.blocked = Blocked(Reason.INVALID_MANIFEST, "Job bot-1a2b3-prepare-1 is refused: spec.x")
    world.step().step(7 * 86400)
    assert world.condition(ConditionType.DEGRADED) == ("True", "InvalidManifest")
    world.blocked = None
    world.step().run("prepare-1")
    assert world.created == ["prepare-1"]
    assert world.condition(ConditionType.DEGRADED) == ("False", "Healthy")


def test_a_spec_of_a_newer_version_stalls_the_job_without_touching_what_runs():
    world = World().training()
    world.spec["method"] = {"type": "Quantum"}
    world.meta["generation"] = 2
    world.step()
    assert world.condition(ConditionType.STALLED) == ("True", "SpecInvalid")
    assert "spec.method.type" in world.message(ConditionType.STALLED)
    assert not world.jobs["train-1"].deleting
    assert world.reasons()[-1] == "SpecInvalid"
    world.spec["method"] = {"type": "SFT"}
    assert world.step().condition(ConditionType.STALLED) == ("False", "Healthy")


def test_a_name_that_is_too_long_for_its_children_is_refused():
    world = World()
    world.meta["name"] = "x" * 41
    assert world.step().condition(ConditionType.STALLED) == ("True", "SpecInvalid")
    assert world.created == []


def test_a_pod_evicted_inside_the_job_is_counted_as_a_disruption_once_and_replaced_by_kubernetes():
    world = World().training().pod("train-1", disrupted=True, phase="Failed", exit_code=30).step()
    assert world.condition(ConditionType.RUNNING) == ("False", "Disrupted")
    assert world.status["record"]["disruptions"] == 1
    world.step(after_s=60).run("train-1", number=1)
    assert world.condition(ConditionType.RUNNING) == ("True", "Training")
    assert world.status["record"]["disruptions"] == 1
    assert world.status["failures"] == 0
    assert world.created == ["prepare-1", "train-1"]


def test_an_attempt_ended_by_a_disruption_is_not_counted():
    world = World(recovery={"maxRetries": 0}).training().end("train-1", code=143, disrupted=True).step()
    assert world.created[-1] == "train-2"
    assert world.status["failures"] == 0
    assert world.status["attempts"][-2]["class"] == "Disruption"


def test_too_many_disruptions_end_the_job():
    world = World(recovery={"maxDisruptions": 2}).training()
    for number in range(3):
        world.pod("train-1", number, disrupted=True, phase="Failed", exit_code=30, started_at=START).step()
    assert world.verdict == ("False", "DisruptionBudget")
    assert world.jobs["train-1"].deleting


def test_disrupted_pods_are_counted_once_however_many_of_them_are_kept():
    world = World(recovery={"maxDisruptions": 100}).training()
    for number in range(25):
        born = START + timedelta(seconds=number)
        world.pod("train-1", number, created_at=born, disrupted=True, phase="Failed", exit_code=30).step()
    world.step(after_s=60).step(after_s=60)
    assert world.status["record"]["disruptions"] == 25
    assert len(world.status["record"]["disruptedPods"]) == 20


def test_a_job_deleted_by_somebody_is_a_counted_attempt_that_resumes():
    world = World().training().gone("train-1").step()
    assert world.created[-1] == "train-2"
    assert world.status["attempts"][-2]["reason"] == "JobLost"
    assert world.status["failures"] == 1


def test_a_job_deleted_before_its_pod_ran_is_simply_created_again():
    world = World().step()
    world.jobs.clear()
    world.created.clear()
    world.step()
    assert world.created == ["prepare-1"]
    assert world.status["failures"] == 0


def test_the_next_attempt_waits_until_the_last_pod_has_really_ended():
    world = World().training()
    del world.jobs["train-1"]
    world.step(after_s=100)
    assert world.created == ["prepare-1", "train-1"]
    world.gone("train-1").step()
    assert world.created[-1] == "train-2"


def test_a_job_deleted_after_its_pod_committed_is_a_success():
    world = World().training().end("train-1", fault=Fault.COMMITTED, artifact=ARTIFACT).gone("train-1").step()
    assert world.verdict == ("True", "Succeeded")


def test_a_pod_deleted_by_somebody_is_counted_and_resumes():
    world = World().training()
    world.jobs["train-1"] = replace(world.jobs["train-1"], outcome="Failed", finished_at=world.now)
    world.pods.clear()
    world.step()
    assert world.status["attempts"][-2]["reason"] == "PodLost"
    assert world.created[-1] == "train-2"


@pytest.mark.parametrize(
    ("last_seen", "reason", "said"),
    [
        # By force, or not ended within its grace period: the kubelet kills it while the Job's finalizer keeps it.
        ({"deletion_due": START, "exit_code": 137}, "PodLost", "pod train-1-0 was deleted, by whom is not known"),
        ({"deletion_due": START, "fault": Fault.KILLED}, "PodLost", "pod train-1-0 was deleted, by whom is not known"),
        ({"gone": True}, "PodLost", "pod train-1-0 was deleted, by whom is not known"),
        # Deleted, but that is not why it ended.
        ({"deletion_due": START, "exit_code": 137, "oom_killed": True}, "HostOOM", "memory"),
        ({"deletion_due": START, "fault": Fault.INTERRUPTED}, "Interrupted", "stopped on request"),
        ({"deletion_due": START, "exit_code": 139}, "Unknown", "signal SIGSEGV"),
        ({"exit_code": 137}, "Unknown", "signal SIGKILL"),
        ({"fault": Fault.KILLED}, "Unknown", "signal SIGKILL"),
    ],
)  # fmt: skip
def test_a_pod_that_somebody_deleted_by_force_is_told_as_deleted(last_seen: dict[str, Any], reason: str, said: str):
    world = World().training()
    fields = dict(last_seen)
    fault = fields.pop("fault", None)
    if fault is not None:
        told = report(TRAIN, 1, fault, args={"signal": "SIGKILL"})
        fields |= {"result": told, "exit_code": told.exit_code}
    if "exit_code" in fields:
        fields |= {"phase": "Failed", "finished_at": world.now}
    world.pod("train-1", **fields)
    world.jobs["train-1"] = replace(world.jobs["train-1"], outcome="Failed", finished_at=world.now)
    world.step()
    assert world.status["attempts"][-2]["reason"] == reason
    assert world.status["failures"] == 1
    assert said in " ".join(event.message for event in world.events)


@pytest.mark.parametrize("bad_result", [True, False])
def test_a_job_that_completed_without_a_message_gets_one_more_attempt_that_finds_the_commit(bad_result: bool):
    world = World(recovery={"maxRetries": 0}).training().end("train-1", code=0, bad_result=bad_result).step()
    assert world.created[-1] == "train-2"
    assert world.status["attempts"][-2]["reason"] == ("BadReport" if bad_result else "PodLost")
    assert world.status["failures"] == 0
    world.run("train-2").end("train-2", fault=Fault.COMMITTED, artifact=ARTIFACT).step()
    assert world.verdict == ("True", "Succeeded")


def test_a_second_completion_without_a_message_is_counted():
    world = World(recovery={"maxRetries": 0}).training().end("train-1", code=0).step()
    world.run("train-2").end("train-2", code=0).step()
    assert world.verdict == ("False", "RetriesExhausted")


def test_a_report_that_claims_success_of_another_attempt_or_without_an_artifact_is_not_believed():
    world = World().training()
    forged = report(TRAIN, 7, Fault.COMMITTED, artifact=ARTIFACT)
    world.end("train-1", code=0).pod("train-1", result=forged).step()
    assert world.verdict[0] == "Unknown"
    world.run("train-2").end("train-2", fault=Fault.COMMITTED).step()
    assert world.phase != Phase.SUCCEEDED


def test_a_report_that_contradicts_the_exit_code_is_not_believed():
    world = World().training().end("train-1", fault=Fault.NOT_FINITE, code=31).step()
    assert world.status["attempts"][-2]["reason"] == "StorageTransient"
    assert world.created[-1] == "train-2"


@pytest.mark.parametrize("moment", ["accepted", "pending", "preparing", "between", "training"])
def test_a_job_can_be_suspended_and_resumed_at_any_phase(moment: str):
    reach: dict[str, Callable[[World], World]] = {
        "accepted": lambda w: w,
        "pending": lambda w: w.step(),
        "preparing": lambda w: w.step().run("prepare-1"),
        "between": lambda w: w.prepared(),
        "training": lambda w: w.training(),
    }
    world = reach[moment](World())
    live = [name for name, job in world.jobs.items() if job.live]
    world.spec["suspend"] = True
    world.step()
    for name in live:
        assert world.jobs[name].deleting
        assert world.condition(ConditionType.SUSPENDED) == ("False", "Suspending")
        world.end(name, fault=Fault.INTERRUPTED).gone(name).step(after_s=5)
    assert world.phase == Phase.SUSPENDED
    assert world.condition(ConditionType.SUSPENDED) == ("True", "Suspended")
    assert not any(job.live for job in world.jobs.values())
    world.spec["suspend"] = False
    world.step(after_s=1000)
    assert world.condition(ConditionType.SUSPENDED) == ("False", "Resumed")
    assert world.phase != Phase.SUSPENDED
    assert sum(job.live for job in world.jobs.values()) == 1
    assert world.status["failures"] == 0
    if live:
        stage, number = live[0].split("-")
        assert world.created[-1] == f"{stage}-{int(number) + 1}"
        assert world.status["attempts"][-2]["class"] == "Suspended"


def test_suspending_is_written_down_before_the_job_is_deleted():
    world = World().training()
    world.spec["suspend"] = True
    made = decide(world.view, world.seen, world.now)
    assert made.status.attempts[-1].reason == "Suspended"
    assert made.actions == (DeleteK8sJob("train-1", "uid-train-1"),)


def test_a_job_resumed_while_it_is_still_stopping_gets_its_next_attempt_when_it_has_stopped():
    world = World().training()
    world.spec["suspend"] = True
    world.step()
    world.spec["suspend"] = False
    world.step()
    assert world.created[-1] == "train-1"
    world.end("train-1", fault=Fault.INTERRUPTED).gone("train-1").step()
    assert world.created[-1] == "train-2"
    assert world.status["attempts"][-2]["class"] == "Suspended"


def test_a_commit_while_suspending_is_a_success():
    world = World().training()
    world.spec["suspend"] = True
    world.step().end("train-1", fault=Fault.COMMITTED, artifact=ARTIFACT).gone("train-1").step()
    assert world.verdict == ("True", "Succeeded")


def said(attempt: int = 1, **fields: Any) -> Progress:
    return Progress.model_validate(
        {"stage": "train", "attempt": attempt, "activity": "Training", "total_steps": 100, **fields}
    )


def test_progress_shows_step_eta_and_loss():
    world = World().training()
    fields: dict[str, Any] = {"step": 40, "eta_seconds": 3900.0, "train_loss": 1.23456, "checkpoint": CHECKPOINT}
    world.progress = heard(said(**fields), world.now)
    world.step()
    shown = world.status["progress"]
    assert (shown["text"], shown["percentage"], shown["eta"]) == ("40/100", 40, "1h05m")
    assert world.status["metrics"]["loss"] == "1.235"
    assert world.status["checkpoints"][0]["step"] == 40
    assert world.last["lastStep"] == 40


def test_the_status_names_only_a_checkpoint_that_is_not_deleted_yet():
    world = World(checkpoint={"keepLast": 3}).training()
    later = {**CHECKPOINT, "step": 90, "uri": "s3://out/bot-1a2b3/.job/checkpoints/90"}
    for step, checkpoint in ((40, CHECKPOINT), (90, later)):  # what was saved between them was never seen
        world.now += timedelta(seconds=60)
        world.progress = heard(said(step=step, checkpoint=checkpoint), world.now)
        world.step()
    assert world.status["checkpoints"] == [later]
    last = {**CHECKPOINT, "step": 100, "uri": "s3://out/bot-1a2b3/.job/checkpoints/100"}
    world.end("train-1", fault=Fault.COMMITTED, artifact=ARTIFACT, checkpoint=last).step()
    assert world.status["checkpoints"] == [last], "the trainer removes all others after the commit"


def test_an_attempt_that_resumed_before_a_broken_checkpoint_names_the_one_it_relies_on():
    world = World().training()
    world.progress = heard(said(step=40, checkpoint=CHECKPOINT), world.now)
    earlier = {**CHECKPOINT, "step": 20, "uri": "s3://out/bot-1a2b3/.job/checkpoints/20"}
    world.step().end("train-1", code=1).step().run("train-2")
    world.now += timedelta(seconds=60)
    world.progress = heard(said(attempt=2, step=21, resumed_from_step=20, checkpoint=earlier), world.now)
    assert world.step().status["checkpoints"] == [earlier]


def test_progress_is_written_at_most_every_30_seconds():
    world = World().training()
    world.progress = heard(said(step=1), world.now)
    world.step()
    before = dict(world.status)
    world.now += timedelta(seconds=29)
    world.progress = heard(said(step=2), world.now)
    assert world.step().status == before
    world.now += timedelta(seconds=1)
    world.progress = heard(said(step=3), world.now)
    assert world.step().status["progress"]["step"] == 3


def test_what_a_preference_method_measures_is_in_the_status_and_stays_when_the_attempt_ends():
    world = World().training()
    figures = {"reward_accuracy": 0.87654, "reward_margin": 1e300, "of_the_future": 1.0, "kl": float("inf")}
    world.progress = heard(said(step=40, figures=figures), world.now)
    world.step()
    expected = [{"name": "reward_accuracy", "value": 0.8765}, {"name": "reward_margin", "value": 1e300}]
    assert world.status["progress"]["figures"] == expected
    world.end("train-1", fault=Fault.COMMITTED, artifact=ARTIFACT, step=100).step()
    assert (world.status["progress"]["step"], world.status["progress"]["figures"]) == (100, expected)


def test_a_method_without_figures_says_nothing_of_them():
    world = World().training()
    world.progress = heard(said(step=40), world.now)
    assert "figures" not in world.step().status["progress"]


def test_prepare_shows_how_much_of_the_data_is_read_and_how_long_the_rest_takes():
    world = World().step().run("prepare-1").step()
    reading = {"stage": PREPARE, "attempt": 1, "activity": "Reading", "bytes_total": 2000, "rows_read": 7}
    before = dict(world.status)
    world.now += timedelta(seconds=29)
    world.progress = heard(Progress.model_validate(reading | {"bytes_read": 10, "eta_seconds": 500.0}), world.now)
    assert world.step().status == before, "what is prepared at once is written once"
    world.now += timedelta(seconds=2)
    world.progress = heard(
        Progress.model_validate(reading | {"bytes_read": 905, "eta_seconds": 185.0, "rows_per_second": 3400.12}),
        world.now,
    )
    world.step()
    shown = world.status["progress"]
    assert (shown["text"], shown["percentage"], shown["eta"], shown["totalSteps"]) == ("45% of data", 45, "3m", 0)
    assert shown["rowsPerSecond"] == 3400.1
    assert "metrics" not in world.status
    assert "lastStep" not in world.last
    written = world.writes
    world.now += timedelta(seconds=29)
    world.progress = heard(Progress.model_validate(reading | {"bytes_read": 950, "eta_seconds": 170.0}), world.now)
    assert world.step().writes == written
    world.end("prepare-1", fault=Fault.PREPARED, plan=PLAN, data=DATA).step()
    assert "progress" not in world.status


def test_prepare_that_is_tried_again_says_how_far_it_came_and_nothing_of_the_time_left():
    world = World().step().run("prepare-1").step()
    reading = {"stage": PREPARE, "attempt": 1, "activity": "Reading", "bytes_read": 1, "bytes_total": 2}
    world.now += timedelta(seconds=31)
    world.progress = heard(Progress.model_validate(reading | {"eta_seconds": 9.0, "rows_per_second": 2.0}), world.now)
    world.step().end("prepare-1", code=137).step()
    assert world.status["progress"]["text"] == "50% of data"
    assert "eta" not in world.status["progress"]
    assert "rowsPerSecond" not in world.status["progress"]
    loading = {"stage": PREPARE, "attempt": 2, "activity": "Loading"}
    world.run("prepare-2").step()
    world.now += timedelta(seconds=60)
    world.progress = heard(Progress.model_validate(loading), world.now)
    assert world.step().status["progress"]["text"] == "50% of data"


def test_progress_of_another_attempt_is_ignored():
    world = World().training()
    world.progress = heard(said(attempt=2, step=9), world.now)
    assert "progress" not in world.step().status


def test_a_pod_that_somebody_else_made_tells_nothing_of_the_attempt():
    """It bears the labels of the attempt, and answers before ours, and as often."""
    world = World(recovery={"progressDeadlineSeconds": 600}).training()
    forged = said(step=99, seconds_since_step=10**6, train_loss=0.001, eta_seconds=1.0)
    world.strangers = (PodAnswer(forged, world.now, "uid-of-another-job"),)
    world.step()
    assert "progress" not in world.status
    world.progress = heard(said(step=7, train_loss=2.0), world.now)
    world.step()
    assert (world.status["progress"]["step"], world.status["metrics"]["loss"]) == (7, "2.000")
    assert not world.jobs["train-1"].deleting
    world.end("train-1", code=137).step()
    assert world.status["attempts"][-2]["lastStep"] == 7


def test_the_silence_of_a_pod_that_somebody_else_made_ends_no_attempt():
    world = World(recovery={"progressDeadlineSeconds": 600}).training()
    since = world.now - timedelta(seconds=10**6)
    world.silence = PodSilence(TRAIN, 1, "uid-of-another-job", "uid", since, world.now, reached_since=since)
    world.step()
    assert not world.jobs["train-1"].deleting
    assert world.condition(ConditionType.DEGRADED) == ("False", "Healthy")


def test_a_pod_that_does_not_know_its_place_yet_does_not_wipe_out_the_progress():
    world = World().training()
    world.progress = heard(said(step=40), world.now)
    world.step().end("train-1", fault=Fault.KILLED).step(after_s=60).run("train-2")
    world.progress = heard(said(attempt=2, activity="Loading", total_steps=0), world.now)
    assert world.step(after_s=60).status["progress"]["text"] == "40/100"


def test_where_a_killed_attempt_had_resumed_is_kept_from_its_last_answer():
    world = World().training()
    world.progress = heard(said(step=40, resumed_from_step=30), world.now)
    world.end("train-1", fault=Fault.KILLED).step()
    killed = world.status["attempts"][-2]
    assert (killed["resumedFromStep"], killed["lastStep"]) == (30, 40)


def test_a_silent_pod_makes_the_progress_stale_and_nothing_else():
    world = World().training()
    world.progress = heard(said(step=1), world.now)
    world.step().step(after_s=121)
    assert world.status["progress"]["stale"] is True
    assert world.condition(ConditionType.RUNNING) == ("True", "Training")


def away(since_s: float = START.timestamp(), **args: Any) -> dict[str, Any]:
    told = {"action": "write", "uri": "s3://b/x", "tries": 12, "seconds": 75, "problem": "no connection"} | args
    return {"fault": Fault.STORAGE_UNAVAILABLE, "args": told, "since": since_s}


def test_saves_that_fail_are_degraded_with_one_event_until_one_succeeds():
    world = World().training()
    world.say(step=3).step(31)
    assert world.condition(ConditionType.DEGRADED) == ("False", "Healthy")
    world.say(step=4, trouble=away()).step(31)
    assert world.condition(ConditionType.DEGRADED) == ("True", "StorageTransient")
    for words in ("since 2026-01-01T00:00:00Z", "could not write s3://b/x", "training goes on"):
        assert words in world.message(ConditionType.DEGRADED)
    world.say(step=5, trouble=away(tries=24)).step(31)
    world.progress = None  # as after a restart of the operator
    world.step(1)
    assert world.condition(ConditionType.DEGRADED) == ("True", "StorageTransient")
    world.say(step=6).step(31)
    assert world.condition(ConditionType.DEGRADED) == ("False", "Healthy")
    told = [(event.type, event.reason) for event in world.events if event.reason in ("StorageTransient", "Healthy")]
    assert told == [("Warning", "StorageTransient"), ("Normal", "Healthy")]


def test_an_attempt_that_ended_for_its_storage_stays_degraded_until_the_next_one_says_otherwise():
    world = World().training()
    world.say(step=4, trouble=away()).step(31)
    world.end("train-1", fault=Fault.STORAGE_UNAVAILABLE, args=away()["args"]).step()
    assert world.condition(ConditionType.DEGRADED) == ("True", "StorageTransient")
    world.step(60).run("train-2")
    assert world.condition(ConditionType.DEGRADED) == ("True", "StorageTransient")
    world.say(attempt=2, step=4).step(31)
    assert world.condition(ConditionType.DEGRADED) == ("False", "Healthy")
    assert [event.reason for event in world.events].count(Reason.HEALTHY) == 1


def test_a_denied_save_is_named_and_what_a_pod_makes_up_is_not_believed():
    world = World().training()
    denied = {"fault": Fault.ACCESS_DENIED, "args": {"action": "write", "uri": "s3://b/x"}, "since": 0}
    world.say(step=4, trouble=denied).step(31)
    assert world.condition(ConditionType.DEGRADED) == ("True", "AccessDenied")
    for fault in (Fault.COMMITTED, "OfAnotherRelease"):
        world.say(step=5, trouble={"fault": fault, "since": 1e10}).step(31)
        assert world.condition(ConditionType.DEGRADED) == ("True", "StorageTransient")


def test_figures_that_are_not_finite_never_reach_the_status():
    world = World().training()
    world.progress = heard(said(step=1, train_loss=float("nan"), tokens_per_second=float("inf")), world.now)
    assert world.step().status["metrics"] == {}


@pytest.mark.parametrize("field", ["step", "total_steps", "seconds_since_step", "seconds_since_checkpoint"])
@pytest.mark.parametrize("number", ["Infinity", "1e999", "1e300", "1" + "0" * 400])
def test_a_number_that_no_status_could_hold_is_no_answer(field: str, number: str):
    with pytest.raises(ValidationError):
        Progress.model_validate_json(f'{{"stage": "train", "attempt": 1, "activity": "Training", "{field}": {number}}}')


def test_the_999th_number_of_an_attempt_is_the_last():
    world = World().step().run("prepare-1").end("prepare-1", fault=Fault.PREPARED, plan=PLAN, data=DATA)
    world.pod("train-999", phase="Failed", gone=True)
    assert decide(world.view, world.seen, world.now).actions == ()


def test_a_job_that_ends_with_its_last_number_is_not_said_to_have_failed_too_often():
    world = World().training()
    world.status["attempts"][-1]["number"] = 999
    world.jobs["train-999"] = replace(world.jobs.pop("train-1"), name="train-999", attempt=999)
    world.pods = {"train-999-0": replace(world.pods["train-1-0"], attempt=999, phase="Failed", refused="OutOfcpu")}
    world.jobs["train-999"] = replace(world.jobs["train-999"], outcome="Failed")
    world.step()
    assert world.verdict == ("False", "RetriesExhausted")
    message = world.message(ConditionType.SUCCEEDED)
    assert message.startswith("999 attempts are all that a job may have; the last one (PodNotStarted): the pod failed")


def test_a_training_without_steps_is_stopped_counted_and_tried_again():
    world = World(recovery={"progressDeadlineSeconds": 600}).training()
    world.progress = heard(said(step=7, seconds_since_step=601, seconds_since_checkpoint=700), world.now)
    world.step()
    assert world.jobs["train-1"].deleting
    assert world.last["reason"] == "NoProgress"
    world.gone("train-1").step()
    assert world.status["attempts"][-2] | {"reason": "NoProgress", "class": "Failure"} == world.status["attempts"][-2]
    assert world.status["attempts"][-2]["lostSeconds"] == 700
    assert world.created[-1] == "train-2"


def test_data_that_is_no_further_prepared_is_stopped_or_ends_itself_counted_and_tried_again():
    world = World(recovery={"progressDeadlineSeconds": 600}).step().run("prepare-1")
    world.progress = heard(said(stage="prepare", activity="Reading", seconds_since_step=601), world.now)
    world.step()
    assert world.jobs["prepare-1"].deleting
    world.gone("prepare-1").step().run("prepare-2").end("prepare-2", fault=Fault.NO_PROGRESS).step().step(after_s=60)
    ends = [(each["reason"], each["class"]) for each in world.status["attempts"][:2]]
    assert ends == [("NoProgress", "Failure")] * 2
    assert world.created[-1] == "prepare-3"


def silent(world: World, seconds: int, attempt: int = 1) -> World:
    """The pod can be reached, but has not answered for so long."""
    since = world.now - timedelta(seconds=seconds)
    world.silence = PodSilence(
        TRAIN, attempt, f"uid-train-{attempt}", "uid-train-1-0", since, world.now, reached_since=since
    )
    return world


def test_a_pod_that_is_silent_for_the_deadline_of_progress_is_stopped_whatever_it_said_before():
    world = World(recovery={"progressDeadlineSeconds": 600}).training()
    world.progress = heard(said(step=7, seconds_since_step=1), world.now)
    silent(world.step(), 600).step()
    assert not world.jobs["train-1"].deleting
    silent(world, 601).step()
    assert world.jobs["train-1"].deleting
    world.gone("train-1").step()
    assert world.status["attempts"][-2]["reason"] == "NoProgress"
    assert any("or did not say so" in e.message for e in world.events if e.reason == Reason.NO_PROGRESS)
    assert world.created[-1] == "train-2"


def test_the_silence_of_one_attempt_is_not_that_of_the_next():
    world = silent(World(recovery={"progressDeadlineSeconds": 600}).training(), 601).step()
    world.gone("train-1").step().run("train-2").step()
    assert world.created[-1] == "train-2"
    assert not world.jobs["train-2"].deleting


def test_an_interrupted_attempt_that_saved_lost_nothing():
    world = World().training()
    world.progress = heard(said(step=40, seconds_since_checkpoint=50), world.now)
    world.step().end("train-1", fault=Fault.INTERRUPTED, step=41, checkpoint=CHECKPOINT).step()
    assert world.status["attempts"][-2]["lostSeconds"] == 0


def test_a_killed_attempt_lost_the_time_since_its_last_checkpoint():
    world = World().training()
    world.progress = heard(said(step=40, seconds_since_checkpoint=50), world.now)
    world.step()
    world.now += timedelta(seconds=10)
    world.end("train-1", code=137).step()
    assert world.status["attempts"][-2]["lostSeconds"] == 60


def test_the_deadline_counts_from_acceptance_over_all_attempts_and_stops_what_runs():
    world = World(activeDeadlineSeconds=3600).training()
    world.step(after_s=3599)
    assert world.verdict[0] == "Unknown"
    world.step(after_s=1)
    assert world.verdict == ("False", "DeadlineExceeded")
    assert world.jobs["train-1"].deleting
    assert world.last["class"] == "Failure"


def test_a_success_at_the_deadline_is_a_success():
    world = World(activeDeadlineSeconds=3600).training()
    world.end("train-1", fault=Fault.COMMITTED, artifact=ARTIFACT)
    world.step(after_s=4000)
    assert world.verdict == ("True", "Succeeded")


def kept_alive(world: World, name: str, fault: Fault, **more: Any) -> World:
    """The trainer's container ends, and one that the cluster put beside it does not: nor does the pod, nor the Job."""
    stage, attempt = name.split("-")
    said = report(Stage(stage), int(attempt), fault, **more)
    return world.pod(name, finished_at=world.now, exit_code=said.exit_code, result=said)


def test_a_pod_that_another_container_keeps_alive_has_ended_with_its_trainer():
    world = kept_alive(World().training(), "train-1", Fault.COMMITTED, artifact=ARTIFACT).step()
    assert world.condition(ConditionType.RUNNING) == ("True", "Training")  # the pod ends within seconds, as a rule
    assert world.requeue_after_s == 60
    assert world.step(after_s=59).verdict[0] == "Unknown"
    world.step(after_s=1)
    assert world.verdict == ("True", "Succeeded")
    assert world.jobs["train-1"].deleting  # what it holds, such as a GPU, is free


def test_data_that_was_prepared_beside_a_container_that_stays_is_trained_on_once_nothing_of_it_is_alive():
    world = kept_alive(World().step().run("prepare-1"), "prepare-1", Fault.PREPARED, plan=PLAN, data=DATA)
    world.step(after_s=60)
    assert world.jobs["prepare-1"].deleting
    assert world.created == ["prepare-1"]
    assert world.gone("prepare-1").step().created == ["prepare-1", "train-1"]


def test_a_failure_beside_a_container_that_stays_is_told_in_the_words_of_the_trainer():
    world = kept_alive(World().training(), "train-1", Fault.DISK_FULL).step(after_s=60)
    assert world.status["attempts"][1]["reason"] == FAULTS[Fault.DISK_FULL].reason


def test_a_pod_that_is_on_its_way_out_has_the_time_that_its_containers_need():
    world = kept_alive(World().training().pod("train-1", disrupted=True), "train-1", Fault.INTERRUPTED, step=3)
    world.step(after_s=300)
    assert world.last["class"] == "Running"  # the Kubernetes Job replaces the pod within the attempt


def test_a_node_that_does_not_answer_is_degraded_and_no_second_pod_is_started():
    world = World().training().pod("train-1", deletion_due=START)
    world.step(after_s=61)
    assert world.condition(ConditionType.DEGRADED) == ("True", "NodeUnreachable")
    assert world.created == ["prepare-1", "train-1"]


def test_a_job_being_deleted_is_left_alone():
    world = World()
    world.meta["deletionTimestamp"] = format_time(START)
    assert world.step().created == []
    assert world.events == []


@pytest.mark.parametrize("letter", ["a", "ü"])
def test_the_status_stays_below_8_kib_in_the_worst_case(letter: str):
    run_uri = "s3://out/" + "x" * 503 + "/" + "n" * 40 + "-1a2b3"
    resolved = [{"field": "f" * 64, "value": "v" * 64, "reason": "r" * 160}] * 20
    dropped = [{"reason": "r" * 24, "rows": 10**6}] * 10
    checkpoints = [{**CHECKPOINT, "step": n, "uri": f"{run_uri}/.job/checkpoints/{n}/manifest.json"} for n in range(5)]
    closed = {"number": 9, "stage": "train", "class": "Disruption", "reason": "StorageTransient", "exitCode": 31}
    times = {"startedAt": format_time(START), "finishedAt": format_time(START), "lastStep": 10**6, "lostSeconds": 10**6}
    world = World(recovery={"maxRetries": 20})
    world.status = {
        "plan": {**PLAN, "uri": f"{run_uri}/.job/plan.json", "resolved": resolved},
        "data": {
            **DATA,
            "dropped": dropped,
            "reportUri": f"{run_uri}/.job/report.json",
            "reportPageUri": f"{run_uri}/.job/report.html",
        },
        "artifacts": [{**ARTIFACT, "uri": f"{run_uri}/adapter/", "manifestUri": f"{run_uri}/adapter/manifest.json"}],
        "checkpoints": checkpoints,
        "attempts": [{**closed, **times}] * 9 + [{"number": 10, "stage": "train", "class": "Running"}],
        "record": {"disruptions": 20, "disruptedPods": ["12345678-1234-1234-1234-123456789012"] * 20},
    }
    args = {"action": letter * 256, "uri": letter * 256, "problem": letter * 256}
    world.pod("train-10", started_at=START).end("train-10", fault=Fault.STORAGE_UNAVAILABLE, args=args)
    world.jobs["train-10"] = ObservedK8sJob("train-10", "u", TRAIN, 10, START, outcome="Failed")
    made = decide(world.view, world.seen, world.now).status
    assert len(made.model_dump_json(by_alias=True, exclude_none=True).encode()) <= 8192
    assert made.plan is not None
    assert made.plan.digest == DIGEST
    assert made.checkpoints[-1].step == 4
    assert made.attempts[-2].reason == "StorageTransient"


def test_the_same_failure_twice_in_a_row_is_two_events():
    world = World().training().end("train-1", code=1).step()
    world.end("train-2", code=1).step()
    assert world.reasons().count("Unknown") == 2


@pytest.mark.parametrize(
    ("exit_code", "reason", "ends"),
    [(29, "Unknown", True), (49, "Unknown", False), (22, "ModelMismatch", True), (31, "StorageTransient", False)],
)
def test_after_a_fault_of_a_newer_trainer_the_exit_code_decides_and_the_words_name_it(
    exit_code: int, reason: str, ends: bool
) -> None:
    world = World().training()
    told = {"stage": "train", "attempt": 1, "fault": "OfTheFuture", "exit_code": exit_code, "contract_version": 99}
    report = RunResult.model_validate(told)
    world.end("train-1", code=exit_code)
    world.pod("train-1", result=report).step()
    first = world.status["attempts"][1]
    assert (first["class"], first["reason"], first["exitCode"]) == ("Failure", reason, exit_code)
    assert world.status["phase"] == ("Failed" if ends else "Training")
    assert any("OfTheFuture" in event.message for event in world.events)


def test_an_old_plan_without_finished_steps_is_prepared_again_and_counts_as_no_retry():
    world = World(recovery={"maxRetries": 0}).training()
    world.end("train-1", fault=Fault.PLAN_OUTDATED, args={"found": "1", "expected": 2}).step()
    first = world.status["attempts"][1]
    assert (first["class"], first["reason"], world.status.get("failures", 0)) == ("Superseded", "PlanOutdated", 0)
    assert world.created[-1] == "prepare-2"
    assert "plan" not in world.status
    assert world.condition(ConditionType.PLANNED) == ("Unknown", "Preparing")
    again = {**PLAN, "digest": "sha256:" + "b" * 64}
    world.run("prepare-2").end("prepare-2", fault=Fault.PREPARED, plan=again, data=DATA).step()
    assert world.created[-1] == "train-2"
    assert world.status["plan"]["digest"] == again["digest"]
    world.run("train-2").end("train-2", fault=Fault.PLAN_OUTDATED).step()
    assert (world.status["phase"], world.condition(ConditionType.SUCCEEDED)[0]) == ("Failed", "False")


WORSE: dict[str, Any] = {"concerns": ["WorseThanStart"], "held_out_rows": 39, "start_loss": 3.19, "loss": 28.0}
GOOD: dict[str, Any] = {"held_out_rows": 39, "start_loss": 3.19, "loss": 2.4}


@pytest.mark.parametrize(
    ("quality", "expected", "words", "events"),
    [
        (WORSE, ("True", "WorseThanStart"), "28.000", ["Succeeded", "WorseThanStart"]),
        ({**GOOD, "concerns": ["AnswersDoNotEnd"]}, ("True", "AnswersDoNotEnd"), "stop token",
         ["Succeeded", "AnswersDoNotEnd"]),
        ({**WORSE, "concerns": ["WorseThanStart", "AnswersDoNotEnd"]}, ("True", "WorseThanStart"), "stop token",
         ["Succeeded", "WorseThanStart"]),
        (GOOD, ("False", "NoConcern"), "39 held-out rows: loss 2.400", ["Succeeded"]),
        ({}, ("Unknown", "NotMeasured"), "no rows were held out", ["Succeeded"]),
    ],
)  # fmt: skip
def test_a_finished_job_says_whether_its_model_is_worse_than_the_one_it_began_with(
    quality: dict[str, Any], expected: tuple[str, str], words: str, events: list[str]
):
    world = World().training()
    world.end("train-1", fault=Fault.COMMITTED, artifact=ARTIFACT, quality=quality).step()
    assert world.verdict == ("True", "Succeeded"), "quality is told apart from success"
    assert world.condition(ConditionType.DEGRADED) == ("False", "Healthy"), "and from health"
    assert world.condition(ConditionType.QUALITY_CONCERN) == expected
    assert words in world.message(ConditionType.QUALITY_CONCERN)
    assert world.reasons()[4:] == events
    assert world.events[-1].type == ("Warning" if expected[0] == "True" else "Normal")
    before = dict(world.status)
    assert world.step(3600).status == before


def test_a_trainer_of_an_older_contract_says_nothing_about_quality():
    world = World().training().end("train-1", fault=Fault.COMMITTED, artifact=ARTIFACT).step()
    assert "QualityConcern" not in [c["type"] for c in world.status["conditions"]]


def diverging(steps: int) -> dict[str, Any]:
    return {"concerns": ["Diverging"], "first_train_loss": 3.3, "steps_above_start": steps}


def test_a_divergence_is_told_at_once_ends_nothing_and_is_taken_back_when_the_loss_is():
    world = World().training()
    world.progress = heard(said(step=1), world.now)
    world.step()
    world.progress = heard(said(step=11, quality=diverging(10)), world.now + timedelta(seconds=2))
    world.step(2)
    assert world.condition(ConditionType.QUALITY_CONCERN) == ("True", "Diverging")
    assert world.events[-1].type == "Warning"
    assert world.condition(ConditionType.RUNNING) == ("True", "Training")
    before = dict(world.status)
    world.progress = heard(said(step=12, quality=diverging(11)), world.now + timedelta(seconds=2))
    assert world.step(2).status == before, "words that count steps are no reason to write"
    world.progress = heard(said(step=13), world.now + timedelta(seconds=2))
    world.step(2)
    assert world.condition(ConditionType.QUALITY_CONCERN) == ("False", "NoConcern")
    assert world.reasons()[-2:] == ["Diverging", "NoConcern"]


def test_a_divergence_is_not_forgotten_while_the_next_attempt_loads():
    world = World().training()
    world.progress = heard(said(step=11, quality=diverging(10)), world.now)
    world.step().end("train-1", code=1).step().run("train-2")
    world.progress = heard(said(attempt=2, total_steps=0), world.now)
    world.step(60)
    assert world.condition(ConditionType.QUALITY_CONCERN) == ("True", "Diverging")


def test_columns_that_look_swapped_are_told_at_once_and_not_taken_back_by_an_attempt_that_has_just_begun():
    world = World().training()
    swapped = {"concerns": ["StartPrefersRejected"], "held_out_rows": 40, "rejected_likelier": 0.98}
    world.progress = heard(said(step=0, quality=swapped), world.now)
    world.step()
    assert world.condition(ConditionType.QUALITY_CONCERN) == ("True", "StartPrefersRejected")
    assert "in a share of 0.980" in world.message(ConditionType.QUALITY_CONCERN)
    assert world.events[-1].type == "Warning"
    assert world.condition(ConditionType.RUNNING) == ("True", "Training")
    world.end("train-1", code=1).step().run("train-2")
    world.progress = heard(said(attempt=2, step=0), world.now)
    world.step(60)
    assert world.condition(ConditionType.QUALITY_CONCERN) == ("True", "StartPrefersRejected")


def refuse(world: World, name: str, why: str = "UnexpectedAdmissionError") -> World:
    """The node's kubelet refuses the pod: no container runs, and the Kubernetes Job fails with it."""
    world.pod(name, scheduled=True, phase="Failed", refused=f"{why}: Allocate failed, which is unexpected")
    world.jobs[name] = replace(world.jobs[name], outcome="Failed", finished_at=world.now)
    return world.step()


def test_a_pod_that_its_node_refuses_is_tried_again_with_growing_delays_and_without_using_up_retries():
    world = World(recovery={"maxRetries": 0}).prepared()
    delays: list[float] = []
    for attempt in range(1, 9):
        refuse(world, f"train-{attempt}")
        assert world.verdict[0] == "Unknown"
        assert world.requeue_after_s is not None
        delays.append(world.requeue_after_s)
        world.step(after_s=world.requeue_after_s)
    assert delays == [15, 30, 60, 120, 240, 480, 600, 600]
    assert world.status["failures"] == 0
    assert world.condition(ConditionType.DEGRADED) == ("True", "PodNotStarted")
    refused = world.status["attempts"][-2]
    assert (refused["class"], refused["reason"]) == ("Waiting", "PodNotStarted")
    world.run("train-9")
    assert world.condition(ConditionType.DEGRADED) == ("False", "Healthy")
    assert world.condition(ConditionType.ADMITTED)[0] == "True"
    assert world.reasons().count("PodNotStarted") == 8, "each refusal is told once"


def test_a_pod_that_its_node_refuses_is_told_in_the_words_of_the_node_and_is_not_admitted():
    world = refuse(World().prepared(), "train-1", "OutOfnvidia.com/gpu")
    assert world.condition(ConditionType.ADMITTED) == ("False", "PodNotStarted")
    for words in ("OutOfnvidia.com/gpu: Allocate failed", "trying again"):
        assert words in world.message(ConditionType.DEGRADED)


def test_patience_with_storage_is_not_used_up_by_a_node_that_refuses_pods():
    world = World().step()
    for attempt in range(1, 8):
        refuse(world, f"prepare-{attempt}").step(after_s=600)
    assert "storageWaitSince" not in world.status["record"]
    world.run("prepare-8").end("prepare-8", fault=Fault.ACCESS_DENIED).step()
    assert world.verdict[0] == "Unknown"
    assert "trying again until" in world.message(ConditionType.DEGRADED)


def test_a_pod_that_replaced_a_disrupted_one_and_is_refused_decides_what_the_attempt_was():
    world = World().training().pod("train-1", disrupted=True, phase="Failed", exit_code=30)
    world.pod("train-1", 1, created_at=world.now + timedelta(seconds=9))
    world.pod("train-1", 1, scheduled=True, phase="Failed", refused="NodeAffinity: no")
    world.jobs["train-1"] = replace(world.jobs["train-1"], outcome="Failed", finished_at=world.now)
    assert world.step().status["attempts"][-1]["reason"] == "PodNotStarted"


def hold(world: World, name: str, suspended: str | None = "Job suspended") -> World:
    """Somebody else, such as Kueue, suspends the Kubernetes Job, or resumes it."""
    world.jobs[name] = replace(world.jobs[name], suspended=suspended)
    return world


def test_a_kubernetes_job_that_somebody_else_suspends_waits_and_does_not_run():
    world = World().prepared()
    hold(world, "train-1").step()
    assert world.condition(ConditionType.ADMITTED) == ("False", "JobSuspended")
    assert world.condition(ConditionType.RUNNING) == ("False", "JobSuspended")
    assert world.condition(ConditionType.DEGRADED) == ("False", "Healthy"), "a queue is not a fault"
    assert "spec.suspend" in world.message(ConditionType.ADMITTED)
    before = dict(world.status)
    assert world.step(after_s=100_000).status == before
    hold(world, "train-1", None).step().run("train-1")
    assert world.condition(ConditionType.RUNNING) == ("True", "Training")


def test_a_kubernetes_job_that_is_suspended_while_its_pod_trains_waits_too_and_goes_on_in_the_same_attempt():
    world = World(recovery={"maxRetries": 0}).training()
    world.say(step=7, eta_seconds=60).step(31)
    hold(world, "train-1").pod("train-1", phase="Failed", exit_code=30, finished_at=world.now, gone=True).step()
    assert world.condition(ConditionType.RUNNING) == ("False", "JobSuspended")
    assert world.condition(ConditionType.ADMITTED) == ("False", "JobSuspended")
    assert "eta" not in world.status["progress"], "nobody knows how long it waits"
    hold(world, "train-1", None).step(after_s=300)
    world.pod("train-1", 1, created_at=world.now, scheduled=True, phase="Running", started_at=world.now).step()
    assert world.condition(ConditionType.RUNNING) == ("True", "Training")
    assert world.created == ["prepare-1", "train-1"]
    world.end("train-1", 1, fault=Fault.COMMITTED, artifact=ARTIFACT).step()
    assert world.verdict == ("True", "Succeeded")


def test_a_node_that_is_lost_before_the_container_started_is_told():
    world = World().prepared().pod("train-1", scheduled=True, disrupted=True, deletion_due=START)
    world.step(after_s=61)
    assert world.condition(ConditionType.DEGRADED) == ("True", "NodeUnreachable")
    assert world.condition(ConditionType.RUNNING) == ("False", "NodeUnreachable")
    assert world.created == ["prepare-1", "train-1"]


def test_a_pod_that_its_node_has_not_taken_is_told_with_the_node_and_no_event_is_needed():
    world = World().prepared()
    world.pod("train-1", unschedulable="0/1 nodes are available").step(after_s=3600)
    world.pod("train-1", unschedulable=None, scheduled=True, scheduled_at=world.now, node="gpu-7").step()
    assert world.condition(ConditionType.DEGRADED) == ("False", "Healthy")
    assert world.requeue_after_s is not None
    assert world.requeue_after_s <= 16, "no event comes from a node that is away"
    world.step(after_s=world.requeue_after_s)
    assert world.condition(ConditionType.DEGRADED) == ("True", "NodeUnreachable")
    assert world.condition(ConditionType.RUNNING) == ("False", "NodeUnreachable")
    for words in ("node gpu-7", "train-1-0", "2026-01-01T01:00:00Z", "kubelet"):
        assert words in world.message(ConditionType.DEGRADED)
    world.pod("train-1", taken_at=world.now).step()
    assert world.condition(ConditionType.DEGRADED) == ("False", "Healthy"), "an image may be pulled for an hour"
    world.run("train-1")
    assert world.condition(ConditionType.RUNNING) == ("True", "Training")
    assert world.created == ["prepare-1", "train-1"]


def test_words_of_the_cluster_that_differ_in_names_ids_and_numbers_alone_are_no_reason_to_write():
    refusal = 'Job x may not be created: pods "bot-1a2b3-train-1-0-{}" is forbidden: exceeded quota: q, used: pods={}'
    world = World()
    world.blocked = Blocked(Reason.QUOTA_EXCEEDED, refusal.format("x7k2p", 9))
    before = dict(world.step().status)
    world.blocked = Blocked(Reason.QUOTA_EXCEEDED, refusal.format("bcdfg", 10))
    assert world.step(after_s=60).status == before
    lookup = "the trainer image cannot be pulled (ErrImagePull): lookup r.io: read udp 10.0.0.5:{}->10.0.0.10:53: {}"
    world.blocked = Blocked(Reason.IMAGE_PULL, lookup.format(41234, "i/o timeout"))
    before = dict(world.step().status)
    world.blocked = Blocked(Reason.IMAGE_PULL, lookup.format(51111, "i/o timeout"))
    assert world.step(after_s=60).status == before
    world.blocked = Blocked(Reason.IMAGE_PULL, lookup.format(51111, "connection refused"))
    assert "connection refused" in world.step(after_s=60).message(ConditionType.DEGRADED)


def test_no_verdict_is_taken_while_the_pods_that_are_known_do_not_explain_why_the_job_ended():
    world = World(recovery={"maxRetries": 0}).training()
    for outcome, known in (("Failed", {}), ("Complete", {}), ("Failed", {"disrupted": True, "exit_code": 30})):
        world.pods = {}
        if known:
            world.pod("train-1", phase="Failed", **known)
        world.jobs["train-1"] = replace(world.jobs["train-1"], outcome=outcome, finished_at=world.now)
        made = decide(world.view, replace(world.seen, pods_listed=False), world.now)
        assert made.status.attempts[-1].attempt_class == "Running"
        assert made.actions == ()
        assert wants_live_pods(world.view.status, replace(world.seen, pods_listed=False), world.now)
        assert not wants_live_pods(world.view.status, world.seen, world.now), "they are listed once, not for ever"


@pytest.mark.parametrize(("outcome", "code"), [("Failed", 11), ("Failed", 31), ("Complete", 0)])
def test_pods_that_explain_the_end_are_not_listed_once_more(outcome: str, code: int):
    world = World().training().end("train-1", code=code)
    assert not wants_live_pods(world.view.status, replace(world.seen, pods_listed=False), world.now)


def test_the_time_in_which_a_job_is_suspended_does_not_count_against_its_deadline():
    world = World(activeDeadlineSeconds=3600).training()
    world.spec["suspend"] = True
    world.step(after_s=1000).end("train-1", fault=Fault.INTERRUPTED).gone("train-1").step(after_s=100)
    assert world.step(after_s=100_000).phase == Phase.SUSPENDED
    world.spec["suspend"] = False
    world.step().run("train-2")
    assert world.status["record"]["suspendedSeconds"] == 100_000
    assert "suspendedSince" not in world.status["record"]
    world.step(after_s=2499)
    assert world.verdict[0] == "Unknown"
    assert world.requeue_after_s == 1
    world.step(after_s=1)
    assert world.verdict == ("False", "DeadlineExceeded")
    words = "100000 s in which it was suspended, or waited for approval or another job, are not counted"
    assert words in world.message(ConditionType.SUCCEEDED)


def test_time_in_a_queue_that_suspends_the_kubernetes_job_does_not_count_against_the_deadline_either():
    world = World(activeDeadlineSeconds=3600).prepared()
    hold(world, "train-1").step().step(after_s=100_000)
    assert world.verdict[0] == "Unknown"
    hold(world, "train-1", None).step().run("train-1").step(after_s=3599)
    assert world.verdict[0] == "Unknown"
    world.step(after_s=1)
    assert world.verdict == ("False", "DeadlineExceeded")


def test_a_job_whose_status_an_earlier_operator_or_crd_wrote_has_no_suspended_time_and_its_deadline():
    world = World(activeDeadlineSeconds=3600).training()
    assert set(world.status["record"]) <= {"acceptedAt", "disruptions", "disruptedPods", "runConfig", "runDigest"}
    world.step(after_s=3600)
    assert world.verdict == ("False", "DeadlineExceeded")
    assert "suspended" not in world.message(ConditionType.SUCCEEDED)


@pytest.mark.parametrize("operator_is_there", [True, False])
def test_storage_that_is_denied_after_hours_of_good_work_gets_the_whole_patience_again(operator_is_there: bool):
    world = World().step().run("prepare-1").end("prepare-1", fault=Fault.ACCESS_DENIED).step().step(after_s=15)
    world.run("prepare-2")
    if operator_is_there:
        world.step(after_s=3 * 3600)
        assert "storageWaitSince" not in world.status["record"]
    else:
        world.now += timedelta(hours=3)
    world.end("prepare-2", fault=Fault.TOKEN_EXPIRED)
    denied_at = world.now
    world.step()
    assert world.verdict[0] == "Unknown"
    assert world.status["record"]["storageWaitSince"] == format_time(denied_at)
    for attempt in range(3, 40):
        world.step(after_s=60).run(f"prepare-{attempt}").end(f"prepare-{attempt}", fault=Fault.TOKEN_EXPIRED).step()
        if world.phase == Phase.FAILED:
            break
    assert world.verdict == ("False", "AccessDenied")
    assert timedelta(minutes=15) <= world.now - denied_at < timedelta(minutes=17)


def test_a_queue_that_suspends_the_kubernetes_job_stops_the_clock_of_patience():
    world = World().step().run("prepare-1").end("prepare-1", fault=Fault.ACCESS_DENIED).step().step(after_s=15)
    hold(world, "prepare-2").step().step(after_s=3600)
    hold(world, "prepare-2", None).step().run("prepare-2").end("prepare-2", fault=Fault.ACCESS_DENIED).step()
    assert world.verdict[0] == "Unknown"


def unanswered(world: World, seconds: int, stage: Stage = TRAIN) -> World:
    """The pod was asked for so long, and could not even be reached."""
    since = world.now - timedelta(seconds=seconds)
    world.silence = PodSilence(stage, 1, f"uid-{stage.value}-1", "uid", since, world.now)
    return world


@pytest.mark.parametrize("stage", [PREPARE, TRAIN])
def test_a_pod_that_never_answered_is_told_and_goes_on(stage: Stage):
    world = (World().step().run("prepare-1")) if stage == PREPARE else World().training()
    unanswered(world, 120, stage).step()
    assert world.condition(ConditionType.DEGRADED) == ("False", "Healthy")
    unanswered(world, 121, stage).step()
    assert world.condition(ConditionType.DEGRADED) == ("True", "NoAnswer")
    for words in ("NetworkPolicy", "port 9400"):
        assert words in world.message(ConditionType.DEGRADED)
    assert world.condition(ConditionType.RUNNING)[0] == "True"
    before = dict(world.status)
    world.now += timedelta(days=2)
    assert unanswered(world, 121 + 2 * 86400, stage).step().status == before, "it may train on: it is not stopped"
    assert not world.jobs[f"{stage.value}-1"].deleting
    world.silence = None
    assert world.step().condition(ConditionType.DEGRADED) == ("False", "Healthy")
    assert [e.type for e in world.events if e.reason in ("NoAnswer", "Healthy")] == ["Warning", "Normal"]


def test_a_pod_that_answers_no_more_shows_no_time_left():
    world = World().training()
    world.say(step=4, eta_seconds=600).step()
    assert world.status["progress"]["eta"] == "10m"
    unanswered(world, 0).step(after_s=60)
    assert world.status["progress"]["eta"] == "10m"
    unanswered(world, 121).step(after_s=61)
    assert world.status["progress"]["stale"] is True
    assert "eta" not in world.status["progress"]
    world.silence = None
    world.now += timedelta(seconds=31)
    world.say(step=9, eta_seconds=300).step()
    assert (world.status["progress"]["stale"], world.status["progress"]["eta"]) == (False, "5m")


def test_data_that_is_prepared_by_a_pod_that_is_reached_and_says_nothing_is_stopped_at_the_deadline():
    world = World(recovery={"progressDeadlineSeconds": 600}).step().run("prepare-1")
    since = world.now
    world.now += timedelta(seconds=601)
    world.silence = PodSilence(PREPARE, 1, "uid-prepare-1", "uid", since, world.now, reached_since=since)
    assert world.step().jobs["prepare-1"].deleting
    assert world.last["reason"] == "NoProgress"


@pytest.mark.parametrize("code", [1, 11])
def test_a_job_that_failed_or_waits_for_its_next_attempt_shows_no_time_left(code: int):
    world = World().training()
    world.say(step=4, eta_seconds=600).step()
    world.end("train-1", code=code).step()
    assert "eta" not in world.status["progress"]
    assert "estimatedRemainingSeconds" not in world.status["progress"]
    assert world.status["progress"]["step"] == 4


def test_a_job_whose_name_begins_with_a_digit_is_taken_and_its_children_have_names_that_kubernetes_takes():
    world = World()
    world.meta["name"] = "7" * MAX_NAME_LENGTH
    assert world.step().run("prepare-1").created == ["prepare-1"]
    pod = f"{child_name(world.meta['name'], '0' * 36, PREPARE, 999)}-0"
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", pod)
    assert len(pod) <= 63


def test_an_image_that_cannot_be_pulled_is_not_told_anew_with_every_try_and_pause_of_the_kubelet():
    cause = "failed to resolve image: unexpected status from HEAD request to https://r.io/v2/x: 403 Forbidden"
    world = World().step().pod("prepare-1", scheduled=True, waiting_reason="ErrImagePull", waiting_message=cause)
    before = dict(world.step().status)
    assert cause in world.message(ConditionType.DEGRADED)
    paused = f'Back-off pulling image "r.io/x@sha256:0": ErrImagePull: {cause}'
    world.pod("prepare-1", waiting_reason="ImagePullBackOff", waiting_message=paused)
    assert world.step(after_s=20).status == before


def test_a_manual_job_waits_at_its_plan_until_it_is_approved():
    world = World()
    world.spec["startPolicy"] = "Manual"
    world.prepared()
    assert world.created == ["prepare-1"]
    assert world.phase == Phase.WAITING
    assert world.condition(ConditionType.PLANNED) == ("True", "Prepared")
    for kind in (ConditionType.ADMITTED, ConditionType.RUNNING, ConditionType.FINISHED):
        assert world.condition(kind) == ("False", "AwaitingApproval")
    assert world.verdict == ("Unknown", "AwaitingApproval")
    assert world.condition(ConditionType.DEGRADED) == ("False", "Healthy")
    assert "spec.startPolicy to Automatic" in world.message(ConditionType.RUNNING)
    assert world.reasons().count("AwaitingApproval") == 1
    assert "Warning" not in {event.type for event in world.events}
    world.step(after_s=500_000)
    assert world.created == ["prepare-1"]
    world.spec["startPolicy"] = "Automatic"
    world.step()
    assert world.created[-1] == "train-1"
    assert world.phase == Phase.PENDING
    world.run("train-1")
    assert world.condition(ConditionType.RUNNING) == ("True", "Training")


def test_time_in_which_a_plan_waits_for_approval_does_not_count_against_the_deadline():
    world = World()
    world.spec |= {"startPolicy": "Manual", "activeDeadlineSeconds": 3600}
    world.prepared().step(after_s=100_000)
    assert world.phase == Phase.WAITING
    world.spec["startPolicy"] = "Automatic"
    world.step()
    assert world.created[-1] == "train-1"


def test_a_job_that_trains_is_not_held_back_by_asking_for_approval_then():
    world = World().training()
    world.spec["startPolicy"] = "Manual"
    world.step()
    assert world.phase == Phase.TRAINING
    world.end("train-1", fault=Fault.INTERRUPTED).gone("train-1").step(after_s=1000)
    assert world.created[-1] == "train-2"


def test_training_that_was_suspended_before_it_started_needs_no_less_approval_than_before():
    world = World().prepared()
    assert world.created[-1] == "train-1"
    world.spec["suspend"] = True
    world.pod("train-1").step().gone("train-1").step()
    assert world.phase == Phase.SUSPENDED
    world.spec |= {"suspend": False, "startPolicy": "Manual"}
    world.step(after_s=1000)
    assert (world.phase, world.created[-1]) == (Phase.WAITING, "train-1")
    world.spec["startPolicy"] = "Automatic"
    world.step()
    assert world.created[-1] == "train-2"


def test_a_manual_job_that_is_suspended_while_it_waits_says_suspended_and_then_waits_again():
    world = World()
    world.spec |= {"startPolicy": "Manual"}
    world.prepared()
    world.spec["suspend"] = True
    world.step()
    assert world.phase == Phase.SUSPENDED
    world.spec["suspend"] = False
    world.step()
    assert (world.phase, world.condition(ConditionType.RUNNING)) == (Phase.WAITING, ("False", "AwaitingApproval"))


ADAPTER = Artifact.model_validate(ARTIFACT)
PARENT = ParentJob(uid="uid-of-cpt", phase=Phase.TRAINING, end=None, artifact=None)
COMMITTED = replace(PARENT, phase=Phase.SUCCEEDED, end="Succeeded: committed", artifact=ADAPTER)


def child(**spec: Any) -> World:
    """A job that goes on with the adapter of a job which does not exist yet."""
    return World(model=SPEC["model"] | {"adapterFrom": {"jobName": "cpt"}}, **spec).step()


def test_a_job_waits_for_the_one_whose_adapter_it_goes_on_with_from_before_that_exists_to_its_commit():
    world = child()
    assert (world.phase, world.condition(ConditionType.RUNNING)) == (Phase.WAITING, ("False", "WaitingForJob"))
    assert "FineTuneJob cpt of model.adapterFrom does not exist" in world.message(ConditionType.RUNNING)
    assert world.condition(ConditionType.PLANNED) == ("Unknown", "WaitingForJob")
    assert world.message(ConditionType.PLANNED) == world.message(ConditionType.RUNNING)
    assert world.requeue_after_s == PARENT_ASKED_EVERY_S
    world.parent = PARENT
    world.step(after_s=500_000)
    assert world.message(ConditionType.RUNNING) == "FineTuneJob cpt of model.adapterFrom is Training"
    assert world.condition(ConditionType.DEGRADED) == ("False", "Healthy")
    assert "Warning" not in {event.type for event in world.events}
    assert world.created == []
    world.parent = COMMITTED
    world.step()
    assert world.created == ["prepare-1"]
    assert world.condition(ConditionType.PLANNED) == ("Unknown", "Preparing")
    kept = {"jobUid": "uid-of-cpt", "uri": ADAPTER.uri, "digest": ADAPTER.digest}
    assert world.status["record"]["adapterFrom"] == kept
    world.parent = None
    world.step()
    assert world.phase == Phase.PENDING, "it has the adapter: the job that made it may be deleted"
    assert world.status["record"]["adapterFrom"] == kept


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (replace(PARENT, phase=Phase.FAILED, end="Diverged: 5 steps"), "ended without one: Diverged: 5 steps"),
        (replace(PARENT, phase=Phase.PLANNED, end="Planned: planned"), "ended without one: Planned: planned"),
        (replace(PARENT, circle=("cpt", "dpo", "bot")), "this one for cpt for dpo for bot; create one of them without"),
        (None, "was deleted before it had one"),
        (replace(PARENT, uid="another"), "was deleted and created anew before it had one"),
        (replace(COMMITTED, uid="another"), "was deleted and created anew before it had one"),
    ],
)
def test_a_job_ends_where_the_adapter_that_it_waits_for_will_not_come(seen: ParentJob | None, words: str):
    world = child()
    world.parent = PARENT
    world.step()
    world.parent = seen
    world.step()
    assert world.verdict == ("False", "NoAdapterToCome")
    assert words in world.message(ConditionType.SUCCEEDED)
    assert world.created == []


def test_time_in_which_a_job_waits_for_another_does_not_count_against_the_deadline():
    world = child(activeDeadlineSeconds=3600)
    world.parent = PARENT
    world.step(after_s=100_000)
    assert world.phase == Phase.WAITING
    world.parent = COMMITTED
    world.step()
    assert world.created == ["prepare-1"]


def test_an_adapter_that_is_named_by_its_place_is_not_waited_for():
    world = World(model=SPEC["model"] | {"adapterFrom": {"uri": "s3://adapters/cpt/adapter"}}).step()
    assert world.created == ["prepare-1"]


def test_a_job_that_is_only_planned_ends_with_its_plan_and_no_training_pod():
    world = World()
    world.spec["startPolicy"] = "PlanOnly"
    world.prepared()
    assert world.created == ["prepare-1"]
    assert world.phase == Phase.PLANNED
    assert world.phase in FINAL_PHASES  # the operator does not ask for it again and again
    assert world.condition(ConditionType.PLANNED) == ("True", "Prepared")
    assert world.condition(ConditionType.FINISHED) == ("True", "Planned")
    assert world.verdict == ("False", "Planned")  # it has no adapter
    assert world.condition(ConditionType.READY) == ("True", "Planned")
    assert world.condition(ConditionType.STALLED) == ("False", "Healthy")
    assert world.reasons()[-1] == "Planned"
    assert "Warning" not in {event.type for event in world.events}
    world.spec["startPolicy"] = "Automatic"  # too late: the verdict is told
    world.step(after_s=1000)
    assert (world.created, world.phase) == (["prepare-1"], Phase.PLANNED)


def test_a_plan_that_cannot_be_made_fails_whatever_the_policy():
    world = World()
    world.spec["startPolicy"] = "PlanOnly"
    world.step().run("prepare-1").end("prepare-1", fault=Fault.NO_CHAT_TEMPLATE).gone("prepare-1").step()
    assert world.phase == Phase.FAILED


def test_a_waiting_plan_may_be_asked_for_alone():
    world = World()
    world.spec["startPolicy"] = "Manual"
    world.prepared()
    world.spec["startPolicy"] = "PlanOnly"
    world.step()
    assert world.phase == Phase.PLANNED


def kubelet_starts(world: World, name: str) -> World:
    """All that the API server tells of a pod from its birth until it runs, one after the other."""
    world.pod(name).step(0.5)
    world.pod(name, scheduled=True).step(0.5)
    world.pod(name, waiting_reason="ContainerCreating").step(0.5)
    return world.pod(name, waiting_reason=None, phase="Running", started_at=world.now).step(1)


def test_a_job_that_goes_well_is_written_six_times_at_most():
    """Each write costs the API server one, and each watcher a message: what starts at once is told once."""
    world = World().step()
    kubelet_starts(world, "prepare-1").end("prepare-1", fault=Fault.PREPARED, plan=PLAN, data=DATA).step(60)
    kubelet_starts(world, "train-1").end("train-1", fault=Fault.COMMITTED, artifact=ARTIFACT, step=100).step(60)
    assert world.verdict == ("True", "Succeeded")
    assert world.writes <= 6


@pytest.mark.parametrize("waited", [False, True])
def test_a_place_is_told_with_the_start_of_the_pod_unless_the_job_waited_for_it_or_the_start_takes_long(waited: bool):
    world = World().step()
    world.pod("prepare-1", unschedulable="0/3 nodes" if waited else None).step(1)
    before = world.condition(ConditionType.ADMITTED)[0]
    world.pod("prepare-1", scheduled=True, unschedulable=None).step(1)
    assert before == ("False" if waited else "Unknown")
    assert world.condition(ConditionType.ADMITTED)[0] == ("True" if waited else "Unknown")
    assert "jobUid" not in world.last
    assert world.requeue_after_s is not None
    world.step(world.requeue_after_s)
    assert world.condition(ConditionType.ADMITTED)[0] == "True"
    assert world.last["jobUid"] == "uid-prepare-1"
