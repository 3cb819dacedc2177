"""Long conversations, where to render what comes before every answer would take too long."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

from finetune_trainer.data.prompts import Served, Server, continues, place_of
from finetune_trainer.data.reasoning import words_of
from finetune_trainer.data.renders import Chat, Renders
from finetune_trainer.data.sequences import Learnable, Place
from finetune_trainer.data.template import Message

MAX_EXACT_ANSWERS = 8  # of one conversation whose contexts are all rendered, before one of each kind must do


class _Frame(NamedTuple):
    """What a template writes around answers of one kind."""

    lead: str
    stop: str


def of_a_long_one(renders: Renders, server: Server, stops: Sequence[str]) -> Learnable | None:
    """Return a long conversation as one sequence, rendering the context of two answers of each kind alone.

    To render the context of every answer takes time that grows with the square of their number. So the first and the
    last answer of each kind (by what surrounds it) are judged by the rule, and those between are found by what the
    template writes around these. None where that is not sure: a text that holds what the template writes around
    messages, an answer that is not in its place, a conversation that one sequence does not carry.
    """
    chat = renders.chat
    messages = chat.messages
    kinds: dict[Any, list[int]] = {}
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            kinds.setdefault(_kind(messages, index), []).append(index)
    if 2 * len(kinds) > MAX_EXACT_ANSWERS or messages[0]["role"] == "assistant":
        return None
    whole = renders.whole(chat.variables)
    exact: dict[int, Served] = {}
    frames: dict[Any, _Frame] = {}
    for kind, indices in kinds.items():
        for index in dict.fromkeys((indices[0], indices[-1])):
            served = server.served(index, chat.variables)
            frame = _frame(chat, served, stops)
            if served.variables != chat.variables or not continues(whole, served) or frame is None:
                return None
            if frames.setdefault(kind, frame) != frame:
                return None
            exact[index] = served
    if not _are_plain(renders, {mark for frame in frames.values() for mark in (frame.lead.strip(), frame.stop)}):
        return None
    places: list[Place] = []
    position = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index in exact:
            place = place_of(exact[index], 0)
        else:
            frame = frames[_kind(messages, index)]
            lead = _bare(messages[index - 1]) + frame.lead
            begin = whole.find(lead, position) + len(lead)
            end = whole.find(frame.stop, begin) + len(frame.stop)
            if begin < position + len(lead) or end < begin + len(frame.stop):
                return None
            place = Place(index, 0, begin, end)
        if place.begin < position or whole.find(_bare(message), place.begin, place.end) < 0:
            return None
        position = place.end
        if chat.learned[index]:
            places.append(place)
    return Learnable([whole], places, frozenset(renders.notes))


def _kind(messages: list[Message], index: int) -> Any:
    """Return what may change how a template writes an answer: the fields of the messages around it, and their roles."""
    near = messages[index - 1 : index + 2] if index else messages[:2]
    return tuple((each["role"], *sorted(each)) for each in near), index == len(messages) - 1


def _frame(chat: Chat, served: Served, stops: Sequence[str]) -> _Frame | None:
    """Return what is written between the message before an answer and the answer, and what ends it."""
    before = _bare(chat.messages[served.message - 1])
    found, _, lead = served.context.rpartition(before) if before else ("", "", "")
    stop = next((each for each in stops if served.answer.endswith(each)), None)
    if not found or not lead.strip() or stop is None or served.answer.find(stop) != len(served.answer) - len(stop):
        return None
    return _Frame(lead, stop)


def _are_plain(renders: Renders, marks: set[str]) -> bool:
    """Whether no message's text holds one of the marks, or of what the template itself looks for or writes."""
    sought = [re.escape(each) for each in (*marks, *renders.template.marks)]
    found = re.compile("|".join(sought))
    return not any(found.search(text) for text in _strings(renders.chat.messages))


def _bare(message: Message) -> str:
    return words_of(message).strip()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in cast(dict[Any, Any], value).values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in cast(list[Any], value):
            yield from _strings(each)
