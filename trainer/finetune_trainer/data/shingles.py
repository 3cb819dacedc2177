"""What rows say as sets of hashed shingles: runs of words, by which it is told how much two rows have in common.

Case and punctuation are no part of words; a character of Chinese, Japanese or Korean is a word of its own. A shingle is
five words, of a row of fewer than SHORT_WORDS words two. All rows of a batch are worked on at once.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.hashed_words import HALF_BITS, ODD, Hashes, Places, mixed, run_starts, words_of

SHINGLE_WORDS, SHORT_SHINGLE_WORDS, SHORT_WORDS = 5, 2, 20
MAX_SHINGLES = 2**14  # of a row's prompt, and of its answers: of more, those with the smallest hashes stand for all


class Compared(NamedTuple):
    """What is compared of a row: what is asked, and what is answered. A text is told from one in another place."""

    asked: Sequence[str]
    said: Sequence[str]


class Shingles(NamedTuple):
    """The sets of hashes of one row, each in order, and how many bytes its texts have."""

    asked: npt.NDArray[np.uint32]
    said: npt.NDArray[np.uint32]
    size_bytes: int


def shingles_of(rows: Sequence[Compared]) -> list[Shingles]:
    """Return the shingles of each row."""
    texts = [(row, place, text) for row, each in enumerate(rows) for place, text in _placed(each)]
    words, counts, sizes = words_of([text for _, _, text in texts])
    row_of = np.array([row for row, _, _ in texts], dtype=np.int64)
    place_of = np.array([place for _, place, _ in texts], dtype=np.uint64)
    of_part, hashes = _runs(words, counts, row_of, place_of, len(rows))
    of_set = 2 * row_of[of_part] + (place_of[of_part] > 0)
    keys = np.sort((of_set.astype(np.uint64) << HALF_BITS) | (hashes >> HALF_BITS))
    keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])] if len(keys) else keys
    bounds = np.searchsorted(keys, np.arange(2 * len(rows) + 1, dtype=np.uint64) << HALF_BITS)
    values = keys.astype(np.uint32)
    size_bytes = np.bincount(row_of, weights=sizes, minlength=len(rows)).astype(np.int64).tolist()
    sets = [values[begin:end][:MAX_SHINGLES] for begin, end in pairwise(bounds)]
    return [Shingles(sets[2 * row], sets[2 * row + 1], size_bytes[row]) for row in range(len(rows))]


def _placed(row: Compared) -> list[tuple[int, str]]:
    """Return a row's texts, each with its place: 0 for what is asked, from 1 on for what is said."""
    return [*((0, text) for text in row.asked), *enumerate(row.said, 1)]


class _Runs(NamedTuple):
    """(shingles,) the part that each is of, and its hash."""

    of_part: Places
    hashes: Hashes


def _runs(words: Hashes, counts: Places, row_of: Places, place_of: Hashes, rows: int) -> _Runs:
    """Return the shingles of all parts. counts: (parts,) words of each."""
    row_words = np.bincount(row_of, weights=counts, minlength=rows)
    sizes = np.where(row_words[row_of] < SHORT_WORDS, SHORT_SHINGLE_WORDS, SHINGLE_WORDS)
    sizes = np.maximum(1, np.minimum(sizes, counts))  # a part with fewer words is one shingle
    of_part, starts = run_starts(counts, sizes)
    hashes = (place_of[of_part] + np.uint64(1)) * ODD
    own = sizes[of_part]
    for place in range(SHINGLE_WORDS):
        within = own > place
        if within.all():
            hashes = mixed(hashes, words[starts + place])
        else:
            hashes[within] = mixed(hashes[within], words[starts[within] + place])
    return _Runs(of_part, mixed(hashes, own.astype(np.uint64)) * ODD)
