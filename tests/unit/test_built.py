"""Tests that need the test cluster say at once what to type where its programs are not built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("test", ["test_crd.py", "test_store_s3.py", "test_crd_by_chart.py"])
def test_a_control_plane_test_names_make_testbed_and_builds_nothing(tmp_path: Path, test: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/control_plane/{test}"]
    # Without Go, so that a test that builds all the same is seen to and cannot take minutes.
    env = os.environ | {"FINETUNE_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin", "FINETUNE_TESTBED_INSTANCE": "none"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "run: make testbed" in done.stdout
    assert not (tmp_path / "tools").exists()
