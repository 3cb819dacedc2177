"""What happens to the node itself: its kubelet is away, it loses its devices, and it is gone with all its pods.

The testbed's node hosts all pods: each test here waits until no other job runs on it.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import pytest

from e2e_faults import held
from e2e_lab import PATIENCE_S, Lab, Submitted, fetch, until
from e2e_operator import is_complete, operator_away, until_operator_ready
from e2e_site import SECOND_NAMESPACE
from finetune_api.names import Stage

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

Body = dict[str, Any]


@pytest.fixture(scope="module")
def quiet(lab: Lab) -> Lab:
    """The lab without a pod that could be hit by accident."""
    pods = f"/api/v1/namespaces/{lab.namespace}/pods"

    def over() -> bool:
        return all(pod["status"]["phase"] in ("Succeeded", "Failed") for pod in lab.api.items(pods))

    until(over, "no other job runs on the node", PATIENCE_S)
    return lab


@pytest.fixture(scope="module")
def after_kubelet_outage(quiet: Lab) -> Iterator[tuple[Submitted, Submitted]]:
    """(unstarted, withdrawn): jobs whose pods were bound to the node while its kubelet was away, and which the
    operator has told so. The GPU that the second one's pod was bound for was gone when the kubelet came back."""
    lab, cluster = quiet, quiet.cluster
    cluster.advertise_gpus(0)
    withdrawn = lab.submit("withdrawn", resources={"gpusPerNode": 1, "memory": "4Gi"})
    withdrawn.until(lambda: withdrawn.condition("Admitted").get("reason") == "Unschedulable", "it waits for a GPU")
    try:
        cluster.stop_component("kubelet")
        _offer_gpus(lab, 1)
        unstarted = lab.submit("unstarted")
        for job, stage in ((unstarted, Stage.PREPARE), (withdrawn, Stage.TRAIN)):
            job.until(lambda j=job, s=stage: _heart_beats(lab) and _bound(j, s), f"the pod of {job.name} is bound")
        for job in (unstarted, withdrawn):
            job.until(lambda j=job: j.condition("Running").get("reason") == "NodeUnreachable", "its node is named")
        _offer_gpus(lab, 0)
        cluster.start_component("kubelet")
        yield unstarted, withdrawn
    finally:
        cluster.start_component("kubelet")
        cluster.advertise_gpus(0)
        withdrawn.delete()


def _offer_gpus(lab: Lab, count: int) -> None:
    """Write down what the node has, in place of its kubelet."""
    patch = {"status": {kind: {"nvidia.com/gpu": str(count)} for kind in ("capacity", "allocatable")}}
    node = str(lab.cluster.node_name)
    lab.cluster.kubectl("patch", "node", node, "--subresource=status", "--type=merge", "-p", json.dumps(patch))


def _heart_beats(lab: Lab) -> bool:
    """Renew the node's lease in place of its kubelet: the scheduler takes it for alive, however slow this is."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    patch = ("--type=merge", "-p", json.dumps({"spec": {"renewTime": now}}))
    lab.cluster.kubectl("-n", "kube-node-lease", "patch", "lease", str(lab.cluster.node_name), *patch)
    return True


def _bound(job: Submitted, stage: Stage) -> Body | None:
    return next((pod for pod in job.pods(stage) if pod["spec"].get("nodeName")), None)


def test_a_pod_whose_kubelet_is_away_before_it_starts_is_told_and_runs_once_the_kubelet_is_back(
    after_kubelet_outage: tuple[Submitted, Submitted],
):
    unstarted, _ = after_kubelet_outage
    closed = unstarted.until_attempt_closed(1, Stage.PREPARE)
    assert (closed["class"], closed["exitCode"]) == ("Succeeded", 0)
    assert unstarted.condition("Degraded")["status"] == "False"
    unstarted.delete()


def test_a_gpu_that_is_gone_when_its_pod_is_to_start_uses_up_no_retry(
    after_kubelet_outage: tuple[Submitted, Submitted],
):
    _, withdrawn = after_kubelet_outage
    closed = withdrawn.until_attempt_closed(1)
    assert (closed["class"], closed["reason"]) == ("Waiting", "PodNotStarted")
    withdrawn.until(lambda: withdrawn.condition("Admitted").get("reason") == "Unschedulable", "the next attempt waits")
    assert withdrawn.status().get("failures", 0) == 0
    assert withdrawn.attempts()[-1]["number"] == 2
    assert any("nvidia.com/gpu" in event["message"] for event in withdrawn.events() if event["type"] == "Warning")


@pytest.fixture(scope="module")
def after_loss(quiet: Lab) -> Submitted:
    """A job that was trained while the operator was away. Then its node was lost, with all its pods, and so was the
    other namespace that the operator watches; then the operator came back."""
    lab, cluster = quiet, quiet.cluster
    job = lab.submit("bereft")
    with ExitStack() as away:
        with held(job, Stage.TRAIN):
            away.enter_context(operator_away(lab))
        job.until(lambda: is_complete(job, Stage.TRAIN), "the train Job is complete")
        cluster.kubectl("delete", "namespace", SECOND_NAMESPACE, "--timeout=120s", timeout_s=PATIENCE_S)
        cluster.stop_component("kubelet")
        cluster.kubectl("delete", "node", str(cluster.node_name))
        until(lambda: not job.pods(), "the pods of a lost node are gone", PATIENCE_S, job.explain)
        cluster.start_component("kubelet")
    until_operator_ready(lab)
    return job


def test_a_job_whose_node_is_lost_after_its_end_while_the_operator_is_away_keeps_its_result(after_loss: Submitted):
    status = after_loss.until_succeeded()
    assert after_loss.adapter_sha256(), "the status names what lies in the bucket"
    assert (status["progress"]["text"], status.get("failures", 0)) == ("20/20", 0)
    assert status["metrics"]["evalLoss"] < status["metrics"]["baseEvalLoss"]
    assert [(entry["class"], entry["reason"]) for entry in after_loss.attempts()] == [
        ("Disruption", "PodLost"),
        ("Succeeded", "Committed"),
    ]


def test_a_watched_namespace_that_is_deleted_is_told_and_stops_no_job_of_another(after_loss: Submitted):
    lab = after_loss.lab
    beside = lab.submit("beside")
    beside.until_running(Stage.PREPARE)
    beside.delete()
    operator = lab.operator()["status"]["podIP"]
    told = until(lambda: fetch(f"http://{operator}:8080/healthz?verbose"), "the operator answers", PATIENCE_S)
    assert f"namespace {SECOND_NAMESPACE}: finetunejobs: 403 Forbidden" in told
