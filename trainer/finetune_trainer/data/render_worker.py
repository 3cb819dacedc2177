"""The child process that runs chat templates: they are code from outside and may loop or eat memory.

`python -m finetune_trainer.data.render_worker`, spoken to over stdin and stdout by `renderer`. Every message is JSON. A
row may take 5 s of CPU, the process 512 MiB: beyond that it dies, or the row fails. It answers before all rows are done
once their texts, or the time they took, are much.
"""

import resource
import signal
import sys
import time
from collections.abc import Collection
from datetime import datetime
from typing import Any

import jinja2
import orjson

from finetune_api.redact import shortened
from finetune_api.row_words import MAX_LINE_BYTES
from finetune_trainer.data.child import streams
from finetune_trainer.data.frames import read_frame, write_frame
from finetune_trainer.data.template import ChatTemplate, PromptNotKeptError, UnstableError, answers

MEMORY_BYTES = 512 * 2**20
_MAX_WORDS = 120
_PROBE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
MAX_TEXT = MAX_LINE_BYTES + 2 * 2**20  # characters of a row: what the longest line holds, and what is written around it
PIECE_TEXT = 2 * 2**20  # characters after which an answer is sent: all texts of one are held, and tokenised, at once
_PIECE_CPU_S = 2.0
MAX_MESSAGE_BYTES = 128 * 2**20  # JSON may write a character of a text in six bytes


def safe_words(error: Exception, constants: Collection[str]) -> str:
    """Return what a template says when it refuses a row, if that is all of a constant in its code.

    Other words, also those in its comments, may be the row's."""
    said = str(error)
    return shortened(said, _MAX_WORDS) if said in constants and "\n" not in said else type(error).__name__


def render(template: ChatTemplate, setup: dict[str, Any], row: dict[str, Any]) -> list[Any]:
    """Return [text, spans], or [None, [index of the unstable message, whether its prompt is not kept]], or
    [None, words of the failure]."""
    # SIGPROF ends the process: a loop in C heeds no Python handler.
    signal.setitimer(signal.ITIMER_PROF, setup["row_cpu_s"])
    try:
        text, spans = answers(template, learn_all=setup["learn_all"], **row)
        if len(text) > MAX_TEXT:
            return [None, f"it makes more than {MAX_TEXT // 2**20} Mi characters of the row"]
        text.encode()  # refuse surrogates that a template can make
        return [text, spans]
    except UnstableError as unstable:
        return [None, [unstable.message, isinstance(unstable, PromptNotKeptError)]]
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        return [None, safe_words(error, template.constants)]
    except (MemoryError, RecursionError) as error:
        return [None, type(error).__name__]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def render_some(template: ChatTemplate, setup: dict[str, Any], rows: list[Any]) -> dict[str, Any]:
    """Return the results of the first rows, one at least, and the CPU time that they took."""
    began_s = time.process_time()
    results: list[list[Any]] = []
    characters, cpu_s = 0, 0.0
    for row in rows:
        result = render(template, setup, row)
        results.append(result)
        characters += len(result[0] or "")
        cpu_s = time.process_time() - began_s
        if characters >= PIECE_TEXT or cpu_s >= _PIECE_CPU_S:
            break
    return {"results": results, "cpu_s": cpu_s}


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
    return shortened(f"{type(error).__name__}{line}: {said}", _MAX_WORDS)


def main() -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    requests, replies = streams()
    begin = read_frame(requests, MAX_MESSAGE_BYTES)
    if begin is None:
        return 0
    setup = orjson.loads(begin)
    signal.setitimer(signal.ITIMER_PROF, setup["row_cpu_s"])
    try:
        template = ChatTemplate(setup["source"], setup["special_tokens"], datetime.fromisoformat(setup["now"]))
    except (jinja2.TemplateError, ValueError, RecursionError, MemoryError) as error:
        write_frame(replies, orjson.dumps({"problem": _told(error)}))
        return 0
    fails_always = failure_of_all(template)
    signal.setitimer(signal.ITIMER_PROF, 0)
    write_frame(replies, orjson.dumps({"problem": None, "fails_always": fails_always}))
    while (request := read_frame(requests, MAX_MESSAGE_BYTES)) is not None:
        write_frame(replies, orjson.dumps(render_some(template, setup, orjson.loads(request))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
