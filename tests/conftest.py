"""What holds for all tests: speed is never asserted, as the machine may have other work, and decides nothing."""

import gc
import sys
from functools import partial

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def fp32_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are compared to the last bits of fp32, also on a CPU that trains faster in bf16."""
    world = sys.modules.get("finetune_trainer.world")  # not imported for tests that need no torch
    if world is not None:
        monkeypatch.setattr(world, "bf16_speedup", lambda: 0.2)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run spends half its time on its 64 tokens of each answer; a test that is about answers takes them all, by a
    fixture of this name that does nothing."""
    train = sys.modules.get("finetune_trainer.train")
    if train is not None:
        monkeypatch.setattr(train, "answers", partial(train.answers, limit=8))


def pytest_collection_finish() -> None:
    """Leave torch and all else that the tests import out of the collections of garbage that every run makes."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


class OneForTheCluster(LoadFileScheduling):
    """Give all tests that need a cluster to one process, in their order, as a machine has one node; others file by file
    to whoever is free."""

    def _split_scope(self, nodeid: str) -> str:
        on_cluster = nodeid.startswith(("tests/control_plane/", "tests/cluster/"))
        return "cluster" if on_cluster else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneForTheCluster:
    """Spread the tests of `pytest -n 2`, which is how `make test` runs them."""
    return OneForTheCluster(config, log)  # without the log of its own it would print a line for each test
