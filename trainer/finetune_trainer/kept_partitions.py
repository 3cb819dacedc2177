"""Partitions that prepare has finished, kept in the run's folder until there is a plan: a killed one goes on there.

Each lies at a name made of its rows and of all that is made of them: the files' names, how rows are read, template,
tokenizer, model and our own code. What is not found, or not as it was written, is made again.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import finetune_api
from finetune_api.layout import PARTITIONS, join
from finetune_api.reasons import Fault
from finetune_trainer.commit import Fence
from finetune_trainer.data.frames import read_frame, write_frame
from finetune_trainer.data.partition_messages import PartitionResult, Task
from finetune_trainer.data.partition_work import DECISIONS
from finetune_trainer.data.partitions import Partition
from finetune_trainer.data.spool import FILES
from finetune_trainer.patience import best_effort
from finetune_trainer.store import Store

_MAX_LISTED = 100_000
_MAX_FRAME_BYTES = 2**32 - 1
_LIBRARIES = (
    "tokenizers",
    "fastokens",
    "jinja2",
    "orjson",
    "ftfy",
    "py3langid",
    "numpy",
    "google-re2",
    "phonenumbers",
    "python-stdnum",
    "license-expression",
)


def code_digest() -> str:
    """Return the SHA-256 of the code and the libraries that read, change and tokenise rows."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parent / "data", Path(finetune_api.__file__).parent):  # which has the limits of rows
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    for name in _LIBRARIES:
        digest.update(f"{name} {importlib.metadata.version(name)}\n".encode())
    return digest.hexdigest()


class KeptPartitions:
    """The finished partitions in one run's folder. rules: what is the same for all partitions."""

    def __init__(self, store: Store, run_uri: str, fence: Fence, rules: bytes, work_dir: Path) -> None:
        self._store, self._fence, self._folder = store, fence, join(run_uri, PARTITIONS)
        self._rules = hashlib.sha256(rules + code_digest().encode()).hexdigest()
        self._path = work_dir / "partition"
        self._names: set[str] = set()
        with best_effort("partitions of an earlier attempt are not looked for"):
            self._names = {info.uri.rpartition("/")[2] for info in store.list(self._folder + "/", _MAX_LISTED)}

    def key(self, partition: Partition, task: Task) -> str:
        """Return the name of a partition that is finished."""
        told = {**asdict(task), "rows": partition.sha256, "out": "", "with": self._rules}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def find(self, key: str, out: Path) -> PartitionResult | None:
        """Return a partition's result, its files being put into `out`; None where it is not there."""
        if key not in self._names:
            return None
        with best_effort("a partition of an earlier attempt is not read"):
            self._store.download(join(self._folder, key), self._path)
            return _unpacked(self._path, out)
        return None

    def keep(self, key: str, out: Path, result: PartitionResult) -> None:
        """Upload the finished partition in `out`, as far as the store lets us. Raises SUPERSEDED."""
        if key in self._names:
            return
        with best_effort("a finished partition is not kept", (Fault.SUPERSEDED,)):
            self._fence.check()
            _pack(self._path, out, result)
            self._store.upload(self._path, join(self._folder, key))
            self._names.add(key)

    def tidy(self) -> None:
        """Remove all of them, and what is left of one that was being kept at a kill; no job ends of what stays."""
        for name in sorted(self._names):
            with best_effort("a partition that is not needed any more stays"):
                self._store.delete(join(self._folder, name))
        self._names.clear()
        with best_effort("what is left of a partition stays"):
            self._store.remove_unfinished(self._folder + "/")


def _pack(path: Path, out: Path, result: PartitionResult) -> None:
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        for frame in [result.to_json(), *((out / name).read_bytes() for name in _names())]:
            digest.update(frame)
            write_frame(stream, frame)
        write_frame(stream, digest.digest())


def _unpacked(path: Path, out: Path) -> PartitionResult | None:
    """Return what was packed; None where the file is not whole."""
    digest = hashlib.sha256()
    out.mkdir(parents=True, exist_ok=True)
    with path.open("rb") as stream:
        head = read_frame(stream, _MAX_FRAME_BYTES)
        if head is None:
            return None
        digest.update(head)
        for name in _names():
            body = read_frame(stream, _MAX_FRAME_BYTES)
            if body is None:
                return None
            digest.update(body)
            (out / name).write_bytes(body)
        if read_frame(stream, _MAX_FRAME_BYTES) != digest.digest():
            return None
    return PartitionResult.from_json(head)


def _names() -> Iterator[str]:
    yield from (*FILES, DECISIONS)
