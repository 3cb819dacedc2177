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
from finetune_trainer.data.buckets import (
    CHUNK,
    HASHED,
    Buckets,
    alone,
    copies_in,
    group_of_each,
    groups_of,
)
from finetune_trainer.data.left_out import LEFT_OUT
from finetune_trainer.data.mapped import mapped, new_mapped
from finetune_trainer.data.spool import CLUSTER, EXAMPLE, ROW

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

# Of disk, for a row: its hash, its use, what it is a copy of, whether it is left out; and, where near copies are looked
# for, whether it is compared, where its shingles begin, its component and its cluster.
DIVIDING_BYTES = HASHED.itemsize + 1 + 8 + LEFT_OUT.itemsize + 1 + 8 + 8 + CLUSTER.itemsize
_HELD_OUT, _DROPPED, _COPY, _LEFT_OUT = 1, 2, 4, 8  # bits of a row's use
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
        """(rows,) whether each is for nothing: left out before, or a copy of a row that is held out."""
        return (self.use & (_DROPPED | _LEFT_OUT)) != 0

    @property
    def copies_of_held_out(self) -> Mask:
        return (self.use & _DROPPED) != 0

    @property
    def copies(self) -> Mask:
        """(rows,) whether each says the same as one that was read before."""
        return (self.use & _COPY) != 0

    @property
    def train(self) -> Mask:
        return (self.use & (_HELD_OUT | _DROPPED | _LEFT_OUT)) == 0

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
    copy_of: npt.NDArray[np.int64]  # (rows,) of a copy, the first row that says the same; 0 of the others
    distinct: int
    held_out: int  # rows
    dropped: int  # rows that are copies of held-out ones
    left_out: int = 0  # rows that were for nothing before
    smallest: int = 0  # distinct rows of the smallest cluster, where none could be held out
    joined: Array = field(default_factory=lambda: np.empty(0, dtype=JOINED))

    @property
    def trained(self) -> int:
        """Return how many rows are trained on."""
        return len(self.rows) - self.held_out - self.dropped - self.left_out

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
    left_out: Array | None = None,
) -> Division:
    """Choose held-out rows by the hash of their content, the smallest hashes first, calling `beat` with every bucket.

    The choice does not depend on order, files or seed. Of equal rows the first is held out and the others are
    dropped, so that no held-out row is trained on. fraction: of the distinct rows; None takes HOLDOUT_FRACTION, at
    most MAX_HELD_OUT_ROWS rows and examples, and nothing of fewer than MIN_ROWS_TO_HOLD_OUT rows.
    clusters: (rows,) CLUSTER, equal for rows that are held out together or not at all, as equal rows must be; those of
    which there are too many stay in training. None takes the hash of their content.
    left_out: (rows,) what is not 0 of a row that is for nothing.
    """
    rows, examples = mapped(folder / "rows", ROW), mapped(folder / "examples", EXAMPLE)
    use = new_mapped(folder / "use", np.dtype(np.uint8), len(rows))
    copy_of = new_mapped(folder / "copy_of", np.dtype("<i8"), len(rows))
    before = 0 if left_out is None else _mark_left_out(left_out, use)
    path = folder / "hashes"
    buckets = Buckets(path, rows, left_out)
    distinct = 0
    for bucket in range(buckets.count):
        distinct += _mark_copies(buckets, bucket, use, copy_of)
        beat()
    if clusters is not None:
        buckets = Buckets(path, clusters, left_out)
    room = _Room(_held_out_count(distinct, fraction), MAX_HELD_OUT_ROWS if fraction is None else None)
    held_out = dropped = 0
    for bucket, chosen in _chosen(buckets, rows, use, room):
        for piece in buckets.pieces(bucket):
            found = piece["row"][group_of_each(chosen, piece) >= 0]
            is_copy = (use[found] & _COPY) != 0
            use[found] |= np.where(is_copy, _DROPPED, _HELD_OUT).astype(np.uint8)
            held_out, dropped = held_out + int((~is_copy).sum()), dropped + int(is_copy.sum())
        beat()
    smallest = 0 if held_out else _smallest(buckets, use)
    path.unlink()
    return Division(
        rows=rows,
        examples=examples,
        use=use,
        copy_of=copy_of,
        distinct=distinct,
        held_out=held_out,
        dropped=dropped,
        left_out=before,
        smallest=smallest,
    )


def _mark_left_out(left_out: Array, use: npt.NDArray[np.uint8]) -> int:
    """Mark the rows that are for nothing; return how many they are."""
    count = 0
    for begin in range(0, len(use), CHUNK):
        is_left_out = left_out[begin : begin + CHUNK] != 0
        use[begin : begin + CHUNK] = np.where(is_left_out, _LEFT_OUT, 0)
        count += int(is_left_out.sum())
    return count


def _held_out_count(distinct: int, fraction: float | None) -> int:
    if fraction is None:
        if distinct < MIN_ROWS_TO_HOLD_OUT:
            return 0
        return min(max(1, round(HOLDOUT_FRACTION * distinct)), MAX_HELD_OUT_ROWS)
    return min(round(fraction * distinct), max(0, distinct - 1))


def _mark_copies(buckets: Buckets, bucket: int, use: npt.NDArray[np.uint8], copy_of: npt.NDArray[np.int64]) -> int:
    """Mark the copies in a bucket, and of what; return how many rows say different things."""
    firsts = groups_of(buckets.pieces(bucket))
    if (firsts["rows"] > 1).any():
        for piece in buckets.pieces(bucket):
            copies = copies_in(firsts, piece)
            use[copies.rows] |= np.uint8(_COPY)
            copy_of[copies.rows] = copies.of
    return len(firsts)


class _Room(NamedTuple):
    """How many rows may still be held out, and examples, None for any number; of these the first row has as many as
    it has."""

    rows: int
    examples: int | None
    is_untouched: bool = True


def _smallest(buckets: Buckets, use: npt.NDArray[np.uint8]) -> int:
    """Return how many distinct rows the smallest cluster has; 0 without any."""
    found: list[int] = []
    for bucket in range(buckets.count):
        own = (piece[(use[piece["row"]] & _COPY) == 0] for piece in buckets.pieces(bucket))
        groups = groups_of(own)
        found += [int(groups["rows"].min())] if len(groups) else []
    return min(found, default=0)


def _chosen(buckets: Buckets, rows: Array, use: npt.NDArray[np.uint8], room: _Room) -> Iterator[tuple[int, Array]]:
    """Yield the clusters of each bucket that are held out, as far as there is room."""

    def without_copies(piece: Array) -> Array:
        own = piece[(use[piece["row"]] & _COPY) == 0]
        return alone(own, examples=rows["examples"][own["row"]])

    for bucket in range(buckets.count):
        if not room.rows:
            return
        groups = groups_of(buckets.pieces(bucket), without_copies)
        taken, room = _taken(groups, room)
        yield bucket, taken


class _Taken(NamedTuple):
    """Clusters that are held out, and what room is left."""

    groups: Array
    room: _Room


def _taken(groups: Array, room: _Room) -> _Taken:
    """Take clusters in order, passing over those that are larger than the room that is left; where their examples are
    more than there is room for, that is the end."""
    taken = [groups[:0]]
    while room.rows and len(groups := groups[groups["rows"] <= room.rows]):
        fitting = int(np.searchsorted(np.cumsum(groups["rows"]), room.rows, side="right"))
        within, is_end = fitting, False
        if room.examples is not None:
            within = int(np.searchsorted(np.cumsum(groups["examples"]), room.examples, side="right"))
            is_end = within < fitting
            fitting = max(within, int(room.is_untouched)) if is_end else fitting
        found, groups = groups[:fitting], groups[fitting:]
        taken.append(found)
        left = None if room.examples is None else max(0, room.examples - int(found["examples"].sum()))
        room = _Room(0 if is_end else room.rows - int(found["rows"].sum()), left, False)
    return _Taken(np.concatenate(taken), room)
