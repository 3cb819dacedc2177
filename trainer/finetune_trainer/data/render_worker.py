"""The child process that runs chat templates: they are code from outside and may loop or eat memory.

`python -m finetune_trainer.data.render_worker`, spoken to over stdin and stdout by `renderer`. Every message is JSON. A
row may take 5 s of CPU, the process 512 MiB: beyond that it dies, or the row fails. It answers before all rows are done
once their texts, or the time they took, are much.
"""

import resource
import sys
import time
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
import orjson

from finetune_api.redact import shortened
from finetune_api.row_words import MAX_LINE_BYTES
from finetune_trainer.data.answers import everything, learnable, marks_differ
from finetune_trainer.data.child import allow_cpu, streams
from finetune_trainer.data.containment import Dress, Lost, Part, dresses, lost, of_unique_words, shape_of
from finetune_trainer.data.frames import read_frame, write_frame
from finetune_trainer.data.opened_reasoning import with_openings
from finetune_trainer.data.problems import Problem
from finetune_trainer.data.prompts import AnswerNotFoundError, NoReasoningError
from finetune_trainer.data.renders import AnswerError, Chat
from finetune_trainer.data.sequences import Note, RenderedSequence
from finetune_trainer.data.stops import Ends, NoStopError
from finetune_trainer.data.template import FAILURES, ChatTemplate
from finetune_trainer.data.template_words import MAX_WORDS, refusal_words

MEMORY_BYTES = 512 * 2**20
_PROBE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
MAX_TEXT = MAX_LINE_BYTES + 2 * 2**20  # characters of a row: what the longest line holds, and what is written around it
PIECE_TEXT = 2 * 2**20  # characters after which an answer is sent: all texts of one are held, and tokenised, at once
_PIECE_CPU_S = 2.0
_MAX_SHAPES = 4096  # of conversations that are remembered; others are tried again
_PROBLEMS: dict[type[AnswerError], Problem] = {
    AnswerNotFoundError: Problem.GENERATION_PROMPT_NOT_KEPT,
    NoReasoningError: Problem.NO_REASONING,
    NoStopError: Problem.NO_STOP_TOKEN,
}
MAX_MESSAGE_BYTES = 128 * 2**20  # JSON may write a character of a text in six bytes


class Shape(NamedTuple):
    """How a template takes conversations of one shape: in which form, and what it drops."""

    dress: Dress
    lost: tuple[Lost, ...]
    notes: frozenset[Note]


class Writer:
    """Renders conversations by one template, and knows of each shape how the template takes it and what it drops."""

    def __init__(self, template: ChatTemplate, setup: dict[str, Any]) -> None:
        self._template = template
        self._ends = Ends(tuple(sorted(setup["stops"], key=len, reverse=True)), setup["added_end"])
        self._accepted = frozenset(setup["accepted"])
        self._learn_all: bool = setup["learn_all"]
        self._row_cpu_s: float = setup["row_cpu_s"]
        self._shapes: dict[Any, Shape] = {}

    def write(self, row: dict[str, Any]) -> list[Any]:
        """Return [sequences, notes], or [None, [problem, field, words]].

        A sequence is [text, spans]; words are of the code or the template's own literals."""
        chat = Chat(row["messages"], row["learned"], row.get("tools"), row.get("template_kwargs") or {})
        try:
            allow_cpu(self._row_cpu_s)
            opened = with_openings(self._template, chat)
            return self._written(opened, {Note.OPENING_ADDED} if opened is not chat else set())
        except AnswerError as error:
            return [None, [_PROBLEMS[type(error)], f"messages[{error.message}]", ""]]
        except FAILURES as error:
            return [None, [Problem.TEMPLATE_FAILED, "", refusal_words(error, self._template, chat)]]
        except (MemoryError, RecursionError) as error:
            return [None, [Problem.TEMPLATE_FAILED, "", type(error).__name__]]
        finally:
            allow_cpu(0)

    def _written(self, chat: Chat, noted: set[Note]) -> list[Any]:
        key = shape_of(chat)
        shape = self._shapes.get(key)
        if shape is None:
            allow_cpu(self._row_cpu_s)
            shape = self._tried(chat)
            if len(self._shapes) < _MAX_SHAPES:
                self._shapes[key] = shape
        allow_cpu(self._row_cpu_s)
        sequences, notes, gone = self._rendered(shape.dress.on(chat))
        if sum(len(each.text) for each in sequences) > MAX_TEXT:
            words = f"it makes more than {MAX_TEXT // 2**20} Mi characters of the row"
            return [None, [Problem.TEMPLATE_FAILED, "", words]]
        for each in sequences:
            each.text.encode()  # refuse surrogates that a template can make
        gone = [*shape.lost, *gone]
        for part, field in gone:
            if part not in self._accepted:
                return [None, [Problem.VANISHES, field, "" if part is Part.CONTENT else part]]
        written = [[each.text, each.spans] for each in sequences]
        return [written, sorted({*noted, *notes, *shape.notes, *(part for part, _ in gone)})]

    def _rendered(self, chat: Chat) -> tuple[list[RenderedSequence], frozenset[Note], list[Lost]]:
        if self._learn_all:
            whole = everything(self._template, chat)
            answers = {index: whole.text for index, learned in enumerate(chat.learned) if learned}
            return [whole], frozenset(), lost(chat, whole.text, answers)
        found = learnable(self._template, chat, self._ends)
        last = found.places[-1]
        answers = {each.message: found.texts[each.sequence][each.begin : each.end] for each in found.places}
        return found.sequences, found.notes, lost(chat, found.texts[last.sequence][: last.begin], answers)

    def _tried(self, chat: Chat) -> Shape:
        """Return how the template takes conversations of this shape: in the first form in which it drops nothing, or
        else the least."""
        unique = of_unique_words(chat)
        best: Shape | None = None
        told: Dress | None = None  # the first in which it refuses the conversation in its own words
        for dress in dresses(chat):
            try:
                dressed = dress.on(unique)
                gone = self._rendered(dressed)[2]
                if best is None or len(gone) < len(best.lost):
                    best = Shape(dress, tuple(gone), self._marks(dressed))
                if not gone:
                    break
            except (AnswerError, *FAILURES) as error:  # the row itself tells how it fails
                if told is None and type(error) is jinja2.TemplateError:
                    told = dress
        return best or Shape(told or Dress(), (), frozenset())

    def _marks(self, chat: Chat) -> frozenset[Note]:
        """Return whether `{% generation %}` marks what the rule says."""
        if not self._template.marks_answers or self._learn_all:
            return frozenset()
        return frozenset([Note.MARKS_DIFFER] if marks_differ(self._template, chat, self._ends) else [])


def write_some(writer: Writer, rows: list[Any]) -> dict[str, Any]:
    """Return the results of the first rows, one at least, and the CPU time that they took."""
    began_s = time.process_time()
    results: list[list[Any]] = []
    characters, cpu_s = 0, 0.0
    for row in rows:
        result = writer.write(row)
        results.append(result)
        characters += sum(len(text) for text, _ in result[0] or ())
        cpu_s = time.process_time() - began_s
        if characters >= PIECE_TEXT or cpu_s >= _PIECE_CPU_S:
            break
    return {"results": results, "cpu_s": cpu_s}


def failure_of_all(template: ChatTemplate) -> str | None:
    """Return how the template fails on the plainest conversation.

    None when it does not, or refuses it in its own words, as it may then take others."""
    failures = [_failure(template, dress) for dress in (Dress(), Dress(parts=True))]
    return failures[0] if all(failures) else None


def _failure(template: ChatTemplate, dress: Dress) -> str | None:
    messages = dress.on(Chat(_PROBE, (False, True))).messages
    try:
        template.render(messages)
        template.render(messages[:1], add_generation_prompt=True)
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
    return shortened(f"{type(error).__name__}{line}: {said}", MAX_WORDS)


def main() -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    requests, replies = streams()
    begin = read_frame(requests, MAX_MESSAGE_BYTES)
    if begin is None:
        return 0
    setup = orjson.loads(begin)
    allow_cpu(setup["row_cpu_s"])
    try:
        template = ChatTemplate(setup["source"], setup["special_tokens"], datetime.fromisoformat(setup["now"]))
    except (jinja2.TemplateError, ValueError, RecursionError, MemoryError) as error:
        write_frame(replies, orjson.dumps({"problem": _told(error)}))
        return 0
    fails_always = failure_of_all(template)
    allow_cpu(0)
    write_frame(replies, orjson.dumps({"problem": None, "fails_always": fails_always}))
    writer = Writer(template, setup)
    while (request := read_frame(requests, MAX_MESSAGE_BYTES)) is not None:
        write_frame(replies, orjson.dumps(write_some(writer, orjson.loads(request))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
