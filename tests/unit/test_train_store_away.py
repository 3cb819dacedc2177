"""A store that is away, denies, or is another writer's, while a run trains, stops, and after it has committed."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from away_store import NAME, RUN_URI, hurry, run_in_bucket
from finetune_api.errors import StageError
from finetune_api.layout import CHECKPOINTS, METRICS
from finetune_api.reasons import Fault
from finetune_trainer import checkpoint, commit, export, patience, train
from finetune_trainer.loop import Stepper
from finetune_trainer.serve import Reporter
from finetune_trainer.stop import StopFlag
from stub_s3 import StubS3, Trouble
from tiny_run import context

AWAY = Trouble("PUT", status=503, code="SlowDown", name=CHECKPOINTS, lasts=True)
DENIED = Trouble("PUT", status=403, code="AccessDenied", name=CHECKPOINTS, lasts=True)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def at_step(monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[], Any]]) -> None:
    """Run an action before the step of its number."""
    original = Stepper.run

    def run_and_act(self: Stepper, number: int) -> torch.Tensor:
        if number in actions:
            actions[number]()
        return original(self, number)

    monkeypatch.setattr(Stepper, "run", run_and_act)


def save_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A save is due, and is waited for, after every step: nothing depends on how fast this machine is."""
    original = checkpoint.Checkpointer.start

    def start(self: checkpoint.Checkpointer, saved: checkpoint.Snapshot) -> None:
        original(self, saved)
        self.close(60)

    monkeypatch.setattr(checkpoint.Checkpointer, "start", start)
    monkeypatch.setattr(checkpoint.Checkpointer, "is_due", lambda _self: True)  # pyright: ignore[reportUnknownLambdaType]


def checkpoints(server: StubS3) -> list[str]:
    found = (name for name in server.objects if CHECKPOINTS in name and name.endswith("manifest.json"))
    return sorted(name.split("/")[-2] for name in found)


@pytest.mark.parametrize(
    ("trouble", "fault"), [(AWAY, Fault.STORAGE_UNAVAILABLE), (DENIED, Fault.ACCESS_DENIED)], ids=["away", "denied"]
)
def test_saves_that_fail_do_not_end_training_and_are_told_until_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Trouble, fault: Fault
) -> None:
    seen: list[Any] = []
    with run_in_bucket(tmp_path, steps=6) as (run, server):
        ctx = context(run)
        save_every_step(monkeypatch)
        at_step(
            monkeypatch,
            {
                1: lambda: server.troubles.append(trouble),
                4: lambda: (seen.append(ctx.reporter.progress().trouble), server.troubles.remove(trouble)),
                5: lambda: seen.append(ctx.reporter.progress()),
            },
        )
        result = train.run(ctx, StopFlag(60))
    assert (result.exit_code, result.step) == (0, 6)
    told, after = seen
    assert told.fault is fault
    assert CHECKPOINTS in told.args["uri"]
    assert after.trouble is None
    assert after.checkpoint.step == 5
    failures = ctx.reporter.registry.get_sample_value("finetune_train_checkpoint_failures_total")
    assert failures == 3, "after the steps 2 to 4"


def test_a_store_away_for_longer_than_the_bound_ends_the_attempt_after_a_last_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "MAX_AWAY_S", 0.0)  # the first try is the last
    with run_in_bucket(tmp_path) as (run, server):
        save_every_step(monkeypatch)
        at_step(monkeypatch, {3: lambda: server.troubles.append(DENIED)})
        with pytest.raises(StageError) as caught:
            train.run(context(run), StopFlag(60))
        assert checkpoints(server)[-1].startswith("00000003")
    assert (caught.value.fault, caught.value.exit_code) == (Fault.ACCESS_DENIED, 13)


def test_a_newer_writer_ends_the_attempt_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    with run_in_bucket(tmp_path) as (run, _server):
        save_every_step(monkeypatch)
        newer = {4: lambda: commit.raise_epoch(run.store, RUN_URI, 2, "another pod")}
        at_step(monkeypatch, newer | {number: lambda n=number: steps.append(n) for number in range(5, 12)})
        with pytest.raises(StageError) as caught:
            train.run(context(run), StopFlag(60))
    assert (caught.value.fault, caught.value.exit_code) == (Fault.SUPERSEDED, 34)
    assert steps == []


def test_a_last_checkpoint_that_cannot_be_saved_is_done_without(tmp_path: Path) -> None:
    with run_in_bucket(tmp_path, steps=3) as (run, server):
        server.troubles = [DENIED]
        result = train.run(context(run), StopFlag(60))
        assert checkpoints(server) == []
    assert (result.fault, result.checkpoint) == (Fault.COMMITTED, None)


@pytest.mark.parametrize("lasts", [False, True])
def test_a_stop_while_the_store_is_away_is_used_for_saving_as_long_as_there_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lasts: bool
) -> None:
    stop = StopFlag(5 if lasts else 120)  # 1.25 s for the checkpoint, or plenty
    with run_in_bucket(tmp_path) as (run, server):
        times = [Trouble("PUT", status=503, code="SlowDown", name=CHECKPOINTS)] * 5  # three saves of two tries each
        at_step(monkeypatch, {4: lambda: (server.troubles.extend([AWAY] if lasts else times), stop.set())})
        ctx = context(run)
        with pytest.raises(StageError) as caught:
            train.run(ctx, stop)
        saved = checkpoints(server)
    assert caught.value.fault is (Fault.STOPPED if lasts else Fault.INTERRUPTED)
    assert saved == ([] if lasts else ["00000005-1"])


def before_the_upload(monkeypatch: pytest.MonkeyPatch, action: Callable[[], Any]) -> None:
    upload = export.upload

    def act_and_upload(*args: Any) -> Any:
        action()
        return upload(*args)

    monkeypatch.setattr(export, "upload", act_and_upload)


def test_a_stop_during_the_upload_saves_the_last_step_that_could_not_be_saved_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopFlag(120)
    with run_in_bucket(tmp_path, steps=3) as (run, server):
        server.troubles = [DENIED]
        before_the_upload(monkeypatch, lambda: (server.troubles.clear(), stop.set()))
        assert train.run(context(run), stop).fault is Fault.COMMITTED
        saved = checkpoints(server)
    assert saved == ["00000003-1"], "had the time to stop ended during the upload, three steps would be lost"


def test_a_stop_during_the_upload_where_no_checkpoint_can_be_saved_still_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopFlag(120)
    with run_in_bucket(tmp_path, steps=3) as (run, server):
        server.troubles = [DENIED]
        # The end of all patience is no end of what can commit.
        before_the_upload(monkeypatch, lambda: (monkeypatch.setattr(patience, "MAX_AWAY_S", 0.0), stop.set()))
        assert train.run(context(run), stop).fault is Fault.COMMITTED
        assert checkpoints(server) == []


def test_a_stop_whose_time_ends_during_the_upload_promises_no_step_that_is_in_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [0.0]
    stop = StopFlag(120, clock=lambda: now_s[0])
    with run_in_bucket(tmp_path, steps=3) as (run, server):
        server.troubles = [DENIED]
        before_the_upload(monkeypatch, lambda: (stop.set(), now_s.__setitem__(0, 1e6)))
        with pytest.raises(StageError) as caught:
            train.run(context(run), stop)
        assert checkpoints(server) == []
    assert caught.value.fault is Fault.STOPPED, "Interrupted says that training goes on from step 3"


def test_a_failed_save_hides_no_step_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touches: list[str | None] = []
    touch = Reporter.touch

    def touch_and_tell(self: Reporter, while_activity: str | None = None) -> None:
        if threading.current_thread().name == "checkpoint":
            touches.append(while_activity)
        touch(self, while_activity)

    monkeypatch.setattr(Reporter, "touch", touch_and_tell)
    with run_in_bucket(tmp_path, steps=4) as (run, server):
        save_every_step(monkeypatch)
        at_step(monkeypatch, {1: lambda: server.troubles.append(AWAY), 3: lambda: server.troubles.clear()})
        train.run(context(run), StopFlag(60))
    assert set(touches) == {"Saving"}, "anything else counts as progress of the step that runs meanwhile"


def test_the_adapter_is_uploaded_once_the_store_is_back_and_what_was_there_is_known_as_ones_own(tmp_path: Path) -> None:
    with run_in_bucket(tmp_path, steps=3) as (run, server):
        away = Trouble("PUT", status=503, code="SlowDown", name="/adapter/")
        lost = [
            Trouble("PUT", lose_answer=True, name="adapter_model"),
            Trouble("PUT", status=503, name="adapter_model"),
        ]
        server.troubles = [*[away] * 3, *lost, *[Trouble("PUT", status=503, code="SlowDown", name="_COMMITTED")] * 3]
        result = train.run(context(run), StopFlag(60))
        assert result.artifact is not None
        assert result.artifact.uri == f"{RUN_URI}/adapter/"
        assert commit.read_commit(run.store, RUN_URI) is not None


def test_what_arrives_damaged_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "MAX_AWAY_S", 0.0)
    with run_in_bucket(tmp_path, steps=3) as (run, server):
        size = len((run.folder / "model" / "tokenizer.json").read_bytes())
        server.troubles = [Trouble("PUT", name="/adapter/tokenizer.json", then_write=b"x" * size)]
        with pytest.raises(StageError) as caught:
            train.run(context(run), StopFlag(60))
        assert caught.value.fault is Fault.CORRUPT_TRANSFER
        assert commit.read_commit(run.store, RUN_URI) is None


def test_denied_deletes_end_nothing_nor_does_a_store_that_takes_no_writes_after_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denied = [Trouble(method, status=403, code="AccessDenied", lasts=True) for method in ("DELETE", "PUT", "POST")]
    with run_in_bucket(tmp_path, keep_last=1, steps=4) as (run, server):
        save_every_step(monkeypatch)
        server.troubles = [denied[0], replace(denied[1], name="latest.json")]
        first = train.run(context(run), StopFlag(60))
        assert len(checkpoints(server)) == 4, "all are kept, as none may be removed"
        server.troubles = denied
        second = train.run(context(run, attempt=2), StopFlag(60))
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert second.artifact == first.artifact


def test_a_store_that_is_away_after_the_commit_fails_no_job(tmp_path: Path) -> None:
    away = Trouble("DELETE", status=503, code="SlowDown", lasts=True)
    with run_in_bucket(tmp_path, steps=3) as (run, server):
        server.troubles = [away, replace(away, method="GET", name="latest.json")]
        assert train.run(context(run), StopFlag(60)).fault is Fault.COMMITTED


def test_a_bug_after_the_commit_fails_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(commit, "move_latest", fail)
    monkeypatch.setattr("finetune_trainer.serve.Reporter.progress", _broken_when_done)
    with run_in_bucket(tmp_path, steps=3) as (run, _server):
        assert train.run(context(run), StopFlag(60)).fault is Fault.COMMITTED


def _broken_when_done(self: Any) -> Any:
    from finetune_api.run import Progress

    fields = self._fields
    return Progress.model_validate(fields | ({"step": -1} if fields["activity"] == "Done" else {}))


def test_metrics_that_may_not_be_read_or_written_end_nothing_and_are_not_written_over(tmp_path: Path) -> None:
    with run_in_bucket(tmp_path, steps=3) as (run, server):
        server.objects[f"{NAME}/{METRICS}"] = b'{"step": 1, "loss": 1}\n'
        server.troubles = [Trouble("GET", status=403, code="AccessDenied", name=METRICS, lasts=True)]
        assert train.run(context(run), StopFlag(60)).exit_code == 0
        assert server.objects[f"{NAME}/{METRICS}"] == b'{"step": 1, "loss": 1}\n'
        assert len(server.objects[f"{NAME}/.job/metrics-1.jsonl"].splitlines()) > 3
