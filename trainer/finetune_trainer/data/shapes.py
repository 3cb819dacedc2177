"""The shapes that rows of datasets have, each with what tells it, what of it is read, and how it becomes a row.

A shape reads one decoded row and nothing else, so that each can be understood, and tested, alone. How a row's fields
are named is in `field_names`, how its messages are in `messages`, and what their order means in `order`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from finetune_api.job import DatasetFormat
from finetune_trainer.data import preferences, rankings
from finetune_trainer.data.field_names import (
    ANSWER,
    CONVERSATION,
    QUESTION,
    SYSTEM,
    TOOLS,
    is_fact,
    says_nothing,
    shown,
)
from finetune_trainer.data.kinds import kind_of
from finetune_trainer.data.messages import Said, refuse_unknown
from finetune_trainer.data.problems import Broken, Problem, RefusedError
from finetune_trainer.data.row_reader import Found, RowChoices, RowReader, is_text_of_messages
from finetune_trainer.data.rows import Answered, Completion, Conversation, Row, Text, Thumb


def _messages(reading: RowReader) -> Conversation:
    return reading.conversation(reading.messages.read(reading.row.get("messages"), "messages"), "messages")


def _share_gpt(reading: RowReader) -> Conversation:
    name = reading.one_of(CONVERSATION) or CONVERSATION[0]
    return reading.conversation(reading.messages.read(reading.row.get(name), name), name)


def _answered(reading: RowReader, question: str, where: str, *answer: str) -> Conversation:
    said = [Said({"role": "user", "content": question}), Said({"role": "assistant", "content": reading.text(*answer)})]
    return reading.conversation([*reading.history(), *said], where)


def _alpaca(reading: RowReader) -> Conversation:
    return _answered(reading, reading.instruction("input"), "instruction", "output")


def _dolly(reading: RowReader) -> Conversation:
    return _answered(reading, reading.instruction("context"), "instruction", "response")


def _question_answer(reading: RowReader) -> Conversation:
    return _answered(reading, reading.text(*QUESTION), "question", *ANSWER)


def _prompt_completion(reading: RowReader) -> Conversation | Completion:
    prompt, completion = reading.row.get("prompt"), reading.row.get("completion")
    both_as_text = is_text_of_messages(prompt) and is_text_of_messages(completion)
    if not isinstance(prompt, list) and not isinstance(completion, list) and not both_as_text:
        return Completion(reading.text("prompt"), reading.text("completion"), reading.weight())
    before = [Said(each.message, False) for each in reading.messages.read(prompt, "prompt")]
    said = reading.messages.read(completion, "completion")
    if all(each.message["role"] != "assistant" for each in said):
        raise RefusedError(Problem.NO_ASSISTANT, "completion")
    return reading.conversation([*before, *said], "prompt")


def _text(reading: RowReader) -> Text:
    return Text(reading.text("text"), reading.weight())


def _thumb(reading: RowReader) -> Thumb:
    """Return the answer that another shape reads, with what the row says of it."""
    fitting = (SHAPES[name] for name in _ANSWERED if SHAPES[name].fits(reading.row))
    shape = next(fitting, None)
    if shape is None:
        raise RefusedError(Problem.MISSING_FIELD, "prompt")
    found = preferences.thumb(reading, cast(Answered, shape.to_row(reading)))
    reading.also_read.update(kind_of(found.answer).only_fields(found.answer) or shape.reads)
    return found


_BESIDE = frozenset((*SYSTEM, *TOOLS, "chat_template_kwargs", "weight"))  # what any conversation may have beside it


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape of rows. A row fits that has one field of each group in `needs`, and none of `contradicted_by`.

    needed: the fields that such a row has, for people, where the first name of each group would not say it."""

    needs: tuple[tuple[str, ...], ...]
    reads: frozenset[str]
    to_row: Callable[[RowReader], Row]
    meaning: str  # for people, in docs/data.md
    examples: tuple[str, ...]  # rows as they stand in a file
    contradicted_by: frozenset[str] = frozenset()
    needed: str = ""

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has the fields of this shape."""
        has_all = all(any(row.get(name) is not None for name in group) for group in self.needs)
        return has_all and not any(row.get(name) is not None for name in self.contradicted_by)


_ANSWERED = (
    DatasetFormat.MESSAGES,
    DatasetFormat.SHARE_GPT,
    DatasetFormat.ALPACA,
    DatasetFormat.DOLLY,
    DatasetFormat.PROMPT_COMPLETION,
    DatasetFormat.QUESTION_ANSWER,
)

SHAPES: dict[DatasetFormat, Shape] = {
    DatasetFormat.MESSAGES: Shape(
        needs=(("messages",),),
        reads=_BESIDE | {"messages"},
        to_row=_messages,
        meaning="A conversation in OpenAI's form, as a list or as JSON text. Every answer is learned.",
        examples=(
            '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}',
            '{"messages": [{"role": "user", "content": "Rain in Oslo?"}, {"role": "assistant", "content": null, '
            '"tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '
            '"{\\"town\\": \\"Oslo\\"}"}}]}, {"role": "tool", "tool_call_id": "c1", "content": "rain"}, '
            '{"role": "assistant", "content": "Yes."}], "tools": [{"type": "function", "function": {"name": "weather", '
            '"parameters": {"type": "object", "properties": {"town": {"type": "string"}}}}}]}',
            '{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5", "weight": 0}, '
            '{"role": "user", "content": "Sure?"}, {"role": "assistant", "reasoning_content": "Two and two are four.", '
            '"content": "4"}]}',
        ),
    ),
    DatasetFormat.SHARE_GPT: Shape(
        needs=(CONVERSATION,),
        reads=_BESIDE | set(CONVERSATION),
        to_row=_share_gpt,
        meaning="A conversation under " + ", ".join(f"`{each}`" for each in CONVERSATION) + ", whose messages have "
        "`from` and `value`, or `role` and `content`.",
        examples=(
            '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}',
            '{"system": "Be brief.", "conversation": [{"human": "Hi", "assistant": "Hello!"}]}',
            '{"conversations": [{"from": "human", "value": "Rain?"}, {"from": "function_call", "value": '
            '"{\\"name\\": \\"weather\\", \\"arguments\\": {}}"}, {"from": "observation", "value": "rain"}, '
            '{"from": "gpt", "value": "Yes."}], "tools": "[{\\"name\\": \\"weather\\", \\"parameters\\": {}}]"}',
        ),
    ),
    DatasetFormat.ALPACA: Shape(
        needs=(("instruction",), ("output",)),
        reads=_BESIDE | {"instruction", "input", "output", "history"},
        to_row=_alpaca,
        meaning="A question that is `instruction` and, after an empty line, `input`, or one of them where the other is "
        "empty; the answer is `output`. Pairs in `history` are earlier turns, whose answers are learned too.",
        examples=(
            '{"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"}',
            '{"instruction": "And 4?", "input": "", "output": "9", "history": [["Add 2 and 3.", "5"]]}',
        ),
    ),
    DatasetFormat.DOLLY: Shape(
        needs=(("instruction",), ("response",)),
        reads=_BESIDE | {"instruction", "context", "response", "history"},
        to_row=_dolly,
        meaning="A question that is `instruction` and, after an empty line, `context` where it is not empty; the "
        "answer is `response`.",
        examples=(
            '{"instruction": "Who wrote it?", "context": "Faust is by Goethe.", "response": "Goethe", '
            '"category": "closed_qa"}',
        ),
    ),
    DatasetFormat.QUESTION_ANSWER: Shape(
        needs=(QUESTION, ANSWER),
        reads=_BESIDE | {*QUESTION, *ANSWER, "history"},
        to_row=_question_answer,
        meaning="A question under one of "
        + ", ".join(f"`{each}`" for each in QUESTION)
        + " and its answer under one of "
        + ", ".join(f"`{each}`" for each in ANSWER)
        + ", rendered by the chat template.",
        examples=(
            '{"question": "What is the capital of Norway?", "answer": "Oslo"}',
            '{"prompt": "What is the capital of Norway?", "response": "Oslo"}',
        ),
        contradicted_by=frozenset(("instruction",)),
    ),
    DatasetFormat.PROMPT_COMPLETION: Shape(
        needs=(("prompt",), ("completion",)),
        reads=_BESIDE | {"prompt", "completion"},
        to_row=_prompt_completion,
        meaning="A plain text and how it goes on, which no template renders; the completion and an end token are "
        "learned. Where both are lists of messages, or JSON text of such, they are a conversation whose answers in "
        "`completion` are learned.",
        examples=(
            '{"prompt": "The capital of Norway is", "completion": " Oslo."}',
            '{"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", '
            '"content": "Hello!"}]}',
        ),
    ),
    DatasetFormat.TEXT: Shape(
        needs=(("text",),),
        reads=frozenset(("text", "weight")),
        to_row=_text,
        meaning="A document, for method CPT. All of it is learned.",
        examples=('{"text": "Oslo is the capital of Norway."}',),
    ),
    DatasetFormat.PAIR: Shape(
        needs=(("chosen",), ("rejected",)),
        reads=_BESIDE | {"chosen", "rejected"},
        to_row=preferences.pair,
        meaning="Two answers to one prompt, of which `chosen` is preferred. Plain texts under `prompt`, `chosen` and "
        "`rejected` are learned as they are, as in TRL, which no template renders. Lists of messages are rendered: "
        "each is a whole conversation, or what follows the messages in `prompt`, `messages` or `conversations`, where "
        "it has no message of a user; so is a question under `question`, `query`, `input` or `instruction` with two "
        "texts. Both end with an answer of the assistant after the same messages, and these two answers alone are "
        "learned.",
        examples=(
            '{"prompt": "The capital of Norway is", "chosen": " Oslo.", "rejected": " Bergen."}',
            '{"prompt": [{"role": "user", "content": "2+2?"}], "chosen": [{"role": "assistant", "content": "4"}], '
            '"rejected": [{"role": "assistant", "content": "5"}]}',
            '{"chosen": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], "rejected": '
            '[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}]}',
            '{"system": "Be brief.", "question": "2+2?", "chosen": "4", "rejected": "Let me think about it first."}',
            '{"instruction": "Add the numbers.", "input": "2 and 2", "chosen": "4", "rejected": "5"}',
            '{"conversations": [{"from": "human", "value": "2+2?"}], "chosen": {"from": "gpt", "value": "4"}, '
            '"rejected": {"from": "gpt", "value": "5"}}',
            '{"prompt": "2+2?", "prompt_id": "a1", "chosen": [{"role": "user", "content": "2+2?"}, {"role": '
            '"assistant", "content": "4"}], "rejected": [{"role": "user", "content": "2+2?"}, {"role": "assistant", '
            '"content": "5"}], "messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": '
            '"4"}], "score_chosen": 9.0, "score_rejected": 2.5}',
            '{"chosen": "\\n\\nHuman: 2+2?\\n\\nAssistant: 4", "rejected": "\\n\\nHuman: 2+2?\\n\\nAssistant: 5"}',
        ),
    ),
    DatasetFormat.THUMB: Shape(
        needs=((*preferences.LABEL, *preferences.RATING), ("messages", *CONVERSATION, "completion", *ANSWER)),
        reads=frozenset(("weight", *preferences.LABEL)),
        contradicted_by=frozenset(
            ("chosen", "rejected", *rankings.ANSWERS)
        ),  # whose scores are no rating of one answer
        to_row=_thumb,
        needed="`label` and `messages`, or `label`, `prompt` and `completion`",
        meaning="An answer that is good or bad, under one of "
        + ", ".join(f"`{each}`" for each in preferences.LABEL)
        + ": true or false, 1 or 0, 1 or -1, `good` or `bad`, `up` or `down`, `like` or `dislike`, `desirable` or "
        "`undesirable`, `chosen` or `rejected`; or with a `rating` (or `score`), a number, good from "
        "`datasets[].preference.goodFrom` on. What is answered has any of the shapes before this one but Text and "
        "Pair; its last answer alone is learned, and must be its end.",
        examples=(
            '{"prompt": "The capital of Norway is", "completion": " Oslo.", "label": true}',
            '{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}], "label": 0}',
            '{"question": "2+2?", "answer": "4", "label": "desirable"}',
        ),
    ),
    DatasetFormat.RANKING: Shape(
        needs=(rankings.ANSWERS, (*rankings.PROMPTS, *rankings.SCORES, *rankings.RANKS)),
        reads=_BESIDE,
        to_row=rankings.ranking,
        needed="`prompt`, `responses` and `scores`",
        meaning="Several answers to one prompt under one of "
        + ", ".join(f"`{each}`" for each in rankings.ANSWERS)
        + ", which become pairs: the best and the worst one, or what `datasets[].preference` says. How good each is "
        "stands in a list under "
        + ", ".join(f"`{each}`" for each in (*rankings.SCORES, *rankings.RANKS))
        + " (of ranks 1 is the best), or beside the text of each as `score`, `rating` or `overall_score`. Prompt and "
        "answers are as those of Pair.",
        examples=(
            '{"prompt": "2 and 2 is", "responses": [" 4.", " 5.", " more than 3."], "scores": [5, 1, 3]}',
            '{"question": "2+2?", "responses": ["5", "4"], "rank": [2, 1]}',
            '{"instruction": "2+2?", "completions": [{"response": "4", "overall_score": 9.5}, {"response": "5", '
            '"overall_score": 2}]}',
        ),
    ),
}


def read_row(value: object, shape_name: DatasetFormat, choices: RowChoices) -> Found | Broken:
    """Return what a decoded row says, or the first thing that is wrong with it. A field's value may be Broken."""
    if not isinstance(value, dict):
        return Broken(Problem.NOT_AN_OBJECT)
    shape = SHAPES[shape_name]
    try:
        row = renamed(cast(dict[str, Any], value), choices)
    except RefusedError as refused:
        return refused.broken
    try:
        reading = RowReader(row, choices)
        found = shape.to_row(reading)
        read = (kind_of(found).only_fields(found) or shape.reads) | reading.also_read
        passed_over = _passed_over(row, read | _group_field(choices), found)
    except RefusedError as refused:
        broken = _of_another_shape(row, shape_name, choices) or _rated(refused.broken, shape_name)
        return broken if broken.problem is Problem.OTHER_SHAPE else _in_their_names(broken, choices)
    passed_over |= {shown(name) for name in cast(dict[str, Any], value) if name in choices.ignored}
    return Found(
        found,
        frozenset(reading.changes | reading.messages.changes),
        frozenset(passed_over | reading.messages.passed_over),
    )


def _group_field(choices: RowChoices) -> frozenset[str]:
    """Return the field that is read for the split alone, as it is called here."""
    name = choices.group_field
    return frozenset() if name is None else frozenset((choices.columns.get(name, name),))


def _of_another_shape(row: Mapping[str, Any], shape_name: DatasetFormat, choices: RowChoices) -> Broken | None:
    """Return what is wrong with a row that fits other shapes than its dataset's alone."""
    if SHAPES[shape_name].fits(row):
        return None
    others = [name for name, shape in SHAPES.items() if shape.fits(row)]
    if shape_name is DatasetFormat.THUMB and set(others) <= set(_ANSWERED):
        return None  # an answer of which nothing is said lacks its label
    detail = f"it is {' or '.join(others)}, not {shape_name}, which {choices.told_by}"
    return Broken(Problem.OTHER_SHAPE, detail=detail) if others else None


def _rated(broken: Broken, shape_name: DatasetFormat) -> Broken:
    """Return the problem; of an answer that is rated, with the methods that learn from that."""
    is_rating = broken.problem is Problem.UNKNOWN_FIELD and broken.field in preferences.LABEL
    if not is_rating or shape_name not in _ANSWERED:
        return broken
    return Broken(broken.problem, broken.field, "; ".join(filter(None, (broken.detail, preferences.RATES))))


def renamed(row: dict[str, Any], choices: RowChoices) -> dict[str, Any]:
    """Return the row without the fields that may be passed over, and the others named as here.

    Raises RefusedError where that would hide another field."""
    if choices.ignored:
        row = {name: each for name, each in row.items() if name not in choices.ignored}
    columns = choices.columns
    if not columns:
        return row
    found = {columns.get(name, name): each for name, each in row.items() if name in columns}
    for name, each in row.items():
        if name in columns:
            continue
        if name not in found:
            found[name] = each
        elif not says_nothing(each):
            raise RefusedError(Problem.TWO_FIELDS, shown(name), "datasets[].columns names another field for it")
    return found


def _passed_over(row: Mapping[str, Any], reads: frozenset[str], found: Row) -> set[str]:
    """Return the names of fields that are not read. Raises RefusedError where one of them says something of its own.

    A text that is a message too, as the `prompt` that some datasets have beside their messages, says nothing more."""
    others = [name for name, each in row.items() if name not in reads and not says_nothing(each)]
    unknown = [name for name in others if not is_fact(name, row[name])]
    if unknown:
        said = {each.strip() for each in kind_of(found).contents(found)}
        unknown = [name for name in unknown if not isinstance(row[name], str) or row[name].strip() not in said]
    refuse_unknown(sorted(unknown, key=lambda name: name not in preferences.LABEL))
    return {shown(name) for name in others}


def _in_their_names(broken: Broken, choices: RowChoices) -> Broken:
    """Return the problem with the field named as the files do."""
    for theirs, ours in choices.columns.items():
        if broken.field == ours or broken.field.startswith((f"{ours}[", f"{ours}.")):
            return Broken(broken.problem, shown(theirs) + broken.field[len(ours) :], broken.detail)
    return broken
