"""A kubelet and scheduler that only act: pods of jobs go through their states in the API, and nothing runs.

The Job controller is the real one. Without an address of a pod the operator asks none for progress.
"""

import heapq
import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from bench.api_server import CORE, TIMEOUT_S, ApiServer, Body
from finetune_api import names
from finetune_api.reasons import Fault

DIGEST = "sha256:" + "a" * 64
RESOLVED = [
    {"field": f"hyperparameters.value{number}", "value": "0.0005", "reason": "by the model's family and its width " * 2}
    for number in range(12)
]
PLAN = {
    "uri": "s3://bench/out/job-1a2b3/.job/plan.json", "digest": DIGEST, "steps": 100, "trainTokens": 10_000_000,
    "labelTokens": 5_000_000, "memoryBytes": 2**34, "diskBytes": 2**35, "resolved": RESOLVED,
}  # fmt: skip
DATA = {
    "files": 12, "rowsIn": 10_000, "rowsUsed": 9_000, "rowsHeldOut": 400, "digest": DIGEST,
    "dropped": [{"reason": "TooLong", "rows": 500}, {"reason": "Duplicate", "rows": 100}],
    "reportUri": "s3://bench/out/job-1a2b3/.job/report.json",
}  # fmt: skip
ARTIFACT = {
    "type": "Adapter", "uri": "s3://bench/out/job-1a2b3/adapter", "digest": DIGEST,
    "manifestUri": "s3://bench/out/job-1a2b3/adapter/manifest.json", "rank": 16,
}  # fmt: skip
# Seconds after the one before: a node is found, the container is created, it runs, it ends.
PACE_S = (0.2, 0.3, 1.5, 5.0)
SLOW_S = 40.0  # to pull an image that the node does not have: one pod in ten
WORKERS = 8


class ActedKubelet:
    """Acts for every pod of a job in one namespace, from `start` until `stop`."""

    def __init__(self, api: ApiServer, namespace: str) -> None:
        self._api, self._path = api, f"{CORE}/namespaces/{namespace}/pods"
        self._ended, self._changed = threading.Event(), threading.Condition()
        self._due: list[tuple[float, int, int, Body]] = []  # when, order, step, the pod as it was made
        self._order = itertools.count()
        self.failures: list[str] = []
        self._thread = threading.Thread(target=self._run, name="kubelet", daemon=True)

    def start(self) -> None:
        self._api.follow(self._path, self._born, self._ended)
        self._thread.start()

    def stop(self) -> None:
        """Act no more, and wait for what is being said: the API server is ended after this."""
        self._ended.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(TIMEOUT_S)

    def _born(self, event: str, pod: Body) -> None:
        if event == "ADDED":
            self._plan(0, pod)

    def _plan(self, step: int, pod: Body) -> None:
        is_slow = step == 2 and int(pod["metadata"]["uid"][:2], 16) % 10 == 0
        with self._changed:
            due_s = time.monotonic() + (SLOW_S if is_slow else PACE_S[step])
            heapq.heappush(self._due, (due_s, next(self._order), step, pod))
            self._changed.notify()

    def _run(self) -> None:
        with ThreadPoolExecutor(WORKERS) as pool:
            while not self._ended.is_set():
                with self._changed:
                    wait_s = self._due[0][0] - time.monotonic() if self._due else 1.0
                    if wait_s > 0:
                        self._changed.wait(wait_s)
                        continue
                    _, _, step, pod = heapq.heappop(self._due)
                pool.submit(self._act, step, pod)
            pool.shutdown(cancel_futures=True)

    def _act(self, step: int, pod: Body) -> None:
        path = f"{self._path}/{pod['metadata']['name']}/status"
        try:
            self._api.send("PATCH", path, {"status": status_at(step, pod)})
        except RuntimeError as error:
            if not self._ended.is_set():
                self.failures.append(str(error))
            return
        if step + 1 < len(PACE_S):
            self._plan(step + 1, pod)


def status_at(step: int, pod: Body) -> Body:
    """Return what the scheduler (step 0) or the kubelet says of the pod."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": now}
    if step == 0:
        return {"conditions": [scheduled]}
    states = (
        {"waiting": {"reason": "ContainerCreating"}},
        {"running": {"startedAt": now}},
        {"terminated": {"startedAt": now, "finishedAt": now, "exitCode": 0, "message": message(pod)}},
    )
    container = {
        "name": names.CONTAINER, "image": "x", "imageID": "x", "ready": step == 2, "restartCount": 0,
        "state": states[step - 1],
    }  # fmt: skip
    ready = {"type": "Ready", "status": "True" if step == 2 else "False", "lastTransitionTime": now}
    phase = ("Pending", "Running", "Succeeded")[step - 1]
    return {"phase": phase, "startTime": now, "conditions": [scheduled, ready], "containerStatuses": [container]}


def message(pod: Body) -> str:
    """Return a termination message as the trainer writes it."""
    labels = pod["metadata"]["labels"]
    stage = labels[names.LABEL_STAGE]
    result: Body = {"stage": stage, "attempt": int(labels[names.LABEL_ATTEMPT]), "exit_code": 0}
    if stage == names.Stage.PREPARE:
        return json.dumps({**result, "fault": Fault.PREPARED, "plan": PLAN, "data": DATA})
    figures = {"trainLoss": 1.25, "evalLoss": 1.5, "baseEvalLoss": 2.5, "learningRate": 0.0002, "tokensPerSecond": 9e3}
    return json.dumps({**result, "fault": Fault.COMMITTED, "artifact": ARTIFACT, "step": 100, "metrics": figures})
