"""What is to be known of a kind of rows: the class whose entries `kinds` has."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import pyarrow as pa

from finetune_api.job import DatasetFormat
from finetune_trainer.data.cuts import Marks
from finetune_trainer.data.problems import Drop
from finetune_trainer.data.rows import Conversation, Row
from finetune_trainer.data.shingles import Compared
from finetune_trainer.data.tokens import Tokens

if TYPE_CHECKING:  # whose tokenizer counts special tokens in the texts of rows
    from finetune_trainer.data.model_facts import Model

KIND_NAME = b"kind"  # in the metadata of a schema

ArrowSchema = Any  # pyarrow.Schema and pyarrow.RecordBatch: it has no types
ArrowBatch = Any
R = TypeVar("R")


class SaidText(NamedTuple):
    """A part of a row for people to read, and whether it is learned."""

    text: str
    learned: bool


@dataclass(frozen=True, kw_only=True)
class Untemplated(Generic[R]):
    """How rows become tokens that no chat template renders.

    tokens: of rows, of which everything is learned where the last argument says so; cut: a row's tokens cut to a limit,
    those that the tokenizer begins every text with being kept, None where they cannot be; pieces: a row's tokens as
    examples of their own within a limit, with the headings above each where the last argument says so, None where no
    row may become several."""

    tokens: Callable[["Model", Sequence[R], bool], list[Tokens]]
    cut: Callable[[Tokens, int, int], Tokens | None]
    pieces: Callable[[Tokens, int, Marks, bool], list[Tokens]] | None = None


@dataclass(frozen=True, kw_only=True)
class Members(Generic[R]):
    """The rows of simpler kinds that a row is learned as, all of one kind, as the two answers of a pair.

    rows: all of them, in order; names: what is said of each of those of one example, as chosen or rejected. A
    row with more members has several examples."""

    rows: Callable[[R], Sequence[Row]]
    names: Callable[[R], tuple[str, ...]]


def _no_fields(_: Any) -> Mapping[str, Any]:
    return {}


def _no_texts(_: Any) -> Sequence[str]:
    return ()


def _nothing_said(_: Any) -> list[SaidText]:
    return []


def _nothing_compared(_: Any) -> Compared:
    return Compared((), ())


def _any_field(_: Any) -> None:
    return None


def _no_prompt(_: Any) -> object:
    return None


def _no_label(_: Any) -> int:
    return 0


@dataclass(frozen=True, kw_only=True)
class Kind(Generic[R]):
    """What is to be known of a kind of rows.

    texts: what its writer wrote, by the path of the field; with_texts: the row with some of that replaced.
    content: what rows that say the same have in common, as JSON. unlearnable: why nothing of it is to be
    learned, None where something is. to_columns, from_columns: the row as values of `columns`, and back.

    conversation: what the chat template renders of it; a kind without is `untemplated`, or has `members`, which are
    learned in its place. said: all of it for people, but of a kind with members. only_fields: what a row may have in
    its file, where that is less than its shape reads. nested: its fields that are any JSON. contents: texts that a
    field beside may say again. label: 1 for a good answer, -1 for a bad one, 0 where that is not said. prompt: what
    an answer answers, as JSON: equal for answers that can be compared. answers: what is learned as one,
    without calls of functions and bad ones. compared: by which near copies are told, without what many rows begin with,
    as system prompts."""

    name: str
    formats: frozenset[DatasetFormat]  # the shapes that become it
    texts: Callable[[R], dict[str, str]]
    with_texts: Callable[[R, Mapping[str, str]], R]
    content: Callable[[R], object]
    unlearnable: Callable[[R], Drop | None]
    columns: ArrowSchema
    to_columns: Callable[[R], dict[str, Any]]
    from_columns: Callable[[Mapping[str, Any]], R]
    said: Callable[[R], list[SaidText]] = _nothing_said
    conversation: Callable[[R], Conversation] | None = None
    untemplated: Untemplated[R] | None = None
    members: Members[R] | None = None
    only_fields: Callable[[R], frozenset[str] | None] = _any_field
    nested: Callable[[R], Mapping[str, Any]] = _no_fields
    contents: Callable[[R], Sequence[str]] = _no_texts
    label: Callable[[R], int] = _no_label
    prompt: Callable[[R], object] = _no_prompt
    answers: Callable[[R], Sequence[str]] = _no_texts
    compared: Callable[[R], Compared] = _nothing_compared

    def __post_init__(self) -> None:
        ways = (self.conversation, self.untemplated, self.members)
        assert sum(way is not None for way in ways) == 1, "it is rendered, or tokenised as it is, or its members are"

    @property
    def may_be_rendered(self) -> bool:
        """Whether a chat template may be needed for its rows."""
        return self.untemplated is None

    @property
    def schema(self) -> ArrowSchema:
        """The columns, and by whose name `from_arrow` finds the way back."""
        return self.columns.with_metadata({KIND_NAME: self.name.encode()})

    def to_arrow(self, rows: Sequence[R]) -> ArrowBatch:
        """Return the rows as a batch of columns, equal rows for equal columns."""
        return pa.RecordBatch.from_pylist([self.to_columns(row) for row in rows], schema=self.schema)
