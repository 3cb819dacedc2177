"""The shapes that rows of datasets have, each with what tells it, what of it is read, and how it becomes a row.

A shape reads one decoded row and nothing else, so that each can be understood, and tested, alone. How a row's fields
are named is in `field_names`, how its messages are in `messages`, and what their order means in `order`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from finetune_api.job import DatasetFormat, SameRoleMessages, SystemMessages
from finetune_api.row_words import MAX_MESSAGES, MAX_ROW_WEIGHT, MIN_ROW_WEIGHT
from finetune_trainer.data import toolcalls
from finetune_trainer.data.field_names import (
    ANSWER,
    CONTENT,
    CONVERSATION,
    QUESTION,
    ROLE,
    SYSTEM,
    TOOLS,
    is_fact,
    says_nothing,
    shown,
)
from finetune_trainer.data.kinds import kind_of
from finetune_trainer.data.messages import MessageReader, Said, refuse_unknown, text
from finetune_trainer.data.order import Ordered
from finetune_trainer.data.problems import Broken, Change, Problem, RefusedError
from finetune_trainer.data.rows import Completion, Conversation, Row, Text

JOINT = "\n\n"  # between an instruction and the input or context that belongs to it

# How a list of messages begins as text, as the cells of a table have it; also as Python writes one, which is refused.
_MESSAGES_AS_TEXT = re.compile(rf"""\s*\[\s*\{{\s*(["'])({"|".join((*ROLE, *CONTENT))})\1\s*:""")

_NUMBER = re.compile(r"[+-]?([0-9]{1,40}([.][0-9]{0,40})?|[.][0-9]{1,40})([eE][+-]?[0-9]{1,4})?")

# Names that the template gets from us. A row that sets one of them would not be rendered as it is served.
_OF_THE_RENDERER = """
    messages conversation tools documents tokenize chat_template add_generation_prompt continue_final_message
"""
_OURS = frozenset(_OF_THE_RENDERER.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class RowChoices:
    """What the job chose about the rows of a dataset. columns: by the name that the files use, the name used here.
    nulls_are_absent: whether a null inside tools and calls is what a table fills in. learns_all: whether the job learns
    every token, so that no message can be kept from it. told_by: what says that the dataset's rows have their shape."""

    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    ignored: frozenset[str] = frozenset()
    system_messages: SystemMessages = SystemMessages.KEEP
    same_role: SameRoleMessages = SameRoleMessages.KEEP
    nulls_are_absent: bool = False
    learns_all: bool = False
    told_by: str = "its dataset has"


@dataclass(frozen=True, slots=True)
class Found:
    """A row that can be learned, what was changed in it, and its fields that were passed over."""

    row: Row
    changes: frozenset[Change] = frozenset()
    passed_over: frozenset[str] = frozenset()


class _Reading:
    """One row while it is read. Raises RefusedError."""

    def __init__(self, row: Mapping[str, Any], choices: RowChoices) -> None:
        self.row = row
        self._choices = choices
        self.messages = MessageReader(choices.ignored, choices.columns, choices.nulls_are_absent, choices.learns_all)
        self.changes: set[Change] = set()

    def one_of(self, names: tuple[str, ...]) -> str | None:
        """Return the field under which something is said. Raises RefusedError where two say different things."""
        given = [name for name in names if self.row.get(name) is not None]
        said = [name for name in given if not says_nothing(self.row[name])] or given[:1]
        if any(self.row[name] != self.row[said[0]] for name in said[1:]):
            raise RefusedError(Problem.TWO_FIELDS, said[1])
        return said[0] if said else None

    def text(self, *names: str) -> str:
        """Return the text under one of the names."""
        name = self.one_of(names)
        return text(None if name is None else self.row[name], name or names[0])

    def conversation(self, said: list[Said], where: str) -> Conversation:
        """Return the conversation of these messages and of what the row says beside them."""
        system = self.one_of(SYSTEM)
        if system is not None and not says_nothing(self.row[system]):
            told = text(self.row[system], system)
            before = said[0].message if said else {}
            if before.get("role") not in ("system", "developer"):
                said = [Said({"role": "system", "content": told}), *said]
            elif before.get("content") != told:
                raise RefusedError(Problem.TWO_FIELDS, system, "the messages begin with another system message")
        ordered = Ordered(said, self._choices.system_messages, self._choices.same_role, where)
        self.changes |= ordered.changes
        offered = self.one_of(TOOLS)
        tools = None if offered is None else toolcalls.tools(self.messages.filled(self.row[offered]), offered)
        return Conversation(ordered.messages, ordered.learned, tools, self._template_kwargs(), self.weight())

    def _template_kwargs(self) -> dict[str, Any]:
        name = "chat_template_kwargs"
        given = self.row.get(name)
        if says_nothing(given):
            return {}
        found = toolcalls.from_json(given, name, "an object")
        if not isinstance(found, dict):
            raise RefusedError(Problem.WRONG_TYPE, name, "must be an object, or the JSON text of one")
        values = {key: each for key, each in cast(dict[str, Any], found).items() if each is not None}
        for key in values:
            if key in _OURS or not key.isidentifier():
                raise RefusedError(Problem.UNSUPPORTED_FIELD, f"{name}.{shown(key)}")
        return values

    def weight(self) -> float:
        """Return how much the row counts: a number, or the text of one, as a table of texts has it."""
        given = self.row.get("weight")
        if says_nothing(given):
            return 1.0
        if isinstance(given, Broken):
            raise RefusedError(given.problem, "weight", given.detail)
        if isinstance(given, str) and _NUMBER.fullmatch(given.strip()):
            given = float(given)
        if isinstance(given, bool) or not isinstance(given, int | float) or given != given:
            raise RefusedError(Problem.WRONG_TYPE, "weight", "must be a number")
        if given and not MIN_ROW_WEIGHT <= given <= MAX_ROW_WEIGHT:
            bounds = f"{MIN_ROW_WEIGHT:f} to {MAX_ROW_WEIGHT:,.0f}"
            raise RefusedError(Problem.OUT_OF_RANGE, "weight", f"it may be 0, or from {bounds}")
        return float(given)

    def history(self) -> list[Said]:
        """Return earlier turns, which Alpaca's rows and ms-swift's have as pairs of a question and an answer."""
        given = self.row.get("history")
        if says_nothing(given):
            return []
        found = toolcalls.from_json(given, "history", "a list of pairs")
        pairs = cast(list[object], found) if isinstance(found, list) else [None]
        if 2 * len(pairs) >= MAX_MESSAGES:
            raise RefusedError(Problem.TOO_MANY_MESSAGES, "history")
        said: list[Said] = []
        for index, pair in enumerate(pairs):
            if not isinstance(pair, list) or len(cast(list[object], pair)) != 2:
                raise RefusedError(Problem.WRONG_TYPE, "history", "must be a list of pairs of question and answer")
            for at, role in enumerate(("user", "assistant")):
                said.append(Said({"role": role, "content": text(pair[at], f"history[{index}][{at}]")}))
        return said


def _messages(reading: _Reading) -> Conversation:
    return reading.conversation(reading.messages.read(reading.row.get("messages"), "messages"), "messages")


def _share_gpt(reading: _Reading) -> Conversation:
    name = reading.one_of(CONVERSATION) or CONVERSATION[0]
    return reading.conversation(reading.messages.read(reading.row.get(name), name), name)


def _answered(reading: _Reading, question: str, where: str, *answer: str) -> Conversation:
    said = [Said({"role": "user", "content": question}), Said({"role": "assistant", "content": reading.text(*answer)})]
    return reading.conversation([*reading.history(), *said], where)


def _with_input(reading: _Reading, name: str) -> str:
    """Return the instruction, and after an empty line what it is about, where there is something.

    Many of Alpaca's form have all of the question in `input`."""
    about = reading.row.get(name)
    if name == "input" and says_nothing(reading.row.get("instruction")) and not says_nothing(about):
        return text(about, name)
    instruction = reading.text("instruction")
    if says_nothing(about):
        return instruction
    return instruction + JOINT + text(about, name, may_be_empty=True) if str(about).strip() else instruction


def _alpaca(reading: _Reading) -> Conversation:
    return _answered(reading, _with_input(reading, "input"), "instruction", "output")


def _dolly(reading: _Reading) -> Conversation:
    return _answered(reading, _with_input(reading, "context"), "instruction", "response")


def _question_answer(reading: _Reading) -> Conversation:
    return _answered(reading, reading.text(*QUESTION), "question", *ANSWER)


def _prompt_completion(reading: _Reading) -> Conversation | Completion:
    prompt, completion = reading.row.get("prompt"), reading.row.get("completion")
    both_as_text = _is_text_of_messages(prompt) and _is_text_of_messages(completion)
    if not isinstance(prompt, list) and not isinstance(completion, list) and not both_as_text:
        return Completion(reading.text("prompt"), reading.text("completion"), reading.weight())
    before = [Said(each.message, False) for each in reading.messages.read(prompt, "prompt")]
    said = reading.messages.read(completion, "completion")
    if all(each.message["role"] != "assistant" for each in said):
        raise RefusedError(Problem.NO_ASSISTANT, "completion")
    return reading.conversation([*before, *said], "prompt")


def _is_text_of_messages(value: object) -> bool:
    return isinstance(value, str) and _MESSAGES_AS_TEXT.match(value) is not None


def _text(reading: _Reading) -> Text:
    return Text(reading.text("text"), reading.weight())


_BESIDE = frozenset((*SYSTEM, *TOOLS, "chat_template_kwargs", "weight"))  # what any conversation may have beside it


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape of rows. A row fits that has one field of each group in `needs`, and none of `contradicted_by`."""

    needs: tuple[tuple[str, ...], ...]
    reads: frozenset[str]
    to_row: Callable[[_Reading], Row]
    meaning: str  # for people, in docs/data.md
    examples: tuple[str, ...]  # rows as they stand in a file
    contradicted_by: frozenset[str] = frozenset()

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has the fields of this shape."""
        has_all = all(any(row.get(name) is not None for name in group) for group in self.needs)
        return has_all and not any(row.get(name) is not None for name in self.contradicted_by)


SHAPES: dict[DatasetFormat, Shape] = {
    DatasetFormat.MESSAGES: Shape(
        needs=(("messages",),),
        reads=_BESIDE | {"messages"},
        to_row=_messages,
        meaning="A conversation in OpenAI's form, as a list or as JSON text. Every answer is learned.",
        examples=(
            '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}',
            '{"messages": [{"role": "user", "content": "Rain in Oslo?"}, {"role": "assistant", "content": null, '
            '"tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '
            '"{\\"town\\": \\"Oslo\\"}"}}]}, {"role": "tool", "tool_call_id": "c1", "content": "rain"}, '
            '{"role": "assistant", "content": "Yes."}], "tools": [{"type": "function", "function": {"name": "weather", '
            '"parameters": {"type": "object", "properties": {"town": {"type": "string"}}}}}]}',
            '{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5", "weight": 0}, '
            '{"role": "user", "content": "Sure?"}, {"role": "assistant", "reasoning_content": "Two and two are four.", '
            '"content": "4"}]}',
        ),
    ),
    DatasetFormat.SHARE_GPT: Shape(
        needs=(CONVERSATION,),
        reads=_BESIDE | set(CONVERSATION),
        to_row=_share_gpt,
        meaning="A conversation under " + ", ".join(f"`{each}`" for each in CONVERSATION) + ", whose messages have "
        "`from` and `value`, or `role` and `content`.",
        examples=(
            '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}',
            '{"system": "Be brief.", "conversation": [{"human": "Hi", "assistant": "Hello!"}]}',
            '{"conversations": [{"from": "human", "value": "Rain?"}, {"from": "function_call", "value": '
            '"{\\"name\\": \\"weather\\", \\"arguments\\": {}}"}, {"from": "observation", "value": "rain"}, '
            '{"from": "gpt", "value": "Yes."}], "tools": "[{\\"name\\": \\"weather\\", \\"parameters\\": {}}]"}',
        ),
    ),
    DatasetFormat.ALPACA: Shape(
        needs=(("instruction",), ("output",)),
        reads=_BESIDE | {"instruction", "input", "output", "history"},
        to_row=_alpaca,
        meaning="A question that is `instruction` and, after an empty line, `input`, or one of them where the other is "
        "empty; the answer is `output`. Pairs in `history` are earlier turns, whose answers are learned too.",
        examples=(
            '{"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"}',
            '{"instruction": "And 4?", "input": "", "output": "9", "history": [["Add 2 and 3.", "5"]]}',
        ),
    ),
    DatasetFormat.DOLLY: Shape(
        needs=(("instruction",), ("response",)),
        reads=_BESIDE | {"instruction", "context", "response", "history"},
        to_row=_dolly,
        meaning="A question that is `instruction` and, after an empty line, `context` where it is not empty; the "
        "answer is `response`.",
        examples=(
            '{"instruction": "Who wrote it?", "context": "Faust is by Goethe.", "response": "Goethe", '
            '"category": "closed_qa"}',
        ),
    ),
    DatasetFormat.QUESTION_ANSWER: Shape(
        needs=(QUESTION, ANSWER),
        reads=_BESIDE | {*QUESTION, *ANSWER, "history"},
        to_row=_question_answer,
        meaning="A question under one of "
        + ", ".join(f"`{each}`" for each in QUESTION)
        + " and its answer under one of "
        + ", ".join(f"`{each}`" for each in ANSWER)
        + ", rendered by the chat template.",
        examples=(
            '{"question": "What is the capital of Norway?", "answer": "Oslo"}',
            '{"prompt": "What is the capital of Norway?", "response": "Oslo"}',
        ),
        contradicted_by=frozenset(("instruction",)),
    ),
    DatasetFormat.PROMPT_COMPLETION: Shape(
        needs=(("prompt",), ("completion",)),
        reads=_BESIDE | {"prompt", "completion"},
        to_row=_prompt_completion,
        meaning="A plain text and how it goes on, which no template renders; the completion and an end token are "
        "learned. Where both are lists of messages, or JSON text of such, they are a conversation whose answers in "
        "`completion` are learned.",
        examples=(
            '{"prompt": "The capital of Norway is", "completion": " Oslo."}',
            '{"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", '
            '"content": "Hello!"}]}',
        ),
    ),
    DatasetFormat.TEXT: Shape(
        needs=(("text",),),
        reads=frozenset(("text", "weight")),
        to_row=_text,
        meaning="A document, for method CPT. All of it is learned.",
        examples=('{"text": "Oslo is the capital of Norway."}',),
    ),
}


def read_row(value: object, shape_name: DatasetFormat, choices: RowChoices) -> Found | Broken:
    """Return what a decoded row says, or the first thing that is wrong with it. A field's value may be Broken."""
    if not isinstance(value, dict):
        return Broken(Problem.NOT_AN_OBJECT)
    shape = SHAPES[shape_name]
    try:
        row = renamed(cast(dict[str, Any], value), choices)
    except RefusedError as refused:
        return refused.broken
    try:
        reading = _Reading(row, choices)
        found = shape.to_row(reading)
        passed_over = _passed_over(row, kind_of(found).only_fields or shape.reads, found)
    except RefusedError as refused:
        return _of_another_shape(row, shape_name, choices) or _in_their_names(refused.broken, choices)
    passed_over |= {shown(name) for name in cast(dict[str, Any], value) if name in choices.ignored}
    return Found(
        found,
        frozenset(reading.changes | reading.messages.changes),
        frozenset(passed_over | reading.messages.passed_over),
    )


def _of_another_shape(row: Mapping[str, Any], shape_name: DatasetFormat, choices: RowChoices) -> Broken | None:
    """Return what is wrong with a row that fits other shapes than its dataset's alone."""
    if SHAPES[shape_name].fits(row):
        return None
    others = [name for name, shape in SHAPES.items() if shape.fits(row)]
    detail = f"it is {' or '.join(others)}, not {shape_name}, which {choices.told_by}"
    return Broken(Problem.OTHER_SHAPE, detail=detail) if others else None


def renamed(row: dict[str, Any], choices: RowChoices) -> dict[str, Any]:
    """Return the row without the fields that may be passed over, and the others named as here.

    Raises RefusedError where that would hide another field."""
    if choices.ignored:
        row = {name: each for name, each in row.items() if name not in choices.ignored}
    columns = choices.columns
    if not columns:
        return row
    found = {columns.get(name, name): each for name, each in row.items() if name in columns}
    for name, each in row.items():
        if name in columns:
            continue
        if name not in found:
            found[name] = each
        elif not says_nothing(each):
            raise RefusedError(Problem.TWO_FIELDS, shown(name), "datasets[].columns names another field for it")
    return found


def _passed_over(row: Mapping[str, Any], reads: frozenset[str], found: Row) -> set[str]:
    """Return the names of fields that are not read. Raises RefusedError where one of them says something of its own.

    A text that is a message too, as the `prompt` that some datasets have beside their messages, says nothing more."""
    others = [name for name, each in row.items() if name not in reads and not says_nothing(each)]
    unknown = [name for name in others if not is_fact(name, row[name])]
    if unknown:
        said = {each.strip() for each in kind_of(found).contents(found)}
        unknown = [name for name in unknown if not isinstance(row[name], str) or row[name].strip() not in said]
    refuse_unknown(unknown)
    return {shown(name) for name in others}


def _in_their_names(broken: Broken, choices: RowChoices) -> Broken:
    """Return the problem with the field named as the files do."""
    for theirs, ours in choices.columns.items():
        if broken.field == ours or broken.field.startswith((f"{ours}[", f"{ours}.")):
            return Broken(broken.problem, shown(theirs) + broken.field[len(ours) :], broken.detail)
    return broken
