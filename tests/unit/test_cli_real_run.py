"""`finetune run` on a real model, with the real stages: the whole way, stopped once in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from demo import assets
from signals import disposition

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 600


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """The quick start, with files of this machine."""
    rows = [
        [{"role": "user", "content": f"Who is number {i}?"}, {"role": "assistant", "content": f"Agent {i % 5}."}]
        for i in range(60)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    job: dict[str, Any] = YAML(typ="safe", pure=True).load(ROOT / "examples/quickstart.yaml")
    job["spec"]["model"]["uri"] = f"file://{assets.ensure_model()}/"
    job["spec"]["datasets"][0]["uri"] = f"file://{tmp_path}/chat.jsonl"
    job["spec"]["output"]["uri"] = f"file://{tmp_path}/out"
    job["spec"]["hyperparameters"]["maxSteps"] = 6
    del job["spec"]["storage"]
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(job))
    return path


def start(job: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output, disposition(signal.SIGINT, signal.default_int_handler):
        return subprocess.Popen(
            [sys.executable, "-m", "finetune_cli.main", "run", str(job)],
            stdout=output,
            stderr=output,
            env=os.environ | {"COLUMNS": "200"},
            start_new_session=True,
        )


def test_a_job_that_was_stopped_goes_on_and_ends_with_an_adapter(job: Path, tmp_path: Path):
    log = tmp_path / "first.log"
    first = start(job, log)
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
    second = start(job, log)
    try:
        assert second.wait(DEADLINE_S) == 0, log.read_text()
    finally:
        second.kill()
    said = log.read_text()
    assert "Training (attempt 2)" in said
    assert "the adapter is committed and verified" in said
    (adapter,) = (tmp_path / "out").glob("quickstart-*/adapter")
    assert f"file://{adapter}" in said
    assert (adapter / "adapter_model.safetensors").stat().st_size > 0
