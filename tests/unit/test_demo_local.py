"""The cheap parts of `make try`: the job that it writes, and what it says at the end."""

from pathlib import Path

import pytest

import spec_cases
from demo import local
from finetune_api.run import StorageConfig
from finetune_cli.load import load_job
from finetune_cli.validate import problems
from finetune_trainer.store import open_store


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it works; model and conversations are played."""
    model = tmp_path / "cache" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    monkeypatch.setattr(local, "ensure_model", lambda: model)
    monkeypatch.setattr(local, "demo_files", lambda: {"chat-0.jsonl": b"{}\n"})
    return tmp_path / "a folder"


def test_the_job_is_the_example_with_files_that_are_there(folder: Path) -> None:
    job = load_job(local.set_up(folder))
    assert problems(job) == []
    spec, example = job["spec"], load_job(spec_cases.LOCAL_EXAMPLE)["spec"]
    store = open_store(StorageConfig())
    assert [info.uri.rpartition("/")[2] for info in store.list(f"{spec['model']['uri']}/")] == ["config.json"]
    assert [info.uri.rpartition("/")[2] for info in store.match(spec["datasets"][0]["uri"])] == ["chat-0.jsonl"]
    for name in set(example) - {"model", "datasets", "output"}:
        assert spec[name] == example[name]


def test_a_second_time_leaves_the_job_and_the_rows_as_they_are(folder: Path) -> None:
    job = local.set_up(folder)
    job.write_text("changed")
    before = (folder / "chat/chat-0.jsonl").stat()
    assert local.set_up(folder).read_text() == "changed"
    after = (folder / "chat/chat-0.jsonl").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_the_end_names_what_is_there_and_what_to_type(folder: Path) -> None:
    adapter = folder / "adapters/local-1a2b3/adapter"
    adapter.mkdir(parents=True)
    said = local.what_next(folder, folder / "local.yaml")
    assert f"  {adapter}\n" in said
    assert f".venv/bin/finetune run {folder / 'local.yaml'}" in said


def test_the_example_is_for_this_machine_alone() -> None:
    job = load_job(spec_cases.LOCAL_EXAMPLE)
    assert problems(job) == []
    assert any("s3://" in problem for problem in problems(job, local=False))
