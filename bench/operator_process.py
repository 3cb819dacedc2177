"""The operator of any commit as a process of its own, against a control plane without a node."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import testbed
from testbed import binaries, components
from testbed.instance import CHECKOUT, free_ports
from testbed.processes import spawn

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_GAUGE = 'finetune_jobs{phase="%s"} '
_WRITES = re.compile(r'^finetune_api_writes_total\{resource="([^"]+)".*\} ([0-9.e+]+)$', re.MULTILINE)


@dataclass(frozen=True)
class Release:
    """A commit's operator, contract and CRD below `root`."""

    name: str
    root: Path

    def install_crd(self, cluster: testbed.Cluster) -> None:
        install_crd(cluster, (self.root / "crds/finetunejobs.yaml").read_text())


def of_checkout() -> Release:
    return Release("now", CHECKOUT)


def of_commit(commit: str, folder: Path) -> Release:
    """Unpack what the operator of a commit needs; it runs in this Python environment."""
    command = ["git", "archive", commit, "api", "operator", "crds"]
    packed = subprocess.run(command, cwd=CHECKOUT, capture_output=True, check=True, timeout=60).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return Release(commit, folder)


def start_control_plane(name: str) -> testbed.Cluster:
    """A control plane of our own, without a scheduler, whose Job controller may write as fast as it can."""
    testbed.down(name)
    cluster = testbed.up(name, node=False)
    for component in ("kube-scheduler", "kube-controller-manager"):
        cluster.stop_component(component)
    state = cluster.instance.load()
    if state is None:
        raise testbed.TestbedError(f"instance {name!r} is down")
    command = components.control_plane(cluster.instance, state)["kube-controller-manager"]
    command += ["--kube-api-qps=1000", "--kube-api-burst=2000", "--concurrent-job-syncs=10", "--concurrent-gc-syncs=2"]
    spawn(cluster.instance, "kube-controller-manager", command, binaries.search_path())
    return cluster


def install_crd(cluster: testbed.Cluster, text: str) -> None:
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=text)
    cluster.kubectl("wait", "--for=condition=Established", "crd/finetunejobs.finetune.dev", "--timeout=60s")


class OperatorProcess:
    """One operator that watches these namespaces. Use as a context; it is ended by its pid."""

    def __init__(self, release: Release, kubeconfig: Path, namespaces: list[str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        small = {"cpu": 1, "memory": "512Mi", "ephemeralStorage": "1Gi"}
        runtime = {"image": "trainer@sha256:0", "prepare": small, "defaults": {**small, "sharedMemory": "64Mi"}}
        (folder / "runtimes.yaml").write_text(json.dumps({"runtimes": {"default": runtime}}))
        self._port = free_ports("127.0.0.1", ["http"])["http"]
        self._log = folder / "operator.log"
        self._env = {
            **os.environ,
            "PYTHONPATH": f"{release.root / 'api'}:{release.root / 'operator'}",
            "KUBECONFIG": str(kubeconfig),
            "FINETUNE_NAMESPACE": namespaces[0],
            "FINETUNE_WATCH_NAMESPACES": ",".join(namespaces),
            "FINETUNE_IDENTITY": "bench",
            "FINETUNE_RUNTIMES_FILE": str(folder / "runtimes.yaml"),
            "FINETUNE_HTTP_PORT": str(self._port),
            "FINETUNE_LEASE_DURATION_S": "120",  # a benchmark is no test of a busy machine
        }

    def __enter__(self) -> "OperatorProcess":
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "finetune_operator"]
            self.process = subprocess.Popen(command, env=self._env, stdout=log, stderr=log, cwd="/")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)

    def wait_until_ready(self, timeout_s: float) -> float:
        """Return the seconds until it says that it is ready. Raises TestbedError when it ends, or never is."""
        begun_s = time.monotonic()
        while not self._is_ready():
            if self.process.poll() is not None:
                raise testbed.TestbedError(f"the operator ended with {self.process.returncode}; see {self._log}")
            if time.monotonic() - begun_s > timeout_s:
                raise testbed.TestbedError(f"the operator is not ready within {timeout_s:.0f} s; see {self._log}")
            time.sleep(0.1)
        return time.monotonic() - begun_s

    def _is_ready(self) -> bool:
        try:
            return self.get("/readyz", 5.0) == b"ok"
        except urllib.error.HTTPError as error:
            return error.code == 404 and self.get("/healthz", 5.0) == b"ok"  # of releases that have no other
        except OSError:
            return False

    def get(self, path: str, timeout_s: float = 60.0) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=timeout_s) as answer:
            return answer.read()

    def writes(self) -> Counter[str]:
        """Writes to the API server so far, by resource."""
        found: Counter[str] = Counter()
        for name, value in _WRITES.findall(self.get("/metrics").decode()):
            found[name] += int(float(value))
        return found

    def jobs_in(self, phase: str) -> int | None:
        """Return how many jobs it counts in that phase; None while it does not say, or where it has no such gauge."""
        try:
            lines = self.get("/metrics").decode().splitlines()
        except OSError:
            return None
        return next((int(float(line.split()[-1])) for line in lines if line.startswith(_GAUGE % phase)), None)

    def cpu_s(self) -> float:
        """Seconds of CPU so far, in user space and in the kernel."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def memory_mib(self, which: str = "VmRSS") -> float:
        """Resident memory now, or the largest so far (VmHWM)."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(which)).split()[1]) / 1024
