"""Near duplicates: how many planted pairs are found in each band of similarity, and how many others, beside others.

Passages of real text (Python's sources and the demo's dataset) of 25 to 800 words, each with one copy in which words
were replaced, left out or put in until so many of their runs of five words are the same; others stand alone. The truth
is counted plainly, with tuples of words in sets. A pair is found where both are in one cluster. Peers run in
environments of their own: datatrove with the bands of its documentation (14 of 8) and with ours, which verifies
nothing; text-dedup with the values of its documentation, its check of false positives and our threshold.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import tables
from bench.duplicate_peers import PEERS
from bench.environments import python_with

ROOT = Path(__file__).resolve().parents[1]
BANDS = ((0.5, 0.6), (0.6, 0.7), (0.7, 0.75), (0.75, 0.8), (0.8, 0.85), (0.85, 0.9), (0.9, 0.95), (0.95, 1.0))
SIMILARITY = 0.8
_WORD = re.compile(r"\w+")
_SHINGLE = 5
_TIMEOUT_S = 3000
_MOST_TRIES = 400  # edits of one passage


class Pair(NamedTuple):
    """Two texts, by their places among all, and their true similarity."""

    one: int
    other: int
    similarity: float


class Planted(NamedTuple):
    """Texts, and the pairs among them."""

    texts: list[str]
    pairs: list[Pair]


def shingles(words: Sequence[str]) -> set[tuple[str, ...]]:
    """Return the runs of five words, as they are compared, plainly."""
    return {tuple(words[at : at + _SHINGLE]) for at in range(len(words) - _SHINGLE + 1)}


def similarity(one: Sequence[str], other: Sequence[str]) -> float:
    """Return the Jaccard similarity of two texts' runs of words."""
    first, second = shingles(one), shingles(other)
    return len(first & second) / len(first | second)


def passages(generator: random.Random, count: int) -> list[list[str]]:
    """Return so many passages of real words, none of them a part of another."""
    from demo.rows import good_rows

    sources = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    texts = [source.read_text(errors="ignore") for source in sources if "site-packages" not in source.parts]
    texts += [" ".join(message["content"] for row in good_rows() for message in row["messages"])]
    found: list[list[str]] = []
    seen: set[tuple[str, ...]] = set()
    for text in texts:
        words, begin = _WORD.findall(text.lower()), 0
        while begin + 25 < len(words):
            passage = words[begin : begin + generator.choice((25, 40, 80, 150, 300, 800))]
            begin += len(passage)
            own = shingles(passage)
            if len(own) > 15 and len(own & seen) < len(own) / 20:
                found.append(passage)
                seen |= own
    generator.shuffle(found)
    if len(found) < count:
        raise SystemExit(f"{len(found)} passages, {count} are needed")
    return found[:count]


def edited(passage: list[str], low: float, high: float, generator: random.Random) -> list[str] | None:
    """Return a copy whose similarity is in a band; None where chance did not lead there."""
    copy = list(passage)
    for _ in range(_MOST_TRIES):
        place, edit = generator.randrange(len(copy)), generator.randrange(3)
        copy[place : place + (edit < 2)] = [f"{generator.choice(passage)}{generator.randrange(100)}"] if edit else []
        now = similarity(passage, copy)
        if now < low:
            return None
        if now < high and generator.random() < 0.5:
            return copy
    return None


def planted(pairs_each: int, alone: int) -> Planted:
    """Return texts in an order of their own, with so many pairs in each band."""
    generator = random.Random(20)
    sources = passages(generator, 4 * pairs_each * len(BANDS) + alone)
    texts: list[list[str]] = [sources.pop() for _ in range(alone)]
    made: list[tuple[int, int, float]] = []
    for low, high in BANDS:
        begun = len(made)
        while len(made) - begun < pairs_each:
            passage = sources.pop()
            copy = edited(passage, low, high, generator)
            if copy is not None:
                texts += [passage, copy]
                made.append((len(texts) - 2, len(texts) - 1, similarity(passage, copy)))
    order = list(range(len(texts)))
    generator.shuffle(order)
    place = {old: new for new, old in enumerate(order)}
    return Planted(
        [" ".join(texts[old]) for old in order], [Pair(place[one], place[other], same) for one, other, same in made]
    )


class Found(NamedTuple):
    """What a program found: the cluster of each text, and how long it took on one core."""

    clusters: list[int]
    seconds: float


def ours(texts: Sequence[str], folder: Path) -> Found:
    """Find near copies as prepare does, from the texts of rows to clusters, in one process."""
    import hashlib

    import numpy as np

    from finetune_trainer.data.components import Components
    from finetune_trainer.data.examples import one_segment
    from finetune_trainer.data.left_out import LEFT_OUT
    from finetune_trainer.data.mapped import mapped
    from finetune_trainer.data.near_copies import Sketched, find_near_copies
    from finetune_trainer.data.shingles import Compared
    from finetune_trainer.data.sketches import Sketcher
    from finetune_trainer.data.spool import CLUSTER, ROW, Spool

    tree = one_segment(np.zeros(1, dtype=np.uint32), np.ones(1, dtype=np.uint8))
    began_s = time.perf_counter()
    sketcher = Sketcher(SIMILARITY)
    with Spool(folder) as spool:
        batch: list[str] = []
        number = batch_bytes = 0
        for text in [*texts, None]:
            if text is not None:
                batch.append(text)
                batch_bytes += len(text)
            if text is None or len(batch) == 512 or batch_bytes >= 2**20:  # as prepare's batches
                sketches = sketcher.sketches([Compared((), (each,)) for each in batch])
                for each, sketch in zip(batch, sketches, strict=True):
                    digest = hashlib.blake2b(each.encode(), digest_size=16).digest()
                    spool.append(digest, 0, number, [tree], sketch=sketch)
                    number += 1
                batch, batch_bytes = [], 0
    rows = mapped(folder / "rows", ROW)
    left_out, clusters = np.zeros(len(rows), dtype=LEFT_OUT), np.zeros(len(rows), dtype=CLUSTER)
    components, sketched = Components(rows, folder / "components"), Sketched(folder, rows, SIMILARITY)
    find_near_copies(folder, sketched, components, left_out, clusters, str, lambda: None)
    seconds = time.perf_counter() - began_s
    _, named = np.unique(clusters, return_inverse=True)
    return Found(named.tolist(), seconds)


def peer(name: str, texts: Path, folder: Path) -> Found:
    """Find near copies by a peer, in its environment, which is made the first time."""
    each = PEERS[name]
    folder.mkdir()
    python = python_with(each.packages, each.python)
    command = [str(python), "-c", each.program, str(texts), str(folder), *each.arguments]
    env = os.environ | {"HF_HOME": str(folder / "cache")}
    ran = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, text=True, cwd=folder, env=env, check=False)
    if ran.returncode != 0:
        raise SystemExit(f"{name} failed:\n{ran.stderr[-3000:]}")
    return Found(**json.loads(ran.stdout.splitlines()[-1]))


def row(name: str, found: Found, work: Planted) -> list[str]:
    """Return a line of the table: of each band how many pairs were found, then all together, and the speed."""
    cells: list[str] = []
    wanted = wrong = hit = 0
    for low, high in BANDS:
        own = [pair for pair in work.pairs if low <= pair.similarity < high]
        same = sum(found.clusters[pair.one] == found.clusters[pair.other] for pair in own)
        cells.append(f"{same / len(own):.3f}")
        if low >= SIMILARITY:
            wanted, hit = wanted + len(own), hit + same
        else:
            wrong += same
    sizes: dict[int, int] = {}
    for cluster in found.clusters:
        sizes[cluster] = sizes.get(cluster, 0) + 1
    every = sum(size * (size - 1) // 2 for size in sizes.values())
    size_mb = sum(map(len, work.texts)) / 1e6
    others = every - hit - wrong
    return [
        name,
        *cells,
        f"{hit / wanted:.4f}",
        f"{hit / max(1, every):.4f}",
        str(others),
        f"{size_mb / found.seconds:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200, help="in each band")
    parser.add_argument("--alone", type=int, default=1500, help="texts without a copy")
    parser.add_argument("--without-peers", action="store_true")
    given: Any = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    work = planted(given.pairs, given.alone)
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix="bench-duplicates-") as name:
        folder = Path(name)
        (folder / "texts.json").write_text(json.dumps(work.texts))
        rows.append(row("ours (18 of 6, verified)", ours(work.texts, folder / "ours"), work))
        if not given.without_peers:
            for at, each in enumerate(PEERS):
                rows.append(row(each, peer(each, folder / "texts.json", folder / str(at)), work))
    header = [
        "",
        *(f"{low:g} to {high:g}" for low, high in BANDS),
        "recall ≥ 0.8",
        "precision",
        "unplanted pairs",
        "MB/s",
    ]
    size_mb = sum(map(len, work.texts)) / 1e6
    body = (
        f"{len(work.texts):,} texts, {size_mb:.1f} MB; {given.pairs} pairs in each band, of which the share is told "
        f"that was found in one cluster. Precision: of all pairs in one cluster, those planted from {SIMILARITY} on. "
        f"One core.\n\n{tables.table(header, rows)}\n"
    )
    tables.write("duplicates", "Near duplicates", "python -m bench.duplicates", ["numpy"], body)


if __name__ == "__main__":
    main()
