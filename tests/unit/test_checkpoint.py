"""Checkpoints count only when whole, belong to one plan, and can only be written by the newest attempt."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finetune_api.errors import StageError
from finetune_api.layout import CHECKPOINTS, join
from finetune_api.reasons import Fault
from finetune_api.run import StorageConfig
from finetune_api.status import CheckpointStatus
from finetune_trainer import checkpoint
from finetune_trainer.checkpoint import Checkpointer, Position, Snapshot, newest, restore, snapshot
from finetune_trainer.commit import Fence, publish_manifest, raise_epoch
from finetune_trainer.evaluate import HeldOut
from finetune_trainer.loop import ADAM_BETAS
from finetune_trainer.patience import FailedTries
from finetune_trainer.stop import StopFlag
from finetune_trainer.store import Store, open_store
from waiting import PATIENCE_S

PLAN, OTHER_PLAN = "sha256:" + "1" * 64, "sha256:" + "2" * 64
BASE = {"model.safetensors": "sha256:" + "3" * 64}


class Saved:
    """A run's folder with a small trained state to save."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store: Store = open_store(StorageConfig())
        self.run_uri = f"file://{folder}/run"
        torch.manual_seed(0)
        self.parameters = {name: nn.Parameter(torch.randn(3, 2)) for name in ("a", "b")}
        self.troubles: list[FailedTries | None] = []
        self.optimizer = torch.optim.AdamW(self.parameters.values(), betas=ADAM_BETAS, fused=True)
        self.train()

    def train(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = torch.randn(3, 2)
        self.optimizer.step()

    def checkpointer(
        self,
        attempt: int = 1,
        keep_last: int = 3,
        resumed_from: CheckpointStatus | None = None,
        plan: str = PLAN,
        before_publishing: Callable[[], None] = lambda: None,
        base: dict[str, str] | None = None,
    ) -> Checkpointer:
        fence = raise_epoch(self.store, self.run_uri, attempt, f"pod-{attempt}")
        scratch = self.folder / "out"
        return Checkpointer(
            self.store,
            fence,
            self.run_uri,
            plan_digest=plan,
            base_files=base or BASE,
            scratch=scratch,
            keep_last=keep_last,
            interval_s=600,
            resumed_from=resumed_from,
            before_publishing=before_publishing,
            on_saved=lambda _status, _write_s, _upload_s: None,
            on_trouble=self.troubles.append,
        )

    def snapshot(self, step: int) -> Snapshot:
        position = Position(
            step=step,
            tokens=step * 10,
            label_tokens=step,
            evaluations=[HeldOut(step=0, loss=2.5, rows=1, label_tokens=3)],
            first_started_at=1.0,
        )
        return snapshot(self.parameters, self.optimizer, position)

    def save(self, checkpointer: Checkpointer, step: int) -> None:
        checkpointer.start(self.snapshot(step))
        checkpointer.wait()

    def newest(self, plan: str = PLAN, base: dict[str, str] | None = None) -> checkpoint.Restored | None:
        return newest(self.store, self.run_uri, plan, base or BASE, self.folder / "in")

    def steps(self) -> list[int]:
        return [step for step, _, _ in checkpoint.manifests(self.store, self.run_uri)]

    def path(self, step: int, epoch: int, name: str) -> Path:
        return Path(join(checkpoint.folder_uri(self.run_uri, step, epoch), name).removeprefix("file://"))


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return Saved(tmp_path)


def test_a_restored_checkpoint_goes_on_with_the_same_bits(saved: Saved, tmp_path: Path) -> None:
    saved.save(saved.checkpointer(), 7)
    found = saved.newest()
    assert found is not None
    assert (found.status.step, found.snapshot.position.tokens) == (7, 70)
    other = Saved(tmp_path / "other")
    for parameter in other.parameters.values():
        parameter.data.zero_()
    restore(found.snapshot, other.parameters, other.optimizer)
    for state in (saved, other):
        torch.manual_seed(5)
        state.train()
    for name, parameter in saved.parameters.items():
        assert torch.equal(parameter, other.parameters[name])


def test_a_snapshot_does_not_change_while_training_goes_on(saved: Saved) -> None:
    position = Position(step=1, tokens=0, label_tokens=0, first_started_at=0.0)
    copied = snapshot(saved.parameters, saved.optimizer, position)
    before = {name: tensor.clone() for name, tensor in copied.tensors.items()}
    saved.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in copied.tensors.items())
    assert not torch.equal(saved.parameters["a"], before["adapter.a"])


def test_nothing_saved_means_a_start_at_step_0(saved: Saved) -> None:
    assert saved.newest() is None


@pytest.mark.parametrize("damage", ["flipped bit", "missing part", "no manifest", "cut manifest", "cut state"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(saved: Saved, damage: str) -> None:
    checkpointer = saved.checkpointer()
    saved.save(checkpointer, 5)
    saved.save(checkpointer, 9)
    tensors, manifest = saved.path(9, 1, checkpoint.TENSORS), saved.path(9, 1, checkpoint.MANIFEST)
    match damage:
        case "flipped bit":
            content = bytearray(tensors.read_bytes())
            content[-1] ^= 1
            tensors.write_bytes(content)
        case "missing part":
            tensors.unlink()
        case "no manifest":  # killed while it was saved
            manifest.unlink()
        case "cut manifest":
            manifest.write_bytes(manifest.read_bytes()[:40])
        case _:
            saved.path(9, 1, checkpoint.STATE).write_text("{")
    found = saved.newest()
    assert found is not None
    assert found.status.step == 5


def test_checkpoints_of_which_none_is_whole_are_an_error_and_no_fresh_start(saved: Saved) -> None:
    checkpointer = saved.checkpointer()
    for step in (5, 9):
        saved.save(checkpointer, step)
        saved.path(step, 1, checkpoint.TENSORS).write_bytes(b"")
    with pytest.raises(StageError, match="none of the 2 checkpoints") as caught:
        saved.newest()
    assert (caught.value.fault, caught.value.exit_code) == (Fault.NO_VALID_CHECKPOINT, 18)


def test_a_checkpoint_of_another_plan_is_refused(saved: Saved) -> None:
    saved.save(saved.checkpointer(), 5)
    with pytest.raises(StageError, match="the plan differs from what step 5") as caught:
        saved.newest(OTHER_PLAN)
    assert (caught.value.fault, caught.value.exit_code) == (Fault.CONFIG_CHANGED, 10)


def test_a_checkpoint_of_another_base_model_is_refused_and_the_file_is_named(saved: Saved) -> None:
    checkpointer = saved.checkpointer()
    saved.save(checkpointer, 5)
    with pytest.raises(StageError, match=r"model\.safetensors of the base model changed") as caught:
        saved.newest(base={"model.safetensors": "sha256:" + "4" * 64})
    assert (caught.value.fault, caught.value.exit_code) == (Fault.MODEL_CHANGED, 22)
    assert saved.newest(base={**BASE, "a_file_more.json": "sha256:" + "5" * 64}) is not None


@pytest.mark.parametrize("change", ["name", "shape"])
def test_a_checkpoint_of_other_weights_is_refused(saved: Saved, change: str) -> None:
    saved.save(saved.checkpointer(), 5)
    found = saved.newest()
    assert found is not None
    parameters = dict(saved.parameters)
    if change == "name":
        parameters["c"] = parameters.pop("b")
    else:
        parameters["b"] = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(StageError) as caught:
        restore(found.snapshot, parameters, saved.optimizer)
    assert caught.value.fault is Fault.CONFIG_CHANGED


def test_the_newest_are_kept_and_the_one_resumed_from_always(saved: Saved) -> None:
    first = saved.checkpointer(attempt=1)
    for step in (2, 4):
        saved.save(first, step)
    found = saved.newest()
    assert found is not None
    second = saved.checkpointer(attempt=2, keep_last=2, resumed_from=found.status)
    for step in (6, 8, 10):
        saved.save(second, step)
    assert saved.steps() == [10, 8, 4]
    checkpoint.keep_newest(saved.store, Fence(saved.store, saved.run_uri, 2), saved.run_uri, StopFlag(60))
    assert saved.steps() == [10]
    left = {Path(info.uri).parent.name for info in saved.store.list(join(saved.run_uri, CHECKPOINTS, ""))}
    assert left == {"00000010-2"}


def test_a_damaged_checkpoint_of_a_later_step_does_not_push_out_the_good_ones(saved: Saved) -> None:
    first = saved.checkpointer(attempt=1)
    saved.save(first, 2)
    saved.save(first, 9)
    saved.path(9, 1, "state.safetensors").write_bytes(b"damaged")
    found = saved.newest()
    assert found is not None
    second = saved.checkpointer(attempt=2, keep_last=1, resumed_from=found.status)
    for step in (4, 6):
        saved.save(second, step)
    assert saved.steps() == [9, 6, 2]
    again = saved.newest()
    assert again is not None
    assert again.status.step == 6


def test_a_held_out_loss_that_is_no_number_does_not_spoil_the_checkpoint(saved: Saved) -> None:
    position = Position(
        step=3,
        tokens=1,
        label_tokens=1,
        evaluations=[HeldOut(step=0, loss=float(loss), rows=1, label_tokens=1) for loss in ("nan", "inf", "1.5")],
        first_started_at=1.0,
    )
    checkpointer = saved.checkpointer()
    checkpointer.start(snapshot(saved.parameters, saved.optimizer, position))
    checkpointer.wait()
    found = saved.newest()
    assert found is not None
    assert [str(evaluation.loss) for evaluation in found.snapshot.position.evaluations] == ["nan", "inf", "1.5"]


def test_a_superseded_attempt_publishes_nothing(saved: Saved) -> None:
    old = saved.checkpointer(attempt=1)
    saved.save(old, 3)
    new = saved.checkpointer(attempt=2)
    saved.save(new, 4)
    with pytest.raises(StageError) as caught:
        saved.save(old, 5)
    assert (caught.value.fault, caught.value.exit_code) == (Fault.SUPERSEDED, 34)
    assert saved.steps() == [4, 3]


def test_a_save_that_the_disk_refuses_is_tried_again_and_the_next_one_counts(saved: Saved) -> None:
    checkpointer = saved.checkpointer()
    (saved.folder / "out").write_text("a file where a folder is needed")
    saved.save(checkpointer, 1)
    assert checkpointer.trouble is not None
    assert "could not write a checkpoint on the local disk" in str(checkpointer.trouble.error)
    assert not checkpointer.is_due(), "only after a pause"
    (saved.folder / "out").unlink()
    saved.save(checkpointer, 2)
    assert (checkpointer.trouble, saved.steps()) == (None, [2])
    assert [trouble and trouble.tries for trouble in saved.troubles] == [1, None]


def test_a_bug_in_a_save_ends_the_attempt_at_the_next_check(saved: Saved) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    checkpointer = saved.checkpointer(before_publishing=fail)
    checkpointer.start(saved.snapshot(1))
    checkpointer.close(PATIENCE_S)
    with pytest.raises(ZeroDivisionError):
        checkpointer.check()


def publish_without_answer(*arguments: Any) -> str:
    publish_manifest(*arguments)
    raise StageError(Fault.STORAGE_UNAVAILABLE, action="write", uri="u", tries=12, seconds=1, problem="p")


def save_without_answer(
    saved: Saved, checkpointer: checkpoint.Checkpointer, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "publish_manifest", publish_without_answer)
        saved.save(checkpointer, step)


def test_a_save_that_was_published_although_its_answer_was_lost_is_not_written_again(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = saved.checkpointer()
    save_without_answer(saved, checkpointer, 5, monkeypatch)
    before = saved.path(5, 1, checkpoint.TENSORS).stat()
    saved.train()
    saved.save(checkpointer, 5)
    after = saved.path(5, 1, checkpoint.TENSORS).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    found = saved.newest()
    assert found is not None
    assert checkpointer.last == found.status


def test_a_save_that_was_published_although_its_answer_was_lost_is_kept_after_the_next(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = saved.checkpointer()
    save_without_answer(saved, checkpointer, 5, monkeypatch)
    saved.save(checkpointer, 7)
    assert saved.steps() == [7, 5]


def test_a_stop_does_not_wait_for_old_checkpoints_to_be_removed(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    tidying, over = threading.Event(), threading.Event()

    def hang(_self: Checkpointer, _step: int) -> None:
        tidying.set()
        over.wait(PATIENCE_S)

    monkeypatch.setattr(Checkpointer, "_retain", hang)
    checkpointer, now_s = saved.checkpointer(), [0.0]
    stop = StopFlag(60, clock=lambda: now_s[0])
    checkpointer.start(saved.snapshot(7))
    assert tidying.wait(PATIENCE_S)
    stop.set()
    for now_s[0] in (0.0, 1e6):  # with time left, and when it is over
        assert checkpointer.finish(lambda: saved.snapshot(7), 7, stop), "it is saved: the next attempt begins there"
        assert checkpointer.busy
    over.set()
    checkpointer.close(PATIENCE_S)


def test_what_a_failed_save_left_is_removed_after_the_next(saved: Saved) -> None:
    failures = [StageError(Fault.ACCESS_DENIED, action="write", uri="u")]

    def fail_once() -> None:
        if failures:
            raise failures.pop()

    checkpointer = saved.checkpointer(before_publishing=fail_once)
    saved.save(checkpointer, 1)
    assert saved.path(1, 1, checkpoint.TENSORS).exists()
    saved.save(checkpointer, 2)
    left = {Path(info.uri).parent.name for info in saved.store.list(join(saved.run_uri, CHECKPOINTS, ""))}
    assert left == {"00000002-1"}


def superseded_after_the_next_list(saved: Saved, patch: pytest.MonkeyPatch) -> None:
    """Let a newer attempt take over as soon as the finished saves are listed."""
    listed = checkpoint.manifests

    def list_then_take_over(store: Store, run_uri: str) -> list[checkpoint.Found]:
        found = listed(store, run_uri)
        raise_epoch(store, run_uri, 2, "pod-2")
        return found

    patch.setattr(checkpoint, "manifests", list_then_take_over)


def test_an_attempt_superseded_after_its_save_removes_no_old_checkpoint(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = saved.checkpointer(attempt=1, keep_last=1)
    saved.save(old, 2)
    with monkeypatch.context() as patch:
        superseded_after_the_next_list(saved, patch)
        saved.save(old, 4)
    assert saved.steps() == [4, 2], "the newer attempt may be reading it"


def test_an_attempt_superseded_after_its_save_removes_nothing_of_a_failed_one(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [StageError(Fault.ACCESS_DENIED, action="write", uri="u")]

    def fail_once() -> None:
        if failures:
            raise failures.pop()

    old = saved.checkpointer(attempt=1, before_publishing=fail_once)
    saved.save(old, 2)
    with monkeypatch.context() as patch:
        superseded_after_the_next_list(saved, patch)
        saved.save(old, 4)
    assert saved.path(2, 1, checkpoint.TENSORS).exists()


def test_what_a_newer_epoch_saved_is_neither_removed_nor_counted_after_a_save(saved: Saved) -> None:
    checkpointer = saved.checkpointer(attempt=1, keep_last=2)
    saved.save(checkpointer, 2)
    shutil.copytree(
        saved.path(2, 1, checkpoint.MANIFEST).parent, saved.path(3, 2, checkpoint.MANIFEST).parent
    )  # no fence tells of its writer
    for step in (4, 6):
        saved.save(checkpointer, step)
    assert [(found.step, found.epoch) for found in checkpoint.manifests(saved.store, saved.run_uri)] == [
        (6, 1),
        (4, 1),
        (3, 2),
    ]


def test_a_superseded_attempt_does_not_take_what_an_earlier_try_published_for_its_save(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = saved.checkpointer(attempt=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "publish_manifest", publish_without_answer)
        saved.save(checkpointer, 5)
    raise_epoch(saved.store, saved.run_uri, 2, "pod-2")
    with pytest.raises(StageError) as caught:
        saved.save(checkpointer, 5)
    assert caught.value.fault is Fault.SUPERSEDED
    assert checkpointer.last is None


def test_a_superseded_attempt_removes_nothing_and_no_attempt_what_a_newer_one_wrote(saved: Saved) -> None:
    old = saved.checkpointer(attempt=1, keep_last=1)
    saved.save(old, 3)
    new = saved.checkpointer(attempt=2)
    saved.save(new, 4)
    saved.save(new, 6)
    with pytest.raises(StageError):
        saved.save(old, 7)
    with pytest.raises(StageError):
        checkpoint.keep_newest(saved.store, Fence(saved.store, saved.run_uri, 1), saved.run_uri, StopFlag(60))
    assert saved.steps() == [6, 4, 3]
    # Before its fence is raised, a newer attempt has nothing there; whatever is there of a higher epoch stays.
    saved.path(9, 3, "manifest.json").parent.mkdir()
    saved.path(9, 3, "state.json").write_text("of a save under way")
    checkpoint.keep_newest(saved.store, Fence(saved.store, saved.run_uri, 2), saved.run_uri, StopFlag(60))
    assert saved.steps() == [6]
    assert saved.path(9, 3, "state.json").exists()


def test_a_checkpoint_that_vanishes_while_it_is_looked_for_is_no_end(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = saved.checkpointer()
    saved.save(checkpointer, 3)
    listed = checkpoint.manifests
    calls: list[int] = []

    def list_then_replace(store: Store, run_uri: str) -> list[checkpoint.Found]:
        found = listed(store, run_uri)
        calls.append(len(found))
        if len(calls) == 1:  # a writer that is not fenced off yet saves another one and removes the old one
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint, "manifests", listed)
                saved.save(checkpointer, 4)
            checkpoint.delete(store, found[0].uri)
        return found

    monkeypatch.setattr(checkpoint, "manifests", list_then_replace)
    found = saved.newest()
    assert found is not None
    assert (found.status.step, calls) == (4, [1, 1])


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), checkpoint.SafetensorError("I/O error: … (os error 28)")]
)
def test_a_full_disk_is_told_as_such(error: OSError | checkpoint.SafetensorError) -> None:
    told = checkpoint.disk_error(error, "a checkpoint")
    assert isinstance(told, StageError)
    assert (told.fault, told.exit_code) == (Fault.DISK_FULL, 19)


def test_the_manifest_names_plan_step_epoch_and_every_part(saved: Saved) -> None:
    saved.save(saved.checkpointer(), 5)
    manifest = json.loads(saved.path(5, 1, checkpoint.MANIFEST).read_text())
    assert (manifest["step"], manifest["epoch"], manifest["plan_digest"]) == (5, 1, PLAN)
    assert {file["path"] for file in manifest["files"]} == {checkpoint.TENSORS, checkpoint.STATE}


def test_what_a_checkpoint_needs_beside_it_is_done_before_it_counts(saved: Saved):
    counted: list[list[int]] = []
    saved.save(saved.checkpointer(before_publishing=lambda: counted.append(saved.steps())), step=3)
    assert (counted, saved.steps()) == ([[]], [3])
