"""The child process that runs a model's tokenizer, which is a program from outside: it may panic, loop or eat memory.

`python -m finetune_trainer.data.tokenizer_worker`, spoken to over stdin and stdout by `tokenizer`. Whatever goes beyond
the limits below, or is no plain error of the file, ends the process; the parent says what that means.
"""

import json
import sys
import time
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import orjson
from tokenizers import Tokenizer

from finetune_trainer.data.added_tokens import TokenNamesError, add_named_tokens
from finetune_trainer.data.child import allow_cpu, limit_data, streams
from finetune_trainer.data.encoders import FastDiffersError
from finetune_trainer.data.frames import read_frame, write_frame
from finetune_trainer.data.tokens import RowTokenizer, Tokens

CPU_S_PER_MIB = 30  # of characters; measured with 256,000 pieces, 3 s for noise and 5 s for emoji
MAX_TOKENS_PER_CHARACTER = 64  # bytes as tokens make up to 33, of the character that is normalised to 18 others
_FREE_TOKENS = 4096  # of any text, besides those of its characters
MAX_TOKEN_ID = 2**24
NO_MEMORY = 70  # exit code
_MAX_REQUEST_BYTES = 2**30
_MAX_DECODED = 16_384  # characters
# What a tokenizer must be able to read before any row is read: most that explode or panic do so here.
PROBES = (
    "a",
    "The quick brown fox jumps over the lazy dog 1234567890 times; isn't that - (so) [it] {is}?\n\n\tYes!\r\n",
    "Größe, où, naïve, Здравствуй, 你好世界。こんにちは 안녕하세요 مرحبا שלום नमस्ते ภาษาไทย",
    "👩‍👩‍👧‍👦🏳️‍🌈 ﷺ \u0301\u200b\ufeff\ufffd ﬁ ① ½",
    "aaaaaaaaaaaaaaaa" * 64 + " " * 64 + "0" * 64,
)


class _UnusableError(Exception):
    """A tokenizer that reads, but not as one that can be worked with; the words name no text."""


def _load(setup: dict[str, Any], content: bytes) -> RowTokenizer:
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except ValueError as error:
        raise _UnusableError("its tokenizer.json cannot be read") from error
    try:
        has_more = add_named_tokens(tokenizer, *setup["files"])
    except TokenNamesError as error:
        raise _UnusableError(str(error)) from error
    whole = tokenizer.to_str() if has_more else content.decode()
    if getattr(tokenizer.model, "dropout", None):
        raise _UnusableError(
            "its tokenizer.json has a dropout, so it splits a text differently each time; set it to null"
        )
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= MAX_TOKEN_ID:
        raise _UnusableError(f"its tokenizer.json has a token with the id {largest:,}; {MAX_TOKEN_ID:,} are the most")
    eos, eos_id = setup["eos_token"], setup["eos_id"]
    if eos is None and eos_id is not None:
        eos = tokenizer.id_to_token(eos_id)
    rows = RowTokenizer(tokenizer, eos)  # an eos_token that is named was found or added
    found = rows.conversations(PROBES, [[(0, len(text))] for text in PROBES], learn_all=False)
    rows.stop_ids.clear()
    _require_measured(PROBES, [each.ids for each in found])
    rows.decode(found[1].ids[:64].tolist())
    if setup["fast_after"] is not None:
        rows.encoders.consider(whole, setup["fast_after"])
    return rows


def _require_measured(texts: Sequence[str], found: Sequence[Any]) -> None:
    """Raise _UnusableError where a tokenizer makes much more of a text than there is of it."""
    for text, ids in zip(texts, found, strict=True):
        if len(ids) > _FREE_TOKENS + MAX_TOKENS_PER_CHARACTER * len(text):
            raise _UnusableError(
                f"its tokenizer makes {len(ids):,} tokens of a text of {len(text):,} characters; "
                f"{MAX_TOKENS_PER_CHARACTER} of a character are the most"
            )


def _encoded(rows: RowTokenizer, request: dict[str, Any]) -> list[Tokens]:
    texts: list[str] = request["texts"]
    match request["kind"]:
        case "conversations":
            spans = [[(begin, end) for begin, end in each] for each in request["spans"]]
            return rows.conversations(texts, spans, request["learn_all"])
        case "completions":
            pairs = [(text[:end], text[end:]) for text, end in zip(texts, request["prompt_ends"], strict=True)]
            return rows.completions(pairs, request["learn_all"])
        case _:
            return [Tokens(ids, np.zeros(0, dtype=np.uint8), 0) for ids in rows.texts(texts)]


def _reply(replies: IO[bytes], rows: RowTokenizer, request: dict[str, Any]) -> None:
    """Write the tokens of a request's texts: their numbers, and ids and labels of all, one after another."""
    found: list[Tokens] = []
    rows.stop_ids.clear()  # told are those of this request
    try:
        found = _encoded(rows, request)
        _require_measured(request["texts"], [each.ids for each in found])
    except FastDiffersError:
        write_frame(replies, orjson.dumps({"problem": None, "fast_differs": True}))
    except _UnusableError as error:
        write_frame(replies, orjson.dumps({"problem": str(error)}))
        found = []
    else:
        facts = {
            "lengths": [len(each.ids) for each in found],
            "prompts": [each.prompt_tokens for each in found],
            "stop_ids": sorted(rows.stop_ids),
            "choice": list(rows.encoders.choice),
            "fast_is_due": rows.encoders.is_due,
            "fast_differs": False,
        }
        write_frame(replies, orjson.dumps({"problem": None, **facts}))
    write_frame(replies, b"".join(each.ids.tobytes() for each in found))
    write_frame(replies, b"".join(each.labels.tobytes() for each in found))


def main() -> int:
    requests, replies = streams()
    begin = read_frame(requests, _MAX_REQUEST_BYTES)
    if begin is None:
        return 0
    limits = orjson.loads(begin)
    limit_data(limits["memory_bytes"])
    write_frame(replies, orjson.dumps({"problem": None}))  # ready: what ends it from now on is the tokenizer
    written, content = (read_frame(requests, _MAX_REQUEST_BYTES) for _ in range(2))
    if written is None or content is None:
        return 0
    setup = json.loads(written)
    allowed_s: float = limits["load_cpu_s"]
    allow_cpu(allowed_s)
    try:
        rows = _load(setup, content)
    except _UnusableError as error:
        write_frame(replies, orjson.dumps({"problem": str(error)}))
        write_frame(replies, b"")
        return 0
    unknown_id = rows.unknown_id(content)
    del content
    facts = {"problem": None, "eos_id": rows.eos_id, "prefix_ids": rows.prefix_ids}
    added = [each._replace(content=each.content.encode(errors="replace").decode()) for each in rows.added]
    facts |= {"vocabulary_size": rows.vocabulary_size, "added": [list(each) for each in added]}
    facts["unknown_id"] = unknown_id
    write_frame(replies, orjson.dumps(facts))
    write_frame(replies, rows.marks.tobytes())
    while (body := read_frame(requests, _MAX_REQUEST_BYTES)) is not None:
        request = orjson.loads(body)
        if request["kind"] == "decode":
            allow_cpu(limits["load_cpu_s"])
            text = rows.decode(request["ids"])[:_MAX_DECODED]
            write_frame(replies, orjson.dumps({"problem": None, "text": text.encode(errors="replace").decode()}))
            continue
        if rows.encoders.is_due:
            began_s = time.process_time()
            allow_cpu(limits["load_cpu_s"])
            rows.encoders.try_fast()
            allowed_s += time.process_time() - began_s
        allowed_s += CPU_S_PER_MIB * sum(map(len, request["texts"])) / 2**20
        allow_cpu(max(1.0, allowed_s - time.process_time()))
        _reply(replies, rows, request)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MemoryError:
        sys.exit(NO_MEMORY)
