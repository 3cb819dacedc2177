"""Rows that say the same: which of them goes on, so that none is learned more often than the job says.

The one that counts the most goes on, by its own weight and its dataset's, of several the first in the order of the
rows: which it is depends neither on who reads them nor on where partitions end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.buckets import Buckets, alone, copies_in, groups_of
from finetune_trainer.data.left_out import Why
from finetune_trainer.data.told_groups import ToldGroups

Array = npt.NDArray[Any]


@dataclass
class ExactCopies:
    """What was found. copies: rows beside the one of each group that goes on; weighted: those of another weight."""

    told: ToldGroups
    copies: int = 0
    weighted: int = 0


def find_copies(
    rows: Array,
    file_weights: npt.NDArray[np.float64],
    left_out: Array,
    path: Path,
    place_of: Callable[[int], str],
    beat: Callable[[], None],
) -> ExactCopies:
    """Write into `left_out` which rows say the same as one that goes on, and which one that is.

    rows: (rows,) ROW; file_weights: (files,) of the dataset of each; left_out: (rows,) LEFT_OUT; path: for a file."""

    def worth(piece: Array) -> Array:
        records = rows[piece["row"]]
        return alone(piece, records["weight"] * file_weights[records["file"]])

    buckets = Buckets(path, rows)
    found = ExactCopies(ToldGroups(place_of))
    for bucket in range(buckets.count):
        groups = groups_of(buckets.pieces(bucket), worth)
        found.told.add(groups, lambda bucket=bucket: buckets.pieces(bucket))
        if (groups["rows"] > 1).any():
            for piece in buckets.pieces(bucket):
                copies, kept = copies_in(groups, piece)
                left_out["why"][copies], left_out["of"][copies] = Why.COPY, kept
                found.copies += len(copies)
                found.weighted += int((rows["weight"][copies] != rows["weight"][kept]).sum())
        beat()
    path.unlink()
    return found
