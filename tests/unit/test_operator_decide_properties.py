"""Whatever is observed, `plan` is total and idempotent, keeps its verdict, and never wants two writers."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from finetune_api.names import Stage
from finetune_api.reasons import EXIT_CODES, FAULTS, Fault, Reason
from finetune_api.run import Progress, RunResult
from finetune_api.status import FINAL_PHASES
from finetune_operator.clock import format_time
from finetune_operator.close_attempts import digest_of_proof
from finetune_operator.decide import decide
from finetune_operator.decision import CreateK8sJob, Decision, DeleteK8sJob, SetK8sJobTtl
from finetune_operator.gates import has_trained
from finetune_operator.job_reader import FineTuneJob, is_finished, read_job
from finetune_operator.observation import Blocked, CreatedK8sJob, Observation, PodAnswer, PodSilence
from finetune_operator.observed import ObservedK8sJob, ObservedPod, as_gone
from status_samples import ARTIFACT, DATA, PLAN, SPEC

START = datetime(2026, 1, 1, tzinfo=UTC)

times = st.integers(0, 5000).map(lambda s: START + timedelta(seconds=s))
maybe_times = st.none() | times
stored_times = times.map(format_time) | st.sampled_from(["", "9999-12-31T23:59:59Z"])
stages = st.sampled_from(list(Stage))
attempts = st.integers(1, 4) | st.just(999)
words = st.sampled_from(["words", "ünï\n\x00code", "x" * 2000])
texts = st.just("") | words
uids = st.sampled_from(["u-1", "u-2", "u-3", "u-4"])
reason_words = st.sampled_from([r.value for r in Reason]) | st.just("OfTheFuture")


def result(stage: Stage, attempt: int, fault: Fault, full: bool, code: int | None = None) -> RunResult:
    more: dict[str, Any] = {}
    if full:
        more = {"plan": PLAN, "data": DATA} if stage == Stage.PREPARE else {"artifact": ARTIFACT, "step": 100}
    exit_code = EXIT_CODES[FAULTS[fault].reason] if code is None else code
    return RunResult.model_validate(
        {"stage": stage, "attempt": attempt, "fault": fault, "exit_code": exit_code, **more}
    )


results = st.builds(
    result, stages, attempts, st.sampled_from(list(Fault)), st.booleans(), st.none() | st.integers(0, 255)
)
jobs = st.builds(
    ObservedK8sJob,
    name=uids,
    uid=uids,
    stage=stages,
    attempt=attempts,
    created_at=times,
    deleting=st.booleans(),
    outcome=st.sampled_from([None, "Complete", "Failed"]),
    message=texts,
    finished_at=maybe_times,
    ttl_seconds=st.none() | st.integers(0, 100),
    suspended=st.none() | texts,
)
pods = st.builds(
    ObservedPod,
    name=texts,
    uid=uids,
    stage=stages,
    attempt=attempts,
    created_at=times,
    phase=st.sampled_from(["Pending", "Running", "Succeeded", "Failed", "Odd"]),
    gone=st.booleans(),
    deletion_due=maybe_times,
    scheduled=st.booleans(),
    scheduled_at=maybe_times,
    node=st.none() | texts,
    taken_at=maybe_times,
    unschedulable=st.none() | texts,
    disrupted=st.booleans(),
    evicted=st.booleans(),
    refused=st.none() | texts,
    waiting_reason=st.sampled_from([None, "ImagePullBackOff", "CreateContainerConfigError", "Odd"]),
    waiting_message=texts,
    waiting_container=st.none() | texts,
    started_at=maybe_times,
    finished_at=maybe_times,
    exit_code=st.none() | st.integers(0, 255),
    oom_killed=st.booleans(),
    gpus=st.integers(0, 8),
    result=st.none() | results,
    bad_result=st.booleans(),
)


def answer(attempt: int, step: int, seconds: float, loss: float | None, at: datetime, job_uid: str) -> PodAnswer:
    fields = {"stage": "train", "attempt": attempt, "activity": "Training", "step": step, "total_steps": 100}
    ages = {"seconds_since_step": seconds, "seconds_since_checkpoint": seconds, "eta_seconds": seconds**40}
    return PodAnswer(Progress.model_validate({**fields, **ages, "train_loss": loss}), at, job_uid)


steps = st.integers(0, 200) | st.just(2**53 - 1)
progresses = st.builds(answer, attempts, steps, st.floats(0, 1e7), st.none() | st.floats(), times, uids)
silences = st.builds(PodSilence, stages, attempts, uids, st.just("u"), times, times, maybe_times)
seens = st.builds(
    Observation,
    st.lists(jobs, max_size=3).map(tuple),
    st.lists(pods, max_size=3).map(tuple),
    st.lists(progresses, max_size=2).map(tuple),
    st.none() | st.builds(Blocked, st.sampled_from(list(Reason)), words),
    silences=st.lists(silences, max_size=2).map(tuple),
    pods_listed=st.booleans(),
)
entries = st.fixed_dictionaries(
    {
        "number": attempts,
        "stage": st.sampled_from(["prepare", "train"]),
        "class": st.sampled_from(
            ["Running", "Succeeded", "Failure", "Disruption", "Suspended", "Superseded", "Waiting"]
        ),
    },
    optional={
        "reason": reason_words,
        "exitCode": st.integers(0, 255),
        "startedAt": times.map(format_time) | st.sampled_from(["yesterday", "0001-01-01T00:00:00+14:00"]),
        "finishedAt": times.map(format_time) | st.just("never"),
    },
)
conditions = st.lists(
    st.fixed_dictionaries({
        "type": st.sampled_from(["Running", "Suspended", "Degraded", "Ready", "Stalled", "Succeeded", "Planned"]),
        "status": st.sampled_from(["True", "False", "Unknown"]),
        "reason": reason_words,
        "message": words,
        "lastTransitionTime": times.map(format_time),
        "observedGeneration": st.integers(0, 3),
    }),
    max_size=6,
    unique_by=lambda c: c["type"],
)  # fmt: skip
records = st.fixed_dictionaries(
    {"disruptions": st.integers(0, 30)},
    optional={
        "acceptedAt": stored_times,
        "storageWaitSince": stored_times,
        "suspendedSince": stored_times,
        "suspendedSeconds": st.integers(0, 10**9),
    },
)
statuses = st.fixed_dictionaries(
    {},
    optional={
        "attempts": st.lists(entries, max_size=4),
        "conditions": conditions,
        "record": records,
        "failures": st.integers(0, 5),
        "plan": st.just(PLAN),
        "data": st.just(DATA),
        "artifacts": st.just([ARTIFACT]),
        "phase": st.sampled_from(["Pending", "Training", "OfTheFuture"]),
        "ofTheFuture": st.just({"x": 1}),
    },
)
specs = st.fixed_dictionaries(
    {key: st.just(value) for key, value in SPEC.items()}
    | {"method": st.sampled_from([{"type": "SFT"}, {"type": "SFT"}, {"type": "SFT"}, {"type": "Odd"}])},
    optional={
        "suspend": st.booleans(),
        "startPolicy": st.sampled_from(["Automatic", "Manual", "PlanOnly"]),
        "activeDeadlineSeconds": st.integers(60, 6000),
        "recovery": st.fixed_dictionaries({"maxRetries": st.integers(0, 3), "maxDisruptions": st.integers(0, 3)}),
        "ttlSecondsAfterFinished": st.integers(0, 100),
    },
)


def job_view(spec: dict[str, Any], status: dict[str, Any]) -> FineTuneJob:
    meta = {"name": "bot", "namespace": "a", "uid": "1a2b3c4d-0000", "generation": 2}
    return read_job({"metadata": meta, "spec": spec, "status": status})


def dumped(made: Decision) -> dict[str, Any]:
    return made.status.model_dump(mode="json", by_alias=True, exclude_none=True)


@settings(max_examples=500, deadline=None)
@given(specs, statuses, seens, times)
def test_a_decision_is_bounded_creates_at_most_one_job_and_says_nothing_new_when_made_again(
    spec: dict[str, Any], status: dict[str, Any], seen: Observation, now: datetime
):
    """All of them about the same examples, which take longer to make than to decide on."""
    made = decide(job_view(spec, status), seen, now)
    is_bounded(made)
    creates_a_job_only_when_nothing_of_another_attempt_is_alive(made, spec, seen)
    writes_and_tells_nothing_when_made_again(spec, status, seen, now)


def is_bounded(made: Decision) -> None:
    assert len(made.status.model_dump_json(by_alias=True, exclude_none=True).encode()) <= 8192
    assert len(made.status.attempts) <= 10
    assert all(0 < len(event.message) <= 1024 for event in made.events)
    assert made.requeue_after_s is None or made.requeue_after_s > 0


def about_the_open_attempt(job: FineTuneJob, seen: Observation, now: datetime) -> Observation:
    """A refusal is about the newest attempt, which is then open: without one, nobody was refused anything."""
    without = replace(seen, blocked=None)
    before, after = job.status.attempts, decide(job, without, now).status.attempts
    same = bool(before and after) and before[-1].attempt_class == after[-1].attempt_class == "Running"
    return seen if same and (before[-1].stage, before[-1].number) == (after[-1].stage, after[-1].number) else without


def writes_and_tells_nothing_when_made_again(
    spec: dict[str, Any], status: dict[str, Any], seen: Observation, now: datetime
) -> None:
    seen = about_the_open_attempt(job_view(spec, status), seen, now)
    first = decide(job_view(spec, status), seen, now)
    second = decide(job_view(spec, dumped(first)), seen, now)
    assert dumped(second) == dumped(first)
    assert second.events == ()
    if not is_finished(first.status):
        assert second.actions == first.actions


def creates_a_job_only_when_nothing_of_another_attempt_is_alive(
    made: Decision, spec: dict[str, Any], seen: Observation
) -> None:
    creations = [action for action in made.actions if isinstance(action, CreateK8sJob)]
    assert len(creations) <= 1
    if creations:
        assert not any(job.live for job in seen.k8s_jobs)
        assert not any(pod.active for pod in seen.pods)
        assert spec.get("suspend") is not True


@settings(max_examples=500, deadline=None)
@given(specs, statuses, seens, seens, times, st.integers(0, 10**6))
def test_a_verdict_is_never_left_and_creates_nothing(
    spec: dict[str, Any], status: dict[str, Any], seen: Observation, later: Observation, now: datetime, wait_s: int
):
    first = decide(job_view(spec, status), seen, now)
    if not is_finished(first.status):
        return
    after = decide(job_view(spec, dumped(first)), later, now + timedelta(seconds=wait_s))
    assert dumped(after) == dumped(first)
    assert not any(isinstance(action, CreateK8sJob) for action in after.actions)
    assert after.events == ()


DIGEST = "sha256:" + "d" * 64


class OneJobInACluster(RuleBasedStateMachine):
    """Kubernetes, users and faults do what they like; the operator is run, and killed between its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self.spec = SPEC | {"recovery": {"maxRetries": 2, "maxDisruptions": 2}}
        self.status: dict[str, Any] = {}
        self.jobs: dict[str, ObservedK8sJob] = {}
        self.pods: dict[str, ObservedPod] = {}
        self.verdict: dict[str, Any] | None = None
        self.created = 0
        self.last_created: CreatedK8sJob | None = None

    @property
    def seen(self) -> Observation:
        return Observation(
            tuple(self.jobs.values()), tuple(self.pods.values()), created=self.last_created, pods_listed=True
        )

    @rule(killed=st.booleans(), wait_s=st.sampled_from([0, 1, 20, 100]))
    def operator(self, killed: bool, wait_s: int) -> None:
        """One round; killed, it writes the status and does nothing of what it wanted."""
        self.now += timedelta(seconds=wait_s)
        job = job_view(self.spec, self.status)
        made = decide(job, self.seen, self.now)
        if has_trained(made.status) and not has_trained(job.status):
            assert self.spec.get("startPolicy", "Automatic") == "Automatic", "nobody has approved its plan"
        self.status = dumped(made)
        if killed:
            return
        for action in made.actions:
            match action:
                case CreateK8sJob(stage, attempt, _):
                    self._create(stage, attempt)
                case DeleteK8sJob(name, _):
                    self.jobs[name] = replace(self.jobs[name], deleting=True)
                case SetK8sJobTtl(name, _, seconds):
                    self.jobs[name] = replace(self.jobs[name], ttl_seconds=seconds)

    def _create(self, stage: Stage, attempt: int) -> None:
        name = f"{stage.value}-{attempt}"
        if name not in self.jobs:
            self.created += 1
            self.jobs[name] = ObservedK8sJob(name, f"{name}-{self.created}", stage, attempt, self.now)
            self.jobs[name] = replace(self.jobs[name], proof=f"proof of {self.created}")
            self.status["attempts"][-1]["jobProof"] = digest_of_proof(f"proof of {self.created}")
            self.last_created = CreatedK8sJob(stage, attempt, f"proof of {self.created}")
            self.status["record"]["runDigest"] = DIGEST  # as the shell notes it, before it creates

    @precondition(lambda self: any(job.live and not job.deleting for job in self.jobs.values()))
    @rule(pick=st.booleans())
    def a_queue_suspends_or_resumes_the_job(self, pick: bool) -> None:
        job = next(job for job in self.jobs.values() if job.live and not job.deleting)
        self.jobs[job.name] = replace(job, suspended="by a queue" if pick else None)
        for pod in [pod for pod in self.pods.values() if pod.active and pick]:
            self.pods[pod.uid] = replace(pod, phase="Failed", exit_code=30, finished_at=self.now, gone=True)

    @precondition(lambda self: any(job.live and not job.deleting for job in self.jobs.values()))
    @rule()
    def the_node_refuses_the_pod(self) -> None:
        self.pod_starts()
        pod = next((pod for pod in self.pods.values() if pod.active), None)
        if pod is not None and pod.started_at == self.now:
            self.pods[pod.uid] = replace(pod, phase="Failed", started_at=None, refused="OutOfcpu: no")
            name = f"{pod.stage.value}-{pod.attempt}"
            self.jobs[name] = replace(self.jobs[name], outcome="Failed", finished_at=self.now)

    @precondition(lambda self: any(job.live and not job.deleting for job in self.jobs.values()))
    @rule()
    def pod_starts(self) -> None:
        job = next(job for job in self.jobs.values() if job.live and not job.deleting)
        if job.suspended is not None:
            return
        mine = [p for p in self.pods.values() if (p.stage, p.attempt) == (job.stage, job.attempt)]
        if not any(p.active for p in mine):
            uid = f"{job.uid}-{len(mine)}"
            self.pods[uid] = ObservedPod(
                uid, uid, job.stage, job.attempt, self.now, "Running", scheduled=True, started_at=self.now,
                owner_uid=job.uid,
            )  # fmt: skip

    @precondition(lambda self: any(pod.active for pod in self.pods.values()))
    @rule(fault=st.sampled_from(list(Fault)), full=st.booleans(), told=st.booleans(), disrupted=st.booleans())
    def pod_ends(self, fault: Fault, full: bool, told: bool, disrupted: bool) -> None:
        pod = next(p for p in self.pods.values() if p.active)
        said = result(pod.stage, pod.attempt, fault, full)
        phase = "Succeeded" if said.exit_code == 0 else "Failed"
        self.pods[pod.uid] = replace(
            pod, phase=phase, exit_code=said.exit_code, result=said if told else None, finished_at=self.now,
            disrupted=disrupted and said.exit_code != 0,
        )  # fmt: skip
        job = self.jobs.get(f"{pod.stage.value}-{pod.attempt}")
        ignored = disrupted and not 10 <= said.exit_code < 30
        if job is not None and job.live and (said.exit_code == 0 or not ignored):
            outcome = "Complete" if said.exit_code == 0 else "Failed"
            self.jobs[job.name] = replace(job, outcome=outcome, finished_at=self.now)

    @precondition(lambda self: any(job.deleting for job in self.jobs.values()))
    @rule()
    def deletion_ends(self) -> None:
        job = next(job for job in self.jobs.values() if job.deleting)
        self._vanish(job)

    @precondition(lambda self: bool(self.jobs))
    @rule(pick=st.integers(0, 9))
    def somebody_deletes_a_job(self, pick: int) -> None:
        self._vanish(sorted(self.jobs.values(), key=lambda j: j.name)[pick % len(self.jobs)])

    def _vanish(self, job: ObservedK8sJob) -> None:
        del self.jobs[job.name]
        for uid, pod in self.pods.items():
            if (pod.stage, pod.attempt) == (job.stage, job.attempt):
                self.pods[uid] = as_gone(pod)

    @rule()
    def the_operator_restarts_and_has_forgotten_deleted_pods(self) -> None:
        self.pods = {uid: pod for uid, pod in self.pods.items() if not pod.gone}
        self.last_created = None

    @rule(suspend=st.booleans())
    def user_suspends_or_resumes(self, suspend: bool) -> None:
        self.spec["suspend"] = suspend

    @rule(policy=st.sampled_from(["Automatic", "Manual", "Manual", "PlanOnly"]))
    def user_changes_the_start_policy(self, policy: str) -> None:
        self.spec["startPolicy"] = policy

    @invariant()
    def at_most_one_job_is_alive(self) -> None:
        assert sum(job.live for job in self.jobs.values()) <= 1
        assert sum(pod.active for pod in self.pods.values()) <= 1

    @invariant()
    def the_verdict_stays(self) -> None:
        if self.verdict is not None:
            assert self.status == self.verdict
        elif is_finished(job_view(self.spec, self.status).status):
            self.verdict = dict(self.status)

    @invariant()
    def a_phase_that_the_server_selects_as_final_means_a_verdict(self) -> None:
        is_over = is_finished(job_view(self.spec, self.status).status)
        assert (self.status.get("phase") in FINAL_PHASES) == is_over

    @invariant()
    def success_means_an_artifact(self) -> None:
        if self.status.get("phase") == "Succeeded":
            assert self.status["artifacts"]

    def teardown(self) -> None:
        """With a cluster that works and a user who lets it, every job comes to an end."""
        self.spec["suspend"] = False
        self.jobs = {name: replace(job, suspended=None) for name, job in self.jobs.items()}
        for _ in range(60):
            self.operator(killed=False, wait_s=100)
            if self.status.get("phase") in FINAL_PHASES:
                return
            if self.status.get("phase") == "Waiting":
                self.spec["startPolicy"] = "Automatic"
            for job in [job for job in self.jobs.values() if job.deleting]:
                self._vanish(job)
            if any(pod.active for pod in self.pods.values()):
                stage = next(p.stage for p in self.pods.values() if p.active)
                fault = Fault.PREPARED if stage == Stage.PREPARE else Fault.COMMITTED
                self.pod_ends(fault, True, True, False)
            elif any(job.live for job in self.jobs.values()):
                self.pod_starts()
        raise AssertionError(f"never ends: {self.status}")


TestOneJobInACluster = OneJobInACluster.TestCase
TestOneJobInACluster.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
