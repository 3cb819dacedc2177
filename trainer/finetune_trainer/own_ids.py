"""The child process that reads first conversations by transformers alone: `python -P -m finetune_trainer.own_ids`.

Spoken to over stdin and stdout by `data/same_ids.py`. Every conversation is rendered again, by the base tokenizer's own
`apply_chat_template`, wherever the rule of what a server sends needs a text, and what comes of it is tokenised by the
same call; where a text is put together of two, by the tokenizer itself. Torch is left out: it takes seconds to import.
"""

import importlib
import inspect
import os
import random
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import orjson

from finetune_trainer.data.child import limit_data, streams
from finetune_trainer.data.frames import read_frame, write_frame
from finetune_trainer.data.render_worker import Writer
from finetune_trainer.data.same_ids import MAX_MESSAGE_BYTES, Cause, Difference, Found, Untold
from finetune_trainer.data.template import FAILURES, ChatTemplate, Message

_TRIES = 4  # renders of a row that is not the same, to tell a template that is random

Ids = list[list[int]]  # of each sequence of a row


class OwnTemplate(ChatTemplate):
    """A template that is rendered by transformers. untaken: why it cannot be handed what was asked for, if so."""

    def __init__(self, tokenizer: Any, setup: Mapping[str, Any], given: Mapping[str, str]) -> None:
        from transformers.utils import chat_template_utils

        super().__init__(setup["source"], setup["special_tokens"], datetime.fromisoformat(setup["now"]))
        self.marks_answers = False  # ids do not depend on it
        self._turnwise = None  # every beginning is rendered by transformers, and none cut out of another text
        self.untaken: Untold | None = None
        self._tokenizer = tokenizer
        self._given = {"chat_template": self.source, **given}
        self._calls: dict[str, dict[str, Any]] = {}  # by the text that they gave, of one row
        self._not_for_templates = {
            "self",
            *inspect.signature(tokenizer.apply_chat_template).parameters,
            *inspect.signature(chat_template_utils.render_jinja_template).parameters,
        }

    def begin_row(self) -> None:
        """Forget the row before."""
        self.untaken = None
        self._calls.clear()

    def render(
        self,
        messages: list[Message],
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the conversation as text, by `apply_chat_template`."""
        variables = template_kwargs or {}
        if not self._not_for_templates.isdisjoint(variables):
            self.untaken = Untold.VARIABLE
        elif any(value is None for message in messages for value in message.values()):
            self.untaken = Untold.NULL
        if self.untaken is not None:
            raise jinja2.TemplateError(self.untaken)
        call = {"conversation": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        call |= {**self._given, **variables}
        text = self._tokenizer.apply_chat_template(**call, tokenize=False)
        self._calls.setdefault(text, call)
        return text

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text that it gave, or of one that was put together of such."""
        call = self._calls.get(text)
        if call is None:
            return self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._tokenizer.apply_chat_template(**call, tokenize=True, return_dict=False)


class Judge:
    """Reads rows as transformers does. files: the base's tokenizer, as AutoTokenizer reads it; setup: the renderer's;
    given: special tokens that the template sees and the base does not name; is_plain: whether its class counts for
    nothing."""

    def __init__(self, folder: Path, setup: dict[str, Any], given: Mapping[str, str], is_plain: bool) -> None:
        self._folder, self._setup, self._given = folder, setup, given
        self._tokenizer = (_plain_tokenizer if is_plain else _tokenizer_of_its_class)(folder)
        self.tokenizer_class = type(self._tokenizer).__name__
        self._template = OwnTemplate(self._tokenizer, setup, given)

    def judge(self, rows: list[dict[str, Any]]) -> Found:
        """Compare rows until one differs. rows: each a chat as the renderer sends it, and the ids of its sequences."""
        found = Found(tokenizer_class=self.tokenizer_class)
        with _clock(datetime.fromisoformat(self._setup["now"])):
            for place, row in enumerate(rows):
                texts = self._texts(self._template, row["chat"])
                ids = None if texts is None else [self._template.ids(text) for text in texts]
                if ids == row["ids"]:
                    found.equal += 1
                    continue
                if self._is_random(row["chat"]):
                    found.difference = _difference(place, row["ids"], ids or [], Cause.RANDOM)
                    break
                if self._template.untaken is not None or ids is None or texts is None:
                    untold = self._template.untaken or Untold.REFUSED
                    found.untold[untold] = found.untold.get(untold, 0) + 1
                    continue
                found.difference = _difference(place, row["ids"], ids, self._cause(row, texts))
                break
        return found

    def _texts(self, template: ChatTemplate, chat: dict[str, Any]) -> list[str] | None:
        """Return the texts of a row's sequences; None where the template does not render it."""
        if isinstance(template, OwnTemplate):
            template.begin_row()
        sequences, _ = Writer(template, self._setup).write(chat)
        return None if sequences is None else [text for text, _ in sequences]

    def _is_random(self, chat: dict[str, Any]) -> bool:
        """Whether the template writes a conversation otherwise each time."""
        texts: set[str] = set()
        variables = chat.get("template_kwargs")
        for seed in range(_TRIES):
            random.seed(seed)
            with suppress(*FAILURES):
                texts.add(self._template.render(chat["messages"], False, chat.get("tools"), variables))
        return len(texts) > 1

    def _cause(self, row: dict[str, Any], texts: list[str]) -> Cause:
        now = datetime.fromisoformat(self._setup["now"])
        if self._texts(ChatTemplate(self._setup["source"], self._setup["special_tokens"], now), row["chat"]) != texts:
            return Cause.TEXT
        plain = OwnTemplate(_plain_tokenizer(self._folder), self._setup, self._given)
        again = self._texts(plain, row["chat"])
        same = again is not None and [plain.ids(text) for text in again] == row["ids"]
        return Cause.TOKENIZER_CLASS if same else Cause.TOKENS


def _difference(place: int, ours: Ids, theirs: Ids, cause: Cause) -> Difference:
    """Return where ids first differ: sequence and token, both from 1."""
    for sequence, (one, other) in enumerate(zip(ours, theirs, strict=False), 1):
        if one != other:
            same = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
            token = min(len(one), len(other)) if same is None else same
            return Difference(row=place, sequence=sequence, token=token + 1, cause=cause)
    return Difference(row=place, sequence=min(len(ours), len(theirs)) + 1, token=1, cause=cause)


def _tokenizer_of_its_class(folder: Path) -> Any:
    """Return the base's tokenizer by the class that its files name.

    Raises whatever that class does where it cannot be had of these files, as it needs another vocabulary, say: that
    ends the process, and another one is asked, plainly."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _plain_tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


@contextmanager
def _clock(now: datetime) -> Generator[None]:
    """Let `strftime_now` tell the stage's one moment in transformers too."""
    from transformers.utils import chat_template_utils

    class Moment(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:  # noqa: ARG003 (of datetime)
            return now

    patched: Any = chat_template_utils
    real = patched.datetime
    patched.datetime = Moment
    try:
        yield
    finally:
        patched.datetime = real


def judged(request: bytes, *files: bytes) -> bytes:
    """Return what `same_ids` asks for, as JSON. files: their contents, in the order of their names in the request."""
    asked = orjson.loads(request)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in zip(asked["files"], files, strict=True):
            (folder / file).write_bytes(content)
        found = Judge(folder, asked["setup"], asked["given"], asked["plain"]).judge(asked["rows"])
    return found.model_dump_json().encode()


def main() -> int:
    modules: dict[str, Any] = sys.modules  # pyright: ignore[reportAssignmentType]
    modules["torch"] = None
    with os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(2, 1)  # whatever libraries print is no reply
        requests, _ = streams()
        importlib.import_module("transformers")  # while the rows are still read

        begin = read_frame(requests, MAX_MESSAGE_BYTES)
        if begin is None:
            return 0
        limit_data(orjson.loads(begin)["memory_bytes"])
        request = read_frame(requests, MAX_MESSAGE_BYTES)
        if request is None:
            return 0
        files = [read_frame(requests, MAX_MESSAGE_BYTES) for _ in orjson.loads(request)["files"]]
        write_frame(replies, judged(request, *(content for content in files if content is not None)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
