"""The operator as it is shipped, `python -m finetune_operator`, against a real API server and its controllers.

There is no kubelet: the tests play it, by writing what a kubelet would write into the status of the pods.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config

import testbed
from built import require_program
from finetune_api import defaults, names
from finetune_api.names import GROUP, PLURAL, VERSION
from finetune_api.reasons import EXIT_CODES, FAULTS, Fault
from finetune_operator.__main__ import EXIT_CRD_GONE
from finetune_operator.engine import MISSING_CRD
from finetune_operator.phase_selectors import CANNOT_SELECT
from finished_samples import finished_job
from status_samples import ARTIFACT, CHECKPOINT, DATA, DIGEST, PLAN, SPEC
from testbed.instance import free_ports
from waiting import PATIENCE_S, until

pytestmark = pytest.mark.control_plane

ROOT = Path(__file__).resolve().parents[2]
FOREIGN_PODS = 5_000
# The operator with lists in small pages.
SMALL_PAGES = """
import sys
from finetune_operator import cluster
cluster.PAGE = 7
from finetune_operator.__main__ import main
sys.exit(main())
"""


class Operator:
    """One operator process that watches one namespace, unless `env` says otherwise."""

    def __init__(
        self, kubeconfig: Path, namespace: str, folder: Path, identity: str = "operator-0", **env: str
    ) -> None:
        self._runtimes = folder / "runtimes.yaml"
        self.offer("default")
        self.log = folder / "operator.log"
        self.port = free_ports("127.0.0.1", ["http"])["http"]
        self._env = {
            **os.environ,
            "KUBECONFIG": str(kubeconfig),
            "FINETUNE_NAMESPACE": namespace,
            "FINETUNE_WATCH_NAMESPACES": namespace,
            "FINETUNE_IDENTITY": identity,
            "FINETUNE_RUNTIMES_FILE": str(self._runtimes),
            "FINETUNE_HTTP_PORT": str(self.port),
            "FINETUNE_RESYNC_INTERVAL_S": "1",
            "FINETUNE_LEASE_DURATION_S": "20",  # a busy machine renews it in time
            "PYTHONUNBUFFERED": "1",
            **env,
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.program = ["-m", "finetune_operator"]

    def offer(self, *runtimes: str, policy: dict[str, Any] | None = None) -> None:
        """What Helm does when the platform team changes its values."""
        small = {"cpu": 1, "memory": "512Mi", "ephemeralStorage": "1Gi"}
        runtime: dict[str, Any] = {"image": "trainer@sha256:0", "prepare": small}
        runtime["defaults"] = {**small, "sharedMemory": "64Mi"}
        runtime |= {} if policy is None else {"policy": policy}
        self._runtimes.write_text(json.dumps({"runtimes": dict.fromkeys(runtimes, runtime)}))

    def start(self) -> "Operator":
        with self.log.open("ab") as log:
            command = [sys.executable, *self.program]
            self.process = subprocess.Popen(command, env=self._env, stdout=log, stderr=log, cwd="/")
        return self

    def kill(self) -> None:
        """As a node failure would: nothing is said, the lease is not given back."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(PATIENCE_S)
        self.process = None

    def end(self) -> int:
        """As Kubernetes stops it; its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(PATIENCE_S)
        self.process = None
        return code

    def ended(self) -> int:
        """Its exit code, once it has ended by itself."""
        assert self.process is not None
        return self.process.wait(PATIENCE_S)

    def get(self, path: str) -> str:
        """The first answer: on a busy machine the server starts late and answers slowly."""

        def answered() -> str | None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=PATIENCE_S) as answer:
                    return answer.read().decode()
            except urllib.error.HTTPError:
                raise
            except OSError:
                return None

        return until(answered, f"{path} answers")

    def unready(self) -> str | None:
        """Why it is not ready; None when it is."""
        try:
            self.get("/readyz")
        except urllib.error.HTTPError as refusal:
            return refusal.read().decode()
        return None

    def looks_at_everything(self) -> None:
        """Wait for two resyncs from now on: what the operator had to do for what it knew is then done."""
        for _ in range(2):
            before_s = self.metric("finetune_last_resync_timestamp_seconds")
            until(lambda at=before_s: self.metric("finetune_last_resync_timestamp_seconds") > at, "a resync")

    def metric(self, line_start: str) -> float:
        return _sum(self.get("/metrics"), line_start)

    def writes(self) -> tuple[float, float]:
        """How often it has written anything but its lease, and its lease, both at the same moment."""
        text = self.get("/metrics")
        leases = _sum(text, 'finetune_api_writes_total{resource="leases"')
        return _sum(text, "finetune_api_writes_total") - leases, leases

    def rss_bytes(self) -> int:
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024


def _sum(metrics: str, line_start: str) -> float:
    lines = [line for line in metrics.splitlines() if line.startswith(line_start)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


class Team:
    """A user's namespace, and the kubelet that is not there."""

    def __init__(self, kubeconfig: Path, namespace: str) -> None:
        api = config.new_client_from_config(str(kubeconfig))
        self.namespace = namespace
        self.core: Any = client.CoreV1Api(api)
        self.batch: Any = client.BatchV1Api(api)
        self.custom: Any = client.CustomObjectsApi(api)
        self.coordination: Any = client.CoordinationV1Api(api)

    def crowd(self, number: int) -> None:
        """Pods of others in the namespace, that no scheduler takes."""
        container = {
            "name": "x",
            "image": "x",
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        }
        security = {"runAsNonRoot": True, "runAsUser": 1, "seccompProfile": {"type": "RuntimeDefault"}}
        spec = {"containers": [container], "securityContext": security, "schedulerName": "none"}

        def create(index: int) -> None:
            body = {"metadata": {"name": f"foreign-{index}"}, "spec": spec}
            self.core.create_namespaced_pod(self.namespace, body)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(create, range(number)))
        counted: Any = self.core.list_namespaced_pod(self.namespace, limit=1)
        assert counted.metadata.remaining_item_count >= number - 1

    def submit(self, name: str = "bot", **spec: Any) -> str:
        """The UID of the new FineTuneJob."""
        body = {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": "FineTuneJob",
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": SPEC | spec,
        }
        made: Any = self.custom.create_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, body)
        return made["metadata"]["uid"]

    def keep_finished(self, number: int) -> None:
        """Finished FineTuneJobs of long ago, without any child."""
        for index in range(number):
            name = f"kept-{index}"
            self.submit(name)
            status = finished_job(name, phase="Failed" if index % 3 else "Succeeded")["status"]
            self.custom.patch_namespaced_custom_object_status(
                GROUP, VERSION, self.namespace, PLURAL, name, {"status": status}
            )

    def get(self, name: str = "bot") -> dict[str, Any]:
        found: Any = self.custom.get_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name)
        return found

    def change(self, patch: dict[str, Any], name: str = "bot") -> None:
        self.custom.patch_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name, patch)

    def jobs(self) -> list[Any]:
        return self.batch.list_namespaced_job(self.namespace).items

    def job(self, stage: str, attempt: int, name: str = "bot") -> Any:
        """Waits for the Kubernetes Job of one attempt."""
        uid = self.get(name)["metadata"]["uid"]
        wanted = names.child_name(name, uid, names.Stage(stage), attempt)
        return until(lambda: next((j for j in self.jobs() if j.metadata.name == wanted), None), wanted)

    def pod(self, stage: str, attempt: int, name: str = "bot") -> Any:
        """Waits for the pod of one attempt."""
        selector = f"batch.kubernetes.io/job-name={self.job(stage, attempt, name).metadata.name}"

        def newest() -> Any:
            pods = self.core.list_namespaced_pod(self.namespace, label_selector=selector).items
            return max(pods, key=lambda p: p.metadata.creation_timestamp, default=None)

        return until(newest, f"pod of {stage} {attempt}")

    def runs(self, stage: str, attempt: int, name: str = "bot") -> None:
        """The kubelet reports that the container runs."""
        pod = self.pod(stage, attempt, name)
        state = {"running": {"startedAt": _now()}}
        self._report(pod, "Running", state)

    def ends(self, stage: str, attempt: int, fault: Fault | None = None, name: str = "bot", **more: Any) -> None:
        """The kubelet reports the end of the container, with its termination message."""
        pod = more.pop("pod", None) or self.pod(stage, attempt, name)
        ended: dict[str, Any] = {"startedAt": _now(), "finishedAt": _now(), "exitCode": more.pop("code", 0)}
        if fault is not None:
            code = EXIT_CODES[FAULTS[fault].reason]
            ended["exitCode"] = code
            result = {"stage": stage, "attempt": attempt, "fault": fault, "exit_code": code, **more}
            ended["message"] = json.dumps(result)
        self._report(pod, "Failed" if ended["exitCode"] else "Succeeded", {"terminated": ended})

    def refuses(self, stage: str, attempt: int, name: str = "bot") -> None:
        """The kubelet refuses the pod when it comes to the node: no container is begun."""
        pod = self.pod(stage, attempt, name)
        status = {"phase": "Failed", "reason": "UnexpectedAdmissionError", "message": "Allocate failed: no device"}
        self.core.patch_namespaced_pod_status(pod.metadata.name, self.namespace, {"status": status})

    def prepared(self, attempt: int = 1, name: str = "bot") -> None:
        self.ends("prepare", attempt, Fault.PREPARED, name, plan=PLAN, data=DATA)

    def committed(self, attempt: int = 1, name: str = "bot") -> None:
        self.ends("train", attempt, Fault.COMMITTED, name, artifact=ARTIFACT, step=100)

    def condition(self, kind: str, name: str = "bot") -> tuple[str, str] | None:
        conditions = (self.get(name).get("status") or {}).get("conditions", [])
        return next(((c["status"], c["reason"]) for c in conditions if c["type"] == kind), None)

    def until(self, kind: str, status: str, reason: str | None = None, name: str = "bot") -> None:
        def holds() -> bool:
            found = self.condition(kind, name)
            return found is not None and found[0] == status and reason in (None, found[1])

        until(holds, f"{kind}={status} ({reason}); now {self.condition(kind, name)}")

    def holds(self, pod: Any) -> None:
        """A pod on a node stays until the kubelet lets it go; one without a node needs a finalizer for that."""
        self.core.patch_namespaced_pod(
            pod.metadata.name, self.namespace, {"metadata": {"finalizers": ["test.finetune.dev/kubelet"]}}
        )

    def gone(self, pod: Any) -> None:
        """The kubelet lets a pod go that is being deleted."""
        patch = [{"op": "remove", "path": "/metadata/finalizers"}]
        self.core.patch_namespaced_pod(pod.metadata.name, self.namespace, patch)

    def is_told_to_stop(self, pod: Any) -> None:
        def deleted() -> Any:
            return self.core.read_namespaced_pod(pod.metadata.name, self.namespace).metadata.deletion_timestamp

        until(deleted, "the pod is being deleted")

    def _report(self, pod: Any, phase: str, state: dict[str, Any]) -> None:
        container = {
            "name": names.CONTAINER, "image": "x", "imageID": "x", "ready": False, "restartCount": 0, "state": state,
        }  # fmt: skip
        conditions = [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "False"}]
        # Without an address: nobody is there to be asked for progress.
        status = {"phase": phase, "containerStatuses": [container], "conditions": conditions}
        self.core.patch_namespaced_pod_status(pod.metadata.name, self.namespace, {"status": status})


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@pytest.fixture
def team(control_plane: testbed.Cluster, namespace: str) -> Team:
    control_plane.kubectl(
        "label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted", "--overwrite"
    )
    return Team(control_plane.kubeconfig, namespace)


@pytest.fixture
def operator(control_plane: testbed.Cluster, namespace: str, tmp_path: Path) -> Iterator[Operator]:
    running = Operator(control_plane.kubeconfig, namespace, tmp_path).start()
    yield running
    if running.process is not None:
        running.end()


def test_a_job_goes_from_apply_to_success_in_a_restricted_namespace_with_few_writes(team: Team, operator: Operator):
    team.submit()
    team.until("Ready", "True", "Accepted")
    assert "restricted" in str(team.core.read_namespace(team.namespace).metadata.labels)
    team.runs("prepare", 1)
    team.until("Running", "True", "Preparing")
    team.prepared()
    team.runs("train", 1)
    team.until("Running", "True", "Training")
    assert team.job("train", 1).spec.template.spec.containers[0].args[-1] == f"--plan-digest={DIGEST}"
    team.committed()
    team.until("Succeeded", "True", "Succeeded")
    status = team.get()["status"]
    assert status["phase"] == "Succeeded"
    assert status["artifacts"][0]["digest"] == DIGEST
    assert [(a["stage"], a["number"], a["class"]) for a in status["attempts"]] == [
        ("prepare", 1, "Succeeded"),
        ("train", 1, "Succeeded"),
    ]
    until(lambda: all(j.spec.ttl_seconds_after_finished == 86400 for j in team.jobs()), "TTL on both Jobs")
    meta = team.get()["metadata"]
    assert "annotations" not in meta
    assert "finalizers" not in meta
    told = team.core.list_namespaced_event(team.namespace, field_selector="involvedObject.name=bot").items
    no_nodes = {"Unschedulable", "Healthy"}  # there is a scheduler, but nothing to schedule to
    assert {e.reason for e in told} - no_nodes == {"Accepted", "Preparing", "Prepared", "Training", "Succeeded"}
    noise = sum(1 if e.reason == "Healthy" else 2 for e in told if e.reason in no_nodes)  # events and their status
    assert operator.writes()[0] - noise <= 16
    unschedulable = sum(e.reason == "Unschedulable" for e in told)
    assert operator.metric('finetune_api_writes_total{resource="finetunejobs/status"') - unschedulable <= 6
    assert operator.rss_bytes() < 200 * 2**20, operator.rss_bytes()
    assert operator.end() == 0


def test_nothing_but_the_lease_is_written_at_rest(team: Team, operator: Operator):
    team.submit("running")
    team.runs("prepare", 1, "running")
    team.until("Running", "True", "Preparing", "running")
    team.submit("done")
    team.ends("prepare", 1, Fault.BROKEN_ROW, "done", args={"file": "a.jsonl", "row": 3})
    team.until("Finished", "True", name="done")
    until(lambda: operator.metric('finetune_api_writes_total{resource="jobs",verb="patch"') >= 1, "TTL")
    operator.looks_at_everything()
    others, leases = operator.writes()
    before = (team.get("running"), team.get("done"), others)
    operator.looks_at_everything()
    operator.looks_at_everything()
    until(lambda: operator.writes()[1] > leases, "the lease is renewed")
    assert (team.get("running"), team.get("done"), operator.writes()[0]) == before


def test_an_operator_killed_in_every_phase_comes_to_the_same_end(team: Team, operator: Operator):
    """The world goes on while nobody watches; each time the next operator finds what happened."""

    def while_nobody_watches(happen: Callable[[], object]) -> None:
        operator.kill()
        happen()
        operator.start()

    while_nobody_watches(team.submit)
    team.job("prepare", 1)
    while_nobody_watches(lambda: team.runs("prepare", 1))
    team.until("Running", "True", "Preparing")
    while_nobody_watches(team.prepared)
    team.job("train", 1)
    while_nobody_watches(lambda: team.runs("train", 1))
    team.until("Running", "True", "Training")
    while_nobody_watches(team.committed)
    team.until("Succeeded", "True", "Succeeded")
    status = team.get()["status"]
    assert [(a["stage"], a["number"], a["class"]) for a in status["attempts"]] == [
        ("prepare", 1, "Succeeded"),
        ("train", 1, "Succeeded"),
    ]
    assert len(team.jobs()) == 2


def test_suspending_checkpoints_and_resuming_is_the_next_attempt(team: Team, operator: Operator):
    team.submit()
    team.prepared()
    team.runs("train", 1)
    team.until("Running", "True", "Training")
    pod = team.pod("train", 1)
    team.holds(pod)
    team.change({"spec": {"suspend": True}})
    team.is_told_to_stop(pod)
    team.until("Suspended", "False", "Suspending")
    team.ends("train", 1, Fault.INTERRUPTED, pod=pod, step=40, checkpoint=CHECKPOINT)
    team.gone(pod)
    team.until("Suspended", "True", "Suspended")
    status = team.get()["status"]
    assert status["phase"] == "Suspended"
    stopped = status["attempts"][-1]
    assert (stopped["class"], stopped["exitCode"], stopped["lastStep"], stopped["lostSeconds"]) == (
        "Suspended",
        30,
        40,
        0,
    )
    assert status["checkpoints"][-1]["step"] == 40
    assert len(team.jobs()) == 1
    team.change({"spec": {"suspend": False}})
    team.runs("train", 2)
    team.until("Running", "True", "Training")
    team.committed(2)
    team.until("Succeeded", "True")
    assert team.get()["status"].get("failures", 0) == 0


def test_a_manual_job_waits_at_its_plan_until_it_is_patched(team: Team, operator: Operator):
    team.submit(startPolicy="Manual")
    team.prepared()
    team.until("Running", "False", "AwaitingApproval")
    assert team.get()["status"]["phase"] == "Waiting"
    assert [job.metadata.name.rsplit("-", 2)[-2] for job in team.jobs()] == ["prepare"]
    team.change({"spec": {"startPolicy": "Automatic"}})
    team.runs("train", 1)
    team.committed()
    team.until("Succeeded", "True")


def test_a_job_that_is_only_planned_ends_with_its_plan_and_no_training_pod(team: Team, operator: Operator):
    team.submit(startPolicy="PlanOnly")
    team.prepared()
    team.until("Finished", "True", "Planned")
    status = team.get()["status"]
    assert (status["phase"], status["plan"]["steps"] > 0) == ("Planned", True)
    assert [job.metadata.name.rsplit("-", 2)[-2] for job in team.jobs()] == ["prepare"]


def test_deleting_a_job_lets_the_garbage_collector_end_its_pods_and_forgets_its_figures(team: Team, operator: Operator):
    team.submit()
    team.runs("prepare", 1)
    team.until("Running", "True")
    assert 'finetune_job_phase{job_name="bot"' in operator.get("/metrics")
    pod = team.pod("prepare", 1)
    team.holds(pod)
    team.custom.delete_namespaced_custom_object(GROUP, VERSION, team.namespace, PLURAL, "bot")
    team.is_told_to_stop(pod)
    team.gone(pod)
    until(lambda: not team.jobs(), "no Job is left")
    until(
        lambda: (
            not team.core.list_namespaced_config_map(team.namespace, label_selector=f"{names.LABEL_MANAGED_BY}").items
        ),
        "no ConfigMap",
    )
    until(lambda: "finetune_job_phase{" not in operator.get("/metrics"), "figures gone")
    first = team.submit()
    assert team.job("prepare", 1).metadata.labels[names.LABEL_JOB_UID] == first


def test_a_retryable_failure_leads_to_the_next_attempt_and_a_final_one_to_the_verdict(team: Team, operator: Operator):
    team.submit()
    team.prepared()
    args = {"action": "read", "uri": "s3://d/x", "tries": 5, "seconds": 60, "problem": "503"}
    team.ends("train", 1, Fault.STORAGE_UNAVAILABLE, args=args)
    team.ends("train", 2, Fault.NOT_FINITE, args={"count": 3, "step": 7})
    team.until("Succeeded", "False", "Diverged")
    attempts = team.get()["status"]["attempts"]
    assert [(a["class"], a["reason"], a["exitCode"]) for a in attempts[1:]] == [
        ("Failure", "StorageTransient", 31),
        ("Failure", "Diverged", 15),
    ]


def test_the_children_of_a_finished_job_are_removed_in_time_and_its_verdict_stays(team: Team, operator: Operator):
    team.submit(ttlSecondsAfterFinished=1)
    team.prepared()
    team.committed()
    team.until("Succeeded", "True")
    until(lambda: team.jobs() == [], "Kubernetes removes both Jobs")
    before = team.get()["status"]
    operator.looks_at_everything()
    assert team.jobs() == []
    assert team.get()["status"] == before


def test_a_foreign_job_under_our_name_is_named_and_left_alone(team: Team, operator: Operator):
    operator.kill()
    uid = team.submit()
    name = names.child_name("bot", uid, names.Stage.PREPARE, 1)
    pod = {"restartPolicy": "Never", "containers": [{"name": "x", "image": "x"}]}
    foreign = {"metadata": {"name": name}, "spec": {"suspend": True, "template": {"spec": pod}}}
    team.batch.create_namespaced_job(team.namespace, foreign)
    operator.start()
    team.until("Degraded", "True", "NameCollision")
    team.batch.delete_namespaced_job(name, team.namespace, propagation_policy="Background")
    team.runs("prepare", 1)
    team.until("Degraded", "False", "Healthy")


def test_a_quota_that_is_used_up_is_a_wait_with_words_and_not_a_failure(team: Team, operator: Operator):
    quota = {"metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    team.core.create_namespaced_resource_quota(team.namespace, quota)
    team.submit()
    team.until("Admitted", "False", "QuotaExceeded")
    team.core.delete_namespaced_resource_quota("none", team.namespace)


POLICY: dict[str, Any] = {
    "apiVersion": "admissionregistration.k8s.io/v1",
    "kind": "ValidatingAdmissionPolicy",
    "spec": {
        "failurePolicy": "Fail",
        "matchConstraints": {
            "resourceRules": [
                {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
            ]
        },
        "validations": [{"expression": "false", "message": "no Jobs before the audit"}],
    },
}


def test_a_job_waits_for_an_admission_policy_in_its_words_and_goes_on_once_it_is_removed(
    team: Team, operator: Operator, control_plane: testbed.Cluster
):
    name = f"deny-{team.namespace}"
    binding = {
        "apiVersion": POLICY["apiVersion"],
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": name},
        "spec": {
            "policyName": name,
            "validationActions": ["Deny"],
            "matchResources": {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": team.namespace}}},
        },
    }
    control_plane.apply({**POLICY, "metadata": {"name": name}}, binding)
    until(lambda: _is_denied(control_plane, team.namespace), "the policy is in force")
    team.submit()
    team.until("Degraded", "True", "InvalidManifest")
    assert "no Jobs before the audit" in str(team.get()["status"]["conditions"])
    control_plane.kubectl("delete", "validatingadmissionpolicy,validatingadmissionpolicybinding", name)
    team.runs("prepare", 1)
    team.until("Running", "True", "Preparing")
    assert team.condition("Degraded") == ("False", "Healthy")


def _is_denied(cluster: testbed.Cluster, namespace: str) -> bool:
    """Ask the API server, which reads its policies some time after they are made."""
    try:
        cluster.kubectl("-n", namespace, "create", "job", "try", "--image=x", "--dry-run=server")
    except testbed.TestbedError as error:
        return "no Jobs before the audit" in str(error)
    return False


def test_a_job_comes_to_its_end_on_the_crd_of_the_first_release(
    team: Team, operator: Operator, control_plane: testbed.Cluster
):
    """The chart may be told to leave the CRD alone: what an old one does not know is lost, and nothing else."""
    apply = ("apply", "--server-side", "--force-conflicts", "-f")
    control_plane.kubectl(*apply, str(ROOT / "tests/support/crd_723dcf3.yaml"))
    try:
        team.submit()
        team.runs("prepare", 1)
        team.until("Running", "True", "Preparing")
        assert "runDigest" not in team.get()["status"]["record"]
        until(lambda: CANNOT_SELECT in operator.get("/healthz?verbose"), "it says that all jobs are listed")
        assert operator.process is not None
        assert operator.process.poll() is None
        team.prepared()
        team.runs("train", 1)
        team.until("Running", "True", "Training")
        operator.end()
        operator.start()
        team.committed()
        team.until("Succeeded", "True", "Succeeded")
        assert len(team.jobs()) == 2
        until(lambda: {j.spec.ttl_seconds_after_finished for j in team.jobs()} == {defaults.TTL_S}, "the Jobs' TTL")
        assert operator.get("/healthz") == "ok"
    finally:
        control_plane.kubectl(*apply, str(ROOT / "crds/finetunejobs.yaml"))


def requests(cluster: testbed.Cluster, verb: str) -> float:
    """How often the API server was asked for FineTuneJobs."""
    lines = cluster.kubectl("get", "--raw", "/metrics").splitlines()
    counts = [line for line in lines if line.startswith("apiserver_request_total{")]
    found = [line for line in counts if f'resource="{PLURAL}"' in line and f'verb="{verb}"' in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


def test_finished_jobs_cost_a_start_one_list_in_pages_and_their_ttl_may_still_change(
    team: Team, operator: Operator, control_plane: testbed.Cluster
):
    operator.kill()
    operator.program = ["-c", SMALL_PAGES]
    team.keep_finished(30)
    operator.start()

    def counted(number: int) -> Callable[[], bool]:
        return lambda: operator.metric('finetune_jobs{phase="Succeeded"}') == number

    team.submit()
    team.prepared()
    team.committed()
    team.until("Succeeded", "True")  # and so leaves the watch of unfinished jobs
    until(counted(11), "all are counted")
    until(lambda: {j.spec.ttl_seconds_after_finished for j in team.jobs()} == {defaults.TTL_S}, "the Jobs' TTL")
    bot = f'job_name="bot",job_namespace="{team.namespace}"'
    assert operator.metric(f'finetune_job_phase{{{bot},phase="Succeeded"') == 1

    assert operator.end() == 0
    gets, lists = requests(control_plane, "GET"), requests(control_plane, "LIST")
    operator.start()
    until(counted(11), "all are counted")
    operator.looks_at_everything()
    assert requests(control_plane, "GET") == gets
    assert requests(control_plane, "LIST") - lists >= 5  # 31 finished ones, 7 a page
    assert operator.metric('finetune_watched_objects_total{kind="finished_finetunejobs"}') == 31
    assert operator.metric("finetune_job_failures{") == 0
    assert operator.get("/metrics").count("finetune_job_failures{") == 31

    team.change({"spec": {"ttlSecondsAfterFinished": 1}})
    until(lambda: team.jobs() == [], "Kubernetes removes both Jobs")
    until(lambda: team.get()["status"]["observedGeneration"] == 2, "the change is acknowledged")
    team.custom.delete_namespaced_custom_object(GROUP, VERSION, team.namespace, PLURAL, "bot")
    until(lambda: 'job_name="bot"' not in operator.get("/metrics"), "figures gone")
    until(counted(10), "it is counted no more")


def test_a_pod_that_its_node_refuses_uses_up_no_retry(team: Team, operator: Operator):
    team.submit(recovery={"maxRetries": 0})
    team.refuses("prepare", 1)
    team.until("Degraded", "True", "PodNotStarted")
    team.runs("prepare", 2)
    team.until("Degraded", "False", "Healthy")
    refused, running = team.get()["status"]["attempts"]
    assert (refused["class"], refused["reason"], running["class"]) == ("Waiting", "PodNotStarted", "Running")


def test_a_kubernetes_job_that_a_queue_suspends_waits_and_then_goes_on_in_the_same_attempt(
    team: Team, operator: Operator
):
    team.submit(activeDeadlineSeconds=86_400)
    team.runs("prepare", 1)
    team.until("Running", "True", "Preparing")
    job, pod = team.job("prepare", 1).metadata.name, team.pod("prepare", 1)
    team.batch.patch_namespaced_job(job, team.namespace, {"spec": {"suspend": True}})
    team.until("Admitted", "False", "JobSuspended")
    team.until("Running", "False", "JobSuspended")
    team.batch.patch_namespaced_job(job, team.namespace, {"spec": {"suspend": False}})
    until(lambda: team.pod("prepare", 1).metadata.uid != pod.metadata.uid, "another pod")
    team.runs("prepare", 1)
    team.until("Running", "True", "Preparing")
    status = team.get()["status"]
    assert [each["number"] for each in status["attempts"]] == [1]
    assert status["record"]["suspendedSeconds"] >= 0


def test_a_job_waits_for_a_runtime_that_is_not_there_yet(team: Team, operator: Operator):
    team.submit(runtime="gpu")
    team.until("Degraded", "True", "RuntimeNotFound")
    assert team.jobs() == []
    operator.offer("default", "gpu")
    team.runs("prepare", 1)
    team.until("Running", "True", "Preparing")
    assert team.condition("Degraded") == ("False", "Healthy")


def test_five_thousand_pods_that_are_not_ours_are_never_sent_to_the_operator(team: Team, operator: Operator):
    """The server filters, for the list at the start and for the watch: memory and time do not depend on others."""
    team.submit("before")
    team.runs("prepare", 1, "before")
    alone_bytes = operator.rss_bytes()
    team.crowd(FOREIGN_PODS)
    operator.kill()
    operator.start()
    team.submit("after")
    until(lambda: len(team.jobs()) == 2, "both jobs have theirs")
    assert operator.metric('finetune_watched_objects_total{kind="pods"') < 20
    # One pod read and kept costs about 10 KiB.
    assert operator.rss_bytes() < alone_bytes + FOREIGN_PODS * 2048


def test_healthz_is_well_and_metrics_are_there(team: Team, operator: Operator):
    team.submit()
    team.until("Ready", "True")
    assert operator.get("/healthz") == "ok"
    for name in ("finetune_jobs{", "finetune_transitions_total{", "finetune_reconcile_duration_seconds_bucket{"):
        until(lambda wanted=name: wanted in operator.get("/metrics"), name)


def test_a_second_operator_waits_until_the_first_is_gone(
    team: Team, operator: Operator, control_plane: testbed.Cluster, tmp_path_factory: pytest.TempPathFactory
):
    until(lambda: team.coordination.list_namespaced_lease(team.namespace).items, "the lease")
    second = Operator(control_plane.kubeconfig, team.namespace, tmp_path_factory.mktemp("second"), "operator-1")
    second.start()
    try:
        until(lambda: "waiting for the lease" in second.log.read_text(), "the second waits")
        assert second.get("/healthz") == "ok"
        assert operator.end() == 0
        team.submit()
        team.until("Ready", "True")
        assert "holding the lease as operator-1" in second.log.read_text()
    finally:
        second.end()


@pytest.fixture
def of_chart(control_plane: testbed.Cluster, namespace: str, tmp_path: Path) -> Iterator[Operator]:
    """An operator with the chart's rights and no more, in the test's namespace and in one called NAMESPACE-gone."""
    control_plane.kubectl("create", "namespace", f"{namespace}-gone")
    chart = [require_program("helm"), "template", "x", str(ROOT / "charts/finetune-operator"), "--namespace", namespace]
    watched = f"watchNamespaces={{{namespace},{namespace}-gone}}"
    shown = [f"--show-only=templates/{name}.yaml" for name in ("rbac", "serviceaccount")]
    done = subprocess.run([*chart, "--set", watched, *shown], capture_output=True, text=True, timeout=60, check=True)
    control_plane.kubectl("apply", "-f", "-", stdin=done.stdout)
    settings = json.loads(control_plane.kubeconfig.read_text())
    account = control_plane.kubectl("create", "token", "x-finetune-operator", "-n", namespace).strip()
    settings["users"][0]["user"] = {"token": account}
    (tmp_path / "kubeconfig").write_text(json.dumps(settings))
    both = f"{namespace},{namespace}-gone"
    more = {"FINETUNE_WATCH_NAMESPACES": both, "FINETUNE_LEASE_NAME": "x-finetune-operator"}
    running = Operator(tmp_path / "kubeconfig", namespace, tmp_path, **more).start()
    yield running
    if running.process is not None:
        running.end()


def test_a_deleted_namespace_that_is_still_watched_stops_no_other(
    team: Team, of_chart: Operator, control_plane: testbed.Cluster
):
    team.submit()
    team.until("Ready", "True")
    control_plane.kubectl("delete", "namespace", f"{team.namespace}-gone", "--timeout=120s", timeout_s=130)
    of_chart.kill()
    of_chart.start()
    team.submit("next")
    team.job("prepare", 1, "next")
    trouble = f"namespace {team.namespace}-gone: finetunejobs: 403 Forbidden"
    until(lambda: trouble in of_chart.get("/healthz?verbose"), "the deleted namespace is told")
    assert of_chart.get("/readyz") == "ok"
    assert of_chart.metric(f'finetune_watch_trouble{{kind="jobs",watched_namespace="{team.namespace}"}}') == 0


def _is_served(team: Team) -> bool:
    try:
        team.custom.list_namespaced_custom_object(GROUP, VERSION, team.namespace, PLURAL)
    except client.ApiException:
        return False
    return True


@pytest.fixture(scope="module")
def bare() -> Iterator[testbed.Cluster]:
    """A cluster of its own, which does not know FineTuneJobs."""
    name = f"pytest-bare-{os.getpid()}"
    try:
        yield testbed.up(name, node=False)
    finally:
        testbed.down(name)


def test_an_operator_without_its_crd_is_not_ready_says_so_and_goes_on_once_it_is_there(
    bare: testbed.Cluster, tmp_path: Path
):
    team = Team(bare.kubeconfig, "default")
    operator = Operator(bare.kubeconfig, "default", tmp_path, FINETUNE_RESYNC_INTERVAL_S="120").start()
    try:
        until(lambda: operator.unready() == MISSING_CRD, "the missing CRD is told")
        assert operator.get("/healthz") == "ok", "a restart would not mend it"
        bare.kubectl("apply", "--server-side", "-f", str(ROOT / "crds/finetunejobs.yaml"))
        until(lambda: operator.unready() is None, "the operator is ready")
        until(lambda: _is_served(team), "the API server takes FineTuneJobs")
        team.submit()
        team.until("Ready", "True")
        assert "Unresolved resources" not in operator.log.read_text(), "Kopf looks for them only once"

        bare.kubectl("delete", "crd", "finetunejobs.finetune.dev", "--timeout=120s", timeout_s=130)
        assert operator.ended() == EXIT_CRD_GONE, "Kopf cannot go on, and the kubelet starts it again"
        assert operator.log.read_text().rstrip().endswith(f"{MISSING_CRD} after a restart")
        operator.start()
        until(lambda: operator.unready() == MISSING_CRD, "the missing CRD is told")
    finally:
        if operator.process is not None and operator.process.poll() is None:
            operator.end()


def test_a_job_whose_data_the_policy_refuses_ends_in_words_before_anything_is_made_and_one_that_has_begun_goes_on(
    team: Team, operator: Operator
):
    team.submit("begun")
    team.runs("prepare", 1, "begun")
    operator.offer("default", policy={"contact": "legal@example.com", "allowedLicenses": ["MIT", "Apache-2.0"]})
    rows = {"name": "chats", "uri": "s3://data/chats/"}
    team.submit("refused", datasets=[rows | {"license": "GPL-3.0-only"}])
    team.submit("allowed", datasets=[rows | {"license": "MIT OR GPL-3.0-only"}])
    team.until("Succeeded", "False", "RefusedByPolicy", "refused")
    conditions = team.get("refused")["status"]["conditions"]
    message = next(each["message"] for each in conditions if each["type"] == "Succeeded")
    assert "datasets[0] (chats): license is GPL-3.0-only, and allowed is MIT, Apache-2.0" in message
    assert "ask legal@example.com" in message
    team.job("prepare", 1, "allowed")
    team.prepared(name="begun")
    team.job("train", 1, "begun")
    made = {each.metadata.labels[names.LABEL_JOB_NAME] for each in team.jobs()}
    assert made == {"begun", "allowed"}
    maps: Any = team.core.list_namespaced_config_map(team.namespace)
    assert not [each.metadata.name for each in maps.items if each.metadata.name.startswith("refused")]
