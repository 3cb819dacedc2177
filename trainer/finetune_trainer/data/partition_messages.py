"""What prepare and its workers tell each other of partitions, as plain values."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from finetune_api.errors import StageError
from finetune_api.job import PreferenceSpec, SameRoleMessages, SystemMessages
from finetune_api.reasons import Fault
from finetune_trainer.data.accounts import FieldPlace, FileRows, Places, RowPlace, StageAccount
from finetune_trainer.data.bad_rows import BrokenRow
from finetune_trainer.data.encoders import Choice
from finetune_trainer.data.model_facts import Model
from finetune_trainer.data.problems import Broken, Problem
from finetune_trainer.data.same_ids import ProbedRow
from finetune_trainer.data.shapes import RowChoices
from finetune_trainer.data.taught import Taught
from finetune_trainer.data.too_long import LongRow
from finetune_trainer.data.unknown_words import TokenCount
from finetune_trainer.runplan import ModelFacts


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is the same for all rows of a job. renderer: as `renderer_of` takes it, None without a chat template.
    pii_key: of the pseudonyms, as hexadecimal digits; no process writes it anywhere. evaluation_runs: the folder of
    what evaluation sets say, None without any, and evaluation_digest: of what lies there."""

    spec: dict[str, Any]
    facts: dict[str, Any]
    family: str
    special_tokens: dict[str, str]
    stop_ids: tuple[int, ...]
    stops: tuple[str, ...]
    loss_on: str
    limit_tokens: int
    limit_source: str
    too_long: str
    quarantine: bool
    renderer: dict[str, Any] | None
    pii_key: str | None = field(default=None, repr=False)
    evaluation_runs: str | None = None
    evaluation_digest: str | None = None

    def model(self, tokenizer: Any) -> Model:
        """Return the model as a worker knows it."""
        facts, stop_ids, stops = ModelFacts.model_validate(self.facts), tuple(self.stop_ids), tuple(self.stops)
        return Model(facts, self.family, tokenizer, self.special_tokens, None, stop_ids, stops, files={})


def rules_of_model(model: Model) -> Mapping[str, Any]:
    """Return what workers are told of the model, beside its tokenizer."""
    return {
        "facts": model.facts.model_dump(mode="json"),
        "family": model.family,
        "special_tokens": model.special_tokens,
        "stop_ids": model.stop_ids,
        "stops": model.stops,
    }


@dataclass(frozen=True, kw_only=True)
class Task:
    """One partition to work on.

    rows, out: paths; most_rows: how many to read, None for all; files: URIs; tables: whether each file is one."""

    rows: str
    out: str
    files: list[str]
    tables: list[bool]
    data_format: str
    columns: dict[str, str]
    ignored: list[str]
    system_messages: str
    same_role: str
    learns_all: bool
    told_by: str
    preference: dict[str, Any]
    license_field: str | None
    licenses: list[str]
    group_field: str | None
    most_rows: int | None = None

    @property
    def choices(self) -> RowChoices:
        return RowChoices(
            columns=self.columns,
            ignored=frozenset(self.ignored),
            system_messages=SystemMessages(self.system_messages),
            same_role=SameRoleMessages(self.same_role),
            learns_all=self.learns_all,
            told_by=self.told_by,
            preference=PreferenceSpec.model_validate(self.preference),
            license_field=self.license_field,
            licenses=tuple(self.licenses),
            group_field=self.group_field,
        )


@dataclass(kw_only=True)
class PartitionResult:
    """What a partition came to, beside the files in `Task.out`. Files are indices into the partition's own.

    counted: by stage, what it told of its rows, and places, where examples of that are; broken: the rows that are, in
    order, and first_broken_at: how many were read at the first; fault, args: what ended it, if anything, where it is
    no broken row that ends the job; probed: its first conversations; killed: rows that the template's process died of;
    choice: the library that read the rows, and why."""

    files: list[FileRows]
    counted: dict[str, dict[str, int]]
    places: dict[str, Places]
    changes: dict[str, int]
    ignored_fields: dict[str, int]
    broken: list[RowPlace]
    first_broken: BrokenRow | None
    first_broken_at: int
    first_long: LongRow | None
    long_dropped: int
    longest: int
    met_long: bool
    taught: Taught
    special_words: dict[str, int]
    stop_ids: list[int]
    choice: Choice
    probed: list[ProbedRow]
    rendered: bool
    killed: list[RowPlace]
    seconds: dict[str, float]
    fault: str | None = None
    args: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def rows_in(self) -> int:
        return sum(each.rows_in for each in self.files)

    @property
    def error(self) -> StageError | None:
        return None if self.fault is None else StageError(Fault(self.fault), **self.args)

    def to_json(self) -> bytes:
        return orjson.dumps(self, default=list, option=orjson.OPT_NON_STR_KEYS)  # a tuple with names as a list

    @classmethod
    def from_json(cls, content: bytes) -> "PartitionResult":
        """Raises ValueError, TypeError or KeyError for what is none."""
        values: dict[str, Any] = orjson.loads(content)
        values["files"] = [_file_rows(each) for each in values["files"]]
        values["broken"] = [RowPlace(*each) for each in values["broken"]]
        values["places"] = {stage: _places(each) for stage, each in values["places"].items()}
        values["choice"] = Choice(*values["choice"])
        values["probed"] = [ProbedRow(*each) for each in values["probed"]]
        values["killed"] = [RowPlace(*each) for each in values["killed"]]
        values["taught"] = Taught(**values["taught"] | {"notes": Counter(values["taught"]["notes"])})
        if values["first_broken"] is not None:
            file, number, broken = values["first_broken"]
            values["first_broken"] = BrokenRow(file, number, Broken(**broken | {"problem": Problem(broken["problem"])}))
        if values["first_long"] is not None:
            values["first_long"] = LongRow(*values["first_long"])
        return cls(**values)


def _places(values: dict[str, Any]) -> Places:
    return {name: [FieldPlace(*each) for each in places] for name, places in values.items()}


def _file_rows(values: dict[str, Any]) -> FileRows:
    values["stages"] = {name: StageAccount(**each) for name, each in values["stages"].items()}
    values["tokens"] = TokenCount(**values["tokens"])
    return FileRows(**values)
