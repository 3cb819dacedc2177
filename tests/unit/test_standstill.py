"""A stage that stands still is ended, one that was paused is not."""

import subprocess
import sys
from pathlib import Path

import pytest

from finetune_api.reasons import EXIT_CODES, Reason

# A pause, seen from within: the clock leaps, and nothing ran meanwhile.
STAGE = """
import sys, threading, time
from pathlib import Path

clock, leapt_s = time.monotonic, 0.0
time.monotonic = lambda: clock() + leapt_s

def pause():
    global leapt_s
    leapt_s += 1000.0

run = threading.Thread.run
def run_late(thread):
    if thread.name == "standstill" and sys.argv[3] == "before its watch runs":
        pause()
    run(thread)
threading.Thread.run = run_late

import data_run
from finetune_trainer.standstill import ended_by_standstill
with ended_by_standstill(data_run.context(Path(sys.argv[1]), {}), 3.0):
    if sys.argv[3] == "while it works":
        pause()
    time.sleep(float(sys.argv[2]))
"""


def exit_code(folder: Path, *, works_s: float, paused: str) -> int:
    path = ":".join(each for each in sys.path if each)
    argv = [sys.executable, "-P", "-c", STAGE, str(folder), str(works_s), paused]
    return subprocess.run(argv, env={"PYTHONPATH": path}, stderr=subprocess.DEVNULL, timeout=120).returncode


def test_a_stage_that_stands_still_is_ended(tmp_path: Path) -> None:
    assert exit_code(tmp_path, works_s=100, paused="never") == EXIT_CODES[Reason.NO_PROGRESS]


@pytest.mark.parametrize("paused", ["while it works", "before its watch runs"])
def test_a_stage_that_was_paused_has_not_stood_still(tmp_path: Path, paused: str) -> None:
    assert exit_code(tmp_path, works_s=1.0, paused=paused) == 0
