"""A real Prometheus on the host that finds the pods by itself and scrapes them at their own addresses."""

import json
import subprocess
import urllib.parse
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e_lab import Lab, fetch, until, write_json
from testbed.instance import free_ports

PORT_NAME = "__meta_kubernetes_pod_container_port_name"
SCRAPE_LABEL = "__meta_kubernetes_pod_label_e2e_finetune_dev_scrape"


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


def configuration(lab: Lab) -> dict[str, Any]:
    """Scrapes every second each container port called metrics or http of the pods that the tests have labelled."""
    return {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [
            {
                "job_name": "finetune",
                "kubernetes_sd_configs": [
                    {
                        "role": "pod",
                        "api_server": lab.cluster.api_server,
                        "authorization": {"credentials": lab.api.token},
                        "tls_config": {"ca_file": str(lab.api.ca_file)},
                        "namespaces": {"names": [lab.namespace, lab.operator_namespace]},
                    }
                ],
                "relabel_configs": [
                    {"source_labels": [SCRAPE_LABEL], "regex": "true", "action": "keep"},
                    {"source_labels": [PORT_NAME], "regex": "metrics|http", "action": "keep"},
                    {"source_labels": ["__meta_kubernetes_pod_phase"], "regex": "Running", "action": "keep"},
                    {"source_labels": ["__meta_kubernetes_pod_label_finetune_dev_job_name"], "target_label": "ftj"},
                    {"source_labels": ["__meta_kubernetes_pod_label_finetune_dev_stage"], "target_label": "stage"},
                ],
            }
        ],
    }  # fmt: skip


@contextmanager
def running(lab: Lab, folder: Path) -> Generator[Prometheus]:
    """Prometheus with its data in `folder`, ended with the block."""
    config = write_json(folder / "prometheus.json", configuration(lab))  # JSON is YAML
    port = free_ports("127.0.0.1", ["prometheus"])["prometheus"]
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"], stdout=log, stderr=log
        )
    try:
        prometheus = Prometheus(f"http://127.0.0.1:{port}")
        log_text = (folder / "prometheus.log").read_text
        until(lambda: fetch(f"{prometheus.url}/-/ready"), "Prometheus is ready", 30, log_text)
        yield prometheus
    finally:
        process.terminate()
        process.wait(timeout=20)


def lint(metrics: str) -> str:
    """What `promtool check metrics` has against the text; empty when it is clean."""
    done = subprocess.run(["promtool", "check", "metrics"], input=metrics, capture_output=True, text=True, timeout=30)
    return (done.stdout + done.stderr).strip() or ("" if done.returncode == 0 else f"exit code {done.returncode}")
