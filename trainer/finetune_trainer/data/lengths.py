"""How long the used examples are, and where the longest rows lie: read in chunks, counted by length."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.accounts import Ledger
from finetune_trainer.data.division import Chunk, Division

_LONGEST = 10
_BUCKETS = 20
_SUMMED = ("sequences", "tokens", "stored_tokens", "labels")


@dataclass
class Counted:
    """Whole numbers by how often they occur, in order."""

    values: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def add(self, numbers: npt.NDArray[Any]) -> None:
        """Count these too."""
        found, counts = np.unique(numbers.astype(np.int64), return_counts=True)
        values, places = np.unique(np.concatenate([self.values, found]), return_inverse=True)
        summed = np.zeros(len(values), dtype=np.int64)
        np.add.at(summed, places, np.concatenate([self.counts, counts]))
        self.values, self.counts = values, summed

    def percentile(self, percent: int) -> int:
        """Return what numpy.percentile gives of all of them, cut to a whole number."""
        until = np.cumsum(self.counts)
        place = (until[-1] - 1) * (percent / 100)
        low, high = (
            int(self.values[np.searchsorted(until, min(each, until[-1] - 1), side="right")])
            for each in (np.floor(place), np.floor(place) + 1)
        )
        share = place - np.floor(place)
        return int(high - (high - low) * (1 - share) if share >= 0.5 else low + (high - low) * share)

    def histogram(self) -> dict[str, Any]:
        """Return how many there are in parts of their range that are equally wide."""
        counts, edges = np.histogram(
            self.values, bins=_BUCKETS, range=(self.values[0], self.values[-1]), weights=self.counts
        )
        return {"edges": [round(float(edge), 1) for edge in edges], "examples": counts.tolist()}


def lengths(division: Division, ledger: Ledger) -> dict[str, Any]:
    """How long the used examples are, in tokens of their longest sequence, and where the longest rows lie.

    tokens: of all sequences that the examples are read as; stored_tokens: with what sequences share counted once."""
    longest, sums, examples = Counted(), dict.fromkeys(_SUMMED, 0), 0
    rows: list[dict[str, Any]] = []
    for chunk in division.chunks():
        used = chunk.examples[chunk.examples_of(~chunk.dropped)]
        longest.add(used["longest"])
        examples += len(used)
        for name in _SUMMED:
            sums[name] += int(used[name].sum(dtype=np.int64))
        rows = sorted([*rows, *_longest(chunk, ledger)], key=lambda row: -row["tokens"])[:_LONGEST]
    return {
        "examples": examples,
        "sequences": sums["sequences"],
        "tokens": sums["tokens"],
        "stored_tokens": sums["stored_tokens"],
        "label_tokens": sums["labels"],
        "label_share": round(sums["labels"] / sums["tokens"], 4),
        "percentiles": {f"p{q}": longest.percentile(q) for q in (50, 95, 99, 100)},
        "histogram": longest.histogram(),
        "longest_rows": rows,
    }


def _longest(chunk: Chunk, ledger: Ledger) -> list[dict[str, Any]]:
    """Return the longest rows of a chunk; of equally long ones, the first."""
    firsts = np.concatenate([[0], np.cumsum(chunk.rows["examples"], dtype=np.int64)[:-1]])
    row_tokens = np.add.reduceat(chunk.examples["tokens"].astype(np.int64), firsts)
    return [
        {
            "file": ledger.files[int(chunk.rows["file"][row])].uri,
            "row": int(chunk.rows["number"][row]),
            "tokens": int(row_tokens[row]),
        }
        for row in np.argsort(-row_tokens, kind="stable")[:_LONGEST]
    ]
