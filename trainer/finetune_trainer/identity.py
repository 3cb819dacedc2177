"""Judge if a file is still the one that was planned with, by its content and never by its name, time or ETag.

What tells one content from another, the best first:

- SHA-256, of every file that prepare read whole
- a checksum that the store itself keeps over the whole object, where both looks found one by the same algorithm
- the ETag: the same one means the same version, so the same bytes; another one says nothing
- a sample: SHA-256 over the size and blocks spread evenly over the file. Another sample proves another content. The
  same one leaves a change between the blocks unseen, so a file known by it alone is warned of and named in the lineage

Prepare does not read a model's weights whole, so it keeps all it can of the last three. Train reads everything, writes
every SHA-256 into its checkpoints, and later attempts compare by that alone.
"""

import hashlib
import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from finetune_trainer.runplan import FileRecord
from finetune_trainer.store import ObjectInfo

BLOCKS = 16
BLOCK_BYTES = 256 * 2**10
SAMPLE_BYTES = BLOCKS * BLOCK_BYTES  # a file of at most this size is its own sample: its SHA-256 is known


class Evidence(StrEnum):
    """What shows that a file is the planned one, the best first."""

    SHA256 = "sha256"
    CHECKSUM = "checksum"
    ETAG = "etag"
    SAMPLE = "sample"


def sample_places(size_bytes: int) -> list[tuple[int, int]]:
    """(offset, length) of the blocks of a file's sample, from its first byte to its last."""
    if size_bytes <= SAMPLE_BYTES:
        return [(0, size_bytes)]
    last = size_bytes - BLOCK_BYTES
    return [(last * block // (BLOCKS - 1), BLOCK_BYTES) for block in range(BLOCKS)]


def sample_digest(size_bytes: int, blocks: list[bytes]) -> str:
    """ "sha256:…" of a file's sample, from the blocks at `sample_places`."""
    digest = hashlib.sha256(f"{size_bytes}\n".encode())
    for block in blocks:
        digest.update(block)
    return "sha256:" + digest.hexdigest()


def sample_of(path: Path) -> str:
    """The sample of a file on disk."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        blocks = [os.pread(file.fileno(), length, offset) for offset, length in sample_places(size_bytes)]
    return sample_digest(size_bytes, blocks)


def is_other(planned: FileRecord, found: ObjectInfo) -> bool:
    """Return True if what the store says, before anything is read, proves another content."""
    if found.size_bytes != planned.size_bytes:
        return True
    return _same_checksum(planned.checksum, found.checksum) is False


def evidence(planned: FileRecord, sha256: str, sample: Callable[[], str], found: ObjectInfo | None) -> Evidence | None:
    """Return what shows that a file that was read whole is the planned one; None if it is not.

    sha256 and sample: of what was read. found: what the store says of the very version that was read, if known.
    """
    if planned.sha256 is not None:
        return Evidence.SHA256 if planned.sha256 == sha256 else None
    if planned.sample is not None and planned.sample != sample():
        return None
    if found is not None:
        same = _same_checksum(planned.checksum, found.checksum)
        if same is not None:
            return Evidence.CHECKSUM if same else None
        if planned.etag == found.etag:
            return Evidence.ETAG
    return Evidence.SAMPLE if planned.sample is not None else None


def _same_checksum(planned: str | None, found: str | None) -> bool | None:
    """None where the two cannot be compared: one is missing, or is by another algorithm."""
    if planned is None or found is None or planned.partition(":")[0] != found.partition(":")[0]:
        return None
    return planned == found
