"""Text to tokens through the child process of `tokenizer_worker`, which alone runs a model's tokenizer.json."""

import json
import signal
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from finetune_trainer.data import child
from finetune_trainer.data.added_tokens import NAMING_FILES
from finetune_trainer.data.cuts import MARK_TYPE, Marks
from finetune_trainer.data.encoders import FAST, FAST_AFTER, HUGGING_FACE, Choice, FastDiffersError
from finetune_trainer.data.rows import Completion
from finetune_trainer.data.sequences import Span
from finetune_trainer.data.special_words import SpecialWords
from finetune_trainer.data.tokenizer_worker import CPU_S_PER_MIB, NO_MEMORY
from finetune_trainer.data.tokens import AddedWord, Tokens

_MODULE = "finetune_trainer.data.tokenizer_worker"
# A vocabulary of 256,000 pieces with 580,000 merges is loaded in 0.4 GiB and 4 s of CPU; a row of 8 MiB of noise, the
# longest, does not fit in 2 GiB with it.
MEMORY_BYTES = 4 * 2**30
LOAD_CPU_S = 120
_MAX_REPLY_BYTES = 2**30
_TOO_MUCH_CPU = "takes more than {cpu_s} s of CPU and {per_mib_s} s for each MiB of text"
_TOO_LARGE = "takes more than {gib:.3g} GiB of memory"
# What the child ends with for what the tokenizer does; else it panicked, or crashed.
_ENDS = {-signal.SIGPROF: _TOO_MUCH_CPU, -signal.SIGABRT: _TOO_LARGE, NO_MEMORY: _TOO_LARGE}
_FAILS = "makes the tokenizers library fail"


class TokenizerFailedError(Exception):
    """The tokenizer cannot be used; the message has no content of rows. readable: it was read and works as it says."""

    def __init__(self, problem: str, readable: bool = False) -> None:
        super().__init__(problem)
        self.readable = readable


class Tokenizer:
    """A model's tokenizer and the tokens that begin and end rows, in a process of their own. Not thread-safe.

    content: tokenizer.json; eos_token: ends texts and completions, or else the token `eos_id`, None when the model
    names none; files: the contents of NAMING_FILES, whose tokens are added, None where there are none; fast_after:
    characters of rows after which the faster library is tried, FAST_AFTER where it is None. Raises
    TokenizerFailedError, here and in every call.
    """

    def __init__(
        self,
        content: bytes,
        eos_token: str | None = None,
        eos_id: int | None = None,
        files: Sequence[dict[str, Any]] | None = None,
        fast_after: int | None = None,
    ) -> None:
        self._content = content
        files = [{} for _ in NAMING_FILES] if files is None else files
        fast_after = FAST_AFTER if fast_after is None else fast_after
        self._setup = {"eos_token": eos_token, "eos_id": eos_id, "files": files, "fast_after": fast_after}
        self.stop_ids: set[int] = set()  # tokens seen to end an answer or a text
        self.choice = Choice(HUGGING_FACE, "nothing was read yet")
        self._may_be_fast = False  # whether the next texts may be read by the faster library
        self._start()

    def _start(self) -> None:
        self._child = child.start(_MODULE)
        self._close = weakref.finalize(self, child.end, self._child)
        limits = orjson.dumps({"memory_bytes": MEMORY_BYTES, "load_cpu_s": LOAD_CPU_S})
        if child.exchange(self._child, limits, max_bytes=_MAX_REPLY_BYTES) is None:
            self.close()  # the machine's fault, as no tokenizer was looked at yet
            raise RuntimeError(f"{_MODULE} did not start ({self._child.returncode})")
        # In JSON's own ASCII: a file may hold numbers and halves of characters that a message cannot.
        reply, (marks,) = self._ask(json.dumps(self._setup).encode(), self._content, more=1)
        self.eos_id: int | None = reply["eos_id"]
        self.prefix_ids: list[int] = reply["prefix_ids"]  # usually [] or the begin-of-text token
        self.vocabulary_size: int = reply["vocabulary_size"]  # one above the largest token id
        self.unknown_id: int | None = reply["unknown_id"]  # the token of words that the vocabulary lacks
        added = [AddedWord(*each) for each in reply["added"]]
        self.added = {each.number: each.content for each in added}
        self.special_words = SpecialWords(each.content for each in added if each.is_special)
        self.marks: Marks = np.frombuffer(marks, dtype=MARK_TYPE)  # (vocabulary,) where a text is best cut

    @property
    def restartable(self) -> tuple[dict[str, Any], bytes]:
        """What another process starts the same tokenizer with: names of arguments, and tokenizer.json.

        The other files are JSON in a text, as they may hold numbers that a message cannot."""
        slow_reason = self.choice.reason if self._setup["fast_after"] is None else None
        named = {"eos_token": self._setup["eos_token"], "eos_id": self._setup["eos_id"]}
        return named | {"files": json.dumps(self._setup["files"]), "slow_reason": slow_reason}, self._content

    def close(self) -> None:
        """End the process; nothing can be asked of it then."""
        self._close()

    def start_slow(self, reason: str) -> None:
        """Start again, never to use the faster library; `reason` is said in the report."""
        self.close()
        self._setup["fast_after"] = None
        self._may_be_fast = False
        self.choice = Choice(HUGGING_FACE, reason)
        self._start()

    def decode(self, ids: Sequence[int]) -> str:
        return self._ask(orjson.dumps({"kind": "decode", "ids": list(ids)}))[0]["text"]

    def conversations(self, texts: Sequence[str], spans: Sequence[Sequence[Span]], learn_all: bool) -> list[Tokens]:
        """Tokenise rendered conversations, as RowTokenizer does."""
        return self._tokens({"kind": "conversations", "texts": texts, "spans": spans, "learn_all": learn_all})

    def completions(self, rows: Sequence[Completion], learn_all: bool) -> list[Tokens]:
        """Tokenise prompt + completion + end token, as RowTokenizer does."""
        texts, ends = [row.prompt + row.completion for row in rows], [len(row.prompt) for row in rows]
        return self._tokens({"kind": "completions", "texts": texts, "prompt_ends": ends, "learn_all": learn_all})

    def texts(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Tokenise documents, each after the tokenizer's begin token and before the end token."""
        return [each.ids for each in self._tokens({"kind": "texts", "texts": texts})]

    def _tokens(self, request: dict[str, Any]) -> list[Tokens]:
        if not request["texts"]:
            return []
        message = orjson.dumps(request)
        try:
            reply, (all_ids, all_labels) = self._ask(message, more=2)
        except TokenizerFailedError as error:
            if error.readable or not self._may_be_fast:
                raise
            self.start_slow(f"{FAST} failed")  # after rows that it read as they are: they were compared as it went
            reply, (all_ids, all_labels) = self._ask(message, more=2)
        if reply["fast_differs"]:
            raise FastDiffersError
        if self._setup["fast_after"] is not None:
            self.choice = Choice(*reply["choice"])
            self._may_be_fast = reply["fast_is_due"] or self.choice.library == FAST
        self.stop_ids.update(reply["stop_ids"])
        ids, labels = np.frombuffer(all_ids, dtype=np.uint32), np.frombuffer(all_labels, dtype=np.uint8)
        found: list[Tokens] = []
        begin = 0
        for length, prompt_tokens in zip(reply["lengths"], reply["prompts"], strict=True):
            here = slice(begin, begin + length)
            found.append(Tokens(ids[here], labels[here], prompt_tokens))
            begin += length
        return found

    def _ask(self, *frames: bytes, more: int = 0) -> tuple[dict[str, Any], list[bytes]]:
        """Send frames; return the reply, and the `more` frames after it."""
        replies = child.exchange(self._child, *frames, replies=1 + more, max_bytes=_MAX_REPLY_BYTES)
        if replies is None:
            raise self._died()
        reply = orjson.loads(replies[0])
        if reply["problem"] is not None:
            self.close()
            raise TokenizerFailedError(reply["problem"], readable=True)
        return reply, replies[1:]

    def _died(self) -> Exception:
        """Return why no reply came: the machine's lack of memory is not the tokenizer's."""
        was_killed, code = child.was_killed(self._child), self._child.returncode or 0
        self.close()
        if was_killed:
            return MemoryError(f"{_MODULE} was killed")
        words = _ENDS.get(code, _FAILS)
        figures = {"cpu_s": LOAD_CPU_S, "per_mib_s": CPU_S_PER_MIB, "gib": MEMORY_BYTES / 2**30}
        found = f"its tokenizer.json {words.format(**figures)}"
        return TokenizerFailedError(f"{found}; copy it again from where the model comes from, or choose another model")
