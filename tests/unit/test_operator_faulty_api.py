"""The operator as it is shipped, `python -m finetune_operator`, at an API server that refuses, stalls and cuts."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from finetune_operator.handlers import KOPF_PAGE
from finetune_operator.phase_selectors import CANNOT_SELECT
from finished_samples import finished_job
from status_samples import SPEC
from stub_api import StubApi, Trouble, stub_api
from testbed.instance import free_ports
from waiting import PATIENCE_S, until

KOPFS = "status.phase!%3D"  # as Kopf writes a selector, and nobody else here
LEASE_S = 20.0  # a busy machine renews it in time


class Running:
    """One operator process."""

    def __init__(self, kubeconfig: Path, folder: Path, namespaces: str, **env: str) -> None:
        runtimes = folder / "runtimes.yaml"
        small = {"cpu": 1, "memory": "512Mi", "ephemeralStorage": "1Gi"}
        runtime = {"image": "trainer@sha256:0", "prepare": small, "defaults": {**small, "sharedMemory": "64Mi"}}
        runtimes.write_text(json.dumps({"runtimes": {"default": runtime}}))
        self.port = free_ports("127.0.0.1", ["http"])["http"]
        environment = {
            **os.environ,
            "KUBECONFIG": str(kubeconfig),
            "FINETUNE_WATCH_NAMESPACES": namespaces,
            "FINETUNE_IDENTITY": "operator-0",
            "FINETUNE_RUNTIMES_FILE": str(runtimes),
            "FINETUNE_HTTP_PORT": str(self.port),
            "FINETUNE_RESYNC_INTERVAL_S": "2",
            "FINETUNE_LEASE_DURATION_S": f"{LEASE_S:g}",
            "PYTHONUNBUFFERED": "1",
            **env,
        }
        self.log = folder / "operator.log"
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "finetune_operator"]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd="/")

    def get(self, path: str) -> tuple[int, str]:
        """Status and text; 0 as long as nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=PATIENCE_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metric(self, line_start: str) -> float:
        lines = [line for line in self.get("/metrics")[1].splitlines() if line.startswith(line_start)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def end(self) -> int:
        """As Kubernetes stops it; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()


Start = Callable[..., Running]


@pytest.fixture
def api(tmp_path: Path) -> Iterator[StubApi]:
    with stub_api(tmp_path) as (stub, _):
        yield stub


@pytest.fixture
def start(api: StubApi, tmp_path: Path) -> Iterator[Start]:
    begun: list[Running] = []

    def begin(namespaces: str, **env: str) -> Running:
        begun.append(Running(tmp_path / "kubeconfig", tmp_path, namespaces, **env))
        return begun[-1]

    yield begin
    for running in begun:
        running.end()


def has_k8s_job(api: StubApi, namespace: str) -> Callable[[], Any]:
    return lambda: api.all("jobs", namespace)


def test_a_forbidden_namespace_stops_no_other_and_is_told_until_it_may_be_read_again(api: StubApi, start: Start):
    api.troubles.append(Trouble(("/namespaces/b/",), 403))
    api.submit("b", "late", SPEC)
    operator = start("a,b")
    api.submit("a", "bot", SPEC)
    until(has_k8s_job(api, "a"), "the job in a is begun")
    until(lambda: "namespace b: pods: 403 Forbidden" in operator.get("/healthz?verbose")[1], "b's trouble is told")
    assert operator.get("/healthz")[0] == operator.get("/readyz")[0] == 200
    trouble = 'finetune_watch_trouble{kind="finetunejobs",watched_namespace="%s"}'
    until(lambda: operator.metric(trouble % "b") == 1, "b's trouble is a metric")
    assert operator.metric(trouble % "a") == 0
    api.submit("a", "next", SPEC)
    until(lambda: len(api.all("jobs", "a")) == 2, "a is still watched")
    api.troubles.clear()
    until(has_k8s_job(api, "b"), "the job in b is begun")
    until(lambda: "namespace b" not in operator.get("/healthz?verbose")[1], "b's trouble is over")
    assert operator.metric(trouble % "b") == 0


def test_a_namespace_that_is_forbidden_later_stops_no_other(api: StubApi, start: Start):
    operator = start("a,b")
    api.submit("b", "early", SPEC)
    until(has_k8s_job(api, "b"), "the job in b is begun")
    api.troubles.append(Trouble(("/namespaces/b/",), 403))
    api.cut_watches()
    until(lambda: "namespace b: finetunejobs: 403" in operator.get("/healthz?verbose")[1], "b's trouble is told")
    api.submit("a", "bot", SPEC)
    until(has_k8s_job(api, "a"), "the job in a is begun")
    assert operator.get("/healthz")[0] == 200


def lists_of_jobs(api: StubApi) -> int:
    return len(api.asked("GET /apis/batch/v1/jobs?", "limit="))


def test_watches_that_are_cut_go_on_where_they_were_and_list_anew_only_what_is_forgotten(api: StubApi, start: Start):
    start("")
    for number in range(2):
        watches = len(api.asked("/batch/v1/jobs?", "watch=true"))
        api.submit("a", f"bot-{number}", SPEC)
        until(lambda wanted=number: len(api.all("jobs", "a")) > wanted, "the job is begun")
        api.cut_watches()
        until(lambda before=watches: len(api.asked("/batch/v1/jobs?", "watch=true")) > before, "the watch goes on")
    assert lists_of_jobs(api) == 1
    api.forgotten = api.version() + 1
    api.submit("a", "more", SPEC)
    api.cut_watches()
    until(lambda: lists_of_jobs(api) == 2, "a new list")


def test_a_server_that_cannot_select_by_phase_is_asked_for_all_until_it_can(api: StubApi, start: Start):
    api.selects_by_phase = False
    for number in range(20):
        body = finished_job(f"kept-{number}")
        api.store("finetunejobs", {**body, "metadata": {**body["metadata"], "uid": f"uid-{number}"}})
    operator = start("a")
    until(lambda: operator.metric('finetune_jobs{phase="Succeeded"}') == 20, "the finished jobs are counted")
    api.submit("a", "bot", SPEC)
    until(has_k8s_job(api, "a"), "the job is begun")
    until(lambda: CANNOT_SELECT in operator.get("/healthz?verbose")[1], "it is told")
    assert operator.log.read_text().count(CANNOT_SELECT) == 1
    assert api.asked("GET ", "/finetunejobs/kept-") == []
    assert operator.get("/healthz")[0] == operator.get("/readyz")[0] == 200
    api.selects_by_phase = True
    until(lambda: CANNOT_SELECT not in operator.get("/healthz?verbose")[1], "the CRD is of this release")
    api.cut_watches()
    api.submit("a", "next", SPEC)
    until(lambda: len(api.all("jobs", "a")) == 2, "the next job is begun")
    selectors = {"Kopf's": KOPFS + "Succeeded", "that of finished ones": quote("status.phase!=Pending")}
    for watch, selector in selectors.items():  # the first time in vain
        until(lambda s=selector: len(api.asked("watch=true", s)) >= 2, f"a watch, {watch}")
    assert operator.process.poll() is None


def test_a_list_of_which_the_server_forgets_the_rest_is_begun_anew(api: StubApi, start: Start):
    """As after five minutes in which its next page could not be read. Kopf would end, and the operator with it."""
    api.troubles.append(Trouble(("/finetunejobs?", "continue="), 410))
    for number in range(KOPF_PAGE + 1):
        api.submit("a", f"bot-{number}", {**SPEC, "suspend": True})
    operator = start("a")
    until(lambda: len(api.asked("/finetunejobs?", "continue=")) > 1, "it is begun anew")
    api.troubles.clear()
    api.submit("a", "late", SPEC)
    until(has_k8s_job(api, "a"), "the job is begun")
    assert operator.process.poll() is None


def test_a_job_is_begun_as_soon_as_kopf_tells_of_it_also_after_its_watch_was_cut_or_forgotten(
    api: StubApi, start: Start
):
    """No resync comes in this time: it would hide that nobody watches."""
    operator = start("a", FINETUNE_RESYNC_INTERVAL_S="120")
    for number, happens in enumerate((lambda: None, api.cut_watches, api.cut_watches)):
        watches = len(api.asked("watch=true", KOPFS))
        api.forgotten = api.version() + 1 if number == 2 else 0
        happens()
        until(lambda before=watches, n=number: n == 0 or len(api.asked("watch=true", KOPFS)) > before, "a new watch")
        until(lambda: api.asked("watch=true", KOPFS), "Kopf watches")
        api.submit("a", f"bot-{number}", SPEC)
        until(lambda wanted=number: len(api.all("jobs", "a")) > wanted, "the job is begun")
    assert operator.process.poll() is None


def test_a_job_is_begun_as_soon_as_kopf_tells_of_it_also_after_the_server_broke_off_its_watch(
    api: StubApi, start: Start
):
    """With another error than that of a version which is forgotten, Kopf would never watch this namespace again."""
    error = {"kind": "Status", "code": 500, "reason": "InternalError", "message": "etcdserver: no leader"}
    operator = start("a", FINETUNE_RESYNC_INTERVAL_S="120")  # no resync hides that nobody watches
    until(lambda: api.asked("watch=true", KOPFS), "Kopf watches")
    api.troubles.append(Trouble(("watch=true", KOPFS), stream=json.dumps({"type": "ERROR", "object": error})))
    watches = len(api.asked("watch=true", KOPFS))
    api.cut_watches()
    until(lambda: len(api.asked("watch=true", KOPFS)) > watches, "its watch is broken off")
    api.troubles.clear()
    api.submit("a", "bot", SPEC)
    until(has_k8s_job(api, "a"), "the job is begun", timeout_s=100)
    assert "500 InternalError; listing anew" in operator.log.read_text()
    assert operator.process.poll() is None


def test_an_operator_that_may_not_read_its_lease_lives_but_is_not_ready_and_says_why(api: StubApi, start: Start):
    api.troubles.append(Trouble(("/leases",), 403))
    operator = start("a", FINETUNE_LEASE_DURATION_S="2")
    until(lambda: operator.get("/readyz")[0] == 503, "it is not ready")
    assert "lease finetune-system/finetune-operator: 403 Forbidden" in operator.get("/readyz")[1]
    assert operator.get("/healthz")[0] == 200


def test_a_standby_is_ready_and_ends_when_it_is_told_to(api: StubApi, start: Start):
    spec = {"holderIdentity": "other", "leaseDurationSeconds": 3600}
    api.store("leases", {"metadata": {"namespace": "finetune-system", "name": "mine"}, "spec": spec})
    operator = start("a", FINETUNE_LEASE_NAME="mine", FINETUNE_LEASE_DURATION_S="2")
    until(lambda: "waiting for the lease" in operator.log.read_text(), "it waits")
    assert operator.get("/readyz")[0] == 200
    assert "held by other" in operator.get("/healthz?verbose")[1]
    assert operator.end() == 0


def test_the_lease_is_given_back_only_when_the_last_round_has_ended(api: StubApi, start: Start):
    operator = start("a")
    until(lambda: api.all("leases"), "the lease is taken")
    api.troubles.append(Trouble(("POST ", "/namespaces/a/jobs"), wait_s=3))
    api.submit("a", "bot", SPEC)
    until(lambda: api.asked("POST ", "/namespaces/a/jobs"), "a Job is being created")
    assert operator.end() == 0
    (job,) = api.all("jobs", "a")
    (lease,) = api.all("leases")
    assert lease["spec"]["holderIdentity"] == ""
    assert int(lease["metadata"]["resourceVersion"]) > int(job["metadata"]["resourceVersion"])
