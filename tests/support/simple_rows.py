"""What becomes of rows, and the order in which steps read them, as it is told most simply: with all rows in memory."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finetune_api.defaults import HOLDOUT_FRACTION, MAX_HELD_OUT_ROWS, MIN_ROWS_TO_HOLD_OUT
from finetune_trainer.data.examples import ARRAYS, COLUMNS
from finetune_trainer.data.spool import EXAMPLE, ROW, SEGMENT

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]


class SimpleDivision(NamedTuple):
    rows: Array
    examples: Array
    held_out: npt.NDArray[np.bool_]
    dropped: npt.NDArray[np.bool_]
    copy_of: IntArray  # the first row that says the same, which may be the row itself
    distinct: int

    def examples_of(self, rows: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        return np.repeat(rows, self.rows["examples"].astype(np.int64))

    @property
    def train(self) -> npt.NDArray[np.bool_]:
        return ~(self.held_out | self.dropped)


def divide(folder: Path, fraction: float | None) -> SimpleDivision:
    rows, examples = np.fromfile(folder / "rows", dtype=ROW), np.fromfile(folder / "examples", dtype=EXAMPLE)
    order = np.lexsort((rows["hash_low"], rows["hash_high"]))  # stable: of equal rows the first read comes first
    high, low = rows["hash_high"][order], rows["hash_low"][order]
    is_first = np.ones(len(rows), dtype=np.bool_)
    is_first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    firsts = order[is_first]
    chosen = firsts[: _held_out_count(len(firsts), fraction)]
    if fraction is None:
        cumulated = np.cumsum(rows["examples"][chosen].astype(np.int64))
        chosen = chosen[: max(1, int(np.searchsorted(cumulated, MAX_HELD_OUT_ROWS, side="right")))]
    held_out = np.zeros(len(rows), dtype=np.bool_)
    held_out[chosen] = True
    group = np.empty(len(rows), dtype=np.int64)
    group[order] = np.cumsum(is_first) - 1
    in_held_group = np.zeros(len(firsts), dtype=np.bool_)
    in_held_group[group[chosen]] = True
    return SimpleDivision(
        rows, examples, held_out, in_held_group[group] & ~held_out, firsts[group].astype(np.int64), len(firsts)
    )


def _held_out_count(distinct: int, fraction: float | None) -> int:
    if fraction is None:
        if distinct < MIN_ROWS_TO_HOLD_OUT:
            return 0
        return min(max(1, round(HOLDOUT_FRACTION * distinct)), MAX_HELD_OUT_ROWS)
    return min(round(fraction * distinct), max(0, distinct - 1))


def split_arrays(spool: Path, division: SimpleDivision, rows: npt.NDArray[np.bool_]) -> dict[str, bytes]:
    """Return the content of each file of the split of `rows`."""
    keep, examples = division.examples_of(rows), division.examples
    of_token = np.repeat(keep, examples["stored_tokens"])
    segments = np.fromfile(spool / "segments", dtype=SEGMENT)[np.repeat(keep, examples["segments"])]
    kept = division.rows[rows]
    arrays = {
        "tokens": np.fromfile(spool / "tokens", dtype="<u4")[of_token],
        "labels": np.fromfile(spool / "labels", dtype="u1")[of_token],
        "segment_offsets": np.concatenate([[0], np.cumsum(segments["length"].astype(np.int64))]),
        "parents": segments["parent"],
        "example_offsets": np.concatenate([[0], np.cumsum(examples["segments"][keep].astype(np.int64))]),
        **{column: np.repeat(kept[of], kept["examples"]) for column, of in _COLUMNS.items()},
    }
    return {name: array.astype((ARRAYS | COLUMNS)[name]).tobytes() for name, array in arrays.items()}


_COLUMNS = {"file": "file", "row": "number", "weight": "weight"}


def lengths(division: SimpleDivision) -> dict[str, Any]:
    """Return what the report says of the lengths of the used examples, and the places of the longest rows."""
    tokens = division.examples[division.examples_of(~division.dropped)]["longest"].astype(np.int64)
    counts, edges = np.histogram(tokens, bins=20)
    firsts = np.cumsum(division.rows["examples"].astype(np.int64)) - division.rows["examples"]
    row_tokens = np.add.reduceat(division.examples["tokens"].astype(np.int64), firsts)
    return {
        "percentiles": {f"p{q}": int(np.percentile(tokens, q)) for q in (50, 95, 99, 100)},
        "histogram": {"edges": [round(float(edge), 1) for edge in edges], "examples": counts.tolist()},
        "longest_rows": np.argsort(-row_tokens, kind="stable")[:10].tolist(),
    }


def plain_order(rows: int, total: int, batch: int, seed: int) -> IntArray:
    """Return the examples that the steps read: epochs one after another, no step reading a row twice."""
    epochs = [
        np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows) for epoch in range(-(-total // rows))
    ]
    order = np.concatenate(epochs).astype(np.int64)
    for boundary in range(rows, len(order), rows) if batch <= rows else ():
        begin = boundary - boundary % batch
        head = begin + batch - boundary
        if begin == boundary:
            continue
        window = order[boundary : min(boundary + rows, boundary + head + 2 * batch)]
        is_read = np.isin(window, order[begin:boundary])
        repeated = np.flatnonzero(is_read[:head])
        others = head + np.flatnonzero(~is_read[head:])[: len(repeated)]
        window[repeated], window[others] = window[others].copy(), window[repeated].copy()
    return order[:total]


def mixed_order(sizes: list[int], weights: list[float], total: int, batch: int, seed: int) -> IntArray:
    """Return the examples that the steps read where datasets count differently."""
    parts: list[IntArray] = []
    epoch = 0
    while sum(map(len, parts)) < total:
        parts.append(_mixed_epoch(np.repeat(np.arange(len(sizes)), sizes), weights, seed, epoch))
        epoch += 1
    order = np.concatenate(parts)[:total]
    _put_off_repeats(order, batch)
    return order


def _mixed_epoch(dataset: IntArray, weights: list[float], seed: int, epoch: int) -> IntArray:
    reads: list[IntArray] = []
    places: list[npt.NDArray[np.float64]] = []

    def generator(use: int, count: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[seed, number + 1], counter=[0, 0, use, count]))

    for number, weight in enumerate(weights):
        members = np.flatnonzero(dataset == number)
        begin, end = (round(each * weight * len(members)) for each in (epoch, epoch + 1))
        passes = range(begin // max(1, len(members)), -(-end // max(1, len(members))))
        stream = [members[generator(0, each).permutation(len(members))] for each in passes]
        first = begin - passes.start * len(members)
        reads.append(np.concatenate([*stream, members[:0]])[first : first + end - begin])
        within = generator(1, epoch).random(end - begin)
        places.append((np.arange(end - begin) + within) / max(1, end - begin))
    return np.concatenate(reads)[np.argsort(np.concatenate(places), kind="stable")].astype(np.int64)


def _put_off_repeats(order: IntArray, batch: int) -> None:
    step = np.arange(len(order)) // batch
    by_step = np.lexsort((order, step))
    same = (step[by_step][1:] == step[by_step][:-1]) & (order[by_step][1:] == order[by_step][:-1])
    for found in np.unique(step[by_step[1:][same]]).tolist():
        begin, end = found * batch, (found + 1) * batch
        read: set[int] = set()
        ahead = iter(range(end, min(len(order), end + 8 * batch)))
        for place in range(begin, min(end, len(order))):
            if int(order[place]) in read:
                other = next((each for each in ahead if int(order[each]) not in read), None)
                if other is None:
                    break
                order[place], order[other] = order[other], order[place]
            read.add(int(order[place]))
