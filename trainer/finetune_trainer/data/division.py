"""Choose what each row in the spool is for: trained on, held out, or dropped as a copy of one that is held out.

Memory is the same however many rows there are. Rows, examples and what is chosen are mapped from files and read in
chunks; equal rows are found bucket by bucket, by the first bits of the hash of their content, and so in its order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finetune_api.defaults import HOLDOUT_FRACTION, MAX_HELD_OUT_ROWS, MIN_ROWS_TO_HOLD_OUT
from finetune_trainer.data.accounts import RowPlace
from finetune_trainer.data.mapped import mapped, new_mapped
from finetune_trainer.data.spool import EXAMPLE, ROW

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

CHUNK = 2**16  # rows, and examples if no row has more, that are worked on at once
BUCKET_ROWS = 2**19  # distinct ones of a bucket, about; of all rows 24 bytes each lie on disk while they are divided
DIVIDING_BYTES = 24 + 1 + 8  # of disk, for a row: its hash and number, its use, and the row that it is a copy of
_HELD_OUT, _DROPPED, _COPY = 1, 2, 4  # bits of a row's use
_HASHED = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<u8")])
JOINED = np.dtype([("row", "<u8"), ("file", "<u4"), ("number", "<u8")])


@dataclass(frozen=True)
class Chunk:
    """Rows that lie beside one another, with their examples. first_…: how many lie before them in the spool."""

    first_row: int
    first_segment: int
    first_token: int
    rows: Array  # (rows,) ROW
    use: npt.NDArray[np.uint8]  # (rows,)
    examples: Array  # (examples,) EXAMPLE

    @property
    def held_out(self) -> Mask:
        return (self.use & _HELD_OUT) != 0

    @property
    def dropped(self) -> Mask:
        """(rows,) whether each is a copy of a row that is held out."""
        return (self.use & _DROPPED) != 0

    @property
    def copies(self) -> Mask:
        """(rows,) whether each says the same as one that was read before."""
        return (self.use & _COPY) != 0

    @property
    def train(self) -> Mask:
        return (self.use & (_HELD_OUT | _DROPPED)) == 0

    def examples_of(self, rows: Mask) -> Mask:
        """(examples,) whether each belongs to one of `rows`."""
        return np.repeat(rows, self.rows["examples"])


@dataclass(frozen=True, kw_only=True)
class Division:
    """What each row is for; the arrays are mapped from files.

    joined: (…,) JOINED, rows of the input that are in the examples of another row, which is for both."""

    rows: Array  # (rows,) ROW
    examples: Array  # (examples,) EXAMPLE
    use: npt.NDArray[np.uint8]  # (rows,)
    copy_of: npt.NDArray[np.int64]  # (rows,) of a dropped row, the held-out one that says the same; 0 of the others
    distinct: int
    held_out: int  # rows
    dropped: int  # rows
    joined: Array = field(default_factory=lambda: np.empty(0, dtype=JOINED))

    @property
    def trained(self) -> int:
        """Return how many rows are trained on."""
        return len(self.rows) - self.held_out - self.dropped

    def rows_by_file(self, files: int) -> list[tuple[int, int]]:
        """Return of each of so many files how many rows are trained on, and how many are held out."""
        counts = np.zeros((files, 2), dtype=np.int64)
        for begin in range(0, len(self.joined), CHUNK):
            part = self.joined[begin : begin + CHUNK]
            held_out = (self.use[part["row"]] & _HELD_OUT) != 0
            np.add.at(counts[:, 0], part["file"][~held_out], 1)
            np.add.at(counts[:, 1], part["file"][held_out], 1)
        for chunk in self.chunks():
            np.add.at(counts[:, 0], chunk.rows["file"][chunk.train], 1)
            np.add.at(counts[:, 1], chunk.rows["file"][chunk.held_out], 1)
        return [(trained, held_out) for trained, held_out in counts.tolist()]

    def held_out_places(self) -> Iterator[RowPlace]:
        """Yield where the rows that are held out stand."""
        for chunk in self.chunks():
            yield from _places(chunk.rows[chunk.held_out])
        for begin in range(0, len(self.joined), CHUNK):
            part = self.joined[begin : begin + CHUNK]
            yield from _places(part[(self.use[part["row"]] & _HELD_OUT) != 0])

    def chunks(self) -> Iterator[Chunk]:
        """Yield all rows, in order."""
        row = example = segment = token = 0
        while row < len(self.rows):
            until = np.cumsum(self.rows["examples"][row : row + CHUNK], dtype=np.int64)
            rows = max(1, int(np.searchsorted(until, CHUNK, side="right")))
            examples = self.examples[example : example + int(until[rows - 1])]
            yield Chunk(row, segment, token, self.rows[row : row + rows], self.use[row : row + rows], examples)
            row, example = row + rows, example + len(examples)
            segment += int(examples["segments"].sum(dtype=np.int64))
            token += int(examples["stored_tokens"].sum(dtype=np.int64))


def _places(records: Array) -> Iterator[RowPlace]:
    """Yield where rows stand. records: with `file` and `number`."""
    for record in records:
        yield RowPlace(int(record["file"]), int(record["number"]))


def divide(
    folder: Path,
    fraction: float | None,
    beat: Callable[[], None] = lambda: None,
    clusters: Array | None = None,
) -> Division:
    """Choose held-out rows by the hash of their content, the smallest hashes first, calling `beat` with every bucket.

    The choice does not depend on order, files or seed. Of equal rows the first is held out and the others are
    dropped, so that no held-out row is trained on. fraction: of the distinct rows; None takes HOLDOUT_FRACTION, at
    most MAX_HELD_OUT_ROWS rows and examples, and nothing of fewer than MIN_ROWS_TO_HOLD_OUT rows.
    clusters: (rows,) CLUSTER, equal for rows of which none may be trained on where another is held out; None takes the
    hash of their content.
    """
    rows, examples = mapped(folder / "rows", ROW), mapped(folder / "examples", EXAMPLE)
    use = new_mapped(folder / "use", np.dtype(np.uint8), len(rows))
    copy_of = new_mapped(folder / "copy_of", np.dtype("<i8"), len(rows))
    path = folder / "hashes"
    buckets = Buckets(path, rows if clusters is None else clusters)
    distinct = 0
    for bucket in range(buckets.count):
        distinct += len(_distinct(buckets.pieces(bucket), use))
        beat()
    held_out = dropped = 0
    for bucket, chosen in _chosen(buckets, rows, _held_out_count(distinct, fraction), is_default=fraction is None):
        use[chosen["row"]] |= np.uint8(_HELD_OUT)
        held_out += len(chosen)
        for piece in buckets.pieces(bucket):
            copies = _copies_of(chosen, piece)
            use[copies.rows] |= np.uint8(_DROPPED)
            copy_of[copies.rows] = copies.of
            dropped += len(copies.rows)
        beat()
    path.unlink()
    return Division(
        rows=rows, examples=examples, use=use, copy_of=copy_of, distinct=distinct, held_out=held_out, dropped=dropped
    )


def _held_out_count(distinct: int, fraction: float | None) -> int:
    if fraction is None:
        if distinct < MIN_ROWS_TO_HOLD_OUT:
            return 0
        return min(max(1, round(HOLDOUT_FRACTION * distinct)), MAX_HELD_OUT_ROWS)
    return min(round(fraction * distinct), max(0, distinct - 1))


class Buckets:
    """The hashes of all rows, in a file, in buckets by their first bits; within a bucket in the order of the rows.

    Rows that say the same are in one bucket, however many they are, so a bucket is read in pieces."""

    def __init__(self, path: Path, rows: Array) -> None:
        self._bits = (max(0, len(rows) - 1) // BUCKET_ROWS).bit_length()
        self.count = 2**self._bits
        sizes = np.zeros(self.count, dtype=np.int64)
        chunks = range(0, len(rows), CHUNK)
        for begin in chunks:
            sizes += np.bincount(self._of(rows[begin : begin + CHUNK]), minlength=self.count)
        self._bounds = np.concatenate([[0], np.cumsum(sizes)])
        self._hashed = new_mapped(path, _HASHED, len(rows))
        free = self._bounds[:-1].copy()
        for begin in chunks:
            part = rows[begin : begin + CHUNK]
            bucket = self._of(part)
            order = np.argsort(bucket, kind="stable")
            sizes = np.bincount(bucket, minlength=self.count)
            hashed = np.empty(len(part), dtype=_HASHED)
            hashed["high"], hashed["low"], hashed["row"] = (
                part["hash_high"][order],
                part["hash_low"][order],
                begin + order,
            )
            self._hashed[np.arange(len(part)) + np.repeat(free - np.cumsum(sizes) + sizes, sizes)] = hashed
            free += sizes

    def _of(self, rows: Array) -> npt.NDArray[np.int64]:
        """(rows,) the bucket of each."""
        return ((rows["hash_high"] >> np.uint64(1)) >> np.uint64(63 - self._bits)).astype(np.int64)

    def pieces(self, bucket: int) -> Iterator[Array]:
        """Yield what is in a bucket, a bounded part at a time."""
        first, last = int(self._bounds[bucket]), int(self._bounds[bucket + 1])
        for begin in range(first, last, BUCKET_ROWS):
            yield self._hashed[begin : min(last, begin + BUCKET_ROWS)]


class _Groups(NamedTuple):
    """Hashed rows in the order of their hashes, and which of them begin the rows of one hash."""

    hashed: Array
    is_first: Mask


def _grouped(first: Array, then: Array) -> _Groups:
    """Bring rows into the order of their hashes; of equal ones, those of `first` come first."""
    hashed = np.concatenate([first, then])
    hashed = hashed[np.lexsort((hashed["low"], hashed["high"]))]  # stable
    is_first = np.ones(len(hashed), dtype=np.bool_)
    high, low = hashed["high"], hashed["low"]
    is_first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    return _Groups(hashed, is_first)


def _distinct(pieces: Iterator[Array], use: npt.NDArray[np.uint8]) -> Array:
    """Return the first row of each content, in the order of hashes, and mark the others as copies."""
    found = np.empty(0, dtype=_HASHED)
    for piece in pieces:
        hashed, is_first = _grouped(found, piece)
        use[hashed["row"][~is_first]] |= np.uint8(_COPY)
        found = hashed[is_first]
    return found


def _chosen(buckets: Buckets, rows: Array, count: int, *, is_default: bool) -> Iterator[tuple[int, Array]]:
    """Yield the rows of each bucket that are held out, until they are `count`, or so many examples as by default."""
    chosen = examples = 0
    for bucket in range(buckets.count):
        if chosen == count:
            return
        found = np.empty(0, dtype=_HASHED)
        for piece in buckets.pieces(bucket):
            hashed, is_first = _grouped(found, piece)
            found = hashed[is_first][: count - chosen]
        if is_default:
            until = examples + np.cumsum(rows["examples"][found["row"]], dtype=np.int64)
            fitting = int(np.searchsorted(until, MAX_HELD_OUT_ROWS, side="right"))
            if fitting < len(found):
                count = max(1, chosen + fitting)
                found = found[: count - chosen]
            examples = int(until[len(found) - 1]) if len(found) else examples
        chosen += len(found)
        yield bucket, found


class _Copies(NamedTuple):
    """Rows, and the row that each of them is a copy of."""

    rows: npt.NDArray[np.uint64]
    of: npt.NDArray[np.int64]


def _copies_of(chosen: Array, piece: Array) -> _Copies:
    """Return the rows of a piece that say the same as one that was chosen, and are not that one."""
    hashed, is_first = _grouped(chosen, piece)
    first_rows = hashed["row"][is_first][np.cumsum(is_first) - 1]
    is_copy = np.isin(first_rows, chosen["row"]) & (hashed["row"] != first_rows)
    return _Copies(hashed["row"][is_copy], first_rows[is_copy].astype(np.int64))
