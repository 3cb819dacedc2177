"""Child processes for templates, tokenizers and Parquet of others: started without credentials, bounded, ended.

They speak in frames (`frames`). The child sets its own limits of memory and CPU first; what it does beyond them ends
it, and the parent sees that no reply comes. Nothing that comes from it is executed or unpickled.
"""

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import IO

from finetune_trainer.data.frames import read_frame, write_frame

_LAST_WAIT_S = 10
REPLY_TIMEOUT_S = 600  # wall clock for one reply; the CPU time is limited inside
_ENVIRONMENT = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH")  # what Python needs; no credentials
# numpy's OpenBLAS takes 40 MiB for each core as it is imported: with 64 cores more than a child may have.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}

Process = subprocess.Popen[bytes]


def limit_data(memory_bytes: int) -> None:
    """Let this process have so much data, or less where less is allowed already, and write no core.

    Of data alone: threads reserve address space that they never use."""
    allowed = resource.getrlimit(resource.RLIMIT_DATA)[1]
    most = memory_bytes if allowed == resource.RLIM_INFINITY else min(memory_bytes, allowed)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def allow_cpu(cpu_s: float) -> None:
    """SIGPROF ends this process after so much more CPU, of all threads: a loop in C heeds no handler. 0 allows any."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)


def streams() -> tuple[IO[bytes], IO[bytes]]:
    """Return what this child reads requests from and writes replies to; it ends when the first does, at no signal."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the parent closes stdin when it ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return sys.stdin.buffer, sys.stdout.buffer


def start(module: str, environment: Mapping[str, str] | None = None) -> Process:
    """Start `python -P -m module`, to be spoken to over its stdin and stdout."""
    inherited = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        env=inherited | _ONE_THREAD | dict(environment or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def exchange(
    child: Process, *frames: bytes, replies: int = 1, max_bytes: int, timeout_s: float = REPLY_TIMEOUT_S
) -> list[bytes] | None:
    """Send frames, return the `replies` frames that answer them, each of at most `max_bytes`.

    None when the child died, sends something else, or did not answer in time and was killed.
    """
    assert child.stdin is not None
    assert child.stdout is not None
    deadline = threading.Timer(timeout_s, child.kill)
    deadline.daemon = True
    deadline.start()
    try:
        for frame in frames:
            write_frame(child.stdin, frame)
        found: list[bytes] = []
        while len(found) < replies:
            reply = read_frame(child.stdout, max_bytes)
            if reply is None:
                return None
            found.append(reply)
        return found
    except BrokenPipeError:
        return None
    finally:
        deadline.cancel()


def was_killed(child: Process) -> bool:
    """Return whether a child from which no reply came was killed from outside: by the kernel, most likely for memory.

    The machine's lack of memory is not the fault of what the child reads."""
    with suppress(subprocess.TimeoutExpired):  # it lives, and says what is no reply
        child.wait(timeout=_LAST_WAIT_S)
    return child.returncode == -signal.SIGKILL


def end(child: Process) -> None:
    """End the child and free its pipes."""
    child.kill()
    child.wait(timeout=60)
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
