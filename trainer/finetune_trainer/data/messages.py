"""One message of a row in any of its spellings, to OpenAI's form, and whether it says that it is learned."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from finetune_api.row_words import MAX_MESSAGES
from finetune_trainer.data import toolcalls
from finetune_trainer.data.field_names import (
    CONTENT,
    LEARNED,
    METADATA_OF_MESSAGES,
    NOT_LEARNED,
    REASONING,
    ROLE,
    ROLES,
    says_nothing,
    shown,
)
from finetune_trainer.data.problems import Broken, Change, Problem, RefusedError
from finetune_trainer.data.reasoning import REASONING_BLOCKS, reasoning_of

Message = dict[str, Any]

_PLAIN_ROLES = frozenset(("user", "assistant", "system"))
_TEXT_PARTS = frozenset(("text", "input_text", "output_text"))
_REASONING_PARTS = frozenset(("thinking", "reasoning"))
_KINDS = """
    image image_url input_image image_file audio input_audio audio_url video video_url file input_file document
    tool_use tool_result refusal
"""
_NAMED_PARTS = frozenset(_KINDS.split())
_OF_A_PART = frozenset(("type", "text", "content", "value", "thinking", "reasoning", "cache_control", "id"))
_MAX_TOLD = 4  # fields that nobody knows in one error
_OPENING, _CLOSING = "<think>", "</think>"
_PAIRS = ("human", "user", "input"), ("assistant", "gpt", "bot", "output")


_MASKS = frozenset((*LEARNED, *NOT_LEARNED))
_REASONING = frozenset(REASONING)
_CALLS = frozenset(("tool_calls", "function_call"))
_NAMES = frozenset(("tool_call_id", "call_id", "name"))
_SYSTEMS = frozenset(("system", "developer"))
_MAY_BE_EMPTY = _SYSTEMS | {"tool"}
_READ = frozenset((*ROLE, *CONTENT)) | _REASONING | _MASKS | _CALLS | _NAMES


@dataclass(frozen=True, slots=True)
class Said:
    """A message, and whether it says of itself that it is learned; None where it does not say.

    continues: it says what the answer before it calls, for which other rows have a field of that answer."""

    message: Message
    learned: bool | None = None
    continues: bool = False


class MessageReader:
    """Reads the messages of one row; keeps what it changed in them, and the fields that it passed over."""

    def __init__(
        self,
        ignored: Collection[str],
        columns: Mapping[str, str],
        nulls_are_absent: bool = False,
        learns_all: bool = False,
    ) -> None:
        self._ignored = ignored
        self._learns_all = learns_all
        self._nulls_are_absent = nulls_are_absent
        self._names = {theirs: ours for theirs, ours in columns.items() if ours in ("role", "content")}
        self.changes: set[Change] = set()
        self.passed_over: set[str] = set()

    def read(self, value: object, field: str) -> list[Said]:
        """Return the messages of a list, or of the JSON text of one. Raises RefusedError."""
        if value is None:
            raise RefusedError(Problem.MISSING_FIELD, field)
        found = toolcalls.from_json(value, field, "a list of messages")
        if isinstance(found, dict):
            found = _of_lists(cast(dict[str, Any], found))
        if not isinstance(found, list):
            raise RefusedError(Problem.WRONG_TYPE, field, "must be a list of messages, or the JSON text of one")
        items = cast(list[object], found)
        if not items:
            raise RefusedError(Problem.EMPTY, field)
        if len(items) > MAX_MESSAGES:
            raise RefusedError(Problem.TOO_MANY_MESSAGES, field)
        said: list[Said] = []
        for index, item in enumerate(items):
            if isinstance(item, dict) and len(cast(Message, item)) == 2 and _is_plain(cast(Message, item)):
                said.append(Said(cast(Message, item)))
            else:
                said += self._messages(item, f"{field}[{index}]")
        return said

    def _messages(self, value: object, field: str) -> list[Said]:
        if not isinstance(value, dict):
            raise RefusedError(Problem.WRONG_TYPE, field, "must be an object with role and content")
        item = cast(Message, value)
        if self._ignored:
            self.passed_over |= {f"messages[].{shown(name)}" for name in item if name in self._ignored}
            item = {name: each for name, each in item.items() if name not in self._ignored}
        names = self._names
        named = {names.get(name, name) if names else name: each for name, each in item.items() if each is not None}
        if not any(name in named for name in (*ROLE, *CONTENT)):
            pair = [next((name for name in names if name in named), None) for names in _PAIRS]
            if None not in pair:
                return self._pair(named, cast(list[str], pair), field)
        return [self._message(named, field)]

    def _pair(self, item: Message, names: list[str], field: str) -> list[Said]:
        """Read an item that holds a question and its answer, each under the name of who says it."""
        system = ["system"] if not says_nothing(item.get("system")) else []
        self._refuse_unknown(item, {*names, "system"}, field)
        roles = zip([*system, *names], [*system, "user", "assistant"], strict=True)
        return [Said({"role": role, "content": text(item[name], f"{field}.{name}")}) for name, role in roles]

    def _message(self, item: Message, field: str) -> Said:
        role = self._role(item, field)
        content_name = self._one_of(item, CONTENT, field)
        self._refuse_unknown(item, _READ, field)
        place = f"{field}.{content_name or 'content'}"
        content = item.get(content_name) if content_name else None
        called: list[dict[str, Any]] = []
        before_call: str | None = None
        is_call = role == "call"
        if is_call:
            before_call, content = _reasoning_before(content)
            role, called, content = "assistant", toolcalls.calls(content, place), None
        if not _CALLS.isdisjoint(item):
            called += self._calls(item, role, field)
        message: Message = {"role": role}
        reasoning: str | None = None
        if isinstance(content, list) and role != "tool":
            content, reasoning = self._parts(cast(list[object], content), place)
        elif role == "tool":
            content = self._result(content, place)
        elif role in _SYSTEMS and content is None:
            content = ""
        reasoning = self._reasoning(item, role, reasoning or before_call, field)
        if reasoning is not None and isinstance(content, str):
            content = _without_block(content, reasoning, place)
        if not (called or reasoning) or not says_nothing(content):
            message["content"] = text(content, place, may_be_empty=role in _MAY_BE_EMPTY)
        if reasoning is not None:
            message.setdefault("content", "")
            message["reasoning_content"] = reasoning
        if called:
            message["tool_calls"] = called
        if not _NAMES.isdisjoint(item):
            self._add_names(message, item, field)
        return Said(message, self._learned(item, role, field), is_call)

    def _role(self, item: Message, field: str) -> str:
        name = self._one_of(item, ROLE, field)
        if name is None:
            raise RefusedError(Problem.MISSING_FIELD, f"{field}.role")
        said = item[name]
        role = ROLES.get(said) if isinstance(said, str) else None
        if role is None and isinstance(said, str):
            role = ROLES.get(said.strip().lower().replace("-", "_"))
        if role is None:
            raise RefusedError(Problem.UNKNOWN_ROLE, f"{field}.{name}")
        return role

    def _one_of(self, item: Message, names: Collection[str], field: str) -> str | None:
        """Return the name under which something is said. Raises RefusedError where two say different things."""
        given = [name for name in names if name in item]
        if len(given) < 2:
            return given[0] if given else None
        said = [name for name in given if not says_nothing(item[name])] or given[:1]
        if any(item[name] != item[said[0]] for name in said[1:]):
            raise RefusedError(Problem.TWO_FIELDS, f"{field}.{said[1]}")
        return said[0]

    def _refuse_unknown(self, item: Message, known: Collection[str], field: str) -> None:
        others = [name for name in item if name not in known and not says_nothing(item[name])]
        if not others:
            return
        refuse_unknown([name for name in others if name not in METADATA_OF_MESSAGES], f"{field}.")
        self.passed_over.update(f"messages[].{name}" for name in others)

    def _calls(self, item: Message, role: str, field: str) -> list[dict[str, Any]]:
        called: list[dict[str, Any]] = []
        for name in sorted(_CALLS.intersection(item), reverse=True):
            if not says_nothing(item[name]) and not _is_all_null(item[name]):
                called += toolcalls.calls(self.filled(item[name]), f"{field}.{name}")
        if called and role != "assistant":
            raise RefusedError(Problem.WRONG_TYPE, f"{field}.tool_calls", "only an assistant's message may call tools")
        return called

    def filled(self, value: object) -> object:
        """Return tools or calls without the nulls that a table has filled in."""
        if not self._nulls_are_absent:
            return value
        bare = toolcalls.without_nulls(value)
        if bare != value:
            self.changes.add(Change.NULLS_LEFT_OUT)
        return bare

    def _parts(self, parts: list[object], field: str) -> tuple[str, str | None]:
        """Return the text of a content of several parts, and its reasoning."""
        texts: list[str] = []
        reasoning: list[str] = []
        for index, part in enumerate(parts):
            place = f"{field}[{index}]"
            kind, said = _part(part, place)
            (reasoning if kind in _REASONING_PARTS else texts).append(said)
        if len(texts) > 1 or len(reasoning) > 1:
            self.changes.add(Change.PARTS_JOINED)
        return "".join(texts), "".join(reasoning) if reasoning else None

    def _result(self, content: object, field: str) -> object:
        """Return the result of a tool as text: of an object or a list that is no list of parts, its JSON."""
        if content is None:
            return ""
        if isinstance(content, list) and all(_looks_like_a_part(each) for each in cast(list[object], content)):
            return self._parts(cast(list[object], content), field)[0]
        if isinstance(content, dict | list | int | float):
            self.changes.add(Change.RESULT_AS_JSON)
            return json.dumps(content, ensure_ascii=False)
        return content

    def _reasoning(self, item: Message, role: str, of_parts: str | None, field: str) -> str | None:
        name = None if _REASONING.isdisjoint(item) else self._one_of(item, REASONING, field)
        said = item[name] if name is not None and not says_nothing(item[name]) else None
        if said is None:
            return of_parts
        if role != "assistant":
            raise RefusedError(Problem.WRONG_TYPE, f"{field}.{name}", "only an assistant's message may have reasoning")
        if of_parts not in (None, said):
            raise RefusedError(Problem.TWO_FIELDS, f"{field}.{name}")
        return text(said, f"{field}.{name}")

    def _add_names(self, message: Message, item: Message, field: str) -> None:
        """Add which call a result answers, and the name of who speaks."""
        call_id = item.get("tool_call_id", item.get("call_id"))
        for name, value in (("tool_call_id", call_id), ("name", item.get("name"))):
            if not says_nothing(value):
                if name == "tool_call_id" and message["role"] != "tool":
                    raise RefusedError(Problem.WRONG_TYPE, f"{field}.{name}", "only the result of a tool may have it")
                message[name] = text(value, f"{field}.{name}")

    def _learned(self, item: Message, role: str, field: str) -> bool | None:
        """Return whether the message says that it is learned. Raises RefusedError where that is not clear."""
        found: bool | None = None
        is_said = False
        for name in sorted(_MASKS.intersection(item)):
            value: object = item[name]
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                raise RefusedError(Problem.MASK_NOT_CLEAR, f"{field}.{name}")
            learned = bool(value) is (name in LEARNED)
            if found not in (None, learned):
                raise RefusedError(Problem.TWO_FIELDS, f"{field}.{name}")
            found = learned
            # A weight of 1, or `masked: false`, is what some write for all messages; `train: true` is meant.
            is_said = is_said or value is True or not learned
            if value is True and learned and role != "assistant":
                raise RefusedError(Problem.MASK_OF_OTHERS, f"{field}.{name}")
            if self._learns_all and not learned and role == "assistant":
                raise RefusedError(Problem.MASK_AND_ALL, f"{field}.{name}")
        return found if is_said and role == "assistant" else None


def _of_lists(item: Message) -> object:
    """Return messages that stand as one list for each of their fields, which `datasets` makes of a Sequence of them; a
    value of another kind as it is."""
    lists = [cast(list[Any], each) for each in item.values() if isinstance(each, list)]
    lengths = {len(each) for each in lists}
    if len(lists) < len(item) or len(lengths) != 1 or not any(name in item for name in ROLE):
        return item
    return [dict(zip(item, each, strict=True)) for each in zip(*lists, strict=True)]


def _reasoning_before(content: object) -> tuple[str | None, object]:
    """Return the reasoning that is written before a call, and the call."""
    if isinstance(content, str) and content.lstrip().startswith(_OPENING) and _CLOSING in content:
        reasoning, _, call = content.lstrip().removeprefix(_OPENING).partition(_CLOSING)
        return reasoning.strip() or None, call.strip()
    return None, content


def _without_block(content: str, reasoning: str, field: str) -> str:
    """Return a content without the block of reasoning that it begins with, where a field says the same.

    Raises RefusedError where it says something else."""
    inside, closing, after = reasoning_of({"content": content})
    for each in REASONING_BLOCKS.values() if not closing else ():  # raw output of a model, whose prompt opens the block
        before, found, rest = content.partition(each)
        if found and before.strip() == reasoning.strip():
            return rest.lstrip("\r\n")
    if not closing:
        return content
    if inside.strip() not in ("", reasoning.strip()):
        raise RefusedError(Problem.TWO_FIELDS, field, "it begins with other reasoning")
    return after.lstrip("\r\n")


def _is_all_null(value: object) -> bool:
    """Whether a value holds nulls alone, at any depth: what a table fills in where there is none."""
    if isinstance(value, dict | list) and value:
        inner = cast(Message, value).values() if isinstance(value, dict) else cast(list[object], value)
        return all(map(_is_all_null, inner))
    return value is None


def _is_plain(item: Message) -> bool:
    """Whether a message of two fields is in OpenAI's form already: nearly all are."""
    content = item.get("content")
    return (
        item.get("role") in _PLAIN_ROLES
        and type(content) is str
        and "\0" not in content
        and bool(content)
        and not content.isspace()
    )


def refuse_unknown(names: Sequence[str], before: str = "") -> None:
    """Raise RefusedError for fields that nobody knows; the first is its field, and the others are told with it."""
    if names:
        more = [shown(name) for name in names[1:_MAX_TOLD]]
        detail = f"and so {'are' if len(more) > 1 else 'is'} {', '.join(more)}" if more else ""
        raise RefusedError(Problem.UNKNOWN_FIELD, before + shown(names[0]), detail)


def text(value: object, field: str, may_be_empty: bool = False) -> str:
    """Return a value that must be a text with something in it. Raises RefusedError."""
    if value is None:
        raise RefusedError(Problem.MISSING_FIELD, field)
    if isinstance(value, Broken):
        raise RefusedError(value.problem, field, value.detail)
    if not isinstance(value, str):
        raise RefusedError(Problem.WRONG_TYPE, field, "must be a string")
    if "\0" in value:
        raise RefusedError(Problem.NUL, field)
    if not may_be_empty and (not value or value.isspace()):
        raise RefusedError(Problem.EMPTY, field)
    return value


def _looks_like_a_part(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    kind = cast(dict[str, Any], value).get("type")
    return kind in _TEXT_PARTS or kind in _NAMED_PARTS


def _part(value: object, field: str) -> tuple[str, str]:
    """Return the kind of a part, and its text. Raises RefusedError."""
    if isinstance(value, str):
        return "text", text(value, field, may_be_empty=True)
    if not isinstance(value, dict):
        raise RefusedError(Problem.WRONG_TYPE, field, "must be a part: a text, or an object with type and text")
    part = {name: each for name, each in cast(dict[str, Any], value).items() if each is not None}
    kind = part.get("type", "text")
    if kind not in _TEXT_PARTS and kind not in _REASONING_PARTS:
        detail = f"its type is {kind}" if kind in _NAMED_PARTS else ""
        raise RefusedError(Problem.NOT_TEXT, field, detail)
    unknown = next((name for name in part if name not in _OF_A_PART and not says_nothing(part[name])), None)
    if unknown is not None:
        named = unknown in _NAMED_PARTS
        raise RefusedError(Problem.NOT_TEXT if named else Problem.UNKNOWN_FIELD, f"{field}.{shown(unknown)}")
    given = [name for name in (str(kind), "text", "content", "value") if name in part]
    said = part[given[0]] if given else None
    if isinstance(said, list):  # Mistral writes the parts of its reasoning again as parts
        return str(kind), "".join(_part(each, f"{field}[{i}]")[1] for i, each in enumerate(cast(list[object], said)))
    return str(kind), text(said, f"{field}.text", may_be_empty=True)
