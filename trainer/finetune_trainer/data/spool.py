"""Prepared examples on local disk: one pass writes all of them, a second divides them into train and held-out.

Memory: a few MiB of buffers, and about 100 bytes per row while dividing.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from finetune_api.base import sha256_digest
from finetune_api.defaults import HOLDOUT_FRACTION, MAX_HELD_OUT_ROWS, MIN_ROWS_TO_HOLD_OUT
from finetune_trainer.data.examples import ARRAYS, COLUMNS, Tree, leaves_of

Array = npt.NDArray[Any]

# One record per row of the input: where it came from, the hash of its content, and what became of it.
ROW = np.dtype(
    [
        ("hash_high", "<u8"),
        ("hash_low", "<u8"),
        ("file", "<u4"),
        ("number", "<u8"),
        ("examples", "<u4"),
        ("prompt_tokens", "<u4"),
        ("weight", "<f4"),
    ]
)
EXAMPLE = np.dtype(
    [
        ("segments", "<u4"),
        ("stored_tokens", "<u4"),  # of all segments
        ("sequences", "<u4"),  # flat ones
        ("tokens", "<u8"),  # of all flat sequences
        ("longest", "<u4"),  # tokens of the longest flat sequence
        ("labels", "<u4"),
    ]
)
_SEGMENT = np.dtype([("length", "<u4"), ("parent", "<u4")])
_COPY_BYTES = 2**20
FILES = ("tokens", "labels", "segments", "rows", "examples")


class Spool:
    """Appends rows, each of one or more examples, to files in `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._files = {name: (folder / name).open("wb") for name in FILES}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def take(self, part: Path, first_file: int) -> None:
        """Add the rows of a partition that another spool wrote. first_file: what its file 0 is here."""
        for name, file in self._files.items():
            if name == "rows":
                rows = np.fromfile(part / name, dtype=ROW)
                rows["file"] += first_file
                file.write(rows.tobytes())
                continue
            with (part / name).open("rb") as source:
                shutil.copyfileobj(source, file, _COPY_BYTES)

    def append(
        self,
        content_hash: bytes,
        file: int,
        number: int,
        examples: list[Tree],
        *,
        prompt_tokens: int = 0,
        weight: float = 1.0,
    ) -> None:
        """Add one row of the input. prompt_tokens: of its first flat sequence, before what is to be answered."""
        high, low = int.from_bytes(content_hash[:8], "big"), int.from_bytes(content_hash[8:], "big")
        record = np.array((high, low, file, number, len(examples), prompt_tokens, weight), dtype=ROW)
        self._files["rows"].write(record.tobytes())
        for tree in examples:
            segments = np.empty(len(tree.lengths), dtype=_SEGMENT)
            segments["length"], segments["parent"] = tree.lengths, tree.parents
            self._files["tokens"].write(tree.tokens.astype("<u4", copy=False).tobytes())
            self._files["labels"].write(tree.labels.tobytes())
            self._files["segments"].write(segments.tobytes())
            self._files["examples"].write(_example(tree).tobytes())


def _example(tree: Tree) -> Array:
    """Return the record of one example."""
    until = flat_lengths(tree)
    labels = int(tree.labels.sum(dtype=np.int64))
    return np.array(
        (len(tree.lengths), len(tree.tokens), len(until), sum(until), max(until), labels),
        dtype=EXAMPLE,
    )


def flat_lengths(tree: Tree) -> list[int]:
    """Return the tokens of each flat sequence of a tree."""
    if len(tree.lengths) == 1:
        return [len(tree.tokens)]
    through = tree.lengths.tolist()  # tokens from the root through each segment
    for segment, up in enumerate(tree.parents.tolist()):
        if up:
            through[segment] += through[segment - up]
    return [through[leaf] for leaf in leaves_of(tree.parents).tolist()]


@dataclass(frozen=True)
class Division:
    """What each row is for."""

    rows: Array  # (rows,) ROW
    examples: Array  # (examples,) EXAMPLE
    first_example: npt.NDArray[np.int64]  # (rows + 1,)
    held_out: npt.NDArray[np.bool_]  # (rows,)
    dropped: npt.NDArray[np.bool_]  # (rows,) copies of held-out rows
    copy_of: npt.NDArray[np.int64]  # (rows,) the first row that says the same, which may be the row itself
    distinct: int

    def examples_of(self, rows: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """(examples,) whether each belongs to one of `rows`."""
        return np.repeat(rows, self.rows["examples"].astype(np.int64))

    @property
    def copies(self) -> npt.NDArray[np.bool_]:
        """(rows,) whether each says the same as one that was read before."""
        return self.copy_of != np.arange(len(self.rows))

    @property
    def train(self) -> npt.NDArray[np.bool_]:
        return ~(self.held_out | self.dropped)


def divide(folder: Path, fraction: float | None) -> Division:
    """Choose held-out rows by the hash of their content, the smallest hashes first.

    The choice does not depend on order, files or seed. Of equal rows the first is held out and the others are
    dropped, so that no held-out row is trained on. fraction: of the distinct rows; None takes HOLDOUT_FRACTION, at
    most MAX_HELD_OUT_ROWS rows and examples, and nothing of fewer than MIN_ROWS_TO_HOLD_OUT rows.
    """
    rows = np.fromfile(folder / "rows", dtype=ROW)
    examples = np.fromfile(folder / "examples", dtype=EXAMPLE)
    order = np.lexsort((rows["hash_low"], rows["hash_high"]))  # stable: of equal rows the first read comes first
    high, low = rows["hash_high"][order], rows["hash_low"][order]
    is_first = np.ones(len(rows), dtype=np.bool_)
    is_first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    firsts = order[is_first]
    chosen = firsts[: _held_out_count(len(firsts), fraction)]
    if fraction is None:
        cumulated = np.cumsum(rows["examples"][chosen].astype(np.int64))
        chosen = chosen[: max(1, int(np.searchsorted(cumulated, MAX_HELD_OUT_ROWS, side="right")))]
    held_out = np.zeros(len(rows), dtype=np.bool_)
    held_out[chosen] = True
    group = np.empty(len(rows), dtype=np.int64)
    group[order] = np.cumsum(is_first) - 1
    in_held_group = np.zeros(len(firsts), dtype=np.bool_)
    in_held_group[group[chosen]] = True
    first_example = np.concatenate([[0], np.cumsum(rows["examples"].astype(np.int64))])
    dropped = in_held_group[group] & ~held_out
    return Division(rows, examples, first_example, held_out, dropped, firsts[group], len(firsts))


def _held_out_count(distinct: int, fraction: float | None) -> int:
    if fraction is None:
        if distinct < MIN_ROWS_TO_HOLD_OUT:
            return 0
        return min(max(1, round(HOLDOUT_FRACTION * distinct)), MAX_HELD_OUT_ROWS)
    return min(round(fraction * distinct), max(0, distinct - 1))


def prepared_bytes(examples: Array) -> int:
    """Return what the arrays of these examples take on disk. examples: (examples,) EXAMPLE."""
    tokens, segments = (int(examples[name].sum(dtype=np.int64)) for name in ("stored_tokens", "segments"))
    per_example = sum(COLUMNS[name].itemsize for name in COLUMNS) + ARRAYS["example_offsets"].itemsize
    per_segment = ARRAYS["segment_offsets"].itemsize + ARRAYS["parents"].itemsize
    return 5 * tokens + per_segment * segments + per_example * len(examples) + 64


@dataclass(frozen=True)
class Written:
    """The arrays of one split, one file each, and their SHA-256 by name."""

    folder: Path
    sha256: dict[str, str]


def write_split(
    spool: Path, target: Path, division: Division, rows: npt.NDArray[np.bool_], beat: Callable[[], None] = lambda: None
) -> Written:
    """Copy the examples of the chosen rows, in order, calling `beat` with every part. rows: (rows,)."""
    target.mkdir(parents=True, exist_ok=True)
    keep, examples = division.examples_of(rows), division.examples
    tokens = np.concatenate([[0], np.cumsum(examples["stored_tokens"].astype(np.int64))])
    sha256 = {
        name: _copy(spool / name, target / name, ARRAYS[name], _runs(keep, tokens), beat)
        for name in ("tokens", "labels")
    }
    segments = np.fromfile(spool / "segments", dtype=_SEGMENT)[np.repeat(keep, examples["segments"])]
    kept = division.rows[rows]
    counts = kept["examples"].astype(np.int64)
    arrays = {
        "segment_offsets": np.concatenate([[0], np.cumsum(segments["length"].astype(np.int64))]),
        "parents": segments["parent"],
        "example_offsets": np.concatenate([[0], np.cumsum(examples["segments"][keep].astype(np.int64))]),
        "file": np.repeat(kept["file"], counts),
        "row": np.repeat(kept["number"], counts),
        "weight": np.repeat(kept["weight"], counts),
    }
    for name, array in arrays.items():
        content = array.astype((ARRAYS | COLUMNS)[name]).tobytes()
        (target / name).write_bytes(content)
        sha256[name] = sha256_digest(content)
    return Written(target, sha256)


def _runs(keep: npt.NDArray[np.bool_], bounds: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Token ranges of neighbouring kept examples."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        yield int(bounds[first]), int(bounds[last])


def _copy(
    source: Path, target: Path, dtype: np.dtype[Any], runs: Iterator[tuple[int, int]], beat: Callable[[], None]
) -> str:
    digest = hashlib.sha256()
    width = dtype.itemsize
    with source.open("rb") as reader, target.open("wb") as writer:
        for begin, end in runs:
            reader.seek(begin * width)
            left = (end - begin) * width
            while left:
                piece = reader.read(min(left, _COPY_BYTES))
                if not piece:
                    raise EOFError(f"{source.name} is shorter than its index")
                digest.update(piece)
                writer.write(piece)
                beat()
                left -= len(piece)
    return "sha256:" + digest.hexdigest()
