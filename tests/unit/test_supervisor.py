"""How the end of a child process becomes the end of a container; with real processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_api.names import Stage
from finetune_api.reasons import EXIT_CODES, Fault, Reason
from finetune_api.run import CONTRACT_VERSION, RunResult
from finetune_trainer.stop import StopFlag, done_after_s, kill_after_s
from finetune_trainer.supervisor import Cgroup, own_cgroup, verdict
from waiting import PATIENCE_S, until

TERM, KILL = int(signal.SIGTERM), int(signal.SIGKILL)


def exited(code: int) -> int:
    return code << 8


def message(fault: Fault = Fault.COMMITTED, **changes: object) -> bytes:
    fields = {"stage": "train", "attempt": 1, "fault": fault.value, "exit_code": 0, "contract_version": 1}
    return json.dumps(fields | changes).encode()


@pytest.mark.parametrize(
    ("status", "result", "oom_kills", "stopping", "fault", "exit_code"),
    [
        (exited(0), message(), 0, False, Fault.COMMITTED, 0),
        (exited(12), message(Fault.OBJECT_NOT_FOUND, exit_code=12), 0, False, Fault.OBJECT_NOT_FOUND, 12),
        (exited(30), message(Fault.INTERRUPTED, exit_code=30), 0, False, Fault.INTERRUPTED, 30),
        # The result counts, whatever happened to the process after it.
        (int(signal.SIGSEGV), message(), 0, False, Fault.COMMITTED, 0),
        (KILL, message(), 1, False, Fault.COMMITTED, 0),
        (KILL, message(Fault.INTERRUPTED, exit_code=30), 0, False, Fault.INTERRUPTED, 30),
        # Memory.
        (KILL, None, 1, False, Fault.HOST_OOM, 35),
        (exited(1), None, 1, False, Fault.HOST_OOM, 35),
        (exited(1), message(Fault.BUG, exit_code=1), 1, False, Fault.HOST_OOM, 35),
        (exited(1), message(Fault.BUG, exit_code=1), 0, False, Fault.BUG, 1),
        # Signals.
        (KILL, None, 0, False, Fault.KILLED, 1),
        (TERM, None, 0, False, Fault.KILLED, 1),
        (int(signal.SIGSEGV), None, 0, False, Fault.KILLED, 1),
        # Signals after a request to stop: it had nothing to save, or did not manage in time; but a crash is a crash.
        (TERM, None, 0, True, Fault.STOPPED, 30),
        (int(signal.SIGINT), None, 0, True, Fault.STOPPED, 30),
        (KILL, None, 0, True, Fault.STOPPED, 30),
        (KILL, None, 1, True, Fault.HOST_OOM, 35),
        (int(signal.SIGSEGV), None, 0, True, Fault.KILLED, 1),
        (exited(1), None, 0, True, Fault.BUG, 1),
        (KILL, message(Fault.INTERRUPTED, exit_code=30), 0, True, Fault.INTERRUPTED, 30),
        # No result, or one that cannot be trusted.
        (exited(0), None, 0, False, Fault.BUG, 1),
        (exited(1), None, 0, False, Fault.BUG, 1),
        (exited(0), b"{}", 0, False, Fault.BUG, 1),
        (exited(0), b"\xff", 0, False, Fault.BUG, 1),
        (exited(0), message() + b" " * 5000, 0, False, Fault.BUG, 1),
        (exited(0), message(attempt=2), 0, False, Fault.BUG, 1),
        (exited(0), message(stage="prepare"), 0, False, Fault.BUG, 1),
        (exited(0), message(exit_code=11), 0, False, Fault.BUG, 1),
        (exited(0), message(unknown="field of a newer trainer"), 0, False, Fault.COMMITTED, 0),
    ],
)
def test_every_end_of_the_child_has_one_verdict(
    status: int, result: bytes | None, oom_kills: int, stopping: bool, fault: Fault, exit_code: int
) -> None:
    found = verdict(
        stage=Stage.TRAIN,
        attempt=1,
        status=status,
        message=result,
        stopping=stopping,
        oom_kills=oom_kills,
        limit_gib=2.0,
    )
    assert (found.fault, found.exit_code) == (fault, exit_code)
    if fault is Fault.HOST_OOM:
        assert found.args == {"limit": "2 GiB", "field": "resources.memory"}
    RunResult.model_validate_json(found.to_message())


def test_an_oom_keeps_what_the_stage_told_before() -> None:
    result = message(Fault.BUG, exit_code=1, step=7, log_uri="s3://b/log")
    found = verdict(
        stage=Stage.TRAIN, attempt=1, status=exited(1), message=result, stopping=False, oom_kills=1, limit_gib=None
    )
    assert (found.fault, found.step, found.log_uri) == (Fault.HOST_OOM, 7, "s3://b/log")


def test_the_counters_of_both_cgroup_versions_are_read(tmp_path: Path) -> None:
    v1 = tmp_path / "v1/memory"
    v1.mkdir(parents=True)
    (v1 / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    (v1 / "memory.limit_in_bytes").write_text("2147483648\n")
    assert (own_cgroup(tmp_path / "v1").oom_kills(), own_cgroup(tmp_path / "v1").limit_gib()) == (3, 2.0)
    (v1 / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert own_cgroup(tmp_path / "v1").limit_gib() is None

    v2 = tmp_path / "v2"
    v2.mkdir()
    (v2 / "memory.events").write_text("low 0\nhigh 0\nmax 5\noom 2\noom_kill 2\noom_group_kill 0\n")
    (v2 / "memory.max").write_text("max\n")
    assert (own_cgroup(v2).oom_kills(), own_cgroup(v2).limit_gib()) == (2, None)

    nothing = Cgroup(tmp_path / "no", tmp_path / "no")
    assert (nothing.oom_kills(), nothing.limit_gib()) == (0, None)


@pytest.mark.parametrize("grace_s", [5, 10, 30, 120, 3600])
def test_the_trainer_is_done_before_it_is_killed_and_killed_before_the_container_is(grace_s: int) -> None:
    assert 0 < done_after_s(grace_s) < kill_after_s(grace_s) < grace_s


def test_a_stop_is_asked_for_once() -> None:
    stop = StopFlag(120)
    assert (stop.is_set(), stop.deadline_s, stop.remaining_s()) == (False, None, float("inf"))
    stop.set(now_s=1000.0)
    stop.set(now_s=2000.0)
    assert (stop.is_set(), stop.deadline_s) == (True, 1000 + done_after_s(120))
    assert stop.remaining_s() >= 0


def test_the_supervisor_is_light() -> None:
    script = "import sys, finetune_trainer.supervisor; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert not {"torch", "transformers", "boto3", "numpy", "prometheus_client"} & set(done.stdout.split())


# The supervisor with a child of our own in place of the stage.
_DRIVER = """
import os, sys
from pathlib import Path
from finetune_trainer import supervisor
supervisor.own_cgroup = lambda: supervisor.Cgroup(Path(sys.argv[2]), Path(sys.argv[3]))
supervisor.sys.executable = sys.argv[1]
sys.exit(supervisor.main(["train", "--config", sys.argv[4], "--attempt", "1", "--plan-digest", "x"]))
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    spec = {
        "model": {"uri": "s3://m/x"},
        "method": {"type": "SFT"},
        "datasets": [{"uri": "s3://d/x.jsonl"}],
        "output": {"uri": "s3://o/x"},
    }
    fields = {
        "contract_version": 1,
        "job": {"name": "bot", "namespace": "team", "uid": "1"},
        "spec": spec,
        "run_uri": "s3://o/x/bot-1",
        "storage": {},
        "resources": {"cpu_count": 1, "memory_bytes": 1, "disk_bytes": 1, "gpus": 0},
        "work_dir": str(tmp_path / "scratch"),
        "grace_period_s": 3600,
        "termination_log": str(tmp_path / "termination-log"),
    }
    (tmp_path / "termination-log").write_text("x" * 9000)  # an older, longer message must vanish
    path = tmp_path / "run.json"
    path.write_text(json.dumps(fields))
    return path


def supervise(tmp_path: Path, config: Path, child: str) -> subprocess.Popen[bytes]:
    """Start the supervisor; `child` is a shell script that finds the result file's path in $RESULT."""
    script, program = tmp_path / "child.sh", tmp_path / "child"
    script.write_text(f'for RESULT in "$@"; do :; done\ncd {tmp_path}\n{child}\n')
    # Like the stage it is told to stop only once it listens, and a shell cannot say that it does.
    listen = "import os, sys; from finetune_trainer.stop import release; release(); os.execv('/bin/sh', sys.argv)"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{listen}" {script} "$@"\n')
    program.chmod(0o755)
    (tmp_path / "events").write_text("oom_kill 4\n")
    (tmp_path / "limit").write_text(str(3 << 30))
    arguments = [str(program), str(tmp_path / "events"), str(tmp_path / "limit"), str(config)]
    return subprocess.Popen([sys.executable, "-c", _DRIVER, *arguments], stderr=subprocess.PIPE)


def ended(tmp_path: Path, process: subprocess.Popen[bytes]) -> RunResult:
    try:
        code = process.wait(PATIENCE_S)
    finally:
        process.kill()
    result = RunResult.model_validate_json((tmp_path / "termination-log").read_bytes())
    assert result.exit_code == code
    assert list((tmp_path / "scratch").glob("result-*")) == []
    return result


def wait_for(path: Path) -> None:
    until(lambda: path.exists() and path.read_text().strip(), f"{path} is written")


def wait_for_the_end(pid: int) -> None:
    until(lambda: not is_running(pid), f"process {pid} has ended")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_childs_result_becomes_the_termination_message(tmp_path: Path, config: Path) -> None:
    child = (
        f"echo '{message(Fault.OBJECT_NOT_FOUND, exit_code=12, args={'uri': 's3://x'}).decode()}' > $RESULT; exit 12"
    )
    process = supervise(tmp_path, config, child)
    result = ended(tmp_path, process)
    assert (result.fault, result.exit_code) == (Fault.OBJECT_NOT_FOUND, 12)
    assert process.stderr is not None
    last = json.loads(process.stderr.read().splitlines()[-1])
    assert last["message"].startswith("s3://x does not exist")


def test_a_child_killed_for_memory_is_reported_with_the_limit(tmp_path: Path, config: Path) -> None:
    result = ended(tmp_path, supervise(tmp_path, config, "echo 'oom_kill 5' > events; kill -9 $$"))
    assert (result.fault, result.args) == (Fault.HOST_OOM, {"limit": "3 GiB", "field": "resources.memory"})
    assert result.exit_code == EXIT_CODES[Reason.HOST_OOM]


def test_a_child_killed_by_somebody_else_is_not_called_out_of_memory(tmp_path: Path, config: Path) -> None:
    result = ended(tmp_path, supervise(tmp_path, config, "kill -9 $$"))
    assert (result.fault, result.args) == (Fault.KILLED, {"signal": "SIGKILL"})


def test_a_stop_is_forwarded_and_the_child_reports_its_checkpoint(tmp_path: Path, config: Path) -> None:
    report = message(Fault.INTERRUPTED, exit_code=30, step=5, args={"step": 5}).decode()
    child = f"trap 'echo '\"'\"'{report}'\"'\"' > $RESULT; exit 30' TERM\necho up > up\nwhile :; do sleep 0.05; done"
    process = supervise(tmp_path, config, child)
    wait_for(tmp_path / "up")
    process.send_signal(signal.SIGTERM)
    result = ended(tmp_path, process)
    assert (result.fault, result.step, result.exit_code) == (Fault.INTERRUPTED, 5, 30)


def test_a_child_that_does_not_obey_is_killed_with_all_it_started(tmp_path: Path, config: Path) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | {"grace_period_s": 5}))
    child = "trap '' TERM\n(sleep 300 & echo $! > grandchild)\necho up > up\nwhile :; do sleep 0.05; done"
    process = supervise(tmp_path, config, child)
    wait_for(tmp_path / "up")
    process.send_signal(signal.SIGTERM)
    result = ended(tmp_path, process)
    assert (result.fault, result.exit_code) == (Fault.STOPPED, 30)
    pid = int((tmp_path / "grandchild").read_text())
    wait_for_the_end(pid)


def _holds_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    blocked = int(next(line for line in status.splitlines() if line.startswith("SigBlk:")).split()[1], 16)
    return bool(blocked >> (TERM - 1) & 1)


@pytest.mark.parametrize("stage", list(Stage))
def test_a_stop_at_once_after_the_start_is_not_lost_and_ends_either_stage_with_30(
    tmp_path: Path, config: Path, stage: Stage
) -> None:
    """The real entrypoint and the real stage; asked while PID 1 still imports, which takes it half a second."""
    config.write_text(json.dumps(json.loads(config.read_text()) | {"http_port": 0}))
    command = [sys.executable, "-m", "finetune_trainer.supervisor", stage.value, "--config", str(config)]
    process = subprocess.Popen([*command, "--attempt", "1"], stderr=subprocess.PIPE)
    until(lambda: _holds_sigterm(process.pid), "it holds SIGTERM back while a stop would be lost")
    process.send_signal(signal.SIGTERM)
    result = ended(tmp_path, process)  # which waits for less than the grace period: it ended by the request
    assert (result.fault, result.stage, result.exit_code) == (Fault.STOPPED, stage, 30)


def test_a_stop_while_a_stage_has_nothing_to_save_ends_it_at_once_with_30(tmp_path: Path, config: Path) -> None:
    process = supervise(tmp_path, config, "echo up > up\nexec sleep 300")
    wait_for(tmp_path / "up")
    process.send_signal(signal.SIGTERM)
    result = ended(tmp_path, process)
    assert (result.fault, result.exit_code) == (Fault.STOPPED, 30)


def test_what_a_finished_child_leaves_running_is_ended(tmp_path: Path, config: Path) -> None:
    child = f"sleep 300 & echo $! > left\necho '{message().decode()}' > $RESULT"
    assert ended(tmp_path, supervise(tmp_path, config, child)).fault is Fault.COMMITTED
    pid = int((tmp_path / "left").read_text())
    wait_for_the_end(pid)


def test_a_configuration_of_another_version_is_reported_without_a_child(tmp_path: Path, config: Path) -> None:
    config.write_text(json.dumps({"contract_version": CONTRACT_VERSION + 1, "new_field": 1}))
    process = subprocess.run(
        [sys.executable, "-m", "finetune_trainer.supervisor", "train", "--config", str(config), "--attempt", "1"],
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    assert process.returncode == 10
    assert f"contract version {CONTRACT_VERSION + 1}".encode() in process.stderr


@pytest.mark.parametrize("program", ["supervisor", "__main__"])
def test_a_configuration_that_the_operator_did_not_write_is_refused_by_both_processes(
    tmp_path: Path, config: Path, program: str
) -> None:
    told = ["--config", str(config), "--attempt", "1", f"--config-digest=sha256:{'0' * 64}"]
    result = [] if program == "supervisor" else ["--result", str(tmp_path / "result.json")]
    process = subprocess.run(
        [sys.executable, "-m", f"finetune_trainer.{program}", "train", *told, *result],
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    assert process.returncode == 38
    assert b"not the configuration that the operator wrote" in process.stderr
