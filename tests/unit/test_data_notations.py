"""JSON in any layout, CSV and TSV become the same rows, numbered; what cannot be told ends the file with its place."""

import csv
import io
import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.row_words import MAX_LINE_BYTES
from finetune_trainer.data.file_kinds import Notation
from finetune_trainer.data.problems import Broken, Problem
from finetune_trainer.data.raw_rows import decode_row
from finetune_trainer.data.text_rows import text_rows

MIB = 2**20


def chunks(content: bytes, size: int) -> Iterator[bytes]:
    return (content[at : at + size] for at in range(0, len(content), size))


def rows(content: bytes, notation: Notation, size: int = MIB) -> list[tuple[int, Any]]:
    found = map(decode_row, text_rows(chunks(content, size), notation, "f"))
    return [(row.number, row.value.problem if isinstance(row.value, Broken) else row.value) for row in found]


A, B = {"a": '1]},"'}, {"a": [{"b": "\\"}], "c": {}}
BOTH = [(1, A), (2, B)]
LINES = "\n".join(map(json.dumps, (A, B))).encode()
PRETTY = [json.dumps(each, indent=2).encode() for each in (A, B)]
ANY_JSON = (Notation.LINES, Notation.JSON)


@pytest.mark.parametrize("size", [1, 7, MIB])
@pytest.mark.parametrize("notation", ANY_JSON)
@pytest.mark.parametrize(
    "content",
    [
        LINES,
        json.dumps([A, B]).encode(),
        json.dumps([A, B], indent=1).encode() + b"\r\n \n",
        b"\xef\xbb\xbf" + json.dumps([A, B], indent=1).encode(),
        b"[" + LINES.replace(b"\n", b",\n") + b"\n]",
        b"\n".join(PRETTY),
        PRETTY[0] + PRETTY[1],
        b"[" + LINES.replace(b"\n", b",\n") + b",]",
    ],
    ids=["lines", "list in a line", "list", "list with a BOM", "list, a row a line", "objects", "no gap", "last comma"],
)
def test_every_layout_of_json_gives_the_same_rows(content: bytes, notation: Notation, size: int) -> None:
    assert rows(content, notation, size) == BOTH


NOT_JSON, NOT_UTF8, TOO_LONG = Problem.NOT_JSON, Problem.INVALID_UTF8, Problem.LINE_TOO_LONG
LONG = b'"' + b"x" * (MAX_LINE_BYTES + 1) + b'"'


@pytest.mark.parametrize(
    ("content", "notation", "expected"),
    [
        (b"[]", Notation.JSON, []),
        (b"[1]\n[2]\n", Notation.LINES, [(1, [1]), (2, [2])]),
        (b'[{"a":1}, 5, "x", [2]]', Notation.JSON, [(1, {"a": 1}), (2, 5), (3, "x"), (4, [2])]),
        (b'[{"a": nope}, {"a":1}]', Notation.JSON, [(1, NOT_JSON), (2, {"a": 1})]),
        (b'[{"a":1} {"a":2}, {"a":3}]', Notation.JSON, [(1, NOT_JSON), (2, {"a": 3})]),
        (b'[{"a":"\xff"}, , {"a":1}]', Notation.JSON, [(1, NOT_UTF8), (2, NOT_JSON), (3, {"a": 1})]),
        (b'[{"a":"a\nb"}, {"a":1,"a":2}]', Notation.JSON, [(1, NOT_JSON), (2, Problem.REPEATED_FIELD)]),
        (b"[" + LONG + b', {"a":1}]', Notation.JSON, [(1, TOO_LONG), (2, {"a": 1})]),
        (b'{"a":' + LONG + b'}\n{"a":1}', Notation.LINES, [(1, TOO_LONG), (2, {"a": 1})]),
        (b'{"a":' + LONG + b'} {"a":1}', Notation.JSON, [(1, TOO_LONG), (2, {"a": 1})]),
        (b'{"a":1} no {"a":2} 7', Notation.JSON, [(1, {"a": 1}), (2, NOT_JSON), (3, 7)]),
        (b"[" + b"[" * 100 + b"]" * 100 + b",{}]", Notation.JSON, [(1, Problem.TOO_DEEP), (2, {})]),
        (b'{"a":\n{"a":1}\n', Notation.LINES, [(1, NOT_JSON), (2, {"a": 1})]),
        (b"7\n", Notation.JSON, [(1, 7)]),
    ],
)
def test_what_is_wrong_with_a_row_of_json_is_that_rows_alone(
    content: bytes, notation: Notation, expected: list[Any]
) -> None:
    assert rows(content, notation) == expected


@pytest.mark.parametrize(
    ("content", "row", "words"),
    [
        (b'[{"a":1},\n{"a":2}', 2, "cut off"),
        (b'[{"a":1},', 2, "cut off"),
        (b'[{"a":1}, {"a":"2}, {"a":3}]', 2, "cut off"),
        (b'[{"a":1}, {"a":[2}, {"a":3}]', 2, "a } closes what was not opened"),
        (b'[{"a":1}] {"a":2}', 2, "something follows the end of its list"),
        (b'{\n"a":1}\n]\n', 2, "a ] closes what was not opened"),
        (b'{\n"a":1}\n{"a":', 2, "cut off"),
        (b"[" + b"[" * 2**17, 1, "cut off"),
    ],
)
@pytest.mark.parametrize("size", [3, MIB])
def test_json_whose_rows_end_nobody_knows_where_ends_the_file_at_the_row(
    content: bytes, row: int, words: str, size: int
) -> None:
    if len(content) > 1000 and size < 1000:
        size = 2**14
    with pytest.raises(StageError, match=words) as caught:
        rows(content, Notation.JSON, size)
    assert (caught.value.fault, caught.value.args_by_name["row"]) == (Fault.BROKEN_FILE, row)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ROWS = st.dictionaries(st.text(max_size=5), VALUES)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=5), VALUES), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(1, 40),
)
def test_any_rows_are_read_from_any_layout_cut_anywhere(values: list[Any], indent: int, size: int) -> None:
    expected = list(enumerate(values, start=1))
    assert rows(json.dumps(values, indent=indent or None).encode(), Notation.JSON, size) == expected
    behind_another = " ".join(json.dumps(each, indent=indent or None) for each in values).encode()
    assert rows(behind_another, Notation.JSON, size) == expected


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(list(Notation)[:4]), st.integers(1, 50))
def test_any_bytes_give_rows_or_a_named_end(content: bytes, notation: Notation, size: int) -> None:
    begin = {Notation.CSV: b"a,b\n1,2\n", Notation.TSV: b"a\tb\n1\t2\n"}.get(notation, b'[{"a":1},')
    numbers: list[int] = []
    try:
        numbers = [number for number, _ in rows(begin + content, notation, size)]
    except StageError as error:
        if error.fault is not Fault.BROKEN_FILE:
            raise
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("size", [1, 5, MIB])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a,b\n1,2\n3,4", [(2, {"a": "1", "b": "2"}), (3, {"a": "3", "b": "4"})]),
        (b"\xef\xbb\xbfa,b\r\n1,2\r\n", [(2, {"a": "1", "b": "2"})]),
        (b'"a", b \n"x\r\ny ""z"", ",""\n', [(2, {"a": 'x\r\ny "z", ', "b": None})]),
        (b'a,b\n5" pipe,2\n', [(2, {"a": '5" pipe', "b": "2"})]),
        (b"\na,b\n\n1,2\n", [(4, {"a": "1", "b": "2"})]),
        (b"a,b\n1\n1,2,3\n1,2\n", [(2, Problem.RAGGED), (3, Problem.RAGGED), (4, {"a": "1", "b": "2"})]),
        (b"a,b\n\xff,2\n1,2\n", [(2, Problem.INVALID_UTF8), (3, {"a": "1", "b": "2"})]),
        (b"a,b\n", []),
        (b"", []),
    ],
)
def test_csv_has_a_header_and_texts_and_its_rows_are_numbered_as_a_spreadsheet_does(
    content: bytes, expected: list[Any], size: int
) -> None:
    assert rows(content, Notation.CSV, size) == expected
    if b'"' not in content:
        assert rows(content.replace(b",", b"\t"), Notation.TSV, size) == expected


@pytest.mark.parametrize(
    ("content", "row", "words"),
    [
        (b'a,b\n1,2\n"3,4\n5,6\n', 3, "a quote in it has no end"),
        (b'a,b\n1,2\n"3 "four" five",6\n', 3, "a quote within a quoted text is written twice"),
        (b'a,b\n1,2\n"' + b"3,4\n" * (MAX_LINE_BYTES // 4) + b'"', 3, "longer than 8 MiB, or a quote"),
        (b"a,b\n1,2\n" + b"3" * (MAX_LINE_BYTES + 9) + b",4\n", 3, "longer than 8 MiB, or a quote"),
        (b"a,b\r1,2\r3,4\r", 1, "a carriage return alone"),
        (b"a,a\n1,2\n", 1, "two columns of its header have the same name"),
        (b"text;id\n1;2\n", 1, "one column with a semicolon in its name"),
        (b"a,\xff\n1,2\n", 1, "its header is not UTF-8"),
        (b",".join(b"%d" % number for number in range(1001)) + b"\n", 1, "more than 1000 columns"),
    ],
)
def test_csv_that_cannot_be_read_on_ends_the_file_at_the_row(content: bytes, row: int, words: str) -> None:
    with pytest.raises(StageError, match=words) as caught:
        rows(content, Notation.CSV)
    assert (caught.value.fault, caught.value.args_by_name["row"]) == (Fault.BROKEN_FILE, row)


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS, st.just("x")), max_size=8), st.sampled_from([",", "\t"]), st.integers(1, 30))
def test_what_csv_writers_write_is_read(cells: list[tuple[str, ...]], delimiter: str, size: int) -> None:
    written = io.StringIO()
    csv.writer(written, delimiter=delimiter).writerows([("a", "b", "c"), *cells])
    notation = Notation.CSV if delimiter == "," else Notation.TSV
    expected = [{name: cell or None for name, cell in zip("abc", each, strict=True)} for each in cells]
    assert [value for _, value in rows(written.getvalue().encode(), notation, size)] == expected


@pytest.mark.parametrize("count", [200, 1600])  # 6 and 50 MiB
@pytest.mark.parametrize("notation", [Notation.LINES, Notation.JSON, Notation.CSV])
def test_what_is_held_does_not_grow_with_the_file(notation: Notation, count: int) -> None:
    text = "x" * 2**15

    def written() -> Iterator[bytes]:
        yield {Notation.JSON: b"[", Notation.CSV: b"text,id\n"}.get(notation, b"")
        for number in range(count):
            row = f'"{text}",{number}\n' if notation is Notation.CSV else json.dumps({"text": text, "id": number})
            yield row.encode() + {Notation.JSON: b",", Notation.LINES: b"\n"}.get(notation, b"")
        yield b"]" if notation is Notation.JSON else b""

    tracemalloc.start()
    try:
        assert sum(1 for _ in text_rows(written(), notation, "f")) == count
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_LINE_BYTES
    finally:
        tracemalloc.stop()
