"""Many finished jobs that are kept: what they cost an operator at its start, in memory, in metrics and at rest.

Memory, metrics and CPU at rest are taken once the operator counts all of them and is quiet, not before.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

import testbed
from bench.acted_kubelet import ARTIFACT, DATA, PLAN, RESOLVED
from bench.api_server import ApiServer, Body
from bench.operator_process import OperatorProcess, Release, install_crd
from bench.operator_thousand import FINETUNEJOBS, finetunejob
from bench.operator_waits import tell
from finetune_api import names
from finetune_api.status import Phase

WORKERS = 8
READY_S = 120.0
SETTLED_S = 420.0  # for its lists and what the start leaves in the queue
SETTLED_CORES = 0.1
QUIET_S = 15  # longer than Kopf waits for an answer of 74 MB, with which the work of an earlier release begins
ASKED_EVERY_S = 2.0
IDLE_S = 60.0
TIME = "2026-01-01T00:00:00Z"


@dataclass(frozen=True)
class FinishedRun:
    """What one operator needed for the finished jobs."""

    release: str
    ready_s: float
    known: int | None  # finished jobs that it counts at the end; None: it does not say
    known_s: float | None  # from its start until it counts all of them; None: not within SETTLED_S
    settled_s: float | None  # from its start until it is quiet besides; None: not within SETTLED_S
    gets: int  # of single FineTuneJobs until then
    lists: int  # pages of lists of FineTuneJobs until then
    start_mib: float
    metrics_mib: float
    metrics_s: float
    idle_percent: float
    peak_mib: float


def fill(cluster: testbed.Cluster, release: Release, namespaces: list[str], count: int) -> None:
    """Create so many finished jobs, each by one write, in turns in each namespace.

    While the CRD has no subresource, the status comes with the object."""
    crd: Body = yaml.safe_load((release.root / "crds/finetunejobs.yaml").read_text())
    for version in crd["spec"]["versions"]:
        version.pop("subresources", None)
    install_crd(cluster, yaml.safe_dump(crd))
    for namespace in namespaces:
        cluster.kubectl("create", "namespace", namespace)
    api, status = ApiServer(cluster.kubeconfig), finished_status()

    def create(number: int, name: str) -> Body:
        namespace = namespaces[number % len(namespaces)]
        path = f"{FINETUNEJOBS}/namespaces/{namespace}/{names.PLURAL}"
        return api.send("POST", path, {**finetunejob(namespace, name), "status": status})

    # Until every part of the server has taken the CRD that keeps what is created.
    while not create(0, name := f"first-{time.time_ns()}").get("status"):
        path = f"{FINETUNEJOBS}/namespaces/{namespaces[0]}/{names.PLURAL}"
        api.send("DELETE", f"{path}/{name}")
        time.sleep(1)
    with ThreadPoolExecutor(WORKERS) as pool:
        for done in [pool.submit(create, number, f"job-{number}") for number in range(1, count)]:
            done.result()
    tell(f"{count} finished jobs are created in {len(namespaces)} namespaces")


def measure(cluster: testbed.Cluster, release: Release, namespaces: list[str], count: int, folder: Path) -> FinishedRun:
    """Start an operator on what is there, let it come to rest, and watch it for a while."""
    release.install_crd(cluster)
    api = ApiServer(cluster.kubeconfig)
    before, begun_s = api.requests(), time.monotonic()
    with OperatorProcess(release, cluster.kubeconfig, namespaces, folder) as operator:
        ready_s = operator.wait_until_ready(READY_S)
        tell(f"{release.name}: ready after {ready_s:.1f} s")
        deadline_s = begun_s + SETTLED_S
        known = _wait_until_known(operator, count, deadline_s)
        known_s = time.monotonic() - begun_s
        tell(f"{release.name}: {known} of {count} finished jobs are known after {known_s:.0f} s")
        is_settled = known == count and _settle(operator, deadline_s)
        settled_s, start_mib = time.monotonic() - begun_s, operator.memory_mib()
        tell(f"{release.name}: {'quiet' if is_settled else 'not quiet'} after {settled_s:.0f} s")
        asked = api.requests() - before
        asked_s = time.monotonic()
        size = len(operator.get("/metrics"))
        metrics_s = time.monotonic() - asked_s
        cpu_s, idle_s = operator.cpu_s(), time.monotonic()
        time.sleep(IDLE_S)
        idle = (operator.cpu_s() - cpu_s) / (time.monotonic() - idle_s)
        return FinishedRun(
            release=release.name,
            ready_s=ready_s,
            known=known,
            known_s=known_s if known == count else None,
            settled_s=settled_s if is_settled else None,
            gets=asked["GET", names.PLURAL],
            lists=asked["LIST", names.PLURAL],
            start_mib=start_mib,
            metrics_mib=size / 2**20,
            metrics_s=metrics_s,
            idle_percent=100 * idle,
            peak_mib=operator.memory_mib("VmHWM"),
        )


def _wait_until_known(operator: OperatorProcess, count: int, deadline_s: float) -> int | None:
    """Wait until the operator counts all finished jobs; how many it counts then, or when that takes too long.

    Metrics may take seconds to be asked for: most of the time the operator is left alone."""
    while True:
        asked_s = time.monotonic()
        known = operator.jobs_in(Phase.SUCCEEDED)
        now_s = time.monotonic()
        if known == count or now_s > deadline_s:
            return known
        time.sleep(max(ASKED_EVERY_S, 4 * (now_s - asked_s)))


def _settle(operator: OperatorProcess, deadline_s: float) -> bool:
    """Wait until the operator does almost nothing for QUIET_S on end; False when that takes too long."""
    quiet = 0
    while quiet < QUIET_S:
        if time.monotonic() > deadline_s:
            return False
        cpu_s, begun_s = operator.cpu_s(), time.monotonic()
        time.sleep(1)
        cores = (operator.cpu_s() - cpu_s) / (time.monotonic() - begun_s)
        quiet = quiet + 1 if cores < SETTLED_CORES else 0
    return True


def finished_status() -> Body:
    """Return the status of a job that succeeded, with as much in it as a real one has."""
    conditions = [
        ("Planned", "True", "Prepared", "10000 rows: 9000 to train on, 400 held out, 600 dropped; 100 steps"),
        ("Admitted", "True", "Training", ""),
        ("Running", "False", "Succeeded", ""),
        ("Suspended", "False", "Accepted", ""),
        ("Degraded", "False", "Healthy", ""),
        *((kind, "True", "Succeeded", f"the adapter is committed at {ARTIFACT['uri']}")
          for kind in ("Succeeded", "Finished", "Ready")),
        ("Stalled", "False", "Healthy", ""),
    ]  # fmt: skip
    attempt = {"number": 1, "class": "Succeeded", "reason": "Committed", "exitCode": 0}
    times = {"startedAt": TIME, "finishedAt": TIME}
    return {
        "observedGeneration": 1,
        "phase": "Succeeded",
        "conditions": [
            {"type": kind, "status": status, "reason": reason, "message": words, "lastTransitionTime": TIME,
             "observedGeneration": 1}
            for kind, status, reason, words in conditions
        ],
        "plan": {**PLAN, "resolved": [{**each, "reason": 2 * each["reason"][:80]} for each in (RESOLVED * 2)[:20]]},
        "data": DATA,
        "progress": {"step": 100, "totalSteps": 100, "percentage": 100, "text": "100/100", "lastUpdatedTime": TIME},
        "metrics": {"trainLoss": 1.2, "evalLoss": 1.4, "baseEvalLoss": 2.5, "learningRate": 1e-4, "loss": "1.200",
                    "tokensPerSecond": 9000.0},
        "checkpoints": [{"step": 100, "uri": "s3://bench/out/job-1a2b3/.job/checkpoints/1", "digest": PLAN["digest"]}],
        "attempts": [{**attempt, **times, "stage": "prepare"}, {**attempt, **times, "stage": "train", "lastStep": 100}],
        "artifacts": [ARTIFACT],
        "usage": {"seconds": 3600, "gpuSeconds": 3000},
        "record": {"acceptedAt": TIME},
    }  # fmt: skip


def table_rows(runs: list[FinishedRun]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows, a column for each operator."""

    def row(name: str, shown: list[str]) -> list[str]:
        return [name, *shown]

    def in_time(moment_s: float | None) -> str:
        return f"{moment_s:.0f}" if moment_s is not None else f"more than {SETTLED_S:.0f}"

    return ["", *(run.release for run in runs)], [
        row("ready after, s", [f"{run.ready_s:.1f}" for run in runs]),
        row("knows all finished jobs after, s", [in_time(run.known_s) for run in runs]),
        row("and is quiet after, s", [in_time(run.settled_s) for run in runs]),
        row("finished jobs in its own gauge then", [str(run.known) if run.known is not None else "-" for run in runs]),
        row("GETs of FineTuneJobs until then", [str(run.gets) for run in runs]),
        row("pages of lists of FineTuneJobs until then", [str(run.lists) for run in runs]),
        row("resident memory then, MiB", [f"{run.start_mib:.0f}" for run in runs]),
        row("/metrics, MiB", [f"{run.metrics_mib:.2f}" for run in runs]),
        row("/metrics, s", [f"{run.metrics_s:.2f}" for run in runs]),
        row(f"CPU at rest, over {IDLE_S:.0f} s, % of a core", [f"{run.idle_percent:.1f}" for run in runs]),
        row("largest resident memory, MiB", [f"{run.peak_mib:.0f}" for run in runs]),
    ]
