"""The command line: files, exit codes, and errors without traces."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import spec_cases
from finetune_cli import main
from finetune_cli.errors import CommandError, Exit
from finetune_cli.load import MAX_FILE_BYTES, load_job
from waiting import PATIENCE_S


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["finetune", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        (b"a: [\n  b", "line 2"),
        (b"a: 1\na: 2", "duplicate key"),
        (b"\xff\xfe", "not UTF-8"),
        (b"kind: Secret", "no objects of kind FineTuneJob"),
        (b"kind: FineTuneJob\n---\nkind: FineTuneJob", "2 objects of kind FineTuneJob"),
        (b"kind: FineTuneJob\nspec: {a: .nan}", "write plain numbers"),
        (b"#" * (MAX_FILE_BYTES + 1), "larger than"),
        (b"kind: FineTuneJob\na: " + b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        (b"kind: FineTuneJob\na: 2024-13-45", "month must be in 1..12"),
        (b"kind: FineTuneJob\na: " + b"9" * 5000, "quote what is a word"),
    ],
)
def test_a_file_without_a_job_is_refused_in_words(tmp_path: Path, content: bytes | None, says: str):
    path = tmp_path / "job.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CommandError, match=says) as refused:
        load_job(path)
    assert refused.value.code == Exit.USAGE


def test_a_job_is_found_among_other_objects_and_2e_4_is_a_number(tmp_path: Path):
    path = tmp_path / "job.yaml"
    path.write_text("kind: Secret\n---\nkind: FineTuneJob\nspec: {hyperparameters: {learningRate: 2e-4}}\n")
    assert load_job(path)["spec"]["hyperparameters"]["learningRate"] == 2e-4


def test_errors_are_one_line_without_a_trace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert call(monkeypatch, "run", "/nowhere/[job].yaml") == Exit.USAGE
    said = capsys.readouterr().err
    assert said == "Error /nowhere/[job].yaml cannot be read: No such file or directory\n"


def test_a_full_disk_is_one_line_without_a_trace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/work/[1]/state.json")

    monkeypatch.setattr("finetune_cli.run.run", full)
    assert call(monkeypatch, "run", "job.yaml") == Exit.FAILED
    assert capsys.readouterr().err == "Error /work/[1]/state.json: No space left on device\n"


def test_a_process_that_was_killed_for_memory_is_one_line_without_a_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def killed(*_arguments: object) -> int:
        raise MemoryError("finetune_trainer.data.render_worker was killed")

    monkeypatch.setattr("finetune_cli.data.check", killed)
    assert call(monkeypatch, "data", "check", "rows.jsonl") == Exit.FAILED
    said = capsys.readouterr().err
    assert said == "Error this machine has too little free memory for it: a process of the command was ended\n"


def test_validate_judges_as_the_cluster_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert call(monkeypatch, "validate", *map(str, spec_cases.EXAMPLES)) == Exit.SUCCEEDED
    path = tmp_path / "job.yaml"
    path.write_text(spec_cases.EXAMPLES[0].read_text().replace("uri: s3://", "uri: gs://"))
    assert call(monkeypatch, "validate", str(path)) == Exit.USAGE
    assert "spec.model.uri: write s3://BUCKET/FOLDER" in capsys.readouterr().err


def test_no_cluster_is_said_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert call(monkeypatch, "wait", "bot") == Exit.CLUSTER
    assert "set KUBECONFIG" in capsys.readouterr().err


def test_a_broken_kubeconfig_is_said_in_words_without_its_content(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    (tmp_path / "config").write_text("users: [{token: secret")
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))
    assert call(monkeypatch, "wait", "bot") == Exit.CLUSTER
    said = capsys.readouterr().err
    assert "the kubeconfig is no YAML" in said
    assert "secret" not in said


def test_the_help_loads_neither_torch_nor_kubernetes():
    code = (
        "import sys\nfrom finetune_cli.main import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'kubernetes', 'boto3', 'celpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "124 time-out" in " ".join(done.stdout.split())
