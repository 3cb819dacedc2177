"""What of a row a chat template writes, and what it silently leaves out.

A template is code: it may drop a system prompt, reasoning or a second tool call without a word. So it is tried with a
conversation of the same shape whose words occur once, which proves for each part that it is written, and then each
row's own words are looked for in its text.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, cast

from finetune_trainer.data.reasoning import REASONING_BLOCKS, may_close, reasoning_of, words_of
from finetune_trainer.data.renders import Chat
from finetune_trainer.data.template import Message

_MAX_TRIED_CALLS = 4  # of one message: more are written as these are


class Part(StrEnum):
    """A part of a row that a template may leave out."""

    SYSTEM = "System"
    CONTENT = "Content"
    REASONING = "Reasoning"
    TOOLS = "Tools"
    TOOL_CALLS = "ToolCalls"
    TOOL_RESULTS = "ToolResults"
    NAME = "Name"


class Lost(NamedTuple):
    """A part that is not in the text, and the row's field that holds it."""

    part: Part
    field: str


@dataclass(frozen=True, slots=True)
class Dress:
    """The form in which a template takes messages, of the forms that servers hand over.

    parts: content as a list of text parts; calls_content: the content beside tool calls without any (absent for no
    field at all); arguments_text: the arguments of tool calls as JSON text."""

    parts: bool = False
    calls_content: str = "absent"
    arguments_text: bool = False

    def on(self, chat: Chat) -> Chat:
        """Return the conversation in this form."""
        messages = [self._dressed(message) for message in chat.messages]
        return Chat(messages, chat.learned, chat.tools, chat.variables)

    def _dressed(self, message: Message) -> Message:
        calls = message.get("tool_calls")
        if not self.parts and not calls:
            return message
        dressed = dict(message)
        if self.parts and isinstance(message.get("content"), str):
            dressed["content"] = [{"type": "text", "text": message["content"]}]
        if calls and not message.get("content"):
            dressed.pop("content", None)
            if self.calls_content != "absent":
                dressed["content"] = None if self.calls_content == "null" else ""
        if calls and self.arguments_text:
            dressed["tool_calls"] = [_with_arguments_text(call) for call in calls]
        return dressed


def dresses(chat: Chat) -> Iterator[Dress]:
    """Return the forms to try for a conversation, the most usual first."""
    if not any(message.get("tool_calls") for message in chat.messages):
        yield from (Dress(), Dress(parts=True))
        return
    for arguments_text in (False, True):
        for content in ("absent", "null", "empty"):
            yield Dress(calls_content=content, arguments_text=arguments_text)
    yield Dress(parts=True)


def _with_arguments_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def shape_of(chat: Chat) -> Any:
    """Return what is the same for conversations that a template treats alike."""
    messages = [_shape(message, learned) for message, learned in zip(chat.messages, chat.learned, strict=True)]
    variables = json.dumps(dict(chat.variables), sort_keys=True) if chat.variables else ""
    return tuple(messages), len(chat.tools or ()), variables


def _shape(message: Message, learned: bool) -> Any:
    content = message.get("content")
    if len(message) == 2 and type(content) is str and not may_close(content):  # no more than its role beside it
        return message["role"], learned, bool(content) and not content.isspace()
    reasoning, closing, after = reasoning_of(message)
    calls = min(len(message.get("tool_calls") or ()), _MAX_TRIED_CALLS)
    return message["role"], learned, bool(reasoning), closing, bool(after.strip()), calls, *sorted(message)


def speaker_of(message: Message) -> str:
    """Return the name of who speaks; of a tool's result it says no more than the call that the result answers."""
    return str(message.get("name", "")) if message["role"] != "tool" else ""


class _Words:
    """Words that occur nowhere else."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self) -> str:
        self._count += 1
        return f"q{self._count:05d}z"


def of_unique_words(chat: Chat) -> Chat:
    """Return a conversation of the same shape, all of whose words occur once."""
    word = _Words()
    messages: list[Message] = []
    for message in chat.messages:
        said = dict(message)
        reasoning, closing, after = reasoning_of(message)
        if words_of(message):
            opening = next((each for each, close in REASONING_BLOCKS.items() if close == closing), "")
            inside = f"{opening}\n{word() if reasoning else ''}\n{closing}\n\n" if closing else ""
            said["content"] = inside + (word() if after.strip() else "")
        for name in ("reasoning_content", "thinking", "reasoning"):
            if isinstance(message.get(name), str):
                said[name] = word() if name == "reasoning_content" else said.get("reasoning_content", word())
        if speaker_of(message):
            said["name"] = word()
        if message.get("tool_calls"):
            said["tool_calls"] = [_call_of(call, word) for call in message["tool_calls"][:_MAX_TRIED_CALLS]]
        messages.append(said)
    tools = None if chat.tools is None else [_tool_of(word) for _ in chat.tools]
    return Chat(messages, chat.learned, tools, chat.variables)


def _call_of(call: dict[str, Any], word: _Words) -> dict[str, Any]:
    function = {**call["function"], "name": word(), "arguments": {word(): word()}}
    return {**call, "function": function}


def _tool_of(word: _Words) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {word(): {"type": "string", "description": word()}}}
    return {"type": "function", "function": {"name": word(), "description": word(), "parameters": parameters}}


def lost(chat: Chat, context: str, answers: Mapping[int, str]) -> list[Lost]:
    """Return what of a conversation is neither in the last context nor, for a learned message, in its answer.

    Reasoning of messages that are not learned may be left out: a server leaves it out too."""
    found: list[Lost] = []
    text = _Text(context)
    last = max(answers)
    for index, message in enumerate(chat.messages):
        field = f"messages[{index}]"
        answer = answers.get(index)
        if "name" in message and index <= last and not text.shows(speaker_of(message)):
            found.append(Lost(Part.NAME, f"{field}.name"))
        if answer is not None:
            found += _lost_of_answer(message, field, answer)
        elif index < last:
            part = {"system": Part.SYSTEM, "developer": Part.SYSTEM, "tool": Part.TOOL_RESULTS}.get(message["role"])
            words = words_of(message) if part is not None else reasoning_of(message)[2]
            if not text.shows(words):
                found.append(Lost(part or Part.CONTENT, f"{field}.content"))
            found += _lost_calls(message, field, text)
    for index, tool in enumerate(chat.tools or ()):
        function: Any = tool.get("function", tool)
        if not text.shows(str(function.get("name", ""))):
            found.append(Lost(Part.TOOLS, f"tools[{index}]"))
    return found


def _lost_of_answer(message: Message, field: str, answer: str) -> Iterator[Lost]:
    reasoning, closing, content = reasoning_of(message)
    if not reasoning and "tool_calls" not in message and content.strip() in answer:
        return
    text = _Text(answer)
    if not text.shows(reasoning):
        yield Lost(Part.REASONING, f"{field}.content" if closing else f"{field}.reasoning_content")
    if not text.shows(content):
        yield Lost(Part.CONTENT, f"{field}.content")
    yield from _lost_calls(message, field, text)


def _lost_calls(message: Message, field: str, text: "_Text") -> Iterator[Lost]:
    for call in message.get("tool_calls") or ():
        function = call["function"]
        arguments = function.get("arguments")
        if not text.shows(function["name"]) or not text.shows_all(_decoded(arguments)):
            yield Lost(Part.TOOL_CALLS, f"{field}.tool_calls")
            return


class _Text:
    """A text in which words are looked for, in the order in which they most likely come."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0

    def shows(self, words: str) -> bool:
        """Whether the words stand in the text, or stand in it as JSON."""
        bare = words.strip()
        if self._finds(bare):
            return True
        as_json = (json.dumps(each, ensure_ascii=ascii_)[1:-1] for each in (bare, words) for ascii_ in (False, True))
        if any(self._finds(each) for each in as_json):
            return True
        value = _decoded(words)
        return isinstance(value, dict | list) and self.shows_all(cast(Any, value))

    def shows_all(self, value: Any) -> bool:
        """Whether every name and value inside a JSON value stands in the text."""
        if isinstance(value, dict):
            return all(self.shows(name) and self.shows_all(each) for name, each in cast(dict[str, Any], value).items())
        if isinstance(value, list):
            return all(self.shows_all(each) for each in cast(list[Any], value))
        if isinstance(value, str):
            return self.shows(value)
        return value is None or self._finds(json.dumps(value)) or self._finds(str(value))

    def _finds(self, words: str) -> bool:
        at = self._text.find(words, self._position)
        if at < 0:
            return words in self._text
        self._position = at + len(words)
        return True


def _decoded(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text
