"""One row while it is read: what its fields say, whatever its shape, and what the job chose about rows."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from finetune_api.job import PreferenceSpec, SameRoleMessages, SystemMessages
from finetune_api.row_words import MAX_MESSAGES, MAX_ROW_WEIGHT, MIN_ROW_WEIGHT
from finetune_trainer.data import toolcalls
from finetune_trainer.data.field_names import CONTENT, ROLE, SYSTEM, TOOLS, says_nothing, shown
from finetune_trainer.data.messages import MessageReader, Said, text
from finetune_trainer.data.order import Ordered
from finetune_trainer.data.problems import Broken, Change, Problem, RefusedError
from finetune_trainer.data.rows import Conversation, Row

_JOINT = "\n\n"  # between an instruction and the input or context that belongs to it

# How a list of messages begins as text, as the cells of a table have it; also as Python writes one, which is refused.
_MESSAGES_AS_TEXT = re.compile(rf"""\s*\[\s*\{{\s*(["'])({"|".join((*ROLE, *CONTENT))})\1\s*:""")

NUMBER = re.compile(r"[+-]?([0-9]{1,40}([.][0-9]{0,40})?|[.][0-9]{1,40})([eE][+-]?[0-9]{1,4})?")

# Names that the template gets from us. A row that sets one of them would not be rendered as it is served.
_OF_THE_RENDERER = """
    messages conversation tools documents tokenize chat_template add_generation_prompt continue_final_message
"""
_OURS = frozenset(_OF_THE_RENDERER.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class RowChoices:
    """What the job chose about the rows of a dataset. columns: by the name that the files use, the name used here.
    nulls_are_absent: whether a null inside tools and calls is what a table fills in. learns_all: whether the job learns
    every token, so that no message can be kept from it. told_by: what says that the dataset's rows have their shape.
    licenses: by which of their own licences, in license_field, rows are chosen; none: all are taken. group_field: whose
    value says which rows are held out together, as the files call it."""

    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    ignored: frozenset[str] = frozenset()
    system_messages: SystemMessages = SystemMessages.KEEP
    same_role: SameRoleMessages = SameRoleMessages.KEEP
    nulls_are_absent: bool = False
    learns_all: bool = False
    told_by: str = "its dataset has"
    preference: PreferenceSpec = field(default_factory=PreferenceSpec)
    license_field: str | None = None
    licenses: tuple[str, ...] = ()
    group_field: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A row that can be learned, what was changed in it, and its fields that were passed over."""

    row: Row
    changes: frozenset[Change] = frozenset()
    passed_over: frozenset[str] = frozenset()


class RowReader:
    """One row while it is read. Raises RefusedError."""

    def __init__(self, row: Mapping[str, Any], choices: RowChoices) -> None:
        self.row = row
        self.choices = choices
        self.messages = MessageReader(choices.ignored, choices.columns, choices.nulls_are_absent, choices.learns_all)
        self.changes: set[Change] = set()
        self.also_read: set[str] = set()  # names of fields, beside those of the shape

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
        ordered = Ordered(said, self.choices.system_messages, self.choices.same_role, where)
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
        if isinstance(given, str) and NUMBER.fullmatch(given.strip()):
            given = float(given)
        if isinstance(given, bool) or not isinstance(given, int | float) or given != given:
            raise RefusedError(Problem.WRONG_TYPE, "weight", "must be a number")
        if given and not MIN_ROW_WEIGHT <= given <= MAX_ROW_WEIGHT:
            bounds = f"{MIN_ROW_WEIGHT:f} to {MAX_ROW_WEIGHT:,.0f}"
            raise RefusedError(Problem.OUT_OF_RANGE, "weight", f"it may be 0, or from {bounds}")
        return float(given)

    def instruction(self, beside: str) -> str:
        """Return the instruction, and after an empty line what it is about, where there is something under `beside`.

        Many of Alpaca's form have all of the question in `input`."""
        about = self.row.get(beside)
        if beside == "input" and says_nothing(self.row.get("instruction")) and not says_nothing(about):
            return text(about, beside)
        instruction = self.text("instruction")
        if says_nothing(about):
            return instruction
        return instruction + _JOINT + text(about, beside, may_be_empty=True) if str(about).strip() else instruction

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


def is_text_of_messages(value: object) -> bool:
    """Whether a value is the JSON text of a list of messages."""
    return isinstance(value, str) and _MESSAGES_AS_TEXT.match(value) is not None
