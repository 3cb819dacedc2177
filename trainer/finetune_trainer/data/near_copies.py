"""Rows that say nearly the same as others: found by their sketches, told by their shingles, and which of them goes on.

An exchange between all rows, made once they are in the spool. Rows that share a band are brought together bucket by
bucket; those of them whose shingles have so much in common are joined. A chain of them is one cluster, however
long, but a row is left out only in favour of one that it is a near copy of itself: of a cluster the longest goes on,
of equally long ones that of the lowest hash, then, in order, each row that is no near copy of one that goes on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.buckets import CHUNK, Buckets, alone, first_of_each, group_of_each, groups_of
from finetune_trainer.data.components import Components
from finetune_trainer.data.left_out import Why
from finetune_trainer.data.mapped import mapped, new_mapped
from finetune_trainer.data.shingles import MAX_SHINGLES
from finetune_trainer.data.sketches import bands_for
from finetune_trainer.data.spool import CLUSTER, SIZES
from finetune_trainer.data.told_groups import ToldGroups

Array = npt.NDArray[Any]

_MOST_COMPARED = 64  # rows before it in one band, and rows of its cluster that go on, that a row is compared with
_BEAT_ROWS = 1000


@dataclass
class NearCopies:
    """What was found. copies: rows beside those of their cluster that go on."""

    told: ToldGroups
    copies: int = 0


class Sketched:
    """The rows of a spool with what is compared of them."""

    def __init__(self, folder: Path, rows: Array, similarity: float) -> None:
        self.rows, self._similarity = rows, similarity
        self.sizes = mapped(folder / "sizes", SIZES)
        bands = bands_for(similarity).bands
        self.bands = mapped(folder / "bands", np.dtype("<u8")).reshape(-1, bands)
        self._shingles = mapped(folder / "shingles", np.dtype("<u4"))
        self._begins = new_mapped(folder / "shingle_begins", np.dtype("<i8"), len(rows))
        before = 0
        for at in range(0, len(rows), CHUNK):
            part = self.sizes[at : at + CHUNK]
            until = np.cumsum(part["asked"].astype(np.int64) + part["said"])
            self._begins[at : at + CHUNK] = before + until - part["asked"] - part["said"]
            before += int(until[-1])

    def are_alike(self, one: int, other: int) -> bool:
        """Return whether so much of all that two rows say is the same."""
        return _share(self._shared_asked(one, other), self._shared_said(one, other)) >= self._similarity

    def are_copies(self, one: int, other: int) -> bool:
        """Return whether two rows are near copies: alike, what they answer by itself too, and rated alike."""
        if self.rows["label"][one] != self.rows["label"][other]:
            return False
        said = self._shared_said(one, other)
        if _share(said) < self._similarity:
            return False
        return _share(self._shared_asked(one, other), said) >= self._similarity

    def _shared_asked(self, one: int, other: int) -> "_Shared":
        return _shared(self._asked(one), self._asked(other))

    def _shared_said(self, one: int, other: int) -> "_Shared":
        return _shared(self._said(one), self._said(other))

    def _asked(self, row: int) -> npt.NDArray[np.uint32]:
        begin = int(self._begins[row])
        return self._shingles[begin : begin + int(self.sizes["asked"][row])]

    def _said(self, row: int) -> npt.NDArray[np.uint32]:
        begin = int(self._begins[row]) + int(self.sizes["asked"][row])
        return self._shingles[begin : begin + int(self.sizes["said"][row])]


class _Shared(NamedTuple):
    """How many hashes are in both of two sets, and in one of them at least."""

    both: int
    every: int


def _shared(one: Array, other: Array) -> _Shared:
    one, other = _comparable(one, other)
    both = len(np.intersect1d(one, other, assume_unique=True))
    return _Shared(both, len(one) + len(other) - both)


def _share(*parts: _Shared) -> float:
    """Return the Jaccard similarity of two rows, each of several sets: what is in both of all that is in one."""
    both, every = sum(each.both for each in parts), sum(each.every for each in parts)
    return both / every if every else 1.0


def _comparable(one: Array, other: Array) -> tuple[Array, Array]:
    """Return of two sets what both would hold were they whole, where one holds its smallest hashes alone."""
    for each in (one, other):
        if len(each) == MAX_SHINGLES:
            one, other = (part[: int(np.searchsorted(part, each[-1], side="right"))] for part in (one, other))
    return one, other


def find_near_copies(
    folder: Path,
    sketched: Sketched,
    components: Components,
    left_out: Array,
    clusters: Array,
    place_of: Callable[[int], str],
    beat: Callable[[], None],
) -> NearCopies:
    """Join near copies in `components`, write each row's cluster, and into `left_out` which rows are near copies of one
    that goes on. left_out: (rows,) LEFT_OUT, those that are left out before being compared with none."""
    apart = new_mapped(folder / "apart", np.dtype(np.uint8), len(sketched.rows))
    for begin in range(0, len(apart), CHUNK):
        sizes = sketched.sizes[begin : begin + CHUNK]
        nothing = sizes["asked"] + sizes["said"] == 0
        apart[begin : begin + CHUNK] = nothing | (left_out["why"][begin : begin + CHUNK] != 0)
    path = folder / "hashes"
    for band in range(sketched.bands.shape[1]):
        buckets = Buckets(path, _Band(sketched.bands, band), apart)
        for bucket in range(buckets.count):
            for members in _meeting(buckets.pieces(bucket)):
                _join(sketched, components, members, beat)
            beat()
    components.write(clusters)
    buckets = Buckets(path, clusters, apart)
    found = NearCopies(ToldGroups(place_of))
    for bucket in range(buckets.count):
        _resolve(sketched, buckets, bucket, left_out, found, beat)
        beat()
    for name in ("apart", "hashes", "shingle_begins"):
        (folder / name).unlink()
    return found


class _Band:
    """One band of all rows, as hashes. bands: (rows, bands)."""

    def __init__(self, bands: Array, band: int) -> None:
        self._bands, self._band = bands, band

    def __len__(self) -> int:
        return len(self._bands)

    def __getitem__(self, part: slice) -> Array:
        column = self._bands[part, self._band]
        hashes = np.zeros(len(column), dtype=CLUSTER)
        hashes["hash_high"] = column
        return hashes


def _meeting(pieces: Iterator[Array]) -> Iterator[list[int]]:
    """Yield the rows of each hash that several have, a piece of the bucket at a time; the first row of a hash meets
    those of all pieces."""
    firsts: Array | None = None
    for piece in pieces:
        both = piece if firsts is None else np.concatenate([firsts, piece])
        both = both[np.lexsort((both["row"], both["high"]))]
        is_first = first_of_each(both["high"], both["low"])
        firsts = both[is_first]
        begins = np.flatnonzero(is_first)
        sizes = np.diff(np.append(begins, len(both)))
        for begin, size in zip(begins[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
            yield both["row"][begin : begin + size].tolist()


def _join(sketched: Sketched, components: Components, members: list[int], beat: Callable[[], None]) -> None:
    """Join those of some rows that are alike. Of many, each is compared with the first ones alone."""
    if len({components.root(row) for row in members}) == 1:
        return
    for at, row in enumerate(members):
        for other in members[: min(at, _MOST_COMPARED)]:
            if components.root(row) != components.root(other) and sketched.are_alike(row, other):
                components.join(row, other)
        if at % _BEAT_ROWS == 0:
            beat()


def _resolve(
    sketched: Sketched,
    buckets: Buckets,
    bucket: int,
    left_out: Array,
    found: NearCopies,
    beat: Callable[[], None],
) -> None:
    """Choose which rows of the clusters in a bucket go on."""
    groups = groups_of(buckets.pieces(bucket), lambda piece: alone(piece, _worth(sketched, piece["row"])))
    found.told.add(groups, lambda: buckets.pieces(bucket))
    if not (groups["rows"] > 1).any():
        return
    kept: dict[int, list[int]] = {}  # by the cluster's place, its rows that go on
    for piece in buckets.pieces(bucket):
        places = group_of_each(groups, piece)
        several = np.flatnonzero(groups["rows"][places] > 1)
        order = several[np.lexsort((piece["row"][several], -_worth(sketched, piece["row"][several])))]
        for at, (place, row) in enumerate(zip(places[order].tolist(), piece["row"][order].tolist(), strict=True)):
            going_on = kept.setdefault(place, [int(groups["row"][place])])
            if row == going_on[0]:
                continue
            of = next((each for each in going_on if sketched.are_copies(row, each)), None)
            if of is not None:
                left_out[row] = (Why.NEAR_COPY, of)
                found.copies += 1
            elif len(going_on) < _MOST_COMPARED:
                going_on.append(row)
            if at % _BEAT_ROWS == 0:
                beat()


def _worth(sketched: Sketched, rows: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """(rows,) what orders the rows of a cluster: their length, then how low the hash of their content is."""
    lowness = 1 - sketched.rows["hash_high"][rows].astype(np.float64) / 2.0**64
    return sketched.sizes["size_bytes"][rows] + lowness * (1 - 2.0**-20)
