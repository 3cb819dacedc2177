"""The batch plan: which rows every optimizer step reads, fixed before step 1, and how rows fill a forward pass.

The order of an epoch is a function of the seed and the epoch's number, and of the batch size where a step reaches into
the next epoch: it reads no row twice. So resume, accumulation and another number of devices read the same rows in the
same step. Pure numpy.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BatchPlan:
    """Step g reads rows[step_offsets[g]:step_offsets[g + 1]]; the arrays of `runplan`."""

    rows: IntArray  # (sum of batch sizes,)
    step_offsets: IntArray  # (steps + 1,)
    label_tokens: IntArray  # (steps,)
    tokens: IntArray  # (steps,)

    @property
    def steps(self) -> int:
        return len(self.tokens)


def epoch_order(rows: int, seed: int, epoch: int) -> IntArray:
    """A permutation of range(rows) that depends on the seed and the epoch only."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return generator.permutation(rows).astype(np.int64)


def rows_to_read(rows: int, epochs: float) -> int:
    """Rows read in `epochs` passes, a fraction of a pass included; at least one."""
    return max(1, round(rows * epochs))


def plan_batches(
    lengths: npt.NDArray[Any], labels: npt.NDArray[Any], total_rows: int, global_batch_size: int, seed: int
) -> BatchPlan:
    """Cut `total_rows` rows, epoch after epoch, into steps of `global_batch_size`; the last step may be smaller.

    No step reads a row twice, unless it is larger than an epoch.
    lengths, labels: (rows,) tokens and label tokens of each row.
    """
    rows = len(lengths)
    epochs = -(-total_rows // rows)
    order = np.concatenate([epoch_order(rows, seed, epoch) for epoch in range(epochs)])
    _keep_steps_distinct(order, rows, global_batch_size)
    order = order[:total_rows]
    starts = np.arange(0, total_rows, global_batch_size, dtype=np.int64)
    return BatchPlan(
        rows=order,
        step_offsets=np.append(starts, np.int64(total_rows)),
        label_tokens=np.add.reduceat(labels.astype(np.int64)[order], starts),
        tokens=np.add.reduceat(lengths.astype(np.int64)[order], starts),
    )


def _keep_steps_distinct(order: IntArray, rows: int, batch_size: int) -> None:
    """Exchange rows within an epoch, in place, where its first step has read them at the end of the epoch before.

    Each is exchanged with the next row behind that step which the step has not read. A step holds less than two
    batches of candidates to pass over, so a window is enough.
    """
    if batch_size > rows:
        return
    for boundary in range(rows, len(order), rows):
        begin = boundary - boundary % batch_size
        head = begin + batch_size - boundary  # rows of the new epoch in this step
        if begin == boundary:
            continue
        window = order[boundary : min(boundary + rows, boundary + head + 2 * batch_size)]
        is_read = np.isin(window, order[begin:boundary])
        repeated = np.flatnonzero(is_read[:head])
        others = head + np.flatnonzero(~is_read[head:])[: len(repeated)]
        window[repeated], window[others] = window[others].copy(), window[repeated].copy()


def write(plan: BatchPlan, path: Path) -> None:
    """Write `batches.safetensors`; equal plans give equal bytes."""
    safetensors.numpy.save_file(
        {
            "rows": plan.rows,
            "step_offsets": plan.step_offsets,
            "label_tokens": plan.label_tokens,
            "tokens": plan.tokens,
        },
        path,
    )


def pack(lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Group rows so that each group has at most `budget_tokens`: best fit, longest rows first.

    Returns indices into `lengths`; every index occurs once, groups and their members in a fixed order. A row
    longer than the budget is a group of its own.
    """
    groups: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, group), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(free, (lengths[index], -1))
        if place < len(free):
            left, group = free.pop(place)
        else:
            left, group = budget_tokens, len(groups)
            groups.append([])
        groups[group].append(index)
        if left > lengths[index]:
            insort(free, (left - lengths[index], group))
    return groups
