"""The batch plan: which examples every optimizer step reads, fixed before step 1, and how sequences fill a forward
pass.

The order of an epoch is a function of the seed and the epoch's number, and of the batch size where a step reaches into
the next epoch: it reads no row twice. So resume, accumulation and another number of devices read the same rows in the
same step. Pure numpy. The plan lies in a file from the beginning and is mapped; what is in memory is the permutation
that an epoch is shuffled in, ORDER_BYTES an example, and a byte a step or an example.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finetune_trainer.runplan import Denominator
from finetune_trainer.step_plan import StepPlan, new_steps

IntArray = npt.NDArray[np.int64]
CHUNK = 2**18  # reads that are worked on at once
ORDER_BYTES = 4 + 1  # of memory for an example: its place in an epoch's permutation, and whether it is read at all
_LOOK_AHEAD = 8  # steps
_PASS, _EPOCH = 0, 1  # what random numbers are used for


def epoch_order(rows: int, seed: int, epoch: int) -> npt.NDArray[np.uint32]:
    """A permutation of range(rows) that depends on the seed and the epoch only."""
    return _permutation(np.random.Generator(np.random.Philox(key=[seed, epoch])), rows)


def _permutation(generator: np.random.Generator, count: int) -> npt.NDArray[np.uint32]:
    """Return what generator.permutation(count) does, in half of the memory."""
    order = np.arange(count, dtype=np.uint32)
    generator.shuffle(order)
    return order


def rows_to_read(rows: float, epochs: float) -> int:
    """Rows read in `epochs` passes, a fraction of a pass included; at least one."""
    return max(1, round(rows * epochs))


@dataclass(frozen=True)
class Mix:
    """How many examples each dataset has, which lie in this order, and how often one epoch reads those of each."""

    sizes: Sequence[int]
    weights: Sequence[float]

    @property
    def is_plain(self) -> bool:
        """Whether every epoch reads every example once."""
        return all(weight == 1 for weight in self.weights)

    @property
    def epoch_examples(self) -> float:
        """Examples that one epoch reads."""
        return float(np.asarray(self.sizes) @ np.asarray(self.weights, dtype=np.float64))

    @property
    def firsts(self) -> IntArray:
        """(datasets,) the first example of each."""
        return np.cumsum([0, *self.sizes[:-1]], dtype=np.int64)


def _generator(seed: int, dataset: int, use: int, count: int) -> np.random.Generator:
    """Return random numbers for one use, in one pass or epoch of one dataset, that no other use shares."""
    return np.random.Generator(np.random.Philox(key=[seed, dataset + 1], counter=[0, 0, use, count]))


class _Taken(NamedTuple):
    """Examples that an epoch reads of a dataset, and where each lies in the epoch, from 0 to 1."""

    examples: IntArray
    places: npt.NDArray[np.float64]


class _Reads:
    """What one epoch reads of one dataset, in order.

    The dataset is read pass after pass, each a permutation of its own, of which one is in memory."""

    def __init__(self, mix: Mix, seed: int, number: int, epoch: int) -> None:
        self._first, self._size = int(mix.firsts[number]), mix.sizes[number]
        begin, end = (round(each * mix.weights[number] * self._size) for each in (epoch, epoch + 1))
        self.count = end - begin
        self._seed, self._number = seed, number
        self._next_pass, self._place = divmod(begin, max(1, self._size))
        self._pass = np.empty(0, dtype=np.uint32)
        self._within = _generator(seed, number, _EPOCH, epoch)
        self._given = 0
        self._examples, self._places = np.empty(0, dtype=np.int64), np.empty(0)

    def until(self, share: float) -> _Taken:
        """Return the next examples, up to that share of the epoch, and their places; all that are left from 1 on."""
        count = self.count if share >= 1 else min(self.count, int(share * self.count) + 2)
        self._take(count - self._given)
        taken = np.ones(len(self._places), dtype=np.bool_) if share >= 1 else self._places < share
        examples, places = self._examples[taken], self._places[taken]
        self._examples, self._places = self._examples[~taken], self._places[~taken]
        return _Taken(examples, places)

    def _take(self, count: int) -> None:
        places = (np.arange(self._given, self._given + count) + self._within.random(count)) / max(1, self.count)
        self._places = np.concatenate([self._places, places])
        self._given += count
        parts = [self._examples]
        while count:
            if not len(self._pass):
                self._pass = _permutation(_generator(self._seed, self._number, _PASS, self._next_pass), self._size)
                self._next_pass += 1
            parts.append(self._pass[self._place : self._place + count].astype(np.int64) + self._first)
            count, self._place = count - len(parts[-1]), self._place + len(parts[-1])
            if self._place == self._size:
                self._pass, self._place = np.empty(0, dtype=np.uint32), 0
        self._examples = np.concatenate(parts)


def mixed_order(mix: Mix, seed: int, epoch: int) -> Iterator[IntArray]:
    """Yield what one epoch reads: of each dataset as many examples as its weight says, evenly spread over the epoch.

    A dataset is read pass after pass, each a permutation of its own, and an epoch goes on where the one before has
    ended: with a weight of 0.5 every other epoch reads the other half.
    """
    datasets = [_Reads(mix, seed, number, epoch) for number in range(len(mix.sizes))]
    parts = max(1, -(-sum(each.count for each in datasets) // CHUNK))
    for part in range(1, parts + 1):
        taken = [each.until(part / parts) for each in datasets]
        places = np.concatenate([each.places for each in taken])
        yield np.concatenate([each.examples for each in taken])[np.argsort(places, kind="stable")]


def plan_batches(
    path: Path,
    lengths: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    weights: npt.NDArray[Any],
    total_rows: int,
    global_batch_size: int,
    seed: int,
    mix: Mix | None = None,
    *,
    denominator: Denominator = Denominator.LABEL_TOKENS,
) -> StepPlan:
    """Cut `total_rows` examples, epoch after epoch, into steps of `global_batch_size`; the last step may be smaller.

    No step reads an example twice, unless it is larger than an epoch or reads more of a dataset than there is.
    mix: None: every epoch reads every example once.
    lengths, labels, weights: (examples,) tokens, label tokens and weight of each. path: of the file to write.
    """
    steps = -(-total_rows // global_batch_size)
    plan = new_steps(path, total_rows, steps)
    if mix is None or mix.is_plain:
        _read_plainly(plan.examples, len(lengths), global_batch_size, seed)
    else:
        _read_mixed(plan.examples, mix, global_batch_size, seed)
    for first, last in _whole_steps(steps, global_batch_size):
        begin, end = first * global_batch_size, min(total_rows, last * global_batch_size)
        read, starts = plan.examples[begin:end], np.arange(0, end - begin, global_batch_size)
        label_counts = labels[read].astype(np.int64)
        plan.step_offsets[first:last] = begin + starts
        plan.label_tokens[first:last] = np.add.reduceat(label_counts, starts)
        units = denominator.units(label_counts) * weights[read].astype(np.float64)
        plan.denominators[first:last] = np.add.reduceat(units, starts)
        plan.tokens[first:last] = np.add.reduceat(lengths[read].astype(np.int64), starts)
    plan.step_offsets[steps] = total_rows
    return plan


def _whole_steps(steps: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Yield the first of some steps and the first behind them; together they read about CHUNK examples."""
    at_once = max(1, CHUNK // batch_size)
    for first in range(0, steps, at_once):
        yield first, min(steps, first + at_once)


def examples_read(read: npt.NDArray[np.int64], examples: int) -> npt.NDArray[np.bool_]:
    """(examples,) whether each is read at all."""
    seen = np.zeros(examples, dtype=np.bool_)
    for begin in range(0, len(read), CHUNK):
        seen[read[begin : begin + CHUNK]] = True
    return seen


def distinct_examples(read: npt.NDArray[np.int64], examples: int) -> int:
    """Return how many different ones of so many examples are read."""
    return int(np.count_nonzero(examples_read(read, examples)))


def _read_plainly(order: IntArray, rows: int, batch_size: int, seed: int) -> None:
    """Write an epoch after the other, of which the last may be a part."""
    for epoch, begin in enumerate(range(0, len(order), rows)):
        read = epoch_order(rows, seed, epoch)
        if begin:
            _keep_steps_distinct(read, order[begin - begin % batch_size : begin], batch_size)
        part = order[begin : begin + rows]
        part[:] = read[: len(part)]
        del read  # before the next one is drawn


def _keep_steps_distinct(order: npt.NDArray[np.uint32], before: IntArray, batch_size: int) -> None:
    """Exchange rows of an epoch, in place, where its first step has read them at the end of the epoch before.

    Each is exchanged with the next row behind that step which the step has not read. A step holds less than two
    batches of candidates to pass over, so a window is enough. before: what the step has read of the epoch before.
    """
    if batch_size > len(order) or not len(before):
        return
    head = batch_size - len(before)  # rows of the new epoch in this step
    window = order[: head + 2 * batch_size]
    is_read = np.isin(window, before)
    repeated = np.flatnonzero(is_read[:head])
    others = head + np.flatnonzero(~is_read[head:])[: len(repeated)]
    window[repeated], window[others] = window[others].copy(), window[repeated].copy()


def _read_mixed(order: IntArray, mix: Mix, batch_size: int, seed: int) -> None:
    """Write epochs until there are enough reads; of few examples some epochs may read none."""
    read = epoch = 0
    while read < len(order):
        for part in mixed_order(mix, seed, epoch):
            place = order[read : read + len(part)]
            place[:] = part[: len(place)]
            read += len(place)
            if read == len(order):
                break
        epoch += 1
    _put_off_repeats(order, batch_size)


def _put_off_repeats(order: IntArray, batch_size: int) -> None:
    """Exchange examples that a step would read again, in place, with the next ones that it does not read.

    Where there are none within the next _LOOK_AHEAD steps, it reads them again."""
    repeats = np.zeros(-(-len(order) // batch_size), dtype=np.bool_)  # (steps,)
    for first, last in _whole_steps(len(repeats), batch_size):
        read = order[first * batch_size : last * batch_size]
        step = first + np.arange(len(read)) // batch_size
        by_step = np.lexsort((read, step))
        same = (step[by_step][1:] == step[by_step][:-1]) & (read[by_step][1:] == read[by_step][:-1])
        repeats[step[by_step[1:][same]]] = True
    for found in np.flatnonzero(repeats):
        begin, end = int(found) * batch_size, (int(found) + 1) * batch_size
        read_by_step: set[int] = set()
        ahead = iter(range(end, min(len(order), end + _LOOK_AHEAD * batch_size)))
        for place in range(begin, min(end, len(order))):
            if int(order[place]) in read_by_step:
                other = next((each for each in ahead if int(order[each]) not in read_by_step), None)
                if other is None:
                    break
                order[place], order[other] = order[other], order[place]
            read_by_step.add(int(order[place]))


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
