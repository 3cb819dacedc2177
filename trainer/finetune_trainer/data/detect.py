"""Which format a dataset has: told from its first rows, or from the spec."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

from finetune_api.errors import StageError
from finetune_api.job import DatasetFormat, MethodType
from finetune_api.reasons import Fault
from finetune_trainer.data.problems import place

FORMATS = {
    MethodType.CPT: (DatasetFormat.TEXT,),
    MethodType.SFT: (DatasetFormat.MESSAGES, DatasetFormat.PROMPT_COMPLETION),
}
_FIELDS = {
    DatasetFormat.MESSAGES: ("messages",),
    DatasetFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    DatasetFormat.TEXT: ("text",),
}
_EXPECTED = {
    MethodType.CPT: "rows with `text`",
    MethodType.SFT: "rows with `messages`, or with `prompt` and `completion`",
}
_MAX_FOUND = 128


def check_given(given: DatasetFormat | None, method: MethodType, index: int) -> None:
    """Refuse a format in the spec that the method cannot use."""
    if given is not None and given not in FORMATS[method]:
        fitting = " or ".join(FORMATS[method])
        raise StageError(
            Fault.CONFIG_UNREADABLE,
            field=f"spec.datasets[{index}].format",
            problem=f"{given} does not fit method {method}; write {fitting}, or leave it out",
        )


def detect(rows: Sequence[tuple[str, int, object]], method: MethodType) -> DatasetFormat:
    """The format that most of the rows have, of those the method can use.

    rows: (file, row number, decoded value) of a dataset's first rows, at least one of them an object. Raises
    WRONG_FORMAT when none fits, or when two fit equally well: guessing would train on something else.
    """
    counts: Counter[DatasetFormat] = Counter()
    for _, _, value in rows:
        if isinstance(value, dict):
            counts.update(each for each in FORMATS[method] if all(name in value for name in _FIELDS[each]))
    best = counts.most_common(2)
    if not best:
        raise _wrong(rows, method, _EXPECTED[method])
    if len(best) == 2 and best[0][1] == best[1][1]:
        raise _wrong(rows, method, "one format; set datasets[].format to Messages or PromptCompletion")
    return best[0][0]


def _wrong(rows: Sequence[tuple[str, int, object]], method: MethodType, expected: str) -> StageError:
    file, number, value = next(row for row in rows if isinstance(row[2], dict))
    return StageError(
        Fault.WRONG_FORMAT,
        file=place(file),
        row=number,
        method=method.value,
        expected=expected,
        found=_names(cast(dict[str, Any], value)),
    )


def _names(value: dict[str, Any]) -> str:
    """Field names for an error: names that look like identifiers, since a key could be data too."""
    names = [name for name in value if name.isidentifier() and len(name) <= 32]
    text = ", ".join(sorted(names))
    others = len(value) - len(names)
    text = f"{text} and {others} more" if others and text else text or "none"
    return text if len(text) <= _MAX_FOUND else text[: _MAX_FOUND - 1] + "…"
