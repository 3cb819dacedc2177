"""Runs of words that evaluation sets have, as hashes in files: which of them the texts of rows have too.

Each hash lies in the files once, in order, with the sets that have it. A row's runs are looked for in a filter of a few
bits for each first, which most of them do not pass; all processes that look map the same files.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finetune_api.row_words import SHARED_WORDS
from finetune_trainer.data.hashed_words import ODD, Hashes, Places, mixed, run_starts, words_of
from finetune_trainer.data.mapped import mapped

Array = npt.NDArray[Any]
Bits = npt.NDArray[np.uint32]

MAX_RUNS = 2**24  # of all sets of a job, 12 bytes each; MMLU, GSM8K, HellaSwag, ARC and HumanEval have 3 million
_FILES = ("runs", "sets", "filter")
_FILTER_BITS = 16  # for each run, at least
_LEAST_FILTER, _LARGEST_FILTER = 10, 28  # bits of a place in the filter
_MERGED_RUNS = 2**22  # that are held before they are merged with the others


class TooManyRunsError(Exception):
    """There are more runs than MAX_RUNS."""


class Runs(NamedTuple):
    """(runs,) the text that each is of, and its hash."""

    of_text: Places
    hashes: Hashes


def runs_of(texts: Sequence[str]) -> Runs:
    """Return all runs of SHARED_WORDS words in texts, none of which goes beyond its text."""
    words, counts, _ = words_of(texts)
    of_text, starts = run_starts(counts, SHARED_WORDS)
    hashes = np.full(len(starts), ODD)
    for place in range(SHARED_WORDS):
        hashes = mixed(hashes, words[starts + place])
    return Runs(of_text, hashes * ODD)


class RunsWriter:
    """Collects the runs of sets, in memory as far as MAX_RUNS, and writes them into a folder."""

    def __init__(self) -> None:
        self._runs, self._sets = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint32)
        self._held: list[Hashes] = []
        self._held_runs = 0
        self._set = 0

    def begin(self, number: int) -> None:
        """Let all that follows be of the set of this number, from 0 on."""
        self._merge()
        self._set = number

    def add(self, hashes: Hashes) -> None:
        """Add runs of the set. Raises TooManyRunsError."""
        self._held.append(np.unique(hashes))
        self._held_runs += len(self._held[-1])
        if self._held_runs >= _MERGED_RUNS:
            self._merge()

    def count(self) -> int:
        """Return how many different runs the set has. Raises TooManyRunsError."""
        self._merge()
        return int(np.count_nonzero(self._sets & np.uint32(1 << self._set)))

    def _merge(self) -> None:
        if not self._held:
            return
        fresh = np.unique(np.concatenate(self._held))
        self._held, self._held_runs = [], 0
        runs = np.concatenate([self._runs, fresh])
        sets = np.concatenate([self._sets, np.full(len(fresh), 1 << self._set, dtype=np.uint32)])
        order = np.argsort(runs, kind="stable")
        runs, sets = runs[order], sets[order]
        is_first = np.concatenate([[True], runs[1:] != runs[:-1]]) if len(runs) else np.empty(0, dtype=np.bool_)
        self._runs = runs[is_first]
        self._sets = np.bitwise_or.reduceat(sets, np.flatnonzero(is_first)) if len(runs) else sets
        if len(self._runs) > MAX_RUNS:
            raise TooManyRunsError

    def write(self, folder: Path) -> None:
        """Write all runs. Raises TooManyRunsError."""
        self._merge()
        folder.mkdir(exist_ok=True)
        for name, values in zip(_FILES, (self._runs, self._sets, _filter_of(self._runs)), strict=True):
            values.tofile(folder / name)


def _filter_of(runs: Hashes) -> npt.NDArray[np.uint8]:
    """Return a bit for each place that a run of these has. runs: in order, and so are their places."""
    wanted = max(1, _FILTER_BITS * len(runs) - 1).bit_length()
    size = min(_LARGEST_FILTER, max(_LEAST_FILTER, wanted))
    bits = np.zeros(2**size // 8, dtype=np.uint8)
    if len(runs):
        of_byte, within = _filter_places(runs, np.uint64(64 - size))
        firsts = np.flatnonzero(np.concatenate([[True], of_byte[1:] != of_byte[:-1]]))
        bits[of_byte[firsts]] = np.bitwise_or.reduceat(within, firsts)
    return bits


class _FilterPlaces(NamedTuple):
    """(runs,) the byte of the filter that each is looked for in, and its bit there."""

    byte: Places
    bit: npt.NDArray[np.uint8]


def _filter_places(runs: Hashes, shift: np.uint64) -> _FilterPlaces:
    places = runs >> shift
    bit = np.uint8(1) << (places & np.uint64(7)).astype(np.uint8)
    return _FilterPlaces((places >> np.uint64(3)).astype(np.int64), bit.astype(np.uint8))


class SharedRuns:
    """The runs of all sets of a job. folder: where a RunsWriter wrote them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        dtypes = (np.dtype(np.uint64), np.dtype(np.uint32), np.dtype(np.uint8))
        runs, sets, bits = (mapped(folder / name, dtype) for name, dtype in zip(_FILES, dtypes, strict=True))
        self._runs, self._sets, self._filter = runs, sets, bits
        self._shift = np.uint64(64 - (8 * len(bits) - 1).bit_length())

    @property
    def digest(self) -> str:
        """The SHA-256 of all runs, with the sets that have them."""
        digest = hashlib.sha256()
        for name in _FILES:
            with (self.folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def sets_of(self, rows: Sequence[Sequence[str]]) -> list[int]:
        """Return for each row, which are its texts, the sets that share a run with it: bit N stands for set N."""
        texts = [text for row in rows for text in row]
        of_text, hashes = runs_of(texts)
        places = _filter_places(hashes, self._shift)
        passed = np.flatnonzero(self._filter[places.byte] & places.bit)
        sought = hashes[passed]
        at = np.minimum(np.searchsorted(self._runs, sought), max(0, len(self._runs) - 1))
        found = self._runs[at] == sought if len(self._runs) else np.zeros(len(sought), dtype=np.bool_)
        row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        sets: Bits = np.zeros(len(rows), dtype=np.uint32)
        np.bitwise_or.at(sets, row_of[of_text[passed[found]]], self._sets[at[found]])
        return sets.tolist()
