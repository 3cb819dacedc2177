"""PID 1 of the trainer's container: runs the stage as a child and reports how it ended, even when it was killed.

It imports no torch and holds no state, so that what kills the trainer (memory, signals, a crash in native code)
leaves somebody who can tell. With cgroup v2 the kubelet may kill the whole container at once when memory runs out
(memory.oom.group); then nobody is left, and the operator reads OOMKilled from the pod.
"""

from finetune_trainer.stop import hold

if __name__ == "__main__":
    hold()  # before the imports below, which take a while: a stop that comes meanwhile must not be lost

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from pydantic import ValidationError

from finetune_api.errors import StageError
from finetune_api.names import TERMINATION_LOG, Stage
from finetune_api.reasons import Fault, words
from finetune_api.run import MAX_RESULT_BYTES, RunConfig, RunResult
from finetune_trainer import config as run_config
from finetune_trainer import results
from finetune_trainer.stop import SIGNALS, kill_after_s, release

_MAX_REAP_S = 5.0


@dataclass(frozen=True)
class Cgroup:
    """The memory controller's files of this container."""

    events: Path  # has a line "oom_kill N"
    limit: Path  # bytes, or "max"

    def oom_kills(self) -> int:
        """Processes that were killed because the limit was reached; 0 where there is no such count."""
        try:
            lines = self.events.read_text().splitlines()
        except OSError:
            return 0
        counts = [line.split()[1] for line in lines if line.startswith("oom_kill ")]
        return int(counts[0]) if counts else 0

    def limit_gib(self) -> float | None:
        try:
            text = self.limit.read_text().strip()
        except OSError:
            return None
        # cgroup v1 says "no limit" by the largest number of whole pages.
        return round(int(text) / 2**30, 2) if text.isdecimal() and int(text) < 2**60 else None


def own_cgroup(root: Path = Path("/sys/fs/cgroup")) -> Cgroup:
    """This container's controller: v2 where its file exists, else v1."""
    if (root / "memory.events").exists():
        return Cgroup(root / "memory.events", root / "memory.max")
    return Cgroup(root / "memory/memory.oom_control", root / "memory/memory.limit_in_bytes")


class Child:
    """The stage's process, leader of its own session, and the signals sent to it."""

    def __init__(self, command: Sequence[str], kill_after_s: float) -> None:
        self._kill_after_s = kill_after_s
        self._pid: int | None = None
        self.stopping = False
        hold()  # until there is a child to forward to; it inherits that, and releases what waits once it listens
        for number in SIGNALS:
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGALRM, self._on_alarm)
        # As PID 1 we reap every process, so subprocess must not: it would when this object is thrown away.
        self._process = subprocess.Popen(command, start_new_session=True)
        self._pid = self._process.pid
        release()

    def wait(self) -> int:
        """Reap until the child has ended, then end what it left behind; returns its wait status."""
        assert self._pid is not None
        while True:
            pid, status = os.waitpid(-1, 0)
            if pid == self._pid:
                break
        signal.setitimer(signal.ITIMER_REAL, 0)
        pid, self._pid = self._pid, None
        _kill_group(pid)
        _reap(time.monotonic() + _MAX_REAP_S)
        return status

    def _on_stop(self, number: int, _frame: FrameType | None) -> None:
        if not self.stopping:
            signal.setitimer(signal.ITIMER_REAL, self._kill_after_s)
        self.stopping = True
        self._forward(number)

    def _on_alarm(self, _number: int, _frame: FrameType | None) -> None:
        if self._pid is not None:
            _kill_group(self._pid)

    def _forward(self, number: int) -> None:
        # To the stage alone: it decides when its workers end.
        if self._pid is not None:
            try:
                os.kill(self._pid, number)
            except ProcessLookupError:
                return


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def _reap(deadline_s: float) -> None:
    """Collect the processes that the child left; as PID 1 they are ours."""
    while time.monotonic() < deadline_s:
        try:
            pid, _status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            time.sleep(0.01)


def verdict(
    *,
    stage: Stage,
    attempt: int,
    status: int,
    message: bytes | None,
    stopping: bool,
    oom_kills: int,
    limit_gib: float | None,
) -> RunResult:
    """How the attempt ended. Pure.

    status: the child's wait status. message: its result file, None when it wrote none. stopping: whether it was asked
    to stop. oom_kills: how many processes of the container were killed for memory meanwhile. A valid result counts,
    however the process ended after it (native libraries like to crash on exit), except that a bug after an OOM kill
    is the OOM's doing."""
    result = _parsed(message, stage, attempt)
    if result is not None and not (result.fault is Fault.BUG and oom_kills):
        return result
    if oom_kills:
        limit = "that of the machine" if limit_gib is None else f"{limit_gib:g} GiB"
        error = StageError(Fault.HOST_OOM, limit=limit)
    elif os.WIFSIGNALED(status) and stopping and os.WTERMSIG(status) in (*SIGNALS, signal.SIGKILL):
        error = StageError(Fault.STOPPED)  # it has nothing to save, as prepare, or did not manage in time
    elif os.WIFSIGNALED(status):
        error = StageError(Fault.KILLED, signal=signal.Signals(os.WTERMSIG(status)).name)
    else:
        found = "MissingResult" if message is None else "InvalidResult"
        error = StageError(Fault.BUG, exception=found, place=f"exit code {os.WEXITSTATUS(status)}")
    ended = results.failed(stage, attempt, error, None, None)
    if result is None:
        return ended
    return result.model_copy(update={"fault": ended.fault, "args": ended.args, "exit_code": ended.exit_code})


def _parsed(message: bytes | None, stage: Stage, attempt: int) -> RunResult | None:
    if message is None or len(message) > MAX_RESULT_BYTES:
        return None
    try:
        result = RunResult.model_validate_json(message)
    except ValidationError:
        return None
    expected = StageError(result.fault).exit_code
    matches = (result.stage, result.attempt, result.exit_code) == (stage, attempt, expected)
    return result if matches else None


def supervise(arguments: Sequence[str], stage: Stage, attempt: int, config: RunConfig, cgroup: Cgroup) -> RunResult:
    """Run `python -m finetune_trainer ARGUMENTS --result FILE` to its end."""
    Path(config.work_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.work_dir, prefix="result-", ignore_cleanup_errors=True) as folder:
        file = Path(folder, "result.json")
        oom_kills_before = cgroup.oom_kills()
        command = [sys.executable, "-P", "-m", "finetune_trainer", *arguments, "--result", str(file)]
        child = Child(command, kill_after_s(config.grace_period_s))
        status = child.wait()
        return verdict(
            stage=stage,
            attempt=attempt,
            status=status,
            message=file.read_bytes() if file.exists() else None,
            stopping=child.stopping,
            oom_kills=cgroup.oom_kills() - oom_kills_before,
            limit_gib=cgroup.limit_gib(),
        )


def write_termination_log(message: bytes, path: Path) -> None:
    """In place: in a container the file is a mount of its own, which cannot be replaced by renaming."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(message)


def main(argv: Sequence[str] | None = None) -> int:
    """The image's entrypoint; takes the arguments of `python -m finetune_trainer` without --result."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m finetune_trainer.supervisor", description=__doc__)
    parser.add_argument("stage", type=Stage, choices=list(Stage))
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--config-digest")
    known, _the_stage_knows_the_rest = parser.parse_known_args(arguments)
    termination_log = TERMINATION_LOG
    try:
        config = run_config.load(known.config, known.config_digest)
        termination_log = config.termination_log
        result = supervise(arguments, known.stage, known.attempt, config, own_cgroup())
    except StageError as error:
        result = results.failed(known.stage, known.attempt, error, None, None)
    except OSError as error:  # the scratch folder cannot be used
        result = results.failed(known.stage, known.attempt, results.of_unexpected(error), None, None)
    try:
        write_termination_log(result.to_message(), Path(termination_log))
    except OSError as error:
        print(f"{termination_log}: {error.strerror}", file=sys.stderr)  # noqa: T201 (the exit code still tells)
    with suppress(OSError):  # nobody reads the log any more
        _say(result)
    return result.exit_code


def _say(result: RunResult) -> None:
    """The container's last log line."""
    message = words(result.fault, result.args)
    if not sys.stderr.isatty():
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "level": "INFO" if result.exit_code == 0 else "ERROR",
            "stage": result.stage.value,
            "attempt": result.attempt,
            "step": result.step,
            "logger": "finetune_trainer.supervisor",
            "message": message,
        }
        message = json.dumps(line, ensure_ascii=False)
    print(message, file=sys.stderr)  # noqa: T201 (the log's library belongs to the stage)


if __name__ == "__main__":
    sys.exit(main())
