"""The operator's threads share a bounded number of heaps."""

import subprocess
import sys

import pytest

from finetune_operator.heaps import HEAPS

_COUNT = """
import ctypes, sys, threading
from finetune_operator.heaps import bound_heaps
if sys.argv[1] == "bounded":
    bound_heaps()
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
all_allocate = threading.Barrier(12)
def allocate():
    libc.malloc(100)  # ctypes lets the other threads run meanwhile
    all_allocate.wait(30)
    libc.malloc(100)
threads = [threading.Thread(target=allocate) for _ in range(12)]
for thread in threads: thread.start()
for thread in threads: thread.join(30)
stream = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, stream)
libc.fflush(stream)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc alone is bounded so")
@pytest.mark.parametrize("how", ["bounded", "as it comes"])
def test_many_threads_share_the_heaps_that_the_operator_allows(how: str) -> None:
    said = subprocess.run([sys.executable, "-c", _COUNT, how], capture_output=True, text=True, timeout=60, check=True)
    heaps = said.stdout.count("<heap nr=")
    assert (heaps <= HEAPS) is (how == "bounded"), f"{heaps} heaps"
