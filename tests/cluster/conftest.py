"""Fixtures of the node's tests. A node that runs already is used and left up, its other namespaces untouched."""

import os
from collections.abc import Iterator

import pytest

import testbed
from built import require_testbed
from e2e_lab import PATIENCE_S, Lab, Submitted, until
from e2e_site import LONG_RUN, set_up, take_away


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The node with the operator installed by Helm."""
    if os.geteuid() != 0:
        pytest.skip("a node needs root")
    require_testbed(node=True)
    was_up = testbed.find() is not None
    cluster = testbed.up()
    try:
        yield set_up(cluster, tmp_path_factory.mktemp("helm"))
    finally:
        take_away(cluster)
        if not was_up:
            testbed.down()


@pytest.fixture(scope="session")
def undisturbed(lab: Lab) -> Submitted:
    """The SFT job that nothing happens to: what others are compared with. Submitted, not yet finished."""
    return lab.submit("undisturbed", **LONG_RUN)


@pytest.fixture
def in_training(lab: Lab) -> Submitted:
    """A job in the middle of its training, with a checkpoint. Tests may do with it what they like."""
    job = Submitted(lab, "in-training")
    if not job.progress():
        job.delete()
        until(lambda: not job.body(), "the job of an earlier test is gone", PATIENCE_S)
        lab.submit(job.name, **LONG_RUN)
    job.until_training_beyond(1)
    return job
