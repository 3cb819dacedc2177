"""The texts inside a value of JSON, each by the path of its field, and the value with some of them replaced.

A path is what faults and decisions name, such as `messages[1].content`. A key that does not look like a name may be
data itself: its place among the keys stands for it, as in `arguments.#2`.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple, cast

from finetune_trainer.data.field_names import shown

NOTHING: Collection[str] = frozenset[str]()


class TextAt(NamedTuple):
    """A text and the path of its field."""

    path: str
    text: str


def texts_in(value: object, path: str, besides: Collection[str] = NOTHING) -> Iterator[TextAt]:
    """Yield all texts in a value, in order, but for those of its own fields that are named in `besides`."""
    if isinstance(value, str):
        yield TextAt(path, value)
    elif isinstance(value, Mapping):
        for at, (name, each) in enumerate(cast(Mapping[str, Any], value).items()):
            if name not in besides:
                yield from texts_in(each, field_path(path, name, at))
    elif isinstance(value, list):
        for at, each in enumerate(cast(list[Any], value)):
            yield from texts_in(each, f"{path}[{at}]")


def whole_numbers_in(value: object, path: str) -> Iterator[tuple[str, int]]:
    """Yield all whole numbers in a value, each with the path of its field."""
    if isinstance(value, int):
        yield path, value
    elif isinstance(value, Mapping):
        for at, (name, each) in enumerate(cast(Mapping[str, Any], value).items()):
            if not isinstance(each, str):  # most are that, and a path takes longer than the look
                yield from whole_numbers_in(each, field_path(path, name, at))
    elif isinstance(value, list):
        for at, each in enumerate(cast(list[Any], value)):
            yield from whole_numbers_in(each, f"{path}[{at}]")


def with_texts_in(value: Any, path: str, given: Mapping[str, str]) -> Any:
    """Return the value with texts at these paths, where it has texts or whole numbers; other parts are not copied."""
    if isinstance(value, str | int):
        return given.get(path, value)
    if not any(each.startswith(path) for each in given):
        return value
    if isinstance(value, Mapping):
        fields = enumerate(cast(Mapping[str, Any], value).items())
        return {name: with_texts_in(each, field_path(path, name, at), given) for at, (name, each) in fields}
    if isinstance(value, list):
        items = enumerate(cast(list[Any], value))
        return [with_texts_in(each, f"{path}[{at}]", given) for at, each in items]
    return value


def field_path(path: str, name: str, at: int) -> str:
    """Return the path of a field of what stands at `path`, the `at`-th there."""
    return f"{path}.{name}" if shown(name) == name else f"{path}.#{at}"
