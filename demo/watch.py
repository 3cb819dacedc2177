"""Follows one FineTuneJob and tells every change once: conditions, plan, data, attempts, steps."""

import json
import time
from collections.abc import Iterator
from typing import Any

import testbed

_POLL_S = 1.0


def follow(cluster: testbed.Cluster, namespace: str, name: str, timeout_s: float) -> bool:
    """Print what changes until the job is finished; whether it succeeded.

    Raises TestbedError at the deadline."""
    started = time.monotonic()
    told: set[str] = set()
    while time.monotonic() - started < timeout_s:
        status = json.loads(cluster.kubectl("get", "ftj", name, "-n", namespace, "-o", "json")).get("status", {})
        for line in news(status):
            if line not in told:
                told.add(line)
                print(f"{time.monotonic() - started:5.0f} s  {line}")
        conditions = {condition["type"]: condition["status"] for condition in status.get("conditions", [])}
        if conditions.get("Finished") == "True":
            return conditions.get("Succeeded") == "True"
        time.sleep(_POLL_S)
    raise testbed.TestbedError(
        f"{name} did not finish within {timeout_s:.0f} s: kubectl describe ftj {name} -n {namespace}"
    )


def news(status: dict[str, Any]) -> Iterator[str]:
    """The status in sentences; a sentence that was told before is no news."""
    if "phase" in status:
        yield f"phase {status['phase']}"
    if data := status.get("data"):
        yield f"data     {data_summary(data)}"
    if plan := status.get("plan"):
        yield (
            f"plan     {plan['steps']} steps, {plan['trainTokens']} tokens ({plan['labelTokens']} learned), "
            f"memory {plan['memoryBytes'] / 2**30:.1f} GiB, disk {plan['diskBytes'] / 2**30:.1f} GiB"
        )
        for value in plan["resolved"]:
            yield f"chosen   {value['field']} = {value['value']}: {value['reason']}"
    for attempt in status.get("attempts", []):
        end = attempt.get("reason") or ""
        yield f"attempt  {attempt['stage']} {attempt['number']}: {attempt['class']} {end}".rstrip()
    if progress := status.get("progress"):
        metrics = status.get("metrics", {})
        figures = [f"step {progress['text']}"]
        if (loss := metrics.get("trainLoss")) is not None:
            figures.append(f"loss {loss:.3f}")
        if (speed := metrics.get("tokensPerSecond")) is not None:
            figures.append(f"{speed:.0f} tokens/s")
        if progress.get("eta") and progress["step"] < progress["totalSteps"]:
            figures.append(f"{progress['eta']} left")
        if progress["step"] > 0:
            yield "training " + ", ".join(figures)
    for checkpoint in status.get("checkpoints", []):
        yield f"saved    checkpoint of step {checkpoint['step']}"


def data_summary(data: dict[str, Any]) -> str:
    """Every row accounted for, in one line."""
    dropped = sum(entry["rows"] for entry in data["dropped"])
    reasons = ", ".join(f"{entry['rows']} {entry['reason']}" for entry in data["dropped"])
    return (
        f"{data['rowsIn']} rows in = {data['rowsUsed']} used + {data['rowsHeldOut']} held out + {dropped} dropped"
        + (f" ({reasons})" if reasons else "")
    )
