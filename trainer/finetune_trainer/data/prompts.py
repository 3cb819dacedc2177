"""What a server gives for one answer: the context that it sends, and the answer that it is to get back."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from finetune_trainer.data.reasoning import (
    REASONING_BLOCKS,
    WITH_REASONING,
    WITHOUT_REASONING,
    begin_of_empty_block,
    empty_block,
    opened_by,
    reasoning_of,
    without_fields,
    without_reasoning,
)
from finetune_trainer.data.renders import AnswerError, Renders
from finetune_trainer.data.sequences import Note, Place
from finetune_trainer.data.stops import Ends, ended
from finetune_trainer.data.template import Message


class AnswerNotFoundError(AnswerError):
    """What the template writes for the answer does not follow the prompt that a server would send."""


class NoReasoningError(AnswerError):
    """The prompt opens a block of reasoning, which the row has none for, and there is no prompt without it."""


class Served(NamedTuple):
    """One answer: what a server sends, what it is to get back, and the template's variables that say so."""

    message: int
    context: str
    answer: str
    variables: Mapping[str, Any]


def continues(whole: str, served: Served) -> bool:
    """Whether the whole conversation's text begins with an answer's context and the answer."""
    return whole.startswith(served.context) and whole.startswith(served.answer, len(served.context))


def place_of(served: Served, sequence: int) -> Place:
    """Return where an answer stands in its sequence."""
    return Place(served.message, sequence, len(served.context), len(served.context) + len(served.answer))


class Server:
    """Finds how answers of one conversation are served."""

    def __init__(self, renders: Renders, ends: Ends) -> None:
        self._renders = renders
        self._chat = renders.chat
        self._ends = ends

    def served(self, index: int, variables: Mapping[str, Any]) -> Served:
        """Return how the answer at `index` is served. Raises AnswerError.

        By the template's own default, or else by the first of its forms with reasoning where the row has some that the
        default drops, and without reasoning where the row has none for the block that the default opens."""
        reasoning = reasoning_of(self._chat.messages[index])[0].strip()
        default = self._served(index, variables, bool(reasoning))
        if default is not None and reasoning in default.answer:
            return default
        note, forms = Note.WITHOUT_REASONING, WITHOUT_REASONING
        if reasoning:
            note, forms = Note.WITH_REASONING, WITH_REASONING
        for name, value in forms:
            if name in self._renders.template.variables and name not in variables:
                found = self._served(index, {**variables, name: value}, bool(reasoning))
                if found is not None and reasoning in found.answer:
                    self._renders.notes.add(note)
                    return found
        if default is not None:
            return default
        if not reasoning and opened_by(self._renders.template, self._renders.context(index, variables)) is not None:
            raise NoReasoningError(index)
        raise AnswerNotFoundError(index)

    def _served(self, index: int, variables: Mapping[str, Any], reasons: bool) -> Served | None:
        """Return how the answer is served with these variables; None where it cannot be."""
        context = self._renders.context(index, variables)
        opened = opened_by(self._renders.template, context)
        if opened is None:
            answer = self._answer(index, context, variables)
            if answer is None and not reasons:
                answer = self._after_empty_block(index, context, variables)
        elif reasons:
            answer = self._reasoned(index, context, opened, variables)
        else:
            return None
        if answer is None:
            return None
        answer = ended(self._renders, self._ends, index, context, answer, variables)
        return Served(index, context, answer, variables)

    def _answer(self, index: int, context: str, variables: Mapping[str, Any]) -> str | None:
        """Return what is written for an answer after its prompt; None where it does not follow that.

        Some templates write what comes before differently once there is an answer: Mistral's moves the system prompt,
        gpt-oss's drops the reasoning before calls, Hermes's ends results otherwise. Then it is what is written after
        less, if the conversation ends with just that: after the last question and what follows it, without the
        reasoning of earlier answers, or after the question alone."""
        finished = self._renders.finished(index, variables)
        if finished.startswith(context):
            return finished[len(context) :]
        for before in _shorter(self._chat.messages[:index]):
            prompt = self._renders.of(before, variables, prompt=True)
            through = self._renders.of([*before, self._chat.messages[index]], variables)
            answer = through[len(prompt) :]
            if answer and through.startswith(prompt) and finished.endswith(answer):
                self._renders.notes.add(Note.ANSWER_OF_SHORT)
                return answer
        return None

    def _after_empty_block(self, index: int, context: str, variables: Mapping[str, Any]) -> str | None:
        """Return what is written for an answer after a prompt that ends in an empty block of reasoning, where the
        template leaves that block out of the answer itself (Gemma 4's does); None where it is otherwise."""
        begin = begin_of_empty_block(self._renders.template, context)
        finished = self._renders.finished(index, variables)
        if begin is None or not finished.startswith(context[:begin]):
            return None
        answer = finished[begin:]
        if answer.lstrip().startswith(tuple(REASONING_BLOCKS)):
            return None
        self._renders.notes.add(Note.EMPTY_BLOCK_SENT)
        return answer

    def _reasoned(self, index: int, context: str, opening: str, variables: Mapping[str, Any]) -> str | None:
        """Return reasoning and answer after a prompt that opens the block of reasoning.

        Where the template drops the reasoning of finished answers (DeepSeek-R1's does), it is put where the model
        writes it: the row's own text after the opened block, or reasoning, closing and an empty line."""
        finished = self._renders.finished(index, variables)
        reasoning, closing, content = reasoning_of(self._chat.messages[index])
        if finished.startswith(context) and reasoning.strip() in finished[len(context) :]:
            return finished[len(context) :]
        bare = without_fields(self._chat.messages[index])
        bare["content"] = [{"type": "text", "text": content}] if isinstance(bare.get("content"), list) else content
        through = self._renders.of([*self._chat.messages[:index], bare], variables)
        before = context[: context.rindex(opening)]
        if not through.startswith(before):
            return None
        written = empty_block(opening).sub("", through[len(before) :]).lstrip()
        self._renders.notes.add(Note.REASONING_PLACED)
        if closing:
            space = content[: len(content) - len(content.lstrip())]
            return reasoning.lstrip() + closing + space + written
        return reasoning.strip() + "\n" + REASONING_BLOCKS[opening] + "\n\n" + written


def _shorter(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield the messages from the last question on, all of them without reasoning, where that is less, and the
    question alone, without calls and their results: some templates end a result otherwise once there is an answer.

    What is said beside calls is reasoning too: it is where gpt-oss's template writes it."""
    question = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=None)
    if question:
        yield messages[question:]
    bare = [without_reasoning(message) for message in messages]
    if bare != messages:
        yield bare
    if question is not None and question < len(messages) - 1:
        yield [messages[question]]
