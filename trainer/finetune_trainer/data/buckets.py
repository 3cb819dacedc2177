"""Rows brought together by a hash, bucket by bucket, so that memory is the same however many rows there are.

Buckets lie in a file, by the first bits of the hash, and so in its order; each is read in pieces.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.mapped import new_mapped

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

CHUNK = 2**16  # rows that are worked on at once
BUCKET_ROWS = 2**19  # distinct ones of a bucket, about
HASHED = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<u8")])
# Rows of one hash: that which is worth the most, of these the first; how many they are, and their examples.
GROUP = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("row", "<u8"), ("worth", "<f8"), ("rows", "<i8"), ("examples", "<i8")]
)


class Hashes(Protocol):
    """(rows,) records with hash_high and hash_low, a part at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Any: ...


class Buckets:
    """The hashes of rows, in a file, in buckets by their first bits; within a bucket in the order of the rows.

    Rows of one hash are in one bucket, however many they are, so a bucket is read in pieces. without: (rows,) of which
    those that are not 0 are in none."""

    def __init__(self, path: Path, hashes: Hashes, without: Array | None = None) -> None:
        self._hashes, self._without = hashes, without
        self._bits = (max(0, len(hashes) - 1) // BUCKET_ROWS).bit_length()
        self.count = 2**self._bits
        sizes = np.zeros(self.count, dtype=np.int64)
        begins = range(0, len(hashes), CHUNK)
        for begin in begins:
            sizes += np.bincount(self._of(self._part(begin)), minlength=self.count)
        self._bounds = np.concatenate([[0], np.cumsum(sizes)])
        self._hashed = new_mapped(path, HASHED, int(self._bounds[-1]))
        free = self._bounds[:-1].copy()
        for begin in begins:
            part = self._part(begin)
            bucket = self._of(part)
            sizes = np.bincount(bucket, minlength=self.count)
            places = np.arange(len(part)) + np.repeat(free - np.cumsum(sizes) + sizes, sizes)
            self._hashed[places] = part[np.argsort(bucket, kind="stable")]
            free += sizes

    def _part(self, begin: int) -> Array:
        """Return a chunk of the rows that are in a bucket: (…,) HASHED."""
        part = self._hashes[begin : begin + CHUNK]
        rows = np.arange(begin, begin + len(part), dtype=np.uint64)
        if self._without is not None:
            within = self._without[begin : begin + CHUNK] == 0
            part, rows = part[within], rows[within]
        hashed = np.empty(len(part), dtype=HASHED)
        hashed["high"], hashed["low"], hashed["row"] = part["hash_high"], part["hash_low"], rows
        return hashed

    def _of(self, hashed: Array) -> npt.NDArray[np.int64]:
        """(rows,) the bucket of each."""
        return ((hashed["high"] >> np.uint64(1)) >> np.uint64(63 - self._bits)).astype(np.int64)

    def pieces(self, bucket: int) -> Iterator[Array]:
        """Yield what is in a bucket, a bounded part at a time."""
        first, last = int(self._bounds[bucket]), int(self._bounds[bucket + 1])
        for begin in range(first, last, BUCKET_ROWS):
            yield self._hashed[begin : min(last, begin + BUCKET_ROWS)]


def first_of_each(high: Array, low: Array) -> Mask:
    """(rows,) whether each is the first of its hash. high, low: halves of the hashes, in their order."""
    is_first = np.ones(len(high), dtype=np.bool_)
    is_first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    return is_first


def alone(piece: Array, worth: Array | float = 1.0, examples: Array | int = 1) -> Array:
    """Return each row as a group of itself."""
    groups = np.empty(len(piece), dtype=GROUP)
    for name in HASHED.names or ():
        groups[name] = piece[name]
    groups["worth"], groups["rows"], groups["examples"] = worth, 1, examples
    return groups


def gathered(groups: Array, more: Array) -> Array:
    """Return the groups of both, those of one hash being one, in the order of their hashes."""
    both = np.concatenate([groups, more])
    both = both[np.lexsort((both["row"], -both["worth"], both["low"], both["high"]))]
    firsts = np.flatnonzero(first_of_each(both["high"], both["low"]))
    found = both[firsts]
    if len(found) < len(both):
        for name in ("rows", "examples"):
            found[name] = np.add.reduceat(both[name], firsts)
    return found


def groups_of(pieces: Iterable[Array], each: Callable[[Array], Array] = alone) -> Array:
    """Return the groups of a bucket. each: the rows of a piece as groups of themselves."""
    groups = np.empty(0, dtype=GROUP)
    for piece in pieces:
        groups = gathered(groups, each(piece))
    return groups


class CopiesIn(NamedTuple):
    """(…,) rows of a piece, and of which row each is a copy."""

    rows: Array
    of: Array


def copies_in(groups: Array, piece: Array) -> CopiesIn:
    """Return the rows of a piece that are not the one of their group."""
    of = groups["row"][group_of_each(groups, piece)]
    is_copy = of != piece["row"]
    return CopiesIn(piece["row"][is_copy], of[is_copy])


def group_of_each(groups: Array, piece: Array) -> npt.NDArray[np.int64]:
    """(rows,) the place among the groups of each row's own; -1 where it is not there. groups: each hash once."""
    high, low = (np.concatenate([groups[name], piece[name]]) for name in ("high", "low"))
    order = np.lexsort((low, high))  # stable: a group comes before the rows of its hash
    is_first = first_of_each(high[order], low[order])
    first = order[is_first][np.cumsum(is_first) - 1]
    found = np.empty(len(order), dtype=np.int64)
    found[order] = np.where(first < len(groups), first, -1)
    return found[len(groups) :]
