"""Rows that are longer than a sequence may be: how they are made shorter, and when too many of them are left out.

`pipeline` asks for that row by row, as preprocessing.tooLong says.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from finetune_api.errors import StageError
from finetune_api.job import TooLong
from finetune_api.reasons import Fault
from finetune_trainer.data.accounts import Action, Ledger
from finetune_trainer.data.problems import Drop, place
from finetune_trainer.data.rows import Conversation
from finetune_trainer.data.tokens import Tokens

ASSUMED_GPU_GIB = 24  # the least that GPUs in use for training have; neither job nor runtime says what GPU it is
_ALWAYS_KEPT = ("system", "developer")
_MAX_PERCENT = 100


class LimitSource(StrEnum):
    """Why a sequence may not be longer; the words follow the limit's number."""

    ASKED = "as preprocessing.maxSequenceLength says"
    CONTEXT = "the model's context length"
    MEMORY = "what the memory allows"
    GPU = f"what an assumed GPU of {ASSUMED_GPU_GIB} GiB holds"
    TEXTS = "the default limit of texts"


@dataclass(frozen=True)
class SequenceLimit:
    """How many tokens a sequence may have, and why not more."""

    tokens: int
    source: LimitSource

    @property
    def remedy(self) -> str:
        """How longer rows are let through."""
        match self.source:
            case LimitSource.ASKED | LimitSource.TEXTS:
                return "raise preprocessing.maxSequenceLength"
            case LimitSource.GPU:
                return "write preprocessing.maxSequenceLength for a larger GPU"
            case LimitSource.CONTEXT:
                return "take a model that was made for longer texts"
            case LimitSource.MEMORY:
                return "raise resources.memory, or write preprocessing.maxSequenceLength"


class LongRow(NamedTuple):
    """A row with more tokens than a sequence may have."""

    file: int
    number: int
    tokens: int


class TooLongRows:
    """Counts and reports rows that are too long. max_fraction: of all rows that are read."""

    def __init__(self, policy: TooLong, limit: SequenceLimit, max_fraction: float, ledger: Ledger) -> None:
        self.policy, self.limit = policy, limit
        self._max_fraction, self._ledger = max_fraction, ledger
        self.first: LongRow | None = None
        self.dropped = self.longest = 0
        self.met = False  # whether any row was too long

    def drop(self, file: int, number: int, tokens: int) -> None:
        """Leave out row `number` of a file, one of whose sequences has so many tokens.

        Raises TOO_MANY_LONG_ROWS where the policy is to fail."""
        self._ledger.drop(file, number, "length", Drop.TOO_LONG, f"{tokens} tokens")
        self.met = True
        self.first = self.first or LongRow(file, number, tokens)
        self.dropped += 1
        self.longest = max(self.longest, tokens)
        self.check_none()

    def take(self, first: LongRow | None, dropped: int, longest: int, met: bool) -> None:
        """Add the rows of a partition that are too long."""
        self.first = self.first or first
        self.dropped, self.longest, self.met = self.dropped + dropped, max(self.longest, longest), self.met or met

    def check_none(self) -> None:
        """Raises TOO_MANY_LONG_ROWS where a row was left out and the policy is to fail."""
        if self.policy is TooLong.FAIL and self.dropped:
            raise self._error("or write preprocessing.tooLong: Truncate or Drop")

    def changed(self, file: int, number: int, detail: str) -> None:
        """Record that a row was made shorter."""
        self.met = True
        self._ledger.decide(file, number, "length", Action.CHANGE, Drop.TOO_LONG, detail)

    def split(self, file: int, number: int, pieces: int) -> None:
        """Record that a text became several pieces."""
        self.met = True
        self._ledger.decide(file, number, "length", Action.SPLIT, Drop.TOO_LONG, f"{pieces} pieces")

    def check(self) -> None:
        """Raises TOO_MANY_LONG_ROWS when more were left out than allowed."""
        if self.dropped > self._max_fraction * self._ledger.rows_read:
            allowed = f"{_MAX_PERCENT * self._max_fraction:g} %"
            more = f"raise preprocessing.maxTooLongFraction, which allows {allowed} of the rows"
            shorter = "" if self.policy is TooLong.TRUNCATE else "write preprocessing.tooLong: Truncate, "
            raise self._error(f"{shorter}or {more}")

    def _error(self, remedy: str) -> StageError:
        assert self.first is not None
        file, number, tokens = self.first
        return StageError(
            Fault.TOO_MANY_LONG_ROWS,
            file=place(self._ledger.files[file].uri),
            row=number,
            tokens=tokens,
            limit=self.limit.tokens,
            source=self.limit.source,
            dropped=self.dropped,
            rows=self._ledger.rows_read,
            longest=self.longest,
            remedy=f"{self.limit.remedy}, {remedy}",
        )


def turns(row: Conversation) -> list[int]:
    """Return where turns begin that a conversation may be cut before: a user's messages but the first one.

    Only those with something to learn behind them."""
    last = max((index for index, learned in enumerate(row.learned) if learned), default=-1)
    users = [index for index, message in enumerate(row.messages) if message["role"] == "user"]
    begins = [index for index in users if index and row.messages[index - 1]["role"] != "user"]
    return [index for index in begins if index < last and index != _kept_messages(row)]


def _kept_messages(row: Conversation) -> int:
    """Return how many messages at the beginning are no turn: what the system says."""
    roles = [message["role"] for message in row.messages]
    return next((index for index, role in enumerate(roles) if role not in _ALWAYS_KEPT), len(roles))


def from_turn(row: Conversation, begin: int) -> Conversation:
    """Return the conversation without the messages before `begin`, but with what the system says before all turns."""
    kept = min(_kept_messages(row), begin)
    messages = [*row.messages[:kept], *row.messages[begin:]]
    return replace(row, messages=messages, learned=(*row.learned[:kept], *row.learned[begin:]))


def without_beginning(tokens: Tokens, limit: int, prefix: int) -> Tokens | None:
    """Return a prompt and its answer without what comes first in the prompt; None where the answer alone is too long.

    prefix: tokens at the beginning that stay, as every text begins with them."""
    answer = len(tokens.ids) - tokens.prompt_tokens
    room = limit - answer - prefix
    if room < 1:
        return None
    keep = np.r_[0:prefix, tokens.prompt_tokens - room : len(tokens.ids)]
    labels = tokens.labels[keep]
    labels[:1] = 0
    return Tokens(tokens.ids[keep], labels, prefix + room)
