"""Checkpoints: adapter, optimizer and position, so that a resumed run gives the bits of an undisturbed one.

A checkpoint is `.job/checkpoints/STEP-EPOCH/` with state.safetensors, state.json and, last, manifest.json behind the
epoch fence. Only what a manifest names and what hashes to what it says counts; everything else is an unfinished save.
Keys are unique by the writer's epoch, so nothing is ever overwritten.
"""

import errno
import hashlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune_api.base import Digest, StoredModel, sha256_digest
from finetune_api.errors import StageError
from finetune_api.layout import CHECKPOINTS, join
from finetune_api.reasons import Fault
from finetune_api.status import CheckpointStatus
from finetune_trainer.commit import MANIFEST, Fence, ManifestFile, publish_manifest
from finetune_trainer.evaluate import MAX_HELD_OUT_ROWS, HeldOut
from finetune_trainer.patience import FailedTries, after_failure, best_effort, pause_s
from finetune_trainer.precision import ComputedIn
from finetune_trainer.stop import StopFlag
from finetune_trainer.store import Store

log = logging.getLogger(__name__)

TENSORS = "state.safetensors"
STATE = "state.json"
_MANIFEST_URI = re.compile(r"/(\d{8})-(\d+)/manifest\.json$")
_FOLDER_URI = re.compile(r"/\d{8}-(\d+)/[^/]+$")
_OS_ERROR = re.compile(r"os error (\d+)")
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_MAX_LISTED = 100_000  # where nothing may be deleted, all are there: three objects each
_MAX_LISTINGS = 5
_POLL_S = 0.2
MAX_EVALUATIONS = 1000


class Position(StoredModel):
    """Where the loop stands; everything but the tensors."""

    # A loss may be no number. A later release may write more, all of which has defaults: a run can go back to this one.
    model_config = ConfigDict(ser_json_inf_nan="strings", extra="ignore")

    step: int = Field(ge=0)  # finished steps
    tokens: int = Field(ge=0)
    label_tokens: int = Field(ge=0)
    nonfinite_steps: int = Field(default=0, ge=0)
    nonfinite_in_a_row: int = Field(default=0, ge=0)
    evaluations: list[HeldOut] = Field(default_factory=list[HeldOut], max_length=MAX_EVALUATIONS)  # the base's first
    # Of the model that the job began with, on the sample of held-out rows that every evaluation measures and is
    # compared with row by row.
    start_row_losses: list[float] = Field(default_factory=list[float], max_length=MAX_HELD_OUT_ROWS)
    computed_in: ComputedIn = "fp32"  # the steps so far
    first_loss: float | None = None  # of the first step, nats per label token
    steps_above_start: int = Field(default=0, ge=0)  # in a row up to the last one
    first_started_at: float  # Unix time of the first attempt that trained
    kept_seconds: float = Field(default=0, ge=0)  # time spent in steps that are in this checkpoint


class CheckpointManifest(StoredModel):
    """What a whole checkpoint consists of."""

    model_config = ConfigDict(extra="ignore")  # as of Position

    version: int = 1
    step: int = Field(ge=0)
    epoch: int = Field(ge=0)
    plan_digest: Digest
    base_files: dict[str, Digest] = Field(default_factory=dict[str, str], max_length=1000)  # of the model trained on
    files: list[ManifestFile] = Field(max_length=8)


@dataclass(frozen=True)
class Snapshot:
    """Copies of all state after a step, on the host."""

    position: Position
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was verified."""

    snapshot: Snapshot
    status: CheckpointStatus


def snapshot(parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW, position: Position) -> Snapshot:
    """Copy parameters and moments to the host; the only part of a save that the loop waits for."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"adapter.{name}"] = _host_copy(parameter.detach())
        for moment in _MOMENTS:
            tensors[f"{moment}.{name}"] = _host_copy(optimizer.state[parameter][moment])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Snapshot(position, tensors)


def _host_copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def restore(saved: Snapshot, parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW) -> None:
    """Copy a snapshot into the live parameters and moments.

    Raises CONFIG_CHANGED when it holds other tensors than this model trains.
    """
    expected = {f"{kind}.{name}" for name in parameters for kind in ("adapter", *_MOMENTS)}
    shapes_differ = any(
        saved.tensors[f"adapter.{name}"].shape != parameter.shape
        for name, parameter in parameters.items()
        if f"adapter.{name}" in saved.tensors
    )
    if shapes_differ or expected != saved.tensors.keys():
        raise StageError(
            Fault.CONFIG_CHANGED,
            what="the set of trained weights",
            step=saved.position.step,
            found=len(saved.tensors),
            expected=len(expected),
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved.tensors[f"adapter.{name}"])
            for moment in _MOMENTS:
                optimizer.state[parameter][moment].copy_(saved.tensors[f"{moment}.{name}"])


class Found(NamedTuple):
    """A finished save, by its manifest."""

    step: int
    epoch: int
    uri: str


def folder_uri(run_uri: str, step: int, epoch: int) -> str:
    return join(run_uri, CHECKPOINTS, f"{step:08d}-{epoch}")


def manifests(store: Store, run_uri: str) -> list[Found]:
    """List all finished saves, newest first."""
    found: list[Found] = []
    for info in store.list(join(run_uri, CHECKPOINTS, ""), limit=_MAX_LISTED):
        if match := _MANIFEST_URI.search(info.uri):
            found.append(Found(int(match[1]), int(match[2]), info.uri))
    return sorted(found, reverse=True)


def newest(
    store: Store, run_uri: str, plan_digest: str, base_files: Mapping[str, str], scratch: Path
) -> Restored | None:
    """Return the newest whole checkpoint, every hash verified; None if nothing was ever saved.

    A writer that does not know yet that it is superseded may remove old ones meanwhile, so what was listed and is gone
    is looked for in a new list. base_files: SHA-256 of the base model's files, by name. Raises CONFIG_CHANGED when it
    belongs to another plan, MODEL_CHANGED when it was trained on other files, NO_VALID_CHECKPOINT when there are some
    but none is whole.
    """
    gone: set[str] = set()
    listed: list[Found] = []
    for _ in range(_MAX_LISTINGS):
        before, listed = listed, [found for found in manifests(store, run_uri) if found.uri not in gone]
        if listed == before:
            break
        try:
            if restored := _first_whole(store, listed, plan_digest, base_files, scratch):
                return restored
        except _GoneError as error:
            log.warning("the checkpoint %s is gone, listing again", error)
            gone.add(str(error))
    if any(found.step > 0 for found in listed):
        raise StageError(Fault.NO_VALID_CHECKPOINT, count=len(listed), uri=join(run_uri, CHECKPOINTS))
    return None


def _first_whole(
    store: Store, listed: list[Found], plan_digest: str, base_files: Mapping[str, str], scratch: Path
) -> Restored | None:
    """Return the first that is whole. Raises _GoneError when a manifest is no longer there."""
    for found in listed:
        try:
            return _read(store, found.uri, plan_digest, base_files, scratch)
        except _OfOtherPlanError:
            continue
        except (ValidationError, SafetensorError, _CorruptError) as error:
            kind = type(error).__name__
            log.warning("checkpoint %d-%d is not whole (%s), trying the one before", found.step, found.epoch, kind)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)  # the next save needs the room
    return None


class _OfOtherPlanError(Exception):
    """It holds no finished step, and was made before the job was prepared again."""


class _GoneError(Exception):
    """A manifest that was listed is no longer there."""


class _CorruptError(Exception):
    """A part is missing or is not what the manifest says."""


def _read(store: Store, manifest_uri: str, plan_digest: str, base_files: Mapping[str, str], scratch: Path) -> Restored:
    try:
        content, _ = store.read(manifest_uri)
    except StageError as error:
        if error.fault is Fault.OBJECT_NOT_FOUND:
            raise _GoneError(manifest_uri) from error
        raise
    manifest = CheckpointManifest.model_validate_json(content)
    if manifest.plan_digest != plan_digest and manifest.step == 0:
        raise _OfOtherPlanError
    if manifest.plan_digest != plan_digest:
        raise StageError(
            Fault.CONFIG_CHANGED, what="the plan", step=manifest.step, found=plan_digest, expected=manifest.plan_digest
        )
    for name, sha256 in manifest.base_files.items():
        if base_files.get(name) != sha256:
            raise StageError(Fault.MODEL_CHANGED, uri=f"{name} of the base model")
    if {record.path for record in manifest.files} != {TENSORS, STATE}:
        raise _CorruptError
    folder = manifest_uri.rsplit("/", 1)[0]
    scratch.mkdir(parents=True, exist_ok=True)
    for record in manifest.files:
        try:
            digest = store.download(join(folder, record.path), scratch / record.path)
        except StageError as error:
            if error.fault is Fault.OBJECT_NOT_FOUND:
                raise _CorruptError from error
            raise
        if digest != record.sha256:
            raise _CorruptError
    position = Position.model_validate_json((scratch / STATE).read_bytes())
    tensors = load_file(scratch / TENSORS)
    return Restored(Snapshot(position, tensors), _status(manifest.step, manifest_uri, content))


def _status(step: int, manifest_uri: str, content: bytes) -> CheckpointStatus:
    digest = sha256_digest(content)
    return CheckpointStatus(step=step, uri=manifest_uri, digest=digest)


class Checkpointer:
    """Writes snapshots to the store in a thread of its own, at most one in flight.

    A save that fails is tried again with a newer snapshot while training goes on; see `patience` for how long."""

    def __init__(
        self,
        store: Store,
        fence: Fence,
        run_uri: str,
        *,
        plan_digest: str,
        base_files: dict[str, str],
        scratch: Path,
        keep_last: int,
        interval_s: float,
        resumed_from: CheckpointStatus | None,
        before_publishing: Callable[[], None],
        on_saved: Callable[[CheckpointStatus, float, float], None],  # seconds to write it, and to upload it
        on_trouble: Callable[[FailedTries | None], None],  # None: over
    ) -> None:
        self._store = store
        self._fence = fence
        self._run_uri = run_uri
        self._plan_digest = plan_digest
        self._base_files = base_files
        self._scratch = scratch
        self._keep_last = keep_last
        self._interval_s = interval_s
        self._resumed_from = resumed_from
        self._before_publishing = before_publishing
        self._on_saved = on_saved
        self._on_trouble = on_trouble
        self._thread: threading.Thread | None = None
        self._began_s = time.monotonic()
        self._failed_steps: set[int] = set()  # what was uploaded of them is no checkpoint, or one without an answer
        self._end: Exception | None = None  # what ends the attempt
        self.trouble: FailedTries | None = None
        self.last: CheckpointStatus | None = resumed_from

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def is_saved(self, step: int) -> bool:
        """Return whether the newest save is the one after `step`."""
        return self.last is not None and self.last.step == step

    def is_due(self) -> bool:
        """Return whether it is time to save, or to try again."""
        due_s = self._began_s + self._interval_s if self.trouble is None else self.trouble.next_s
        return not self.busy and time.monotonic() >= due_s

    def start(self, saved: Snapshot) -> None:
        """Begin to write `saved`; waits for the save before it. Raises as `check`."""
        self.wait()
        self._began_s = time.monotonic()
        # A daemon: a store that does not answer must not keep a process alive that was asked to stop.
        self._thread = threading.Thread(target=self._run, args=(saved,), name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what ends the attempt: a newer writer, or the end of all patience; does not wait."""
        if self._end is not None:
            raise self._end

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the save in flight; False when it takes longer than `timeout_s`. Raises as `check`."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        self.check()
        return not self.busy

    def finish(self, take: Callable[[], Snapshot], step: int, stop: StopFlag) -> bool:
        """Save the state after the last step, which `take` copies; return whether it is saved.

        Once asked to stop, it is tried until the time for that is over, and not waited for what follows a save. Else it
        is tried once: what follows the last step makes a checkpoint needless. Raises as `check`."""

        tries = 0
        while True:
            while not self.wait(_POLL_S):
                if stop.is_set() and self.is_saved(step):
                    return True
                if stop.remaining_s() == 0:
                    return False
            if self.is_saved(step):
                return True
            if tries and not (stop.is_set() and self._pause(tries, stop)):
                return False
            self.start(take())
            tries += 1

    def close(self, timeout_s: float) -> None:
        """Give a save in flight so much time to end; what it failed with is not raised."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _pause(self, tries: int, stop: StopFlag) -> bool:
        """Sleep before the next try of one who has to hurry; False when there is no time left for it."""
        wait_s = min(pause_s(tries, hurried=True), stop.remaining_s())
        time.sleep(wait_s)
        return stop.remaining_s() > 0

    def _run(self, saved: Snapshot) -> None:
        began_s = time.monotonic()
        step = saved.position.step
        try:
            self._save(saved)
        except StageError as error:
            self._failed_steps.add(step)
            try:
                self.trouble = after_failure(self.trouble, error, began_s, time.monotonic())
            except StageError as last:
                self._end = last
                return
            pause_left_s = self.trouble.next_s - time.monotonic()
            log.warning("step %d is not in a checkpoint: %s; tried again in %.0f s", step, error, pause_left_s)
            self._on_trouble(self.trouble)
        except Exception as error:  # a bug: the loop's thread raises it, as it would that of a Future
            log.error("the save of step %d failed unexpectedly", step, exc_info=error)
            self._end = error
        else:
            if self.trouble is not None:
                log.warning("checkpoints are saved again")
                self.trouble = None
                self._on_trouble(None)
            with best_effort("old checkpoints are not removed"):
                self._retain(step)

    def _save(self, saved: Snapshot) -> None:
        step, epoch = saved.position.step, self._fence.epoch
        folder = folder_uri(self._run_uri, step, epoch)
        uri = join(folder, MANIFEST)
        began_s = written_s = time.monotonic()
        status = self._published(step, uri) if step in self._failed_steps else None
        if status is None:
            local = self._scratch / f"{step:08d}"
            try:
                _write(local, saved)
                written_s = time.monotonic()
                files: list[ManifestFile] = []
                for name in (TENSORS, STATE):
                    info = self._store.upload(local / name, join(folder, name))
                    files.append(ManifestFile(path=name, size_bytes=info.size_bytes, sha256=file_digest(local / name)))
            finally:
                shutil.rmtree(local, ignore_errors=True)
            manifest = CheckpointManifest(
                step=step, epoch=epoch, plan_digest=self._plan_digest, base_files=self._base_files, files=files
            )
            self._before_publishing()
            digest = publish_manifest(self._store, self._fence, uri, manifest.model_dump(mode="json"))
            status = CheckpointStatus(step=step, uri=uri, digest=digest)
        self._failed_steps.discard(step)
        self.last = status
        self._on_saved(status, written_s - began_s, time.monotonic() - written_s)

    def _published(self, step: int, uri: str) -> CheckpointStatus | None:
        """Return what an earlier try published although its answer was lost: it must not be written over."""
        self._fence.check()
        return _status(step, uri, self._store.read(uri)[0]) if self._store.head(uri) else None

    def _retain(self, step: int) -> None:
        """Remove all but the newest, and the one resumed from: until a save is proven it is the safe one.

        Those of later steps are left and not counted: they were not whole when this attempt looked for one. Those of
        newer epochs are another writer's."""
        epoch = self._fence.epoch
        resumed = self._resumed_from.uri if self._resumed_from else None
        own = [found for found in manifests(self._store, self._run_uri) if found.epoch <= epoch]
        counted = [found for found in own if found.step <= step]
        for found in counted[self._keep_last :]:
            if found.uri != resumed:
                self._fence.check()
                delete(self._store, found.uri)
        finished = {found.step for found in own if found.epoch == epoch}
        for failed in sorted(self._failed_steps - finished):
            self._fence.check()
            delete(self._store, join(folder_uri(self._run_uri, failed, epoch), MANIFEST))
            self._failed_steps.discard(failed)


def keep_newest(store: Store, fence: Fence, run_uri: str, stop: StopFlag) -> None:
    """After the commit: remove all checkpoints but the newest, and what was never finished, of own and older epochs.

    A stop leaves the rest where it is."""
    found = manifests(store, run_uri)
    kept = found[0].uri.removesuffix(MANIFEST) if found else None
    listed = store.list(join(run_uri, CHECKPOINTS, ""), limit=_MAX_LISTED)
    # Manifests first, so that a half-removed checkpoint is never taken for whole.
    for info in sorted(listed, key=lambda info: (not info.uri.endswith(f"/{MANIFEST}"), info.uri)):
        if stop.is_set():
            return
        folder = _FOLDER_URI.search(info.uri)
        if folder and int(folder[1]) <= fence.epoch and not (kept and info.uri.startswith(kept)):
            fence.check()
            store.delete(info.uri)


def delete(store: Store, manifest_uri: str) -> None:
    """Remove one checkpoint, its manifest first, so that a half-removed one is never taken for whole."""
    folder = manifest_uri.rsplit("/", 1)[0]
    store.delete(manifest_uri)
    for name in (TENSORS, STATE):
        store.delete(join(folder, name))


def _write(folder: Path, saved: Snapshot) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(saved.tensors, folder / TENSORS)
        (folder / STATE).write_text(saved.position.model_dump_json())
    except (OSError, SafetensorError) as error:
        raise disk_error(error, "a checkpoint") from error


def disk_error(error: OSError | SafetensorError, what: str) -> StageError | SafetensorError:
    """Return the fault of a file that could not be written; safetensors tells the system's error in words only."""
    found = _OS_ERROR.search(str(error)) if isinstance(error, SafetensorError) else None
    if isinstance(error, SafetensorError) and found is None:
        return error  # not the disk's: a bug
    number = int(found[1]) if found is not None else error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return StageError(Fault.DISK_FULL, what=what)
    problem = os.strerror(number) if number else type(error).__name__
    return StageError(
        Fault.STORAGE_UNAVAILABLE, action="write", uri=f"{what} on the local disk", tries=1, seconds=0, problem=problem
    )


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
