"""Log lines, what they never contain, and their way into the bucket."""

import json
import logging
from collections.abc import Generator
from pathlib import Path

import pytest
import transformers

from finetune_api.errors import StageError
from finetune_api.names import Stage
from finetune_api.reasons import Fault
from finetune_api.run import StorageConfig
from finetune_trainer import logs
from finetune_trainer.store import open_store
from tiny_run import tiny_config, tiny_model

log = logging.getLogger("finetune_trainer.test")


@pytest.fixture(autouse=True)
def clean_logging() -> Generator[None]:
    root = logging.getLogger()
    handlers, level, raising = list(root.handlers), root.level, logging.raiseExceptions
    yield
    for handler in list(root.handlers):
        root.removeHandler(handler)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)
    logging.raiseExceptions = raising
    logging.captureWarnings(False)
    logs.bind_step(None)


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_line_tells_job_stage_attempt_and_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("team/bot", Stage.TRAIN, 3, True, tmp_path / "logs/train-3.jsonl")
    log.info("loading %s", "model")
    logs.bind_step(7)
    log.warning("slow")
    first, second = lines(tmp_path / "logs/train-3.jsonl")
    assert (first["job"], first["stage"], first["attempt"], first["step"]) == ("team/bot", "train", 3, None)
    assert (first["message"], first["level"], second["step"]) == ("loading model", "INFO", 7)
    assert [json.loads(line) for line in capsys.readouterr().err.splitlines()] == [first, second]


def test_people_at_a_terminal_get_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("team/bot", Stage.TRAIN, 1, False, tmp_path / "log")
    logs.bind_step(7)
    log.warning("slow")
    assert capsys.readouterr().err.rstrip().endswith("WARNING step 7: slow")


def test_transformers_warns_in_our_log_and_draws_no_bars(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny_model(tiny_config("llama")).save_pretrained(tmp_path / "model")
    capfd.readouterr()
    logs.configure("team/bot", Stage.TRAIN, 1, True, tmp_path / "log")
    logs.take_over_transformers()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    transformers.utils.logging.get_logger("transformers.modeling_utils").warning("\x1b[1mnot tied\x1b[0m")
    (line,) = lines(tmp_path / "log")
    assert (line["message"], line["logger"]) == ("not tied", "transformers.modeling_utils")
    assert [json.loads(each) for each in capfd.readouterr().err.splitlines()] == [line]


def test_other_libraries_speak_only_when_something_is_wrong(tmp_path: Path) -> None:
    logs.configure("team/bot", Stage.TRAIN, 1, True, tmp_path / "log")
    logging.getLogger("botocore").info("chatter")
    logging.getLogger("botocore").warning("trouble")
    assert [line["message"] for line in lines(tmp_path / "log")] == ["trouble"]


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("key AKIAABCDEFGHIJKLMNOP used", "key *** used"),
        ("GET /x?X-Amz-Signature=abc123&y=1", "GET /x?X-Amz-Signature=***&y=1"),
        ("AWS_SECRET_ACCESS_KEY=wJalr/xU", "AWS_SECRET_ACCESS_KEY=***"),
        ("{'Authorization': 'AWS4 Cred'}", "{'Authorization': ***"),
        ("nothing secret", "nothing secret"),
    ],
)
def test_secrets_are_blotted_out(message: str, kept: str) -> None:
    assert logs.clean(message) == kept


def test_long_messages_are_cut() -> None:
    assert len(logs.clean("x" * 100_000)) <= logs.MAX_MESSAGE_CHARS + 1


@pytest.mark.parametrize(("stage", "shown"), [(Stage.PREPARE, False), (Stage.TRAIN, True)])
def test_the_trace_of_a_bug_in_prepare_does_not_quote_what_was_read(tmp_path: Path, stage: Stage, shown: bool) -> None:
    logs.configure("team/bot", stage, 1, True, tmp_path / "log")
    row = "canary row"
    try:
        try:
            raise ValueError(f"{row} content")
        except ValueError as error:
            raise KeyError(row) from error
    except KeyError as error:
        log.critical("unexpected %s", type(error).__name__, exc_info=error)
    text = (tmp_path / "log").read_text()
    assert ("canary row content" in lines(tmp_path / "log")[0]["trace"]) is shown  # type: ignore[operator]
    assert "caused by ValueError" in text
    assert "test_logs.py" in text


def test_growing_files_are_uploaded_as_they_grow_and_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "train-1.jsonl"
    file.write_text("one\n")
    uploader = logs.Uploader(open_store(StorageConfig()), f"file://{tmp_path}/bucket", [file, tmp_path / "none"], 3600)
    with file.open("a") as more:
        more.write("two\n")
    uploader.close()
    assert (tmp_path / "bucket/train-1.jsonl").read_text() == "one\ntwo\n"


def test_storage_that_fails_is_logged_once_and_fails_nothing(tmp_path: Path) -> None:
    class Broken:
        calls = 0

        def put(self, uri: str, data: bytes) -> str:
            self.calls += 1
            raise StageError(Fault.ACCESS_DENIED, action="write", uri=uri)

    logs.configure("team/bot", Stage.TRAIN, 1, True, tmp_path / "log")
    (tmp_path / "a").write_text("a\n")
    store = Broken()
    uploader = logs.Uploader(store, "s3://b", [tmp_path / "a", tmp_path / "log"], 0.01)  # type: ignore[arg-type]
    while store.calls < 5:
        log.info("more")
    uploader.close()
    warnings = [line for line in lines(tmp_path / "log") if line["level"] == "WARNING"]
    assert len(warnings) == 1
    assert "could not be uploaded: the job's credentials may not write s3://b/a" in str(warnings[0]["message"])


@pytest.mark.parametrize(
    ("content", "newest"),
    [(b"", b""), (b"a\nb\n", b"a\nb\n"), (b"a\nb", b"a\n"), (b"long line\nb\nc\n", b"b\nc\n"), (b"x" * 20, b"")],
)
def test_of_a_long_file_the_newest_whole_lines_are_kept(tmp_path: Path, content: bytes, newest: bytes) -> None:
    (tmp_path / "log").write_bytes(content)
    assert logs.newest_lines(tmp_path / "log", 8) == newest
