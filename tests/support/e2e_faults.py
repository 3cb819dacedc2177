"""Faults from outside the containers: signals to their processes, and memory that runs out for real. Needs root."""

import os
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from e2e_lab import PATIENCE_S, Submitted, until
from finetune_api.names import Stage
from testbed.images import ctr

_CGROUPS = Path("/sys/fs/cgroup")
_MIB = 2**20


def container_pid(pod: dict[str, Any]) -> int:
    """Host pid of the pod's first container's PID 1."""
    identity = pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")
    for line in ctr("tasks", "ls").stdout.splitlines()[1:]:
        name, pid, _state = line.split()
        if name == identity:
            return int(pid)
    raise AssertionError(f"container {identity} of pod {pod['metadata']['name']} has no process")


def stage_pid(pod: dict[str, Any]) -> int | None:
    """Host pid of the stage's process, the child of the container's PID 1; None while there is none.

    By the pod's cgroup: the kubelet tells of a container up to a second late, and prepare may be over by then."""
    uid = pod["metadata"]["uid"]
    inside = {pid for pid in _pids() if uid in _proc(pid, "cgroup").replace("_", "-")}
    children = {pid: parent for pid in inside if (parent := _parent(pid)) in inside}
    return next((pid for pid, parent in children.items() if parent not in children), None)


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _proc(pid: int, file: str) -> str:
    try:
        return Path(f"/proc/{pid}/{file}").read_text()
    except OSError:  # it has ended
        return ""


def _parent(pid: int) -> int | None:
    fields = _proc(pid, "stat").rpartition(")")[2].split()
    return int(fields[1]) if fields else None


def send(pod: dict[str, Any], number: signal.Signals) -> None:
    """Signal the container's PID 1."""
    os.kill(container_pid(pod), number)


def freeze(pid: int, timeout_s: float = PATIENCE_S) -> None:
    """Stop a process, and wait until it stands still: on a busy machine its threads run on after SIGSTOP was sent."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: is_frozen(pid), f"process {pid} stands still", timeout_s, lambda: _proc(pid, "status"))


def is_frozen(pid: int) -> bool:
    """Return True if every thread of the process is stopped."""
    stats = [_proc(pid, f"task/{thread.name}/stat") for thread in Path(f"/proc/{pid}/task").iterdir()]
    return all(stat.rpartition(")")[2].split()[:1] == ["T"] for stat in stats)


def kill_trainer(pod: dict[str, Any]) -> None:
    """SIGKILL the stage's process; its supervisor lives and can tell."""
    os.kill(until(lambda: stage_pid(pod), "the stage's process runs", PATIENCE_S), signal.SIGKILL)


@contextmanager
def held(job: Submitted, stage: Stage) -> Generator[None]:
    """The stage's process stands still from its start on, so that it cannot end before something else has happened."""
    pid = job.until(lambda: next(filter(None, map(stage_pid, job.pods(stage))), None), f"{stage} has a process")
    freeze(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


class Memory:
    """The memory controller of a pod's first container."""

    def __init__(self, pod: dict[str, Any]) -> None:
        lines = Path(f"/proc/{container_pid(pod)}/cgroup").read_text().splitlines()
        paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
        self._v2 = (_CGROUPS / "cgroup.controllers").exists()
        self.folder = (
            _CGROUPS / paths[""].lstrip("/") if self._v2 else _CGROUPS / "memory" / paths["memory"].lstrip("/")
        )

    def oom_kills(self) -> int | None:
        """Processes killed for memory so far; None once the container is gone."""
        file = self.folder / ("memory.events" if self._v2 else "memory.oom_control")
        try:
            return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith("oom_kill "))
        except OSError:
            return None

    def run_out(self, timeout_s: float = PATIENCE_S) -> None:
        """Lower the limit until the kernel kills for memory.

        v2 kills at once. v1 refuses a limit below what is in use (EBUSY): so it is kept a little above, and the
        program's next larger allocation is the one too many.
        """
        deadline = time.monotonic() + timeout_s
        before = self.oom_kills()
        limit, usage = ("memory.max", "memory.current") if self._v2 else (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
        )  # fmt: skip
        slack = 0
        while self.oom_kills() == before:
            assert time.monotonic() < deadline, f"nothing was killed in {self.folder} within {timeout_s:.0f} s"
            try:
                wanted = 16 * _MIB if self._v2 else int((self.folder / usage).read_text()) - _MIB + slack
                (self.folder / limit).write_text(str(wanted))
                slack = 0
            except FileNotFoundError:
                return
            except OSError:  # EBUSY
                slack = min(slack + _MIB // 4, 2 * _MIB)
            time.sleep(0.02)
