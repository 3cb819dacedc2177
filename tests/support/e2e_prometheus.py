"""A real Prometheus on the host that scrapes the pods at their own addresses."""

import json
import subprocess
import urllib.parse
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e_lab import PATIENCE_S, Lab, fetch, until, write_json
from finetune_api.names import LABEL_JOB_NAME, LABEL_STAGE
from testbed.instance import free_ports

PORT_NAMES = ("metrics", "http")
SCRAPE_LABEL = "e2e.finetune.dev/scrape=true"


@dataclass(frozen=True)
class Prometheus:
    """Its HTTP API."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Series of an instant query, each with `metric` and `value`."""
        text = fetch(f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}")
        return json.loads(text)["data"]["result"] if text else []

    def value(self, expression: str) -> float | None:
        """The value of the only series, None when there is none."""
        found = self.query(expression)
        assert len(found) <= 1, f"{expression} has {len(found)} series: {found}"
        return float(found[0]["value"][1]) if found else None


def targets(lab: Lab) -> list[dict[str, Any]]:
    """Each container port called metrics or http of the running pods that the tests have labelled, as `file_sd` wants
    it. Debian's Prometheus is built without discovery by Kubernetes; these are the same labels and ports."""
    found: list[dict[str, Any]] = []
    for namespace in (lab.namespace, lab.operator_namespace):
        for pod in lab.api.items(f"/api/v1/namespaces/{namespace}/pods", labelSelector=SCRAPE_LABEL):
            labels = {"ftj": pod["metadata"]["labels"].get(LABEL_JOB_NAME, "")}
            labels["stage"] = pod["metadata"]["labels"].get(LABEL_STAGE, "")
            ports = [p for c in pod["spec"]["containers"] for p in c.get("ports", []) if p["name"] in PORT_NAMES]
            if pod["status"]["phase"] == "Running":
                addresses = [f"{pod['status']['podIP']}:{port['containerPort']}" for port in ports]
                found.append({"targets": addresses, "labels": labels})
    return found


@contextmanager
def running(lab: Lab, folder: Path) -> Generator[Prometheus]:
    """Prometheus with its data in `folder`, ended with the block."""
    discovery = [{"files": [str(write_json(folder / "targets.json", targets(lab)))]}]
    scrape = {"job_name": "finetune", "scrape_interval": "1s", "file_sd_configs": discovery}
    config = write_json(folder / "prometheus.json", {"scrape_configs": [scrape]})  # JSON is YAML
    port = free_ports("127.0.0.1", ["prometheus"])["prometheus"]
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"], stdout=log, stderr=log
        )
    try:
        prometheus = Prometheus(f"http://127.0.0.1:{port}")
        log_text = (folder / "prometheus.log").read_text
        until(lambda: fetch(f"{prometheus.url}/-/ready"), "Prometheus is ready", PATIENCE_S, log_text)
        yield prometheus
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE_S)


def lint(metrics: str) -> str:
    """What `promtool check metrics` has against the text; empty when it is clean."""
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=metrics, capture_output=True, text=True, timeout=PATIENCE_S
    )
    return (done.stdout + done.stderr).strip() or ("" if done.returncode == 0 else f"exit code {done.returncode}")
