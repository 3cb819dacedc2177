"""The kinds of rows, each in one place: its texts, what equal rows have in common, Arrow columns, how it is tokenised.

Whatever looks at rows of any kind asks here, and never which kind it is. A new kind is a class of rows, a shape that
becomes it (`shapes`), and an entry of KINDS; CONTRIBUTING.md says what else.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast

import orjson
import pyarrow as pa

from finetune_api.job import DatasetFormat
from finetune_trainer.data.end_token import require_end_token, require_stop_at_end_token
from finetune_trainer.data.problems import Broken, Problem
from finetune_trainer.data.rows import Completion, Conversation, Message, Row, Text
from finetune_trainer.data.texts import texts_in, whole_numbers_in, with_texts_in
from finetune_trainer.data.tokens import Breaks, Tokens, of_document, split
from finetune_trainer.data.too_long import without_beginning

if TYPE_CHECKING:  # whose tokenizer counts special tokens in the texts of rows
    from finetune_trainer.data.model_facts import Model

_NAME = b"kind"  # in the metadata of a schema
_PLAIN_MESSAGE = ["role", "content"]
_FIXED_WORDS = frozenset(("role",))  # of a message: no text of anybody's

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
    examples of their own within a limit, None where no row may become several."""

    tokens: Callable[["Model", Sequence[R], bool], list[Tokens]]
    cut: Callable[[Tokens, int, int], Tokens | None]
    pieces: Callable[[Tokens, int, Breaks], list[Tokens]] | None = None


def _no_fields(_: Any) -> Mapping[str, Any]:
    return {}


def _no_texts(_: Any) -> Sequence[str]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Kind(Generic[R]):
    """What is to be known of a kind of rows.

    texts: what its writer wrote, by the path of the field; with_texts: the row with some of that replaced.
    content: what rows that say the same have in common, as JSON or bytes. has_answer: whether any of it is to be
    learned. to_columns, from_columns: the row as values of `columns`, and back.

    said: all of it for people. conversation: what the chat template renders of it; a kind without is `untemplated`.
    only_fields: what a row may have in its file, where that is less than its shape reads. nested: its fields that are
    any JSON. contents: texts that a field beside may say again."""

    name: str
    formats: frozenset[DatasetFormat]  # the shapes that become it
    texts: Callable[[R], dict[str, str]]
    with_texts: Callable[[R, Mapping[str, str]], R]
    content: Callable[[R], object]
    has_answer: Callable[[R], bool]
    columns: ArrowSchema
    to_columns: Callable[[R], dict[str, Any]]
    from_columns: Callable[[Mapping[str, Any]], R]
    said: Callable[[R], list[SaidText]]
    conversation: Callable[[R], Conversation] | None = None
    untemplated: Untemplated[R] | None = None
    only_fields: frozenset[str] | None = None
    nested: Callable[[R], Mapping[str, Any]] = _no_fields
    contents: Callable[[R], Sequence[str]] = _no_texts

    def __post_init__(self) -> None:
        assert (self.conversation is None) != (self.untemplated is None), "it is rendered, or it is not"

    @property
    def schema(self) -> ArrowSchema:
        """The columns, and by whose name `from_arrow` finds the way back."""
        return self.columns.with_metadata({_NAME: self.name.encode()})

    def to_arrow(self, rows: Sequence[R]) -> ArrowBatch:
        """Return the rows as a batch of columns, equal rows for equal columns."""
        return pa.RecordBatch.from_pylist([self.to_columns(row) for row in rows], schema=self.schema)


def _texts_of_chat(row: Conversation) -> dict[str, str]:
    found: dict[str, str] = {}
    for at, message in enumerate(row.messages):
        content = message.get("content")
        if type(content) is str and len(message) == len(_PLAIN_MESSAGE):  # the only other field is its role
            found[f"messages[{at}].content"] = content
        else:
            found.update(texts_in(message, f"messages[{at}]", _FIXED_WORDS))
    if row.tools:
        found.update(texts_in(row.tools, "tools"))
    if row.template_kwargs:
        found.update(texts_in(row.template_kwargs, "chat_template_kwargs"))
    return found


def _chat_with_texts(row: Conversation, given: Mapping[str, str]) -> Conversation:
    return replace(
        row,
        messages=with_texts_in(row.messages, "messages", given),
        tools=with_texts_in(row.tools, "tools", given),
        template_kwargs=with_texts_in(row.template_kwargs, "chat_template_kwargs", given),
    )


def _chat_columns(row: Conversation) -> dict[str, Any]:
    return {
        "messages": [_message_columns(each) for each in row.messages],
        "learned": list(row.learned),
        "tools": None if row.tools is None else orjson.dumps(row.tools).decode(),
        "chat_template_kwargs": orjson.dumps(dict(row.template_kwargs)).decode() if row.template_kwargs else None,
        "weight": row.weight,
    }


def _message_columns(message: Message) -> dict[str, Any]:
    """Return a message's columns. fields: JSON of all that it has, in its order and with null for role and content;
    nothing where it has these alone, as nearly all have."""
    fields = None
    if list(message) != _PLAIN_MESSAGE:
        fields = {name: None if name in _PLAIN_MESSAGE else value for name, value in message.items()}
    return {
        "role": message["role"],
        "content": message.get("content"),
        "fields": None if fields is None else orjson.dumps(fields).decode(),
    }


def _chat_of_columns(columns: Mapping[str, Any]) -> Conversation:
    tools, kwargs = columns["tools"], columns["chat_template_kwargs"]
    return Conversation(
        [_message_of_columns(each) for each in columns["messages"]],
        tuple(columns["learned"]),
        None if tools is None else orjson.loads(tools),
        {} if kwargs is None else orjson.loads(kwargs),
        columns["weight"],
    )


def _message_of_columns(columns: Mapping[str, Any]) -> Message:
    said = {"role": columns["role"], "content": columns["content"]}
    if columns["fields"] is None:
        return said
    fields: Message = orjson.loads(columns["fields"])
    return fields | {name: each for name, each in said.items() if name in fields}


def _said_by_messages(row: Conversation) -> list[SaidText]:
    return [SaidText(_lines(message), learned) for message, learned in zip(row.messages, row.learned, strict=True)]


def _lines(message: Message) -> str:
    """Return a message as lines, each part after its name; what is no text as JSON."""
    content = message.get("content")
    lines = [f"{message['role']}: {'' if content is None else content}\n"]
    for name, value in message.items():
        if name not in ("role", "content"):
            lines.append(f"{name}: {value if isinstance(value, str) else orjson.dumps(value).decode()}\n")
    return "".join(lines)


def _tokens_of_completions(model: "Model", rows: Sequence[Completion], learn_all: bool) -> list[Tokens]:
    require_end_token(model)
    require_stop_at_end_token(model)
    return model.tokenizer.completions(rows, learn_all)


def _tokens_of_texts(model: "Model", rows: Sequence[Text], _: bool) -> list[Tokens]:
    return [of_document(ids) for ids in model.tokenizer.texts([row.text for row in rows])]


def _pieces_of_text(tokens: Tokens, limit: int, breaks: Breaks) -> list[Tokens]:
    return [of_document(piece) for piece in split(tokens.ids, limit, breaks)]


CHAT = Kind[Conversation](
    name="chat",
    formats=frozenset(each for each in DatasetFormat if each is not DatasetFormat.TEXT),
    texts=_texts_of_chat,
    with_texts=_chat_with_texts,
    content=lambda row: [row.messages, row.learned, row.tools, dict(row.template_kwargs)],
    has_answer=lambda row: any(row.learned),
    columns=pa.schema(
        [
            (
                "messages",
                pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("fields", pa.string())])),
            ),
            ("learned", pa.list_(pa.bool_())),
            ("tools", pa.string()),
            ("chat_template_kwargs", pa.string()),
            ("weight", pa.float64()),
        ]
    ),
    to_columns=_chat_columns,
    from_columns=_chat_of_columns,
    said=_said_by_messages,
    conversation=lambda row: row,
    nested=lambda row: {"messages": row.messages, "tools": row.tools, "chat_template_kwargs": row.template_kwargs},
    contents=lambda row: [each.get("content") or "" for each in row.messages],
)
COMPLETION = Kind[Completion](
    name="completion",
    formats=frozenset((DatasetFormat.PROMPT_COMPLETION,)),
    texts=lambda row: {"prompt": row.prompt, "completion": row.completion},
    with_texts=lambda row, given: replace(row, **given),
    content=lambda row: [row.prompt, row.completion],
    has_answer=lambda _: True,
    columns=pa.schema([("prompt", pa.string()), ("completion", pa.string()), ("weight", pa.float64())]),
    to_columns=lambda row: {"prompt": row.prompt, "completion": row.completion, "weight": row.weight},
    from_columns=lambda columns: Completion(**columns),
    said=lambda row: [SaidText(row.prompt, False), SaidText(row.completion, True)],
    untemplated=Untemplated(tokens=_tokens_of_completions, cut=without_beginning),
    only_fields=frozenset(("prompt", "completion", "weight")),
)
TEXT = Kind[Text](
    name="text",
    formats=frozenset((DatasetFormat.TEXT,)),
    texts=lambda row: {"text": row.text},
    with_texts=lambda row, given: replace(row, **given),
    content=lambda row: row.text.encode(),
    has_answer=lambda _: True,
    columns=pa.schema([("text", pa.string()), ("weight", pa.float64())]),
    to_columns=lambda row: {"text": row.text, "weight": row.weight},
    from_columns=lambda columns: Text(**columns),
    said=lambda row: [SaidText(row.text, True)],
    untemplated=Untemplated(
        tokens=_tokens_of_texts,
        cut=lambda tokens, limit, _: of_document(tokens.ids[:limit]),
        pieces=_pieces_of_text,
    ),
)

KINDS: dict[type, Kind[Any]] = {Conversation: CHAT, Completion: COMPLETION, Text: TEXT}  # by the class of the row


def kind_of(row: Row) -> Kind[Any]:
    """Return the kind of a row."""
    return KINDS[type(row)]


def conversation_of(row: Row) -> Conversation | None:
    """Return what the chat template renders of a row; None where it renders nothing."""
    conversation = kind_of(row).conversation
    return None if conversation is None else conversation(row)


def is_rendered(row: Row) -> bool:
    """Whether a chat template renders the row."""
    return kind_of(row).conversation is not None


def texts(row: Row) -> dict[str, str]:
    """Return all texts that a row's writer wrote, by the path of the field."""
    return kind_of(row).texts(row)


def with_texts(row: Row, given: Mapping[str, str]) -> Row:
    """Return the row with the texts at these paths replaced. Raises KeyError for a path at which it has no text."""
    unknown = given.keys() - texts(row).keys()
    if unknown:
        raise KeyError(f"no text is at {min(unknown)}")
    return kind_of(row).with_texts(row, given)


def from_arrow(batch: ArrowBatch) -> list[Row]:
    """Return the rows of a batch that a kind's `to_arrow` made."""
    name = (batch.schema.metadata or {})[_NAME].decode()
    kind = next(each for each in KINDS.values() if each.name == name)
    return [kind.from_columns(columns) for columns in cast(list[dict[str, Any]], batch.to_pylist())]


def content_hash(row: Row) -> bytes | Broken:
    """16 bytes over the row's canonical JSON: equal for rows that say the same, whatever file they are in.

    Its weight is no part of that: of rows that say the same with other weights one may be held out, and then none of
    the others may be learned."""
    try:
        said = kind_of(row).content(row)
        content = said if isinstance(said, bytes) else orjson.dumps(said, option=orjson.OPT_SORT_KEYS)
    except (orjson.JSONEncodeError, UnicodeEncodeError):
        large = _beyond_64_bits(row)
        if large is not None:
            detail = "a whole number beyond 64 bits, which a server would not give back; write it as a text"
            return Broken(Problem.OUT_OF_RANGE, large, detail)
        return Broken(Problem.WRONG_TYPE, detail="holds a value that JSON has not; write it as a text")
    return hashlib.blake2b(content, digest_size=16).digest()


def _beyond_64_bits(row: Row) -> str | None:
    """Return the path of a whole number that is too large for what reads and writes JSON here."""
    numbers = (each for name, value in kind_of(row).nested(row).items() for each in whole_numbers_in(value, name))
    return next((path for path, number in numbers if not -(2**63) <= number < 2**64), None)
