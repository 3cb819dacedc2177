"""What happens to training pods in the middle: the job goes on at its checkpoint, and ends as if nothing had been.

One job suffers it all, attempt after attempt; the tests may run in any order or alone.
"""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from e2e_faults import Memory, kill_trainer, send
from e2e_lab import Lab, Submitted
from e2e_site import LONG_RUN, LONG_RUN_S
from finetune_api.names import Stage

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]

Pod = dict[str, Any]

HELD_S = float(os.environ.get("FINETUNE_HELD_S", "0"))  # by the queue; `make soak` lets it be minutes


@pytest.fixture(scope="module")
def disturbed(lab: Lab, undisturbed: Submitted) -> Submitted:
    """The same job as `undisturbed`, which trains beside it."""
    return lab.submit("disturbed", **LONG_RUN)


def disturb(job: Submitted, fault: Callable[[Pod], object]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Hit the training pod once it has a checkpoint of its own. Returns what it said before, how its attempt was
    closed, and what the next attempt says."""
    before = job.until_training_beyond(1)
    fault(job.until_running(Stage.TRAIN))
    closed = job.until_attempt_closed(before["attempt"])
    after = job.until_resumed(before["attempt"] + 1)
    assert after["resumed_from_step"] >= before["checkpoint"]["step"] > 0
    return before, closed, after


def test_a_deleted_training_pod_saves_its_last_step_and_the_next_attempt_goes_on_there(lab: Lab, disturbed: Submitted):
    before, closed, after = disturb(
        disturbed, lambda pod: lab.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")
    )
    assert (closed["class"], closed["reason"], closed["exitCode"]) == ("Failure", "Interrupted", 30)
    assert after["resumed_from_step"] == closed["lastStep"] >= before["step"]
    assert closed["lostSeconds"] == 0


def test_a_trainer_killed_by_sigkill_is_reported_by_its_supervisor_and_the_job_resumes(disturbed: Submitted):
    _, closed, _ = disturb(disturbed, kill_trainer)
    assert (closed["class"], closed["reason"], closed["exitCode"]) == ("Failure", "Unknown", 1)
    assert any("killed by signal SIGKILL" in event["message"] for event in disturbed.events())


def test_suspend_frees_the_pod_and_resume_goes_on_at_the_step_it_stopped_at(disturbed: Submitted):
    before = disturbed.until_training_beyond(1)
    failures = disturbed.status().get("failures", 0)
    disturbed.patch({"suspend": True})
    closed = disturbed.until_attempt_closed(before["attempt"])
    assert (closed["class"], closed["reason"]) == ("Suspended", "Suspended")
    disturbed.until(lambda: disturbed.condition("Suspended").get("status") == "True", "the job is suspended")
    live = [pod for pod in disturbed.pods(Stage.TRAIN) if pod["status"]["phase"] in ("Pending", "Running")]
    assert (disturbed.status()["phase"], live) == ("Suspended", [])

    disturbed.patch({"suspend": False})
    after = disturbed.until_resumed(before["attempt"] + 1)
    assert after["resumed_from_step"] == closed["lastStep"] >= before["step"]
    assert disturbed.status().get("failures", 0) == failures


def test_a_queue_that_suspends_the_kubernetes_job_frees_the_pod_and_the_same_attempt_goes_on(
    lab: Lab, disturbed: Submitted
):
    before = disturbed.until_training_beyond(1)
    k8s_job = disturbed.jobs()[-1]["metadata"]["name"]
    lab.kubectl("patch", "job", k8s_job, "--type=merge", "-p", '{"spec": {"suspend": true}}')
    disturbed.until(lambda: disturbed.condition("Running").get("reason") == "JobSuspended", "it waits for the queue")
    assert disturbed.condition("Admitted")["status"] == "False"
    live = [pod for pod in disturbed.pods(Stage.TRAIN) if pod["status"]["phase"] in ("Pending", "Running")]
    assert live == []

    held = disturbed.status()
    resumed_s = time.monotonic() + HELD_S
    while time.monotonic() < resumed_s:
        time.sleep(1)
        assert disturbed.condition("Running")["reason"] == "JobSuspended"
        assert disturbed.condition("Degraded").get("status") != "True"
        assert disturbed.status()["attempts"] == held["attempts"]

    lab.kubectl("patch", "job", k8s_job, "--type=merge", "-p", '{"spec": {"suspend": false}}')
    after = disturbed.until_resumed(before["attempt"])
    assert after["resumed_from_step"] >= before["checkpoint"]["step"] > 0
    assert disturbed.attempts()[-1]["class"] == "Running"


def test_a_container_killed_whole_without_any_message_counts_once_and_the_job_resumes(disturbed: Submitted):
    _, closed, _ = disturb(disturbed, lambda pod: send(pod, signal.SIGKILL))
    assert (closed["class"], closed["reason"], closed["exitCode"]) == ("Failure", "Unknown", 137)


def test_memory_that_runs_out_is_named_and_counted_and_the_job_resumes(disturbed: Submitted):
    _, closed, _ = disturb(disturbed, lambda pod: Memory(pod).run_out())
    assert (closed["class"], closed["reason"]) == ("Failure", "HostOOM")
    assert closed["exitCode"] in (35, 137)  # 137 where the kubelet kills whole containers (cgroup v2)
    words = "memory ran out (the limit: "
    assert any(
        words in event["message"] and "raise resources.memory" in event["message"] for event in disturbed.events()
    )


def test_the_disturbed_job_ends_with_the_bits_of_the_undisturbed_one(undisturbed: Submitted, disturbed: Submitted):
    undisturbed.until_succeeded(LONG_RUN_S)
    status = disturbed.until_succeeded(LONG_RUN_S)
    attempts = disturbed.attempts()
    assert [entry["number"] for entry in attempts] == list(range(1, len(attempts) + 1))
    # An attempt that is killed before the operator has asked it takes the knowledge with it.
    resumed = [entry["resumedFromStep"] for entry in attempts if "resumedFromStep" in entry]
    assert resumed == sorted(resumed)
    assert len(attempts) == 1 or attempts[-1]["resumedFromStep"] > 0

    figures = [job.figures() for job in (undisturbed, disturbed)]
    steps = [row["step"] for row in figures[0] if "loss" in row]
    assert steps == list(range(1, status["plan"]["steps"] + 1))
    assert figures[1] == figures[0]
    assert disturbed.adapter_sha256() == undisturbed.adapter_sha256()
