"""A stage that stands still is ended, one that was paused is not."""

import subprocess
import sys
from pathlib import Path

import pytest

from finetune_api.reasons import EXIT_CODES, Reason
from waiting import PATIENCE_S

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
from finetune_trainer.serve import Reporter
from finetune_trainer.standstill import ended_by_standstill

looks, progress = threading.Semaphore(0), Reporter.progress
def look(reporter):
    looks.release()
    return progress(reporter)
Reporter.progress = look

with ended_by_standstill(data_run.context(Path(sys.argv[1]), {}), float(sys.argv[2])):
    if sys.argv[3] == "while it works":
        pause()
    for _ in range(3):  # one may have begun before the pause
        assert looks.acquire(timeout=100)
    if sys.argv[3] == "never":
        threading.Event().wait(200)
"""


def exit_code(folder: Path, *, limit_s: float, paused: str) -> int:
    path = ":".join(each for each in sys.path if each)
    argv = [sys.executable, "-P", "-c", STAGE, str(folder), str(limit_s), paused]
    done = subprocess.run(argv, env={"PYTHONPATH": path}, stderr=subprocess.DEVNULL, timeout=PATIENCE_S)
    return done.returncode


def test_a_stage_that_stands_still_is_ended(tmp_path: Path) -> None:
    assert exit_code(tmp_path, limit_s=3.0, paused="never") == EXIT_CODES[Reason.NO_PROGRESS]


@pytest.mark.parametrize("paused", ["while it works", "before its watch runs"])
def test_a_stage_that_was_paused_has_not_stood_still(tmp_path: Path, paused: str) -> None:
    assert exit_code(tmp_path, limit_s=500.0, paused=paused) == 0
