"""The faults that the node's tests inject have happened when the injector returns."""

import subprocess
import sys
from collections.abc import Generator

import pytest

from e2e_faults import freeze, is_frozen
from waiting import PATIENCE_S

BUSY = """
import threading
def work():
    while True:
        sum(range(1000))
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
print("ready", flush=True)
"""


@pytest.fixture
def busy() -> Generator[int]:
    """Pid of a process with eight busy threads."""
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        if process.stdout is not None:
            process.stdout.close()


def test_a_frozen_process_stands_still_with_all_its_threads(busy: int) -> None:
    assert not is_frozen(busy)
    freeze(busy)
    assert is_frozen(busy)
