"""Which text a model is to learn: every answer after exactly the prompt that a server would give it.

The rule, for one answer. *Context* is the conversation before it, rendered with the generation prompt: what a server
sends. *Answer* is what the template writes for that message as the last one, up to the token at which the model stops:
what a server is to get back. Where the render of the whole conversation begins with context + answer for every answer,
one sequence teaches them all. Else the conversation is unrolled: one sequence for each answer.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, cast

import jinja2

from finetune_trainer.data.template import ChatTemplate, Message

Span = tuple[int | None, int]  # begin (None where it is not known) and end, in characters

# What opens a block of reasoning in published templates, and what closes it.
REASONING_BLOCKS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "◁think▷": "◁/think▷",
}
# Variables by which published templates write their prompt with or without reasoning, and the value that says so.
_WITH_REASONING = (("enable_thinking", True), ("thinking", True), ("enable_reasoning", True))
_WITHOUT_REASONING = (
    ("enable_thinking", False),
    ("thinking", False),
    ("enable_reasoning", False),
    ("reasoning_effort", "none"),
)
_NEXT = "And then?"  # what a user or a tool might say next
MAX_EXACT_ANSWERS = 8  # of one conversation whose contexts are all rendered, before one of each kind must do


class Note(StrEnum):
    """What was done to a conversation, beside rendering it: counted in plan and report."""

    UNROLLED = "unrolled"
    WITH_REASONING = "with_reasoning"  # the template's form with reasoning, as the row has some
    WITHOUT_REASONING = "without_reasoning"  # the template's form without reasoning, as the row has none
    REASONING_PLACED = "reasoning_placed"  # into the block that the prompt opens, where the template drops it
    OPENING_ADDED = "opening_added"  # of reasoning that is only closed, as the prompt opens it
    ANSWER_OF_SHORT = "answer_of_short"  # the answer as it is written after less than what comes before it
    END_OF_NEXT = "end_of_next"  # the answer ends with the token by which the template begins the next message
    END_ADDED = "end_added"
    MARKS_DIFFER = "marks_differ"  # {% generation %} marks another part than the rule


class AnswerError(Exception):
    """An answer cannot be learned as it would be served. message: its index."""

    def __init__(self, message: int) -> None:
        super().__init__(message)
        self.message = message


class AnswerNotFoundError(AnswerError):
    """What the template writes for the answer does not follow the prompt that a server would send."""


class NoReasoningError(AnswerError):
    """The prompt opens a block of reasoning, which the row has none for, and there is no prompt without it."""


class NoStopError(AnswerError):
    """The answer ends in no token at which the model stops."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation as the template gets it. learned: for each message, whether its answer is learned."""

    messages: list[Message]
    learned: Sequence[bool]
    tools: list[dict[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def last_learned(self) -> int:
        return max(index for index, learned in enumerate(self.learned) if learned)


@dataclass(frozen=True, slots=True)
class Ends:
    """How answers end. stops: the texts of the tokens at which the model stops; added: what ends an answer for which
    the template writes none of them, or None to refuse it."""

    stops: tuple[str, ...]
    added: str | None = None

    def cut(self, answer: str) -> str | None:
        """Return the answer through the first of the stops that it ends with; white space may stand between them."""
        found = None
        rest = answer.rstrip()
        while stop := next((each for each in self.stops if rest.endswith(each)), None):
            found = rest
            rest = rest[: -len(stop)].rstrip()
        return found


class Served(NamedTuple):
    """One answer: what a server sends, what it is to get back, and the template's variables that say so."""

    message: int
    context: str
    answer: str
    variables: Mapping[str, Any]


class _Frame(NamedTuple):
    """What a template writes around answers of one kind."""

    lead: str
    stop: str


class RenderedSequence(NamedTuple):
    """A text to learn from, which is tokenised in one piece, and where in it the answers are, in characters."""

    text: str
    spans: list[Span]


class Place(NamedTuple):
    """Where an answer stands: of which message, in which sequence, from and to which character."""

    message: int
    sequence: int
    begin: int
    end: int


class Learnable(NamedTuple):
    """What a conversation becomes: its texts, where its answers are in them, and what was done."""

    texts: list[str]
    places: list[Place]
    notes: frozenset[Note]

    @property
    def sequences(self) -> list[RenderedSequence]:
        """Every text with the answers in it."""
        found = [RenderedSequence(text, []) for text in self.texts]
        for place in self.places:
            found[place.sequence].spans.append((place.begin, place.end))
        return found


def learnable(template: ChatTemplate, chat: Chat, ends: Ends) -> Learnable:
    """Return what to learn of a conversation, by the rule. Raises AnswerError, and what a template raises."""
    judge = _Judge(template, chat, ends)
    asked = [index for index, learned in enumerate(chat.learned) if learned]
    if len(asked) > MAX_EXACT_ANSWERS:
        found = _of_a_long_one(judge)
        if found is not None:
            return found
    answers = [judge.served(index, chat.variables) for index in asked]
    variables = answers[0].variables
    if all(each.variables == variables for each in answers):
        last = answers[-1].context + answers[-1].answer
        whole = judge.whole(variables)
        whole = last if last.startswith(whole) else whole  # all but the last answer's own stop token
        if all(_continues(whole, each) for each in answers):
            return Learnable([whole], [_place(each, 0) for each in answers], judge.noted())
    if len(answers) > 1:
        judge.notes.add(Note.UNROLLED)
    texts = [each.context + each.answer for each in answers]
    return Learnable(texts, [_place(each, number) for number, each in enumerate(answers)], judge.noted())


def everything(template: ChatTemplate, chat: Chat) -> RenderedSequence:
    """Return the whole conversation, and from where its first answer begins to its end, for learning all of it."""
    judge = _Judge(template, chat, Ends(()))
    whole = judge.whole(chat.variables)
    before = judge.context(chat.learned.index(True), chat.variables)
    return RenderedSequence(whole, [(len(before) if whole.startswith(before) else None, len(whole))])


def marks_differ(template: ChatTemplate, chat: Chat, ends: Ends) -> bool:
    """Whether `{% generation %}` marks, in any learned answer as the last message, another part than the rule says."""
    judge = _Judge(template, chat, ends)
    for index in (index for index, learned in enumerate(chat.learned) if learned):
        served = judge.served(index, chat.variables)
        text = template.render(chat.messages[: index + 1], False, chat.tools, served.variables)
        marked = template.marked[-1] if template.marked else ""
        begin, answer = text.rfind(marked), served.answer
        if not marked or begin != len(served.context) or not (ends.cut(marked) or marked).startswith(answer.rstrip()):
            return True
    return False


def words_of(message: Message) -> str:
    """Return a message's content, whose parts are all of text if it has parts."""
    content: Any = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in cast(list[dict[str, Any]], content))
    return content if isinstance(content, str) else ""


def reasoning_of(message: Message) -> tuple[str, str, str]:
    """Return a message's reasoning, what closes it inside its content (nothing where it stands apart), and the content
    after it. The reasoning is empty where there is none."""
    content = words_of(message)
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str) and reasoning.strip():
        return reasoning, "", content
    for opening, closing in REASONING_BLOCKS.items():
        inside, close, after = content.partition(closing)
        if close and inside.lstrip().startswith(opening):
            inside = inside.lstrip()[len(opening) :]
            return (inside, closing, after) if inside.strip() else ("", closing, after)
    return "", "", content


def opened_by(template: ChatTemplate, context: str) -> str | None:
    """Return what opens reasoning at the end of a prompt, if the template itself has put it there."""
    bare = context.rstrip()
    tag = next((each for each in REASONING_BLOCKS if bare.endswith(each)), None)
    return tag if tag is not None and tag in template.source else None


class _Judge:
    """Renders parts of one conversation, each once."""

    def __init__(self, template: ChatTemplate, chat: Chat, ends: Ends) -> None:
        self._template = template
        self.chat = chat
        self._ends = ends
        self.notes = set[Note]()
        self._wholes: list[tuple[Mapping[str, Any], str]] = []

    def noted(self) -> frozenset[Note]:
        return frozenset(self.notes)

    def whole(self, variables: Mapping[str, Any]) -> str:
        for known, text in self._wholes:
            if known == variables:
                return text
        text = self._render(self.chat.messages, variables)
        self._wholes.append((variables, text))
        return text

    def context(self, index: int, variables: Mapping[str, Any]) -> str:
        return self._render(self.chat.messages[:index], variables, prompt=True)

    def served(self, index: int, variables: Mapping[str, Any]) -> Served:
        """Return how the answer at `index` is served. Raises AnswerError.

        By the template's own default, or else by the first of its forms with reasoning where the row has some that the
        default drops, and without reasoning where the row has none for the block that the default opens."""
        reasoning = reasoning_of(self.chat.messages[index])[0].strip()
        default = self._served(index, variables, bool(reasoning))
        if default is not None and reasoning in default.answer:
            return default
        note, forms = Note.WITHOUT_REASONING, _WITHOUT_REASONING
        if reasoning:
            note, forms = Note.WITH_REASONING, _WITH_REASONING
        for name, value in forms:
            if name in self._template.variables and name not in variables:
                found = self._served(index, {**variables, name: value}, bool(reasoning))
                if found is not None and reasoning in found.answer:
                    self.notes.add(note)
                    return found
        if default is not None:
            return default
        if not reasoning and opened_by(self._template, self.context(index, variables)) is not None:
            raise NoReasoningError(index)
        raise AnswerNotFoundError(index)

    def _served(self, index: int, variables: Mapping[str, Any], reasons: bool) -> Served | None:
        """Return how the answer is served with these variables; None where it cannot be."""
        context = self.context(index, variables)
        opened = opened_by(self._template, context)
        if opened is None:
            answer = self._answer(index, context, variables)
        elif reasons:
            answer = self._reasoned(index, context, opened, variables)
        else:
            return None
        return (
            None
            if answer is None
            else Served(index, context, self._ended(index, context, answer, variables), variables)
        )

    def frame(self, served: Served) -> "_Frame | None":
        """Return what is written between the message before an answer and the answer, and what ends it."""
        before = _bare(self.chat.messages[served.message - 1])
        found, _, lead = served.context.rpartition(before) if before else ("", "", "")
        stop = next((each for each in self._ends.stops if served.answer.endswith(each)), None)
        if not found or not lead.strip() or stop is None or served.answer.find(stop) != len(served.answer) - len(stop):
            return None
        return _Frame(lead, stop)

    def are_plain(self, marks: set[str]) -> bool:
        """Whether no message's text holds one of the marks, or of what the template itself looks for or writes."""
        sought = [re.escape(each) for each in (*marks, *self._template.marks)]
        found = re.compile("|".join(sought))
        return not any(found.search(text) for text in _strings(self.chat.messages))

    def _render(self, messages: list[Message], variables: Mapping[str, Any], prompt: bool = False) -> str:
        return self._template.render(messages, prompt, self.chat.tools, variables)

    def _finished(self, index: int, variables: Mapping[str, Any]) -> str:
        """Return the conversation that ends with the answer at `index`."""
        if index == len(self.chat.messages) - 1:
            return self.whole(variables)
        return self._render(self.chat.messages[: index + 1], variables)

    def _answer(self, index: int, context: str, variables: Mapping[str, Any]) -> str | None:
        """Return what is written for an answer after its prompt; None where it does not follow that.

        Some templates write what comes before differently once there is an answer: Mistral's moves the system prompt,
        gpt-oss's drops the reasoning before calls. Then it is what is written after less, if the conversation ends with
        just that: after the question alone, or without the reasoning of earlier answers."""
        finished = self._finished(index, variables)
        if finished.startswith(context):
            return finished[len(context) :]
        for before in _shorter(self.chat.messages[:index]):
            prompt = self._render(before, variables, prompt=True)
            through = self._render([*before, self.chat.messages[index]], variables)
            answer = through[len(prompt) :]
            if answer and through.startswith(prompt) and finished.endswith(answer):
                self.notes.add(Note.ANSWER_OF_SHORT)
                return answer
        return None

    def _reasoned(self, index: int, context: str, opening: str, variables: Mapping[str, Any]) -> str | None:
        """Return reasoning and answer after a prompt that opens the block of reasoning.

        Where the template drops the reasoning of finished answers (DeepSeek-R1's does), it is put where the model
        writes it: the row's own text after the opened block, or reasoning, closing and an empty line."""
        finished = self._finished(index, variables)
        reasoning, closing, content = reasoning_of(self.chat.messages[index])
        if finished.startswith(context) and reasoning.strip() in finished[len(context) :]:
            return finished[len(context) :]
        bare = {key: value for key, value in self.chat.messages[index].items() if key not in _REASONING_FIELDS}
        bare["content"] = [{"type": "text", "text": content}] if isinstance(bare.get("content"), list) else content
        through = self._render([*self.chat.messages[:index], bare], variables)
        before = context[: context.rindex(opening)]
        if not through.startswith(before):
            return None
        written = _empty_block(opening).sub("", through[len(before) :]).lstrip()
        self.notes.add(Note.REASONING_PLACED)
        if closing:
            space = content[: len(content) - len(content.lstrip())]
            return reasoning.lstrip() + closing + space + written
        return reasoning.strip() + "\n" + REASONING_BLOCKS[opening] + "\n\n" + written

    def _ended(self, index: int, context: str, answer: str, variables: Mapping[str, Any]) -> str:
        """Return the answer through its stop token, which is added where that was asked for. Raises NoStopError.

        Some templates end no answer, but begin each message with a token that ends the answer before it (GLM's
        `<|user|>`): that is what the model stops at."""
        cut = self._ends.cut(answer)
        if cut is not None:
            return cut
        said = "" if self.chat.messages[index].get("tool_calls") else reasoning_of(self.chat.messages[index])[2].strip()
        for begin in _ends_of(said, answer):
            found = [(at + len(each)) for each in self._ends.stops if (at := answer.find(each, begin)) >= 0]
            if found and not self._is_within_stop(said, begin, answer):
                return answer[: min(found)]  # what the template writes after it is never asked of the model
        stop = self._begin_of_next(index, context, answer, variables)
        if stop is not None:
            self.notes.add(Note.END_OF_NEXT)
            return answer + stop
        if self._ends.added is None:
            raise NoStopError(index)
        self.notes.add(Note.END_ADDED)
        return answer.rstrip() + self._ends.added

    def _is_within_stop(self, said: str, end: int, answer: str) -> bool:
        """Whether words that end here are only letters of a stop token."""
        begin = end - len(said)
        longer = (stop for stop in self._ends.stops if len(stop) > len(said))
        return any(answer.find(stop, max(0, end - len(stop)), begin + len(stop)) >= 0 for stop in longer)

    def _begin_of_next(self, index: int, context: str, answer: str, variables: Mapping[str, Any]) -> str | None:
        """Return the stop token that directly follows the answer at `index` once another message does."""
        message = self.chat.messages[index]
        content: Any = [{"type": "text", "text": _NEXT}] if isinstance(message.get("content"), list) else _NEXT
        following: Message = {"role": "user", "content": content}
        for call in message.get("tool_calls") or ():
            following = {"role": "tool", "content": content, "tool_call_id": call.get("id", "")}
        tail = reasoning_of(message)[2].strip() if following["role"] == "user" else answer.rpartition("\n")[2]
        try:
            longer = self._render([*self.chat.messages[: index + 1], following], variables)
        except (jinja2.TemplateError, TypeError, LookupError):
            return None
        if not tail or not answer.rstrip().endswith(tail):
            return None
        written = longer.removeprefix(context).rpartition(_NEXT)[0]  # the answer, and what leads to the next message
        rests = (written[end:] for end in _ends_of(tail, written))
        return next((each for rest in rests for each in self._ends.stops if rest.startswith(each)), None)


_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def _shorter(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield the messages from the last question on, and all of them without reasoning, where that is less.

    What is said beside calls is reasoning too: it is where gpt-oss's template writes it."""
    begin = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=0)
    if begin:
        yield messages[begin:]
    bare = [_without_reasoning(message) for message in messages]
    if bare != messages:
        yield bare


def _without_reasoning(message: Message) -> Message:
    left_out = (*_REASONING_FIELDS, "content") if message.get("tool_calls") else _REASONING_FIELDS
    return {name: value for name, value in message.items() if name not in left_out}


def _empty_block(opening: str) -> re.Pattern[str]:
    return re.compile(rf"\A\s*{re.escape(opening)}\s*{re.escape(REASONING_BLOCKS[opening])}")


def _ends_of(words: str, text: str) -> Iterator[int]:
    """Yield where words end in a text, the last place first; for no words the end of the text."""
    at = text.rfind(words)
    while at >= 0:
        yield at + len(words)
        at = text.rfind(words, 0, at + len(words) - 1) if words else -1


def _continues(whole: str, served: Served) -> bool:
    """Whether the whole conversation's text begins with an answer's context and the answer."""
    return whole.startswith(served.context) and whole.startswith(served.answer, len(served.context))


def _place(served: Served, sequence: int) -> Place:
    return Place(served.message, sequence, len(served.context), len(served.context) + len(served.answer))


def _of_a_long_one(judge: _Judge) -> Learnable | None:
    """Return a long conversation as one sequence, rendering the context of two answers of each kind alone.

    To render the context of every answer takes time that grows with the square of their number. So the first and the
    last answer of each kind (by what surrounds it) are judged by the rule, and those between are found by what the
    template writes around these. None where that is not sure: a text that holds what the template writes around
    messages, an answer that is not in its place, a conversation that one sequence does not carry.
    """
    chat = judge.chat
    messages = chat.messages
    kinds: dict[Any, list[int]] = {}
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            kinds.setdefault(_kind(messages, index), []).append(index)
    if 2 * len(kinds) > MAX_EXACT_ANSWERS or messages[0]["role"] == "assistant":
        return None
    whole = judge.whole(chat.variables)
    exact: dict[int, Served] = {}
    frames: dict[Any, _Frame] = {}
    for kind, indices in kinds.items():
        for index in dict.fromkeys((indices[0], indices[-1])):
            served = judge.served(index, chat.variables)
            frame = judge.frame(served)
            if served.variables != chat.variables or not _continues(whole, served) or frame is None:
                return None
            if frames.setdefault(kind, frame) != frame:
                return None
            exact[index] = served
    if not judge.are_plain({mark for frame in frames.values() for mark in (frame.lead.strip(), frame.stop)}):
        return None
    places: list[Place] = []
    position = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index in exact:
            place = _place(exact[index], 0)
        else:
            frame = frames[_kind(messages, index)]
            lead = _bare(messages[index - 1]) + frame.lead
            begin = whole.find(lead, position) + len(lead)
            end = whole.find(frame.stop, begin) + len(frame.stop)
            if begin < position + len(lead) or end < begin + len(frame.stop):
                return None
            place = Place(index, 0, begin, end)
        if place.begin < position or whole.find(_bare(message), place.begin, place.end) < 0:
            return None
        position = place.end
        if chat.learned[index]:
            places.append(place)
    return Learnable([whole], places, judge.noted())


def _kind(messages: list[Message], index: int) -> Any:
    """Return what may change how a template writes an answer: the fields of the messages around it, and their roles."""
    near = messages[index - 1 : index + 2] if index else messages[:2]
    return tuple((each["role"], *sorted(each)) for each in near), index == len(messages) - 1


def _bare(message: Message) -> str:
    return words_of(message).strip()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in cast(dict[Any, Any], value).values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in cast(list[Any], value):
            yield from _strings(each)
