"""One row: from a decoded object to a checked conversation, completion or text."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import orjson

from finetune_api.job import DatasetFormat
from finetune_api.row_words import MAX_MESSAGES
from finetune_trainer.data.problems import Broken, Problem

Message = dict[str, Any]

# Fields that change what should be learned. Going on without them would train something else than was asked for.
_UNSUPPORTED_IN_ROW = ("tools", "functions")
_UNSUPPORTED_IN_MESSAGE = ("tool_calls", "function_call", "weight", "train")
_READ = {
    DatasetFormat.MESSAGES: ("messages",),
    DatasetFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    DatasetFormat.TEXT: ("text",),
}
FIELDS = ("messages", "prompt", "completion", "text", *_UNSUPPORTED_IN_ROW)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages to render by the chat template, in OpenAI's form.

    learned: one for each message; True only for an assistant's that is to be learned. tools: what the model may call,
    as JSON schemas; template_kwargs: what the row itself hands to the template."""

    messages: list[Message]
    learned: tuple[bool, ...]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its continuation, both plain text."""

    prompt: str
    completion: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Text:
    """A document."""

    text: str
    weight: float = 1.0


Row = Conversation | Completion | Text


def check(value: object, data_format: DatasetFormat) -> Row | Broken:
    """Check one decoded row against its format; the first problem found is returned. A field's value may be Broken."""
    if not isinstance(value, dict):
        return Broken(Problem.NOT_AN_OBJECT)
    row = cast(dict[str, Any], value)
    if data_format is DatasetFormat.TEXT:
        problem = _check_string(row.get("text"), "text")
        return problem or Text(row["text"])
    for field in _UNSUPPORTED_IN_ROW:
        if row.get(field):
            return Broken(Problem.UNSUPPORTED_FIELD, field)
    if data_format is DatasetFormat.MESSAGES:
        return _conversation(row.get("messages"), "messages", None, "")
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        return _conversation(prompt, "prompt", completion, "completion")
    problem = _check_string(prompt, "prompt") or _check_string(completion, "completion")
    return problem or Completion(cast(str, prompt), cast(str, completion))


def ignored(names: Iterable[str], data_format: DatasetFormat) -> list[str]:
    """Fields of a row that are not read; empty `tools` are no loss."""
    return [name for name in names if name not in _READ[data_format] and name not in _UNSUPPORTED_IN_ROW]


def _check_string(value: object, field: str) -> Broken | None:
    if value is None:
        return Broken(Problem.MISSING_FIELD, field)
    if isinstance(value, Broken):
        return value
    if not isinstance(value, str):
        return Broken(Problem.WRONG_TYPE, field, "must be a string")
    if "\0" in value:
        return Broken(Problem.NUL, field)
    if not value or value.isspace():
        return Broken(Problem.EMPTY, field)
    return None


def _conversation(first: object, first_field: str, second: object, second_field: str) -> Conversation | Broken:
    """Check one list of messages, or a prompt and a completion that are lists of messages."""
    parts = [(first, first_field), (second, second_field)] if second_field else [(first, first_field)]
    messages: list[Message] = []
    learn_from = 0
    expected = ("system", "user", "assistant")
    for value, field in parts:
        if value is None:
            return Broken(Problem.MISSING_FIELD, field)
        if isinstance(value, Broken):
            return value
        if not isinstance(value, list):
            return Broken(Problem.WRONG_TYPE, field, "must be a list of messages")
        if not value:
            return Broken(Problem.EMPTY, field)
        learn_from = len(messages)
        for index, item in enumerate(cast(list[object], value)):
            message = _check_message(item, field, index)
            if isinstance(message, Broken):
                return message
            role = message["role"]
            if role not in expected[: 2 if not messages else 3]:
                return Broken(Problem.ROLES_NOT_ALTERNATING, f"{field}[{index}].role")
            expected = ("user",) if role in ("system", "assistant") else ("assistant",)
            messages.append(message)
        if len(messages) > MAX_MESSAGES:
            return Broken(Problem.TOO_MANY_MESSAGES, field)
    last_field = second_field or first_field
    if all(message["role"] != "assistant" for message in messages[learn_from:]):
        return Broken(Problem.NO_ASSISTANT, last_field)
    if messages[-1]["role"] != "assistant":
        return Broken(Problem.LAST_NOT_ASSISTANT, last_field)
    learned = [index >= learn_from and message["role"] == "assistant" for index, message in enumerate(messages)]
    return Conversation(messages, tuple(learned))


def _check_message(value: object, field: str, index: int) -> Message | Broken:
    """One message without its null fields, as transformers hands it to the template."""
    if not isinstance(value, dict):
        return Broken(Problem.WRONG_TYPE, f"{field}[{index}]", "must be an object with role and content")
    message: Message = {key: item for key, item in cast(Message, value).items() if item is not None}
    role, content = message.get("role"), message.get("content")
    if role is None:
        return Broken(Problem.MISSING_FIELD, f"{field}[{index}].role")
    if role not in ("user", "assistant", "system"):
        return Broken(Problem.UNKNOWN_ROLE, f"{field}[{index}].role")
    if len(message) > 2:
        for name in _UNSUPPORTED_IN_MESSAGE:
            if name in message:
                return Broken(Problem.UNSUPPORTED_FIELD, f"{field}[{index}].{name}")
    problem = _check_string(content, f"{field}[{index}].content")
    if problem and not (problem.problem is Problem.EMPTY and role == "system"):
        return problem
    return message


def content_hash(row: Row) -> bytes | Broken:
    """16 bytes over the row's canonical JSON: equal for rows that say the same, whatever file they are in."""
    try:
        if isinstance(row, Text):
            content = row.text.encode()
        elif isinstance(row, Completion):
            content = orjson.dumps([row.prompt, row.completion])
        else:
            said = [row.messages, row.learned, row.tools, dict(row.template_kwargs)]
            content = orjson.dumps(said, option=orjson.OPT_SORT_KEYS)
    except (orjson.JSONEncodeError, UnicodeEncodeError):
        # Only Parquet can hold such values, in fields of a message that are no part of its words.
        return Broken(Problem.WRONG_TYPE, "messages", "holds a value that is not JSON")
    return hashlib.blake2b(content, digest_size=16).digest()
