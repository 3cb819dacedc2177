"""`make fuzz`: changed files through the readers of data, to see that no byte is lost without a word.

A small valid file of each notation, and of each kind of documents, is changed by a seeded generator and read as a job
reads it. Whatever it has become, it ends by a named reason or all of its rows are accounted for; nothing of its content
is in a message; time and memory stay bounded. A finding names seed and number, with which `changed` makes it again.
"""

import csv
import io
import itertools
import json
import random
import resource
import signal
import string
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_run import chat, gz, jsonl
from finetune_api.errors import StageError
from finetune_api.job import DatasetSpec, MethodType
from finetune_api.reasons import FAULTS
from finetune_api.run import StorageConfig
from finetune_trainer.data.accounts import Ledger
from finetune_trainer.data.bad_rows import BadRows
from finetune_trainer.data.documents.extractor import Extractors
from finetune_trainer.data.file_kinds import DocumentKind, document_of
from finetune_trainer.data.listing import find_files
from finetune_trainer.data.parquet import ParquetDecoder
from finetune_trainer.data.problems import LeftOut
from finetune_trainer.data.raw_rows import decode_row
from finetune_trainer.data.reading import checked_rows
from finetune_trainer.data.shapes import RowChoices
from finetune_trainer.store import open_store
from fuzzed_documents import PACKED, read_document, texts

SECRET = "zebra7f3a"  # in the texts of all rows, and in no message
MAX_SECONDS = 60  # for one small file, on however busy a machine
MAX_GROWTH_BYTES = 512 * 2**20  # of the process, over all files: its libraries and the largest row they may hold
_ROWS = 12
_MAX_FILE_BYTES = 2**16
_BYTES = b"\x00\xff\xfe\x80\x1f\"',\n\r\t{}[]\\:0-.eE \xc3"
_PIECES = (
    b'"', b'""', b"\n", b"\r\n", b"\r", b",", b"\t", b"[", b"]", b"{", b"}", b"null", b"NaN", b"1e999", b"-0",
    b"\\ud800", b"\\u0000", b"\\", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\x00", b"[" * 200, b'{"a":' * 80,
    b"9" * 5000, b" " * 3000, b"PAR1", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b'"messages":', b'"role":"assistant"',
    b"\xe2\x80\xa8", b"version https://git-lfs.github.com/spec/", b"<html>",
)  # fmt: skip


def rows() -> list[dict[str, Any]]:
    return [chat(f"what is {number}? {SECRET}", f"{SECRET} and {number}") for number in range(_ROWS)]


def _json_lines() -> bytes:
    return jsonl(rows())


def _json_list() -> bytes:
    return json.dumps(rows(), indent=1).encode()


def _separated(by: str) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=by)
    writer.writerow(["prompt", "completion", "weight"])
    writer.writerows([[f'{SECRET}, {number}\nor "so"', f" {SECRET} {number}", 1] for number in range(_ROWS)])
    return text.getvalue().encode()


def _parquet() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows()), stream, row_group_size=5)
    return stream.getvalue()


class Kind(NamedTuple):
    """A valid file. pack: what packs it; share: of the files that are made."""

    name: str
    content: Callable[[], bytes]
    pack: Callable[[bytes], bytes] | None = None
    share: int = 10


def _zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


KINDS = (
    Kind("a.jsonl", _json_lines, share=30),
    Kind("a.json", _json_list, share=20),
    Kind("a.csv", lambda: _separated(","), share=15),
    Kind("a.tsv", lambda: _separated("\t")),
    Kind("a.jsonl.gz", _json_lines, gz),
    Kind("a.csv.zst", lambda: _separated(","), _zstd),
    Kind("a.parquet", _parquet, share=5),
    *(Kind(name, make, PACKED.get(name), share=4) for name, make in texts(SECRET).items()),
)


class Changed(NamedTuple):
    """A changed file: its name and bytes, and those before they were packed where only these were changed."""

    name: str
    content: bytes
    unpacked: bytes | None


def changed(seed: int, number: int) -> Changed:
    """Return the file of that number."""
    chance = random.Random(f"{seed} {number}")
    (kind,) = chance.choices(KINDS, [each.share for each in KINDS])
    content = kind.content()
    inside = kind.pack is None or chance.random() < 0.5
    if kind.pack is not None and not inside:
        content = kind.pack(content)
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3, 8))):
        content = _change(content, chance)[:_MAX_FILE_BYTES]
    if kind.pack is not None and inside:
        return Changed(kind.name, kind.pack(content), content)
    return Changed(kind.name, content, content if kind.pack is None else None)


def _change(content: bytes, chance: random.Random) -> bytes:
    first = chance.randint(0, len(content))
    last = min(len(content), first + chance.choice((0, 1, 1, 2, 8, 64, 1000)))
    part = content[first:last]
    match chance.randrange(8):
        case 0 if part:
            return content[:first] + bytes([part[0] ^ 1 << chance.randrange(8)]) + content[first + 1 :]
        case 1:
            return content[:first] + bytes([chance.choice(_BYTES)]) + content[first + 1 :]
        case 2:
            return content[:first] + content[last:]
        case 3:
            return content[:last] + part * chance.choice((1, 2, 50)) + content[last:]
        case 4:
            return content[:first] + chance.choice(_PIECES) + content[first:]
        case 5:
            return content[:first]
        case 6:
            other = chance.randint(0, len(content))
            return content[:first] + content[other : other + len(part)] + content[last:]
        case _:
            return content[:first] + bytes(part[::-1]) + content[last:]


@dataclass(frozen=True)
class Outcome:
    """What became of a file. fault: what it ended with; else how many rows came, were used and dropped."""

    fault: str | None = None
    rows_in: int = 0
    used: int = 0
    dropped: int = 0


class Reader:
    """Reads one changed file after another, as a job reads its data, in a folder that it has for itself."""

    def __init__(self, folder: Path, parquet: ParquetDecoder, extractors: Extractors) -> None:
        self._parquet, self._extractors = parquet, extractors
        self._data, self._work = folder / "data", folder / "work"
        self._data.mkdir()
        self._work.mkdir()
        self._store = open_store(StorageConfig())

    def read(self, file: Changed) -> Outcome:
        """Raises AssertionError for what must not be, whatever the file is."""
        path = self._data / file.name
        path.write_bytes(file.content)
        decisions = self._work / "decisions.jsonl"
        try:
            if file.name.endswith(".parquet"):
                return self._table(path)
            if (kind := document_of(file.name)) is not None:
                return self._document(path, kind)
            with Ledger(decisions) as ledger:
                return self._rows(ledger, file)
        except StageError as error:
            require_words(error)
            return Outcome(error.fault.value)
        finally:
            path.unlink()
            assert SECRET.encode() not in (decisions.read_bytes() if decisions.exists() else b""), "data in decisions"

    def _rows(self, ledger: Ledger, file: Changed) -> Outcome:
        dataset = DatasetSpec(uri=self._data.as_uri() + "/")
        (inputs,) = find_files(self._store, [dataset], ledger)
        bad = BadRows(ledger, quarantine=True, max_broken_fraction=1.0)
        found = checked_rows(self._store, ledger, bad, inputs, None, MethodType.SFT, RowChoices(), self._work, [])
        numbers = [each.number for each in found]
        bad.check()
        (account,) = ledger.files
        outcome = Outcome(None, account.rows_in, len(numbers), account.dropped.total())
        assert outcome.rows_in == outcome.used + outcome.dropped, f"a row is lost: {outcome}"
        assert all(before < after for before, after in itertools.pairwise(numbers)), "numbers of rows go back"
        if file.unpacked is not None and ".jsonl" in file.name:
            _require_untouched(file.unpacked, outcome)
        return outcome

    def _document(self, path: Path, kind: DocumentKind) -> Outcome:
        found = read_document(path, kind, self._work / "rows", self._extractors, SECRET)
        return Outcome(found.drop.value) if isinstance(found, LeftOut) else Outcome(None, found, found)

    def _table(self, path: Path) -> Outcome:
        decoder = self._parquet
        decoded = [decode_row(row) for row in decoder.rows(path, path.as_uri())]
        assert [each.number for each in decoded] == list(range(1, len(decoded) + 1)), "numbers of rows have gaps"
        assert len(decoded) == decoder.facts.rows, "a row of the table is lost"
        return Outcome(None, len(decoded), len(decoded))


def _require_untouched(content: bytes, outcome: Outcome) -> None:
    """The rows that no change has touched are used, whatever stands between them."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    if not _is_object(content.lstrip().partition(b"\n")[0]):
        return  # the content says that it is something else than lines of rows
    whole = Counter(_json_lines().split(b"\n"))
    untouched = sum(1 for line in content.split(b"\n") if line and whole[line])
    lines = sum(1 for line in content.split(b"\n") if line.strip(b" \t\r\n\v\f"))
    assert outcome.used >= untouched, f"{untouched} rows are as they were, {outcome.used} are used"
    assert outcome.rows_in == lines, f"{lines} lines, {outcome.rows_in} rows"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def require_words(error: StageError) -> None:
    """The end is told in whole words, which hold nothing of the data."""
    text = FAULTS[error.fault]
    places = {name for _, name, _, _ in string.Formatter().parse(text.text) if name is not None}
    missing = places - error.args_by_name.keys() - text.unknown.keys()
    assert not missing, f"{error.fault} without {missing}"
    assert SECRET not in str(error), f"data in the words of {error.fault}"


@contextmanager
def _bounded(seconds: int) -> Generator[None]:
    """Raise TimeoutError in what takes longer."""

    def end(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"nothing came of it in {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(seed: int, count: int, tell: Callable[[int], None] = lambda _: None) -> Counter[str]:
    """Read so many changed files; returns how often each end came. What is raised has a note with seed and number."""
    ends: Counter[str] = Counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        ParquetDecoder(()) as parquet,
        closing(Extractors(1)) as extractors,
    ):
        reader = Reader(Path(folder), parquet, extractors)
        first_bytes = 0
        for number in range(count):
            file = changed(seed, number)
            try:
                with _bounded(MAX_SECONDS):
                    outcome = reader.read(file)
            except BaseException as error:
                error.add_note(f"seed {seed}, number {number}: {file.name}")
                raise
            ends[outcome.fault or ("broken rows" if outcome.dropped else "whole")] += 1
            peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            first_bytes = first_bytes or peak_bytes
            assert peak_bytes - first_bytes < MAX_GROWTH_BYTES, f"seed {seed}: memory grew until number {number}"
            tell(number)
    return ends


def main() -> None:
    """`python -m fuzzing COUNT [SEED]`: another seed each time, unless one is given."""
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() % 2**32
    print(f"seed {seed}", flush=True)

    def tell(number: int) -> None:
        if (number + 1) % 10_000 == 0:
            print(f"{number + 1:,} files", flush=True)

    for end, files in fuzz(seed, count, tell).most_common():
        print(f"{files:>9,} {end}")


if __name__ == "__main__":
    main()
