"""Conversations to text through the child process of `render_worker`, which is replaced when a row kills it."""

import os
import subprocess
import sys
import threading
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple

from finetune_trainer.data.problems import Broken, Problem
from finetune_trainer.data.render_worker import MEMORY_BYTES, read_message, write_message
from finetune_trainer.data.rows import Conversation
from finetune_trainer.data.template import Span

_REPLY_TIMEOUT_S = 600  # wall clock for one batch; CPU per row is limited inside
_MAX_KILLED = 5
_ENVIRONMENT = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH")  # what Python needs; no credentials


class Rendered(NamedTuple):
    """A conversation as text, and where its answers are, in characters."""

    text: str
    spans: list[Span]


class TemplateInvalidError(Exception):
    """The template itself cannot be used; the message has no content of rows. row: of the batch, if it showed there."""

    def __init__(self, problem: str, row: int | None = None) -> None:
        super().__init__(problem)
        self.row = row


class Renderer:
    """One template and its child process, started with the first batch. Not thread-safe."""

    def __init__(
        self, source: str, special_tokens: dict[str, str], now: datetime, learn_all: bool, row_cpu_s: float = 5
    ) -> None:
        self._setup = {
            "source": source,
            "special_tokens": special_tokens,
            "now": now.isoformat(),
            "learn_all": learn_all,
            "row_cpu_s": row_cpu_s,
        }
        self._too_much = f"it took more than {row_cpu_s} s of CPU or {MEMORY_BYTES // 2**20} MiB"
        self.fails_always: str | None = None  # how it fails on any conversation; known once something was rendered
        self._killed = 0  # rows that the child died of
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def used(self) -> bool:
        """Whether anything was rendered."""
        return self._child is not None

    def _start(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "finetune_trainer.data.render_worker"],
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        reply = _exchange(child, self._setup)
        problem = self._too_much if reply is None else reply["problem"]
        if problem is not None:
            _end(child)
            raise TemplateInvalidError(problem)
        assert reply is not None
        self.fails_always = reply["fails_always"]
        return child

    def render(self, rows: list[Conversation]) -> list[Rendered | Broken]:
        """Render rows in order. A row that kills the child is found by rendering its batch one by one.

        Raises TemplateInvalidError when the template cannot be compiled, or when too many rows kill the child."""
        results = self._try(rows)
        if results is None:
            return [self._render_one(row, index) for index, row in enumerate(rows)]
        return [_result(result) for result in results]

    def _render_one(self, row: Conversation, index: int) -> Rendered | Broken:
        results = self._try([row])
        if results is not None:
            return _result(results[0])
        self._killed += 1
        if self._killed > _MAX_KILLED:
            raise TemplateInvalidError(f"{self._too_much}, as {_MAX_KILLED} rows before it", index)
        return Broken(Problem.TEMPLATE_FAILED, detail=self._too_much)

    def _try(self, rows: list[Conversation]) -> list[Any] | None:
        """The child's reply, or None when it died; then there is a new one."""
        if self._child is None:
            self._child = self._start()
        reply = _exchange(self._child, [[row.messages, row.learn_from] for row in rows])
        if reply is None:
            _end(self._child)
            self._child = self._start()
        return reply

    def close(self) -> None:
        if self._child is not None:
            _end(self._child)


def _exchange(child: subprocess.Popen[bytes], message: Any) -> Any | None:
    """Send a message and await the reply; None when the child died or did not answer in time."""
    assert child.stdin is not None
    assert child.stdout is not None
    deadline = threading.Timer(_REPLY_TIMEOUT_S, child.kill)
    deadline.daemon = True
    deadline.start()
    try:
        write_message(child.stdin, message)
        return read_message(child.stdout)
    except BrokenPipeError:
        return None
    finally:
        deadline.cancel()


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and free its pipes."""
    child.kill()
    child.wait(timeout=60)
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()


def _result(result: list[Any]) -> Rendered | Broken:
    text, detail = result
    if text is not None:
        return Rendered(text, [(begin, end) for begin, end in detail])
    if isinstance(detail, list):
        message, prompt_not_kept = detail
        problem = Problem.GENERATION_PROMPT_NOT_KEPT if prompt_not_kept else Problem.TEMPLATE_NOT_PREFIX_STABLE
        return Broken(problem, f"messages[{message}]")
    return Broken(Problem.TEMPLATE_FAILED, detail=detail)
