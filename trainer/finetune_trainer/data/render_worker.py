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

from finetune_trainer.data.template import ChatTemplate, PromptNotKeptError, UnstableError, answers

MEMORY_BYTES = 512 * 2**20
_MAX_WORDS = 120
_PROBE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
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
    """Return [text, spans], or [None, [index of the unstable message, whether its prompt is not kept]], or
    [None, words of the failure]."""
    signal.setitimer(
        signal.ITIMER_PROF, setup["row_cpu_s"]
    )  # SIGPROF ends the process: a loop in C heeds no Python handler
    try:
        text, spans = answers(template, messages, learn_from, setup["learn_all"])
        text.encode()  # refuse surrogates that a template can make
        if len(text) > _MAX_TEXT:
            return [None, f"it made more than {_MAX_TEXT} characters"]
        return [text, spans]
    except UnstableError as unstable:
        return [None, [unstable.message, isinstance(unstable, PromptNotKeptError)]]
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        return [None, safe_words(error, setup["source"])]
    except (MemoryError, RecursionError) as error:
        return [None, type(error).__name__]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def failure_of_all(template: ChatTemplate) -> str | None:
    """Return how the template fails on the plainest conversation.

    None when it does not, or refuses it in its own words, as it may then take others."""
    try:
        template.render(_PROBE)
        template.render(_PROBE[:1], add_generation_prompt=True)
    except jinja2.TemplateError as error:
        return None if type(error) is jinja2.TemplateError else _told(error)  # raise_exception raises just this
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        return _told(error)
    except (MemoryError, RecursionError) as error:
        return type(error).__name__
    return None


def _told(error: Exception) -> str:
    """Return what an error says that comes from the template alone, with its line."""
    line = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    said = str(getattr(error, "message", None) or error).partition("\n")[0]
    return f"{type(error).__name__}{line}: {said}"[:_MAX_WORDS]


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
        write_message(replies, {"problem": _told(error)})
        return 0
    fails_always = failure_of_all(template)
    signal.setitimer(signal.ITIMER_PROF, 0)
    write_message(replies, {"problem": None, "fails_always": fails_always})
    while (rows := read_message(requests)) is not None:
        write_message(replies, [render(template, setup, messages, learn_from) for messages, learn_from in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
