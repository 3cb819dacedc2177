"""One round against an API server that refuses, conflicts, or has something else under our name."""

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from finetune_api import names
from finetune_api.names import Stage
from finetune_api.run import CONTRACT_VERSION
from finetune_api.status import FineTuneJobStatus
from finetune_operator.child_cache import ChildCache, Owner
from finetune_operator.child_creator import ChildCreator, LaterError, RefusedError, has_stepped
from finetune_operator.close_attempts import digest_of_proof
from finetune_operator.cluster import ApiError, Cluster, UnreachableError
from finetune_operator.job_reader import read_job
from finetune_operator.job_series import JobSeries
from finetune_operator.known_jobs import KnownJobs
from finetune_operator.metrics import Metrics
from finetune_operator.observation import PodAnswer, PodSilence
from finetune_operator.reconcile import MAX_CHAIN, MAX_CONFLICTS, RUNTIME_ASKED_EVERY_S, Reconciler
from finetune_operator.run_config import RUNTIME_FILE, config_map, digest_of
from finetune_operator.runtimes import Runtimes
from spec_cases import merged
from status_samples import ARTIFACT, PROGRESS, SPEC

UID = "1a2b3c4d-0000"
KEY = ("a", "bot")
CONFLICT = ApiError(409, "Conflict", "the object has been modified")


class FakeCluster:
    """Objects as the API server keeps them. `fail` holds errors by verb and kind, each raised once."""

    def __init__(self) -> None:
        self.version = 1
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.events: list[str] = []
        self.fail: dict[str, list[Exception]] = {}
        self.dropped: tuple[str, ...] = ()  # what the CRD's schema of a status record does not know
        self.pods: list[dict[str, Any]] = []
        self.lists_of_pods = 0
        self.reads_of_jobs = 0
        self.reads_of_runs = 0
        self.ttls: list[str] = []
        self.known = KnownJobs()

    def submit(self, uid: str = UID, **spec: Any) -> None:
        meta = {"name": "bot", "namespace": "a", "uid": uid, "generation": 1, "resourceVersion": "1"}
        self.objects["finetunejobs", "bot"] = {"metadata": meta, "spec": SPEC | spec}

    @property
    def status(self) -> dict[str, Any]:
        return self.objects["finetunejobs", "bot"]["status"]

    def changed_by_another_hand(self) -> None:
        """The watch tells of a version that the operator did not write."""
        if ("finetunejobs", "bot") in self.objects:
            self.version += 1
            self.objects["finetunejobs", "bot"]["metadata"]["resourceVersion"] = str(self.version)
        self.known.hear(KEY, "of another hand")

    def condition(self, kind: str) -> tuple[str, str]:
        return next((c["status"], c["reason"]) for c in self.status["conditions"] if c["type"] == kind)

    def jobs(self) -> list[str]:
        return [name for kind, name in self.objects if kind == "jobs"]

    def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        self._may_fail(f"get {kind}")
        self.reads_of_jobs += kind == "finetunejobs"
        self.reads_of_runs += kind == "configmaps"
        return self.objects.get((kind, name))

    def list_children(self, namespace: str, job_uid: str) -> list[dict[str, Any]]:
        return [body for (kind, _), body in self.objects.items() if kind == "jobs"]

    def list_pods(self, namespace: str, job_uid: str) -> list[dict[str, Any]]:
        self._may_fail("list pods")
        self.lists_of_pods += 1
        return self.pods

    def delete_k8s_job(self, namespace: str, name: str, uid: str) -> None:
        del self.objects["jobs", name]

    def set_ttl(self, namespace: str, name: str, uid: str, seconds: int) -> None:
        self.ttls.append(name)

    def list_events(self, namespace: str) -> Iterator[dict[str, Any]]:
        return iter(())

    def create(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        self._may_fail(f"create {kind}")
        if kind == "events":
            self.events.append(body["reason"])
        elif (kind, body["metadata"]["name"]) in self.objects:
            raise ApiError(409, "AlreadyExists", "")
        else:
            body["metadata"].setdefault("uid", f"uid-{body['metadata']['name']}")
            self.objects[kind, body["metadata"]["name"]] = body
        return body

    def patch_status(self, namespace: str, name: str, resource_version: str, patch: dict[str, Any]) -> dict[str, Any]:
        self._may_fail("patch status")
        body = self.objects["finetunejobs", name]
        self.version += 1
        body["metadata"]["resourceVersion"] = str(self.version)
        body["status"] = merged(body.get("status", {}), patch)
        for name in self.dropped:
            body["status"].get("record", {}).pop(name, None)
        return body

    def _may_fail(self, what: str) -> None:
        errors = self.fail.get(what, [])
        if errors:
            raise errors.pop(0)


class NoProgress:
    def answers(self, owner: Owner) -> tuple[PodAnswer, ...]:
        return ()

    def silences(self, owner: Owner) -> tuple[PodSilence, ...]:
        return ()

    def interval_s(self) -> float:
        return 30

    def follow(self, owner: Owner, job_uid: str | None) -> None:
        """No pod is asked."""


@pytest.fixture
def cluster() -> FakeCluster:
    made = FakeCluster()
    made.submit()
    return made


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


@pytest.fixture
def runtimes(tmp_path: Path) -> Path:
    path = tmp_path / "runtimes.yaml"
    path.write_text("runtimes: {default: {image: trainer}}")
    return path


@pytest.fixture
def children() -> ChildCache:
    return ChildCache(lambda _key, _owner: None)


@pytest.fixture
def reconciler(cluster: FakeCluster, metrics: Metrics, runtimes: Path, children: ChildCache) -> Reconciler:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    shell = (cast(Cluster, cluster), children, NoProgress(), Runtimes(runtimes))
    return Reconciler(*shell, metrics, JobSeries(metrics), cluster.known, lambda: now)


FIRST = names.child_name("bot", UID, Stage.PREPARE, 1)


def test_a_round_writes_the_status_and_creates_the_configuration_before_the_job(
    reconciler: Reconciler, cluster: FakeCluster
):
    reconciler.reconcile(KEY)
    assert [name for _, name in cluster.objects] == ["bot", cluster.status["record"]["runConfig"], FIRST]
    assert cluster.events == ["Accepted"]


def test_a_status_that_somebody_else_wrote_meanwhile_is_read_again_at_once(
    reconciler: Reconciler, cluster: FakeCluster
):
    cluster.fail["patch status"] = [CONFLICT] * (MAX_CONFLICTS - 1)
    reconciler.reconcile(KEY)
    assert cluster.jobs() == [FIRST]
    assert cluster.events == ["Accepted"]


def test_conflicts_without_end_are_left_to_a_later_round(reconciler: Reconciler, cluster: FakeCluster):
    cluster.fail["patch status"] = [CONFLICT] * MAX_CONFLICTS
    with pytest.raises(LaterError):
        reconciler.reconcile(KEY)
    assert cluster.jobs() == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_leaves_everything_to_a_later_round(reconciler: Reconciler, cluster: FakeCluster, status: int):
    cluster.fail["create jobs"] = [ApiError(status, "x", "")]
    with pytest.raises(ApiError):
        reconciler.reconcile(KEY)
    reconciler.reconcile(KEY)
    assert cluster.jobs() == [FIRST]
    assert len(cluster.status["attempts"]) == 1


def test_a_creation_whose_answer_was_lost_is_found_and_not_repeated(reconciler: Reconciler, cluster: FakeCluster):
    reconciler.reconcile(KEY)
    cluster.fail["create jobs"] = [UnreachableError("cut")]
    reconciler.reconcile(KEY)
    assert cluster.jobs() == [FIRST]


@pytest.mark.parametrize(
    ("status", "message", "reason"),
    [
        (400, "spec.template: no such thing", "InvalidManifest"),
        (422, "spec.template.labels: Invalid value", "InvalidManifest"),
        (403, "ValidatingAdmissionPolicy 'jobs' denied request", "Forbidden"),
        (500, 'failed calling webhook "policy.example.com": connection refused', "Forbidden"),
    ],
)
def test_what_the_platform_refuses_is_degraded_in_its_words_until_it_is_mended(
    reconciler: Reconciler, cluster: FakeCluster, status: int, message: str, reason: str
):
    for kind in ("configmaps", "jobs"):
        cluster.fail[f"create {kind}"] = [ApiError(status, "x", message)]
        with pytest.raises(RefusedError):
            reconciler.reconcile(KEY)
        assert cluster.condition("Degraded") == ("True", reason)
        assert message in str(cluster.status["conditions"])
        assert cluster.jobs() == []
    reconciler.reconcile(KEY)
    assert cluster.jobs() == [FIRST]


@pytest.mark.parametrize(
    ("message", "reason"), [("exceeded quota: q", "QuotaExceeded"), ("jobs.batch is forbidden", "Forbidden")]
)
def test_a_creation_that_is_not_allowed_is_degraded_and_tried_again(
    reconciler: Reconciler, cluster: FakeCluster, message: str, reason: str
):
    cluster.fail["create jobs"] = [ApiError(403, "Forbidden", message)]
    with pytest.raises(RefusedError):
        reconciler.reconcile(KEY)
    assert cluster.condition("Degraded") == ("True", reason)
    reconciler.reconcile(KEY)
    assert cluster.jobs() == [FIRST]


def test_nothing_is_created_beside_a_living_job_that_the_watch_has_not_shown_yet(
    reconciler: Reconciler, cluster: FakeCluster
):
    reconciler.reconcile(KEY)
    job = cluster.objects.pop(("jobs", FIRST))
    other = names.child_name("bot", UID, Stage.PREPARE, 2)
    labels = names.child_labels("bot", UID, Stage.PREPARE, 2)
    cluster.objects["jobs", other] = {**job, "metadata": {**job["metadata"], "name": other, "labels": labels}}
    with pytest.raises(LaterError, match="alive"):
        reconciler.reconcile(KEY)
    assert cluster.jobs() == [other]


def test_rounds_that_follow_our_own_writes_read_the_job_once(reconciler: Reconciler, cluster: FakeCluster):
    reconciler.reconcile(KEY)
    version = cluster.objects["finetunejobs", "bot"]["metadata"]["resourceVersion"]
    assert cluster.known.has_written(KEY, version)
    cluster.known.hear(KEY, version)
    reconciler.reconcile(KEY)
    reconciler.reconcile(KEY)
    assert cluster.reads_of_jobs == 1


def test_a_job_that_another_hand_changed_is_read_again(reconciler: Reconciler, cluster: FakeCluster):
    reconciler.reconcile(KEY)
    cluster.objects["finetunejobs", "bot"]["spec"]["suspend"] = True
    cluster.changed_by_another_hand()
    reconciler.reconcile(KEY)
    assert cluster.condition("Suspended")[0] == "True"


def test_a_job_that_is_deleted_while_the_watch_is_cut_is_read_again_once_a_write_fails(
    reconciler: Reconciler, cluster: FakeCluster
):
    cluster.fail["create jobs"] = [UnreachableError("cut")]
    with pytest.raises(UnreachableError):
        reconciler.reconcile(KEY)
    cluster.objects.clear()
    reconciler.reconcile(KEY)
    assert cluster.reads_of_jobs == 2
    assert cluster.jobs() == []


def test_of_a_deleted_job_no_version_is_known(reconciler: Reconciler, cluster: FakeCluster):
    reconciler.reconcile(KEY)
    version = cluster.objects["finetunejobs", "bot"]["metadata"]["resourceVersion"]
    del cluster.objects["finetunejobs", "bot"]
    cluster.changed_by_another_hand()
    reconciler.reconcile(KEY)
    assert not cluster.known.has_written(KEY, version)


def test_the_round_that_stores_the_verdict_gives_the_ended_jobs_their_time_to_live(
    reconciler: Reconciler, cluster: FakeCluster, children: ChildCache
):
    """The message about that write brings no round."""
    reconciler.reconcile(KEY)
    failed = {"type": "Failed", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    children.take("jobs", "MODIFIED", {**cluster.objects["jobs", FIRST], "status": {"conditions": [failed]}})
    cluster.status["record"]["acceptedAt"] = "2025-01-01T00:00:00Z"
    cluster.objects["finetunejobs", "bot"]["spec"]["activeDeadlineSeconds"] = 60
    cluster.changed_by_another_hand()
    reconciler.reconcile(KEY)
    assert cluster.condition("Finished") == ("True", "DeadlineExceeded")
    assert cluster.ttls == [FIRST]


def config_maps(cluster: FakeCluster) -> list[str]:
    return [name for kind, name in cluster.objects if kind == "configmaps"]


def image(cluster: FakeCluster) -> str:
    return cluster.objects["jobs", FIRST]["spec"]["template"]["spec"]["containers"][0]["image"]


def test_the_digest_of_the_configuration_is_in_the_status_before_it_exists(
    reconciler: Reconciler, cluster: FakeCluster
):
    cluster.fail["create configmaps"] = [UnreachableError("cut")]
    with pytest.raises(UnreachableError):
        reconciler.reconcile(KEY)
    record = cluster.status["record"]
    assert config_maps(cluster) == []
    reconciler.reconcile(KEY)
    assert config_maps(cluster) == [record["runConfig"]]
    data = cluster.objects["configmaps", record["runConfig"]]["data"]
    assert record["runDigest"] == digest_of(data)
    args = cluster.objects["jobs", FIRST]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert f"--config-digest=sha256:{hashlib.sha256(data[names.CONFIG_FILE].encode()).hexdigest()}" in args


def test_the_proof_of_a_kubernetes_job_is_secret_until_the_job_exists(reconciler: Reconciler, cluster: FakeCluster):
    cluster.fail["create jobs"] = [UnreachableError("cut")]
    with pytest.raises(UnreachableError):
        reconciler.reconcile(KEY)
    written = json.dumps(cluster.status)
    reconciler.reconcile(KEY)
    proof = cluster.objects["jobs", FIRST]["metadata"]["annotations"][names.ANNOTATION_PROOF]
    assert proof not in written
    assert cluster.status["attempts"][0]["jobProof"] == digest_of_proof(proof)
    assert json.dumps(cluster.status["attempts"][0]) in written, "the same proof when it is tried again"


@pytest.mark.parametrize("file", [names.CONFIG_FILE, RUNTIME_FILE])
def test_a_configuration_with_another_content_is_never_used(reconciler: Reconciler, cluster: FakeCluster, file: str):
    reconciler.reconcile(KEY)
    del cluster.objects["jobs", FIRST]
    (name,) = config_maps(cluster)
    forged = cluster.objects["configmaps", name]["data"]
    forged[file] = forged[file].replace("trainer", "miner")
    with pytest.raises(RefusedError, match=f"ConfigMap a/{name} exists and is not what the operator made"):
        reconciler.reconcile(KEY)
    assert cluster.jobs() == []
    assert cluster.condition("Degraded") == ("True", "NameCollision")
    del cluster.objects["configmaps", name]
    reconciler.reconcile(KEY)
    assert image(cluster) == "trainer"


@pytest.mark.parametrize("name", [names.run_name("bot", UID), "of its content"])
def test_a_configuration_that_was_there_first_is_never_used(reconciler: Reconciler, cluster: FakeCluster, name: str):
    reconciler.reconcile(KEY)
    (ours,) = config_maps(cluster)
    planted = cluster.objects["configmaps", ours]
    planted["data"][RUNTIME_FILE] = planted["data"][RUNTIME_FILE].replace("trainer", "miner")
    name = ours if name == "of its content" else name
    cluster.objects.clear()
    cluster.submit()
    cluster.objects["configmaps", name] = planted
    try:
        reconciler.reconcile(KEY)
    except RefusedError:
        assert cluster.jobs() == []
    else:
        assert image(cluster) == "trainer"


def test_a_configuration_of_another_version_is_made_anew_before_the_first_step(
    reconciler: Reconciler, cluster: FakeCluster
):
    reconciler.reconcile(KEY)
    del cluster.objects["jobs", FIRST]
    of_the_future(cluster)
    reconciler.reconcile(KEY)
    assert image(cluster) == "trainer"


def test_a_configuration_of_another_version_is_waited_for_once_steps_were_trained(
    reconciler: Reconciler, cluster: FakeCluster
):
    reconciler.reconcile(KEY)
    del cluster.objects["jobs", FIRST]
    of_the_future(cluster)
    cluster.status["progress"] = PROGRESS
    cluster.changed_by_another_hand()
    with pytest.raises(RefusedError, match="bring that version back"):
        reconciler.reconcile(KEY)
    assert cluster.condition("Degraded") == ("True", "InvalidManifest")
    assert cluster.condition("Finished")[0] == "False"


def test_a_configuration_that_an_earlier_release_wrote_in_other_words_is_used_again_and_again(
    reconciler: Reconciler, cluster: FakeCluster
):
    reconciler.reconcile(KEY)
    (name,) = config_maps(cluster)
    data = cluster.objects["configmaps", name]["data"]
    data[names.CONFIG_FILE] = json.dumps(json.loads(data[names.CONFIG_FILE]), indent=1)
    cluster.status["record"]["runDigest"] = digest_of(data)
    cluster.status["progress"] = PROGRESS
    cluster.changed_by_another_hand()
    for _ in range(2):
        del cluster.objects["jobs", FIRST]
        reconciler.reconcile(KEY)
        assert cluster.jobs() == [FIRST]
        assert cluster.status["record"]["runDigest"] == digest_of(data)


def of_the_future(cluster: FakeCluster) -> None:
    """Let the run's ConfigMap be one that a later operator wrote."""
    (name,) = config_maps(cluster)
    body = cluster.objects.pop(("configmaps", name))
    body["data"][names.CONFIG_FILE] = '{"of_the_future": 1}'
    cluster.objects["configmaps", "of-the-future"] = body
    cluster.status["record"] |= {"runConfig": "of-the-future", "runDigest": digest_of(body["data"])}
    cluster.changed_by_another_hand()


def test_a_mended_runtime_replaces_the_one_of_before_until_a_step_was_trained(
    reconciler: Reconciler, cluster: FakeCluster, runtimes: Path
):
    reconciler.reconcile(KEY)
    del cluster.objects["jobs", FIRST]
    runtimes.write_text("runtimes: {default: {image: trainer-of-tomorrow}}")
    reconciler.reconcile(KEY)
    assert image(cluster) == "trainer-of-tomorrow"
    assert len(config_maps(cluster)) == 2
    assert cluster.status["record"]["runConfig"] == config_maps(cluster)[1]


def test_every_attempt_runs_in_the_image_of_the_first_step_whatever_the_runtime_is_by_then(
    reconciler: Reconciler, cluster: FakeCluster, runtimes: Path
):
    reconciler.reconcile(KEY)
    first = cluster.objects.pop(("jobs", FIRST))
    cluster.status["progress"] = PROGRESS
    cluster.changed_by_another_hand()
    runtimes.write_text("runtimes: {default: {image: trainer-of-tomorrow}}")
    reconciler.reconcile(KEY)
    assert cluster.objects["jobs", FIRST] == first


STARTED = {"number": 1, "startedAt": "2026-01-01T00:00:00Z"}


@pytest.mark.parametrize(
    ("attempt", "stepped"),
    [
        ({"stage": "train", "class": "Failure", "exitCode": 137}, True),
        ({"stage": "train", "class": "Failure", "reason": "PodLost"}, True),
        ({"stage": "train", "class": "Disruption", "reason": "Disrupted"}, True),
        ({"stage": "train", "class": "Failure", "exitCode": 34, "lastStep": 3}, True),
        ({"stage": "train", "class": "Failure", "exitCode": 34}, False),  # its result says that it made none
        ({"stage": "train", "class": "Failure", "exitCode": 137, "lastStep": 0}, False),
        ({"stage": "train", "class": "Running"}, False),
        ({"stage": "train", "class": "Superseded", "startedAt": None}, False),
        ({"stage": "prepare", "class": "Failure", "exitCode": 137}, False),
    ],
)
def test_a_trainer_that_was_killed_without_a_word_may_have_made_a_step(attempt: dict[str, Any], stepped: bool) -> None:
    status = FineTuneJobStatus.model_validate({"attempts": [STARTED | attempt]})
    assert has_stepped(status) is stepped


def test_a_job_begun_by_the_release_before_keeps_its_image_and_configuration(
    reconciler: Reconciler, cluster: FakeCluster
):
    reconciler.reconcile(KEY)
    del cluster.objects["jobs", FIRST]
    (name,) = config_maps(cluster)
    run = cluster.objects.pop(("configmaps", name))
    samples = Path(__file__).parents[1] / "support" / f"contract_{CONTRACT_VERSION - 1}"
    before = {name: (samples / name).read_text() for name in (names.CONFIG_FILE, RUNTIME_FILE)}
    run["metadata"]["name"] = names.run_name("bot", UID)
    run["data"] = dict(before)
    cluster.objects["configmaps", run["metadata"]["name"]] = run
    del cluster.status["record"]["runDigest"], cluster.status["record"]["runConfig"]
    cluster.status["progress"] = PROGRESS
    cluster.changed_by_another_hand()
    earlier = {"number": 1, "stage": "prepare", "class": "Failure", "startedAt": "2026-01-01T00:00:00Z"}
    cluster.status["attempts"] = [earlier]
    cluster.changed_by_another_hand()
    reconciler.reconcile(KEY)
    (job,) = cluster.jobs()
    pod = cluster.objects["jobs", job]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == json.loads(before[RUNTIME_FILE])["image"]
    assert pod["volumes"][0]["configMap"]["name"] == run["metadata"]["name"]
    assert not any("--config-digest" in arg for arg in pod["containers"][0]["args"]), "its image does not know it"
    assert run["data"] == before
    assert "AWS_EC2_METADATA_DISABLED" not in json.dumps(pod), "it may have begun with the role of its node"


def test_a_crd_of_an_earlier_release_that_drops_the_digest_is_served_as_before(
    reconciler: Reconciler, cluster: FakeCluster, runtimes: Path
):
    cluster.dropped = ("runDigest", "runConfig")
    reconciler.reconcile(KEY)
    assert config_maps(cluster) == [names.run_name("bot", UID)]
    assert image(cluster) == "trainer"


def test_an_event_that_is_not_taken_changes_nothing(reconciler: Reconciler, cluster: FakeCluster):
    cluster.fail["create events"] = [ApiError(403, "Forbidden", "")]
    reconciler.reconcile(KEY)
    assert cluster.jobs() == [FIRST]


def test_a_new_job_under_the_name_of_a_deleted_one_begins_with_no_figures(
    reconciler: Reconciler, cluster: FakeCluster, metrics: Metrics
):
    figures = {"job_namespace": "a", "job_name": "bot"}
    reconciler.reconcile(KEY)
    cluster.status["metrics"] = {"trainLoss": 1.5}
    cluster.changed_by_another_hand()
    reconciler.reconcile(KEY)
    assert metrics.registry.get_sample_value("finetune_job_train_loss", figures) == 1.5
    cluster.objects.clear()
    cluster.submit(uid="5e6f7a8b-0000")
    cluster.changed_by_another_hand()
    reconciler.reconcile(KEY)
    assert metrics.registry.get_sample_value("finetune_job_train_loss", figures) is None
    cluster.objects.clear()
    cluster.changed_by_another_hand()
    reconciler.reconcile(KEY)
    assert metrics.registry.get_sample_value("finetune_job_failures", figures) is None


def test_of_a_job_that_another_replaced_under_its_name_nothing_is_kept(reconciler: Reconciler, cluster: FakeCluster):
    reconciler.reconcile(KEY)
    version = cluster.objects["finetunejobs", "bot"]["metadata"]["resourceVersion"]
    assert cluster.known.has_written(KEY, version)
    cluster.objects.clear()
    cluster.submit(uid="5e6f7a8b-0000")
    cluster.changed_by_another_hand()
    reconciler.reconcile(KEY)
    assert not cluster.known.has_written(KEY, version)
    assert set(reconciler._created) == {("a", "5e6f7a8b-0000")}  # pyright: ignore[reportPrivateUsage]


def broken_data(cluster: FakeCluster) -> dict[str, Any]:
    """The pod of the first attempt as its kubelet left it."""
    told = {"stage": "prepare", "attempt": 1, "fault": "BrokenRow", "exit_code": 11, "args": {"file": "a.jsonl"}}
    ended = {"exitCode": 11, "message": json.dumps(told), "startedAt": "2026-01-01T00:00:00Z"}
    job = cluster.objects["jobs", FIRST]["metadata"]
    meta = {
        "name": f"{FIRST}-0-x", "namespace": "a", "uid": "pod-1", "labels": job["labels"],
        "ownerReferences": [{"kind": "Job", "uid": job["uid"], "controller": True}],
    }  # fmt: skip
    status = {"phase": "Failed", "containerStatuses": [{"name": "trainer", "state": {"terminated": ended}}]}
    return {"metadata": meta, "spec": {}, "status": status}


def test_a_job_that_ended_before_the_watch_told_of_its_pod_gets_the_verdict_of_the_pod(
    reconciler: Reconciler, cluster: FakeCluster, children: ChildCache
):
    reconciler.reconcile(KEY)
    body = cluster.objects["jobs", FIRST]
    children.take("jobs", "ADDED", body)
    reconciler.reconcile(KEY)
    assert cluster.lists_of_pods == 0, "a job that runs is not looked into"
    failed = {"type": "Failed", "status": "True", "message": "Pod failed", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    children.take("jobs", "MODIFIED", {**body, "status": {"conditions": [failed]}})
    cluster.pods = [broken_data(cluster)]
    cluster.fail["list pods"] = [ApiError(503, "x", "")]
    with pytest.raises(ApiError):
        reconciler.reconcile(KEY)
    reconciler.reconcile(KEY)
    assert cluster.condition("Succeeded") == ("False", "DataInvalid")
    reconciler.reconcile(KEY)
    assert cluster.lists_of_pods == 1


def test_a_job_begins_with_the_adapter_that_the_job_before_it_has_committed(
    reconciler: Reconciler, cluster: FakeCluster
):
    cluster.objects["finetunejobs", "bot"]["spec"] = SPEC | {
        "model": SPEC["model"] | {"adapterFrom": {"jobName": "cpt"}}
    }
    reconciler.reconcile(KEY)
    assert cluster.condition("Running") == ("False", "WaitingForJob")
    meta = {"name": "cpt", "namespace": "a", "uid": "uid-of-cpt", "generation": 1, "resourceVersion": "1"}
    over = {"type": "Finished", "status": "True", "reason": "Succeeded", "message": "", "lastTransitionTime": "x",
            "observedGeneration": 1}  # fmt: skip
    status = {"phase": "Succeeded", "conditions": [over], "artifacts": [ARTIFACT]}
    cluster.objects["finetunejobs", "cpt"] = {"metadata": meta, "spec": SPEC, "status": status}
    reconciler.reconcile(KEY)
    (name,) = config_maps(cluster)
    config = json.loads(cluster.objects["configmaps", name]["data"][names.CONFIG_FILE])
    assert config["starting_adapter"] == {"uri": ARTIFACT["uri"], "digest": ARTIFACT["digest"]}
    assert cluster.jobs() == [FIRST]
    del cluster.objects["finetunejobs", "cpt"], cluster.objects["jobs", FIRST], cluster.objects["configmaps", name]
    reconciler.reconcile(KEY)
    (again,) = config_maps(cluster)
    assert again == name, "what is made anew begins with the same adapter"


@pytest.mark.parametrize(
    ("waits_for", "is_over"),
    [
        ({"cpt": "bot"}, True),
        ({"cpt": "sft", "sft": "bot"}, True),
        ({"cpt": "sft", "sft": "cpt"}, False),  # these two end, and this one then
        ({"cpt": "sft"}, False),
        ({f"{'cpt' if n == 1 else n}": f"{n + 1}" for n in range(1, 100)}, False),
    ],
)
def test_jobs_that_wait_for_one_another_in_a_circle_end_and_others_wait(
    reconciler: Reconciler, cluster: FakeCluster, waits_for: dict[str, str], is_over: bool
):
    for name, earlier in ({"bot": "cpt"} | waits_for).items():
        meta = {"name": name, "namespace": "a", "uid": f"uid-of-{name}", "generation": 1, "resourceVersion": "1"}
        body = cluster.objects.setdefault(("finetunejobs", name), {"metadata": meta})
        body["spec"] = SPEC | {"model": SPEC["model"] | {"adapterFrom": {"jobName": earlier}}}
    reconciler.reconcile(KEY)
    assert cluster.condition("Running") == ("False", "NoAdapterToCome" if is_over else "WaitingForJob")
    assert cluster.reads_of_jobs <= 1 + MAX_CHAIN


def test_a_pod_that_starts_slowly_has_its_runtime_looked_at_now_and_then_not_in_every_round(
    cluster: FakeCluster, metrics: Metrics, runtimes: Path, children: ChildCache
):
    begun = datetime(2026, 1, 1, tzinfo=UTC)
    passed_s = [0]
    shell = (cast(Cluster, cluster), children, NoProgress(), Runtimes(runtimes), metrics, JobSeries(metrics))
    reconciler = Reconciler(*shell, cluster.known, lambda: begun + timedelta(seconds=passed_s[0]))
    reconciler.reconcile(KEY)
    job = cluster.objects["jobs", FIRST]
    job["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    children.take("jobs", "ADDED", job)
    pod = broken_data(cluster)
    pod["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    waiting = {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    pod["status"] = {"phase": "Pending", "conditions": [scheduled],
                     "containerStatuses": [{"name": "trainer", "state": waiting}]}  # fmt: skip
    children.take("pods", "ADDED", pod)
    for passed_s[0] in range(0, 75, 5):
        reconciler.reconcile(KEY)
    assert cluster.reads_of_runs == 2  # 15 s and 45 s after it was created
    runtimes.write_text("runtimes: {default: {image: trainer-of-tomorrow}}")
    passed_s[0] += RUNTIME_ASKED_EVERY_S
    reconciler.reconcile(KEY)
    assert cluster.status["attempts"][0]["reason"] == "Superseded"


POLICY = "policy: {contact: legal@example.com, allowedLicenses: [MIT]}"


def test_a_refused_job_gets_no_pod_and_no_configuration_whatever_the_server_does(
    reconciler: Reconciler, cluster: FakeCluster, runtimes: Path
):
    runtimes.write_text(f"runtimes: {{default: {{image: trainer, {POLICY}}}}}")
    cluster.fail["patch status"] = [CONFLICT, ApiError(503, "x", ""), UnreachableError("cut")]
    for error in (ApiError, UnreachableError):
        with pytest.raises(error):
            reconciler.reconcile(KEY)
    reconciler.reconcile(KEY)
    assert cluster.condition("Succeeded") == ("False", "RefusedByPolicy")
    assert [kind for kind, _ in cluster.objects] == ["finetunejobs"]
    runtimes.write_text("runtimes: {default: {image: trainer}}")
    cluster.changed_by_another_hand()
    reconciler.reconcile(KEY)
    assert cluster.condition("Succeeded") == ("False", "RefusedByPolicy"), "a verdict stands"


def test_a_policy_that_comes_later_ends_no_job_whose_pod_is_only_on_its_way(
    reconciler: Reconciler, cluster: FakeCluster, runtimes: Path
):
    cluster.fail["create jobs"] = [ApiError(403, "Forbidden", "exceeded quota: gpus")]
    with pytest.raises(RefusedError):
        reconciler.reconcile(KEY)
    runtimes.write_text(f"runtimes: {{default: {{image: trainer, {POLICY}}}}}")
    reconciler.reconcile(KEY)
    assert cluster.jobs() == [FIRST]


def test_a_policy_of_a_runtime_that_comes_later_than_the_job_is_asked(
    reconciler: Reconciler, cluster: FakeCluster, runtimes: Path
):
    cluster.submit(runtime="strict")
    with pytest.raises(RefusedError):
        reconciler.reconcile(KEY)
    runtimes.write_text(f"runtimes: {{default: {{image: trainer}}, strict: {{image: trainer, {POLICY}}}}}")
    reconciler.reconcile(KEY)
    assert cluster.condition("Succeeded") == ("False", "RefusedByPolicy")
    assert cluster.jobs() == []


def test_a_policy_is_no_part_of_what_a_job_is_started_with(
    reconciler: Reconciler, cluster: FakeCluster, runtimes: Path
):
    cluster.submit(datasets=[{"uri": "s3://data/a/", "license": "MIT"}])
    runtimes.write_text(f"runtimes: {{default: {{image: trainer, {POLICY}}}}}")
    reconciler.reconcile(KEY)
    (before,) = config_maps(cluster)
    assert "policy" not in cluster.objects["configmaps", before]["data"][RUNTIME_FILE]
    runtimes.write_text("runtimes: {default: {image: trainer, policy: {contact: somebody else}}}")
    del cluster.objects["jobs", FIRST]
    reconciler.reconcile(KEY)
    assert (config_maps(cluster), cluster.jobs()) == ([before], [FIRST])


def test_a_change_of_policy_is_no_mended_runtime_that_a_waiting_job_would_begin_anew_with(
    cluster: FakeCluster, runtimes: Path
):
    runtimes.write_text(f"runtimes: {{default: {{image: trainer, {POLICY}}}}}")
    creator = ChildCreator(cast(Cluster, cluster), Runtimes(runtimes))
    cluster.submit(datasets=[{"uri": "s3://data/a/", "license": "MIT"}])
    job = read_job(cluster.objects["finetunejobs", "bot"])
    run = creator.find_run(job, job.status).run
    cluster.create("configmaps", config_map(run))
    record = {"runConfig": run.name, "runDigest": run.digest}
    job = read_job({**cluster.objects["finetunejobs", "bot"], "status": {"record": record}})
    runtimes.write_text("runtimes: {default: {image: trainer, policy: {contact: somebody else}}}")
    assert not creator.runtime_changed(job)
    runtimes.write_text("runtimes: {default: {image: trainer-of-tomorrow}}")
    assert creator.runtime_changed(job)
