"""What rows say as sets of hashed shingles: runs of words, by which it is told how much two rows have in common.

Case and punctuation are no part of words; a character of Chinese, Japanese or Korean is a word of its own. A shingle is
five words, of a row of fewer than SHORT_WORDS words two. All rows of a batch are worked on at once.
"""

import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Words = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

SHINGLE_WORDS, SHORT_SHINGLE_WORDS, SHORT_WORDS = 5, 2, 20
MAX_SHINGLES = 2**14  # of a row's prompt, and of its answers: of more, those with the smallest hashes stand for all
_LANES = 8  # of 8 bytes, that are read of a word; of a longer one its last 8 bytes and its length tell the rest
_ODD, _ODDER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_SHIFT = np.uint64(32)
_IS_WORD = np.array([byte >= 0x80 or chr(byte).isalnum() or byte == ord("_") for byte in range(256)])
_MASKS = np.array([2 ** (8 * size) - 1 for size in range(9)], dtype=np.uint64)  # of the first bytes of a lane
# Beginnings of characters in UTF-8 that are punctuation and signs: U+0080 to U+00BF, U+2000 to U+2FFF, U+3000 to
# U+303F, U+FF00 to U+FF3F; each with the bytes that follow.
_SIGNS = (((0xC2,), 2), ((0xE2,), 3), ((0xE3, 0x80), 3), ((0xEF, 0xBC), 3))
_WIDE_FIRST, _WIDE_LAST, _WIDE_BYTES = 0xE3, 0xED, 3  # beginnings of characters that are words: U+3040 to U+D7FF


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
    parts = [_prepared(text) for _, _, text in texts]
    buffer = b"\n" + b"\n".join(parts) + b"\n" + bytes(8 * _LANES)
    row_of = np.array([row for row, _, _ in texts], dtype=np.int64)
    place_of = np.array([place for _, place, _ in texts], dtype=np.uint64)
    sizes = np.array([len(part) for part in parts], dtype=np.int64)
    begins, ends = _words(np.frombuffer(buffer, dtype=np.uint8))
    words = _hashed(buffer, begins, ends)
    counts = _counted(begins, np.cumsum(sizes + 1))
    of_part, hashes = _runs(words, counts, row_of, place_of, len(rows))
    of_set = 2 * row_of[of_part] + (place_of[of_part] > 0)
    keys = np.sort((of_set.astype(np.uint64) << _SHIFT) | (hashes >> _SHIFT))
    keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])] if len(keys) else keys
    bounds = np.searchsorted(keys, np.arange(2 * len(rows) + 1, dtype=np.uint64) << _SHIFT)
    values = keys.astype(np.uint32)
    size_bytes = np.bincount(row_of, weights=sizes, minlength=len(rows)).astype(np.int64).tolist()
    sets = [values[begin:end][:MAX_SHINGLES] for begin, end in pairwise(bounds)]
    return [Shingles(sets[2 * row], sets[2 * row + 1], size_bytes[row]) for row in range(len(rows))]


def _placed(row: Compared) -> list[tuple[int, str]]:
    """Return a row's texts, each with its place: 0 for what is asked, from 1 on for what is said."""
    return [*((0, text) for text in row.asked), *enumerate(row.said, 1)]


def _prepared(text: str) -> bytes:
    """Return a text as its words are read. Half of a surrogate pair, which is no character, is none of a word."""
    return (text if text.isascii() else unicodedata.normalize("NFC", text)).lower().encode(errors="replace")


class _Found(NamedTuple):
    begins: Places
    ends: Places


def _words(data: npt.NDArray[np.uint8]) -> _Found:
    """Return where words begin and end. data: UTF-8, the first and last byte being of none."""
    is_word = _IS_WORD[data]
    is_word[-1] = False
    wide = np.empty(0, dtype=np.int64)
    if data.max() >= _WIDE_FIRST or (data == _SIGNS[0][0][0]).any():
        for beginning, size in _SIGNS:
            at = np.flatnonzero(data[: -len(beginning)] == beginning[0])
            for place, byte in enumerate(beginning[1:], 1):
                at = at[data[at + place] == byte]
            for place in range(size):
                is_word[at + place] = False
        wide = np.flatnonzero((data >= _WIDE_FIRST) & (data <= _WIDE_LAST) & is_word)
    changes = np.flatnonzero(is_word[1:] != is_word[:-1]) + 1
    begins, ends = changes[::2], changes[1::2]
    if len(wide):
        behind = wide + _WIDE_BYTES
        is_bound = np.zeros(len(data), dtype=np.bool_)
        for places in (begins, wide, behind[is_word[behind]]):
            is_bound[places] = True
        begins = np.flatnonzero(is_bound)
        is_bound[ends] = True
        bounds = np.flatnonzero(is_bound)
        ends = bounds[np.searchsorted(bounds, begins, side="right")]
    return _Found(begins, ends)


def _mixed(hashes: Words, more: Words) -> Words:
    hashes = (hashes ^ more) * _ODDER
    return hashes ^ (hashes >> _SHIFT)


def _hashed(buffer: bytes, begins: Places, ends: Places) -> Words:
    """(words,) the hash of each word, the same in every process."""
    lanes = np.ndarray((len(buffer) - 7,), dtype="<u8", buffer=buffer, strides=(1,))  # eight bytes from each on
    sizes = ends - begins
    found = _mixed(sizes.astype(np.uint64) * _ODD, lanes[begins] & _MASKS[np.minimum(sizes, 8)])
    for lane in range(1, _LANES):
        longer = np.flatnonzero(sizes > 8 * lane)
        if not len(longer):
            return found
        left = np.minimum(sizes[longer] - 8 * lane, 8)
        found[longer] = _mixed(found[longer], lanes[begins[longer] + 8 * lane] & _MASKS[left])
    longest = np.flatnonzero(sizes > 8 * _LANES)
    found[longest] = _mixed(found[longest], lanes[ends[longest] - 8])
    return found


def _counted(begins: Places, bounds: Places) -> Places:
    """(parts,) how many words each has. bounds: where each ends."""
    until = np.searchsorted(begins, bounds + 1)
    return np.diff(np.concatenate([[0], until]))


class _Runs(NamedTuple):
    """(shingles,) the part that each is of, and its hash."""

    of_part: Places
    hashes: Words


def _runs(words: Words, counts: Places, row_of: Places, place_of: Words, rows: int) -> _Runs:
    """Return the shingles of all parts. counts: (parts,) words of each."""
    row_words = np.bincount(row_of, weights=counts, minlength=rows)
    sizes = np.where(row_words[row_of] < SHORT_WORDS, SHORT_SHINGLE_WORDS, SHINGLE_WORDS)
    sizes = np.minimum(sizes, counts)  # a part with fewer words is one shingle
    many = np.where(counts > 0, counts - sizes + 1, 0)
    of_part = np.repeat(np.arange(len(counts)), many)
    first = np.cumsum(counts) - counts - (np.cumsum(many) - many)  # word of a part's first shingle, less its place
    starts = np.arange(len(of_part)) + first[of_part]
    hashes = (place_of[of_part] + np.uint64(1)) * _ODD
    own = sizes[of_part]
    for place in range(SHINGLE_WORDS):
        within = own > place
        if within.all():
            hashes = _mixed(hashes, words[starts + place])
        else:
            hashes[within] = _mixed(hashes[within], words[starts[within] + place])
    return _Runs(of_part, _mixed(hashes, own.astype(np.uint64)) * _ODD)
