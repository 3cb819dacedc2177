"""Held-out rows are chosen by content, and every row goes to exactly one place."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.data.examples import TokenRun, one_segment, open_examples, tree_of
from finetune_trainer.data.spool import Division, Spool, divide, prepared_bytes, write_split


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


def first_tokens(folder: Path) -> list[int]:
    examples = open_examples(folder)
    return [int(examples.read(each).tokens[0]) for each in examples.sequences_of(range(len(examples)))]


def written(folder: Path, division: Division, rows: np.ndarray, name: str) -> list[int]:
    found = write_split(folder, folder / name, division, rows)
    for file, sha256 in found.sha256.items():
        assert sha256 == "sha256:" + hashlib.sha256((found.folder / file).read_bytes()).hexdigest()
    return first_tokens(folder / name)


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
    assert (division.train.astype(int) + division.held_out + division.dropped == 1).all()
    held = [contents[i] for i in np.flatnonzero(division.held_out)]
    trained = [contents[i] for i in np.flatnonzero(division.train)]
    assert len(held) == len(set(held)) == min(round(fraction * len(set(contents))), len(set(contents)) - 1)
    assert not set(held) & set(trained)
    assert division.distinct == len(set(contents))
    expected = [content for i, content in enumerate(contents) if division.train[i] for _ in range(pieces[i])]
    assert written(folder, division, division.train, "train") == expected


def test_the_choice_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    contents = list(range(200))
    forward, backward = (spooled(tmp_path / name, order) for name, order in (("f", contents), ("b", contents[::-1])))
    one, other = divide(forward, None), divide(backward, None)
    assert one.held_out.sum() == 4
    assert {contents[i] for i in np.flatnonzero(one.held_out)} == {
        contents[::-1][i] for i in np.flatnonzero(other.held_out)
    }


@pytest.mark.parametrize(("rows", "held_out"), [(1, 0), (49, 0), (50, 1), (1000, 20), (150_000, 2000)])
def test_by_default_a_fiftieth_is_held_out_at_most_2000_rows_and_none_of_few(
    tmp_path: Path, rows: int, held_out: int
) -> None:
    if rows > 10_000:  # the count alone decides; writing so many rows one by one takes seconds
        record = np.fromfile(spooled(tmp_path / "one", [1]) / "rows", dtype=np.uint8).tobytes()
        many = np.frombuffer(bytearray(record * rows), dtype=divide(tmp_path / "one", None).rows.dtype).copy()
        many["hash_low"] = np.arange(rows)
        (tmp_path / "one" / "rows").write_bytes(many.tobytes())
        (tmp_path / "one" / "examples").write_bytes((tmp_path / "one" / "examples").read_bytes() * rows)
        assert divide(tmp_path / "one", None).held_out.sum() == held_out
    else:
        assert divide(spooled(tmp_path / "few", list(range(rows))), None).held_out.sum() == held_out


def test_long_texts_count_as_many_rows_for_the_limit(tmp_path: Path) -> None:
    division = divide(spooled(tmp_path / "s", list(range(200)), [900] * 200), None)
    assert division.held_out.sum() == 2


def test_trees_are_divided_whole_and_keep_where_they_come_from(tmp_path: Path) -> None:
    def run(*tokens: int) -> TokenRun:
        return TokenRun(np.array(tokens, dtype=np.uint32), np.array([0, *[1] * (len(tokens) - 1)], dtype=np.uint8))

    trees = [tree_of([run(1, 2, 3), run(1, 2, 4, 5)]), tree_of([run(6, 7)]), tree_of([run(8, 9), run(8, 1), run(8)])]
    with Spool(tmp_path / "s") as spool:
        for number, tree in enumerate(trees):
            digest = bytes([number]) * 16
            spool.append(digest, 7 + number, 100 + number, [tree], prompt_tokens=1, weight=1 + number / 2)
    division = divide(tmp_path / "s", 0.4)  # the smallest hash is held out
    written = write_split(tmp_path / "s", tmp_path / "train", division, division.train)
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
