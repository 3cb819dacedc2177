"""The demo's bad end: a job that fails, told with all that helps. kubectl and helm are played by a script."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import testbed
from demo import __main__ as demo
from demo import bucket, watch
from testbed import binaries
from testbed.instance import Instance

SCRIPT = """#!/bin/sh
folder=$(dirname "$0")
echo "$*" >> "$folder/asked"
case "$*" in
  *"get ftj quickstart "*"-o json"*) cat "$folder/job.json" ;;
  *"describe ftj quickstart "*) echo "Warning  DataInvalid  chat-0.jsonl row 62" ;;
  *"get events "*) echo "event of the namespace" ;;
  *"get jobs,pods "*) echo "quickstart-1a2b3-prepare-1  Failed" ;;
  *"describe pods "*"-l finetune.dev/job-name=quickstart"*) ;;
  *"logs "*"-l finetune.dev/job-name=quickstart"*) echo "last line of the trainer" ;;
  *"logs "*"deployment/finetune-operator"*) echo "deployment not found" >&2; exit 1 ;;
  *) echo done ;;
esac
"""


def condition(kind: str, status: str) -> dict[str, str]:
    return {
        "type": kind,
        "status": status,
        "reason": "DataInvalid",
        "message": "chat-0.jsonl row 62: is not valid JSON",
    }


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the played programs; a cluster that seems to be there; no bucket to fill."""
    for name in ("kubectl", "helm"):
        (tmp_path / name).write_text(SCRIPT)
        (tmp_path / name).chmod(0o755)

    def binary(name: str) -> str:
        return str(tmp_path / name)

    def nothing(*_arguments: object) -> bool:
        return False

    monkeypatch.setattr(binaries, "binary", binary)
    cluster = testbed.Cluster(
        Instance("played"), tmp_path / "config", "https://127.0.0.1:1", "node", "http://127.0.0.1:2", None
    )
    monkeypatch.setattr(testbed, "up", lambda: cluster)
    monkeypatch.setattr(testbed, "load_image", nothing)
    monkeypatch.setattr(bucket, "fill", nothing)
    monkeypatch.setattr(sys, "argv", ["demo", "run"])
    return tmp_path


def finish(folder: Path, **status: Any) -> None:
    (folder / "job.json").write_text(json.dumps({"status": status}))


def test_a_job_that_fails_is_told_with_description_events_pods_and_logs(
    played: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(played, phase="Failed", conditions=[condition("Finished", "True"), condition("Succeeded", "False")])
    assert demo.main() == 1
    said = capsys.readouterr()
    assert said.err.endswith("demo: the job failed\n")
    end = said.out.partition("== It failed; what is known of it")[2]
    for words in (
        "$ kubectl describe ftj quickstart -n finetune-demo",
        "Warning  DataInvalid  chat-0.jsonl row 62",
        "event of the namespace",
        "quickstart-1a2b3-prepare-1  Failed",
        "(nothing)",
        "last line of the trainer",
        "deployment not found",
    ):
        assert words in end
    assert "What came out" not in said.out


def test_a_job_that_does_not_finish_is_told_in_the_same_way(
    played: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(played, phase="Running")
    monkeypatch.setattr(demo, "DEADLINE_S", 0.2)
    monkeypatch.setattr(watch, "_POLL_S", 0.05)
    assert demo.main() == 1
    said = capsys.readouterr()
    assert "did not finish within" in said.err
    assert "last line of the trainer" in said.out


def test_an_operator_that_cannot_be_installed_is_told_in_the_same_way(
    played: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (played / "helm").write_text("#!/bin/sh\necho 'chart is broken' >&2\nexit 1\n")
    assert demo.main() == 1
    said = capsys.readouterr()
    assert "chart is broken" in said.err
    assert "event of the namespace" in said.out
