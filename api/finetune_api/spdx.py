"""Licence expressions of SPDX: how one is written, and whether some licences allow what is under it.

Which names there are is the trainer's to know, by a library: the operator's image has none for that.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

MAX_EXPRESSION_CHARS = 256
_MAX_DEPTH = 16  # of parentheses; people write one or two
_NAME = "[A-Za-z0-9][A-Za-z0-9.+:-]*"
ONE_LICENSE = f"^{_NAME}( WITH {_NAME})?$"
EXPRESSION = f"^[(]*{_NAME}[)]*( (AND|OR|WITH) [(]*{_NAME}[)]*)*$"  # without a look at which parenthesis closes which
_TOKEN = re.compile(r"[()]|[^\s()]+")
_WORDS = ("and", "or", "with", "(", ")")


class NotAnExpressionError(ValueError):
    """A text is no licence expression."""


def is_allowed(expression: str, allowed: Collection[str]) -> bool:
    """Return whether somebody who may use what is under the licences in `allowed` may use what is under the expression.

    Of OR one side is enough, AND needs both. A licence WITH an exception is allowed as a whole, or where the licence
    alone is, as exceptions only add rights; NAME+ is allowed where NAME is. Case does not matter.
    Raises NotAnExpressionError."""
    if len(expression) > MAX_EXPRESSION_CHARS:
        raise NotAnExpressionError
    reading = _Reading(iter(_TOKEN.findall(expression)), frozenset(each.casefold() for each in allowed))
    found = reading.any_of(0)
    if reading.next is not None:
        raise NotAnExpressionError
    return found


def may_use(expression: str, allowed: Collection[str]) -> bool:
    """Return what `is_allowed` does; False for what is no expression too."""
    try:
        return is_allowed(expression, allowed)
    except NotAnExpressionError:
        return False


@dataclass
class _Reading:
    """An expression while it is read from left to right."""

    tokens: Iterator[str]
    allowed: frozenset[str]
    next: str | None = None  # the token that is looked at, in lower case; None behind the last

    def __post_init__(self) -> None:
        self._go_on()

    def any_of(self, depth: int) -> bool:
        """Read an expression whose parts are joined by OR."""
        found = self._all_of(depth)
        while self.next == "or":
            self._go_on()
            found = self._all_of(depth) or found
        return found

    def _all_of(self, depth: int) -> bool:
        found = self._one(depth)
        while self.next == "and":
            self._go_on()
            found = self._one(depth) and found
        return found

    def _one(self, depth: int) -> bool:
        if self.next == "(" and depth < _MAX_DEPTH:
            self._go_on()
            found = self.any_of(depth + 1)
            self._take(")")
            return found
        name = self._name()
        found = name in self.allowed or name.removesuffix("+") in self.allowed
        if self.next == "with":
            self._go_on()
            found = f"{name} with {self._name()}" in self.allowed or found
        return found

    def _name(self) -> str:
        name = self.next
        if name is None or name in _WORDS or re.fullmatch(_NAME, name) is None:
            raise NotAnExpressionError
        self._go_on()
        return name

    def _take(self, token: str) -> None:
        if self.next != token:
            raise NotAnExpressionError
        self._go_on()

    def _go_on(self) -> None:
        token = next(self.tokens, None)
        self.next = None if token is None else token.casefold()


def names_in(expression: str) -> list[str]:
    """Return the names of licences and exceptions in an expression, each once, without the + behind one.

    Raises NotAnExpressionError."""
    is_allowed(expression, ())
    tokens = (token for token in _TOKEN.findall(expression) if token.casefold() not in _WORDS)
    return list(dict.fromkeys(token.removesuffix("+") for token in tokens))
