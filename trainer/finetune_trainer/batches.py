"""The batch plan: which examples every optimizer step reads, fixed before step 1, and how sequences fill a forward
pass.

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
_LOOK_AHEAD = 8  # steps
_PASS, _EPOCH = 0, 1  # what random numbers are used for


@dataclass(frozen=True)
class BatchPlan:
    """Step g reads examples[step_offsets[g]:step_offsets[g + 1]]; the arrays of `runplan`."""

    examples: IntArray  # (sum of batch sizes,)
    step_offsets: IntArray  # (steps + 1,)
    label_tokens: IntArray  # (steps,)
    denominators: npt.NDArray[np.float64]  # (steps,)
    tokens: IntArray  # (steps,)

    @property
    def steps(self) -> int:
        return len(self.tokens)


def epoch_order(rows: int, seed: int, epoch: int) -> IntArray:
    """A permutation of range(rows) that depends on the seed and the epoch only."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return generator.permutation(rows).astype(np.int64)


def rows_to_read(rows: float, epochs: float) -> int:
    """Rows read in `epochs` passes, a fraction of a pass included; at least one."""
    return max(1, round(rows * epochs))


@dataclass(frozen=True)
class Mix:
    """Which dataset every example is of, and how often one epoch reads the examples of each.

    dataset: (examples,) as an index into `weights`."""

    dataset: IntArray
    weights: Sequence[float]

    @property
    def is_plain(self) -> bool:
        """Whether every epoch reads every example once."""
        return all(weight == 1 for weight in self.weights)

    @property
    def epoch_examples(self) -> float:
        """Examples that one epoch reads."""
        examples = np.bincount(self.dataset, minlength=len(self.weights))
        return float(examples @ np.asarray(self.weights, dtype=np.float64))


def _generator(seed: int, dataset: int, use: int, count: int) -> np.random.Generator:
    """Return random numbers for one use, in one pass or epoch of one dataset, that no other use shares."""
    return np.random.Generator(np.random.Philox(key=[seed, dataset + 1], counter=[0, 0, use, count]))


def mixed_order(mix: Mix, seed: int, epoch: int) -> IntArray:
    """Return what one epoch reads: of each dataset as many examples as its weight says, evenly spread over the epoch.

    A dataset is read pass after pass, each a permutation of its own, and an epoch goes on where the one before has
    ended: with a weight of 0.5 every other epoch reads the other half.
    """
    reads: list[IntArray] = []
    places: list[npt.NDArray[np.float64]] = []
    for number, weight in enumerate(mix.weights):
        members = np.flatnonzero(mix.dataset == number)
        begin, end = (round(each * weight * len(members)) for each in (epoch, epoch + 1))
        passes = range(begin // max(1, len(members)), -(-end // max(1, len(members))))
        stream = [members[_generator(seed, number, _PASS, each).permutation(len(members))] for each in passes]
        first = begin - passes.start * len(members)
        reads.append(np.concatenate([*stream, members[:0]])[first : first + end - begin])
        within = _generator(seed, number, _EPOCH, epoch).random(end - begin)
        places.append((np.arange(end - begin) + within) / max(1, end - begin))
    return np.concatenate(reads)[np.argsort(np.concatenate(places), kind="stable")].astype(np.int64)


def plan_batches(
    lengths: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    weights: npt.NDArray[Any],
    total_rows: int,
    global_batch_size: int,
    seed: int,
    mix: Mix | None = None,
) -> BatchPlan:
    """Cut `total_rows` examples, epoch after epoch, into steps of `global_batch_size`; the last step may be smaller.

    No step reads an example twice, unless it is larger than an epoch or reads more of a dataset than there is.
    mix: None: every epoch reads every example once.
    lengths, labels, weights: (examples,) tokens, label tokens and weight of each.
    """
    order = _plain_order(len(lengths), total_rows, global_batch_size, seed)
    if mix is not None and not mix.is_plain:
        order = _mixed_order(mix, total_rows, global_batch_size, seed)
    starts = np.arange(0, total_rows, global_batch_size, dtype=np.int64)
    labels = labels.astype(np.int64)
    return BatchPlan(
        examples=order,
        step_offsets=np.append(starts, np.int64(total_rows)),
        label_tokens=np.add.reduceat(labels[order], starts),
        denominators=np.add.reduceat((labels * weights.astype(np.float64))[order], starts),
        tokens=np.add.reduceat(lengths.astype(np.int64)[order], starts),
    )


def _plain_order(rows: int, total_rows: int, batch_size: int, seed: int) -> IntArray:
    epochs = -(-total_rows // rows)
    order = np.concatenate([epoch_order(rows, seed, epoch) for epoch in range(epochs)])
    _keep_steps_distinct(order, rows, batch_size)
    return order[:total_rows]


def _mixed_order(mix: Mix, total_rows: int, batch_size: int, seed: int) -> IntArray:
    """Read epochs until there are `total_rows`; of few examples some epochs may read none."""
    parts: list[IntArray] = []
    read = epoch = 0
    while read < total_rows:
        parts.append(mixed_order(mix, seed, epoch))
        read, epoch = read + len(parts[-1]), epoch + 1
    order = np.concatenate(parts)[:total_rows]
    _put_off_repeats(order, batch_size)
    return order


def _put_off_repeats(order: IntArray, batch_size: int) -> None:
    """Exchange examples that a step would read again, in place, with the next ones that it does not read.

    Where there are none within the next _LOOK_AHEAD steps, it reads them again."""
    step = np.arange(len(order)) // batch_size
    by_step = np.lexsort((order, step))
    same = (step[by_step][1:] == step[by_step][:-1]) & (order[by_step][1:] == order[by_step][:-1])
    for found in np.unique(step[by_step[1:][same]]).tolist():
        begin, end = found * batch_size, (found + 1) * batch_size
        read: set[int] = set()
        ahead = iter(range(end, min(len(order), end + _LOOK_AHEAD * batch_size)))
        for place in range(begin, min(end, len(order))):
            if int(order[place]) in read:
                other = next((each for each in ahead if int(order[each]) not in read), None)
                if other is None:
                    break
                order[place], order[other] = order[other], order[place]
            read.add(int(order[place]))


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
            "examples": plan.examples,
            "step_offsets": plan.step_offsets,
            "label_tokens": plan.label_tokens,
            "denominators": plan.denominators,
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
