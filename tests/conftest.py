"""What holds for all tests: speed is never asserted, as the machine may have other work, and decides nothing."""

import sys

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def fp32_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are compared to the last bits of fp32, also on a CPU that trains faster in bf16."""
    world = sys.modules.get("finetune_trainer.world")  # not imported for tests that need no torch
    if world is not None:
        monkeypatch.setattr(world, "bf16_speedup", lambda: 0.2)
