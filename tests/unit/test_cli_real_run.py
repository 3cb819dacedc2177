"""`make try` on a real model with the real stages, stopped in the middle; `finetune run` of its job goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo import local
from signals import disposition

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(1500)]

DEADLINE_S = 600


def start(log: Path, *command: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as output, disposition(signal.SIGINT, signal.default_int_handler):
        return subprocess.Popen(
            command,
            cwd=local.CHECKOUT,
            stdout=output,
            stderr=output,
            env=os.environ | {"COLUMNS": "200"},
            start_new_session=True,
        )


def test_a_job_that_was_stopped_goes_on_and_ends_with_an_adapter(tmp_path: Path):
    folder = tmp_path / "try"
    job = local.set_up(folder)
    job.write_text(job.read_text().replace("maxSteps: 20", "maxSteps: 6"))
    log = tmp_path / "first.log"
    first = start(log, sys.executable, "-m", "demo.local", "--folder", str(folder))
    try:
        deadline = time.monotonic() + DEADLINE_S
        while "Training: training" not in log.read_text() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        first.send_signal(signal.SIGINT)
        assert first.wait(DEADLINE_S) == 130, log.read_text()
    finally:
        first.kill()
    assert "the same command goes on" in log.read_text()
    log = tmp_path / "second.log"
    second = start(log, str(Path(sys.executable).with_name("finetune")), "run", str(job))
    try:
        assert second.wait(DEADLINE_S) == 0, log.read_text()
    finally:
        second.kill()
    said = log.read_text()
    assert "Training (attempt 2)" in said
    (adapter,) = (folder / "adapters").glob("local-*/adapter")
    assert f"file://{adapter}" in said
    assert (adapter / "adapter_model.safetensors").stat().st_size > 0
