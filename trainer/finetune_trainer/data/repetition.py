"""How much of a text is said again and again: lines, paragraphs, and words after another, as Gopher counts them."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.spans import MAX_TEXTS, Block, Bools, Hashes, Ints, Spans, mixed

_TEXT_SHIFT, _HASH_SHIFT = np.uint64(52), np.uint64(12)
_STEP = np.uint64(0x9FB21C651E98DF25)

Floats = npt.NDArray[np.float64]


class Repeated(NamedTuple):
    """Of each text, the share of its pieces that were said before, and of the characters of all pieces in them."""

    pieces: Floats
    characters: Floats


def repeated(block: Block, spans: Spans) -> Repeated:
    """Return how many lines, or paragraphs, were said before in their text."""
    again = _said_before(_keys(spans.texts, block.hashes(spans)))
    characters = block.characters(spans)
    return Repeated(
        _share(block.per_text(spans.texts[again]), block.per_text(spans.texts)),
        _share(
            block.per_text(spans.texts[again], characters[again]),
            block.per_text(spans.texts, characters),
        ),
    )


class WordRuns:
    """The words of a block's texts, and what is said with several of them after another."""

    def __init__(self, block: Block) -> None:
        self._block, self._words = block, block.words
        self._hashes = block.hashes(self._words)
        self._characters = block.characters(self._words)
        self._all_characters = block.per_text(self._words.texts, self._characters)
        self._places: dict[int, Ints] = {}

    def most_said(self, size: int) -> Floats:
        """Return, of each text, the share of the characters in the words after another that are said most often.

        0 where all are said once; of several that are said as often, those of the least hash."""
        keys = self._keys_of(size)
        texts = self._words.texts[: len(keys)]
        ordered = np.sort(keys)
        firsts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)])
        counts = np.diff(np.r_[firsts, len(ordered)])
        many = counts > 1
        firsts, counts = firsts[many], counts[many]
        owner = (ordered[firsts] >> _TEXT_SHIFT).astype(np.int64)
        is_of_text = owner < len(self._block)  # others are of words of two texts
        firsts, counts, owner = firsts[is_of_text], counts[is_of_text], owner[is_of_text]
        order = np.lexsort((-counts, owner))
        best = order[np.r_[True, np.diff(owner[order]) > 0][: len(order)]]
        top = np.full(len(self._block), np.iinfo(np.uint64).max, dtype=np.uint64)
        top[owner[best]] = ordered[firsts[best]]
        chosen = np.flatnonzero(keys == top[texts])
        sizes = np.sum([self._characters[chosen + more] for more in range(size)], axis=0)
        return _share(self._block.per_text(texts[chosen], sizes), self._all_characters)

    def repeated(self, size: int) -> Floats:
        """Return, of each text, the share of its characters in so many words after another that were said before."""
        places = self._repeated_places(size)
        again = places[_said_before(self._keys_at(size, places))]
        edges = np.zeros(len(self._words) + 1, dtype=np.int64)
        np.add.at(edges, again, 1)
        np.add.at(edges, again + size, -1)
        inside = np.cumsum(edges[:-1]) > 0
        return _share(self._block.per_text(self._words.texts[inside], self._characters[inside]), self._all_characters)

    def _repeated_places(self, size: int) -> Ints:
        """Return where words begin that are said more than once; only there longer ones can be."""
        if size not in self._places:
            if size == _LEAST_REPEATED:
                places = np.arange(max(0, len(self._words) - size + 1))
            else:
                places = self._repeated_places(size - 1)
                places = places[places <= len(self._words) - size]
            keys = self._keys_at(size, places)
            self._places[size] = places[
                _said_again(keys) & (self._words.texts[places] == self._words.texts[places + size - 1])
            ]
        return self._places[size]

    def _keys_of(self, size: int) -> Hashes:
        return self._keys_at(size, np.arange(max(0, len(self._words) - size + 1)))

    def _keys_at(self, size: int, places: Ints) -> Hashes:
        """Return a key of the words from each place on; those of two texts are equal to no other."""
        hashes = np.zeros(len(places), dtype=np.uint64)
        for more in range(size):
            hashes = hashes * _STEP + self._hashes[places + more]
        texts = self._words.texts[places]
        keys = _keys(texts, mixed(hashes))
        across = np.flatnonzero(texts != self._words.texts[places + size - 1])
        keys[across] = (np.uint64(MAX_TEXTS - 1) << _TEXT_SHIFT) | across.astype(np.uint64)
        return keys


_LEAST_REPEATED = 5


def _keys(texts: Ints, hashes: Hashes) -> Hashes:
    return (texts.astype(np.uint64) << _TEXT_SHIFT) | (hashes >> _HASH_SHIFT)


def _said_again(keys: Hashes) -> Bools:
    """Return which keys are there more than once."""
    ordered = np.sort(keys)
    many = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(many):
        return np.zeros(len(keys), dtype=bool)
    found = np.minimum(np.searchsorted(many, keys), len(many) - 1)
    return many[found] == keys


def _said_before(keys: Hashes) -> Bools:
    """Return which keys are there before."""
    again = np.flatnonzero(_said_again(keys))
    found = np.zeros(len(keys), dtype=bool)
    found[again] = True
    found[again[np.unique(keys[again], return_index=True)[1]]] = False
    return found


def _share(part: Floats, whole: Floats) -> Floats:
    return part / np.maximum(whole, 1.0)
