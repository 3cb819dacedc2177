"""Many texts as arrays of bytes at once: where their words, lines and paragraphs are, and a hash of each of these.

All that is counted of a text follows from it alone, whichever texts stand beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_CHARACTERS = 2**19  # of a text: what follows is not looked at
MAX_TEXTS = 2**12  # of a block: the high bits of a key are for them
_MAX_BLOCK_BYTES = 2**20  # of the texts that are looked at together, but for the last one

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

_NEWLINE = ord("\n")
_SPACES = b"\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f "
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_MIX = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)


def _table(characters: bytes) -> Bools:
    found = np.zeros(256, dtype=bool)
    found[list(characters)] = True
    return found


_IS_SPACE = _table(_SPACES)
_LETTERS = bytes([*range(ord("A"), ord("Z") + 1), *range(ord("a"), ord("z") + 1)])
_IS_LETTER = _table(_LETTERS + bytes(range(0x80, 0x100)))
_IS_DIGIT = _table(b"0123456789")


def _values() -> Hashes:
    """Return a number for each byte, the same for a letter and its capital."""
    with np.errstate(over="ignore"):
        mixed = (np.arange(1, 257, dtype=np.uint64) * np.uint64(_BASE)) ^ (np.arange(256, dtype=np.uint64) << _HALF)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIX
    for letter in range(ord("A"), ord("Z") + 1):
        mixed[letter] = mixed[letter + 32]
    return mixed


_VALUES = _values()


@cache
def _powers(base: int) -> Hashes:
    """Return the powers of a base modulo 2^64, for as many bytes as a block may have."""
    found = np.full(_MAX_BLOCK_BYTES + 4 * MAX_CHARACTERS + MAX_TEXTS + 3, base, dtype=np.uint64)
    found[0] = 1
    return np.cumprod(found, dtype=np.uint64)


@dataclass(frozen=True)
class Spans:
    """Pieces of the texts of a block, in order. texts: of which text each is; begins, ends: its bytes in the block."""

    texts: Ints
    begins: Ints
    ends: Ints

    def __len__(self) -> int:
        return len(self.begins)

    def of(self, chosen: Any) -> "Spans":
        """Return those that an index or a mask chooses."""
        return Spans(self.texts[chosen], self.begins[chosen], self.ends[chosen])


class Block:
    """Some texts as bytes, one behind another, each after a line feed."""

    def __init__(self, texts: Sequence[str]) -> None:
        encoded = [text[:MAX_CHARACTERS].encode(errors="surrogatepass") for text in texts]
        self.data = b"\n" + b"\n".join(encoded) + b"\n"
        self.bytes = np.frombuffer(self.data, dtype=np.uint8)
        sizes = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        self.begins: Ints = 1 + np.cumsum(sizes + 1) - (sizes + 1)
        self.ends: Ints = self.begins + sizes

    def __len__(self) -> int:
        return len(self.begins)

    @cached_property
    def is_ascii(self) -> bool:
        return self.data.isascii()

    @cached_property
    def words(self) -> Spans:
        """What white space divides."""
        edges = np.diff(_IS_SPACE[self.bytes].view(np.int8))
        begins, ends = np.flatnonzero(edges == -1) + 1, np.flatnonzero(edges == 1) + 1
        return Spans(self.text_of(begins), begins, ends)

    @cached_property
    def _line_words(self) -> tuple[Ints, Ints, Ints]:
        """Of each line with a word: its number, its first word and its last."""
        breaks = np.flatnonzero(self.bytes == _NEWLINE)
        firsts = np.searchsorted(self.words.begins, breaks)
        lines = np.flatnonzero(np.diff(firsts))
        return lines, firsts[lines], firsts[lines + 1] - 1

    @cached_property
    def lines(self) -> Spans:
        """The lines that have a word, without the white space around."""
        _, first, last = self._line_words
        return Spans(self.words.texts[first], self.words.begins[first], self.words.ends[last])

    @cached_property
    def paragraphs(self) -> Spans:
        """Lines without an empty one between them."""
        numbers, lines = self._line_words[0], self.lines
        is_first = np.r_[True, (np.diff(numbers) > 1) | (np.diff(lines.texts) > 0)][: len(lines)]
        first = np.flatnonzero(is_first)
        last = np.r_[first[1:], len(lines)][: len(first)] - 1
        return Spans(lines.texts[first], lines.begins[first], lines.ends[last])

    def text_of(self, places: Ints) -> Ints:
        """Return which text each byte is of; places: in order."""
        counts = np.diff(np.searchsorted(places, np.r_[self.begins, len(self.data)]))
        return np.repeat(np.arange(len(self)), counts)

    def per_text(self, texts: Ints, weights: npt.NDArray[Any] | None = None) -> npt.NDArray[np.float64]:
        """Return how many pieces each text has, or the sum of their weights."""
        return np.bincount(texts, weights, minlength=len(self)).astype(np.float64)

    @cached_property
    def _characters_before(self) -> Ints:
        if self.is_ascii:
            return np.arange(len(self.data) + 1)
        return np.r_[0, np.cumsum((self.bytes & 0xC0) != 0x80)]

    def characters(self, spans: Spans) -> Ints:
        """Return how many characters each span has."""
        return self._characters_before[spans.ends] - self._characters_before[spans.begins]

    @cached_property
    def _is_letter(self) -> Bools:
        found = _IS_LETTER[self.bytes]
        if not self.is_ascii:
            second, third = self.bytes[1:-1], self.bytes[2:]
            # Punctuation, arrows, boxes and other symbols: U+0080 to U+00BF, U+2000 to U+2BFF, U+3000 to U+303F.
            of_three = np.flatnonzero(
                ((self.bytes[:-2] == 0xE2) & (second < 0xB0)) | ((self.bytes[:-2] == 0xE3) & (second == 0x80))
            )
            of_two = np.flatnonzero((second == 0xC2) & (third >= 0x80)) + 1
            for place in (of_three, of_three + 1, of_three + 2, of_two, of_two + 1):
                found[place] = False
        return found

    def _has_any(self, spans: Spans, is_one: Bools) -> Bools:
        before = np.r_[0, np.cumsum(is_one, dtype=np.int32)]
        return before[spans.ends] > before[spans.begins]

    @cached_property
    def has_letter(self) -> Bools:
        """Of each word, whether it has a letter."""
        return self._has_any(self.words, self._is_letter)

    @cached_property
    def is_spoken(self) -> Bools:
        """Of each word, whether it has a letter or a digit."""
        return self._has_any(self.words, self._is_letter | _IS_DIGIT[self.bytes])

    @cached_property
    def letters_without_spaces(self) -> npt.NDArray[np.float64]:
        """Of each text, the letters of scripts that put no spaces between words: Chinese, Japanese, Thai, Lao."""
        if self.is_ascii:
            return np.zeros(len(self))
        first, second = self.bytes[:-1], self.bytes[1:]
        is_one = ((first >= 0xE3) & (first <= 0xE9)) | ((first == 0xE0) & (second >= 0xB8) & (second <= 0xBB))
        is_one &= (first != 0xE3) | (second != 0x80)
        return self.per_text(self.text_of(np.flatnonzero(is_one)))

    def hashes(self, spans: Spans) -> Hashes:
        """Return a hash of each span, equal for spans that differ in capitals of ASCII alone."""
        before = self._sums
        back = _powers(pow(_BASE, -1, 2**64))[spans.begins]
        return mixed((before[spans.ends] - before[spans.begins]) * back)

    @cached_property
    def _sums(self) -> Hashes:
        """The polynomial of all bytes before each."""
        terms = _VALUES[self.bytes]
        terms *= _powers(_BASE)[: len(terms)]
        return np.r_[np.uint64(0), np.cumsum(terms, dtype=np.uint64)]


def mixed(hashes: Hashes) -> Hashes:
    """Return hashes whose high bits depend on all bits of those given."""
    hashes = (hashes ^ (hashes >> _HALF)) * _MIX
    return hashes ^ (hashes >> _HALF)


def blocks(texts: Sequence[str], most: int) -> list[range]:
    """Return which texts are looked at together, in order: `most` at most."""
    found: list[range] = []
    begin = size = 0
    for at, text in enumerate(texts):
        size += len(text) * (1 if text.isascii() else 4)
        if size >= _MAX_BLOCK_BYTES or at - begin + 1 >= most:
            found.append(range(begin, at + 1))
            begin, size = at + 1, 0
    return [*found, range(begin, len(texts))] if begin < len(texts) else found
