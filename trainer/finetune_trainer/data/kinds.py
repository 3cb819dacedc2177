"""The kinds of rows, each in one place: its texts, what equal rows have in common, Arrow columns, how it is tokenised.

Whatever looks at rows of any kind asks here, and never which kind it is. A new kind is a class of rows, a shape that
becomes it (`shapes`), and an entry of KINDS; CONTRIBUTING.md says what else.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import orjson
import pyarrow as pa

from finetune_api.job import DatasetFormat
from finetune_trainer.data.cuts import Marks, split
from finetune_trainer.data.end_token import require_end_token, require_stop_at_end_token
from finetune_trainer.data.kind import KIND_NAME, ArrowBatch, Kind, Members, SaidText, Untemplated
from finetune_trainer.data.normal_text import normalised
from finetune_trainer.data.problems import Broken, Drop, Problem
from finetune_trainer.data.rows import (
    Answered,
    Completion,
    Conversation,
    Message,
    Pair,
    RankedPair,
    Ranking,
    Row,
    Text,
    Thumb,
)
from finetune_trainer.data.shingles import Compared
from finetune_trainer.data.texts import texts_in, whole_numbers_in, with_texts_in
from finetune_trainer.data.tokens import Tokens, of_document
from finetune_trainer.data.too_long import without_beginning

if TYPE_CHECKING:  # whose tokenizer counts special tokens in the texts of rows
    from finetune_trainer.data.model_facts import Model

_PLAIN_MESSAGE = ["role", "content"]
_FIXED_WORDS = frozenset(("role",))  # of a message: no text of anybody's
_SYSTEM_ROLES = frozenset(("system", "developer"))


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


def _answers_of_chat(row: Conversation) -> list[str]:
    learned = (message for message, is_learned in zip(row.messages, row.learned, strict=True) if is_learned)
    return [each.get("content") or "" for each in learned if not each.get("tool_calls")]


def _lines(message: Message) -> str:
    """Return a message as lines, each part after its name; what is no text as JSON."""
    content = message.get("content")
    lines = [f"{message['role']}: {'' if content is None else content}\n"]
    for name, value in message.items():
        if name not in ("role", "content"):
            lines.append(f"{name}: {value if isinstance(value, str) else orjson.dumps(value).decode()}\n")
    return "".join(lines)


def _chat_compared(row: Conversation) -> Compared:
    """Return what is compared of a conversation: what is learned beside all else but system messages."""
    texts: dict[bool, list[str]] = {False: [], True: []}
    for message, learned in zip(row.messages, row.learned, strict=True):
        if message["role"] not in _SYSTEM_ROLES:
            texts[learned].append("\n".join(each.text for each in texts_in(message, "", _FIXED_WORDS)))
    return Compared(texts[False], ("\n".join(texts[True]),))


def _tokens_of_completions(model: "Model", rows: Sequence[Completion], learn_all: bool) -> list[Tokens]:
    require_end_token(model)
    require_stop_at_end_token(model)
    return model.tokenizer.completions(rows, learn_all)


def _tokens_of_texts(model: "Model", rows: Sequence[Text], _: bool) -> list[Tokens]:
    return [of_document(ids) for ids in model.tokenizer.texts([row.text for row in rows])]


def _pieces_of_text(tokens: Tokens, limit: int, marks: Marks, with_headings: bool) -> list[Tokens]:
    return [of_document(*piece) for piece in split(tokens.ids, limit, marks, with_headings)]


_OF_CHATS = frozenset(
    (
        DatasetFormat.MESSAGES,
        DatasetFormat.SHARE_GPT,
        DatasetFormat.ALPACA,
        DatasetFormat.DOLLY,
        DatasetFormat.QUESTION_ANSWER,
        DatasetFormat.PROMPT_COMPLETION,
    )
)
CHAT = Kind[Conversation](
    name="chat",
    formats=_OF_CHATS,
    texts=_texts_of_chat,
    with_texts=_chat_with_texts,
    content=lambda row: [row.messages, row.learned, row.tools, dict(row.template_kwargs)],
    unlearnable=lambda row: None if any(row.learned) else Drop.NO_LABEL,
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
    prompt=lambda row: [row.messages[:-1], row.tools, dict(row.template_kwargs)],
    answers=_answers_of_chat,
    compared=_chat_compared,
)
COMPLETION = Kind[Completion](
    name="completion",
    formats=frozenset((DatasetFormat.PROMPT_COMPLETION,)),
    texts=lambda row: {"prompt": row.prompt, "completion": row.completion},
    with_texts=lambda row, given: replace(row, **given),
    content=lambda row: [row.prompt, row.completion],
    unlearnable=lambda _: None,
    columns=pa.schema([("prompt", pa.string()), ("completion", pa.string()), ("weight", pa.float64())]),
    to_columns=lambda row: {"prompt": row.prompt, "completion": row.completion, "weight": row.weight},
    from_columns=lambda columns: Completion(**columns),
    said=lambda row: [SaidText(row.prompt, False), SaidText(row.completion, True)],
    untemplated=Untemplated(tokens=_tokens_of_completions, cut=without_beginning),
    only_fields=lambda _: frozenset(("prompt", "completion", "weight")),
    prompt=lambda row: row.prompt,
    answers=lambda row: [row.completion],
    compared=lambda row: Compared((row.prompt,), (row.completion,)),
)
TEXT = Kind[Text](
    name="text",
    formats=frozenset((DatasetFormat.TEXT,)),
    texts=lambda row: {"text": row.text},
    with_texts=lambda row, given: replace(row, **given),
    content=lambda row: row.text,
    unlearnable=lambda _: None,
    columns=pa.schema([("text", pa.string()), ("weight", pa.float64())]),
    to_columns=lambda row: {"text": row.text, "weight": row.weight},
    from_columns=lambda columns: Text(**columns),
    said=lambda row: [SaidText(row.text, True)],
    compared=lambda row: Compared((), (row.text,)),
    untemplated=Untemplated(
        tokens=_tokens_of_texts,
        cut=lambda tokens, limit, _: of_document(tokens.ids[:limit]),
        pieces=_pieces_of_text,
    ),
)


# Kinds whose members are learned in their place: each is a conversation, or a plain prompt and its completion.
_MEMBER_COLUMN = pa.struct([(kind.name, pa.struct(list(kind.columns))) for kind in (CHAT, COMPLETION)])


def _member_columns(row: Answered) -> dict[str, Any]:
    kind = kind_of(row)
    return {kind.name: kind.to_columns(row)}


def _member_of_columns(columns: Mapping[str, Any]) -> Any:
    kind = next(kind for kind in (CHAT, COMPLETION) if columns[kind.name] is not None)
    return kind.from_columns(columns[kind.name])


def _texts_of_members(members: Mapping[str, Answered]) -> dict[str, str]:
    """Return the texts of rows inside a row. members: by the beginning of their texts' paths."""
    return {f"{name}.{path}": said for name, row in members.items() for path, said in texts(row).items()}


def _member_with_texts(name: str, row: Any, given: Mapping[str, str]) -> Any:
    begin = f"{name}."
    own = {path[len(begin) :]: said for path, said in given.items() if path.startswith(begin)}
    return kind_of(row).with_texts(row, own)


def _nested_of_members(members: Mapping[str, Answered]) -> dict[str, Any]:
    return {f"{name}.{path}": each for name, row in members.items() for path, each in kind_of(row).nested(row).items()}


def _answers_of(row: Answered) -> Sequence[str]:
    return kind_of(row).answers(row)


def _content(row: Answered) -> object:
    return kind_of(row).content(row)


def _sides(row: Pair) -> dict[str, Answered]:
    return {"chosen": row.chosen, "rejected": row.rejected}


def _answer(row: Thumb) -> dict[str, Answered]:
    return {"answer": row.answer}


def _members_compared(members: Sequence[Answered]) -> Compared:
    """Return what is compared of answers to one prompt, each being told from the others by its place."""
    every = [compared(each) for each in members]
    return Compared(every[0].asked, ["\n".join(each.said) for each in every])


_PLAIN_PAIR = frozenset(("chosen", "rejected", "weight"))  # beside the prompt
_PLAIN_RANKING = frozenset(("weight",))  # beside the prompt, the answers and their scores
PAIR = Kind[Pair](
    name="pair",
    formats=frozenset((DatasetFormat.PAIR, DatasetFormat.RANKING)),  # whoever takes pairs takes those of rankings
    texts=lambda row: _texts_of_members(_sides(row)),
    with_texts=lambda row, given: replace(
        row, **{name: _member_with_texts(name, each, given) for name, each in _sides(row).items()}
    ),
    content=lambda row: [_content(row.chosen), _content(row.rejected)],
    unlearnable=lambda row: Drop.EQUAL_ANSWERS if _content(row.chosen) == _content(row.rejected) else None,
    columns=pa.schema([("chosen", _MEMBER_COLUMN), ("rejected", _MEMBER_COLUMN), ("weight", pa.float64())]),
    to_columns=lambda row: {
        "chosen": _member_columns(row.chosen),
        "rejected": _member_columns(row.rejected),
        "weight": row.weight,
    },
    from_columns=lambda columns: Pair(
        _member_of_columns(columns["chosen"]), _member_of_columns(columns["rejected"]), columns["weight"]
    ),
    members=Members(rows=lambda row: (row.chosen, row.rejected), names=lambda _: ("chosen", "rejected")),
    only_fields=lambda row: _PLAIN_PAIR if isinstance(row.chosen, Completion) else None,
    nested=lambda row: _nested_of_members(_sides(row)),
    contents=lambda row: [*kind_of(row.chosen).contents(row.chosen), *kind_of(row.rejected).contents(row.rejected)],
    answers=lambda row: _answers_of(row.chosen),
    compared=lambda row: _members_compared((row.chosen, row.rejected)),
)
THUMB = Kind[Thumb](
    name="thumb",
    formats=frozenset((DatasetFormat.THUMB,)),
    texts=lambda row: _texts_of_members(_answer(row)),
    with_texts=lambda row, given: replace(row, answer=_member_with_texts("answer", row.answer, given)),
    content=lambda row: [_content(row.answer), row.is_good],
    unlearnable=lambda row: kind_of(row.answer).unlearnable(row.answer),
    columns=pa.schema([("answer", _MEMBER_COLUMN), ("is_good", pa.bool_()), ("weight", pa.float64())]),
    to_columns=lambda row: {"answer": _member_columns(row.answer), "is_good": row.is_good, "weight": row.weight},
    from_columns=lambda columns: Thumb(_member_of_columns(columns["answer"]), columns["is_good"], columns["weight"]),
    members=Members(rows=lambda row: (row.answer,), names=lambda row: ("good" if row.is_good else "bad",)),
    nested=lambda row: _nested_of_members(_answer(row)),
    contents=lambda row: kind_of(row.answer).contents(row.answer),
    label=lambda row: 1 if row.is_good else -1,
    prompt=lambda row: kind_of(row.answer).prompt(row.answer),
    answers=lambda row: _answers_of(row.answer) if row.is_good else (),
    compared=lambda row: compared(row.answer),
)


def _answers(row: Ranking) -> dict[str, Answered]:
    return {f"answers[{at}]": each for at, each in enumerate(row.answers)}


def _ranking_with_texts(row: Ranking, given: Mapping[str, str]) -> Ranking:
    return replace(row, answers=tuple(_member_with_texts(name, each, given) for name, each in _answers(row).items()))


def _no_pair_of(row: Ranking) -> Drop | None:
    """Return why a ranking makes no pair, if it makes none."""
    if row.pairs:
        return None
    if len(row.answers) == 1:
        return Drop.ONE_ANSWER
    if min(row.scores) == max(row.scores):
        return Drop.TIED
    first = _content(row.answers[0])
    return Drop.EQUAL_ANSWERS if all(_content(each) == first for each in row.answers) else Drop.SMALL_MARGIN


def _ranking_compared(row: Ranking) -> Compared:
    """Return what is compared of a ranking: its answers from the best on."""
    best_first = sorted(range(len(row.answers)), key=lambda place: -row.scores[place])
    return _members_compared([row.answers[place] for place in best_first])


RANKING = Kind[Ranking](
    name="ranking",
    formats=frozenset((DatasetFormat.RANKING,)),
    texts=lambda row: _texts_of_members(_answers(row)),
    with_texts=_ranking_with_texts,
    content=lambda row: [[_content(each) for each in row.answers], row.scores],
    unlearnable=_no_pair_of,
    columns=pa.schema(
        [
            ("answers", pa.list_(_MEMBER_COLUMN)),
            ("scores", pa.list_(pa.float64())),
            ("pairs", pa.list_(pa.struct([("chosen", pa.int32()), ("rejected", pa.int32())]))),
            ("weight", pa.float64()),
        ]
    ),
    to_columns=lambda row: {
        "answers": [_member_columns(each) for each in row.answers],
        "scores": list(row.scores),
        "pairs": [{"chosen": each.chosen, "rejected": each.rejected} for each in row.pairs],
        "weight": row.weight,
    },
    from_columns=lambda columns: Ranking(
        tuple(_member_of_columns(each) for each in columns["answers"]),
        tuple(columns["scores"]),
        tuple(RankedPair(**each) for each in columns["pairs"]),
        columns["weight"],
    ),
    members=Members(
        rows=lambda row: [row.answers[at] for pair in row.pairs for at in (pair.chosen, pair.rejected)],
        names=lambda _: ("chosen", "rejected"),
    ),
    only_fields=lambda row: _PLAIN_RANKING if isinstance(row.answers[0], Completion) else None,
    nested=lambda row: _nested_of_members(_answers(row)),
    contents=lambda row: [said for each in row.answers for said in kind_of(each).contents(each)],
    answers=lambda row: _answers_of(row.answers[max(range(len(row.scores)), key=row.scores.__getitem__)]),
    compared=_ranking_compared,
)

KINDS: dict[type, Kind[Any]] = {  # by the class of the row
    Conversation: CHAT,
    Completion: COMPLETION,
    Text: TEXT,
    Pair: PAIR,
    Thumb: THUMB,
    Ranking: RANKING,
}


def kind_of(row: Row) -> Kind[Any]:
    """Return the kind of a row."""
    return KINDS[type(row)]


def members_of(row: Row) -> Sequence[Row]:
    """Return the rows that a row is learned as, all of one kind and none with members: as a rule the row itself."""
    members = kind_of(row).members
    return (row,) if members is None else members.rows(row)


def member_names(row: Row) -> tuple[str, ...]:
    """Return what is said of each member of one example; an empty name where it is the row itself."""
    members = kind_of(row).members
    return ("",) if members is None else members.names(row)


def conversations_of(row: Row) -> list[Conversation]:
    """Return what the chat template renders of a row, one conversation for each member; nothing where none is."""
    ways = ((kind_of(member).conversation, member) for member in members_of(row))
    return [conversation(member) for conversation, member in ways if conversation is not None]


def texts(row: Row) -> dict[str, str]:
    """Return all texts that a row's writer wrote, by the path of the field."""
    return kind_of(row).texts(row)


def with_texts(row: Row, given: Mapping[str, str]) -> Row:
    """Return the row with the texts at these paths replaced. Raises KeyError for a path at which it has no text."""
    unknown = given.keys() - texts(row).keys()
    if unknown:
        raise KeyError(f"no text is at {min(unknown)}")
    return kind_of(row).with_texts(row, given)


def whole_numbers(row: Row) -> Iterator[tuple[str, int]]:
    """Yield the whole numbers in its fields that are any JSON, each with the path of its field."""
    for name, value in kind_of(row).nested(row).items():
        yield from ((path, each) for path, each in whole_numbers_in(value, name) if not isinstance(each, bool))


def with_values(row: Row, given: Mapping[str, str]) -> Row:
    """Return the row with texts in the place of texts and whole numbers. Raises KeyError where it has neither."""
    unknown = given.keys() - texts(row).keys() - {path for path, _ in whole_numbers(row)}
    if unknown:
        raise KeyError(f"no text or number is at {min(unknown)}")
    return kind_of(row).with_texts(row, given)


def compared(row: Row) -> Compared:
    """Return what is compared of a row, to find its near copies."""
    return kind_of(row).compared(row)


def from_arrow(batch: ArrowBatch) -> list[Row]:
    """Return the rows of a batch that a kind's `to_arrow` made."""
    name = (batch.schema.metadata or {})[KIND_NAME].decode()
    kind = next(each for each in KINDS.values() if each.name == name)
    return [kind.from_columns(columns) for columns in cast(list[dict[str, Any]], batch.to_pylist())]


def content_hash(row: Row) -> bytes | Broken:
    """16 bytes over the row's canonical JSON, with texts as they are compared: equal for rows that say the same,
    whatever file they are in.

    Its weight is no part of that: of rows that say the same with other weights one may be held out, and then none of
    the others may be learned."""
    try:
        said = normalised(kind_of(row).content(row))
        content = said.encode() if isinstance(said, str) else orjson.dumps(said, option=orjson.OPT_SORT_KEYS)
    except (orjson.JSONEncodeError, UnicodeEncodeError):
        large = _beyond_64_bits(row)
        if large is not None:
            detail = "a whole number beyond 64 bits, which a server would not give back; write it as a text"
            return Broken(Problem.OUT_OF_RANGE, large, detail)
        return Broken(Problem.WRONG_TYPE, detail="holds a value that JSON has not; write it as a text")
    return hashlib.blake2b(content, digest_size=16).digest()


def prompt_hash(row: Row) -> bytes:
    """16 bytes over what a row's answer answers; the row has a `content_hash`."""
    said = orjson.dumps(kind_of(row).prompt(row), option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(said, digest_size=16, person=b"prompt").digest()


def _beyond_64_bits(row: Row) -> str | None:
    """Return the path of a whole number that is too large for what reads and writes JSON here."""
    numbers = (each for name, value in kind_of(row).nested(row).items() for each in whole_numbers_in(value, name))
    return next((path for path, number in numbers if not -(2**63) <= number < 2**64), None)
