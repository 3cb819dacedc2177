"""Count, replace or leave out personal data and secrets, in all texts of a row and in the numbers that functions get.

It runs before rows are rendered, so that masks and labels are those of the new texts. The value itself goes nowhere:
decisions, counters and places name its type and its field.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from finetune_api.pii import PII_REGIONS, PiiAction, PiiSpec, PiiType
from finetune_trainer.data.accounts import Action, FieldPlace
from finetune_trainer.data.kinds import texts, whole_numbers, with_values
from finetune_trainer.data.pii.actions import action_of
from finetune_trainer.data.pii.find import Found, find
from finetune_trainer.data.pii.recogniser import Regions
from finetune_trainer.data.pii.replacing import placeholder, pseudonym, replaced
from finetune_trainer.data.problems import Change, Drop
from finetune_trainer.data.reading import Checked
from finetune_trainer.data.rows import Row
from finetune_trainer.data.stages.stage import Stage, Staged

NAME = "pii"
FOUND, CHANGED, ROWS, ROWS_DROPPED = "found", "changed", "rows", "rows_dropped"  # counters: each, a dot and a type
_MOST_FIELDS_TOLD = 8  # in a decision
_LEAST_NUMBER = 10**6  # less has not as many digits as any type
_REPLACING = (PiiAction.REDACT, PiiAction.PSEUDONYMISE)
# What binds calls, results and definitions of functions to one another: replaced, they would not be theirs any more.
_BINDING = re.compile(
    r"(?:^|\.)(?:messages\[\d+\]\.(?:tool_call_id|tool_calls\[\d+\]\.(?:id|type|function\.name))"
    r"|tools\[\d+\]\.(?:type|function\.name))$"
)
_SAYS_NOTHING = frozenset(("content", "text", "prompt", "completion"))  # names of fields that may hold anything


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What a job does about personal data. key: of the pseudonyms, None where there are none."""

    actions: Mapping[PiiType, PiiAction]
    regions: Regions
    key: bytes | None = field(repr=False)

    def name(self, found: Found) -> str:
        """Return what stands in the place of a value."""
        if self.actions[found.type] is PiiAction.REDACT:
            return placeholder(found)
        assert self.key is not None, "a job that pseudonymises has a key before rows are read"
        return pseudonym(self.key, found)


class _Field(NamedTuple):
    """A text of a row, or a number as text, and what was found there."""

    path: str
    text: str
    found: list[Found]


def treatment_of(spec: PiiSpec | None, key: bytes | None) -> Treatment:
    """Return what a job does. key: as `pii_key.read` returns it."""
    given = spec or PiiSpec()
    actions = {each: action_of(spec, each) for each in PiiType}
    return Treatment(actions=actions, regions=frozenset(given.regions or PII_REGIONS), key=key)


def pii_stage(spec: PiiSpec | None, key: bytes | None) -> Stage:
    """Return the stage of a job."""
    description = "counts personal data and secrets, replaces them, or leaves out their rows"
    return Stage(NAME, description, partial(_run, treatment_of(spec, key)))


def _run(treatment: Treatment, rows: Sequence[Checked]) -> Staged:
    staged = Staged([])
    for item in rows:
        fields = list(_fields(item.row, treatment.regions))
        if not fields:
            staged.rows.append(item)
            continue
        does = {treatment.actions[each.type] for said in fields for each in said.found}
        _count(staged, item, fields, treatment, is_dropped=PiiAction.DROP in does)
        if PiiAction.DROP in does:
            staged.decide(item, Action.DROP, Drop.PERSONAL_DATA, _told(fields))
        elif does.isdisjoint(_REPLACING):
            staged.rows.append(item)
        else:
            staged.rows.append(item.with_row(_replaced(item.row, fields, treatment)))
            staged.decide(item, Action.CHANGE, Change.PERSONAL_DATA, _told(fields))
    return staged


def _fields(row: Row, regions: Regions) -> Iterator[_Field]:
    """Yield the fields in which something was found; a text that a row holds twice, as pairs do, is read once."""
    known: dict[tuple[str, str], list[Found]] = {}
    numbers = {path: str(number) for path, number in whole_numbers(row) if abs(number) >= _LEAST_NUMBER}
    for path, text in (*texts(row).items(), *numbers.items()):
        name = _name(path)
        found = known.get((name, text))
        if found is None:
            found = known[name, text] = find(text, regions, name)
        if found and not _BINDING.search(path):
            yield _Field(path, text, found)


def _name(path: str) -> str:
    """Return the name of a field that may say what it holds, as `phone` does; nothing where it may hold anything."""
    name = path.rpartition(".")[2]
    return "" if name in _SAYS_NOTHING else name.partition("[")[0]


def _replaced(row: Row, fields: Sequence[_Field], treatment: Treatment) -> Row:
    new: dict[str, str] = {}
    for path, text, found in fields:
        every = [each for each in found if treatment.actions[each.type] in _REPLACING]
        if every:
            new[path] = replaced(text, every, treatment.name)
    return with_values(row, new)


def _count(staged: Staged, item: Checked, fields: Sequence[_Field], treatment: Treatment, *, is_dropped: bool) -> None:
    """Count what was found in a row: a text that it holds twice counts once."""
    once = {(_name(each.path), each.text): each for each in reversed(fields)}
    counts = Counter(found.type for each in once.values() for found in each.found)
    for type_, count in counts.items():
        action = treatment.actions[type_]
        staged.counters[f"{FOUND}.{type_}"] += count
        staged.counters[f"{ROWS}.{type_}"] += 1
        staged.counters[f"{CHANGED}.{type_}"] += count if action in _REPLACING and not is_dropped else 0
        staged.counters[f"{ROWS_DROPPED}.{type_}"] += action is PiiAction.DROP
        path = next(each.path for each in fields if any(found.type is type_ for found in each.found))
        staged.places.setdefault(type_, []).append(FieldPlace(item.file, item.number, path))


def _told(fields: Sequence[_Field]) -> str:
    """Return the types that are in each field, with how many there are."""
    told: list[str] = []
    for path, _, found in fields[:_MOST_FIELDS_TOLD]:
        counts = Counter(each.type for each in found)
        told.append(f"{path}: " + ", ".join(f"{type_} {count}" for type_, count in sorted(counts.items())))
    if len(fields) > _MOST_FIELDS_TOLD:
        told.append(f"and {len(fields) - _MOST_FIELDS_TOLD} more fields")
    return "; ".join(told)
