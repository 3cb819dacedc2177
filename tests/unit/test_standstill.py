"""A stage that stands still is ended, one that was paused is not."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from finetune_api.reasons import EXIT_CODES, Reason

STAGE = """
import sys, time
from pathlib import Path
import data_run
from finetune_trainer.standstill import ended_by_standstill
with ended_by_standstill(data_run.context(Path(sys.argv[1]), {}), 1.0):
    print("begins", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def stage(folder: str, seconds: float) -> subprocess.Popen[bytes]:
    path = ":".join(each for each in sys.path if each)
    started = subprocess.Popen(
        [sys.executable, "-P", "-c", STAGE, folder, str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PYTHONPATH": path},
    )
    assert started.stdout is not None
    with started.stdout as stdout:
        assert stdout.readline() == b"begins\n"
    return started


def test_a_stage_that_stands_still_is_ended(tmp_path: Path) -> None:
    assert stage(str(tmp_path), 60).wait(timeout=30) == EXIT_CODES[Reason.NO_PROGRESS]


def test_a_stage_that_was_paused_has_not_stood_still(tmp_path: Path) -> None:
    paused = stage(str(tmp_path), 2.0)
    paused.send_signal(signal.SIGSTOP)
    time.sleep(1.6)
    paused.send_signal(signal.SIGCONT)
    assert paused.wait(timeout=30) == 0
