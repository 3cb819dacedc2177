"""Compare the ids of a job's first conversations with those that transformers itself gives, in a child process.

Rows are rendered and tokenised without transformers (`renderer`, `tokenizer`). So that a bug there, or in the base's
files, cannot train other ids than servers send, the first rows that are kept go through the base tokenizer's own
`apply_chat_template(tokenize=True)` (`finetune_trainer.own_ids`). The process starts with the first of them, and takes
about 3 s of CPU beside the rest: what is waited for at the end is what it has not done by then.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import orjson
from pydantic import BaseModel, ValidationError

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_trainer.data import child
from finetune_trainer.data.kinds import conversations_of
from finetune_trainer.data.renderer import request_of
from finetune_trainer.data.rows import Row
from finetune_trainer.data.tokens import Tokens

MAX_ROWS = 32  # and a long one
MAX_ROW_TOKENS = 2**11  # of all its sequences; of longer rows the first is compared, and no other
MAX_LONG_ROW_TOKENS = 2**17  # the longest sequence that a job may ask for
_CHARACTERS = 16  # of a row as JSON for each token that it may have: what says more, and is not written, is passed over
MAX_MESSAGE_BYTES = 256 * 2**20
MEMORY_BYTES = 4 * 2**30  # a tokenizer of 64 MiB is loaded by transformers in less than 2
_TIMEOUT_S = 300  # of the wall clock, for the answer once the rows are read
_MODULE = "finetune_trainer.own_ids"
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}


class Cause(StrEnum):
    """Why ids differ."""

    RANDOM = "random"  # the template writes another text each time
    TEXT = "text"  # transformers renders another text than we do
    TOKENIZER_CLASS = "tokenizer_class"  # the class that the base names does not read tokenizer.json as it is
    TOKENS = "tokens"  # transformers reads the same text as other tokens


class Untold(StrEnum):
    """Why a row cannot be compared."""

    REFUSED = "refused"  # transformers does not render it
    VARIABLE = "variable"  # its chat_template_kwargs have a name that apply_chat_template takes for itself
    NULL = "null"  # the template takes a content of null, which transformers leaves out


class Difference(BaseModel):
    """Where ids differ: the place of the row among those that were sent; sequence and token from 1."""

    row: int
    sequence: int
    token: int
    cause: Cause


class Found(BaseModel):
    """What the child tells: rows with equal ids, rows that cannot be compared by reason, and the first that differs."""

    equal: int = 0
    untold: dict[Untold, int] = {}
    difference: Difference | None = None
    tokenizer_class: str = ""


class ProbedRow(NamedTuple):
    """A row that is compared: where it is from, what the renderer is sent of it, as JSON, and its sequences' ids."""

    file: int
    number: int
    chat: str
    ids: list[list[int]]


class Probe:
    """Keeps the first conversations that it is given, with what they are learned by: MAX_ROWS, and a long one.

    Which row is kept depends on the rows before it by their number alone, never by their size: so those of partitions,
    added in order, are the ones that are kept of all rows at once."""

    def __init__(self) -> None:
        self._short: list[ProbedRow] = []
        self._long: ProbedRow | None = None

    @property
    def rows(self) -> list[ProbedRow]:
        """The rows that are kept, in order."""
        return sorted([*self._short, *([] if self._long is None else [self._long])], key=lambda row: row[:2])

    def take(self, file: int, number: int, row: Row, sequences: Sequence[Tokens]) -> None:
        """Keep a row without members, if it is a conversation and there is room for it."""
        for conversation in conversations_of(row):  # a member has one, or none
            if self._has_room(sum(len(each.ids) for each in sequences)):
                ids = [each.ids.tolist() for each in sequences]
                self.add(ProbedRow(file, number, request_of(conversation).decode(), ids))

    def add(self, row: ProbedRow) -> None:
        """Keep a row, if there is room for it."""
        tokens = sum(map(len, row.ids))
        is_long = tokens > MAX_ROW_TOKENS
        most = MAX_LONG_ROW_TOKENS if is_long else MAX_ROW_TOKENS
        if not self._has_room(tokens) or len(row.chat) > _CHARACTERS * most:
            return
        if is_long:
            self._long = row
        else:
            self._short.append(row)

    def _has_room(self, tokens: int) -> bool:
        if tokens > MAX_ROW_TOKENS:
            return self._long is None and tokens <= MAX_LONG_ROW_TOKENS
        return len(self._short) < MAX_ROWS


_FAULTS = {
    Cause.RANDOM: Fault.TEMPLATE_RANDOM,
    Cause.TEXT: Fault.OTHER_TEXT,
    Cause.TOKENIZER_CLASS: Fault.TOKENIZER_CLASS_DIFFERS,
    Cause.TOKENS: Fault.OTHER_IDS,
}
_UNTOLD_WORDS = {
    Untold.REFUSED: "that it does not render",
    Untold.VARIABLE: "with chat_template_kwargs of its own names",
    Untold.NULL: "whose content must be null",
}


@dataclass(frozen=True)
class SameIds:
    """What was compared: of so many rows, what transformers found; None where it told nothing."""

    rows: int
    found: Found | None

    @property
    def difference(self) -> Difference | None:
        return None if self.found is None else self.found.difference

    @property
    def words(self) -> str:
        """The outcome, in words for the plan."""
        found = self.found
        if found is None:
            bounds = f"{_TIMEOUT_S} s and {MEMORY_BYTES // 2**30} GiB"
            return f"not compared: transformers gave no answer within {bounds}, or was killed"
        of_all = f"{found.equal}" if found.equal == self.rows else f"{found.equal} of {self.rows}"
        untold = [f"{count} {_UNTOLD_WORDS[each]}" for each, count in sorted(found.untold.items())]
        besides = f"; not compared: {', '.join(untold)}" if untold else ""
        by = shortened(found.tokenizer_class, 64)
        if not found.equal and untold:
            return f"compared on no row with transformers' apply_chat_template by {by}{besides}"
        return f"equal on {of_all} rows to transformers' apply_chat_template by {by}{besides}"

    def report(self) -> dict[str, Any]:
        """Return the counts for report.json."""
        found = self.found or Found()
        return {
            "rows": found.equal,
            "not_compared": dict(sorted(found.untold.items())) if self.found else {"no_answer": self.rows},
            "tokenizer_class": found.tokenizer_class,
            "words": self.words,
        }

    def error(self, difference: Difference, uri: str, file: str, row: int) -> StageError:
        """Return TEMPLATE_RANDOM, OTHER_TEXT, TOKENIZER_CLASS_DIFFERS or OTHER_IDS."""
        assert self.found is not None
        place = {"file": file, "row": row, "sequence": difference.sequence, "token": difference.token}
        named = {"name": self.found.tokenizer_class} if difference.cause is Cause.TOKENIZER_CLASS else {}
        return StageError(_FAULTS[difference.cause], uri=uri, **place, **named)


class OwnIds:
    """The process that reads rows by transformers alone. files: the base's that AutoTokenizer reads, by name."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = files
        self._child: child.Process | None = None
        self._was_killed = self._was_late = False  # when it ended without an answer

    def begin(self) -> None:
        """Start the process, once: it imports transformers while rows are read."""
        if self._child is None:
            self._child = child.start(_MODULE, _ENVIRONMENT)

    def compare(self, rows: Sequence[ProbedRow], setup: Mapping[str, Any], given: Mapping[str, str]) -> Found | None:
        """Return what transformers says to the rows; None where the process tells nothing in its time and memory.

        setup: the renderer's; given: special tokens that the template sees and the base does not name. A process that
        ends by itself could not have the class that the base names: then tokenizer.json alone is read, by another. One
        that is killed from outside, as by a kernel without memory, is asked once more: the rows are read by now."""
        sent = [{"chat": orjson.Fragment(row.chat), "ids": row.ids} for row in rows]
        asked = {"files": list(self._files), "setup": setup, "given": given, "rows": sent}
        files = list(self._files.values())
        reply = self.ask(orjson.dumps(asked | {"plain": False}), files)
        if reply is None and self._was_killed and not self._was_late:
            reply = self.ask(orjson.dumps(asked | {"plain": False}), files)
        if reply is None and not self._was_killed:
            reply = self.ask(orjson.dumps(asked | {"plain": True}), files)
        try:
            return None if reply is None else Found.model_validate_json(reply)
        except ValidationError:
            return None

    def ask(self, request: bytes, files: Sequence[bytes]) -> bytes | None:
        """Return the process's reply; None where there is none."""
        self.begin()
        assert self._child is not None
        limits = orjson.dumps({"memory_bytes": MEMORY_BYTES})
        began_s = time.monotonic()
        replies = child.exchange(
            self._child, limits, request, *files, max_bytes=MAX_MESSAGE_BYTES, timeout_s=_TIMEOUT_S
        )
        if replies is not None:
            return replies[0]
        self._was_late = time.monotonic() - began_s >= _TIMEOUT_S
        self._was_killed = child.was_killed(self._child)
        self.close()
        return None

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            child.end(self._child)
            self._child = None
