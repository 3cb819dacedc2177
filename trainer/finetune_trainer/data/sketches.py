"""MinHash of rows: by which near copies meet, without every row being compared with every other.

A sketch has bands, each the hash of a few minima over the row's shingles, every one under another permutation. Two rows
of Jaccard similarity s meet in one of b bands of r minima with a chance of 1 - (1 - s^r)^b (Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, chapter 3); that they are near copies is then told by all their shingles.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.shingles import Compared, Shingles, shingles_of

_MAX_PERMUTATIONS = 128
_CHANCE = 0.995  # that rows meet which are just near copies
_MULTIPLIERS = np.random.Generator(np.random.Philox(key=[12, 3])).integers(0, 2**31, 2 * _MAX_PERMUTATIONS) * 2 + 1
_ODD = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)


class Bands(NamedTuple):
    """How many bands there are, and of how many minima each."""

    bands: int
    minima: int


def bands_for(similarity: float) -> Bands:
    """Return the bands by which rows that are so similar meet: as many minima in each as can be, as each keeps apart
    more of the rows that are not."""
    for minima in range(_MAX_PERMUTATIONS, 1, -1):
        chance = similarity**minima
        count = 1 if chance >= 1 else math.ceil(math.log1p(-_CHANCE) / math.log1p(-chance)) if chance > 1e-9 else 2**31
        if count * minima <= _MAX_PERMUTATIONS:
            return Bands(count, minima)
    raise AssertionError(f"no bands for {similarity}")


class Sketch(NamedTuple):
    """bands: (bands,) hashes of one row."""

    bands: npt.NDArray[np.uint64]
    shingles: Shingles


class Sketcher:
    """Makes sketches of rows."""

    def __init__(self, similarity: float) -> None:
        self._band_count, self._minima = bands_for(similarity)

    def sketches(self, rows: Sequence[Compared]) -> list[Sketch]:
        """Return the sketch of each row."""
        shingles = shingles_of(rows)
        return [Sketch(*each) for each in zip(self._bands(shingles), shingles, strict=True)]

    def _bands(self, shingles: Sequence[Shingles]) -> npt.NDArray[np.uint64]:
        """(rows, bands) hashes; those of rows without a shingle mean nothing."""
        sizes = np.array([len(each.asked) + len(each.said) for each in shingles], dtype=np.int64)
        some = np.flatnonzero(sizes)
        found = np.zeros((len(shingles), self._band_count), dtype=np.uint64)
        if not len(some):
            return found
        values = np.concatenate([part for each in shingles for part in (each.asked, each.said)])
        starts = (np.cumsum(sizes) - sizes)[some]
        permuted = np.empty_like(values)
        for band in range(self._band_count):
            hashes = np.full(len(some), band, dtype=np.uint64)
            for multiplier in _MULTIPLIERS[band * self._minima : (band + 1) * self._minima]:
                np.multiply(values, np.uint32(multiplier), out=permuted)
                least: Any = np.minimum.reduceat(permuted, starts)
                hashes = (hashes ^ least) * _ODD
                hashes ^= hashes >> _SHIFT
            found[some, band] = hashes
        return found
