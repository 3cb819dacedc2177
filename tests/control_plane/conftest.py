"""A real API server for the tests here: one of their own, or the running one that FINETUNE_TESTBED_INSTANCE names."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import testbed
from built import require_testbed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def control_plane() -> Iterator[testbed.Cluster]:
    """API server, controllers and S3 with the FineTuneJob CRD installed."""
    require_testbed(node=False)
    shared = os.environ.get("FINETUNE_TESTBED_INSTANCE")
    name = shared or f"pytest-{os.getpid()}"
    cluster = testbed.up(name, node=False)
    try:
        cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds/finetunejobs.yaml"))
        cluster.kubectl(
            "wait", "--for=condition=Established", "crd/finetunejobs.finetune.dev", "--timeout=240s", timeout_s=300
        )
        yield cluster
    finally:
        if not shared:
            testbed.down(name)


@pytest.fixture
def namespace(control_plane: testbed.Cluster, request: pytest.FixtureRequest) -> str:
    """A namespace of the test's own."""
    name = f"t-{os.getpid()}-{abs(hash(request.node.nodeid)) % 10**8}"
    control_plane.kubectl("create", "namespace", name)
    return name
