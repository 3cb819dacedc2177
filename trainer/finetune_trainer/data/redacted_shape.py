"""What a row looks like without what it says: the names of its fields, and of each value its kind and size."""

from typing import cast

from finetune_api.redact import shortened
from finetune_trainer.data.field_names import shown

MAX_SHAPE_CHARS = 160
_MAX_DEPTH = 4
_MAX_FIELDS = 8  # of an object


def redacted_shape(value: object, depth: int = 0) -> str:
    """Return a value that was decoded as `{messages: [{role: text of 4, …}, 2 more]}`; of a list its first alone."""
    if isinstance(value, dict):
        fields = cast(dict[str, object], value)
        if depth == _MAX_DEPTH:
            return f"{{{len(fields)} fields}}"
        said = [
            f"{shortened(shown(name), MAX_SHAPE_CHARS)}: {redacted_shape(fields[name], depth + 1)}"
            for name in list(fields)[:_MAX_FIELDS]
        ]
        said += [f"{len(fields) - _MAX_FIELDS} more"] if len(fields) > _MAX_FIELDS else []
        return f"{{{', '.join(said)}}}"[:MAX_SHAPE_CHARS]
    if isinstance(value, list):
        items = cast(list[object], value)
        if not items:
            return "[]"
        if depth == _MAX_DEPTH:
            return f"[{len(items)} values]"
        more = f", {len(items) - 1} more" if len(items) > 1 else ""
        return f"[{redacted_shape(items[0], depth + 1)}{more}]"[:MAX_SHAPE_CHARS]
    return _kind(value)


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case str():
            return f"text of {len(value)}"
        case bool():
            return "true or false"
        case int() | float():
            return "number"
        case _:
            return "unreadable"
