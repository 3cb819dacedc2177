"""What a row is once it has been read: a conversation, a text, a pair of answers, … `kinds` says what each has."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


Answered = Conversation | Completion  # a prompt with one answer, which is all that is learned of it


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, of which somebody prefers the first: both conversations, or both plain text."""

    chosen: Answered
    rejected: Answered
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Thumb:
    """An answer to a prompt, and whether somebody finds it good."""

    answer: Answered
    is_good: bool
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class RankedPair:
    """Two answers of a ranking, by their places."""

    chosen: int
    rejected: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """Answers to one prompt with their scores, and the pairs of them that are learned."""

    answers: tuple[Answered, ...]
    scores: tuple[float, ...]
    pairs: tuple[RankedPair, ...]
    weight: float = 1.0


Row = Conversation | Completion | Text | Pair | Thumb | Ranking
