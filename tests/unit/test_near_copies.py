"""Rows that say nearly the same are found among all rows, told by what they have in common, and never straddle."""

import random
import string
import tracemalloc
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_run import Prepared, accounted, chat, jsonl, prepare_run, put
from finetune_trainer.data import buckets, components, near_copies, shingles
from finetune_trainer.data.components import Components
from finetune_trainer.data.division import divide
from finetune_trainer.data.examples import one_segment
from finetune_trainer.data.kinds import compared
from finetune_trainer.data.left_out import LEFT_OUT
from finetune_trainer.data.mapped import mapped, new_mapped
from finetune_trainer.data.near_copies import Sketched, find_near_copies
from finetune_trainer.data.rows import Completion, Conversation, Pair, Text
from finetune_trainer.data.shingles import Compared, shingles_of
from finetune_trainer.data.sketches import Sketcher, bands_for
from finetune_trainer.data.spool import CLUSTER, ROW, SIZES, Spool

CPT = {"method": {"type": "CPT"}}
NONE_HELD_OUT = {"evaluation": {"holdoutFraction": 0}}
WORDS = ["".join(random.Random(seed).choices(string.ascii_lowercase, k=2 + seed % 9)) for seed in range(3000)]


def words(seed: int, count: int) -> list[str]:
    return random.Random(seed).choices(WORDS, k=count)


def edited(given: list[str], edits: int, seed: int) -> list[str]:
    """Return the words with so many of them replaced, far apart."""
    found, chance = list(given), random.Random(-1 - seed)
    for place in chance.sample(range(len(given)), edits):
        found[place] = "x" + chance.choice(WORDS)
    return found


def said(text: str) -> set[int]:
    (found,) = shingles_of([Compared((), (text,))])
    return set(found.said.tolist())


@pytest.mark.parametrize(
    ("one", "other", "are_equal"),
    [
        ("The quick, brown fox!", "the quick brown FOX", True),
        ("caf\u00e9 au lait", "cafe\u0301 au lait", True),
        ("\u201cquick\u201d \u2014 brown\u3002", "quick brown", True),
        ("\u4f60\u597d", "\u4f60 \u597d", True),
        ("\u4f60\u597d", "\u597d\u4f60", False),
        ("snake_case", "snake case", False),
        ("a b c", "a b d", False),
        ("w" * 100 + "a", "w" * 100 + "b", False),
        ("one two", "onetwo", False),
    ],
)
def test_words_are_compared_without_case_and_punctuation(one: str, other: str, are_equal: bool) -> None:
    assert (said(one) == said(other)) is are_equal


def test_shingles_are_runs_of_five_words_and_of_short_rows_of_two() -> None:
    def count(number: int, *, twice: bool = False) -> int:
        text = " ".join(WORDS[:number])
        return len(said(f"{text} {text}" if twice else text))

    assert [count(number) for number in (0, 1, 2, 19, 20, 30)] == [0, 1, 1, 18, 16, 26]
    assert count(30, twice=True) == 30, "a set: 26, and 4 across the seam"


def test_the_shingles_of_a_row_do_not_depend_on_what_it_is_worked_on_with() -> None:
    rows = [
        Compared((" ".join(words(seed, seed % 7)),), (" ".join(words(seed + 1, seed * 3 % 50)), "\u4f60" * (seed % 3)))
        for seed in range(40)
    ] + [Compared((), ())]
    together = shingles_of(rows)
    for row, found in zip(rows, together, strict=True):
        (alone,) = shingles_of([row])
        assert (alone.asked.tolist(), alone.said.tolist()) == (found.asked.tolist(), found.said.tolist())
    assert shingles_of([Compared((), ("the quick brown fox",))])[0].said.tolist() == [
        1895152439,
        3381356978,
        3548175452,
    ], "the same in every process"


@pytest.mark.parametrize("similarity", [0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99, 1.0])
def test_bands_let_near_copies_meet_at_whatever_similarity(similarity: float) -> None:
    count, minima = bands_for(similarity)
    assert 1 - (1 - similarity**minima) ** count >= 0.995
    assert count * minima <= 128


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (Text("a"), Compared((), ("a",))),
        (Completion("p", "c"), Compared(("p",), ("c",))),
        (Pair(Completion("p", "c"), Completion("p", "r")), Compared(("p",), ["c", "r"])),
        (
            Conversation(
                [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a"},
                    {"role": "user", "content": "r"},
                    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
                ],
                (False, False, True, False, True),
            ),
            Compared(["q", "r"], ("a\nf",)),
        ),
    ],
)
def test_what_many_rows_begin_with_is_not_compared(row: Any, expected: Compared) -> None:
    assert compared(row) == expected


def spooled(folder: Path, rows: list[Compared], similarity: float = 0.8) -> Path:
    sketches = Sketcher(similarity).sketches(rows)
    ids, ones = np.arange(3, dtype=np.uint32), np.ones(3, dtype=np.uint8)
    hashes = random.Random(5)
    with Spool(folder) as spool:
        for number, sketch in enumerate(sketches, 1):
            spool.append(hashes.randbytes(16), 0, number, [one_segment(ids, ones)], sketch=sketch)
    return folder


def found_in(folder: Path, similarity: float = 0.8) -> tuple[list[int], list[bytes], Any]:
    """Return of each row which one it is dropped in favour of, or itself, its cluster, and what was found."""
    rows = mapped(folder / "rows", ROW)
    left_out, clusters = np.zeros(len(rows), dtype=LEFT_OUT), np.zeros(len(rows), dtype=CLUSTER)
    every, sketched = Components(rows, folder / "components"), Sketched(folder, rows, similarity)
    near = find_near_copies(folder, sketched, every, left_out, clusters, str, lambda: None)
    return (
        [int(each["of"]) if each["why"] else row for row, each in enumerate(left_out)],
        [each.tobytes() for each in clusters],
        near,
    )


def jaccard(one: Compared, other: Compared) -> float:
    first, second = (
        {(part, value) for part, values in enumerate((each.asked, each.said)) for value in values.tolist()}
        for each in shingles_of([one, other])
    )
    return len(first & second) / len(first | second)


def planted(lengths: tuple[int, ...], copies: int) -> list[Compared]:
    texts = [
        edited(base, round(length * share), seed * 100 + copy)
        for length in lengths
        for seed in range(6)
        for base in [words(length * 1000 + seed, length)]
        for copy, share in enumerate([0.0, *(0.01 * step for step in range(1, copies))])
    ]
    random.Random(3).shuffle(texts)
    return [Compared((), (" ".join(text),)) for text in texts]


@pytest.mark.parametrize("bucket_rows", [4, 2**19])
def test_what_is_near_is_found_as_if_every_row_were_compared_with_every_other(
    tmp_path: Path, bucket_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "BUCKET_ROWS", bucket_rows)
    rows = planted((30, 100, 400), 6) + planted((8, 15), 3)
    edges = {(i, j) for i, j in combinations(range(len(rows)), 2) if jaccard(rows[i], rows[j]) >= 0.8}
    assert len(edges) > 50
    kept, clusters, near = found_in(spooled(tmp_path / "s", rows))
    same = {(i, j) for i, j in combinations(range(len(rows)), 2) if clusters[i] == clusters[j]}
    expected = Connected(len(rows), edges)
    assert same == {(i, j) for i, j in combinations(range(len(rows)), 2) if expected.root(i) == expected.root(j)}
    dropped = [(row, of) for row, of in enumerate(kept) if row != of]
    assert all((min(pair), max(pair)) in edges for pair in dropped), "none in favour of one that it is no near copy of"
    going_on = [row for row, of in enumerate(kept) if row == of]
    assert not any((i, j) in edges for i, j in combinations(going_on, 2))
    assert all(kept[of] == of for _, of in dropped)
    assert near.copies == len(dropped)


class Connected:
    """Rows that are connected, told most simply."""

    def __init__(self, rows: int, edges: set[tuple[int, int]]) -> None:
        self._roots = list(range(rows))
        for one, other in sorted(edges):
            old, new = self._roots[other], self._roots[one]
            self._roots = [new if root == old else root for root in self._roots]

    def root(self, row: int) -> int:
        return self._roots[row]


def test_a_chain_is_one_cluster_of_which_only_near_copies_of_a_row_that_goes_on_are_dropped(tmp_path: Path) -> None:
    base = words(1, 300)
    chain = [[*base[step * 6 :], *words(2, 400)[: step * 6]] for step in range(30)]
    kept, clusters, near = found_in(spooled(tmp_path / "s", [Compared((), (" ".join(each),)) for each in chain]))
    assert len(set(clusters)) == 1
    assert near.told.groups == 1
    going_on = [row for row, of in enumerate(kept) if row == of]
    assert 3 < len(going_on) < 15


def test_many_rows_of_one_pattern_are_compared_with_few_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = words(1, 200)
    rows = [Compared((), (" ".join([*base, WORDS[seed]]),)) for seed in range(400)]
    compared_rows: list[int] = []
    alike = Sketched.are_alike

    def counted(self: Sketched, one: int, other: int) -> bool:
        compared_rows.append(one)
        return alike(self, one, other)

    monkeypatch.setattr(Sketched, "are_alike", counted)
    kept, clusters, _ = found_in(spooled(tmp_path / "s", rows))
    assert (len(set(kept)), len(set(clusters))) == (1, 1)
    assert len(compared_rows) < 3 * len(rows)


def test_of_a_long_row_a_bounded_part_is_kept_that_tells_nearly_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shingles, "MAX_SHINGLES", 500)
    monkeypatch.setattr(near_copies, "MAX_SHINGLES", 500)
    base = words(1, 20_000)
    rows = [Compared((), (" ".join(edited(base, edits, 1)),)) for edits in (0, 400, 2500)]
    folder = spooled(tmp_path / "s", rows)
    assert (folder / "shingles").stat().st_size == 3 * 500 * 4
    sketched = Sketched(folder, mapped(folder / "rows", ROW), 0.8)
    assert sketched.are_alike(0, 1)
    assert not sketched.are_alike(0, 2)


def test_clusters_are_held_out_whole_or_not_at_all_and_what_is_one_cluster_is_all_trained_on(tmp_path: Path) -> None:
    pairs = [
        Compared((), (" ".join(each),))
        for seed in range(60)
        for each in (words(seed, 60), edited(words(seed, 60), 1, seed))
    ]
    folder = spooled(tmp_path / "s", pairs)
    _, clusters, _ = found_in(folder)
    as_array = np.frombuffer(b"".join(clusters), dtype=CLUSTER)
    division = divide(folder, 0.1, clusters=as_array)
    held_out = np.concatenate([chunk.held_out for chunk in division.chunks()])
    assert division.held_out == held_out.sum() == 12
    assert {clusters[row] for row in np.flatnonzero(held_out)} & {
        clusters[row] for row in np.flatnonzero(~held_out)
    } == set()
    whole = divide(folder, 0.5, clusters=np.zeros(len(pairs), dtype=CLUSTER))
    assert (whole.held_out, whole.trained) == (0, 120)


def drops(found: Prepared, reason: str = "near_duplicate") -> dict[int, int]:
    chosen = [each for each in found.decisions if each["reason"] == reason]
    return {each["row"]: int(each["ref"].rpartition("#")[2]) for each in chosen}


def test_of_near_copies_the_longest_text_is_kept_for_pre_training(tmp_path: Path) -> None:
    base = words(1, 60)
    texts = [base, [*base, "and", "more"], words(2, 60), edited(base, 1, 1), [*base, "and", "more"]]
    put(tmp_path, a_jsonl=jsonl({"text": " ".join(each)} for each in texts))
    found = prepare_run(tmp_path, {**CPT, **NONE_HELD_OUT})
    accounted(found)
    assert drops(found) == {1: 2, 4: 2}
    assert drops(found, "duplicate") == {5: 2}
    told = found.report["duplicates"]["near"]
    assert (told["action"], told["similarity"], told["copies"], told["groups"], told["rows"]) == ("Drop", 0.8, 2, 1, 3)
    assert [place.rpartition("#")[2] for place in told["largest"][0]["first"]] == ["1", "2", "4"]
    (resolved,) = [each for each in found.plan.resolved if each.field == "preprocessing.deduplication.near"]
    assert resolved.value == "Drop"


def test_near_copies_of_conversations_are_reported_and_dropped_where_the_job_says_so(tmp_path: Path) -> None:
    question, answer = " ".join(words(1, 25)), " ".join(words(2, 25))
    rows = [
        chat(question, answer),
        chat(question, answer + " indeed"),
        chat(question, " ".join(words(3, 3))),  # the same long prompt, another answer
        chat(" ".join(words(4, 25)), answer),  # another prompt, the same answer
        {"messages": [{"role": "system", "content": " ".join(words(5, 50))}, *chat("hi", "ho")["messages"]]},
        {"messages": [{"role": "system", "content": " ".join(words(5, 50))}, *chat("who", "me")["messages"]]},
    ]
    put(tmp_path, a_jsonl=jsonl(rows))
    found = prepare_run(tmp_path, NONE_HELD_OUT)
    accounted(found)
    assert (found.report["duplicates"]["near"]["action"], found.report["duplicates"]["near"]["copies"]) == ("Report", 1)
    assert drops(found) == {}
    dropping = {"preprocessing": {"deduplication": {"near": "Drop"}}}
    found = prepare_run(tmp_path, {**NONE_HELD_OUT, **dropping}, attempt=2)
    accounted(found)
    assert drops(found) == {1: 2}


def test_pairs_of_prompts_that_say_nearly_the_same_are_of_one_cluster_whatever_row_they_stand_at(
    tmp_path: Path,
) -> None:
    """The one is made at its bad answer, the other at its good one, which both prompts have."""
    words = " ".join(f"w{at}" for at in range(24))
    one, other, good = f"{words} end", f"{words} last", " ".join(f"g{at}" for at in range(12))
    said = [
        (other, "bad one two three", False),
        (one, good, True),
        (other, good, True),
        (one, "worse four five six", False),
    ]
    rows = [{**chat(prompt, answer), "label": label} for prompt, answer, label in said]
    put(tmp_path, a_jsonl=jsonl(rows))
    found = prepare_run(tmp_path, {"method": {"type": "DPO"}, "evaluation": {"holdoutFraction": 0.5}})
    assert found.plan.train.examples == 2, "a cluster is held out whole or not at all"
    assert found.plan.held_out is None


def test_nothing_is_compared_where_near_copies_are_not_looked_for(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl({"text": " ".join([*words(1, 40), str(each)])} for each in range(5)))
    found = prepare_run(tmp_path, {**CPT, **NONE_HELD_OUT, "preprocessing": {"deduplication": {"near": "Off"}}})
    assert len(found.train) == 5
    assert "near" not in found.report["duplicates"]
    assert not (tmp_path / "work" / "1" / "spool" / "bands").stat().st_size


def many(folder: Path, count: int) -> Path:
    """A spool of short rows, some of which are near copies of one another, written at once."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    rows, sizes = np.zeros(count, dtype=ROW), np.zeros(count, dtype=SIZES)
    rows["hash_high"], rows["hash_low"] = generator.integers(0, 2**63, (2, count), dtype=np.uint64) * np.uint64(2)
    sizes["said"], sizes["size_bytes"] = 12, generator.integers(50, 60, count)
    bands = generator.integers(0, 2**63, (count, bands_for(0.8).bands), dtype=np.uint64)
    of_row = np.sort(generator.integers(0, 2**32, (count, 12), dtype=np.uint32), axis=1)
    copies = np.arange(0, count, 20)
    bands[copies + 7], of_row[copies + 7] = bands[copies], of_row[copies]
    for name, array in {"rows": rows, "sizes": sizes, "bands": bands, "shingles": of_row}.items():
        (folder / name).write_bytes(array.tobytes())
    return folder


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "BUCKET_ROWS", 2000)
    for module in (buckets, components, near_copies):
        monkeypatch.setattr(module, "CHUNK", 500)

    def found(folder: Path) -> None:
        rows = mapped(folder / "rows", ROW)
        left_out, clusters = (
            new_mapped(folder / name, dtype, len(rows)) for name, dtype in (("out", LEFT_OUT), ("clusters", CLUSTER))
        )
        every, sketched = Components(rows, folder / "components"), Sketched(folder, rows, 0.8)
        near = find_near_copies(folder, sketched, every, left_out, clusters, str, lambda: None)
        assert near.copies == len(rows) // 20

    peaks: list[int] = []
    for count in (5_000, 40_000):
        spool = many(tmp_path / str(count), count)
        tracemalloc.start()
        try:
            found(spool)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] < 2**20
