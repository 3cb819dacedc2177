"""Which shape a dataset's rows have: told from its first rows, or from the spec."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

from finetune_api.errors import StageError
from finetune_api.job import DatasetFormat, MethodType
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_trainer.data.field_names import shown
from finetune_trainer.data.preferences import RATING
from finetune_trainer.data.problems import RefusedError, place
from finetune_trainer.data.shapes import SHAPES, RowChoices, renamed
from finetune_trainer.methods import METHODS, method_of

_ASKED_AT = 0.1  # of the rows with the commonest shape: so many of another are no accident
_MAX_FOUND = 128
_MAX_FILE_NAME = 32
_COLUMNS = "datasets[].columns that says what is what"


class Detected(NamedTuple):
    """The shape of a dataset's rows. told_by: what says so, as the beginning of a sentence."""

    shape: DatasetFormat
    told_by: str


def given_shape(shape: DatasetFormat) -> Detected:
    """Return the shape that the job names."""
    return Detected(shape, "datasets[].format says")


def check_given(given: DatasetFormat | None, method: MethodType, index: int) -> None:
    """Refuse a format in the spec that the method cannot use."""
    formats = method_of(method).formats
    if given is not None and given not in formats:
        fitting = " or ".join(formats)
        raise StageError(
            Fault.CONFIG_UNREADABLE,
            field=f"spec.datasets[{index}].format",
            problem=f"{given} does not fit method {method}; write {fitting}, or leave it out",
        )


def check_preference(found: DatasetFormat, choices: RowChoices, index: int, values: Iterable[object]) -> None:
    """Refuse what the spec says of preferences where no row of the dataset can follow it: it would do nothing.

    values: the decoded first rows."""
    given = choices.preference.model_dump(by_alias=True, exclude_none=True)
    good_from = given.pop("goodFrom", None)
    problem = f"it is about the scores of a Ranking, and the rows are {found}, of which no score is read"
    field = next(iter(given), None) if found is not DatasetFormat.RANKING else None
    if field is None and good_from is not None:
        problem = f"it is about the ratings of a Thumb, and the rows are {found}"
        field = "goodFrom" if found is not DatasetFormat.THUMB else None
        if field is None and not any(_is_rated(value, choices) for value in values):
            field, problem = "goodFrom", "none of the first rows has a `rating` or `score`"
    if field is not None:
        raise StageError(
            Fault.CONFIG_UNREADABLE,
            field=f"spec.datasets[{index}].preference.{field}",
            problem=f"{problem}; leave it out",
        )


def _is_rated(value: object, choices: RowChoices) -> bool:
    """Whether a decoded row has a rating, under its own name or the one that the job gives it."""
    if not isinstance(value, dict):
        return False
    row = cast(dict[str, Any], value)
    return any(row.get(name) is not None and choices.columns.get(name, name) in RATING for name in row)


def detect(rows: Sequence[tuple[str, int, object]], method: MethodType, choices: RowChoices) -> Detected:
    """Return the shape that the rows have, of those the method can use.

    rows: (file, row number, decoded value) of a dataset's first rows, at least one of them an object. Raises
    WRONG_FORMAT when none fits, or when two do: guessing would train on something else.
    """
    counts: Counter[DatasetFormat] = Counter()
    first: dict[DatasetFormat, int] = {}
    for at, (_, _, value) in enumerate(rows):
        for each in fitting(value, method, choices):
            counts[each] += 1
            first.setdefault(each, at)
    best = counts.most_common(2)
    if not best:
        at = next(at for at, (_, _, value) in enumerate(rows) if isinstance(value, dict))
        others = [each for each in METHODS if fitting(rows[at][2], each, choices)]
        remedy = f"; this one fits method.type {' or '.join(others)}" if others else f", or {_COLUMNS}"
        raise _wrong(rows[at], method, f"rows with {_needed(method)}{remedy}")
    if len(best) == 2 and best[1][1] >= _ASKED_AT * best[0][1]:
        (one, rows_of_one), (other, rows_of_other) = best
        expected = (
            f"one format, and of {len(rows):,} rows {rows_of_one:,} fit {one} (first {_place(rows[first[one]])}), "
            f"{rows_of_other:,} {other} (first {_place(rows[first[other]])}); set datasets[].format to one of them, or "
            "make two datasets of them"
        )
        raise _wrong(rows[max(first[one], first[other])], method, expected)
    shape = best[0][0]
    return Detected(shape, f"{_place(rows[first[shape]])} has")


def _place(row: tuple[str, int, object]) -> str:
    """Return where a row is, in few characters."""
    return f"row {row[1]} of {shortened(row[0].rpartition('/')[2], _MAX_FILE_NAME)}"


def fitting(value: object, method: MethodType, choices: RowChoices) -> list[DatasetFormat]:
    """Return the shapes that one decoded row fits."""
    if not isinstance(value, dict):
        return []
    try:
        row = renamed(cast(dict[str, Any], value), choices)
    except RefusedError:
        return []
    return [each for each in method_of(method).formats if SHAPES[each].fits(row)]


def _needed(method: MethodType) -> str:
    """Return which fields the shapes need, each under the first of its names unless the shape says more."""
    shapes = [SHAPES[each] for each in method_of(method).formats]
    return ", or ".join(shape.needed or " and ".join(f"`{group[0]}`" for group in shape.needs) for shape in shapes)


def _wrong(row: tuple[str, int, object], method: MethodType, expected: str) -> StageError:
    file, number, value = row
    return StageError(
        Fault.WRONG_FORMAT,
        file=place(file),
        row=number,
        method=method.value,
        expected=expected,
        found=_names(cast(dict[str, Any], value)),
    )


def _names(value: dict[str, Any]) -> str:
    """Return field names for an error: those that look like names, since a key could be data too."""
    names = [name for name in value if shown(name) == name]
    text = ", ".join(sorted(names))
    others = len(value) - len(names)
    text = f"{text} and {others} more" if others and text else text or "none"
    text = text if names or not others else f"{others}, none of whose names is shown as it may be data"
    return text if len(text) <= _MAX_FOUND else text[: _MAX_FOUND - 1] + "…"
