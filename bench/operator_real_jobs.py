"""The operator's memory and its writes to the API server per job, from its own /metrics, while jobs run to their end.

Writes that only move progress are told apart by watching the object: an update that changes nothing but progress,
metrics, checkpoints, usage and the attempt's last step is one. Renewals of the Lease are counted by themselves.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import testbed
from bench import site, tables
from demo import setup
from testbed import binaries

MAX_MEMORY_MIB = 200
MAX_WRITES = 16
_MOVING = ("progress", "metrics", "usage", "checkpoints")


def scrape(cluster: testbed.Cluster) -> dict[str, float]:
    """The operator's samples by name with labels."""
    service = f"/api/v1/namespaces/{setup.SYSTEM_NAMESPACE}/services/{setup.RELEASE}:http/proxy/metrics"
    text = cluster.kubectl("get", "--raw", service)
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def writes(samples: dict[str, float]) -> Counter[str]:
    """Writes so far by resource."""
    found: Counter[str] = Counter()
    for name, value in samples.items():
        if match := re.match(r'finetune_api_writes_total\{resource="([^"]+)"', name):
            found[match[1]] += int(value)
    return found


def progress_only(stream: str) -> int:
    """How many of the watched versions differ from the one before in nothing but progress."""
    decoder, place, count = json.JSONDecoder(), 0, 0
    last: dict[str, Any] | None = None
    while place < len(stream):
        body, place = decoder.raw_decode(stream, place)
        while place < len(stream) and stream[place].isspace():
            place += 1
        rest = {key: value for key, value in body.get("status", {}).items() if key not in _MOVING}
        for attempt in rest.get("attempts", []):
            attempt.pop("lastStep", None)
        count += last is not None and rest == last
        last = rest
    return count


def measure(cluster: testbed.Cluster, name: str, steps: int) -> tuple[Counter[str], int, float]:
    """Run one job: writes by resource, how many of them only moved progress, largest memory in MiB."""
    site.remove(cluster, "ftj", name)
    before = writes(scrape(cluster))
    peak_bytes = 0.0
    kubectl = [binaries.binary("kubectl"), f"--kubeconfig={cluster.kubeconfig}", "get", "ftj", "-n", site.NAMESPACE]
    with tempfile.TemporaryDirectory() as folder:
        seen = Path(folder) / "watch.json"
        with seen.open("w") as output:
            field = f"--field-selector=metadata.name={name}"
            watch = subprocess.Popen([*kubectl, field, "--watch", "-o", "json"], stdout=output)
        try:
            site.apply(cluster, site.job(name, steps))

            def finished() -> bool:
                nonlocal peak_bytes
                peak_bytes = max(peak_bytes, scrape(cluster)["process_resident_memory_bytes"])
                status = json.loads(cluster.kubectl("get", "ftj", name, "-n", site.NAMESPACE, "-o", "json"))
                conditions = status.get("status", {}).get("conditions", [])
                return any(c["type"] == "Finished" and c["status"] == "True" for c in conditions)

            site.until(finished, f"the end of {name}")
        finally:
            watch.terminate()
            watch.wait(timeout=10)
        moved = progress_only(seen.read_text())
    return writes(scrape(cluster)) - before, moved, peak_bytes / 2**20


def table(runs: int, steps: int) -> tuple[str, bool]:
    """Return the table of so many jobs, one after another, and whether anything is over its limit."""
    cluster = site.set_up()
    found = [measure(cluster, f"bench-operator-{run}", steps) for run in range(runs)]
    besides = [sum(counts.values()) - counts["leases"] - moved for counts, moved, _ in found]
    memory = max(peak for _, _, peak in found)
    resources = sorted({resource for counts, _, _ in found for resource in counts})
    rows = [
        ["largest resident memory", f"{memory:.0f} MiB", f"{MAX_MEMORY_MIB} MiB"],
        ["writes besides progress and Lease", tables.spread(besides, 0), str(MAX_WRITES)],
        ["writes of progress alone", tables.spread([moved for _, moved, _ in found], 0), "-"],
        *[
            [f"all writes to {name}", tables.spread([counts[name] for counts, _, _ in found], 0), "-"]
            for name in resources
        ],
    ]
    for name in (f"bench-operator-{run}" for run in range(runs)):
        site.remove(cluster, "ftj", name)
    title = f"{runs} jobs of {steps} steps, one after another; per job, medians (quartiles)."
    body = f"{title}\n\n{tables.table(['', 'measured', 'at most'], rows)}"
    return body, memory > MAX_MEMORY_MIB or max(besides) > MAX_WRITES
