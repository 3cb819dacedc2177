"""Prepared rows on local disk: one pass writes all of them, a second divides them into train and held-out.

Memory: a few MiB of buffers, and about 60 bytes per row while dividing.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from finetune_api.base import sha256_digest
from finetune_api.defaults import HOLDOUT_FRACTION, MAX_HELD_OUT_ROWS, MIN_ROWS_TO_HOLD_OUT
from finetune_trainer.data.tokens import Tokens

Array = npt.NDArray[Any]

# One record per row of the input: where it came from, the hash of its content, and what became of it.
ROW = np.dtype(
    [
        ("hash_high", "<u8"),
        ("hash_low", "<u8"),
        ("file", "<u4"),
        ("number", "<u8"),
        ("sequences", "<u4"),
        ("prompt_tokens", "<u4"),
    ]
)
SEQUENCE = np.dtype([("tokens", "<u4"), ("labels", "<u4")])
_COPY_TOKENS = 2**20


class Spool:
    """Appends rows, each of one or more sequences, to files in `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._files = {name: (folder / name).open("wb") for name in ("tokens", "labels", "rows", "sequences")}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def append(self, content_hash: bytes, file: int, number: int, sequences: list[Tokens]) -> None:
        """Add one row of the input."""
        high, low = int.from_bytes(content_hash[:8], "big"), int.from_bytes(content_hash[8:], "big")
        record = np.array((high, low, file, number, len(sequences), sequences[0].prompt_tokens), dtype=ROW)
        self._files["rows"].write(record.tobytes())
        for ids, labels, _ in sequences:
            self._files["tokens"].write(ids.astype("<u4", copy=False).tobytes())
            self._files["labels"].write(labels.tobytes())
            self._files["sequences"].write(
                len(ids).to_bytes(4, "little") + int(labels.sum(dtype=np.int64)).to_bytes(4, "little")
            )


@dataclass(frozen=True)
class Division:
    """What each row is for."""

    rows: Array  # (rows,) ROW
    sequences: Array  # (sequences,) SEQUENCE
    first_sequence: npt.NDArray[np.int64]  # (rows + 1,)
    held_out: npt.NDArray[np.bool_]  # (rows,)
    dropped: npt.NDArray[np.bool_]  # (rows,) copies of held-out rows
    copies: npt.NDArray[np.bool_]  # (rows,) of a row that was read before
    distinct: int

    def sequences_of(self, rows: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """(sequences,) whether each belongs to one of `rows`."""
        return np.repeat(rows, self.rows["sequences"].astype(np.int64))

    @property
    def train(self) -> npt.NDArray[np.bool_]:
        return ~(self.held_out | self.dropped)


def divide(folder: Path, fraction: float | None) -> Division:
    """Choose held-out rows by the hash of their content, the smallest hashes first.

    The choice does not depend on order, files or seed. Of equal rows the first is held out and the others are
    dropped, so that no held-out row is trained on. fraction: of the distinct rows; None takes HOLDOUT_FRACTION, at
    most MAX_HELD_OUT_ROWS rows and sequences, and nothing of fewer than MIN_ROWS_TO_HOLD_OUT rows.
    """
    rows = np.fromfile(folder / "rows", dtype=ROW)
    sequences = np.fromfile(folder / "sequences", dtype=SEQUENCE)
    order = np.lexsort((rows["hash_low"], rows["hash_high"]))  # stable: of equal rows the first read comes first
    high, low = rows["hash_high"][order], rows["hash_low"][order]
    is_first = np.ones(len(rows), dtype=np.bool_)
    is_first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    firsts = order[is_first]
    chosen = firsts[: _held_out_count(len(firsts), fraction)]
    if fraction is None:
        cumulated = np.cumsum(rows["sequences"][chosen].astype(np.int64))
        chosen = chosen[: max(1, int(np.searchsorted(cumulated, MAX_HELD_OUT_ROWS, side="right")))]
    held_out = np.zeros(len(rows), dtype=np.bool_)
    held_out[chosen] = True
    group = np.empty(len(rows), dtype=np.int64)
    group[order] = np.cumsum(is_first) - 1
    in_held_group = np.zeros(len(firsts), dtype=np.bool_)
    in_held_group[group[chosen]] = True
    first_sequence = np.concatenate([[0], np.cumsum(rows["sequences"].astype(np.int64))])
    copies = np.ones(len(rows), dtype=np.bool_)
    copies[firsts] = False
    dropped = in_held_group[group] & ~held_out
    return Division(rows, sequences, first_sequence, held_out, dropped, copies, len(firsts))


def _held_out_count(distinct: int, fraction: float | None) -> int:
    if fraction is None:
        if distinct < MIN_ROWS_TO_HOLD_OUT:
            return 0
        return min(max(1, round(HOLDOUT_FRACTION * distinct)), MAX_HELD_OUT_ROWS)
    return min(round(fraction * distinct), max(0, distinct - 1))


@dataclass(frozen=True)
class Written:
    """The three files of one split and their SHA-256."""

    folder: Path
    sha256: dict[str, str]  # tokens, labels, offsets


def write_split(
    spool: Path, target: Path, keep: npt.NDArray[np.bool_], lengths: Array, beat: Callable[[], None] = lambda: None
) -> Written:
    """Copy the kept sequences, in order, calling `beat` with every part. keep, lengths: (sequences,)."""
    target.mkdir(parents=True, exist_ok=True)
    bounds = np.concatenate([[0], np.cumsum(lengths.astype(np.int64))])
    sha256 = {
        name: _copy(spool / name, target / name, dtype, _runs(keep, bounds), beat)
        for name, dtype in (("tokens", "<u4"), ("labels", "<u1"))
    }
    offsets = np.concatenate([[0], np.cumsum(lengths[keep].astype(np.int64))]).astype("<i8")
    content = offsets.tobytes()
    (target / "offsets").write_bytes(content)
    return Written(target, {**sha256, "offsets": sha256_digest(content)})


def _runs(keep: npt.NDArray[np.bool_], bounds: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Token ranges of neighbouring kept sequences."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        yield int(bounds[first]), int(bounds[last])


def _copy(source: Path, target: Path, dtype: str, runs: Iterator[tuple[int, int]], beat: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    width = np.dtype(dtype).itemsize
    with source.open("rb") as reader, target.open("wb") as writer:
        for begin, end in runs:
            reader.seek(begin * width)
            left = (end - begin) * width
            while left:
                piece = reader.read(min(left, _COPY_TOKENS))
                if not piece:
                    raise EOFError(f"{source.name} is shorter than its index")
                digest.update(piece)
                writer.write(piece)
                beat()
                left -= len(piece)
    return "sha256:" + digest.hexdigest()
