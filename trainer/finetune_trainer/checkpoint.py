"""Checkpoints: adapter, optimizer and position, so that a resumed run gives the bits of an undisturbed one.

A checkpoint is `.job/checkpoints/STEP-EPOCH/` with state.safetensors, state.json and, last, manifest.json behind the
epoch fence. Only what a manifest names and what hashes to what it says counts; everything else is an unfinished save.
Keys are unique by the writer's epoch, so nothing is ever overwritten.
"""

import errno
import hashlib
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune_api.base import Digest, StoredModel
from finetune_api.errors import StageError
from finetune_api.layout import CHECKPOINTS, join
from finetune_api.reasons import Fault
from finetune_api.status import CheckpointStatus
from finetune_trainer.commit import Fence, ManifestFile, publish_manifest
from finetune_trainer.evaluate import MAX_HELD_OUT_ROWS, HeldOut
from finetune_trainer.store import Store

log = logging.getLogger(__name__)

TENSORS = "state.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"
_MANIFEST_URI = re.compile(r"/(\d{8})-(\d+)/manifest\.json$")
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_MAX_LISTED = 10_000
MAX_EVALUATIONS = 1000


class Position(StoredModel):
    """Where the loop stands; everything but the tensors."""

    model_config = ConfigDict(ser_json_inf_nan="strings")  # a loss may be no number

    step: int = Field(ge=0)  # finished steps
    tokens: int = Field(ge=0)
    label_tokens: int = Field(ge=0)
    nonfinite_steps: int = Field(default=0, ge=0)
    nonfinite_in_a_row: int = Field(default=0, ge=0)
    evaluations: list[HeldOut] = Field(default_factory=list[HeldOut], max_length=MAX_EVALUATIONS)  # the base's first
    # Of the model that the job began with, so that every later evaluation is compared with it row by row.
    start_row_losses: list[float] = Field(default_factory=list[float], max_length=MAX_HELD_OUT_ROWS)
    first_loss: float | None = None  # of the first step, nats per label token
    steps_above_start: int = Field(default=0, ge=0)  # in a row up to the last one
    first_started_at: float  # Unix time of the first attempt that trained
    kept_seconds: float = Field(default=0, ge=0)  # time spent in steps that are in this checkpoint


class CheckpointManifest(StoredModel):
    """What a whole checkpoint consists of."""

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


def folder_uri(run_uri: str, step: int, epoch: int) -> str:
    return join(run_uri, CHECKPOINTS, f"{step:08d}-{epoch}")


def manifests(store: Store, run_uri: str) -> list[tuple[int, int, str]]:
    """(step, epoch, manifest URI) of all finished saves, newest first."""
    found: list[tuple[int, int, str]] = []
    for info in store.list(join(run_uri, CHECKPOINTS, ""), limit=_MAX_LISTED):
        if match := _MANIFEST_URI.search(info.uri):
            found.append((int(match[1]), int(match[2]), info.uri))
    return sorted(found, reverse=True)


def newest(
    store: Store, run_uri: str, plan_digest: str, base_files: Mapping[str, str], scratch: Path
) -> Restored | None:
    """The newest whole checkpoint, every hash verified; None if nothing was ever saved.

    base_files: SHA-256 of the base model's files, by name. Raises CONFIG_CHANGED when it belongs to another plan,
    MODEL_CHANGED when it was trained on other files, NO_VALID_CHECKPOINT when there are some but none is whole.
    """
    listed = manifests(store, run_uri)
    for step, epoch, uri in listed:
        try:
            restored = _read(store, uri, plan_digest, base_files, scratch)
        except _OfOtherPlanError:
            continue
        except (ValidationError, SafetensorError, _CorruptError) as error:
            log.warning("checkpoint %d-%d is not whole (%s), trying the one before", step, epoch, type(error).__name__)
            continue
        return restored
    if any(step > 0 for step, _, _ in listed):
        raise StageError(Fault.NO_VALID_CHECKPOINT, count=len(listed), uri=join(run_uri, CHECKPOINTS))
    return None


class _OfOtherPlanError(Exception):
    """It holds no finished step, and was made before the job was prepared again."""


class _CorruptError(Exception):
    """A part is missing or is not what the manifest says."""


def _read(store: Store, manifest_uri: str, plan_digest: str, base_files: Mapping[str, str], scratch: Path) -> Restored:
    content, _ = store.read(manifest_uri)
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
    status = CheckpointStatus(
        step=manifest.step, uri=manifest_uri, digest="sha256:" + hashlib.sha256(content).hexdigest()
    )
    return Restored(Snapshot(position, tensors), status)


class Checkpointer:
    """Writes snapshots to the store in a thread of its own, at most one in flight."""

    def __init__(
        self,
        store: Store,
        fence: Fence,
        run_uri: str,
        plan_digest: str,
        base_files: dict[str, str],
        scratch: Path,
        keep_last: int,
        resumed_from: CheckpointStatus | None,
        before_publishing: Callable[[], None],
        on_saved: Callable[[CheckpointStatus, float, float], None],  # seconds to write it, and to upload it
    ) -> None:
        self._store = store
        self._fence = fence
        self._run_uri = run_uri
        self._plan_digest = plan_digest
        self._base_files = base_files
        self._scratch = scratch
        self._keep_last = keep_last
        self._resumed_from = resumed_from
        self._before_publishing = before_publishing
        self._on_saved = on_saved
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: Future[None] | None = None
        self.last: CheckpointStatus | None = resumed_from

    @property
    def busy(self) -> bool:
        return self._in_flight is not None and not self._in_flight.done()

    def start(self, saved: Snapshot) -> None:
        """Begin to write `saved`; waits for the save before it, and raises what that one failed with."""
        self.wait()
        self._in_flight = self._thread.submit(self._save, saved)

    def check(self) -> None:
        """Raise what a finished save failed with; does not wait."""
        if self._in_flight is not None and self._in_flight.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save in flight and raise what it failed with."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.result()

    def close(self) -> None:
        """Stop the thread; a save in flight is finished but its failure is not raised."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _save(self, saved: Snapshot) -> None:
        step, epoch = saved.position.step, self._fence.epoch
        folder = folder_uri(self._run_uri, step, epoch)
        local = self._scratch / f"{step:08d}"
        began_s = time.monotonic()
        try:
            _write(local, saved)
            written_s = time.monotonic()
            files: list[ManifestFile] = []
            for name in (TENSORS, STATE):
                info = self._store.upload(local / name, join(folder, name))
                files.append(ManifestFile(path=name, size_bytes=info.size_bytes, sha256=file_digest(local / name)))
            manifest = CheckpointManifest(
                step=step, epoch=epoch, plan_digest=self._plan_digest, base_files=self._base_files, files=files
            )
            uri = join(folder, MANIFEST)
            self._before_publishing()
            digest = publish_manifest(self._store, self._fence, uri, manifest.model_dump(mode="json"))
        finally:
            shutil.rmtree(local, ignore_errors=True)
        self.last = CheckpointStatus(step=step, uri=uri, digest=digest)
        self._on_saved(self.last, written_s - began_s, time.monotonic() - written_s)
        self._retain(step)

    def _retain(self, step: int) -> None:
        """Remove all but the newest, and the one resumed from: until a save is proven it is the safe one.

        Those of later steps are left and not counted: they were not whole when this attempt looked for one."""
        resumed = self._resumed_from.uri if self._resumed_from else None
        counted = [found for found in manifests(self._store, self._run_uri) if found[0] <= step]
        for _, _, uri in counted[self._keep_last :]:
            if uri != resumed:
                delete(self._store, uri)


def keep_newest(store: Store, run_uri: str) -> None:
    """After the commit: remove all other checkpoints."""
    for _, _, uri in manifests(store, run_uri)[1:]:
        delete(store, uri)


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
        raise disk_error(error, "a checkpoint", saved.tensors) from error


def disk_error(error: OSError | SafetensorError, what: str, tensors: dict[str, Tensor]) -> Exception:
    """DISK_FULL where the disk is full, which safetensors tells in words only; the error itself otherwise."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT) if isinstance(error, OSError) else "os error 28" in str(error)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return StageError(Fault.DISK_FULL, what=what, needed_gib=round(needed / 2**30, 2)) if full else error


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
