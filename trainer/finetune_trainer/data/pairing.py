"""Pair single answers that were rated: those found good with those found bad, of the same prompt, wherever they stand.

An exchange between rows, made once all are in the spool: the answers of a prompt, in the order of their rows, become
pairs, the first good one with the first bad one and so on. Each is in one pair at most. All pairs of a prompt are the
examples of one row, which stands where the first of their rows stood, so that they are held out together. What rows
answer is told by the hash of it; one bucket of hashes is in memory at a time.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.accounts import Ledger
from finetune_trainer.data.buckets import CHUNK, Buckets, first_of_each
from finetune_trainer.data.division import JOINED
from finetune_trainer.data.examples import TokenRun, Tree
from finetune_trainer.data.mapped import mapped, new_mapped
from finetune_trainer.data.problems import Drop
from finetune_trainer.data.spool import CLUSTER, EXAMPLE, FILES, ROW, SEGMENT, Spool

Array = npt.NDArray[Any]

_STAGE = "pair"
_PAIRED = np.dtype([("first", "<u8"), ("good", "<u8"), ("bad", "<u8")])  # rows: the first of all pairs of its prompt
_BEGIN = np.dtype([("example", "<u8"), ("segment", "<u8"), ("token", "<u8")])  # how many lie before those of a row
_ONE_SIDED, _BOTH_WAYS, _IN_A_PAIR, _LEFT_OUT = 1, 2, 3, 4  # what becomes of a rated row; 0: it is none
_DROPS = {_ONE_SIDED: Drop.ONE_SIDED, _BOTH_WAYS: Drop.RATED_BOTH_WAYS}


class Paired(NamedTuple):
    """joined: (…,) JOINED, the rows that are in the pairs of another one; origin: (rows,) of each row of the new spool,
    which one it was in the old; None where nothing was to be paired, and the spool is as it was."""

    joined: Array
    origin: Array | None


def pair_up(
    folder: Path,
    pairs: Callable[[TokenRun, TokenRun], Tree],
    ledger: Ledger,
    beat: Callable[[], None],
    left_out: Array,
) -> Paired:
    """Replace the rated rows in the spool by the pairs that they make, calling `beat` now and then.

    Those that make none are dropped. left_out: (rows,) what is not 0 of a row that goes no further."""
    if not (folder / "prompts").stat().st_size:
        return Paired(np.empty(0, dtype=JOINED), None)
    spooled = _Spooled(folder)
    path, fates = folder / "paired", new_mapped(folder / "fates", np.dtype(np.uint8), len(spooled.rows))
    for begin in range(0, len(fates), CHUNK):
        fates[begin : begin + CHUNK][left_out[begin : begin + CHUNK] != 0] = _LEFT_OUT
    with path.open("wb") as file:
        for found in _found(spooled, folder / "hashes", fates, left_out):
            file.write(found.tobytes())
            beat()
    paired = np.memmap(path, dtype=_PAIRED, mode="r+") if path.stat().st_size else np.empty(0, dtype=_PAIRED)
    paired.sort(order=("first", "good"))
    target, joined, origin = folder / "new", folder / "joined", folder / "origin"
    with Spool(target) as spool, joined.open("wb") as others, origin.open("wb") as origins:
        for row, joined_to_it in _rewritten(spooled, paired, fates, pairs, spool, ledger, beat):
            others.write(joined_to_it.tobytes())
            origins.write(row.to_bytes(8, "little"))
    for name in FILES:
        shutil.move(target / name, folder / name)
    for name in ("paired", "fates", "hashes", "begins"):
        (folder / name).unlink()
    return Paired(mapped(joined, JOINED), mapped(origin, np.dtype("<u8")))


class _Spooled:
    """The rows of a spool, with where the tokens of each lie."""

    def __init__(self, folder: Path) -> None:
        self.rows, self.prompts = mapped(folder / "rows", ROW), mapped(folder / "prompts", CLUSTER)
        self.examples, self.segments = mapped(folder / "examples", EXAMPLE), mapped(folder / "segments", SEGMENT)
        self._tokens = mapped(folder / "tokens", np.dtype("<u4"))
        self._labels = mapped(folder / "labels", np.dtype("<u1"))
        self._begins = self._begun(folder / "begins")

    def _begun(self, path: Path) -> Array:
        begins, before = new_mapped(path, _BEGIN, len(self.rows)), dict.fromkeys(_BEGIN.names or (), 0)
        for at in range(0, len(self.rows), CHUNK):
            counts = self.rows["examples"][at : at + CHUNK].astype(np.int64)
            until = np.cumsum(counts)
            part = self.examples[before["example"] : before["example"] + int(until[-1])]
            begins["example"][at : at + CHUNK] = before["example"] + until - counts
            for name, field in (("segment", "segments"), ("token", "stored_tokens")):
                sums = np.concatenate([[0], np.cumsum(part[field], dtype=np.int64)])
                begins[name][at : at + CHUNK] = before[name] + sums[until - counts]
                before[name] += int(sums[-1])
            before["example"] += int(until[-1])
        return begins

    def trees(self, row: int) -> list[Tree]:
        """Return the examples of a row."""
        begin, found = self._begins[row], list[Tree]()
        segment, token = int(begin["segment"]), int(begin["token"])
        for example in self.examples[int(begin["example"]) :][: int(self.rows["examples"][row])]:
            kept = self.segments[segment : segment + int(example["segments"])]
            tokens = slice(token, token + int(example["stored_tokens"]))
            lengths = kept["length"].astype(np.int64)
            found.append(Tree(self._tokens[tokens], self._labels[tokens], lengths, kept["parent"]))
            segment, token = segment + len(kept), tokens.stop
        return found

    def answer(self, row: int) -> TokenRun:
        """Return the one sequence of a rated row."""
        (tree,) = self.trees(row)
        return TokenRun(tree.tokens, tree.labels)


def _found(spooled: _Spooled, path: Path, fates: npt.NDArray[np.uint8], left_out: Array) -> Iterator[Array]:
    """Yield the pairs, and write what becomes of each rated row. path: for a file."""
    buckets = Buckets(path, spooled.prompts, left_out)
    for bucket in range(buckets.count):
        pieces = list(buckets.pieces(bucket))
        if not pieces:
            continue
        hashed = np.concatenate(pieces)
        hashed = hashed[spooled.rows["label"][hashed["row"]] != 0]
        hashed = hashed[np.lexsort((hashed["row"], hashed["low"], hashed["high"]))]
        begins = np.flatnonzero(first_of_each(hashed["high"], hashed["low"]))[1:]
        for rows in np.split(hashed["row"].astype(np.int64), begins):
            yield _of_prompt(spooled, rows, fates)


def _of_prompt(spooled: _Spooled, rows: npt.NDArray[np.int64], fates: npt.NDArray[np.uint8]) -> Array:
    """Return the pairs of one prompt, and write what becomes of its rows, which are in order."""
    labels = spooled.rows["label"][rows]
    good, bad = rows[labels > 0].tolist(), rows[labels < 0].tolist()
    fates[rows] = _ONE_SIDED
    if good and bad:
        said = {row: spooled.answer(row).tokens.tobytes() for row in (*good, *bad)}
        both = {said[row] for row in good} & {said[row] for row in bad}
        good, bad = ([row for row in side if said[row] not in both] for side in (good, bad))
        fates[[row for row in said if said[row] in both]] = _BOTH_WAYS
    count = min(len(good), len(bad))
    found = np.zeros(count, dtype=_PAIRED)
    found["good"], found["bad"] = good[:count], bad[:count]
    found["first"] = min((*good[:count], *bad[:count]), default=0)
    fates[[*good[:count], *bad[:count]]] = _IN_A_PAIR
    return found


class _Pair(NamedTuple):
    good: int
    bad: int


def _rewritten(
    spooled: _Spooled,
    paired: Array,
    fates: npt.NDArray[np.uint8],
    pairs: Callable[[TokenRun, TokenRun], Tree],
    spool: Spool,
    ledger: Ledger,
    beat: Callable[[], None],
) -> Iterator[tuple[int, Array]]:
    """Write the new spool in the order of the rows; yield each with the rows that are in its examples too."""
    place = written = 0
    for row, fate in enumerate(_each(fates)):
        record = spooled.rows[row]
        if fate in _DROPS:
            ledger.drop(int(record["file"]), int(record["number"]), _STAGE, _DROPS[fate])
            continue
        own: list[_Pair] = []
        while place < len(paired) and int(paired["first"][place]) == row:
            own.append(_Pair(int(paired["good"][place]), int(paired["bad"][place])))
            place += 1
        if fate == _LEFT_OUT or (fate == _IN_A_PAIR and not own):
            continue
        _append(spooled, row, own, pairs, spool)
        others = spooled.rows[sorted({each for pair in own for each in pair} - {row})]
        joined = np.zeros(len(others), dtype=JOINED)
        joined["row"], joined["file"], joined["number"] = written, others["file"], others["number"]
        yield row, joined
        written += 1
        if written % CHUNK == 0:
            beat()


def _each(fates: npt.NDArray[np.uint8]) -> Iterator[int]:
    for begin in range(0, len(fates), CHUNK):
        yield from fates[begin : begin + CHUNK].tolist()


def _append(
    spooled: _Spooled, row: int, own: list[_Pair], pairs: Callable[[TokenRun, TokenRun], Tree], spool: Spool
) -> None:
    """Write a row as it is, or with the pairs that it stands for, which count as their rows do on average."""
    record = spooled.rows[row]
    source = spooled.prompts[row] if own else record
    weights = spooled.rows["weight"][[each for pair in own for each in pair]] if own else record["weight"]
    spool.append(
        b"".join(int(source[name]).to_bytes(8, "big") for name in ("hash_high", "hash_low")),
        int(record["file"]),
        int(record["number"]),
        [pairs(*map(spooled.answer, each)) for each in own] if own else spooled.trees(row),
        prompt_tokens=int(record["prompt_tokens"]),
        weight=float(np.mean(weights)),
    )
