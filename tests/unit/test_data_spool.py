"""Held-out rows are chosen by content, and every row goes to exactly one place."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.data.spool import Division, Spool, divide, write_split
from finetune_trainer.data.tokens import Tokens


def spooled(folder: Path, contents: list[int], pieces: list[int] | None = None) -> Path:
    """Rows whose tokens are [content, 0, …]; equal contents are equal rows."""
    with Spool(folder) as spool:
        for number, content in enumerate(contents, 1):
            count = pieces[number - 1] if pieces else 1
            ids = np.array([content, *range(content % 3)], dtype=np.uint32)
            labels = np.ones(len(ids), dtype=np.uint8)
            digest = hashlib.blake2b(str(content).encode(), digest_size=16).digest()
            spool.append(digest, 0, number, [Tokens(ids, labels, 1)] * count)
    return folder


def first_tokens(folder: Path) -> list[int]:
    tokens, offsets = np.fromfile(folder / "tokens", dtype="<u4"), np.fromfile(folder / "offsets", dtype="<i8")
    return tokens[offsets[:-1]].tolist()


def written(folder: Path, division: Division, rows: np.ndarray, name: str) -> list[int]:
    found = write_split(folder, folder / name, division.sequences_of(rows), division.sequences["tokens"])
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
        (tmp_path / "one" / "sequences").write_bytes((tmp_path / "one" / "sequences").read_bytes() * rows)
        assert divide(tmp_path / "one", None).held_out.sum() == held_out
    else:
        assert divide(spooled(tmp_path / "few", list(range(rows))), None).held_out.sum() == held_out


def test_long_texts_count_as_many_rows_for_the_limit(tmp_path: Path) -> None:
    division = divide(spooled(tmp_path / "s", list(range(200)), [900] * 200), None)
    assert division.held_out.sum() == 2
