"""Running, recording and ending processes, so that nothing is ever lost and nothing foreign is ever killed.

A daemon's pid is written by the very process that then becomes the daemon (`sh` records itself and execs), so there is
no moment at which it runs unrecorded. A record holds pid *and* start time: a pid that the kernel gave to somebody else
does not match. As a second net, every process carries `MARK_ENV` in its environment; shims inherit it from containerd.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from testbed.instance import MARK_ENV, Instance, TestbedError

# Field 22 of /proc/PID/stat is the start time; `sh` has no space in its name, so plain field counting is right here.
_RECORD_THEN_EXEC = 'echo "$$ $(cut -d" " -f22 /proc/$$/stat)" > "$0.new" && mv "$0.new" "$0" && exec "$@"'


def run(
    argv: list[str],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    check: bool = True,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run to the end; stdout and stderr captured. Raises TestbedError with the last lines on failure or timeout."""
    try:
        done = subprocess.run(
            argv,
            timeout=timeout_s,
            env=None if env is None else dict(env),
            input=stdin,
            capture_output=True,
            text=True,
            cwd=cwd,
        )
    except subprocess.TimeoutExpired as error:
        raise TestbedError(f"`{' '.join(argv)}` did not end within {timeout_s:.0f} s") from error
    except FileNotFoundError as error:
        raise TestbedError(f"{argv[0]} is not installed") from error
    if check and done.returncode != 0:
        raise TestbedError(
            f"`{' '.join(argv)}` ended with {done.returncode}:\n{last_lines(done.stderr or done.stdout)}"
        )
    return done


def last_lines(text: str, count: int = 20) -> str:
    return "\n".join(f"  | {line[:400]}" for line in text.splitlines()[-count:])


def spawn(instance: Instance, component: str, argv: list[str], path: str) -> None:
    """Start a daemon in its own session with output to its log; its pid is on disk before its program runs."""
    pid_file, log_file = instance.pid_file(component), instance.log_file(component)
    pid_file.parent.mkdir(parents=True, exist_ok=True)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    env = {"PATH": path, "HOME": str(instance.dir), MARK_ENV: str(instance.dir)}
    with log_file.open("ab") as log:
        subprocess.Popen(
            ["/bin/sh", "-c", _RECORD_THEN_EXEC, str(pid_file), *argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
            start_new_session=True,
            cwd="/",
        )


def start_time(pid: int) -> str | None:
    """The kernel's start time of a live process; None when it is gone or a zombie (somebody else's to reap)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def recorded_pid(pid_file: Path) -> int | None:
    """The pid in the record if that very process still lives."""
    try:
        pid, started = pid_file.read_text().split()
    except (OSError, ValueError):
        return None
    return int(pid) if start_time(int(pid)) == started else None


def marked_pids(mark: Path) -> list[int]:
    """All live processes started for this instance directory, whether recorded or not."""
    needle = f"{MARK_ENV}={mark}".encode()
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if needle in environment.split(b"\0") and start_time(int(entry.name)) is not None:
            found.append(int(entry.name))
    return found


def end(pids: Iterable[int], *, grace_s: float, force_s: float = 10) -> None:
    """SIGTERM, wait `grace_s`, SIGKILL, wait `force_s`. Raises TestbedError when one survives that."""
    left = {pid: started for pid in pids if (started := start_time(pid)) is not None}
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, force_s)):
        if number == signal.SIGTERM and grace_s <= 0:
            continue
        for pid, started in left.items():
            if start_time(pid) == started:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
        deadline = time.monotonic() + wait_s
        while left and time.monotonic() < deadline:
            _reap_own_children(left)
            left = {pid: started for pid, started in left.items() if start_time(pid) == started}
            if left:
                time.sleep(0.02)
    if left:
        raise TestbedError(f"processes {sorted(left)} did not end after SIGKILL; look at /proc/PID/stack")


def _reap_own_children(pids: Iterable[int]) -> None:
    """Daemons that this very process started are its children; unreaped they would stay zombies (in pytest)."""
    for pid in pids:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            continue


def wait_until(
    instance: Instance,
    component: str,
    check: Callable[[], bool],
    *,
    timeout_s: float,
    what: str,
) -> None:
    """Poll `check` until true. Fails early when the component died; the error names its log and shows the end of it."""
    deadline = time.monotonic() + timeout_s
    log_file = instance.log_file(component)
    dead_polls = 0
    while not check():
        dead_polls = dead_polls + 1 if recorded_pid(instance.pid_file(component)) is None else 0
        problem = ""
        if dead_polls > 20:  # one second: the shell that records itself needs a moment after fork
            problem = f"{component} died while waiting for: {what}"
        elif time.monotonic() > deadline:
            problem = f"{what}: not within {timeout_s:.0f} s"
        if problem:
            text = log_file.read_text(errors="replace") if log_file.exists() else ""
            raise TestbedError(f"{problem}. Log: {log_file}\n{last_lines(text)}")
        time.sleep(0.05)
