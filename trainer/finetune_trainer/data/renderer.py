"""Conversations to text through the child process of `render_worker`, which is replaced when a row kills it."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson

from finetune_trainer.data import child
from finetune_trainer.data.problems import Broken, Problem
from finetune_trainer.data.render_worker import MAX_MESSAGE_BYTES, MEMORY_BYTES, PIECE_TEXT
from finetune_trainer.data.rows import Conversation
from finetune_trainer.data.sequences import RenderedSequence
from finetune_trainer.data.stops import Ends

_MODULE = "finetune_trainer.data.render_worker"
MAX_KILLED = 5

# What a template may take in all. The first part bounds what a bad one costs; the rest is a few times what the
# longest conversations need with the slowest templates of published models.
BASE_CPU_S = 600.0
ROW_CPU_S = 0.02
MESSAGE_CPU_S = 1e-3  # every answer is rendered with all messages before it; the slowest, Gemma 4, takes 0.3e-3
BASE_TEXT = 64 * 2**20  # characters
ROW_TEXT = 16 * 2**10
TEXT_RATIO = 4  # of the rows' own size, as JSON


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as texts to learn from: one where one carries all answers, else one for each (unrolled).

    notes: what was done, as `Note` says, and the parts that the template left out, as `Part` says."""

    sequences: list[RenderedSequence]
    notes: tuple[str, ...] = ()

    @property
    def characters(self) -> int:
        return sum(len(each.text) for each in self.sequences)


class TemplateInvalidError(Exception):
    """The template itself cannot be used; the message has no content of rows. row: of the batch, if it showed there."""

    def __init__(self, problem: str, row: int | None = None) -> None:
        super().__init__(problem)
        self.row = row


@dataclass
class Spent:
    """What a template has taken for the rows so far, and what their number and size allow it."""

    rows: int = 0
    rows_bytes: int = 0
    squared_messages: int = 0
    cpu_s: float = 0.0
    characters: int = 0

    def add(self, row: Conversation, row_bytes: int, result: "Rendered | Broken") -> None:
        """Count a row that was rendered, but for its time."""
        self.rows += 1
        self.rows_bytes += row_bytes
        self.squared_messages += len(row.messages) ** 2
        longest = max((len(each.text) for each in result.sequences), default=0) if isinstance(result, Rendered) else 0
        self.characters += longest  # unrolled, a conversation is repeated, which is bounded by itself

    @property
    def too_much(self) -> str | None:
        """What the template has taken too much of, if anything."""
        rows = max(1, self.rows)
        if self.cpu_s > BASE_CPU_S + ROW_CPU_S * self.rows + MESSAGE_CPU_S * self.squared_messages:
            return f"it took {self.cpu_s:.0f} s of CPU for {rows} rows, {self.cpu_s / rows:.2g} s for each"
        if self.characters > BASE_TEXT + ROW_TEXT * self.rows + TEXT_RATIO * self.rows_bytes:
            return f"it made {self.characters:,} characters of {rows} rows, {self.characters // rows:,} of each"
        return None


class Renderer:
    """One template and its child process, started with the first batch. Not thread-safe.

    ends: how answers are to end; accepted: the parts of rows, as `Part` names them, that the template may leave out.
    setup: what the process is told before any row, as JSON takes it."""

    def __init__(
        self,
        source: str,
        special_tokens: dict[str, str],
        now: datetime,
        *,
        ends: Ends,
        learn_all: bool,
        accepted: Collection[str] = (),
        row_cpu_s: float = 5,
    ) -> None:
        self.setup: dict[str, Any] = {
            "source": source,
            "special_tokens": special_tokens,
            "now": now.isoformat(),
            "stops": ends.stops,
            "added_end": ends.added,
            "accepted": sorted(accepted),
            "learn_all": learn_all,
            "row_cpu_s": row_cpu_s,
        }
        self._row_cpu_s = row_cpu_s
        self.too_much = f"it took more than {row_cpu_s} s of CPU or {MEMORY_BYTES // 2**20} MiB"
        self.fails_always: str | None = None  # how it fails on any conversation; known once something was rendered
        self.begin()
        self._spent = Spent()
        self._child: child.Process | None = None

    def begin(self) -> None:
        """Begin with a partition, of which nothing is rendered yet."""
        self.used = False  # whether anything was rendered
        self.killed = 0  # rows that the child died of

    def _start(self) -> child.Process:
        process = child.start(_MODULE)
        reply = _ask(process, orjson.dumps(self.setup))
        if reply is None:
            _require_own_end(process)
        problem = self.too_much if reply is None else reply["problem"]
        if problem is not None:
            child.end(process)
            raise TemplateInvalidError(problem)
        assert reply is not None
        self.fails_always = reply["fails_always"]
        return process

    def render(self, rows: list[Conversation]) -> list[Rendered | Broken]:
        """Render the first of the rows, in order and one at least: as many as it is good to hold at once.

        A row that ends the child is found by rendering one by one. Raises TemplateInvalidError when the template
        cannot be compiled, when too many rows end the child, and when it takes too much for all rows so far, and
        MemoryError when the kernel, or somebody else, kills the child."""
        self.used = True
        results = self._try(rows)
        if results is not None:
            return results
        results = list[Rendered | Broken]()
        characters = 0
        for index, row in enumerate(rows):
            result = self._render_one(row, index)
            results.append(result)
            characters += result.characters if isinstance(result, Rendered) else 0
            if characters >= PIECE_TEXT:
                break
        return results

    def _render_one(self, row: Conversation, index: int) -> Rendered | Broken:
        results = self._try([row])
        if results is not None:
            return results[0]
        self.killed += 1
        self._spent.cpu_s += self._row_cpu_s
        if self.killed > MAX_KILLED:
            raise TemplateInvalidError(f"{self.too_much}, as {MAX_KILLED} rows before it", index)
        return Broken(Problem.TEMPLATE_FAILED, detail=self.too_much)

    def _try(self, rows: list[Conversation]) -> list[Rendered | Broken] | None:
        """The child's reply, or None when it died; then there is a new one."""
        if self._child is None:
            self._child = self._start()
        sent = [request_of(row) for row in rows]
        reply = _ask(self._child, b"[" + b",".join(sent) + b"]")
        if reply is None:
            _require_own_end(self._child)
            child.end(self._child)
            self._child = self._start()
            return None
        results = [_result(result) for result in reply["results"]]
        self._spent.cpu_s += reply["cpu_s"]
        for row, body, result in zip(rows, sent, results, strict=False):
            self._spent.add(row, len(body), result)
        if (problem := self._spent.too_much) is not None:
            raise TemplateInvalidError(problem)
        return results

    def close(self) -> None:
        if self._child is not None:
            child.end(self._child)


def request_of(row: Conversation) -> bytes:
    """Return a conversation as JSON, as a process that renders it is sent it."""
    sent: dict[str, Any] = {"messages": row.messages, "learned": row.learned}
    if row.tools:
        sent["tools"] = row.tools
    if row.template_kwargs:
        sent["template_kwargs"] = dict(row.template_kwargs)
    return orjson.dumps(sent)


def _ask(process: child.Process, message: bytes) -> Any | None:
    """Send a message and await the reply; None when the child died or did not answer in time."""
    replies = child.exchange(process, message, max_bytes=MAX_MESSAGE_BYTES)
    return None if replies is None else orjson.loads(replies[0])


def _require_own_end(process: child.Process) -> None:
    """Raise MemoryError where a child was killed from outside: that is no row's fault, and no template's."""
    if child.was_killed(process):
        child.end(process)
        raise MemoryError(f"{_MODULE} was killed")


def _result(result: list[Any]) -> Rendered | Broken:
    sequences, rest = result
    if sequences is not None:
        spans = [[(begin, end) for begin, end in each] for _, each in sequences]
        found = [RenderedSequence(text, each) for (text, _), each in zip(sequences, spans, strict=True)]
        return Rendered(found, tuple(rest))
    problem, field, detail = rest
    return Broken(Problem(problem), field, detail)
