"""Rows that belong together, however far apart they stand: union-find over rows, in a file."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.buckets import CHUNK
from finetune_trainer.data.mapped import new_mapped
from finetune_trainer.data.spool import CLUSTER

Array = npt.NDArray[Any]


class Components:
    """Rows, each alone until it is joined to another. Each component is named by its row of the lowest hash, so that
    its name does not depend on the order of the rows. rows: (rows,) ROW; path: for a file."""

    def __init__(self, rows: Array, path: Path) -> None:
        self._rows = rows
        self._parents = new_mapped(path, np.dtype("<i8"), len(rows))
        for begin in range(0, len(rows), CHUNK):
            part = self._parents[begin : begin + CHUNK]
            part[:] = np.arange(begin, begin + len(part))

    def root(self, row: int) -> int:
        """Return the row by which the component of a row is named."""
        parents = self._parents
        while (parent := int(parents[row])) != row:
            row, parents[row] = parent, parents[parent]
        return row

    def join(self, one: int, other: int) -> None:
        """Make one component of those of two rows."""
        one, other = self.root(one), self.root(other)
        first, last = sorted((one, other), key=self._name)
        self._parents[last] = first

    def join_each(self, rows: Iterable[int], others: Iterable[int]) -> None:
        """Join each of some rows to the other one beside it."""
        for row, other in zip(rows, others, strict=True):
            self.join(row, other)

    def _name(self, row: int) -> tuple[int, int, int]:
        return int(self._rows["hash_high"][row]), int(self._rows["hash_low"][row]), row

    def write(self, clusters: Array) -> None:
        """Write the hash by which each row's component is named. clusters: (rows,) CLUSTER."""
        for begin, roots in self._roots():
            part = clusters[begin : begin + len(roots)]
            for name in CLUSTER.names or ():
                part[name] = self._rows[name][roots]

    def _roots(self) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        for begin in range(0, len(self._rows), CHUNK):
            roots = self._parents[begin : begin + CHUNK]
            while not np.array_equal(above := self._parents[roots], roots):
                roots = above
            yield begin, np.asarray(roots)
