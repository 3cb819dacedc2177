"""Who may write a run's folder, and when its adapter counts: claim, fence, manifest last, commit.

Everything rests on one primitive, a PUT that only one of several writers can win (If-None-Match). Objects, in
the order they are written below `run_uri`:

1. `_CLAIM.json`           this folder is this job's; the loser stops before it trains
2. `.job/writers/N.json`   attempt of epoch N is the writer, until N + 1 exists: a pod that was thought dead and
                           writes on is told so before it can publish anything
3. files                   at names no other epoch uses, so that a late writer can never damage them
4. their manifest          size and SHA-256 of each; what no manifest names does not exist
5. `_COMMITTED.json`       which manifest is the adapter; readers trust only this, and it is never replaced
6. `latest.json`           beside the run folders: the newest committed run, moved with If-Match, only forward

A manifest is a JSON object with `files: [{"path": relative to the manifest's folder, "size_bytes", "sha256"}]`
and anything else its writer wants to keep (Merkle-style: its own digest covers every file).
"""

import json
import logging
import random
import time
from datetime import UTC, datetime

from pydantic import AwareDatetime, Field, ValidationError

from finetune_api import layout
from finetune_api.base import Digest, Str256, WireModel, sha256_digest
from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.status import Artifact
from finetune_trainer.store import PreconditionFailed, Store

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_MAX_WRITERS = 2000
_MAX_RACES = 20  # lost races before giving up; each one means that another writer has moved on
MAX_MANIFEST_BYTES = 16 << 20


class ManifestFile(WireModel):
    """One file that a manifest vouches for."""

    path: Str256  # below the manifest's folder
    size_bytes: int = Field(ge=0)
    sha256: Digest


class Committed(WireModel):
    """Content of `_COMMITTED.json` and of `latest.json`."""

    version: int = 1
    run_uri: str
    artifact: Artifact
    epoch: int
    committed_at: AwareDatetime


class Fence:
    """The right of one attempt to write, which ends when a newer attempt takes over."""

    def __init__(self, store: Store, run_uri: str, epoch: int) -> None:
        self.epoch = epoch
        self._store = store
        self._run_uri = run_uri

    def check(self) -> None:
        """Raises StageError(SUPERSEDED) if a newer writer exists. Epochs have no gaps, so the next one tells."""
        newer = self.epoch + 1
        if self._store.head(_writer_uri(self._run_uri, newer)):
            raise StageError(Fault.SUPERSEDED, newer=newer, own=self.epoch)


def claim(store: Store, run_uri: str, job_uid: str) -> None:
    """Make the run's folder this job's; again and again by the same job is fine.

    Raises StageError(OUTPUT_CONFLICT) when it is another's, CONDITIONAL_WRITES_UNSUPPORTED when the store would
    let two jobs win."""
    uri = layout.join(run_uri, layout.CLAIM)
    content = _json_bytes({"version": 1, "job_uid": job_uid})
    # The second write has to lose against the first: that proves the condition is honoured. It says something else,
    # so that, tried again by the store's client, it is not taken for a write that had won and whose answer was lost.
    for attempt in (content, content + b"\n"):
        try:
            store.put(uri, attempt, if_none_match=True)
        except PreconditionFailed:
            found, _etag = store.read(uri)
            if found != content:
                raise StageError(Fault.OUTPUT_CONFLICT, uri=run_uri, owner=_owner(found)) from None
            return
    raise StageError(Fault.CONDITIONAL_WRITES_UNSUPPORTED, endpoint=uri)


def raise_epoch(store: Store, run_uri: str, attempt: int, pod_uid: str) -> Fence:
    """Become the writer: all earlier ones are superseded from now on."""
    content = _json_bytes({"version": 1, "attempt": attempt, "pod_uid": pod_uid})
    newest = _newest_epoch(store, run_uri)
    for epoch in range(newest + 1, newest + 1 + _MAX_RACES):
        try:
            store.put(_writer_uri(run_uri, epoch), content, if_none_match=True)
        except PreconditionFailed:
            continue
        log.info("this attempt writes as epoch %d", epoch)
        return Fence(store, run_uri, epoch)
    raise StageError(Fault.SUPERSEDED, newer=newest + _MAX_RACES, own=newest)


def before_training(store: Store, run_uri: str) -> Fence:
    """Return a fence for prepare, which ends when an attempt to train begins; no other writer is fenced off by it."""
    return Fence(store, run_uri, _newest_epoch(store, run_uri))


def publish_manifest(store: Store, fence: Fence, uri: str, manifest: dict[str, object]) -> str:
    """Write a manifest after its files; returns the SHA-256 of its bytes.

    Publishing the same again succeeds. Raises StageError(SUPERSEDED); ValueError when `files` is not as described
    above, or when another manifest lies there: manifests have names that only one epoch uses."""
    _files(manifest)
    content = _json_bytes(manifest)
    fence.check()
    try:
        store.put(uri, content, if_none_match=True)
    except PreconditionFailed:
        if store.read(uri, max_bytes=MAX_MANIFEST_BYTES)[0] != content:
            raise ValueError(f"{uri} holds another manifest") from None
    return sha256_digest(content)


def read_manifest(store: Store, uri: str, digest: str | None = None) -> dict[str, object]:
    """The manifest at `uri`, with every file it names verified by size and SHA-256 (each is read once).

    Raises StageError(CORRUPT_TRANSFER) when it, or a file, is not what it was; OBJECT_NOT_FOUND."""
    content, _etag = store.read(uri, max_bytes=MAX_MANIFEST_BYTES)
    if digest is not None and sha256_digest(content) != digest:
        raise StageError(Fault.CORRUPT_TRANSFER, uri=uri, tries=1)
    try:
        manifest: dict[str, object] = json.loads(content)
        files = _files(manifest)
    except ValueError as error:
        raise StageError(Fault.CORRUPT_TRANSFER, uri=uri, tries=1) from error
    folder = uri.rpartition("/")[0]
    for file in files:
        file_uri = layout.join(folder, file.path)
        if store.digest(file_uri) != (file.sha256, file.size_bytes):
            raise StageError(Fault.CORRUPT_TRANSFER, uri=file_uri, tries=1)
    return manifest


def read_commit(store: Store, run_uri: str) -> Committed | None:
    """Return what is committed, its manifest and every file of it verified; None when nothing is.

    Raises StageError(CORRUPT_TRANSFER, OBJECT_NOT_FOUND) when what was committed has been damaged since."""
    committed = _read_committed(store, run_uri)
    if committed is None:
        return None
    read_manifest(store, committed.artifact.manifest_uri, committed.artifact.digest)
    return committed


def is_claimed_by(store: Store, run_uri: str, job_uid: str) -> bool:
    """Return whether the run's folder is this job's, without writing; False also when nobody has claimed it."""
    try:
        content, _etag = store.read(layout.join(run_uri, layout.CLAIM))
    except StageError as error:
        if error.fault is Fault.OBJECT_NOT_FOUND:
            return False
        raise
    return _owner(content) == f"job {job_uid}"[:80]


def commit(store: Store, fence: Fence, run_uri: str, artifact: Artifact) -> Committed:
    """Make the artifact the run's result; returns the commit that stands, which may be an earlier attempt's.

    Safe to repeat. `latest.json` is moved by `move_latest`. Raises StageError(SUPERSEDED)."""
    fence.check()
    committed = Committed(run_uri=run_uri, artifact=artifact, epoch=fence.epoch, committed_at=datetime.now(UTC))
    uri = layout.join(run_uri, layout.COMMITTED)
    try:
        store.put(uri, _json_bytes(committed.model_dump(mode="json")), if_none_match=True)
    except PreconditionFailed:
        found = _read_committed(store, run_uri)
        if found is None:
            raise StageError(Fault.OBJECT_NOT_FOUND, uri=uri, field="its URI in the job") from None
        committed = found
    return committed


def move_latest(store: Store, committed: Committed) -> bool:
    """Let `latest.json` beside the run folders name this run, unless it names a newer one; whether it does now."""
    uri = layout.join(committed.run_uri.rpartition("/")[0], layout.LATEST)
    content = _json_bytes(committed.model_dump(mode="json"))
    for race in range(_MAX_RACES):
        try:
            found, etag = store.read(uri)
        except StageError as error:
            if error.fault is not Fault.OBJECT_NOT_FOUND:
                raise
            found, etag = b"", None
        if not _moves(found, committed):
            return found == content
        try:
            _replace(store, uri, content, etag)
        except PreconditionFailed:
            time.sleep(random.uniform(0, min(0.05 * 2**race, 2.0)))
            continue
        return True
    raise StageError(
        Fault.STORAGE_UNAVAILABLE, action="write", uri=uri, tries=_MAX_RACES, seconds=0, problem="others write it too"
    )


def _replace(store: Store, uri: str, content: bytes, etag: str | None) -> None:
    """Write `latest.json` if it is still the version `etag`; without that condition where the store has none.

    The adapter is committed by then: a pointer that two jobs may move at once is worth less than the job."""
    try:
        store.put(uri, content, if_none_match=etag is None, if_match=etag)
    except StageError as error:
        if error.fault is not Fault.CONDITIONAL_WRITES_UNSUPPORTED or etag is None:
            raise
        log.warning("the store has no If-Match: %s is moved without it", layout.LATEST)
        store.put(uri, content)


def _moves(found: bytes, committed: Committed) -> bool:
    """Whether `latest.json` with content `found` has to give way: only to a later commit."""
    if not found:
        return True
    try:
        present = Committed.model_validate_json(found)
    except ValidationError:
        log.warning("%s is not ours to read; it is replaced", layout.LATEST)
        return True
    return (committed.committed_at, committed.run_uri) > (present.committed_at, present.run_uri)


def _read_committed(store: Store, run_uri: str) -> Committed | None:
    uri = layout.join(run_uri, layout.COMMITTED)
    try:
        content, _etag = store.read(uri)
    except StageError as error:
        if error.fault is Fault.OBJECT_NOT_FOUND:
            return None
        raise
    try:
        return Committed.model_validate_json(content)
    except ValidationError as error:
        raise StageError(Fault.CORRUPT_TRANSFER, uri=uri, tries=1) from error


def _files(manifest: dict[str, object]) -> list[ManifestFile]:
    files = manifest.get("files")
    if not isinstance(files, list) or not files:
        raise ValueError("a manifest names at least one file")
    return [ManifestFile.model_validate(file) for file in files]


def _owner(claim_content: bytes) -> str:
    try:
        return f"job {json.loads(claim_content)['job_uid']}"[:80]
    except (ValueError, KeyError, TypeError):
        return "an object that is no claim"


def _writer_prefix(run_uri: str) -> str:
    return layout.join(run_uri, layout.WRITERS) + "/"


def _writer_uri(run_uri: str, epoch: int) -> str:
    return f"{_writer_prefix(run_uri)}{epoch}.json"


def _newest_epoch(store: Store, run_uri: str) -> int:
    return max((_epoch(info.uri) for info in store.list(_writer_prefix(run_uri), _MAX_WRITERS)), default=0)


def _epoch(writer_uri: str) -> int:
    name = writer_uri.rpartition("/")[2].removesuffix(".json")
    return int(name) if name.isdecimal() else 0


def _json_bytes(content: dict[str, object]) -> bytes:
    return json.dumps(content, sort_keys=True, indent=1).encode()
