"""What a row is once it has been read: a conversation, a completion or a text, and the hash of what it says."""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from finetune_trainer.data.problems import Broken, Problem

Message = dict[str, Any]


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


def content_hash(row: Row) -> bytes | Broken:
    """16 bytes over the row's canonical JSON: equal for rows that say the same, whatever file they are in.

    Its weight is no part of that: of rows that say the same with other weights one may be held out, and then none of
    the others may be learned."""
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
