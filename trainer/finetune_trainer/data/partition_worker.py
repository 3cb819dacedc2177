"""The child process that works on partitions: `python -m finetune_trainer.data.partition_worker`.

It is our own code, without credentials: rows come as files and go as files. Spoken to over stdin and stdout by
`worker_pool`. It ends at once when its stdin does, in the middle of a partition too, and its own children with it.
"""

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from queue import SimpleQueue
from typing import IO

import orjson

from finetune_trainer.data.encoders import FAST_AFTER_IN_WORKER, FastDiffersError
from finetune_trainer.data.frames import read_frame, write_frame
from finetune_trainer.data.partition_messages import Rules, Task
from finetune_trainer.data.partition_work import PartitionWork
from finetune_trainer.data.tokenizer import Tokenizer, TokenizerFailedError

MAX_FRAME_BYTES = 2**30


def main() -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the parent closes stdin when it ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    setup, content = (read_frame(requests, MAX_FRAME_BYTES) for _ in range(2))
    if setup is None or content is None:
        return 0
    waiting: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(requests, waiting), daemon=True).start()
    try:
        _serve(orjson.loads(setup), content, waiting, replies)
    except BrokenPipeError:
        return 0
    except BaseException as error:  # noqa: BLE001 (told to the parent, which raises it)
        write_frame(replies, orjson.dumps({"raised": _described(error)}))
    return 0


def _listen(requests: IO[bytes], waiting: "SimpleQueue[bytes]") -> None:
    while (frame := read_frame(requests, MAX_FRAME_BYTES)) is not None:
        waiting.put(frame)
    os._exit(0)


def _serve(setup: dict[str, object], content: bytes, waiting: "SimpleQueue[bytes]", replies: IO[bytes]) -> None:
    rules = Rules(**setup["rules"])  # type: ignore[arg-type]
    eos_token, eos_id, slow_reason = setup["eos_token"], setup["eos_id"], setup["slow_reason"]
    files = json.loads(str(setup["files"]))
    tokenizer = Tokenizer(content, eos_token, eos_id, files, FAST_AFTER_IN_WORKER)  # type: ignore[arg-type]
    if slow_reason is not None:
        tokenizer.start_slow(str(slow_reason))
    work = PartitionWork(rules, rules.model(tokenizer))

    def told(rows: int) -> None:
        write_frame(replies, orjson.dumps({"rows": rows}))

    while True:
        task = Task(**orjson.loads(waiting.get()))
        result = work.work(task, told)
        write_frame(replies, orjson.dumps({"done": result.to_json().decode()}))


def _described(error: BaseException) -> dict[str, object]:
    """Return what was raised, without words that may quote data."""
    if isinstance(error, FastDiffersError):
        return {"kind": "fast_differs"}
    if isinstance(error, TokenizerFailedError):
        return {"kind": "tokenizer", "words": str(error), "readable": error.readable}
    if isinstance(error, MemoryError):
        return {"kind": "memory"}
    if isinstance(error, OSError) and error.errno is not None:
        return {"kind": "os", "errno": error.errno, "file": str(error.filename or "a partition")}
    last = traceback.extract_tb(error.__traceback__)[-1]
    return {"kind": "bug", "words": f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"}


if __name__ == "__main__":
    sys.exit(main())
