"""Write the arrays of one split: the examples of the rows that are trained on, or of those that are held out."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.division import Chunk, Division, Mask
from finetune_trainer.data.examples import ARRAYS, COLUMNS
from finetune_trainer.data.mapped import mapped
from finetune_trainer.data.spool import EXAMPLE, SEGMENT

SPLITS: dict[str, Callable[[Chunk], Mask]] = {
    "train": lambda chunk: chunk.train,
    "held_out": lambda chunk: chunk.held_out,
}
_RECORDS = "records"  # beside the arrays, for prepare alone
_COPY_BYTES = 2**20


@dataclass(frozen=True)
class Written:
    """The arrays of one split, one file each, and their SHA-256 by name; examples: (examples,) EXAMPLE, mapped."""

    folder: Path
    sha256: dict[str, str]
    examples: npt.NDArray[Any]


def write_split(
    spool: Path, target: Path, division: Division, split: str, beat: Callable[[], None] = lambda: None
) -> Written:
    """Copy the examples of a split's rows, in order, calling `beat` with every part."""
    target.mkdir(parents=True, exist_ok=True)
    labelled = any(bool(chunk.rows["label"].any()) for chunk in division.chunks())
    columns = [name for name in COLUMNS if labelled or name != "label"]
    files = {name: _Writing(target / name) for name in (*ARRAYS, *columns, _RECORDS)}
    for name in ("tokens", "labels"):
        runs = (run for chunk in division.chunks() for run in _runs(chunk, SPLITS[split]))
        _copy(spool / name, files[name], ARRAYS[name].itemsize, runs, beat)
    spooled = mapped(spool / "segments", SEGMENT)
    segments = tokens = 0
    files["segment_offsets"].add(np.zeros(1, dtype=np.int64))
    files["example_offsets"].add(np.zeros(1, dtype=np.int64))
    for chunk in division.chunks():
        rows = SPLITS[split](chunk)
        keep = chunk.examples_of(rows)
        examples = chunk.examples[keep]
        all_segments = int(chunk.examples["segments"].sum(dtype=np.int64))
        kept = spooled[chunk.first_segment : chunk.first_segment + all_segments]
        kept = kept[np.repeat(keep, chunk.examples["segments"])]
        segment_offsets = tokens + np.cumsum(kept["length"], dtype=np.int64)
        example_offsets = segments + np.cumsum(examples["segments"], dtype=np.int64)
        tokens, segments = _last(segment_offsets, tokens), _last(example_offsets, segments)
        counts = chunk.rows["examples"][rows]
        arrays = {
            "segment_offsets": segment_offsets,
            "parents": kept["parent"],
            "example_offsets": example_offsets,
            "file": np.repeat(chunk.rows["file"][rows], counts),
            "row": np.repeat(chunk.rows["number"][rows], counts),
            "weight": np.repeat(chunk.rows["weight"][rows], counts),
            "label": np.repeat(chunk.rows["label"][rows], counts),
            _RECORDS: examples,
        }
        for name, file in files.items():
            if name in arrays:
                file.add(arrays[name].astype((ARRAYS | COLUMNS).get(name, EXAMPLE), copy=False))
        beat()
    sha256 = {name: file.end() for name, file in files.items()}
    del sha256[_RECORDS]
    return Written(target, sha256, mapped(target / _RECORDS, EXAMPLE))


def _last(values: npt.NDArray[np.int64], before: int) -> int:
    return int(values[-1]) if len(values) else before


class _Writing:
    """A file that is written from its beginning to its end."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb")
        self._sha256 = hashlib.sha256()

    def add(self, content: bytes | npt.NDArray[Any]) -> None:
        data = content if isinstance(content, bytes) else content.tobytes()
        self._sha256.update(data)
        self._stream.write(data)

    def end(self) -> str:
        """Close the file and return its SHA-256."""
        self._stream.close()
        return "sha256:" + self._sha256.hexdigest()


def _runs(chunk: Chunk, split: Callable[[Chunk], Mask]) -> Iterator[tuple[int, int]]:
    """Yield where the tokens of neighbouring examples of a split begin and end in the spool."""
    keep = chunk.examples_of(split(chunk))
    bounds = np.concatenate([[0], np.cumsum(chunk.examples["stored_tokens"], dtype=np.int64)]) + chunk.first_token
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        yield int(bounds[first]), int(bounds[last])


def _copy(
    source: Path, target: _Writing, width: int, runs: Iterator[tuple[int, int]], beat: Callable[[], None]
) -> None:
    with source.open("rb") as reader:
        for begin, end in runs:
            reader.seek(begin * width)
            left = (end - begin) * width
            while left:
                piece = reader.read(min(left, _COPY_BYTES))
                if not piece:
                    raise EOFError(f"{source.name} is shorter than its index")
                target.add(piece)
                beat()
                left -= len(piece)
