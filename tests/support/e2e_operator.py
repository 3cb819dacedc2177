"""The operator on the node: kept away, killed, waited for."""

import os
import signal
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

from e2e_faults import container_pid, freeze, send
from e2e_lab import PATIENCE_S, Lab, Submitted, until
from finetune_api.names import LABEL_STAGE, Stage


@contextmanager
def operator_away(lab: Lab) -> Generator[None]:
    """Kill the operator as a lost node would, and let no other come until the block ends.

    A process that is only stopped would not do: the kubelet replaces it when its probe has failed for a minute, and on
    a busy machine a job needs longer than that.
    """
    pid = container_pid(lab.operator())
    freeze(pid)  # so that it cannot end in order, and give back its lease
    try:
        _scale(lab, 0)
        until(lambda: _is_ending(lab.operator_pod()), "the operator's pod is to end", PATIENCE_S)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        until(lambda: lab.operator_pod() is None, "no operator is left", PATIENCE_S)
        yield
    finally:
        _scale(lab, 1)


def _scale(lab: Lab, replicas: int) -> None:
    scale = ("scale", "deployment/finetune-operator", f"--replicas={replicas}")
    lab.cluster.kubectl("-n", lab.operator_namespace, *scale)


def _is_ending(pod: dict[str, Any] | None) -> bool:
    return pod is None or "deletionTimestamp" in pod["metadata"]


def until_operator_ready(lab: Lab, restarts: int = 0) -> None:
    """Wait for an operator whose container was started again at least `restarts` times."""

    def ready() -> bool:
        container = _container(lab.operator_pod() or {})
        return container.get("restartCount", 0) >= restarts and container.get("ready", False)

    until(ready, "the operator is ready", PATIENCE_S)


def kill_operator(lab: Lab) -> None:
    """SIGKILL its container's process, and wait until the kubelet has started the next."""
    before = lab.operator()
    send(before, signal.SIGKILL)
    until_operator_ready(lab, _container(before)["restartCount"] + 1)


def _container(pod: dict[str, Any]) -> dict[str, Any]:
    return next(iter(pod.get("status", {}).get("containerStatuses", [])), {})


def is_complete(job: Submitted, stage: Stage) -> bool:
    """Whether its Kubernetes Job of that stage is complete."""
    jobs = [j for j in job.jobs() if j["metadata"]["labels"][LABEL_STAGE] == stage]
    return any(
        c["type"] == "Complete" and c["status"] == "True" for j in jobs for c in j["status"].get("conditions", [])
    )
