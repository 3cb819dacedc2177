"""One attempt from the command line to its result file; the stages are stand-ins."""

import errno
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from finetune_api.errors import StageError
from finetune_api.names import Stage
from finetune_api.reasons import Fault
from finetune_api.run import RunResult
from finetune_trainer import __main__ as trainer
from finetune_trainer import logs
from finetune_trainer.context import StageContext
from finetune_trainer.stop import StopFlag


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves pytest's logging and signal handlers alone."""

    def nothing(*_: object) -> None: ...

    monkeypatch.setattr(logs, "configure", nothing)
    monkeypatch.setattr(StopFlag, "install", nothing)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, object]:
    return {
        "contract_version": 1,
        "job": {"name": "bot", "namespace": "team", "uid": "1"},
        "spec": {
            "model": {"uri": "s3://m/x"},
            "method": {"type": "SFT"},
            "datasets": [{"uri": "s3://d/x.jsonl"}],
            "output": {"uri": "s3://o/x"},
        },
        "run_uri": f"file://{tmp_path}/out/bot-1",
        "storage": {},
        "resources": {"cpu_count": 1, "memory_bytes": 1, "disk_bytes": 1, "gpus": 0},
        "work_dir": str(tmp_path / "scratch"),
        "http_port": 0,
    }


@pytest.fixture
def run(tmp_path: Path, config: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunResult]:
    def run(train: Callable[[StageContext, StopFlag], RunResult]) -> RunResult:
        module = ModuleType("finetune_trainer.train")
        module.run = train  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "finetune_trainer.train", module)
        monkeypatch.setattr("finetune_trainer.train", module, raising=False)
        (tmp_path / "scratch").mkdir(exist_ok=True)
        (tmp_path / "run.json").write_text(json.dumps(config))
        file = tmp_path / "result.json"
        digest = f"sha256:{'0' * 64}"
        arguments = {
            "--config": tmp_path / "run.json",
            "--attempt": 2,
            "--plan-digest": digest,
            "--result": file,
        }
        code = trainer.main(["train", *(str(part) for pair in arguments.items() for part in pair)])
        result = RunResult.model_validate_json(file.read_bytes())
        assert result.exit_code == code
        return result

    return run


def test_a_stage_gets_its_context_and_its_result_is_written(
    run: Callable[..., RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POD_UID", "pod-7")

    def train(context: StageContext, stop: StopFlag) -> RunResult:
        assert (context.attempt, context.pod_uid, context.stage) == (2, "pod-7", Stage.TRAIN)
        assert context.plan_digest == f"sha256:{'0' * 64}"
        assert not stop.is_set()
        return RunResult(stage=Stage.TRAIN, attempt=2, fault=Fault.COMMITTED, exit_code=0)

    result = run(train)
    assert result.fault is Fault.COMMITTED
    assert result.log_uri is not None
    assert result.log_uri.endswith("/out/bot-1/.job/logs/train-2.jsonl")


def test_a_known_end_keeps_its_arguments_and_how_far_it_came(run: Callable[..., RunResult]) -> None:
    def train(context: StageContext, stop: StopFlag) -> RunResult:
        context.reporter.update(activity="Training", step=5, total_steps=9, resumed_from_step=3, train_loss=1.23456)
        raise StageError(Fault.NOT_FINITE, count=3, step=5, uri="s3://" + "x" * 1000, worst=float("inf"))

    result = run(train)
    assert (result.fault, result.exit_code, result.step, result.resumed_from_step) == (Fault.NOT_FINITE, 15, 5, 3)
    assert result.metrics is not None
    assert result.metrics.loss == "1.235"
    assert (result.args["count"], result.args["worst"]) == (3, "inf")
    assert len(str(result.args["uri"])) == 256


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (MemoryError(), Fault.HOST_OOM),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Fault.HOST_OOM),
        (OSError(errno.ENOSPC, "No space left", "/scratch/model.safetensors"), Fault.DISK_FULL),
        (OSError(errno.EIO, "I/O error"), Fault.BUG),
        (ValueError("canary row content"), Fault.BUG),
    ],
)
def test_an_unexpected_exception_is_reported_by_type_and_place_alone(
    run: Callable[..., RunResult], error: Exception, fault: Fault, tmp_path: Path
) -> None:
    def train(context: StageContext, stop: StopFlag) -> RunResult:
        raise error

    result = run(train)
    assert result.fault is fault
    assert "canary" not in (tmp_path / "result.json").read_text()
    if fault is Fault.BUG:
        assert result.args["exception"] == type(error).__name__
        assert str(result.args["place"]).startswith("finetune_trainer/__main__.py:")
    if fault is Fault.DISK_FULL:
        assert result.args["what"] == "model.safetensors"


@pytest.mark.parametrize(
    ("content", "fault", "argument"),
    [
        (None, Fault.CONFIG_UNREADABLE, "field"),
        ("not json", Fault.CONFIG_UNREADABLE, "problem"),
        ("[]", Fault.CONFIG_UNREADABLE, "problem"),
        ('{"contract_version": 99, "unknown": 1}', Fault.CONTRACT_SKEW, "operator"),
        ("{}", Fault.CONTRACT_SKEW, "operator"),
        ('{"contract_version": 1, "unknown": 1}', Fault.CONFIG_UNREADABLE, "field"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_named(
    tmp_path: Path, content: str | None, fault: Fault, argument: str
) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    code = trainer.main(["prepare", "--config", str(path), "--attempt", "1", "--result", str(tmp_path / "result.json")])
    result = RunResult.model_validate_json((tmp_path / "result.json").read_bytes())
    assert (result.fault, code) == (fault, 10)
    assert argument in result.args


def test_a_scratch_folder_that_cannot_be_used_is_reported(
    run: Callable[..., RunResult], config: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "train-2.jsonl")

    monkeypatch.setattr(logs, "configure", full)
    assert run(lambda context, stop: None).fault is Fault.DISK_FULL  # type: ignore[arg-type]


def test_a_port_that_is_taken_does_not_end_the_job(run: Callable[..., RunResult], config: dict[str, object]) -> None:
    def train(context: StageContext, stop: StopFlag) -> RunResult:
        return RunResult(stage=Stage.TRAIN, attempt=2, fault=Fault.COMMITTED, exit_code=0)

    with socket.create_server(("", 0)) as taken:
        config["http_port"] = taken.getsockname()[1]
        assert run(train).fault is Fault.COMMITTED
