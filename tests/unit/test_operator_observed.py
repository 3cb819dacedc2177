"""Kubernetes objects, as they are and as they should never be, become plain values."""

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api import names
from finetune_api.names import Stage
from finetune_api.reasons import Fault
from finetune_operator.job_reader import read_job
from finetune_operator.observed import (
    ObservedK8sJob,
    ObservedPod,
    is_on_its_way,
    observe_k8s_job,
    observe_pod,
    parse_result,
)

NOW = datetime(2026, 11, 27, tzinfo=UTC)
LABELS = names.child_labels("bot", "uid-1", Stage.TRAIN, 2)
REPORT = '{"stage":"train","attempt":2,"fault":"Interrupted","exit_code":30,"step":7}'


def job_body(**status: Any) -> dict[str, Any]:
    owner = {"kind": "FineTuneJob", "uid": "uid-1", "controller": True}
    meta = {"name": "n", "uid": "u", "labels": LABELS, "ownerReferences": [owner]}
    return {"metadata": {**meta, "creationTimestamp": "2026-01-01T00:00:00Z"}, "spec": {}, "status": status}


def pod_body(**status: Any) -> dict[str, Any]:
    owner = {"kind": "Job", "uid": "u", "controller": True}
    meta = {"name": "p", "uid": "pu", "labels": LABELS, "ownerReferences": [owner]}
    limits = {"resources": {"limits": {"memory": "1536Mi"}}}
    return {"metadata": meta, "spec": {"containers": [{"name": "trainer", **limits}]}, "status": status}


def container(**state: Any) -> dict[str, Any]:
    return {"containerStatuses": [{"name": "trainer", "state": state}]}


@pytest.mark.parametrize(
    ("conditions", "outcome"),
    [
        ([], None),
        ([{"type": "FailureTarget", "status": "True"}], None),
        ([{"type": "SuccessCriteriaMet", "status": "True"}], None),
        ([{"type": "Failed", "status": "False"}], None),
        ([{"type": "Complete", "status": "True"}], "Complete"),
        ([{"type": "FailureTarget", "status": "True"}, {"type": "Failed", "status": "True"}], "Failed"),
    ],
)
def test_a_job_has_ended_only_when_all_its_pods_have(conditions: list[Any], outcome: str | None):
    seen = observe_k8s_job(job_body(conditions=conditions))
    assert seen is not None
    assert seen.outcome == outcome


@pytest.mark.parametrize(
    ("message", "kept"),
    [  # of schedulers from 1.18 to 1.36
        (
            "0/1 nodes are available: 1 Insufficient nvidia.com/gpu. no new claims to deallocate, preemption: 0/1 "
            "nodes are available: 1 No preemption victims found for incoming pod.",
            "0/1 nodes are available: 1 Insufficient nvidia.com/gpu",
        ),
        (
            "0/1 nodes are available: 1 Insufficient nvidia.com/gpu. preemption: 0/1 nodes are available: 1 No "
            "preemption victims found for incoming pod..",
            "0/1 nodes are available: 1 Insufficient nvidia.com/gpu",
        ),
        (
            "0/1 nodes are available: 1 node(s) had untolerated taint {node.kubernetes.io/unreachable: }. preemption: "
            "0/1 nodes are available: 1 Preemption is not helpful for scheduling.",
            "0/1 nodes are available: 1 node(s) had untolerated taint {node.kubernetes.io/unreachable: }",
        ),
        (
            "0/2 nodes are available: 2 Insufficient cpu. preemption: not eligible due to preemptionPolicy=Never.",
            "0/2 nodes are available: 2 Insufficient cpu",
        ),
        ("0/2 nodes are available: 2 Insufficient cpu.", "0/2 nodes are available: 2 Insufficient cpu."),
        ("preemption: 0/1 nodes are available: 1 No victims.", "preemption: 0/1 nodes are available: 1 No victims."),
        (
            "0/9 nodes are available: " + "9 node(s) had untolerated taint {example.com/one: }, " * 3 + "1 node(s) had "
            "untolerated taint {example.com/another: long}. no new claims to deallocate, preemption: 0/9 nodes",
            "0/9 nodes are available: " + "9 node(s) had untolerated taint {example.com/one: }, " * 3 + "1 node(s) had "
            "untolerated taint {example.com/another: long}",
        ),
    ],
)
def test_of_a_schedulers_words_those_on_preemption_and_claims_are_left_out(message: str, kept: str):
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    seen = observe_pod(pod_body(conditions=[condition]))
    assert seen is not None
    assert seen.unschedulable == kept


def test_a_pod_tells_its_node_when_it_was_bound_and_when_the_kubelet_took_it():
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    body = pod_body(conditions=[scheduled], startTime="2026-01-01T00:00:02Z")
    body["spec"]["nodeName"] = "gpu-7"
    seen = observe_pod(body)
    assert seen is not None
    assert (seen.scheduled, seen.node) == (True, "gpu-7")
    assert (seen.scheduled_at, seen.taken_at) == (
        datetime(2026, 1, 1, tzinfo=UTC),
        datetime(2026, 1, 1, 0, 0, 2, tzinfo=UTC),
    )
    waiting = observe_pod(pod_body(conditions=[{**scheduled, "status": "False", "reason": "Unschedulable"}]))
    assert waiting is not None
    assert (waiting.scheduled_at, waiting.taken_at, waiting.node) == (None, None, None)


def test_a_job_that_another_object_owns_is_not_ours_whatever_its_labels_say():
    body = job_body()
    body["metadata"]["ownerReferences"][0]["uid"] = "uid-2"
    assert observe_k8s_job(body) is None
    body["metadata"]["ownerReferences"] = []
    assert observe_k8s_job(body) is None


def test_a_pod_tells_its_report_exit_code_and_times():
    ended = {
        "exitCode": 30,
        "message": REPORT,
        "startedAt": "2026-01-01T00:00:00Z",
        "finishedAt": "2026-01-01T01:00:00Z",
    }
    seen = observe_pod(pod_body(phase="Failed", **container(terminated=ended)))
    assert seen is not None
    assert (seen.exit_code, seen.active, seen.memory_limit) == (30, False, "1.5 GiB")
    assert seen.result is not None
    assert seen.result.fault == Fault.INTERRUPTED
    assert seen.result.step == 7


def test_a_pod_tells_why_it_does_not_run():
    waiting = observe_pod(pod_body(**container(waiting={"reason": "ImagePullBackOff", "message": "x" * 999})))
    assert waiting is not None
    assert waiting.waiting_reason == "ImagePullBackOff"
    assert len(waiting.waiting_message) == 256
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
    unschedulable = observe_pod(pod_body(conditions=[condition]))
    assert unschedulable is not None
    assert unschedulable.unschedulable == "0/3 nodes"


def test_a_pod_tells_what_ended_it():
    disrupted = observe_pod(pod_body(conditions=[{"type": "DisruptionTarget", "status": "True"}]))
    assert disrupted is not None
    assert disrupted.disrupted
    killed = observe_pod(pod_body(**container(terminated={"exitCode": 137, "reason": "OOMKilled"})))
    assert killed is not None
    assert killed.oom_killed
    evicted = observe_pod(pod_body(phase="Failed", reason="Evicted", **container(terminated={"exitCode": 137})))
    assert evicted is not None
    assert evicted.evicted


@pytest.mark.parametrize(
    "reason",
    ["UnexpectedAdmissionError", "OutOfcpu", "OutOfmemory", "OutOfnvidia.com/gpu", "NodeAffinity", "NodeShutdown",
     "TopologyAffinityError", "Evicted"],
)  # fmt: skip
def test_a_pod_that_failed_before_any_container_began_was_refused_by_its_node_whatever_the_node_calls_it(reason: str):
    seen = observe_pod(pod_body(phase="Failed", reason=reason, message="Pod was rejected: no"))
    assert seen is not None
    assert seen.refused == f"{reason}: Pod was rejected: no"
    assert not seen.evicted
    assert not seen.active


@pytest.mark.parametrize(
    "status",
    [
        {"phase": "Pending", "reason": "OutOfcpu"},
        {"phase": "Failed"},
        {"phase": "Failed", "reason": "Evicted", **container(terminated={"exitCode": 137})},
        {"phase": "Failed", "reason": "Evicted", "conditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ],
)
def test_a_pod_that_ran_or_was_disrupted_was_not_refused(status: dict[str, Any]):
    seen = observe_pod(pod_body(**status))
    assert seen is not None
    assert seen.refused is None


def test_a_trainer_that_its_node_could_not_begin_was_refused_and_has_not_run_since_1970():
    """As the kubelet tells it (kubernetes#120331)."""
    ended = {"exitCode": 128, "reason": "StartError", "message": "nvidia-container-cli: driver error"}
    times = {"startedAt": "1970-01-01T00:00:00Z", "finishedAt": "2026-01-01T00:00:00Z"}
    seen = observe_pod(pod_body(phase="Failed", **container(terminated=ended | times)))
    assert seen is not None
    assert seen.refused == "StartError: nvidia-container-cli: driver error"
    assert (seen.started_at, seen.exit_code, seen.result, seen.bad_result) == (None, None, None, False)
    kept = observe_pod(pod_body(phase="Running", **container(terminated=ended | times)))
    assert kept is not None
    assert (kept.started_at, kept.exit_code, kept.bad_result) == (None, 128, False), "by another container"


def test_a_container_before_ours_that_failed_is_told_with_its_name():
    before = [
        {"name": "mesh", "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}},
        {"name": "agent", "state": {"terminated": {"exitCode": 2, "reason": "Error", "message": "no vault"}}},
    ]
    ours = container(waiting={"reason": "PodInitializing"})
    seen = observe_pod(pod_body(phase="Failed", initContainerStatuses=before, **ours))
    assert seen is not None
    assert seen.refused is not None
    assert seen.refused.endswith("agent, which the cluster puts before the trainer, ended with exit code 2: no vault")
    still_tried = observe_pod(pod_body(phase="Pending", initContainerStatuses=before, **ours))
    assert still_tried is not None
    assert still_tried.refused is None


def test_a_pod_that_a_scheduling_gate_holds_is_not_scheduled_in_the_words_of_its_condition():
    words = "Scheduling is blocked due to non-empty scheduling gates"
    condition = {"type": "PodScheduled", "status": "False", "reason": "SchedulingGated", "message": words}
    seen = observe_pod(pod_body(conditions=[condition]))
    assert seen is not None
    assert seen.unschedulable == words


def test_a_job_that_somebody_suspended_tells_so_in_the_words_of_its_condition():
    condition = {"type": "Suspended", "status": "True", "reason": "JobSuspended", "message": "Job suspended"}
    body = job_body(conditions=[condition])
    running = observe_k8s_job(body)
    body["spec"] = {"suspend": True}
    held = observe_k8s_job(body)
    assert running is not None
    assert held is not None
    assert (running.suspended, held.suspended) == (None, "Job suspended")


@pytest.mark.parametrize(("reason", "told"), [("ImagePullBackOff", True), ("PodInitializing", False)])
def test_a_pod_tells_what_a_container_before_ours_waits_for(reason: str, told: bool):
    before = [{"name": "mesh", "state": {"waiting": {"reason": reason, "message": "no such image"}}}]
    ours = container(waiting={"reason": "PodInitializing"})
    seen = observe_pod(pod_body(initContainerStatuses=before, **ours))
    assert seen is not None
    assert seen.waiting_reason == (reason if told else "PodInitializing")
    assert seen.waiting_container == ("mesh" if told else None)


@pytest.mark.parametrize(
    "message",
    [
        "Traceback", "{}", "[1]", '{"stage":"train"}', "[" * 4000, "x" * 100_000,
        REPORT.replace('"Interrupted"', "7"), REPORT.replace("30", '"x"'),
    ],
)  # fmt: skip
def test_a_message_that_is_no_report_is_a_bad_result(message: str):
    assert parse_result(message) == (None, True)


def test_no_message_is_no_report():
    assert parse_result("") == (None, False)
    assert parse_result(None) == (None, False)


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["metadata", "status", "spec", "labels", "conditions", "containerStatuses", "name", "state"])
        | st.sampled_from(["terminated", "message", "ownerReferences", "type", names.LABEL_STAGE, names.LABEL_ATTEMPT]),
        inner, max_size=5,
    ),
    max_leaves=25,
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(["metadata", "status", "spec"]), junk), junk)
def test_no_object_makes_parsing_raise(body: dict[str, Any], status: Any):
    observe_k8s_job(body)
    observe_pod(body)
    labelled = pod_body()
    labelled["status"] = status
    observe_pod(labelled)
    meta = {"name": "bot", "namespace": "a", "uid": "u", "generation": 1}
    read_job({"metadata": meta, "spec": body.get("spec"), "status": status})


def test_a_limit_of_memory_that_no_number_holds_is_not_known():
    """An exception would end the watch of all pods."""
    body = pod_body()
    body["spec"]["containers"][0]["resources"]["limits"]["memory"] = "9" * 400 + "Gi"
    seen = observe_pod(body)
    assert seen is not None
    assert seen.memory_limit == "not known"


@pytest.mark.parametrize(
    ("job", "pod", "on_its_way"),
    [
        ({}, None, True),
        ({}, {}, True),
        ({}, {"scheduled": True, "waiting_reason": "ContainerCreating"}, True),
        ({}, {"waiting_reason": "ErrImagePull"}, False),
        ({}, {"unschedulable": "0/3 nodes"}, False),
        ({}, {"started_at": NOW}, False),
        ({}, {"deletion_due": NOW}, False),
        ({}, {"phase": "Failed", "refused": "UnexpectedAdmissionError"}, False),
        ({}, {"gone": True}, False),
        ({}, {"disrupted": True}, False),
        ({"suspended": "by a queue"}, None, False),
        ({"deleting": True}, None, False),
        ({"outcome": "Complete"}, {}, False),
    ],
)
def test_a_pod_is_on_its_way_until_it_starts_or_anything_is_in_its_way(
    job: dict[str, Any], pod: dict[str, Any] | None, *, on_its_way: bool
):
    earlier = ObservedK8sJob("prepare", "uid-1", Stage.PREPARE, 1, outcome="Complete")
    earlier_pod = ObservedPod("prepare", "uid-2", Stage.PREPARE, 1, phase="Succeeded", owner_uid="uid-1")
    newest = ObservedK8sJob("train", "uid-3", Stage.TRAIN, 1, **job)
    pods = [] if pod is None else [ObservedPod("train", "uid-4", Stage.TRAIN, 1, owner_uid="uid-3", **pod)]
    assert is_on_its_way([earlier, newest], [earlier_pod, *pods]) == on_its_way
    assert not is_on_its_way([earlier], [earlier_pod])
