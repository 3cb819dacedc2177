"""Parts of one conversation as text: what comes before an answer as a server sends it, and all through the answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune_trainer.data.sequences import Note
from finetune_trainer.data.template import ChatTemplate, Message
from finetune_trainer.data.turnwise import ByTurns


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


@dataclass(slots=True)
class _Known:
    """What is known of the conversation with some variables. by_turns: None where the template does not write so."""

    variables: Mapping[str, Any]
    by_turns: ByTurns | None
    whole: str | None
    prompt: str | None = None


class Renders:
    """Renders parts of one conversation, the whole of it once for the same variables. notes: what was done to it.

    Where the template writes one message after another, parts are cut out of the whole."""

    def __init__(self, template: ChatTemplate, chat: Chat) -> None:
        self.template = template
        self.chat = chat
        self.notes = set[Note]()
        self._all_known: list[_Known] = []

    def whole(self, variables: Mapping[str, Any]) -> str:
        known = self._known(variables)
        if known.whole is None:
            known.whole = self.of(self.chat.messages, variables)
        return known.whole

    def context(self, index: int, variables: Mapping[str, Any]) -> str:
        """Return what a server sends for the answer at `index`."""
        known = self._known(variables)
        begin = known.by_turns and known.by_turns.through(index)
        if begin is not None and known.prompt is None:
            known.prompt = self.template.prompt_after(self.chat.messages[:index], self.chat.tools, variables)
        if begin is None or known.prompt is None:
            return self.of(self.chat.messages[:index], variables, prompt=True)
        return begin + known.prompt

    def finished(self, index: int, variables: Mapping[str, Any]) -> str:
        """Return the conversation that ends with the answer at `index`."""
        if index == len(self.chat.messages) - 1:
            return self.whole(variables)
        by_turns = self._known(variables).by_turns
        begin = by_turns and by_turns.through(index + 1)
        if by_turns is None or begin is None:
            return self.of(self.chat.messages[: index + 1], variables)
        return begin + by_turns.ending

    def of(self, messages: list[Message], variables: Mapping[str, Any], prompt: bool = False) -> str:
        return self.template.render(messages, prompt, self.chat.tools, variables)

    def _known(self, variables: Mapping[str, Any]) -> _Known:
        for known in self._all_known:
            if known.variables is variables or known.variables == variables:
                return known
        by_turns = self.template.by_turns(self.chat.messages, False, self.chat.tools, variables)
        self._all_known.append(_Known(variables, by_turns, by_turns and by_turns.text))
        return self._all_known[-1]
