"""`finetune run` around stages that are played by a small script: retries, stopping, resuming, and what is said."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import spec_cases
from data_run import chats, jsonl, prepare_run, put
from finetune_api import retry
from finetune_api.names import PORT_FILE, Stage
from finetune_api.quality import Quality
from finetune_api.reasons import Fault, Reason
from finetune_api.run import Progress, RunConfig, RunResources, Trouble
from finetune_api.status import DataStatus, PlanStatus
from finetune_cli import local, run, show, stages
from finetune_cli.errors import CommandError, Exit
from signals import disposition
from status_samples import DATA, PLAN
from waiting import PATIENCE_S, until

DIGEST = "sha256:" + "a" * 64
GIB = 2**30

STAGE = """
import json, os, pathlib, signal, sys, threading, http.server
stage, attempt, config_file = sys.argv[1], int(sys.argv[2]), sys.argv[3]
config = json.load(open(config_file))
work = pathlib.Path(config["work_dir"])
part = json.loads((work / "play.json").read_text())[f"{stage}-{attempt}"]
with open(work / "played", "a") as file:
    file.write(json.dumps([stage, attempt, sys.argv[4:], os.getsid(0) == os.getpid()]) + "\\n")
seen = threading.Event()
if part.get("waits"):
    signal.signal(signal.SIGTERM, lambda *a: seen.set())
if "progress" in part:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.end_headers(); self.wfile.write(json.dumps(part["progress"]).encode())
        def log_message(self, *a): pass
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (work / "port").write_text(f"{server.server_port}\\n")
if "sends" in part:
    os.kill(os.getppid(), part["sends"])
if part.get("waits"):
    (work / "waiting").touch()
    seen.wait(250)
print("a line of the stage")
if "result" in part:
    pathlib.Path(config["termination_log"]).write_text(
        json.dumps({"stage": stage, "attempt": attempt, "exit_code": part["exit"], **part["result"]})
    )
if part.get("killed"):
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(part["exit"])
"""

PREPARED: dict[str, Any] = {
    "exit": 0,
    "result": {
        "fault": "Prepared",
        "plan": {
            "uri": "file:///plan.json",
            "digest": DIGEST,
            "steps": 20,
            "trainTokens": 4000,
            "labelTokens": 1000,
            "memoryBytes": GIB,
            "diskBytes": GIB,
            "resolved": [{"field": "peft.alpha", "value": "32", "reason": "it is absent [so]"}],
        },
        "data": {
            "files": 2,
            "rowsIn": 1100,
            "rowsUsed": 1000,
            "rowsHeldOut": 60,
            "dropped": [{"reason": "too_long", "rows": 40}],
            "digest": DIGEST,
            "reportUri": "file:///report.json",
            "reportPageUri": "file:///report.html",
        },
    },
}
REFUSED: dict[str, Any] = {"exit": 11, "result": {"fault": "BrokenRow", "args": {"file": "a.jsonl", "row": 7}}}
TRANSIENT: dict[str, Any] = {"exit": 31, "result": {"fault": "StorageUnavailable", "args": {"uri": "s3://x/y"}}}
INTERRUPTED: dict[str, Any] = {"exit": 30, "waits": True, "result": {"fault": "Interrupted", "step": 7}}


class Play:
    """A job file, its work folder, and the parts that stages play in it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "job.yaml"
        job = spec_cases.base()
        job["spec"]["output"]["uri"] = f"file://{folder}/out"
        self.file.write_text(json.dumps(job))
        self.job = job
        self.work = local.default_work_dir(self.file, job)
        self.work.mkdir(parents=True)
        self.artifact = self.work / "adapter"
        self.said = ""

    def run(self, **parts: dict[str, Any]) -> int:
        (self.work / "play.json").write_text(json.dumps({name.replace("_", "-"): part for name, part in parts.items()}))
        output = io.StringIO()
        try:
            return run.run(self.file, None, Console(file=output, width=200))
        finally:
            self.said = output.getvalue()

    def played(self) -> list[str]:
        lines = (self.work / "played").read_text().splitlines()
        return [f"{stage}-{attempt}" for stage, attempt, *_ in map(json.loads, lines)]

    def committed(self) -> dict[str, Any]:
        self.artifact.mkdir(exist_ok=True)
        sample = {"prompt": "[Hi]?", "base": {"text": "Um.\n\n\x1b[2J"}, "tuned": {"text": "Hello!"}}
        (self.artifact / "eval.json").write_text(json.dumps({"samples": [sample]}))
        artifact = {
            "type": "Adapter",
            "uri": f"file://{self.artifact}",
            "digest": DIGEST,
            "manifestUri": "file:///m.json",
            "rank": 8,
        }
        metrics = {"evalLoss": 1.5, "baseEvalLoss": 2.25}
        result = {"fault": "Committed", "artifact": artifact, "metrics": metrics, "log_uri": "file:///log"}
        return {"exit": 0, "result": result}


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    script = tmp_path / "stage.py"
    script.write_text(STAGE)

    def command(self: stages.StageRun) -> list[str]:
        digest = [self.plan_digest] if self.plan_digest and self.stage is Stage.TRAIN else []
        return [sys.executable, str(script), self.stage.value, str(self.attempt), str(self.config_file), *digest]

    monkeypatch.setattr(stages.StageRun, "command", command)
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.0)
    monkeypatch.setattr(stages, "POLL_S", 0.05)
    return Play(tmp_path)


def test_a_job_is_prepared_and_trained_and_its_end_is_readable(play: Play):
    assert play.run(prepare_1=PREPARED, train_1=play.committed()) == 0
    assert play.played() == ["prepare-1", "train-1"]
    for words in (
        "1,100 rows in 2 files: 1,000 to train on, 60 held out, 40 dropped",
        "too_long",
        "it is absent [so]",
        "1.500 on held-out rows (before training 2.250)",
        "[Hi]?",
        "Um. \ufffd[2J",
        "Hello!",
        f"file://{play.artifact}",
        DIGEST,
        ".job/metrics.jsonl",
    ):
        assert words in play.said


def test_fields_that_only_a_cluster_heeds_are_named(play: Play):
    play.job["spec"] |= {"activeDeadlineSeconds": 60, "suspend": True}
    play.file.write_text(json.dumps(play.job))
    play.run(prepare_1=PREPARED, train_1=play.committed())
    assert "only a cluster heeds spec.suspend, spec.activeDeadlineSeconds" in play.said


@pytest.mark.parametrize("policy", ["PlanOnly", "Manual"])
def test_a_job_that_is_to_be_planned_first_stops_there_and_goes_on_once_it_may(play: Play, policy: str):
    play.job["spec"]["startPolicy"] = policy
    play.file.write_text(json.dumps(play.job))
    assert play.run(prepare_1=PREPARED) == 0
    assert f"startPolicy: {policy} asks, and not trained" in " ".join(play.said.split())
    assert play.run() == 0  # again: nothing new
    play.job["spec"]["startPolicy"] = "Automatic"
    play.file.write_text(json.dumps(play.job))
    assert play.run(train_1=play.committed()) == 0
    assert "as an earlier call prepared it" in play.said


def test_data_and_plan_are_said_in_one_line_each_in_the_words_of_the_events():
    output = io.StringIO()
    data = DataStatus.model_validate({**DATA, "files": 1})
    show.show_prepared(Console(file=output, width=40), data, PlanStatus.model_validate(PLAN))
    lines = output.getvalue().splitlines()
    assert any(re.search(r"^Data .* in 1 file: .* held out, [\d,]+ dropped$", line) for line in lines)
    assert any(re.search(r"^Plan .* learned from$", line) for line in lines)


def test_train_is_given_the_digest_of_the_plan_and_a_session_of_its_own(play: Play):
    play.run(prepare_1=PREPARED, train_1=play.committed())
    stages_played = [json.loads(line) for line in (play.work / "played").read_text().splitlines()]
    assert [arguments for _, _, arguments, _ in stages_played] == [[], [DIGEST]]
    assert all(own_session for *_, own_session in stages_played)


def test_what_may_pass_is_tried_again_and_what_is_final_is_not(play: Play):
    assert play.run(prepare_1=TRANSIENT, prepare_2=PREPARED, train_1=TRANSIENT, train_2=REFUSED) == 11
    assert play.played() == ["prepare-1", "prepare-2", "train-1", "train-2"]
    assert "1 of 3" in play.said
    assert "a.jsonl row 7" in play.said
    assert "train-2.console" in play.said


def test_names_with_brackets_are_no_markup(play: Play, tmp_path: Path):
    transient = {"exit": 31, "result": {"fault": "StorageUnavailable", "args": {"uri": "s3://x/[/y].jsonl"}}}
    folder = tmp_path / "[old]" / "[/]"
    play.work = folder
    folder.mkdir(parents=True)
    output = io.StringIO()
    (folder / "play.json").write_text(json.dumps({"prepare-1": transient, "prepare-2": REFUSED}))
    assert run.run(play.file, folder, Console(file=output, width=200)) == 11
    assert f"works in {folder} and" in output.getvalue()
    assert "s3://x/[/y].jsonl" in output.getvalue()


def test_a_work_folder_of_too_long_a_name_is_said_in_words(play: Play, tmp_path: Path):
    folder = tmp_path / ("x" * 200) / ("y" * 100)
    with pytest.raises(CommandError, match=r"cannot run it, work_dir: String should have at most 256"):
        run.run(play.file, folder, Console(file=io.StringIO()))


def test_retries_end_at_the_limit_of_the_job(play: Play):
    play.job["spec"]["recovery"] = {"maxRetries": 1}
    play.file.write_text(json.dumps(play.job))
    play.work = local.default_work_dir(play.file, play.job)
    play.work.mkdir(parents=True)
    assert play.run(prepare_1=TRANSIENT, prepare_2=TRANSIENT) == 31
    assert play.played() == ["prepare-1", "prepare-2"]


def test_a_stage_that_dies_without_a_word_is_tried_again_and_named(play: Play):
    assert play.run(prepare_1={"exit": 0, "killed": True}, prepare_2=PREPARED, train_1=play.committed()) == 0
    assert "SIGKILL" in play.said


def test_the_same_command_goes_on_and_does_not_prepare_again(play: Play):
    assert play.run(prepare_1=PREPARED, train_1=REFUSED) == 11
    assert play.run(train_2=play.committed()) == 0
    assert play.played() == ["prepare-1", "train-1", "train-2"]


def _rewrite(data: Path) -> None:
    (data / "a.jsonl").write_bytes(jsonl(chats(70)))


def _add(data: Path) -> None:
    (data / "b.jsonl").write_bytes(jsonl(chats(1)))


def _remove(data: Path) -> None:
    (data / "a.jsonl").unlink()


def _leave(data: Path) -> None:
    (data / "notes.txt").write_text("no data")


@pytest.mark.parametrize(
    ("change", "told"), [(_rewrite, "a.jsonl"), (_add, "b.jsonl"), (_remove, "a.jsonl"), (_leave, None)]
)
def test_data_that_changed_since_an_earlier_call_prepared_it_is_told_at_the_end(
    play: Play, tmp_path: Path, change: Callable[[Path], None], told: str | None
):
    put(tmp_path, a_jsonl=jsonl(chats(60)))
    plan = prepare_run(tmp_path / "other", {"datasets": [{"uri": f"file://{tmp_path}/data/"}]}).plan
    play.job["spec"]["datasets"] = [{"uri": f"file://{tmp_path}/data/"}]
    play.file.write_text(json.dumps(play.job))
    play.work = local.default_work_dir(play.file, play.job)
    play.work.mkdir(parents=True)
    play.artifact = play.work / "adapter"
    assert play.run(prepare_1=PREPARED, train_1=play.committed()) == 0
    assert "earlier call" not in play.said
    run_uri = json.loads((play.work / "run.json").read_text())["run_uri"]
    plan_file = Path(run_uri.removeprefix("file://"), ".job", "plan.json")
    plan_file.parent.mkdir(parents=True)
    plan_file.write_text(plan.model_dump_json())
    state = json.loads((play.work / "state.json").read_text())
    (play.work / "state.json").write_text(json.dumps(state | {"plan_digest": plan.digest()}))
    change(tmp_path / "data")
    assert play.run(train_2=play.committed()) == 0
    assert "as an earlier call prepared it" in play.said
    note = f"the data has changed since it was prepared: file://{tmp_path}/data/{told}. This adapter learned from"
    assert (note in play.said) is (told is not None)
    assert ("another metadata.name" in play.said) is (told is not None)


@pytest.mark.parametrize(("below", "code"), [("/.job/plan.json", 0), ("/adapter/manifest.json", 12)])
def test_data_is_prepared_again_when_somebody_has_emptied_the_output(play: Play, below: str, code: int):
    assert play.run(prepare_1=PREPARED, train_1=REFUSED) == 11
    uri = json.loads((play.work / "run.json").read_text())["run_uri"] + below
    gone = {"exit": 12, "result": {"fault": "ObjectNotFound", "args": {"uri": uri, "field": "f"}}}
    assert play.run(train_2=gone, prepare_2=PREPARED, train_3=play.committed()) == code
    again = ["prepare-2", "train-3"] if code == 0 else []
    assert play.played() == ["prepare-1", "train-1", "train-2", *again]
    assert ("prepared again" in play.said) is (code == 0)


def test_a_plan_of_another_release_is_prepared_again_by_the_next_call(play: Play):
    outdated = {"exit": 36, "result": {"fault": "PlanOutdated", "args": {"found": "1", "expected": 2}}}
    assert play.run(prepare_1=PREPARED, train_1=REFUSED) == 11
    assert play.run(train_2=outdated, prepare_2=PREPARED, train_3=play.committed()) == 0
    assert play.played() == ["prepare-1", "train-1", "train-2", "prepare-2", "train-3"]
    assert "another release of the trainer, and no step is finished: prepared again" in play.said


def test_the_state_of_an_earlier_release_is_gone_on_with_and_gets_a_creation_time_that_stays(play: Play):
    path = Path(__file__).parents[1] / "support" / "contract_1" / "state.json"
    earlier = json.loads(path.read_text()) | {"uid": local.local_uid(play.file, play.job)}
    (play.work / "state.json").write_text(json.dumps(earlier | {"of_the_future": 1}))
    assert play.run(train_1=REFUSED) == 11
    assert play.played() == ["train-1"]
    created = json.loads((play.work / "run.json").read_text())["job"]["created_at"]
    assert play.run(train_2=play.committed()) == 0
    assert json.loads((play.work / "run.json").read_text())["job"]["created_at"] == created


def test_what_is_gone_at_once_after_it_was_prepared_ends_the_run(play: Play):
    uri = f"{play.job['spec']['output']['uri']}/{play.work.name}/.job/plan.json"
    gone = {"exit": 12, "result": {"fault": "ObjectNotFound", "args": {"uri": uri, "field": "f"}}}
    assert play.run(prepare_1=PREPARED, train_1=gone) == 12
    assert play.played() == ["prepare-1", "train-1"]


def test_while_data_are_read_a_person_sees_how_much_and_how_long_the_rest_takes() -> None:
    seen = Progress(
        stage=Stage.PREPARE,
        attempt=1,
        activity="Reading",
        rows_read=7,
        bytes_read=905,
        bytes_total=2000,
        eta_seconds=185,
        rows_per_second=3400.2,
    )
    assert show.describe(seen) == "reading, 7 rows, 3,400 rows/s, 45% of data, 3m05s left"
    slow = seen.model_copy(update={"rows_per_second": 0.51})
    assert "0.5 rows/s" in show.describe(slow)


def test_within_a_long_step_a_person_sees_that_it_moves() -> None:
    seen = Progress(stage=Stage.TRAIN, attempt=1, activity="Training", step=0, total_steps=9, step_tokens=12_288)
    assert show.describe(seen) == "training, step 0/9 + 12,288 tokens"
    assert show.describe(seen.model_copy(update={"step": 1, "step_tokens": 0})) == "training, step 1/9"


def test_while_the_start_scores_answers_a_person_sees_how_many_are_done() -> None:
    seen = Progress(stage=Stage.TRAIN, attempt=1, activity="Scoring", answers_scored=300, answers_to_score=1200)
    assert show.describe(seen) == "scoring, 25% of 1,200 answers"
    assert show.describe(seen.model_copy(update={"activity": "Training"})) == "training"


def test_the_preferences_that_a_model_shares_are_in_the_line_of_a_run() -> None:
    seen = Progress(stage=Stage.TRAIN, attempt=1, activity="Training", step=3, total_steps=9, train_loss=0.5)
    told = seen.model_copy(update={"figures": {"reward_accuracy": 0.875, "reward_margin": 0.1}})
    assert show.describe(told) == "training, step 3/9, loss 0.500, reward accuracy 0.88"


def test_bars_on_a_terminal_show_where_a_stage_is():
    output = io.StringIO()
    terminal = Console(file=output, force_terminal=True, width=120)
    with show.StageView(terminal, Stage.TRAIN, 2) as view:
        view.update(
            Progress(stage=Stage.TRAIN, attempt=2, activity="Training", step=3, total_steps=20, train_loss=1.25)
        )
    assert "Training (attempt 2)" in output.getvalue()
    assert "training, step 3/20, loss 1.250" in output.getvalue()


def test_saves_that_fail_are_told_once_and_that_it_is_over_once():
    output = io.StringIO()
    away = Trouble(fault=Fault.ACCESS_DENIED, args={"action": "write", "uri": "s3://b/[x]"}, since=1)
    at = Progress(stage=Stage.TRAIN, attempt=1, activity="Training", step=1, total_steps=9)
    view = show.StageView(Console(file=output, width=60), Stage.TRAIN, 1)
    for trouble in (None, away, away, None, None):
        view.update(at.model_copy(update={"trouble": trouble}))
    assert output.getvalue().count("may not write s3://b/[x]") == 1
    assert output.getvalue().count("safe again") == 1


def test_a_divergence_is_told_in_red_while_it_trains_and_once():
    output = io.StringIO()
    at = Progress(stage=Stage.TRAIN, attempt=1, activity="Training", step=11, total_steps=20)
    diverging = Quality(concerns=[Reason.DIVERGING], first_train_loss=3.25, steps_above_start=10)
    view = show.StageView(Console(file=output, force_terminal=True, width=200, highlight=False), Stage.TRAIN, 1)
    for quality in (None, diverging, diverging):
        view.update(at.model_copy(update={"quality": quality}))
    assert output.getvalue().count("far above 3.250, where it began, for at least 10 steps") == 1
    assert "\x1b[1;31mDiverging" in output.getvalue()


def _send_once_the_stage_waits(play: Play, number: signal.Signals) -> threading.Thread:
    def interrupt() -> None:
        until((play.work / "waiting").exists, "the stage waits")
        os.kill(os.getpid(), number)

    asker = threading.Thread(target=interrupt)
    asker.start()
    return asker


def test_ctrl_c_asks_for_a_checkpoint_and_the_next_call_goes_on(play: Play):
    with disposition(signal.SIGINT, signal.default_int_handler):
        asker = _send_once_the_stage_waits(play, signal.SIGINT)
        assert play.run(prepare_1=PREPARED, train_1=INTERRUPTED) == Exit.INTERRUPTED
        asker.join()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "Ctrl-C again stops at once" in play.said
    assert "Stopped at step 7" in play.said
    assert play.run(train_2=play.committed()) == 0


def test_a_stage_that_did_not_end_in_time_is_not_said_to_have_lost_its_checkpoints(play: Play):
    killed: dict[str, Any] = {"exit": 30, "waits": True, "result": {"fault": "Stopped"}}
    with disposition(signal.SIGINT, signal.default_int_handler):
        asker = _send_once_the_stage_waits(play, signal.SIGINT)
        assert play.run(prepare_1=PREPARED, train_1=killed) == Exit.INTERRUPTED
        asker.join()
    assert "Stopped; the same command goes on from the last checkpoint, if one was saved" in play.said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_run_in_the_background_goes_on_without_its_terminal(play: Play, number: signal.Signals):
    """`nohup` ignores SIGHUP, and a shell ignores SIGINT for what it starts with `&`."""
    with disposition(number, signal.SIG_IGN):
        assert play.run(prepare_1={**PREPARED, "sends": number}, train_1=play.committed()) == 0
        assert signal.getsignal(number) == signal.SIG_IGN
    assert play.played() == ["prepare-1", "train-1"]
    assert "Stopping" not in play.said


def test_a_run_that_cannot_hear_ctrl_c_says_what_stops_it_and_that_does(play: Play):
    with disposition(signal.SIGINT, signal.SIG_IGN), disposition(signal.SIGTERM, signal.SIG_IGN):
        asker = _send_once_the_stage_waits(play, signal.SIGTERM)
        assert play.run(prepare_1=PREPARED, train_1=INTERRUPTED) == Exit.INTERRUPTED
        asker.join()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    assert f"`kill {os.getpid()}` stops it once what is done is saved" in play.said
    assert f"`kill {os.getpid()}` again stops at once" in play.said
    assert "Stopped at step 7" in play.said


def test_two_runs_of_a_job_do_not_mix(play: Play):
    with local.locked(play.work), pytest.raises(CommandError, match="running already") as refused:
        play.run()
    assert refused.value.code == Exit.USAGE


def test_a_refused_job_starts_nothing(play: Play):
    play.job["spec"]["hyperparameters"] = {"epochs": 1, "maxSteps": 2}
    play.file.write_text(json.dumps(play.job))
    with pytest.raises(CommandError, match="either epochs or maxSteps, not both") as refused:
        play.run()
    assert refused.value.code == Exit.USAGE


def test_a_work_folder_of_another_job_is_refused(play: Play, tmp_path: Path):
    play.run(prepare_1=REFUSED)
    play.job["spec"]["hyperparameters"] = {"seed": 1}
    play.file.write_text(json.dumps(play.job))
    with pytest.raises(CommandError, match="belongs to another job"):
        run.run(play.file, play.work, Console(file=io.StringIO()))


def test_progress_is_read_from_the_port_that_the_stage_chose(play: Play):
    progress = Progress(stage=Stage.TRAIN, attempt=1, activity="Training", step=3, total_steps=20, train_loss=1.25)
    part = INTERRUPTED | {"progress": json.loads(progress.model_dump_json())}
    config = local.run_config(play.job, local.State(uid="0" * 36), play.work, local.Machine(2, GIB, GIB, 0), {})
    (play.work / "run.json").write_text(config.to_json())
    (play.work / "play.json").write_text(json.dumps({"train-1": part}))
    seen: list[Progress] = []
    with stages.Stop(lambda times: None) as stop, (play.work / "lock").open("w") as lock:

        def on_progress(found: Progress) -> None:
            seen.append(found)
            if not stop.requested:
                os.kill(os.getpid(), signal.SIGTERM)

        stage_run = stages.StageRun(
            config, play.work / "run.json", Stage.TRAIN, 1, None, play.work / "log", lock.fileno()
        )
        result = stages.run_stage(stage_run, stop, on_progress)
    assert seen[0] == progress
    assert result.exit_code == 30
    assert (play.work / "log").read_text() == "a line of the stage\n"


@pytest.mark.parametrize("text", ["", "12", "x\n", "1\n"])
def test_a_port_file_that_leads_nowhere_is_no_progress(tmp_path: Path, text: str):
    (tmp_path / PORT_FILE).write_text(text)
    assert stages.read_progress(tmp_path / PORT_FILE) is None


def test_the_entrypoint_is_the_one_of_the_image(tmp_path: Path):
    config = local.run_config(spec_cases.base(), local.State(uid="0" * 36), tmp_path, local.Machine(2, GIB, GIB, 0), {})
    stage_run = stages.StageRun(config, tmp_path / "run.json", Stage.TRAIN, 2, DIGEST, tmp_path / "log", 0)
    assert stage_run.command()[1:] == [
        *("-P", "-m", "finetune_trainer.supervisor", "train", "--config", str(tmp_path / "run.json")),
        *("--attempt", "2", "--plan-digest", DIGEST),
    ]
    done = subprocess.run(
        [*stage_run.command()[:5], "--help"], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert "--config" in done.stdout


MACHINE = local.Machine(cpu_count=8, memory_bytes=64 * GIB, disk_bytes=100 * GIB, gpus=1)


def configured(env: dict[str, str] | None = None, **parts: Any) -> RunConfig:
    job = spec_cases.base()
    job["spec"] |= parts
    state = local.State(uid="1a2b3c4d-0000-0000-0000-000000000000", created_at=datetime(2026, 1, 1, tzinfo=UTC))
    return local.run_config(job, state, Path("/w"), MACHINE, env or {})


def test_absent_resources_are_those_of_the_machine_and_written_ones_win():
    assert configured().resources.model_dump() == {
        "cpu_count": 8.0,
        "memory_bytes": 64 * GIB,
        "disk_bytes": 100 * GIB,
        "gpus": 1,
    }
    asked = configured(resources={"cpu": "500m", "memory": "4Gi", "disk": "5Gi", "gpusPerNode": 0}).resources
    assert asked.model_dump() == {"cpu_count": 0.5, "memory_bytes": 4 * GIB, "disk_bytes": 5 * GIB, "gpus": 0}


def test_a_gpu_that_this_machine_does_not_have_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(globals(), "MACHINE", replace(MACHINE, gpus=0))
    assert configured().resources.gpus == 0
    with pytest.raises(CommandError, match="gpusPerNode: 0"):
        configured(resources={"gpusPerNode": 1})


def test_prepare_has_resources_of_its_own_and_no_gpu():
    config = configured(resources={"memory": "4Gi", "prepare": {"memory": "3Gi", "disk": "2Gi"}})
    assert config.prepare_resources == RunResources(cpu_count=8, memory_bytes=3 * GIB, disk_bytes=2 * GIB, gpus=0)
    assert config.resources.memory_bytes == 4 * GIB


def test_no_more_is_planned_with_than_this_machine_has():
    config = configured(resources={"cpu": 64, "memory": "1Ti", "disk": "2Ti", "prepare": {"disk": "3Ti"}})
    assert config.resources.model_dump() == configured().resources.model_dump()
    assert config.prepare_resources == configured().prepare_resources


@pytest.mark.parametrize(
    ("storage", "env", "endpoint", "region", "path_style"),
    [
        (None, {}, None, "us-east-1", False),
        ({"endpoint": "http://s3.demo.svc:7070"}, {}, "http://s3.demo.svc:7070", "us-east-1", True),
        (
            {"endpoint": "http://s3.demo.svc:7070"},
            {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1"},
            "http://127.0.0.1:1",
            "us-east-1",
            True,
        ),
        ({"region": "eu-central-1", "pathStyle": False}, {}, None, "eu-central-1", False),
        (None, {"AWS_REGION": "eu-west-1"}, None, "eu-west-1", False),
    ],
)
def test_storage_is_reached_as_this_machine_reaches_it(
    storage: dict[str, Any] | None, env: dict[str, str], endpoint: str | None, region: str, path_style: bool
):
    found = configured(env, **({"storage": storage} if storage else {})).storage
    assert (found.endpoint, found.region, found.path_style) == (endpoint, region, path_style)
    assert found.credentials_dir is None


def test_the_configuration_reads_back_as_the_trainer_reads_it():
    config = configured()
    assert RunConfig.model_validate_json(config.to_json()) == config
    assert config.run_uri == "s3://adapters/bot/bot-1a2b3"
    assert config.http_port == 0


def test_a_job_is_known_again_by_file_name_and_spec(tmp_path: Path):
    job = spec_cases.base()
    uid = local.local_uid(tmp_path / "a.yaml", job)
    assert local.local_uid(tmp_path / "x/../a.yaml", job) == uid
    assert local.local_uid(tmp_path / "b.yaml", job) != uid
    suspended = {**job, "spec": job["spec"] | {"suspend": True}}
    assert local.local_uid(tmp_path / "a.yaml", suspended) == uid
    changed = {**job, "spec": job["spec"] | {"hyperparameters": {"seed": 1}}}
    assert local.local_uid(tmp_path / "a.yaml", changed) != uid


def test_what_speaks_against_the_model_is_said_in_red_beside_the_adapter(play: Play) -> None:
    committed = play.committed()
    quality = {"concerns": ["WorseThanStart"], "held_out_rows": 39, "start_loss": 3.19, "loss": 28.0}
    committed["result"]["quality"] = quality
    assert play.run(prepare_1=PREPARED, train_1=committed) == Exit.SUCCEEDED
    assert "WorseThanStart on 39 held-out rows the loss is 28.000" in play.said
    assert "verified" not in play.said
    output = io.StringIO()
    show.show_quality(
        Console(file=output, force_terminal=True, color_system="standard"), Quality.model_validate(quality)
    )
    assert output.getvalue().startswith("\x1b[1;31mWorseThanStart")


def test_a_model_that_was_not_measured_is_not_passed_over_in_silence(play: Play) -> None:
    committed = play.committed()
    committed["result"]["quality"] = {}
    play.run(prepare_1=PREPARED, train_1=committed)
    assert "no rows were held out" in play.said
