"""The child process that runs chat templates: they are code from outside and may loop or eat memory.

`python -m finetune_trainer.data.render_worker`, spoken to over stdin and stdout by `renderer`. Every message is a
4-byte length and JSON. A row may take 5 s of CPU, the process 512 MiB: beyond that it dies, or the row fails.
"""

import resource
import signal
import sys
from datetime import datetime
from typing import IO, Any

import jinja2
import orjson

from finetune_trainer.data.template import ChatTemplate, NotPrefixStableError, answers

MEMORY_BYTES = 512 * 2**20
_MAX_WORDS = 120
_MAX_TEXT = 32 * 2**20  # characters; more than any line can hold


def read_message(stream: IO[bytes]) -> Any | None:
    """The next message, None at the stream's end."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    size = int.from_bytes(head, "big")
    body = stream.read(size)
    return orjson.loads(body) if len(body) == size else None


def write_message(stream: IO[bytes], message: Any) -> None:
    body = orjson.dumps(message)
    stream.write(len(body).to_bytes(4, "big"))
    stream.write(body)
    stream.flush()


def safe_words(error: Exception, source: str) -> str:
    """What a template says when it refuses a row, if the words are the template's own and not the row's."""
    said = str(error)
    literal = said and "\n" not in said and said in source
    return said[:_MAX_WORDS] if literal else type(error).__name__


def render(template: ChatTemplate, setup: dict[str, Any], messages: list[dict[str, Any]], learn_from: int) -> list[Any]:
    """[text, spans], or [None, index of the message that is not prefix-stable], or [None, words of the failure]."""
    signal.setitimer(
        signal.ITIMER_PROF, setup["row_cpu_s"]
    )  # SIGPROF ends the process: a loop in C heeds no Python handler
    try:
        text, spans = answers(template, messages, learn_from, setup["learn_all"])
        text.encode()  # refuse surrogates that a template can make
        if len(text) > _MAX_TEXT:
            return [None, f"it made more than {_MAX_TEXT} characters"]
        return [text, spans]
    except NotPrefixStableError as unstable:
        return [None, unstable.message]
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        return [None, safe_words(error, setup["source"])]
    except (MemoryError, RecursionError) as error:
        return [None, type(error).__name__]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the parent closes stdin when it ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    setup = read_message(requests)
    if setup is None:
        return 0
    source = setup["source"]
    signal.setitimer(signal.ITIMER_PROF, setup["row_cpu_s"])
    try:
        template = ChatTemplate(source, setup["special_tokens"], datetime.fromisoformat(setup["now"]))
    except (jinja2.TemplateError, ValueError, RecursionError, MemoryError) as error:
        write_message(replies, {"problem": safe_words(error, source)})
        return 0
    signal.setitimer(signal.ITIMER_PROF, 0)
    write_message(replies, {"problem": None})
    while (rows := read_message(requests)) is not None:
        write_message(replies, [render(template, setup, messages, learn_from) for messages, learn_from in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
