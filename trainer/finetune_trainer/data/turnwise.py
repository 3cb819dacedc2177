"""Chat templates that write one message after another, so that what comes before an answer is cut out of one text.

Most templates have one loop over all messages, in which each is written by what it and those before it say, and then,
if it is asked for, the prompt for the next answer. Whether a template does no more is told from its code, by a list of
all that it may do. By such a one a conversation is written once, with marks where messages begin. What it asks about
the messages behind the one that it writes is noted as it asks, and a beginning that this may change is not told here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, cast

import jinja2
from jinja2 import nodes

_MESSAGES, _PROMPT = "messages", "add_generation_prompt"
_TURN, _AHEAD, _BACK = "_turn_begins_", "_asks_ahead_", "_asks_back_"  # names that stand in the marked code alone
_MARK = "".join(("turn ", "begins"))  # told by what it is, not by what it says
_FORBIDDEN = frozenset(("self", "super", "caller", "varargs", "kwargs", _TURN, _AHEAD, _BACK))
_OF_LOOP = frozenset(("index", "index0", "first", "previtem", "depth", "depth0"))
_OF_LOOP_AHEAD = frozenset(("last", "nextitem"))
_ALLOWED = (
    nodes.Output,
    nodes.TemplateData,
    nodes.For,
    nodes.If,
    nodes.Assign,
    nodes.AssignBlock,
    nodes.FilterBlock,
    nodes.ExprStmt,
    nodes.Macro,
    nodes.CallBlock,
    nodes.Continue,
    nodes.Name,
    nodes.NSRef,
    nodes.Const,
    nodes.Tuple,
    nodes.List,
    nodes.Dict,
    nodes.Pair,
    nodes.Keyword,
    nodes.CondExpr,
    nodes.Filter,
    nodes.Test,
    nodes.Call,
    nodes.Getitem,
    nodes.Getattr,
    nodes.Slice,
    nodes.Concat,
    nodes.Compare,
    nodes.Operand,
    nodes.BinExpr,
    nodes.UnaryExpr,
    nodes.ExtensionAttribute,
)


class _OtherFormError(Exception):
    """The template may do more than to write one message after another."""


class _Where(Enum):
    """In which part of the template something stands."""

    BEFORE = "before the loop over messages"
    TURN = "in that loop"
    WITHIN = "in a loop inside that loop"
    MACRO = "in a macro"
    AFTER = "after that loop"


@dataclass(frozen=True, slots=True)
class ByTurns:
    """A conversation that was written one message after another.

    begins: where the text of each message that the loop writes begins, and where that of the last ends; skipped: how
    many messages the loop leaves out, before its first; least: through so many messages a beginning is told at least;
    unsure: the numbers of messages in the loop through which a beginning may be another text."""

    text: str
    begins: Sequence[int]
    skipped: int
    least: int
    unsure: frozenset[int]

    @property
    def ending(self) -> str:
        """What is written behind the last message."""
        return self.text[self.begins[-1] :]

    def through(self, count: int) -> str | None:
        """Return what is written of the first `count` messages before the ending; None where that is not sure."""
        in_loop = count - self.skipped
        if count < self.least or in_loop in self.unsure or not 0 <= in_loop < len(self.begins):
            return None
        return self.text[: self.begins[in_loop]]


@dataclass
class _Asked:
    """What the template asks while it writes. turns: messages that were begun; ahead: those at which it asked about
    what follows; is_whole: whether it asked about all of them."""

    turns: int = 0
    ahead: set[int] = field(default_factory=set[int])
    is_whole: bool = False

    def asks_ahead(self, value: Any) -> Any:
        self.ahead.add(self.turns)
        return value

    def asks_back(self, index: int) -> int:
        self.is_whole = self.is_whole or index < 0  # which counts from the end
        return index


class TurnwiseTemplate:
    """A template that writes one message after another, with marks. ending_reads: the names that its ending reads."""

    def __init__(self, environment: jinja2.Environment, code: nodes.Template) -> None:
        """Raises _OtherFormError. The code is changed."""
        marking = _Marking(code)
        self.ending_reads = frozenset(marking.ending_reads)
        self._least = marking.least + marking.slices
        self._slices = marking.slices
        self._asked = _Asked()
        self._template = environment.from_string(code)
        own = {_TURN: _MARK, _AHEAD: self._ahead, _BACK: self._back}
        self._template.globals = {**self._template.globals, **own}

    def _ahead(self, value: Any) -> Any:
        return self._asked.asks_ahead(value)

    def _back(self, index: int) -> int:
        return self._asked.asks_back(index)

    def write(self, given: Mapping[str, Any]) -> ByTurns | None:
        """Write a conversation; None where it asks about all messages. Raises what the template raises.

        given: all that the template is given by name."""
        asked = self._asked = _Asked()
        parts: list[str] = []
        begins: list[int] = []
        size = 0
        for part in self._template.root_render_func(self._template.new_context(dict(given))):
            if part is _MARK:
                begins.append(size)
                asked.turns += 1
            else:
                parts.append(part)
                size += len(part)
        skipped = len(given[_MESSAGES]) + 1 - len(begins)
        if asked.is_whole or not 0 <= skipped <= self._slices:
            return None
        unsure = frozenset(turn + more for turn in asked.ahead for more in range(self._slices + 1))
        return ByTurns("".join(parts), begins, skipped, self._least, unsure)


def turnwise(environment: jinja2.Environment, code: nodes.Template) -> TurnwiseTemplate | None:
    """Return the template of this code, which is changed, if it is sure to write one message after another."""
    try:
        return TurnwiseTemplate(environment, code)
    except _OtherFormError:
        return None


class _Marking:
    """Checks a template's code and puts marks into it. Raises _OtherFormError.

    slices: how often messages may be left out at the begin; least: how many messages the code names by number."""

    def __init__(self, code: nodes.Template) -> None:
        self.slices, self.least = 0, 1
        self.ending_reads: set[str] = set()
        self._stored: set[str] = set()  # before the ending
        self._lists = {_MESSAGES}  # names of lists of messages
        while found := {name for each in code.find_all(nodes.Assign) if (name := self._alias(each))} - self._lists:
            self._lists |= found
        loops = [
            index for index, each in enumerate(code.body) if isinstance(each, nodes.For) and self._is_list(each.iter)
        ]
        if len(loops) != 1:
            raise _OtherFormError
        at = loops[0]
        before = [self._before(each) for each in code.body[:at]]
        loop = self._main_loop(cast(nodes.For, code.body[at]))
        after = [self._visited(each, _Where.AFTER) for each in code.body[at + 1 :]]
        if self.ending_reads & self._stored:
            raise _OtherFormError
        code.body = [*before, loop, _output(_TURN), *after]
        code.set_environment(cast(jinja2.Environment, code.environment))

    def _is_list(self, node: nodes.Node) -> bool:
        """Whether an expression is the list of messages, or that without the first."""
        match node:
            case nodes.Name():
                return node.name in self._lists
            case nodes.Getitem(node=inner, arg=nodes.Slice(start=nodes.Const(value=1), stop=None, step=None)):
                return self._is_list(inner)
            case nodes.CondExpr(expr1=one, expr2=nodes.Expr() as other):
                return self._is_list(one) and self._is_list(other)
            case _:
                return False

    def _alias(self, node: nodes.Assign) -> str | None:
        return node.target.name if isinstance(node.target, nodes.Name) and self._is_list(node.node) else None

    def _count(self, node: nodes.Node) -> None:
        """Count how often an expression leaves out the first message, and check what decides that."""
        match node:
            case nodes.Getitem(node=inner):
                self.slices += 1
                self._count(inner)
            case nodes.CondExpr(test=test, expr1=one, expr2=nodes.Expr() as other):
                node.test = cast(nodes.Expr, self._visited(test, _Where.BEFORE))
                self._count(one)
                self._count(other)
            case _:
                pass

    def _before(self, node: nodes.Node) -> nodes.Node:
        """Check a statement before the loop, which may give the list of messages another name."""
        if isinstance(node, nodes.Assign) and self._alias(node):
            self._count(node.node)
            return node
        if isinstance(node, nodes.If):
            node.test = cast(nodes.Expr, self._visited(node.test, _Where.BEFORE))
            node.body = [self._before(each) for each in node.body]
            node.elif_ = [cast(nodes.If, self._before(each)) for each in node.elif_]
            node.else_ = [self._before(each) for each in node.else_]
            return node
        return self._visited(node, _Where.BEFORE)

    def _main_loop(self, node: nodes.For) -> nodes.For:
        if node.else_ or node.test is not None or node.recursive:
            raise _OtherFormError
        self._count(node.iter)
        node.target = self._visited(node.target, _Where.TURN)
        node.body = [_output(_TURN), *(self._visited(each, _Where.TURN) for each in node.body)]
        return node

    def _visited(self, node: nodes.Node, where: _Where) -> nodes.Node:
        """Return a node with marks in it. Raises _OtherFormError for what it may not do there."""
        if not isinstance(node, _ALLOWED):
            raise _OtherFormError
        match node:
            case nodes.Getattr(node=nodes.Name(name="loop"), attr=attribute) if where is _Where.TURN:
                if attribute in _OF_LOOP_AHEAD:
                    return _call(_AHEAD, node)
                if attribute not in _OF_LOOP:
                    raise _OtherFormError
                return node
            case nodes.Getitem(node=nodes.Name(name=name)) if name in self._lists and where is not _Where.AFTER:
                return self._message(node, where)
            case nodes.Name():
                self._check_name(node, where)
            case nodes.NSRef(name=name):
                self._note(name, is_read=where is _Where.AFTER)
            case nodes.Macro():
                if where is not _Where.BEFORE:
                    raise _OtherFormError
                self._note(node.name, is_read=False)
                where = _Where.MACRO
            case nodes.For():
                node.iter = cast(nodes.Expr, self._visited(node.iter, where))
                inside = _Where.WITHIN if where is _Where.TURN else where
                for name in ("target", "body"):
                    self._visit_field(node, name, inside)
                for name in ("test", "else_"):  # in which `loop` is the loop around
                    self._visit_field(node, name, where)
                return node
            case _:
                pass
        for name in node.fields:
            self._visit_field(node, name, where)
        return node

    def _visit_field(self, node: nodes.Node, name: str, where: _Where) -> None:
        value = getattr(node, name)
        if isinstance(value, nodes.Node):
            setattr(node, name, self._visited(value, where))
        elif isinstance(value, list):
            found = cast(list[Any], value)
            setattr(node, name, [self._visited(x, where) if isinstance(x, nodes.Node) else x for x in found])

    def _check_name(self, node: nodes.Name, where: _Where) -> None:
        is_loop = node.name == "loop" and (where is _Where.TURN or node.ctx != "load")
        is_prompt = node.name == _PROMPT and (where is not _Where.AFTER or node.ctx != "load")
        if node.name in self._lists or node.name in _FORBIDDEN or is_loop or is_prompt:
            raise _OtherFormError
        if node.ctx == "load" and where is _Where.AFTER:
            self._note(node.name, is_read=True)
        elif node.ctx != "load" and where is not _Where.AFTER:
            self._note(node.name, is_read=False)

    def _note(self, name: str, is_read: bool) -> None:
        (self.ending_reads if is_read else self._stored).add(name)

    def _message(self, node: nodes.Getitem, where: _Where) -> nodes.Node:
        """Return what names one message by its number, with marks where that may lie behind what is written."""
        match node.arg:
            case nodes.Const(value=int(number)) if number >= 0 and not isinstance(number, bool):
                self.least = max(self.least, number + 1)
                return node
            case nodes.Sub(left=left, right=nodes.Const(value=int(number))) if where is _Where.TURN:
                if _is_index(left) and number >= max(1, self.slices):
                    node.arg = _call(_BACK, node.arg)
                    return node
            case nodes.Add(left=left, right=nodes.Const(value=1)) if where is _Where.TURN:
                if _is_index(left):
                    return _call(_AHEAD, node)
            case _:
                pass
        raise _OtherFormError


def _is_index(node: nodes.Node) -> bool:
    match node:
        case nodes.Getattr(node=nodes.Name(name="loop"), attr="index0"):
            return True
        case _:
            return False


def _output(name: str) -> nodes.Output:
    return nodes.Output([nodes.Name(name, "load")])


def _call(name: str, node: nodes.Node) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load"), [node], [], None, None).set_lineno(node.lineno)  # type: ignore[return-value]
