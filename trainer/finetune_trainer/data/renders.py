"""Parts of one conversation as text: what comes before an answer as a server sends it, and all through the answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune_trainer.data.sequences import Note
from finetune_trainer.data.template import ChatTemplate, Message


class AnswerError(Exception):
    """An answer cannot be learned as it would be served. message: its index."""

    def __init__(self, message: int) -> None:
        super().__init__(message)
        self.message = message


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation as the template gets it. learned: for each message, whether its answer is learned."""

    messages: list[Message]
    learned: Sequence[bool]
    tools: list[dict[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def last_learned(self) -> int:
        return max(index for index, learned in enumerate(self.learned) if learned)


class Renders:
    """Renders parts of one conversation, the whole of it once for the same variables. notes: what was done to it."""

    def __init__(self, template: ChatTemplate, chat: Chat) -> None:
        self.template = template
        self.chat = chat
        self.notes = set[Note]()
        self._wholes: list[tuple[Mapping[str, Any], str]] = []

    def whole(self, variables: Mapping[str, Any]) -> str:
        for known, text in self._wholes:
            if known == variables:
                return text
        text = self.of(self.chat.messages, variables)
        self._wholes.append((variables, text))
        return text

    def context(self, index: int, variables: Mapping[str, Any]) -> str:
        """Return what a server sends for the answer at `index`."""
        return self.of(self.chat.messages[:index], variables, prompt=True)

    def finished(self, index: int, variables: Mapping[str, Any]) -> str:
        """Return the conversation that ends with the answer at `index`."""
        if index == len(self.chat.messages) - 1:
            return self.whole(variables)
        return self.of(self.chat.messages[: index + 1], variables)

    def of(self, messages: list[Message], variables: Mapping[str, Any], prompt: bool = False) -> str:
        return self.template.render(messages, prompt, self.chat.tools, variables)
