"""Runs one stage as the image's entrypoint would, watches it, and hands on the wish to stop."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from pydantic import ValidationError

from finetune_api.errors import StageError
from finetune_api.names import PORT_FILE, Stage
from finetune_api.reasons import Fault
from finetune_api.run import MAX_PROGRESS_BYTES, MAX_RESULT_BYTES, Progress, RunConfig, RunResult

POLL_S = 0.5
_REQUEST_TIMEOUT_S = 2.0
_AFTER_GRACE_S = 15.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # HTTP_PROXY is for the world outside


@dataclass(frozen=True)
class StageRun:
    """One attempt of one stage."""

    config: RunConfig
    config_file: Path
    stage: Stage
    attempt: int
    plan_digest: str | None
    log_file: Path
    lock_fd: int

    def command(self) -> list[str]:
        digest = ["--plan-digest", self.plan_digest] if self.plan_digest and self.stage is Stage.TRAIN else []
        return [
            # -P: without it files of the current folder would be imported in the place of packages.
            *(sys.executable, "-P", "-m", "finetune_trainer.supervisor", self.stage.value),
            *("--config", str(self.config_file), "--attempt", str(self.attempt), *digest),
        ]


class Stop:
    """Hear a request to stop: the first Ctrl-C or SIGTERM lets the stage checkpoint and end, the second ends it.

    What is ignored at the start stays ignored: `nohup` ignores SIGHUP, and a shell ignores SIGINT for what it starts
    with `&`, as the terminal's Ctrl-C is then meant for another program. SIGTERM alone is always heard, so that
    something is left that stops with a checkpoint.
    """

    def __init__(self, on_stop: Callable[[int], None]) -> None:
        self.times = 0
        self._on_stop = on_stop
        self._child: subprocess.Popen[bytes] | None = None
        self._since_s = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    @property
    def requested(self) -> bool:
        return self.times > 0

    @property
    def hears_ctrl_c(self) -> bool:
        """Return False where SIGINT was ignored from the start; only inside the `with` block."""
        return signal.SIGINT in self._before

    def watch(self, child: subprocess.Popen[bytes] | None) -> None:
        """From now on the wish goes to this process."""
        self._child = child
        if child is not None and self.requested:
            child.send_signal(signal.SIGTERM)

    def overdue(self, grace_period_s: float) -> bool:
        """Whether the stage has had more time to end than it was given."""
        return self.requested and time.monotonic() - self._since_s > grace_period_s + _AFTER_GRACE_S

    def pause(self, seconds: float) -> None:
        """Sleep, but not when asked to stop."""
        deadline = time.monotonic() + seconds
        while not self.requested and time.monotonic() < deadline:
            time.sleep(0.1)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.times += 1
        self._since_s = self._since_s or time.monotonic()
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM if self.times == 1 else signal.SIGINT)
        self._on_stop(self.times)


def run_stage(run: StageRun, stop: Stop, on_progress: Callable[[Progress], None]) -> RunResult:
    """Run an attempt to its end; `on_progress` is called about twice a second."""
    work_dir, termination_log = Path(run.config.work_dir), Path(run.config.termination_log)
    port_file = work_dir / PORT_FILE
    for stale in (termination_log, port_file):
        stale.unlink(missing_ok=True)
    run.log_file.parent.mkdir(parents=True, exist_ok=True)
    with run.log_file.open("ab") as log:
        child = subprocess.Popen(
            run.command(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C reaches us alone, and we ask
            pass_fds=(run.lock_fd,),
        )
        stop.watch(child)
        try:
            while True:
                try:
                    exit_code = child.wait(POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    if stop.overdue(run.config.grace_period_s):
                        child.kill()
                    progress = read_progress(port_file)
                    if progress is not None:
                        on_progress(progress)
        finally:
            stop.watch(None)
            if child.poll() is None:
                child.terminate()
    return read_result(termination_log, run.stage, run.attempt, exit_code)


def read_progress(port_file: Path) -> Progress | None:
    """Where the stage is; None while it does not answer."""
    try:
        text = port_file.read_text()
        if not text.endswith("\n"):
            return None
        url = f"http://127.0.0.1:{int(text)}/progress"
        with _DIRECT.open(url, timeout=_REQUEST_TIMEOUT_S) as answer:
            return Progress.model_validate_json(answer.read(MAX_PROGRESS_BYTES))
    except (OSError, ValueError):  # not there yet, just ended, or half an answer
        return None


def read_result(termination_log: Path, stage: Stage, attempt: int, exit_code: int) -> RunResult:
    """The stage's own word, or what its end tells."""
    try:
        result = RunResult.model_validate_json(termination_log.read_bytes()[: MAX_RESULT_BYTES + 1])
        if result.stage is stage and result.attempt == attempt:
            return result
    except (OSError, ValidationError):
        pass
    if exit_code < 0:
        error = StageError(Fault.KILLED, signal=signal.Signals(-exit_code).name)
    else:
        error = StageError(Fault.BUG, exception="MissingResult", place=f"exit code {exit_code}")
    return RunResult(
        stage=stage, attempt=attempt, fault=error.fault, args=error.args_by_name, exit_code=error.exit_code
    )
