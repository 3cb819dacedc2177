"""A password in a URL is refused before anything stands in a status, an event or a log that shows it."""

from pathlib import Path

import pytest

import spec_cases
from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.run import StorageConfig
from finetune_cli import local, validate
from finetune_cli.errors import CommandError, Exit
from finetune_operator.job_reader import read_job
from finetune_trainer.store import open_store

ENDPOINT = "http://user:password@minio:9000"


def test_the_command_refuses_a_job_with_a_password_in_its_endpoint_and_does_not_repeat_it() -> None:
    job = spec_cases.base()
    job["spec"]["storage"] = {"endpoint": ENDPOINT}
    (problem,) = validate.problems(job)
    assert problem.startswith("spec.storage.endpoint: ")
    assert "password@" not in problem


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
def test_the_command_refuses_a_password_in_the_endpoint_of_its_environment(name: str, tmp_path: Path) -> None:
    machine = local.Machine(cpu_count=1, memory_bytes=1 << 30, disk_bytes=1 << 30, gpus=0)
    with pytest.raises(CommandError) as caught:
        local.run_config(spec_cases.base(), local.State(uid="0" * 36), tmp_path, machine, {name: ENDPOINT})
    assert caught.value.code == Exit.USAGE
    assert name in str(caught.value)
    assert "password@" not in str(caught.value)


def test_the_operator_does_not_run_a_job_that_an_older_schema_let_in() -> None:
    job = spec_cases.base()
    job["spec"]["storage"] = {"endpoint": ENDPOINT}
    seen = read_job(job)
    assert seen.spec is None
    assert "storage.endpoint" in seen.problem
    assert "password@" not in seen.problem


def test_the_trainer_does_not_use_an_endpoint_that_an_older_operator_hands_over() -> None:
    with pytest.raises(StageError) as caught:
        open_store(StorageConfig(endpoint=ENDPOINT)).read("s3://bucket/object")
    assert caught.value.fault is Fault.CONFIG_UNREADABLE
    assert "password@" not in str(caught.value)


@pytest.mark.parametrize("storage", [{"endpoint": "http://[not an address"}, {"region": "no region\n"}])
def test_what_boto3_does_not_accept_is_named_and_not_quoted(storage: dict[str, str]) -> None:
    with pytest.raises(StageError) as caught:
        open_store(StorageConfig(**storage)).read("s3://bucket/object")  # pyright: ignore[reportArgumentType]
    assert caught.value.fault is Fault.CONFIG_UNREADABLE


def test_a_uri_with_a_password_is_hidden_however_long_it_is() -> None:
    with pytest.raises(StageError) as caught:
        open_store(StorageConfig()).read(f"https://user:{'p' * 300}@hub.example/model")
    assert "ppp" not in str(caught.value)


def test_half_a_key_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    with pytest.raises(StageError) as caught:
        open_store(StorageConfig()).read("s3://bucket/object")
    assert caught.value.fault is Fault.NO_CREDENTIALS
