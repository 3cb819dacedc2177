"""The child process that decodes Parquet: a few bytes of such a file may become any amount of memory.

`python -m finetune_trainer.data.parquet_worker`, spoken to over stdin and stdout by `parquet`. A message is a letter
and what belongs to it: `i` the file's facts, `r` rows, `x` what is wrong with the file, `e` its end. A row is sent as
the line that it would be in a JSONL file, so that the same limits hold for it; one that cannot be such a line begins
with `!`, one of whose fields some cannot with `?`. Whatever takes more memory than MEMORY_BYTES ends the process.
"""

import math
import os
import resource
import sys
from collections.abc import Collection, Iterator, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import accumulate
from typing import Any, NamedTuple, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.row_words import MAX_LINE_BYTES
from finetune_trainer.data.field_names import shown
from finetune_trainer.data.frames import read_frame, write_frame
from finetune_trainer.data.parquet import BATCH_ROWS, MAX_FRAME_BYTES, MEMORY_BYTES, NO_MEMORY, READY
from finetune_trainer.data.problems import Broken, Problem
from finetune_trainer.data.texts import field_path

_MAX_NAMES = 1000
_BATCH_BYTES = 32 * 2**20  # of one batch, going by the mean row
_FRAME_BYTES = 2**20
_BUFFER_BYTES = 2**20
_MAX_NAME = 64  # characters; of a longer name nothing is told anyway
_SHOWN_NAMES = 64


class Odd(NamedTuple):
    """What JSON has not, and what to do about it."""

    what: str
    remedy: str

    def words(self, path: str = "") -> str:
        """Return it as what is wrong with a field, at a path inside it."""
        where = f" at {path}" if path else ""
        return f"holds {self.what}{where}, which JSON has not; {self.remedy}"


_AS_TEXT = "write it as a text"
_TIME = Odd("a time of nanoseconds, or before or after the years 1 to 9999", _AS_TEXT)
_ODD: dict[type | tuple[type, ...], Odd] = {
    bytes: Odd("bytes", "write them as a text"),
    Decimal: Odd("a decimal with more digits than its numbers keep", _AS_TEXT),
    timedelta: Odd("a duration", _AS_TEXT),
    (date, time): _TIME,
}
_OTHER = Odd("a value of a kind", _AS_TEXT)


class DamagedError(Exception):
    """What is wrong with a file, in words without its content."""


def messages(path: str, unread: Sequence[str], from_row: int, batch_rows: int) -> Iterator[bytes]:
    """Yield the messages about a file's rows, beginning after `from_row` of them.

    Columns of the names in `unread` are passed over. Raises DamagedError, what Arrow raises, MemoryError."""
    with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as parquet:
        names = parquet.schema_arrow.names
        columns = [name for name in names if name not in unread]
        if len(set(columns)) < len(columns):
            raise DamagedError("two columns have the same name")
        ends = _ends_of_groups(parquet.metadata)
        facts = {"rows": ends[-1], "names": [name[:_MAX_NAME] for name in names[:_MAX_NAMES]]}
        yield b"i" + orjson.dumps(facts)
        nameless = orjson.dumps({name[:_MAX_NAME]: None for name in names[:_SHOWN_NAMES]})
        # Every row of a file without such a field counts; one column shows how many there are.
        read = columns or [_smallest(parquet.metadata, names)] if names else []
        first = next((group for group, end in enumerate(ends[1:]) if end > from_row), len(ends) - 1)
        skip = from_row - ends[first]
        held: list[bytes] = []
        size = 0
        rows = ends[first]
        for batch in parquet.iter_batches(
            batch_size=min(batch_rows, rows_at_once(parquet.metadata)),
            row_groups=list(range(first, len(ends) - 1)),
            columns=read,
            use_threads=False,
        ):
            rows += batch.num_rows
            part = batch.slice(min(skip, batch.num_rows))
            skip -= batch.num_rows - part.num_rows
            for line in _lines(part) if columns else [nameless] * part.num_rows:
                held.append(line)
                size += len(line) + 1
                if size >= _FRAME_BYTES:
                    yield b"r" + b"\n".join(held)
                    held, size = [], 0
            if held:
                yield b"r" + b"\n".join(held)
                held, size = [], 0
        if rows != ends[-1]:
            raise DamagedError(f"its row groups count {ends[-1]} rows, their pages {rows}")
    yield b"e"


def _ends_of_groups(metadata: Any) -> list[int]:
    """Return how many rows come before each row group, and in all. Raises DamagedError where the footer says another
    number, or none that can be."""
    counts = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    if metadata.num_rows != sum(counts) or any(count < 0 for count in counts):
        raise DamagedError(f"its footer counts {metadata.num_rows} rows, its row groups {sum(counts)}")
    return [0, *accumulate(counts)]


def _smallest(metadata: Any, names: list[str]) -> str:
    """Return the column that takes the fewest bytes of the first row group."""
    if not metadata.num_row_groups:
        return names[0]
    group = metadata.row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    return min(columns, key=lambda column: column.total_compressed_size).path_in_schema.partition(".")[0]


def rows_at_once(metadata: Any) -> int:
    """Return how many rows to decode, so that a batch of long texts needs no more memory than one of short ones."""
    size_bytes = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    return max(1, min(BATCH_ROWS[0], _BATCH_BYTES * metadata.num_rows // max(1, size_bytes)))


def _lines(batch: Any) -> Iterator[bytes]:
    """Yield each row as a line of JSON, or what is wrong with it behind a `!`."""
    floats = [field.name for field in batch.schema if _has_floats(field.type)]
    for value in _values(batch):
        found = value if isinstance(value, Broken) else _line(value, floats)
        if isinstance(found, Broken):
            found = b"!" + orjson.dumps([found.problem.value, found.field, found.detail])
        yield found


def _values(batch: Any) -> Iterator[dict[str, Any] | Broken]:
    try:
        yield from batch.to_pylist(maps_as_pydicts="strict")
    except (ValueError, KeyError, OverflowError):
        for index in range(batch.num_rows):
            yield _value(batch.slice(index, 1))


def _value(row: Any) -> dict[str, Any] | Broken:
    """Return the value of a batch of one row."""
    value: dict[str, Any] = {}
    for name in row.schema.names:
        try:
            value |= row.select([name]).to_pylist(maps_as_pydicts="strict")[0]
        except UnicodeDecodeError:
            return Broken(Problem.INVALID_UTF8)
        except KeyError:  # of a map
            return Broken(Problem.REPEATED_FIELD)
        except (ValueError, OverflowError):  # of a year, or of nanoseconds
            return Broken(Problem.WRONG_TYPE, name[:_MAX_NAME], _TIME.words())
    return value


def _line(row: dict[str, Any], floats: Collection[str]) -> bytes | Broken:
    """Return a row as a line of JSON. floats: the columns that may have NaN and infinity, which JSON has not."""
    try:
        if not all(_is_finite(row[name]) for name in floats):
            raise orjson.JSONEncodeError("not a number of JSON")  # orjson would write null
        line = orjson.dumps(row, default=_number)
    except orjson.JSONEncodeError:
        odd = {name: _odd(value, name) for name, value in row.items()}
        sound = {name: value for name, value in row.items() if odd[name] is None}
        named = {name: [each.problem, each.detail] for name, each in odd.items() if each is not None}
        line = b"?" + orjson.dumps([named, sound], default=_number)
    return line if len(line) <= MAX_LINE_BYTES else Broken(Problem.LINE_TOO_LONG)


def _has_floats(kind: Any) -> bool:
    """Whether values of an Arrow type are floats, or hold some."""
    if pa.types.is_dictionary(kind):
        return _has_floats(kind.value_type)
    return pa.types.is_floating(kind) or any(_has_floats(kind.field(at).type) for at in range(kind.num_fields))


def _is_finite(value: Any) -> bool:
    """Whether a value holds no NaN and no infinity."""
    if isinstance(value, float):
        return math.isfinite(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return all(_is_finite(each) for each in inner)


def _number(value: object) -> float | int:
    """Return a decimal as JSON has it. Raises TypeError for what is none, or would become another number."""
    if not isinstance(value, Decimal):
        raise TypeError
    number = int(value) if value.as_tuple().exponent == 0 else float(value)
    if Decimal(repr(number)) != value:
        raise TypeError
    return number


def _odd(value: object, name: str) -> Broken | None:
    """Return why the value of a column cannot be JSON, and where in it; None where it can."""
    try:
        orjson.dumps(value, default=_number)
    except orjson.JSONEncodeError as error:
        if "ecursion" in str(error):
            return Broken(Problem.TOO_DEEP)
    else:
        if _is_finite(value):
            return None
    path, odd = next(_odd_values(value, ""), ("", _OTHER))
    return Broken(Problem.WRONG_TYPE, detail=odd.words(shown(name) + path if path else ""))


def _odd_values(value: object, path: str) -> Iterator[tuple[str, Odd]]:
    """Yield the path of each value that JSON has not, and what it is."""
    if isinstance(value, dict):
        for at, (name, each) in enumerate(cast(dict[object, Any], value).items()):
            yield from _odd_values(each, field_path(path, str(name), at))
    elif isinstance(value, list | tuple):
        for at, each in enumerate(cast(Sequence[Any], value)):
            yield from _odd_values(each, f"{path}[{at}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield path, Odd("NaN" if math.isnan(value) else "infinity", "write null")
    elif _is_odd(value):
        yield path, next((odd for kind, odd in _ODD.items() if isinstance(value, kind)), _OTHER)


def _is_odd(value: object) -> bool:
    try:
        orjson.dumps(value, default=_number)
    except orjson.JSONEncodeError:
        return True
    return False


def _answer(request: dict[str, Any]) -> None:
    try:
        for message in messages(**request):
            write_frame(sys.stdout.buffer, message)
        return
    except DamagedError as error:
        problem = str(error)
    except MemoryError:
        os._exit(NO_MEMORY)
    except (pa.ArrowException, OSError, ValueError, OverflowError, RecursionError, NotImplementedError) as error:
        # Arrow's own words can quote the file, so only the kind of error is told.
        problem = f"Parquet cannot be decoded ({type(error).__name__})"
    write_frame(sys.stdout.buffer, b"x" + problem.encode())


def main() -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    write_frame(sys.stdout.buffer, READY)
    while (request := read_frame(sys.stdin.buffer, MAX_FRAME_BYTES)) is not None:
        _answer(orjson.loads(request))
    return 0


if __name__ == "__main__":
    sys.exit(main())
