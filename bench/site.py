"""The demo's cluster as a place to measure: operator installed, model and rows in the bucket, short jobs."""

import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

import yaml

import testbed
from demo import bucket, setup

NAMESPACE = setup.NAMESPACE
T = TypeVar("T")


def set_up() -> testbed.Cluster:
    cluster = testbed.up()
    for image in (setup.OPERATOR_IMAGE, setup.TRAINER_IMAGE):
        testbed.load_image(image)
    setup.install_operator(cluster)
    bucket.fill(cluster)
    setup.make_secret(cluster)
    return cluster


def job(name: str, steps: int) -> dict[str, Any]:
    """The quickstart, shorter."""
    body = yaml.safe_load(setup.QUICKSTART.read_text())
    body["metadata"] = {"name": name, "namespace": NAMESPACE}
    body["spec"]["hyperparameters"]["maxSteps"] = steps
    # PyYAML reads 1e-3 as a word (YAML 1.1); kubectl does not.
    body["spec"]["hyperparameters"]["learningRate"] = float(body["spec"]["hyperparameters"]["learningRate"])
    body["spec"]["evaluation"] = {"holdoutFraction": 0}
    return body


def apply(cluster: testbed.Cluster, body: dict[str, Any]) -> float:
    """`kubectl apply`; the time right before it."""
    started = time.time()
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(body))
    return started


def remove(cluster: testbed.Cluster, kind: str, name: str) -> None:
    """With the pods of all earlier measurements: one that is ending still holds the core that the next one needs."""
    cluster.kubectl("delete", kind, name, "-n", NAMESPACE, "--ignore-not-found", "--wait=true", timeout_s=200)
    pods = ["get", "pods", "-n", NAMESPACE, "-o", "name", "--field-selector=status.phase!=Succeeded"]
    until(lambda: not cluster.kubectl(*pods).strip(), "the node is free", timeout_s=200)


def until(check: Callable[[], T | None], what: str, timeout_s: float = 1200) -> T:
    """The first answer of `check` that is true. Raises TestbedError at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not (found := check()):
        if time.monotonic() > deadline:
            raise testbed.TestbedError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(0.5)
    return found
