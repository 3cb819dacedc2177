"""Many jobs in a minute: how long each waits for its Kubernetes Job, and what it costs the operator.

Beside it a bare client creates as many Kubernetes Jobs at the same rate, which shows the API server's own part. A run
that does not get through in time is a result too.
"""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import testbed
from bench.acted_kubelet import ActedKubelet
from bench.api_server import JOBS, ApiServer, Body, at_even_rate
from bench.operator_process import OperatorProcess, Release
from bench.operator_waits import Waits, tell, telling, wait_until
from finetune_api import names

FINETUNEJOBS = f"/apis/{names.API_VERSION}"
SPEC: Body = {
    "model": {"uri": "s3://models/model"},
    "method": {"type": "SFT"},
    "datasets": [{"uri": "s3://data/chat/*.jsonl"}],
    "output": {"uri": "s3://bench/out"},
}
READY_S = 60.0
LAST_S = 300.0  # from the last job applied to the end of the last job
BARE_LAST_S = 60.0  # from the last Kubernetes Job of the bare client to the watch's word of it


@dataclass(frozen=True)
class OperatorRun:
    """What one run of an operator gave, per job where it says so."""

    release: str
    waits: Waits
    over: int  # jobs that succeeded in time
    over_s: float  # after the first was applied
    cpu_ms: float
    writes: dict[str, float]
    event_lists: int
    peak_mib: float
    cores: float  # that the operator used while jobs were applied


def run_operator(
    cluster: testbed.Cluster, release: Release, namespace: str, count: int, seconds: float, folder: Path
) -> OperatorRun:
    """Apply jobs at an even rate, and act for their pods until all have succeeded, or LAST_S after the last."""
    release.install_crd(cluster)
    cluster.kubectl("create", "namespace", namespace)
    api, ended, waits, over = ApiServer(cluster.kubeconfig), threading.Event(), Waits(), set[str]()

    def job_seen(event: str, job: Body) -> None:
        labels = job["metadata"]["labels"]
        if event == "ADDED" and labels[names.LABEL_STAGE] == names.Stage.PREPARE:
            waits.seen_s.setdefault(labels[names.LABEL_JOB_NAME], time.monotonic())

    def job_changed(_: str, body: Body) -> None:
        conditions = body.get("status", {}).get("conditions", [])
        if any(c["type"] == "Succeeded" and c["status"] == "True" for c in conditions):
            over.add(body["metadata"]["name"])

    def submit(number: int) -> None:
        name = f"job-{number}"
        waits.asked_s[name] = time.monotonic()
        api.send("POST", path, finetunejob(namespace, name))

    path = f"{FINETUNEJOBS}/namespaces/{namespace}/{names.PLURAL}"
    api.follow(f"{JOBS}/namespaces/{namespace}/jobs", job_seen, ended)
    api.follow(path, job_changed, ended)
    kubelet = ActedKubelet(api, namespace)
    kubelet.start()
    try:
        with OperatorProcess(release, cluster.kubeconfig, [namespace], folder) as operator:
            operator.wait_until_ready(READY_S)
            requests, writes, cpu_s, begun_s = api.requests(), operator.writes(), operator.cpu_s(), time.monotonic()
            with telling(
                lambda: (
                    f"{release.name}: of {len(waits.asked_s)} jobs applied {len(waits.seen_s)} have got a Kubernetes "
                    f"Job, {len(over)} have succeeded"
                )
            ):
                at_even_rate(count, seconds, submit)
                cores = (operator.cpu_s() - cpu_s) / (time.monotonic() - begun_s)
                wait_until(lambda: len(over) >= count, LAST_S)
            waits.ended_s = time.monotonic()
            for failure in kubelet.failures[:3]:
                tell(f"{release.name}: the acted kubelet: {failure}")
            done = operator.writes() - writes
            return OperatorRun(
                release=release.name,
                waits=waits,
                over=len(over),
                over_s=waits.ended_s - begun_s,
                cpu_ms=1000 * (operator.cpu_s() - cpu_s) / count,
                writes={name: number / count for name, number in sorted(done.items()) if name != "leases"},
                event_lists=(api.requests() - requests)["LIST", "events"],
                peak_mib=operator.memory_mib("VmHWM"),
                cores=cores,
            )
    finally:
        ended.set()
        kubelet.stop()


def run_bare(cluster: testbed.Cluster, like: str, namespace: str, count: int, seconds: float) -> Waits:
    """Create Kubernetes Jobs like one of namespace `like` at the same rate, with pods that go through their states."""
    cluster.kubectl("create", "namespace", namespace)
    api, ended, waits = ApiServer(cluster.kubeconfig), threading.Event(), Waits()
    found: list[Body] = api.send("GET", f"{JOBS}/namespaces/{like}/jobs?limit=1")["items"]
    if not found:
        tell(f"{namespace}: no operator made a Kubernetes Job in {like} that could be repeated")
        return waits

    def seen(event: str, job: Body) -> None:
        if event == "ADDED":
            waits.seen_s.setdefault(job["metadata"]["name"], time.monotonic())

    def create(number: int) -> None:
        name = f"job-{number}"
        waits.asked_s[name] = time.monotonic()
        api.send("POST", f"{JOBS}/namespaces/{namespace}/jobs", bare_job(found[0], namespace, name))

    api.follow(f"{JOBS}/namespaces/{namespace}/jobs", seen, ended)
    kubelet = ActedKubelet(api, namespace)
    kubelet.start()
    try:
        with telling(lambda: f"{namespace}: {len(waits.seen_s)} of {count} Kubernetes Jobs"):
            at_even_rate(count, seconds, create)
            wait_until(lambda: len(waits.seen_s) >= count, BARE_LAST_S)
        waits.ended_s = time.monotonic()
        return waits
    finally:
        ended.set()
        kubelet.stop()


def finetunejob(namespace: str, name: str) -> Body:
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name, "namespace": namespace},
        "spec": SPEC,
    }


def bare_job(made: Body, namespace: str, name: str) -> Body:
    """Return a Job like one that the operator made, which belongs to nobody."""
    template: dict[str, Any] = made["spec"]["template"]
    labels = {key: value for key, value in template["metadata"]["labels"].items() if "kubernetes.io/" not in key}
    labels = {key: value for key, value in labels.items() if key not in ("controller-uid", "job-name")}
    spec = {key: value for key, value in made["spec"].items() if key not in ("selector", "suspend")}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {**spec, "template": {"metadata": {"labels": labels}, "spec": template["spec"]}},
    }


def table_rows(runs: list[OperatorRun], bare: list[Waits]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows: a column for each operator, then one for each run of the bare client."""
    header = ["", *(run.release for run in runs), *(f"bare client {number}" for number in range(1, len(bare) + 1))]
    none = ["-"] * len(bare)
    resources = sorted({name for run in runs for name in run.writes})

    def of_all(value: float, run: OperatorRun, digits: int) -> str:
        """Where jobs are not over, more would have followed."""
        return ("more than " if run.over < len(run.waits.asked_s) else "") + f"{value:.{digits}f}"

    rows = [
        ["jobs that succeeded", *(f"{run.over} of {len(run.waits.asked_s)}" for run in runs), *none],
        ["from the first applied to the end of the last, s", *(of_all(run.over_s, run, 0) for run in runs), *none],
        ["Kubernetes Jobs never seen", *(str(each.missing()) for each in [*(run.waits for run in runs), *bare])],
    ]
    rows += [
        [f"to the Kubernetes Job, p{percent}, s"]
        + [waits.percentile(percent) for waits in [*(run.waits for run in runs), *bare]]
        for percent in (50, 90, 99)
    ]
    rows += [
        ["CPU of the operator a job, ms", *(of_all(run.cpu_ms, run, 0) for run in runs), *none],
        ["cores used while jobs come in", *(f"{run.cores:.2f}" for run in runs), *none],
        ["writes a job", *(of_all(sum(run.writes.values()), run, 2) for run in runs), *none],
        *([f"- {name}", *(of_all(run.writes.get(name, 0), run, 2) for run in runs), *none] for name in resources),
        ["lists of events in all", *(str(run.event_lists) for run in runs), *none],
        ["largest resident memory, MiB", *(f"{run.peak_mib:.0f}" for run in runs), *none],
    ]
    return header, rows
