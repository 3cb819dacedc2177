"""The CRD in a real API server: printer columns, status subresource, size of the status."""

import json
from typing import Any

import pytest

import spec_cases
import testbed

pytestmark = pytest.mark.control_plane

COLUMNS = ["NAME", "METHOD", "MODEL", "PHASE", "REASON", "PROGRESS", "ETA", "LOSS", "ATTEMPT", "AGE"]
STATUS: dict[str, Any] = {
    "observedGeneration": 1,
    "phase": "Training",
    "conditions": [
        {
            "type": kind,
            "status": "Unknown",
            "reason": reason,
            "message": "step 310 of 900",
            "lastTransitionTime": "2026-08-01T10:00:00Z",
            "observedGeneration": 1,
        }
        for kind, reason in (("Running", "Training"), ("Succeeded", "Training"))
    ],
    "progress": {
        "step": 310,
        "totalSteps": 900,
        "percentage": 34,
        "text": "310/900",
        "eta": "26m",
        "stale": False,
        "figures": [{"name": "reward_accuracy", "value": 0.875}, {"name": "reward_margin", "value": -0.0312}],
        "lastUpdatedTime": "2026-08-01T10:00:00Z",
    },
    "metrics": {"trainLoss": 1.83, "loss": "1.830"},
    "attempts": [
        {"number": 1, "stage": "train", "class": "Disruption", "reason": "Disrupted", "exitCode": 30},
        {"number": 2, "stage": "train", "class": "Running"},
    ],
}


def test_kubectl_get_shows_where_the_job_is(control_plane: testbed.Cluster, namespace: str):
    body = spec_cases.base()
    body["spec"]["resources"] = {"gpusPerNode": 1}
    control_plane.kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(body))
    table = control_plane.kubectl("get", "ftj", "-n", namespace)
    assert table.split("\n")[0].split() == COLUMNS
    patch = json.dumps({"status": STATUS})
    control_plane.kubectl("patch", "ftj", "bot", "-n", namespace, "--subresource=status", "--type=merge", "-p", patch)
    heading, row = control_plane.kubectl("get", "ftj", "-n", namespace, "-o", "wide").strip().split("\n")
    assert heading.split() == [*COLUMNS, "GPUS", "ACCURACY", "MARGIN", "ARTIFACT"]
    shown = row.split()
    assert shown[:5] == ["bot", "SFT", body["spec"]["model"]["uri"], "Training", "Training"]
    assert shown[5:9] == ["310/900", "26m", "1.830", "2"]
    assert shown[10:] == ["1", "0.875", "-0.0312"]
    assert "finetunejob.finetune.dev/bot" in control_plane.kubectl("get", "finetune", "-n", namespace, "-o", "name")


def test_the_status_is_written_only_through_its_subresource(control_plane: testbed.Cluster, namespace: str):
    body = spec_cases.base() | {"status": STATUS}
    created = control_plane.kubectl("create", "-n", namespace, "-o", "json", "-f", "-", stdin=json.dumps(body))
    assert "status" not in json.loads(created)


def test_conditions_are_merged_by_type(control_plane: testbed.Cluster, namespace: str):
    control_plane.kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(spec_cases.base()))
    twice = STATUS | {"conditions": [STATUS["conditions"][0], STATUS["conditions"][0]]}
    with pytest.raises(testbed.TestbedError, match="Duplicate value"):
        control_plane.kubectl(
            *("patch", "ftj", "bot", "-n", namespace, "--subresource=status", "--type=merge"),
            *("-p", json.dumps({"status": twice})),
        )
