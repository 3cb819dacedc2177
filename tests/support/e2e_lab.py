"""What the node's tests hold in their hands: jobs on the real cluster, watched from outside with deadlines."""

import http.client
import json
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import testbed
from finetune_api import names
from finetune_api.names import Stage
from testbed import pki

T = TypeVar("T")
Body = dict[str, Any]
POLL_S = 0.25
PATIENCE_S = 240.0  # for what takes seconds on an idle machine
_DIRECT = urllib.request.ProxyHandler({})  # pods are on this machine: the environment's proxy must not see them


class Api:
    """GET from the API server as admin: a kubectl process for each look would cost more than the pods."""

    def __init__(self, cluster: testbed.Cluster) -> None:
        self._server = cluster.api_server
        self.ca_file = cluster.instance.dir / "pki/ca.crt"
        self.token = pki.token(cluster.instance.dir, "admin")
        handler = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=str(self.ca_file)))
        self._opener = urllib.request.build_opener(handler, _DIRECT)

    def get(self, path: str, **query: str) -> Body | None:
        """The object; None when there is none."""
        url = f"{self._server}{path}?{urllib.parse.urlencode(query)}"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self.token}"})
        try:
            with self._opener.open(request, timeout=PATIENCE_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def items(self, path: str, **query: str) -> list[Body]:
        return cast(list[Body], (self.get(path, **query) or {}).get("items", []))


def fetch(url: str) -> str | None:
    """Text at an address on this machine; None when nobody answers."""
    try:
        with urllib.request.build_opener(_DIRECT).open(url, timeout=60) as answer:
            return answer.read().decode()
    except (OSError, http.client.HTTPException):
        return None


def until(check: Callable[[], T | None], what: str, timeout_s: float, explain: Callable[[], str] = str) -> T:
    """The first truthy answer of `check`. Fails with `explain()` after the deadline."""
    deadline = time.monotonic() + timeout_s
    while not (found := check()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout_s:.0f} s\n{explain()}")
        time.sleep(POLL_S)
    return found


@dataclass
class Lab:
    """The cluster with the operator installed, and where the tests' model and rows lie."""

    cluster: testbed.Cluster
    s3: Any
    namespace: str
    operator_namespace: str
    api: Api = field(init=False)

    def __post_init__(self) -> None:
        self.api = Api(self.cluster)

    def kubectl(self, *arguments: str, **options: Any) -> str:
        return self.cluster.kubectl("-n", self.namespace, *arguments, **options)

    def submit(self, name: str, **spec: object) -> "Submitted":
        """Create a FineTuneJob from `small_spec` with the given top-level fields in place of its own."""
        body = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": {**self.small_spec(name), **spec},
        }
        self.kubectl("create", "-f", "-", stdin=json.dumps(body))
        return Submitted(self, name)

    def small_spec(self, name: str) -> dict[str, object]:
        """SFT of the tiny model on the CPU: with 20 steps done in seconds once its pods run."""
        return {
            "model": {"uri": "s3://e2e-models/tiny"},
            "method": {"type": "SFT"},
            "peft": {"type": "LoRA", "rank": 4},
            "datasets": [{"uri": "s3://e2e-data/chat/"}],
            "hyperparameters": {"maxSteps": 20, "globalBatchSize": 4, "learningRate": 5e-3},
            "evaluation": {"holdoutFraction": 0.1},
            "checkpoint": {"intervalSeconds": 1},
            "storage": {"endpoint": self.cluster.s3_endpoint_pod, "secretRef": {"name": "s3-credentials"}},
            "output": {"uri": f"s3://e2e-adapters/{name}"},
        }

    def shown(self, name: str) -> list[str]:
        """Return the words that `kubectl get ftj` has for a job."""
        return self.kubectl("get", "ftj", name, "--no-headers").split()

    def secret(self, name: str, access_key: str, secret_key: str) -> Body:
        return {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": self.namespace},
            "stringData": {"AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret_key},
        }

    def read(self, uri: str) -> bytes:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        return self.s3.get_object(Bucket=bucket, Key=key)["Body"].read()

    def keys(self, uri: str) -> list[str]:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [f"s3://{bucket}/{item['Key']}" for page in pages for item in page.get("Contents", [])]

    def operator(self) -> Body:
        """The operator's running pod."""
        pod = self.operator_pod()
        assert pod is not None, "there is no operator"
        return pod

    def operator_pod(self) -> Body | None:
        """The operator's newest pod."""
        selector = "app.kubernetes.io/name=finetune-operator"
        pods = self.api.items(f"/api/v1/namespaces/{self.operator_namespace}/pods", labelSelector=selector)
        return max(pods, key=lambda pod: pod["metadata"]["creationTimestamp"], default=None)


@dataclass(frozen=True)
class Submitted:
    """One FineTuneJob on the cluster."""

    lab: Lab
    name: str

    @property
    def path(self) -> str:
        return f"/apis/finetune.dev/v1alpha1/namespaces/{self.lab.namespace}/finetunejobs/{self.name}"

    def body(self) -> Body:
        return self.lab.api.get(self.path) or {}

    def status(self) -> Body:
        return self.body().get("status") or {}

    def condition(self, kind: str) -> Body:
        return next((c for c in self.status().get("conditions", []) if c["type"] == kind), {})

    def attempts(self, stage: Stage = Stage.TRAIN) -> list[Body]:
        return [entry for entry in self.status().get("attempts", []) if entry["stage"] == stage]

    def jobs(self) -> list[Body]:
        """Its Kubernetes Jobs, oldest first."""
        path = f"/apis/batch/v1/namespaces/{self.lab.namespace}/jobs"
        found = self.lab.api.items(path, labelSelector=f"{names.LABEL_JOB_NAME}={self.name}")
        return sorted(found, key=lambda job: job["metadata"]["creationTimestamp"])

    def pods(self, stage: Stage | None = None) -> list[Body]:
        """Its pods, oldest first."""
        selector = f"{names.LABEL_JOB_NAME}={self.name}" + (f",{names.LABEL_STAGE}={stage}" if stage else "")
        found = self.lab.api.items(f"/api/v1/namespaces/{self.lab.namespace}/pods", labelSelector=selector)
        return sorted(found, key=lambda pod: pod["metadata"]["creationTimestamp"])

    def running_pod(self, stage: Stage) -> Body | None:
        for pod in self.pods(stage):
            states = pod["status"].get("containerStatuses", [])
            if states and "running" in states[0]["state"] and "deletionTimestamp" not in pod["metadata"]:
                return pod
        return None

    def progress(self, stage: Stage = Stage.TRAIN) -> Body:
        """What the stage's pod itself says now; empty while it says nothing."""
        pod = self.running_pod(stage)
        text = fetch(f"http://{pod['status']['podIP']}:{names.HTTP_PORT}/progress") if pod else None
        return json.loads(text) if text else {}

    def events(self) -> list[Body]:
        uid = self.body()["metadata"]["uid"]
        path = f"/api/v1/namespaces/{self.lab.namespace}/events"
        return self.lab.api.items(path, fieldSelector=f"involvedObject.uid={uid}")

    def describe(self) -> str:
        return self.lab.kubectl("describe", "ftj", self.name)

    def patch(self, spec: Mapping[str, object]) -> None:
        self.lab.kubectl("patch", "ftj", self.name, "--type=merge", "-p", json.dumps({"spec": spec}))

    def until(self, check: Callable[[], T | None], what: str, timeout_s: float = PATIENCE_S) -> T:
        """As `until`; a verdict that comes instead fails at once."""

        def checked() -> T | None:
            if found := check():
                return found
            if self.condition("Finished").get("status") == "True":
                if found := check():
                    return found
                raise AssertionError(f"{what}: the job is over instead\n{self.explain()}")
            return None

        return until(checked, what, timeout_s, self.explain)

    def until_running(self, stage: Stage) -> Body:
        return self.until(lambda: self.running_pod(stage), f"the {stage} pod of {self.name} runs")

    def until_training_beyond(self, step: int) -> Body:
        """The pod's progress, once it has trained beyond `step` since it started and a checkpoint is in the bucket."""

        def beyond() -> Body | None:
            said = self.progress()
            saved = (said.get("checkpoint") or {}).get("step", 0)
            mine = saved > (said.get("resumed_from_step") or 0)
            return said if said.get("activity") == "Training" and mine and said["step"] >= max(step, saved) else None

        return self.until(beyond, f"{self.name} trains beyond step {step} and has a checkpoint of this attempt")

    def until_resumed(self, attempt: int) -> Body:
        """Progress of that training attempt, once it trains."""

        def resumed() -> Body | None:
            said = self.progress()
            return said if said.get("attempt") == attempt and said.get("activity") == "Training" else None

        return self.until(resumed, f"attempt {attempt} of {self.name} trains")

    def until_attempt_closed(self, number: int, stage: Stage = Stage.TRAIN) -> Body:
        def closed() -> Body | None:
            for entry in self.attempts(stage):
                if entry["number"] == number and entry["class"] != "Running":
                    return entry
            return None

        return self.until(closed, f"attempt {number} of {stage} of {self.name} is closed")

    def until_finished(self, timeout_s: float = PATIENCE_S) -> Body:
        """The status with the verdict."""

        def finished() -> Body | None:
            status = self.status()
            done = any(c["type"] == "Finished" and c["status"] == "True" for c in status.get("conditions", []))
            return status if done else None

        return until(finished, f"{self.name} is finished", timeout_s, self.explain)

    def until_succeeded(self, timeout_s: float = PATIENCE_S) -> Body:
        status = self.until_finished(timeout_s)
        assert status["phase"] == "Succeeded", self.explain()
        return status

    def delete(self) -> None:
        self.lab.kubectl("delete", "ftj", self.name, "--wait=false", "--ignore-not-found")

    def run_uri(self) -> str:
        uid = self.body()["metadata"]["uid"]
        return f"{self.body()['spec']['output']['uri']}/{names.run_name(self.name, uid)}"

    def metrics_rows(self) -> list[Body]:
        return [json.loads(line) for line in self.lab.read(f"{self.run_uri()}/.job/metrics.jsonl").splitlines()]

    def figures(self) -> list[Body]:
        """Rows of metrics.jsonl without the times."""
        rows = [{key: value for key, value in row.items() if key != "seconds"} for row in self.metrics_rows()]
        return sorted(rows, key=lambda row: (row["step"], "eval_loss" in row))

    def fetch_adapter(self, folder: Path) -> Path:
        """Write the files of the committed adapter into a new folder."""
        folder.mkdir()
        for uri in self.lab.keys(self.status()["artifacts"][0]["uri"]):
            (folder / uri.rpartition("/")[2]).write_bytes(self.lab.read(uri))
        return folder

    def adapter_sha256(self) -> str:
        """Of the committed weights, as the manifest vouches for them."""
        manifest = json.loads(self.lab.read(self.status()["artifacts"][0]["manifestUri"]))
        return next(file["sha256"] for file in manifest["files"] if file["path"] == "adapter_model.safetensors")

    def explain(self) -> str:
        """Everything somebody needs to see why this job is where it is."""
        parts = [f"--- status of {self.name}\n{json.dumps(self.status(), indent=1)[:6000]}"]
        for pod in self.pods():
            name = pod["metadata"]["name"]
            states = [c["state"] for c in pod["status"].get("containerStatuses", [])]
            log = self.lab.kubectl("logs", name, "--tail=15", check=False)
            parts.append(f"--- pod {name} {pod['status']['phase']} {json.dumps(states)[:1500]}\n{log[-3000:]}")
        options = ("-n", self.lab.operator_namespace, "logs", "deploy/finetune-operator", "--tail=25")
        parts.append(f"--- operator\n{self.lab.cluster.kubectl(*options, check=False)[-5000:]}")
        return "\n".join(parts)


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path
