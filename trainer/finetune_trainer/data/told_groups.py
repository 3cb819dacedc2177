"""Rows that belong together, as report.json tells them: how many, and where the largest groups are. No content."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_SHOWN = 10  # groups
_PLACES = 5  # of each


@dataclass(frozen=True)
class _Shown:
    """A group: what orders it among others, and its first rows."""

    order: tuple[int, int, int]  # how many rows it has, negative, and its hash
    places: list[str]


@dataclass
class ToldGroups:
    """Groups of two rows and more. place_of: where a row of the spool stands, as FILE#ROW."""

    place_of: Callable[[int], str]
    groups: int = 0
    rows: int = 0
    _largest: list[_Shown] = field(default_factory=list[_Shown])

    def add(self, groups: Array, pieces: Callable[[], Iterator[Array]]) -> None:
        """Count the groups of a bucket. groups: (…,) GROUP, each hash once; pieces: of the bucket."""
        several = groups[groups["rows"] > 1]
        self.groups, self.rows = self.groups + len(several), self.rows + int(several["rows"].sum())
        for group in several[np.lexsort((several["low"], several["high"], -several["rows"]))[:_SHOWN]]:
            order = -int(group["rows"]), int(group["high"]), int(group["low"])
            if len(self._largest) < _SHOWN or order < self._largest[-1].order:
                shown = _Shown(order, [self.place_of(row) for row in _first_rows(group, pieces())])
                self._largest = sorted([*self._largest, shown], key=lambda each: each.order)[:_SHOWN]

    def report(self) -> dict[str, Any]:
        """Return what report.json says of them."""
        largest = [{"rows": -each.order[0], "first": each.places} for each in self._largest]
        return {"groups": self.groups, "rows": self.rows, "largest": largest}


def _first_rows(group: Any, pieces: Iterator[Array]) -> list[int]:
    """Return the first rows of a group, which are in order."""
    found: list[int] = []
    for piece in pieces:
        own = (piece["high"] == group["high"]) & (piece["low"] == group["low"])
        found += piece["row"][own][: _PLACES - len(found)].tolist()
        if len(found) == _PLACES:
            break
    return found
