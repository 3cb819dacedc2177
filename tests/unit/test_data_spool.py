"""Held-out rows are chosen by content, and every row goes to exactly one place."""

import hashlib
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simple_rows
from finetune_trainer import batches
from finetune_trainer.data import buckets, report
from finetune_trainer.data import division as dividing
from finetune_trainer.data.accounts import FileAccount, Ledger
from finetune_trainer.data.division import Division, divide
from finetune_trainer.data.examples import TokenRun, one_segment, open_examples, tree_of
from finetune_trainer.data.lengths import lengths
from finetune_trainer.data.mapped import mapped
from finetune_trainer.data.splits import SPLITS, Written, write_split
from finetune_trainer.data.spool import CLUSTER, EXAMPLE, ROW, SEGMENT, Spool, prepared_bytes


def spooled(folder: Path, contents: list[int], pieces: list[int] | None = None) -> Path:
    """Rows whose tokens are [content, 0, …]; equal contents are equal rows."""
    with Spool(folder) as spool:
        for number, content in enumerate(contents, 1):
            count = pieces[number - 1] if pieces else 1
            ids = np.array([content, *range(content % 3)], dtype=np.uint32)
            labels = np.ones(len(ids), dtype=np.uint8)
            digest = hashlib.blake2b(str(content).encode(), digest_size=16).digest()
            spool.append(digest, 0, number, [one_segment(ids, labels)] * count)
    return folder


def of_rows(division: Division, name: str) -> np.ndarray:
    """(rows,) the property `name` of all chunks."""
    return np.concatenate([getattr(chunk, name) for chunk in division.chunks()])


def first_tokens(folder: Path) -> list[int]:
    examples = open_examples(folder)
    return [int(examples.read(each).tokens[0]) for each in examples.sequences_of(range(len(examples)))]


def written(folder: Path, division: Division, name: str) -> Written:
    found = write_split(folder, folder / name, division, name)
    for file, sha256 in found.sha256.items():
        assert sha256 == "sha256:" + hashlib.sha256((found.folder / file).read_bytes()).hexdigest()
    return found


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_row_is_trained_on_held_out_or_a_dropped_copy(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    contents = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=60))
    pieces = data.draw(st.lists(st.integers(1, 3), min_size=len(contents), max_size=len(contents)))
    fraction = data.draw(st.floats(0, 0.5))
    folder = spooled(tmp_path_factory.mktemp("s"), contents, pieces)
    division = divide(folder, fraction)
    train, held_out = of_rows(division, "train"), of_rows(division, "held_out")
    assert (train.astype(int) + held_out + of_rows(division, "dropped") == 1).all()
    held = [contents[i] for i in np.flatnonzero(held_out)]
    trained = [contents[i] for i in np.flatnonzero(train)]
    assert len(held) == len(set(held)) == min(round(fraction * len(set(contents))), len(set(contents)) - 1)
    assert not set(held) & set(trained)
    assert division.distinct == len(set(contents))
    expected = [content for i, content in enumerate(contents) if train[i] for _ in range(pieces[i])]
    assert first_tokens(written(folder, division, "train").folder) == expected


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_rows_are_divided_as_if_all_were_in_memory_however_small_buckets_and_chunks_are(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    contents = data.draw(st.lists(st.integers(0, data.draw(st.sampled_from([2, 30, 400]))), min_size=1, max_size=120))
    pieces = data.draw(st.lists(st.sampled_from([1, 1, 1, 2, 40]), min_size=len(contents), max_size=len(contents)))
    fraction = data.draw(st.none() | st.floats(0, 0.9))
    folder = spooled(tmp_path_factory.mktemp("s"), contents, pieces)
    expected = simple_rows.divide(folder, fraction)
    with pytest.MonkeyPatch.context() as patch, Ledger(folder / "decisions") as ledger:
        ledger.files = [FileAccount("a", 0, "")]
        patch.setattr(buckets, "BUCKET_ROWS", data.draw(st.sampled_from([1, 3, 16, 1000])))
        chunk = data.draw(st.sampled_from([1, 7, 1000]))
        patch.setattr(dividing, "CHUNK", chunk)
        patch.setattr(buckets, "CHUNK", chunk)
        found = divide(folder, fraction)
        assert found.distinct == expected.distinct
        assert (found.held_out, found.dropped) == (expected.held_out.sum(), expected.dropped.sum())
        for name in ("held_out", "dropped", "train"):
            assert of_rows(found, name).tolist() == getattr(expected, name).tolist()
        assert of_rows(found, "copies").tolist() == (expected.copy_of != np.arange(len(contents))).tolist()
        assert found.copy_of[expected.dropped].tolist() == expected.copy_of[expected.dropped].tolist()
        for name in SPLITS:
            split = written(folder, found, name)
            of_split = getattr(expected, name)
            assert {each: (split.folder / each).read_bytes() for each in split.sha256} == simple_rows.split_arrays(
                folder, expected, of_split
            )
            assert split.examples.tolist() == expected.examples[expected.examples_of(of_split)].tolist()
        told, simple = lengths(found, ledger), simple_rows.lengths(expected)
        assert [each["row"] - 1 for each in told["longest_rows"]] == simple["longest_rows"]
        assert (told["percentiles"], told["histogram"]) == (simple["percentiles"], simple["histogram"])


def test_a_label_of_each_example_is_written_where_rows_have_one_and_else_no_file(tmp_path: Path) -> None:
    ids, ones = np.arange(3, dtype=np.uint32), np.ones(3, dtype=np.uint8)
    for name, labels in (("thumbs", [1, -1, -1]), ("rows", [0, 0, 0])):
        with Spool(tmp_path / name) as spool:
            for number, label in enumerate(labels, 1):
                spool.append(bytes([number] * 16), 0, number, [one_segment(ids, ones)] * number, label=label)
        examples = open_examples(written(tmp_path / name, divide(tmp_path / name, 0.0), "train").folder)
        expected = np.repeat(labels, [1, 2, 3]).tolist() if any(labels) else None
        assert (examples.columns["label"].tolist() if "label" in examples.columns else None) == expected


def test_one_row_that_is_repeated_without_end_is_found_a_piece_of_its_bucket_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "BUCKET_ROWS", 8)
    folder = spooled(tmp_path / "s", [1] * 300 + list(range(60)))
    assert of_rows(divide(folder, 0.5), "dropped").tolist() == simple_rows.divide(folder, 0.5).dropped.tolist()
    assert not (folder / "hashes").exists(), "what they were told by takes no more disk"


def test_rows_of_one_cluster_are_never_both_trained_on_and_held_out(tmp_path: Path) -> None:
    contents = list(range(120))
    cluster_of = np.array(contents, dtype=np.uint64) // 3
    clusters = np.zeros(len(contents), dtype=CLUSTER)
    clusters["hash_high"] = cluster_of * np.uint64(0x9E3779B97F4A7C15)  # spread over the hashes
    found = divide(spooled(tmp_path / "s", contents), 0.2, clusters=clusters)
    assert (found.distinct, found.held_out, found.dropped, found.trained) == (120, 24, 0, 96)
    held_out, trained = ({*cluster_of[of_rows(found, name)].tolist()} for name in ("held_out", "train"))
    assert (len(held_out), held_out & trained) == (8, set())


def test_the_choice_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    contents = list(range(200))
    forward, backward = (spooled(tmp_path / name, order) for name, order in (("f", contents), ("b", contents[::-1])))
    one, other = divide(forward, None), divide(backward, None)
    assert one.held_out == 4
    assert {contents[i] for i in np.flatnonzero(of_rows(one, "held_out"))} == {
        contents[::-1][i] for i in np.flatnonzero(of_rows(other, "held_out"))
    }


@pytest.mark.parametrize(("rows", "held_out"), [(1, 0), (49, 0), (50, 1), (1000, 20), (150_000, 2000)])
def test_by_default_a_fiftieth_is_held_out_at_most_2000_rows_and_none_of_few(
    tmp_path: Path, rows: int, held_out: int
) -> None:
    if rows > 10_000:  # the count alone decides; writing so many rows one by one takes seconds
        record = np.fromfile(spooled(tmp_path / "one", [1]) / "rows", dtype=np.uint8).tobytes()
        many = np.frombuffer(bytearray(record * rows), dtype=ROW).copy()
        many["hash_low"] = np.arange(rows)
        (tmp_path / "one" / "rows").write_bytes(many.tobytes())
        (tmp_path / "one" / "examples").write_bytes((tmp_path / "one" / "examples").read_bytes() * rows)
        assert divide(tmp_path / "one", None).held_out == held_out
    else:
        assert divide(spooled(tmp_path / "few", list(range(rows))), None).held_out == held_out


def test_long_texts_count_as_many_rows_for_the_limit(tmp_path: Path) -> None:
    division = divide(spooled(tmp_path / "s", list(range(200)), [900] * 200), None)
    assert division.held_out == 2


def test_trees_are_divided_whole_and_keep_where_they_come_from(tmp_path: Path) -> None:
    def run(*tokens: int) -> TokenRun:
        return TokenRun(np.array(tokens, dtype=np.uint32), np.array([0, *[1] * (len(tokens) - 1)], dtype=np.uint8))

    trees = [tree_of([run(1, 2, 3), run(1, 2, 4, 5)]), tree_of([run(6, 7)]), tree_of([run(8, 9), run(8, 1), run(8)])]
    with Spool(tmp_path / "s") as spool:
        for number, tree in enumerate(trees):
            digest = bytes([number]) * 16
            spool.append(digest, 7 + number, 100 + number, [tree], prompt_tokens=1, weight=1 + number / 2)
    division = divide(tmp_path / "s", 0.4)  # the smallest hash is held out
    written = write_split(tmp_path / "s", tmp_path / "train", division, "train")
    found = open_examples(written.folder)
    assert [found.read(each).tokens.tolist() for each in found.sequences_of([0, 1])] == [[6, 7], [8, 9], [8, 1]]
    assert {name: column.tolist() for name, column in found.columns.items()} == {
        "file": [8, 9],
        "row": [101, 102],
        "weight": [1.5, 2.0],
    }
    size = sum((written.folder / name).stat().st_size for name in written.sha256)
    assert size <= prepared_bytes(division.examples[1:]) <= size + 64
    first = division.examples[0]
    assert (first["segments"], first["stored_tokens"], first["sequences"]) == (3, 5, 2)
    assert (first["tokens"], first["longest"], first["labels"]) == (7, 4, 4)


def many_rows(folder: Path, count: int) -> Path:
    """A spool of rows of two tokens, of which some say the same, written at once."""
    folder.mkdir()
    rows, examples = np.zeros(count, dtype=ROW), np.zeros(count, dtype=EXAMPLE)
    hashes = np.random.default_rng(0).integers(0, 2**63, count, dtype=np.uint64)
    rows["hash_high"] = np.where(hashes % 7, 2 * hashes, (hashes % 97) << np.uint64(50))
    rows["number"], rows["examples"], rows["weight"] = np.arange(1, count + 1), 1, 1
    for name, value in {
        "segments": 1,
        "stored_tokens": 2,
        "sequences": 1,
        "tokens": 2,
        "longest": 2,
        "labels": 1,
    }.items():
        examples[name] = value
    segments = np.zeros(count, dtype=SEGMENT)
    segments["length"] = 2
    tokens, labels = np.zeros(2 * count, dtype="<u4"), np.ones(2 * count, dtype="u1")
    arrays = {"rows": rows, "examples": examples, "segments": segments, "tokens": tokens, "labels": labels}
    for name, array in arrays.items():
        (folder / name).write_bytes(array.tobytes())
    return folder


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most memory that is allocated meanwhile; what is mapped from files is not."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "BUCKET_ROWS", 4000)
    monkeypatch.setattr(dividing, "CHUNK", 1000)
    for module in (batches, buckets, report):
        monkeypatch.setattr(module, "CHUNK", 1000)

    def divided(spool: Path) -> None:
        with Ledger(spool / "decisions") as ledger:
            ledger.files = [FileAccount("a", 0, "")]
            division = divide(spool, 0.3)
            for name in SPLITS:
                write_split(spool, spool / name, division, name)
            lengths(division, ledger)

    def planned(spool: Path, sizes: list[int], weights: list[float]) -> None:
        train = mapped(spool / "train" / "records", EXAMPLE)
        column = open_examples(spool / "train").columns["weight"]
        total, mix = 2 * len(train), batches.Mix([len(train) - sum(sizes), *sizes], weights)
        plan = batches.plan_batches(spool / "steps", train["tokens"], train["labels"], column, total, 4, 1, mix)
        report.shares(plan, mix, train)
        batches.distinct_examples(plan.examples, len(train))

    spools = [many_rows(tmp_path / str(count), count) for count in (20_000, 160_000)]
    few, many = (peak_bytes(lambda spool=spool: divided(spool)) for spool in spools)
    assert many < 1.5 * few < 2**20
    for sizes, weights in (([], [1.0]), ([5000], [1.5, 0.7])):
        few, many = (peak_bytes(lambda spool=spool: planned(spool, sizes, weights)) for spool in spools)  # noqa: B023
        assert (many - few) / 140_000 < batches.ORDER_BYTES, "the permutation, and whether one is read"
