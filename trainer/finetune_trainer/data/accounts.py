"""Every row's fate: counts per file, and a decision for each row that does not go straight through. No content.

A decision is a line of decisions.jsonl: {file, row, stage, action, reason, ref?, detail?, words?, shape?}. detail is
the path of a field, words are what is wrong there, shape is how a broken row looks without what it says, and ref is the
row that this one is a copy of, as FILE#ROW.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import orjson

from finetune_api.status import DroppedRows
from finetune_trainer.data.decided import MAX_PLACES, Decided
from finetune_trainer.data.licenses import RowLicense
from finetune_trainer.data.unknown_words import TokenCount

MAX_DECISIONS_BYTES = 256 * 2**20  # of decisions.jsonl: about two million rows
MAX_CHANGES_BYTES = 64 * 2**20  # of them, so that changes of all rows leave room for those that are left out
_LEAST_ROW_BYTES = len('{"text":"a"}')
_BEAT_ROWS = 256
_MAX_REASONS = 10
_MAX_IGNORED_FIELDS = 500  # all names of facts about rows are fewer, so that none depends on which row is read first
_MAX_FIELD_NAME = 32
_CHANGED = b'"action":"change"'  # in a line of decisions; within a text its quotes would be written otherwise


def most_first(counts: Mapping[str, int]) -> dict[str, int]:
    """Return counts by name, the highest first, equal ones by name."""
    return dict(sorted(counts.items(), key=lambda each: (-each[1], each[0])))


class RowPlace(NamedTuple):
    """Where a row is: the index of its file, and its number there."""

    file: int
    number: int


class FieldPlace(NamedTuple):
    """Where something is in a row: the index of its file, its number there, and the path of the field."""

    file: int
    number: int
    field: str


Places = dict[str, list[FieldPlace]]  # the first few of each thing, by its name


@dataclass
class StageAccount:
    """Rows of one file at one stage. rows_in = rows_out + dropped; a row that is split goes out as one."""

    rows_in: int = 0
    rows_out: int = 0
    dropped: int = 0

    def add(self, other: "StageAccount") -> None:
        """Add what was counted of other rows of the file."""
        self.rows_in += other.rows_in
        self.rows_out += other.rows_out
        self.dropped += other.dropped


@dataclass(kw_only=True)
class FileRows:
    """What was counted of some rows of one file. bytes_in: of the rows, at least; dropped: rows by reason; tokens: of
    the rows that were not; licenses, left_licenses: rows by their own licence that were taken, and left out by it."""

    rows_in: int
    bytes_in: int
    dropped: dict[str, int]
    stages: dict[str, StageAccount]
    tokens: TokenCount
    licenses: dict[str, int]
    left_licenses: dict[str, int]


@dataclass
class FileAccount:
    """Rows of one file. rows_in = used + held_out + the sum of dropped.

    most_bytes: what its rows cannot come to more than, unpacked; most_rows: how many it has, where that is known;
    is_table: whether its columns fill in nulls for what a row does not have."""

    uri: str
    size_bytes: int
    etag: str
    most_bytes: int = 0
    most_rows: int | None = None
    is_table: bool = False
    bytes_in: int = 0  # of the rows that were read, at least
    sha256: str | None = None
    rows_in: int = 0
    used: int = 0
    held_out: int = 0
    dropped: Counter[str] = field(default_factory=Counter[str])
    stages: defaultdict[str, StageAccount] = field(default_factory=lambda: defaultdict(StageAccount))
    tokens: TokenCount = field(default_factory=TokenCount)
    licenses: Counter[str] = field(default_factory=Counter[str])  # rows that were taken, by their own licence
    left_licenses: Counter[str] = field(default_factory=Counter[str])  # and those that were left out by it

    @property
    def rows(self) -> FileRows:
        """What was counted of its rows so far."""
        return FileRows(
            rows_in=self.rows_in,
            bytes_in=self.bytes_in,
            dropped=dict(self.dropped),
            stages=dict(self.stages),
            tokens=self.tokens,
            licenses=dict(self.licenses),
            left_licenses=dict(self.left_licenses),
        )

    @property
    def most_rows_by_size(self) -> int:
        """How many rows a file can have at most of which nothing was read."""
        return self.most_bytes // _LEAST_ROW_BYTES

    @property
    def most_good_rows_to_come(self) -> int:
        """How many of the rows that are not read yet can be good at most."""
        by_size = max(0, self.most_bytes - self.bytes_in) // _LEAST_ROW_BYTES
        return by_size if self.most_rows is None else min(by_size, max(0, self.most_rows - self.rows_in))

    def check(self) -> None:
        """Raises AssertionError when a row was lost: a bug of ours that must not reach training."""
        accounted = self.used + self.held_out + self.dropped.total()
        if accounted != self.rows_in:
            raise AssertionError(f"{self.rows_in} rows read, {accounted} accounted for")
        for name, stage in self.stages.items():
            counted = stage.rows_in or stage.rows_out  # what drops rows besides the stages counts no others
            if counted and stage.rows_in != stage.rows_out + stage.dropped:
                told = f"{stage.rows_out} passed on and {stage.dropped} dropped"
                raise AssertionError(f"{stage.rows_in} rows came to stage {name}, {told}")


class Action(StrEnum):
    """What was done to a row. Those that are changed or split go on, all others end."""

    DROP = "drop"
    CHANGE = "change"
    SPLIT = "split"
    HOLD_OUT = "hold_out"


class Ledger:
    """Writes decisions.jsonl and keeps the counts.

    on_rows: called with the number of rows read, every few hundred of them."""

    def __init__(self, path: Path, on_rows: Callable[[int], None] = lambda _: None) -> None:
        self.files: list[FileAccount] = []
        self.rows_read = 0
        self.file_read = 0  # of the last row
        self.ignored_fields: Counter[str] = Counter()  # rows by the field they have and nobody reads
        self.changes: Counter[str] = Counter()  # rows by what was done to them so that they can be learned
        self.counted: defaultdict[str, Counter[str]] = defaultdict(Counter)  # by stage, whatever it tells of its rows
        self.places: defaultdict[str, Places] = defaultdict(dict)  # by stage, where examples of what it counted are
        self.decided = Decided()
        self._decisions = path.open("wb")
        self._written_bytes = self._changes_bytes = 0
        self._unlisted: Counter[str] = Counter()
        self._on_rows = on_rows

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()
        self._decisions.close()

    @property
    def decisions_bytes(self) -> int:
        """Return how large decisions.jsonl is, but for its last line."""
        return self._written_bytes

    def drop(
        self,
        file: int,
        number: int,
        stage: str,
        reason: str,
        detail: str = "",
        ref: str = "",
        *,
        words: str = "",
        shape: str = "",
    ) -> None:
        """Row `number` of a file is left out. words, shape: what is wrong beyond its reason, and what it looks like."""
        self.files[file].dropped[reason] += 1
        self.files[file].stages[stage].dropped += 1
        self.decide(file, number, stage, Action.DROP, reason, detail, ref, words=words, shape=shape)

    def ref(self, file: int, number: int) -> str:
        """Return how a decision names another row."""
        return f"{self.files[file].uri}#{number}"

    def license(self, file: int, number: int, said: RowLicense, field: str) -> None:
        """Count row `number` of a file by its own licence, and drop it where that is not one that was chosen."""
        account = self.files[file]
        (account.licenses if said.drop is None else account.left_licenses)[said.name] += 1
        if said.drop is not None:
            self.drop(file, number, "license", said.drop, field)

    def passed(
        self, stage: str, given: Iterable[RowPlace], passed: Iterable[RowPlace], counters: Mapping[str, int]
    ) -> None:
        """Count the rows that came to a stage and those that it passed on, each once, and what else it counted."""
        for file, _ in set(given):
            self.files[file].stages[stage].rows_in += 1
        for file, _ in set(passed):
            self.files[file].stages[stage].rows_out += 1
        if counters:
            self.counted[stage].update(counters)

    def decide(
        self,
        file: int,
        number: int,
        stage: str,
        action: Action,
        reason: str,
        detail: str = "",
        ref: str = "",
        *,
        words: str = "",
        shape: str = "",
    ) -> None:
        """Write what was done to a row.

        Beyond MAX_DECISIONS_BYTES, and as a change beyond MAX_CHANGES_BYTES, it is counted and no longer listed."""
        record = {"file": self.files[file].uri, "row": number, "stage": stage, "action": action, "reason": reason}
        more = {"ref": ref, "detail": detail, "words": words, "shape": shape}
        record |= {name: value for name, value in more.items() if value}
        self._take(file, number, orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))

    def _take(self, file: int, number: int, line: bytes) -> None:  # noqa: ARG002 (of the interface)
        self.decided.add(line)
        is_change = _CHANGED in line
        if self._written_bytes >= MAX_DECISIONS_BYTES or (is_change and self._changes_bytes >= MAX_CHANGES_BYTES):
            self._unlisted[orjson.loads(line)["reason"]] += 1
            return
        size_bytes = self._decisions.write(line)
        self._written_bytes += size_bytes
        self._changes_bytes += size_bytes * is_change

    def take_decisions(self, path: Path) -> None:
        """Add the decisions of a partition, which `PartitionLedger` wrote, under the same bounds."""
        with path.open("rb") as file:
            for line in file:
                self._take(0, 0, line)

    def flush(self) -> None:
        """Make decisions so far readable, the last line telling how many rows are not listed."""
        if self._unlisted:
            line = {"not_listed": {str(reason): rows for reason, rows in sorted(self._unlisted.items())}}
            self._decisions.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
            self._unlisted.clear()
        self._decisions.flush()

    def count(self, file: int, size_bytes: int = 0) -> None:
        """One more row of a file was read, of so many bytes at least."""
        self.files[file].rows_in += 1
        self.files[file].bytes_in += size_bytes
        self.rows_read += 1
        self.file_read = file
        if self.rows_read % _BEAT_ROWS == 0:
            self._on_rows(self.rows_read)

    def take(self, file: int, rows: FileRows) -> None:
        """Add what a partition counted of a file."""
        account = self.files[file]
        account.rows_in, account.bytes_in = account.rows_in + rows.rows_in, account.bytes_in + rows.bytes_in
        account.dropped.update(rows.dropped)
        for name, stage in rows.stages.items():
            account.stages[name].add(stage)
        account.tokens.add(rows.tokens)
        account.licenses.update(rows.licenses)
        account.left_licenses.update(rows.left_licenses)
        self.rows_read += rows.rows_in
        self.file_read = file

    def take_counted(self, counted: Mapping[str, Mapping[str, int]]) -> None:
        """Add what the stages of a partition told of their rows."""
        for stage, counts in counted.items():
            self.counted[stage].update(counts)

    def take_places(self, stage: str, places: Mapping[str, Sequence[FieldPlace]], first_file: int = 0) -> None:
        """Keep the first of these examples, which are behind those that it has. first_file: what file 0 is of ours."""
        for name, each in places.items():
            kept = self.places[stage].setdefault(name, [])
            kept += (where._replace(file=where.file + first_file) for where in each[: MAX_PLACES - len(kept)])

    def ignore_fields(self, names: Iterable[str], rows: int = 1) -> None:
        """Fields that `rows` rows have, and that are not read. Only names that look like names: a key may be data."""
        for name in names:
            named = name.isidentifier() and len(name) <= _MAX_FIELD_NAME
            known = name in self.ignored_fields or len(self.ignored_fields) < _MAX_IGNORED_FIELDS
            self.ignored_fields[name if named and known else "(other)"] += rows

    def change(self, file: int, number: int, reasons: Iterable[str]) -> None:
        """Row `number` of a file was changed for these reasons so that it can be learned."""
        for reason in sorted(reasons):
            self.changes[reason] += 1
            self.decide(file, number, "read", Action.CHANGE, reason)

    @property
    def dropped(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for account in self.files:
            total.update(account.dropped)
        return total

    def dropped_rows(self) -> list[DroppedRows]:
        """Rows dropped by reason, most first; at most ten entries, the rest as `other`."""
        ordered = list(most_first(self.dropped).items())
        shown = ordered if len(ordered) <= _MAX_REASONS else ordered[: _MAX_REASONS - 1]
        rest = sum(rows for _, rows in ordered[len(shown) :])
        return [DroppedRows(reason=reason, rows=rows) for reason, rows in shown] + (
            [DroppedRows(reason="other", rows=rest)] if rest else []
        )


class PartitionLedger(Ledger):
    """The ledger of one partition, whose decisions are written in the order of its rows once they are flushed.

    So decisions.jsonl is the same, however rows are cut into partitions and batches. They are counted, and bounded,
    by the ledger that takes them; the rows of a partition are bounded."""

    def __init__(self, path: Path, on_rows: Callable[[int], None] = lambda _: None) -> None:
        super().__init__(path, on_rows)
        self._held: list[tuple[int, int, bytes]] = []

    def _take(self, file: int, number: int, line: bytes) -> None:
        self._held.append((file, number, line))

    def flush(self) -> None:
        """Write what is held."""
        held, self._held = sorted(self._held, key=lambda each: each[:2]), []
        for _, _, line in held:
            self._decisions.write(line)
        self._decisions.flush()
