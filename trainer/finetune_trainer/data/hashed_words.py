"""The words of texts as hashes: all words of many texts at once, the same hash for the same word in every process.

Case and punctuation are no part of words; a character of Chinese, Japanese or Korean is a word of its own.
"""

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

_LANES = 8  # of 8 bytes, that are read of a word; of a longer one its last 8 bytes and its length tell the rest
ODD, _ODDER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
HALF_BITS = np.uint64(32)
_IS_WORD = np.array([byte >= 0x80 or chr(byte).isalnum() or byte == ord("_") for byte in range(256)])
_MASKS = np.array([2 ** (8 * size) - 1 for size in range(9)], dtype=np.uint64)  # of the first bytes of a lane
# Beginnings of characters in UTF-8 that are punctuation and signs: U+0080 to U+00BF, U+2000 to U+2FFF, U+3000 to
# U+303F, U+FF00 to U+FF3F; each with the bytes that follow.
_SIGNS = (((0xC2,), 2), ((0xE2,), 3), ((0xE3, 0x80), 3), ((0xEF, 0xBC), 3))
_WIDE_FIRST, _WIDE_LAST, _WIDE_BYTES = 0xE3, 0xED, 3  # beginnings of characters that are words: U+3040 to U+D7FF


class Words(NamedTuple):
    """hashes: (words,) of all texts, in order; counts: (texts,) how many words each has; sizes: (texts,) its bytes."""

    hashes: Hashes
    counts: Places
    sizes: Places


def words_of(texts: Sequence[str]) -> Words:
    """Return the words of texts."""
    parts = [_prepared(text) for text in texts]
    buffer = b"\n" + b"\n".join(parts) + b"\n" + bytes(8 * _LANES)
    sizes = np.array([len(part) for part in parts], dtype=np.int64)
    begins, ends = _words(np.frombuffer(buffer, dtype=np.uint8))
    return Words(_hashed(buffer, begins, ends), _counted(begins, np.cumsum(sizes + 1)), sizes)


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


def mixed(hashes: Hashes, more: Hashes) -> Hashes:
    """Return hashes that depend on both, in this order."""
    hashes = (hashes ^ more) * _ODDER
    return hashes ^ (hashes >> HALF_BITS)


class RunStarts(NamedTuple):
    """(runs,) the text that each run of words is of, and its first word."""

    of_text: Places
    words: Places


def run_starts(counts: Places, sizes: Places | int) -> RunStarts:
    """Return where all runs of words begin, none of which goes beyond its text. counts: (texts,) words of each; sizes:
    words of its runs."""
    many = np.maximum(0, counts - sizes + 1)
    of_text = np.repeat(np.arange(len(counts)), many)
    first = np.cumsum(counts) - counts - (np.cumsum(many) - many)  # word of a text's first run, less its place
    return RunStarts(of_text, np.arange(len(of_text)) + first[of_text])


def _hashed(buffer: bytes, begins: Places, ends: Places) -> Hashes:
    """(words,) the hash of each word, the same in every process."""
    lanes = np.ndarray((len(buffer) - 7,), dtype="<u8", buffer=buffer, strides=(1,))  # eight bytes from each on
    sizes = ends - begins
    found = mixed(sizes.astype(np.uint64) * ODD, lanes[begins] & _MASKS[np.minimum(sizes, 8)])
    for lane in range(1, _LANES):
        longer = np.flatnonzero(sizes > 8 * lane)
        if not len(longer):
            return found
        left = np.minimum(sizes[longer] - 8 * lane, 8)
        found[longer] = mixed(found[longer], lanes[begins[longer] + 8 * lane] & _MASKS[left])
    longest = np.flatnonzero(sizes > 8 * _LANES)
    found[longest] = mixed(found[longest], lanes[ends[longest] - 8])
    return found


def _counted(begins: Places, bounds: Places) -> Places:
    """(parts,) how many words each has. bounds: where each ends."""
    until = np.searchsorted(begins, bounds + 1)
    return np.diff(np.concatenate([[0], until]))
