"""Files become rows a bounded piece at a time; damage has a name and a row."""

import gzip
import json
import os
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.errors import StageError
from finetune_api.job import DatasetFormat
from finetune_api.reasons import Fault
from finetune_api.row_words import MAX_LINE_BYTES
from finetune_trainer.data.field_names import METADATA
from finetune_trainer.data.file_kinds import Notation, Packing
from finetune_trainer.data.files import Decoded, decode
from finetune_trainer.data.parquet import ParquetDecoder
from finetune_trainer.data.parquet_worker import rows_at_once
from finetune_trainer.data.problems import Broken, Problem
from finetune_trainer.data.raw_rows import decode_row
from finetune_trainer.data.shapes import RowChoices, read_row
from finetune_trainer.data.text_rows import text_rows
from finetune_trainer.data.unpacking import unpacked


def chunks(content: bytes, size: int = 7) -> Iterator[bytes]:
    return (content[i : i + size] for i in range(0, len(content), size))


def rows(content: bytes, size: int = 2**20) -> list[tuple[int, object]]:
    return [
        (item.number, item.value)
        for item in map(decode_row, text_rows(chunks(content, size), Notation.LINES, "f.jsonl"))
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a":1}\n{"a":2}', [(1, {"a": 1}), (2, {"a": 2})]),
        (b'{"a":1}\r\n{"a":2}\r\n', [(1, {"a": 1}), (2, {"a": 2})]),
        (b'\n  \n{"a":1}\n\n', [(3, {"a": 1})]),
        (b'\xef\xbb\xbf{"a":1}\n', [(1, {"a": 1})]),
        (b"", []),
    ],
)
@pytest.mark.parametrize("size", [4, 2**20])
def test_lines_are_numbered_and_blank_lines_are_no_rows(
    content: bytes, expected: list[tuple[int, object]], size: int
) -> None:
    assert rows(content, size) == expected


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", Problem.NOT_JSON),
        (b'{"a": NaN}', Problem.NOT_JSON),
        (b'{"a": "\x00"}', Problem.NOT_JSON),
        (b'{"a": "\xff"}', Problem.INVALID_UTF8),
        (b'{"a": "\\ud800"}', Problem.LONE_SURROGATE),
        (b"[" * 100 + b"]" * 100, Problem.TOO_DEEP),
        (b"[" * 5000 + b"]" * 5000, Problem.TOO_DEEP),
        (b'{"a": 1, "a": 1}', Problem.REPEATED_FIELD),
        (b'{"a":1,"t":"\\u0022:","a":2}', Problem.REPEATED_FIELD),
        (b'{"a":1,"t":"\\"\\u003a","a":2}', Problem.REPEATED_FIELD),
        (b'{"a"\t:1,"t":"\\":","a":2}', Problem.REPEATED_FIELD),
        (b'{"a":1,"t":"\\":","a":"\\":"}', Problem.REPEATED_FIELD),
        (b'{"messages": [{"role": "user", "content": "kept", "content" : "lost"}]}', Problem.REPEATED_FIELD),
        (b'{"a": ' + b"9" * 300 + b', "\\u0061": 1}', Problem.REPEATED_FIELD),
    ],
)
def test_a_line_that_cannot_be_decoded_is_told_by_name(line: bytes, problem: Problem) -> None:
    found = decode(line)
    assert isinstance(found, Broken)
    assert found.problem is problem


@pytest.mark.parametrize(
    "line", [b'{"text": "say \\"a\\": and \\"a\\":"}', b'{"a": {"b": 1}, "c": {"b": 1}}', b'[{"a": 1}, {"a": 1}]']
)
def test_a_key_in_a_text_or_in_another_object_is_not_repeated(line: bytes) -> None:
    assert decode(line) == json.loads(line)


def test_numbers_that_python_alone_takes_for_json_are_told() -> None:
    found = decode(b'{"score": NaN, "text": "a"}')
    assert isinstance(found, Broken)
    assert "column 11, where NaN or Infinity may stand, which are no JSON; write null" in found.words
    broken = decode(b'{"score": 1, "text": "a}')
    assert isinstance(broken, Broken)
    assert "NaN" not in broken.words


@pytest.mark.parametrize("number", [2**63, 2**64 - 1, -(2**63), 2**64, -(2**63) - 1, 10**30 + 1, 0.1234567890123456789])
def test_a_number_is_read_as_it_is_written(number: float) -> None:
    """orjson makes a float of a whole number beyond 64 bits (orjson#517)."""
    found = decode(json.dumps({"a": [number], "b": "1" * 30, "c": 1.5}).encode())
    assert found == {"a": [number], "b": "1" * 30, "c": 1.5}
    assert isinstance(found, dict)
    assert type(found["a"][0]) is type(number)


def test_many_brackets_are_not_deep() -> None:
    assert decode(b"[" + b"[]," * 200 + b"[]]") == [[]] * 201


def test_a_line_above_the_limit_is_one_broken_row_and_the_next_line_is_read() -> None:
    content = b'{"a":1}\n"' + b"x" * (2 * MAX_LINE_BYTES) + b'"\n{"a":2}\n'
    first, second, third = rows(content)
    assert (first, third) == ((1, {"a": 1}), (3, {"a": 2}))
    assert second == (2, Broken(Problem.LINE_TOO_LONG))


@contextmanager
def named_end() -> Generator[None]:
    """Nothing but BROKEN_FILE may be raised."""
    try:
        yield
    except StageError as error:
        if error.fault is not Fault.BROKEN_FILE:
            raise


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.integers(1, 50))
def test_any_bytes_give_rows_or_a_named_end(content: bytes, size: int) -> None:
    with named_end():
        numbers = [number for number, _ in rows(b'{"a":1}\n' + content, size)]
        assert numbers == sorted(set(numbers))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_damage_to_a_gzip_file_gives_rows_or_a_named_end(data: st.DataObject) -> None:
    content = bytearray(gzip.compress(b'{"a":1}\n' * 20))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with named_end():
        list(text_rows(unpacked(chunks(bytes(content)), Packing.GZIP, "f", 2**20), Notation.LINES, "f"))


@pytest.mark.parametrize("at", ["head", "middle", "check"])
def test_of_a_gzip_file_that_is_damaged_in_a_later_member_the_rows_before_are_read(at: str) -> None:
    members = [
        gzip.compress(b"".join(b'{"n":%d}\n' % n for n in range(begin, begin + 1000))) for begin in (0, 1000, 2000)
    ]
    place = {"head": 3, "middle": len(members[1]) // 2, "check": len(members[1]) - 6}[at]
    members[1] = members[1][:place] + bytes([members[1][place] ^ 0xFF]) + members[1][place + 1 :]
    found: list[int] = []
    cut_off = text_rows(unpacked(iter([b"".join(members)]), Packing.GZIP, "f", 2**20), Notation.LINES, "f")
    with pytest.raises(StageError, match="the gzip stream is damaged") as caught:
        found.extend(row.number for row in cut_off)
    assert found[:1000] == list(range(1, 1001))
    assert caught.value.args_by_name["row"] == found[-1] + 1 <= 2000


def decoded_by(decoder: ParquetDecoder, path: Path, file: str) -> Generator[Decoded]:
    return (decode_row(row) for row in decoder.rows(path, file))


@pytest.fixture(scope="module")
def decoder() -> Generator[ParquetDecoder]:
    with ParquetDecoder(METADATA) as opened:
        yield opened


def parquet(path: Path, table: Any) -> Path:
    pq.write_table(table, path)
    return path


def test_parquet_rows_have_all_fields_but_those_that_may_be_passed_over(
    decoder: ParquetDecoder, tmp_path: Path
) -> None:
    messages = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]] * 300
    table = pa.table({"messages": messages, "note": ["n"] * 300, "source": ["s"] * 300})
    found = list(decoded_by(decoder, parquet(tmp_path / "a.parquet", table), "a.parquet"))
    assert [item.number for item in found] == list(range(1, 301))
    assert found[-1].value == {"messages": messages[0], "note": "n"}


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_a_parquet_file_without_a_known_field_has_all_its_rows_with_the_fields_it_has(
    decoder: ParquetDecoder, tmp_path: Path, rows: int
) -> None:
    path = parquet(tmp_path / "a.parquet", pa.table({"source": pa.array(["q"] * rows, pa.string())}))
    found = list(decoded_by(decoder, path, "a.parquet"))
    assert [item.number for item in found] == list(range(1, rows + 1))
    assert all(item.value == {"source": None} for item in found)


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(decoder: ParquetDecoder, tmp_path: Path) -> None:
    table = pa.table([pa.array(["kept"]), pa.array(["lost"])], names=["text", "text"])
    with pytest.raises(StageError, match="two columns have the same name"):
        list(decoded_by(decoder, parquet(tmp_path / "a.parquet", table), "a.parquet"))


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_parquet_texts_of_every_arrow_type_are_texts(decoder: ParquetDecoder, tmp_path: Path, kind: Any) -> None:
    table = pa.table({"text": pa.array(["a", None, "b"], pa.string()).cast(kind)})
    found = [item.value for item in decoded_by(decoder, parquet(tmp_path / "a.parquet", table), "a")]
    assert found == [{"text": "a"}, {"text": None}, {"text": "b"}]


@pytest.mark.parametrize(("characters", "most"), [(10, 256), (2**20, 32), (2**25, 1)])
def test_long_parquet_rows_are_decoded_a_few_at_a_time(tmp_path: Path, characters: int, most: int) -> None:
    path = parquet(tmp_path / "a.parquet", pa.table({"text": [str(i) + "x" * characters for i in range(3)]}))
    with pq.ParquetFile(path) as opened:
        assert rows_at_once(opened.metadata) <= most


def test_rows_that_do_not_fit_into_memory_together_are_decoded_one_by_one(tmp_path: Path) -> None:
    text = "x" * (7 * 2**20)
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), pa.array([text]))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", compression="zstd")
    with ParquetDecoder(METADATA) as decoder:
        found = decoded_by(decoder, tmp_path / "a.parquet", "a.parquet")
        assert [next(found).value for _ in range(3)] == [{"text": text}] * 3
        found.close()
        assert [
            item.value for item in decoded_by(decoder, parquet(tmp_path / "b", pa.table({"text": ["b"]})), "b")
        ] == [{"text": "b"}], "the rest of the other file is not taken for this one"


def test_a_parquet_file_whose_pages_hold_fewer_rows_than_it_counts_is_refused(
    decoder: ParquetDecoder, tmp_path: Path
) -> None:
    path = parquet(tmp_path / "a.parquet", pa.table({"text": ["a"] * 97}))
    rows, more_rows = b"\x16\xc2\x01", b"\x16\xc4\x01"  # 97 and 98 in Thrift's compact protocol
    begin, of_file, *of_column, of_group = path.read_bytes().split(rows)
    path.write_bytes(begin + more_rows + of_file + rows + rows.join(of_column) + more_rows + of_group)
    with pytest.raises(StageError, match="its row groups count 98 rows, their pages 97"):
        list(decoded_by(decoder, path, "a.parquet"))


def test_a_parquet_file_with_a_row_group_of_less_than_nothing_is_refused(
    decoder: ParquetDecoder, tmp_path: Path
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"] * 1097}), path, row_group_size=1000, write_statistics=False)
    # In Thrift's compact protocol: 97 and -97, and what 1000 and either come to.
    rows, less, of_both, of_less = b"\x16\xc2\x01", b"\x16\xc1\x01", b"\x16\x92\x11", b"\x16\x8e\x0e"
    content = path.read_bytes()
    begin, _, end = content.rpartition(rows)
    assert content.count(of_both) == 1
    path.write_bytes((begin + less + end).replace(of_both, of_less))
    with pytest.raises(StageError, match="its footer counts 903 rows, its row groups 903"):
        list(decoded_by(decoder, path, "a.parquet"))


def test_of_very_many_columns_with_long_names_a_bounded_part_is_told(decoder: ParquetDecoder, tmp_path: Path) -> None:
    table = pa.table({f"{number}" + "n" * 100: ["a"] for number in range(1100)})
    assert len(list(decoded_by(decoder, parquet(tmp_path / "a.parquet", table), "a"))) == 1
    assert len(decoder.facts.names) == 1000
    assert max(map(len, decoder.facts.names)) == 64


def test_a_decoder_that_is_killed_from_outside_is_not_the_fault_of_the_file(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", pa.table({"text": [f"{i}" + "x" * 2**20 for i in range(50)]}))
    others = children()
    with ParquetDecoder(METADATA) as decoder:
        found = decoded_by(decoder, path, "a.parquet")
        next(found)
        (child,) = children() - others
        os.kill(int(child), signal.SIGKILL)
        with pytest.raises(MemoryError):
            list(found)


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="one processor alone shows nothing")
def test_the_memory_of_the_process_that_decodes_parquet_is_not_taken_by_threads_for_every_processor(
    tmp_path: Path,
) -> None:
    """Each thread of numpy's OpenBLAS takes 40 MiB of addresses: with 22 processors there would be none left."""
    path = parquet(tmp_path / "a.parquet", pa.table({"text": ["a"]}))
    all_processors = os.sched_getaffinity(0)
    threads: list[str] = []
    try:
        for processors in ({min(all_processors)}, all_processors):
            os.sched_setaffinity(0, processors)
            others = children()
            with ParquetDecoder(METADATA) as decoder:
                assert len(list(decoded_by(decoder, path, "a"))) == 1
                (child,) = children() - others
                status = Path(f"/proc/{child}/status").read_text().splitlines()
                threads += [line for line in status if line.startswith("Threads:")]
    finally:
        os.sched_setaffinity(0, all_processors)
    assert threads[0] == threads[1]


def test_a_parquet_string_that_is_not_utf8_is_one_broken_row(decoder: ParquetDecoder, tmp_path: Path) -> None:
    texts = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary()).cast(pa.string(), safe=False)
    found = [
        item.value for item in decoded_by(decoder, parquet(tmp_path / "a.parquet", pa.table({"text": texts})), "a")
    ]
    assert found == [{"text": "good"}, Broken(Problem.INVALID_UTF8), {"text": "fine"}]


def test_a_parquet_value_that_no_json_has_breaks_rows_that_need_its_field_alone(
    decoder: ParquetDecoder, tmp_path: Path
) -> None:
    messages = [
        {"role": "user", "content": "q", "image": b"\xff"},
        {"role": "assistant", "content": "a", "image": None},
    ]
    table = pa.table({"text": ["words"], "messages": [messages], "prompt": [b"q"], "completion": ["a"]})
    (found,) = decoded_by(decoder, parquet(tmp_path / "a.parquet", table), "a")
    odd = Broken(
        Problem.WRONG_TYPE, "messages", "holds bytes at messages[0].image, which JSON has not; write them as a text"
    )
    assert isinstance(found.value, dict)
    assert found.value["text"] == "words"
    assert read_row(found.value, DatasetFormat.MESSAGES, RowChoices()) == odd
    no_text = read_row(found.value, DatasetFormat.PROMPT_COMPLETION, RowChoices())
    assert no_text == Broken(odd.problem, "prompt", "holds bytes, which JSON has not; write them as a text")


def test_parquet_numbers_of_every_kind_are_numbers_and_those_that_json_has_not_break_their_field_alone(
    decoder: ParquetDecoder, tmp_path: Path
) -> None:
    decimals = pa.array([Decimal("0.5"), Decimal("2"), None], pa.decimal128(9, 3))
    floats = pa.array([0.5, float("nan"), float("inf")], pa.float32())
    table = pa.table({"decimal": decimals, "float": floats, "text": ["a", "b", "c"]})
    found = [item.value for item in decoded_by(decoder, parquet(tmp_path / "a.parquet", table), "a")]
    nan, infinity = (
        Broken(Problem.WRONG_TYPE, "float", f"holds {each}, which JSON has not; write null")
        for each in ("NaN", "infinity")
    )
    assert found == [
        {"decimal": 0.5, "float": 0.5, "text": "a"},
        {"decimal": 2.0, "float": nan, "text": "b"},
        {"decimal": None, "float": infinity, "text": "c"},
    ]


def test_a_parquet_map_is_an_object_and_one_that_names_a_key_twice_is_a_broken_row(
    decoder: ParquetDecoder, tmp_path: Path
) -> None:
    maps = pa.array([[("a", "x"), ("b", None)], [("a", "x"), ("a", "y")], []], pa.map_(pa.string(), pa.string()))
    found = [item.value for item in decoded_by(decoder, parquet(tmp_path / "a.parquet", pa.table({"m": maps})), "a")]
    assert found == [{"m": {"a": "x", "b": None}}, Broken(Problem.REPEATED_FIELD), {"m": {}}]


LONG = "holds a decimal with more digits than its numbers keep, which JSON has not; write it as a text"
OTHER_TIME = (
    "holds a time of nanoseconds, or before or after the years 1 to 9999, which JSON has not; write it as a text"
)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([Decimal("12345678901234567")], pa.decimal128(20, 0)), 12345678901234567),
        (pa.array([Decimal("1234567890123.45")], pa.decimal128(20, 2)), 1234567890123.45),
        (pa.array([Decimal("12345678901234567.89")], pa.decimal128(20, 2)), LONG),
        (pa.array([Decimal(10**30)], pa.decimal128(38, 0)), LONG),
        (pa.array([[1.5, None]]), [1.5, None]),
        (pa.array([[float("nan")]]), "holds NaN at n[0], which JSON has not; write null"),
        (
            pa.array([{"a": {"b": [{"c": float("inf")}]}}]),
            "holds infinity at n.a.b[0].c, which JSON has not; write null",
        ),
        (
            pa.array([[("a secret", float("nan"))]], pa.map_(pa.string(), pa.float64())),
            "holds NaN at n.#0, which JSON has not; write null",
        ),
        (pa.array([float("nan")]).dictionary_encode(), "holds NaN, which JSON has not; write null"),
        (pa.array([5], pa.duration("s")), "holds a duration, which JSON has not; write it as a text"),
        (pa.array([5], pa.timestamp("us")), "1970-01-01T00:00:00.000005"),
        (pa.array([5], pa.timestamp("ns")), OTHER_TIME),
        (pa.array([2**62], pa.timestamp("us")), OTHER_TIME),
    ],
)
def test_a_parquet_value_never_becomes_another_one_or_none_and_says_what_json_has_not(
    decoder: ParquetDecoder, tmp_path: Path, column: Any, expected: object
) -> None:
    (found,) = decoded_by(decoder, parquet(tmp_path / "a.parquet", pa.table({"n": column, "text": ["a"]})), "a")
    if isinstance(expected, str) and expected.startswith("holds "):
        expected = Broken(Problem.WRONG_TYPE, "n", expected)
    assert found.value in ({"n": expected, "text": "a"}, expected)


def test_a_parquet_string_above_the_limit_is_one_broken_row(decoder: ParquetDecoder, tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "x" * (MAX_LINE_BYTES + 1)]})
    short, long = decoded_by(decoder, parquet(tmp_path / "a.parquet", table), "a")
    assert (short.value, long.value) == ({"text": "a"}, Broken(Problem.LINE_TOO_LONG))
    assert long.size_bytes == MAX_LINE_BYTES, "it counts against what a file may unpack to"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_to_a_parquet_file_gives_rows_or_a_named_end(
    decoder: ParquetDecoder, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = parquet(tmp_path_factory.mktemp("p") / "a.parquet", pa.table({"text": ["some words"] * 50}))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    with named_end():
        list(decoded_by(decoder, path, "a.parquet"))


class Pairs(list[tuple[str, Any]]):
    """The fields of an object as they are written, of which some may be repeated."""


KEYS = st.sampled_from(["a", "b", '"', '"":', "é", "a:"])
TREES = st.recursive(
    st.text('"\\:,{}[]a \n', max_size=6) | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(KEYS, inner), max_size=3).map(Pairs),
    max_leaves=12,
)


def written(value: Any, quote: str, colon: str) -> str:
    if isinstance(value, Pairs):
        fields = (written(name, quote, colon) + colon + written(each, quote, colon) for name, each in value)
        return "{" + ", ".join(fields) + "}"
    if isinstance(value, list):
        return "[" + ",".join(written(each, quote, colon) for each in cast(list[Any], value)) + "]"
    if isinstance(value, str):
        return f'"{quote.join(json.dumps(part, ensure_ascii=False)[1:-1] for part in value.split(chr(34)))}"'
    return json.dumps(value)


@given(tree=TREES, quote=st.sampled_from(['\\"', "\\u0022"]), colon=st.sampled_from([": ", ":", " :", "\t: "]))
def test_what_is_read_is_what_python_reads_or_has_a_repeated_key(tree: Any, quote: str, colon: str) -> None:
    line = written(tree, quote, colon).encode()
    repeats: list[bool] = []
    json.loads(line, object_pairs_hook=lambda pairs: repeats.append(len(dict(pairs)) < len(pairs)))
    found = decode(line)
    assert found == (Broken(Problem.REPEATED_FIELD) if any(repeats) else json.loads(line))
