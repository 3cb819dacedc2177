"""Data and templates that become larger than they are, or never end: a named end, within bounded memory."""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data_run
from attacked import Case, Seen, attack
from finetune_api.reasons import Fault

MIB = 2**20
PEAK_BYTES = 700 * MIB  # of the stage itself: a few rows in hand, their copies and their tokens
CHILD_PEAK_BYTES = 1100 * MIB  # of the largest of its children
CANARY = "sesame of the rows"

TEXTS = {"method": {"type": "CPT"}, "datasets": [{"format": "Text"}]}
PUT_ASIDE = {"preprocessing": {"onBadRow": "Quarantine", "maxBrokenFraction": 0.05}}


def _write(folder: Path, table: Any, **options: Any) -> None:
    pq.write_table(table, folder / "a.parquet", compression="zstd", **options)
    assert (folder / "a.parquet").stat().st_size < 2**16


def _large_dictionary(folder: Path, text_bytes: int, rows: int) -> None:
    """One text in the dictionary, and every row points to it."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x " * (text_bytes // 2)]))
    _write(folder, pa.table({"text": texts}))


def _one_huge_cell(folder: Path) -> None:
    size = 300 * MIB
    offsets = pa.array([0, size], pa.int32()).buffers()[1]
    text = pa.StringArray.from_buffers(1, offsets, pa.py_buffer(bytes(size)))
    _write(folder, pa.table({"text": text}), use_dictionary=False)


def _list_of_nulls(folder: Path) -> None:
    """One row whose messages are eight million nulls, a few bytes each of levels."""
    count = 8_000_000
    nulls = pa.nulls(count, pa.struct([("role", pa.string()), ("content", pa.string())]))
    _write(folder, pa.table({"messages": pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), nulls)}))


def _deep_schema(folder: Path) -> None:
    column: Any = pa.array(["x"])
    for _ in range(3000):
        column = pa.StructArray.from_arrays([column], ["a"])
    pq.write_table(pa.table({"messages": column}), folder / "a.parquet", store_schema=False)


def _varint(number: int) -> bytes:
    """A number in Thrift's compact protocol: zigzag, seven bits a byte."""
    number *= 2
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _claim(folder: Path, row_groups: int) -> None:
    """A footer that claims 2^62 rows in all, and as many in each row group, of which not one has a page."""
    rows = _varint(2**62)
    root = b"\x48\x01r\x15" + _varint(1) + b"\x00"
    column = b"\x15" + _varint(1) + b"\x25" + _varint(1) + b"\x18\x01x\x00"
    # A column chunk: its offset and, of its metadata, type, encodings, path, codec, values, sizes, first page.
    meta = b"\x15\x02\x19\x15\x00\x19\x18\x01x\x15\x00\x16" + rows + b"\x16\x02\x16\x02\x26\x08\x00"
    group = b"\x19\x1c\x26\x08\x1c" + meta + b"\x00\x16\x02\x16" + rows + b"\x00"
    footer = b"\x15\x02\x19\x2c" + root + column + b"\x16" + rows
    footer += b"\x19" + bytes([row_groups << 4 | 12]) + group * row_groups + b"\x00"
    (folder / "a.parquet").write_bytes(b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1")


def _endless_nulls(folder: Path) -> None:
    """Rows that a few bytes of run lengths really hold, without one value."""
    _write(folder, pa.table({"text": pa.nulls(1_900_000, pa.string())}), row_group_size=1_900_000)


def _dense_lines(folder: Path) -> None:
    """Lines below the limit, of nothing but brackets: each becomes millions of objects."""
    line = b'{"text": "t", "more": [' + b'{"":0},' * (8 * MIB // 7 - 10) + b"0]}\n"
    (folder / "a.jsonl").write_bytes(line)


def _endless_line(folder: Path) -> None:
    """Half a GiB of one line in a few kilobytes."""
    (folder / "a.jsonl.zst").write_bytes(pa.compress(b"x" * 2**26, "zstd", asbytes=True) * 8)


def _deep_list(folder: Path) -> None:
    (folder / "a.json").write_bytes(b"[" * 2**19)


def _open_quote(folder: Path) -> None:
    """A quote in the first row makes one text of all that follow."""
    (folder / "a.csv").write_bytes(b'text,id\n"words,1\n' + b"words,2\n" * 2**21)


def _broken_lines(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(b"1234567890\n" * 200_000)


def _chats(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(data_run.jsonl([data_run.chat(CANARY, "a"), *data_run.chats(199)]))


def _parquet_chats(folder: Path) -> None:
    pq.write_table(pa.table({"messages": [row["messages"] for row in data_run.chats(50)]}), folder / "a.parquet")


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What is written, how the stage is asked to read it, and how it must end."""

    write: Callable[[Path], None]
    spec: dict[str, Any] = field(default_factory=dict[str, Any])
    template: str | None = None
    limits: dict[str, float] = field(default_factory=dict[str, float])
    deadline_s: float | None = None
    hangs: str | None = None
    fault: Fault
    words: tuple[str, ...]


DATA = "finetune_trainer.data."
ATTACKS = {
    "dictionary of a text above the limit": Attack(
        write=lambda folder: _large_dictionary(folder, 30 * MIB, 26),
        spec=TEXTS,
        fault=Fault.BROKEN_FILE,
        words=("a.parquet", "unpacks to more than 1000 times its size"),
    ),
    "dictionary of a text below the limit": Attack(
        write=lambda folder: _large_dictionary(folder, 2 * MIB, 20_000),
        spec=TEXTS,
        limits={DATA + "parquet.MIN_RATIO_BYTES": 8 * MIB},
        fault=Fault.BROKEN_FILE,
        words=("a.parquet", "unpacks to more than 1000 times its size"),
    ),
    "one huge cell": Attack(
        write=_one_huge_cell, spec=TEXTS, fault=Fault.BROKEN_FILE, words=("from row 1 on", "1024 MiB of memory")
    ),
    "a list of nulls": Attack(
        write=_list_of_nulls, fault=Fault.BROKEN_FILE, words=("from row 1 on", "1024 MiB of memory")
    ),
    "a deep schema": Attack(write=_deep_schema, fault=Fault.BROKEN_FILE, words=("a.parquet", "from row 1 on")),
    "rows in no row group": Attack(
        write=lambda folder: _claim(folder, 0),
        spec=TEXTS | PUT_ASIDE,
        fault=Fault.BROKEN_FILE,
        words=("a.parquet", "its footer counts 4611686018427387904 rows, its row groups 0"),
    ),
    "rows that no page holds": Attack(
        write=lambda folder: _claim(folder, 1),
        spec=TEXTS | PUT_ASIDE,
        fault=Fault.BROKEN_FILE,
        words=("a.parquet", "from row 1 on"),
    ),
    "endless rows of nothing": Attack(
        write=_endless_nulls,
        spec=TEXTS | PUT_ASIDE,
        fault=Fault.BROKEN_ROW,
        words=("a.parquet row 1", "field text", "is missing", "of 96000 rows"),
    ),
    "lines of brackets": Attack(
        write=_dense_lines,
        spec=TEXTS,
        fault=Fault.BROKEN_ROW,
        words=("a.jsonl row 1", "more than 500,000 values of JSON"),
    ),
    "a line of half a GiB": Attack(
        write=_endless_line,
        spec=TEXTS,
        fault=Fault.BROKEN_ROW,
        words=("a.jsonl.zst row 1", "longer than 8 MiB", "of 1 row"),
    ),
    "a file that unpacks to more than is allowed": Attack(
        write=_endless_line,
        spec=TEXTS | PUT_ASIDE,
        limits={DATA + "reading.MAX_UNPACKED_BYTES": 2**28},
        fault=Fault.BROKEN_FILE,
        words=("a.jsonl.zst", "from row 1 on", "unpacks to more than 0.25 GiB"),
    ),
    "a list in a list in a list": Attack(
        write=_deep_list, spec=TEXTS | PUT_ASIDE, fault=Fault.BROKEN_FILE, words=("a.json", "from row 1 on", "cut off")
    ),
    "a quote that has no end": Attack(
        write=_open_quote,
        spec=TEXTS | PUT_ASIDE,
        fault=Fault.BROKEN_FILE,
        words=("a.csv", "from row 2 on", "longer than 8 MiB, or a quote in it has no end"),
    ),
    "broken rows beyond hope": Attack(
        write=_broken_lines,
        spec=TEXTS | PUT_ASIDE,
        fault=Fault.BROKEN_ROW,
        words=("a.jsonl row 1", "is not a JSON object", "of 10000 rows"),
    ),
    "a template of megabytes for each row": Attack(
        write=_chats,
        template="{{ 'x' * 30000000 }}" + data_run.CHATML,
        fault=Fault.TEMPLATE_FAILED,
        words=("a.jsonl row 1", "it makes more than 10 Mi characters of the row"),
    ),
    "a template of a megabyte for each row": Attack(
        write=_chats,
        template="{{ ('x' * 1023 + ' ') * 1024 }}" + data_run.CHATML,
        limits={DATA + "renderer.BASE_TEXT": 3 * MIB},
        fault=Fault.TEMPLATE_INVALID,
        words=("whatever the rows are", "characters of", "of each"),
    ),
    "a template that takes its time with each row": Attack(
        write=_chats,
        template="{% for i in range(99999) %}{% for j in range(5) %}{% endfor %}{% endfor %}" + data_run.CHATML,
        limits={DATA + "renderer.BASE_CPU_S": 0.5},
        fault=Fault.TEMPLATE_INVALID,
        words=("whatever the rows are", "s of CPU for"),
    ),
    "a template whose comment lists what rows may say": Attack(
        write=_chats,
        template="{# " + CANARY + " #}{{ raise_exception(messages[0].content) }}",
        fault=Fault.TEMPLATE_FAILED,
        words=("a.jsonl row 1: TemplateError",),
    ),
    "a decoder that hangs": Attack(
        write=_parquet_chats,
        hangs="parquet_worker",
        deadline_s=300,
        fault=Fault.NO_PROGRESS,
        words=("no row and no part of a file", "doing: Reading", "recovery.progressDeadlineSeconds"),
    ),
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    cases: list[Case] = []
    for number, each in enumerate(ATTACKS.values()):
        folder = tmp_path_factory.mktemp(f"attack{number}")
        (folder / "data").mkdir()
        each.write(folder / "data")
        datasets = [{"uri": (folder / "data").as_uri() + "/", **asked} for asked in each.spec.get("datasets", [{}])]
        spec = {**each.spec, "datasets": datasets}
        cases.append(Case(str(folder), spec, each.template, each.limits, each.deadline_s, each.hangs))
    return dict(zip(ATTACKS, attack(cases), strict=True))


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_ends_by_name_in_bounded_memory(name: str, seen: dict[str, Seen]) -> None:
    expected, found = ATTACKS[name], seen[name]
    assert found.fault == expected.fault, found.words
    assert all(word in found.words for word in expected.words), found.words
    assert CANARY not in found.words
    assert found.peak_bytes < PEAK_BYTES
    assert found.child_peak_bytes < CHILD_PEAK_BYTES
