"""Where an answer ends: at a token at which the model stops, or it would be taught never to end."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from finetune_trainer.data.reasoning import reasoning_of
from finetune_trainer.data.renders import AnswerError, Renders
from finetune_trainer.data.sequences import Note
from finetune_trainer.data.template import Message

_NEXT = "And then?"  # what a user or a tool might say next


class NoStopError(AnswerError):
    """The answer ends in no token at which the model stops."""


@dataclass(frozen=True, slots=True)
class Ends:
    """How answers end. stops: the texts of the tokens at which the model stops; added: what ends an answer for which
    the template writes none of them, or None to refuse it."""

    stops: tuple[str, ...]
    added: str | None = None

    def cut(self, answer: str) -> str | None:
        """Return the answer through the first of the stops that it ends with; white space may stand between them."""
        found = None
        rest = answer.rstrip()
        while stop := next((each for each in self.stops if rest.endswith(each)), None):
            found = rest
            rest = rest[: -len(stop)].rstrip()
        return found


def ended(renders: Renders, ends: Ends, index: int, context: str, answer: str, variables: Mapping[str, Any]) -> str:
    """Return the answer through its stop token, which is added where that was asked for. Raises NoStopError.

    Some templates end no answer, but begin each message with a token that ends the answer before it (GLM's
    `<|user|>`): that is what the model stops at."""
    cut = ends.cut(answer)
    if cut is not None:
        return cut
    message = renders.chat.messages[index]
    said = _last_said(message, answer)
    for begin in _ends_of(said, answer):
        found = [(at + len(each)) for each in ends.stops if (at := answer.find(each, begin)) >= 0]
        if found and not _is_within_stop(ends.stops, said, begin, answer):
            return answer[: min(found)]  # what the template writes after it is never asked of the model
    stop = _begin_of_next(renders, ends.stops, index, context, answer, variables)
    if stop is not None:
        renders.notes.add(Note.END_OF_NEXT)
        return answer + stop
    if ends.added is None:
        raise NoStopError(index)
    renders.notes.add(Note.END_ADDED)
    return answer.rstrip() + ends.added


def _last_said(message: Message, answer: str) -> str:
    """Return what of a message stands last in its answer, but for a call's arguments; a template may write no call."""
    calls = message.get("tool_calls")
    name: str = calls[-1]["function"]["name"] if calls else ""
    return name if name and name in answer else reasoning_of(message)[2].strip()


def _is_within_stop(stops: Sequence[str], said: str, end: int, answer: str) -> bool:
    """Whether words that end here are only letters of a stop token."""
    begin = end - len(said)
    longer = (stop for stop in stops if len(stop) > len(said))
    return any(answer.find(stop, max(0, end - len(stop)), begin + len(stop)) >= 0 for stop in longer)


def _begin_of_next(
    renders: Renders, stops: Sequence[str], index: int, context: str, answer: str, variables: Mapping[str, Any]
) -> str | None:
    """Return the stop token that directly follows the answer at `index` once another message does."""
    message = renders.chat.messages[index]
    content: Any = [{"type": "text", "text": _NEXT}] if isinstance(message.get("content"), list) else _NEXT
    following: Message = {"role": "user", "content": content}
    for call in message.get("tool_calls") or ():
        following = {"role": "tool", "content": content, "tool_call_id": call.get("id", "")}
    tail = reasoning_of(message)[2].strip() if following["role"] == "user" else answer.rpartition("\n")[2]
    try:
        longer = renders.of([*renders.chat.messages[: index + 1], following], variables)
    except (jinja2.TemplateError, TypeError, LookupError):
        return None
    if not tail or not answer.rstrip().endswith(tail):
        return None
    written = longer.removeprefix(context).rpartition(_NEXT)[0]  # the answer, and what leads to the next message
    rests = (written[end:] for end in _ends_of(tail, written))
    return next((each for rest in rests for each in stops if rest.startswith(each)), None)


def _ends_of(words: str, text: str) -> Iterator[int]:
    """Yield where words end in a text, the last place first; for no words the end of the text."""
    at = text.rfind(words)
    while at >= 0:
        yield at + len(words)
        at = text.rfind(words, 0, at + len(words) - 1) if words else -1
