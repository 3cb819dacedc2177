"""Messages in all the spellings that people use come out in OpenAI's form, or are refused by name."""

import json
from typing import Any

import pytest

from finetune_trainer.data.messages import Message, MessageReader
from finetune_trainer.data.problems import Change, Problem, RefusedError

USER: Message = {"role": "user", "content": "q"}
CALL: Message = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Oslo"}}}


def answer(**fields: Any) -> Message:
    return {"role": "assistant", "content": "a", **fields}


def read(*items: object, ignored: tuple[str, ...] = ()) -> list[Message]:
    return [each.message for each in MessageReader(ignored, {}).read(list(items), "messages")]


def learned(item: Message) -> bool | None:
    return MessageReader((), {}).read([item], "messages")[0].learned


def refused(item: object) -> tuple[Problem, str]:
    with pytest.raises(RefusedError) as caught:
        MessageReader((), {}).read([item], "messages")
    return caught.value.broken.problem, caught.value.broken.field


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (USER, USER),
        ({"from": "human", "value": "q"}, USER),
        ({"role": "user", "value": "q"}, USER),
        ({"from": "user", "content": "q"}, USER),
        ({"from": "Human ", "value": "q"}, USER),
        ({"role": "user", "from": "user", "content": "q", "value": "q"}, USER),
        ({"from": "human", "value": "q", "content": None}, USER),
        ({"from": "gpt", "value": "a"}, answer()),
        ({"from": "chatgpt", "value": "a"}, answer()),
        ({"from": "bing", "value": "a"}, answer()),
        ({"role": "model", "content": "a"}, answer()),
        ({"role": "system", "content": ""}, {"role": "system", "content": ""}),
        ({"role": "system", "content": None}, {"role": "system", "content": ""}),
        ({"role": "developer"}, {"role": "developer", "content": ""}),
        ({"role": "developer", "content": "s"}, {"role": "developer", "content": "s"}),
        (answer(tool_calls=[], function_call=None, refusal=None, annotations=[], audio=None), answer()),
        (answer(id="m1", timestamp=3, metadata={"a": 1}), answer()),
        (answer(name="Ann"), answer(name="Ann")),
        # Content of parts.
        ({"role": "user", "content": [{"type": "text", "text": "q"}]}, USER),
        ({"role": "user", "content": ["q"]}, USER),
        ({"role": "user", "content": [{"type": "input_text", "text": "q"}]}, USER),
        ({"role": "user", "content": [{"type": "text", "text": "q", "image_url": None}]}, USER),
        ({"role": "user", "content": [{"type": "text", "text": "q", "cache_control": {"type": "x"}}]}, USER),
        ({"role": "user", "content": [{"type": "text", "text": "a "}, {"text": "b"}]}, {**USER, "content": "a b"}),
        # Reasoning.
        (answer(reasoning_content="r"), answer(reasoning_content="r")),
        (answer(reasoning="r"), answer(reasoning_content="r")),
        (answer(thinking="r"), answer(reasoning_content="r")),
        (answer(thinking="r", reasoning_content="r"), answer(reasoning_content="r")),
        (answer(thinking="", reasoning=None), answer()),
        (answer(content="<think>r</think>a"), answer(content="<think>r</think>a")),
        (answer(content="<think>\nr\n</think>\n\n  a", reasoning="r"), answer(content="  a", reasoning_content="r")),
        (answer(content="<think>\n\n</think>\n\na", reasoning="r"), answer(reasoning_content="r")),
        (answer(content="r\n</think>\na", thinking=" r"), answer(reasoning_content=" r")),
        (answer(content="r</think>", thinking="r"), answer(content="", reasoning_content="r")),
        (answer(content="of </think>", thinking="r"), answer(content="of </think>", reasoning_content="r")),
        (
            answer(content=[{"type": "thinking", "thinking": "r"}, {"text": "<think>r</think>a"}]),
            answer(reasoning_content="r"),
        ),
        (
            answer(content=[{"type": "thinking", "thinking": "r"}, {"type": "text", "text": "a"}]),
            answer(reasoning_content="r"),
        ),
        (
            answer(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "r"}]}, {"text": "a"}]),
            answer(reasoning_content="r"),
        ),
        (answer(content="", reasoning_content="r"), answer(content="", reasoning_content="r")),
        # Calls.
        (answer(function_call={"name": None, "arguments": None}), answer()),
        ({**USER, "tool_calls": [{"id": None, "function": {"name": None, "arguments": None}}]}, USER),
        (answer(tool_calls=[CALL]), answer(tool_calls=[CALL])),
        (answer(content=None, tool_calls=[CALL]), {"role": "assistant", "tool_calls": [CALL]}),
        (answer(content="", tool_calls=[CALL]), {"role": "assistant", "tool_calls": [CALL]}),
        (
            answer(content=[{"type": "text", "text": ""}], tool_calls=[CALL]),
            {"role": "assistant", "tool_calls": [CALL]},
        ),
        (answer(tool_calls=json.dumps([CALL])), answer(tool_calls=[CALL])),
        (answer(tool_calls=CALL), answer(tool_calls=[CALL])),
        (answer(tool_calls=[CALL["function"]]), answer(tool_calls=[CALL])),
        (answer(tool_calls=[CALL, CALL]), answer(tool_calls=[CALL, CALL])),
        (answer(tool_calls=[{**CALL, "id": "c1", "index": 0}]), answer(tool_calls=[{"id": "c1", **CALL}])),
        (
            answer(tool_calls=[{"function": {"name": "weather", "arguments": '{"town": "Oslo"}'}}]),
            answer(tool_calls=[CALL]),
        ),
        (
            answer(tool_calls=[{"function": {"name": "f", "arguments": ""}}]),
            answer(tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}]),
        ),
        (
            answer(content=None, function_call={"name": "weather", "arguments": '{"town": "Oslo"}'}),
            {"role": "assistant", "tool_calls": [CALL]},
        ),
        (
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "Oslo"}}'},
            {"role": "assistant", "tool_calls": [CALL]},
        ),
        (
            {"from": "function_call", "value": '<think>r</think>\n{"name": "weather", "arguments": {"town": "Oslo"}}'},
            {"role": "assistant", "content": "", "reasoning_content": "r", "tool_calls": [CALL]},
        ),
        ({"role": "user", "content": [{"type": "text", "value": "q"}]}, USER),
        # Results.
        (
            {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "weather"},
            {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "weather"},
        ),
        ({"from": "observation", "value": "rain"}, {"role": "tool", "content": "rain"}),
        ({"from": "function_response", "value": "rain"}, {"role": "tool", "content": "rain"}),
        ({"role": "ipython", "content": "rain"}, {"role": "tool", "content": "rain"}),
        (
            {"role": "function", "name": "f", "content": "rain"},
            {"role": "tool", "name": "f", "content": "rain"},
        ),
        ({"role": "tool", "content": None}, {"role": "tool", "content": ""}),
        ({"role": "tool", "content": [{"type": "text", "text": "rain"}]}, {"role": "tool", "content": "rain"}),
        ({"role": "tool", "content": {"town": "Åre"}}, {"role": "tool", "content": '{"town": "Åre"}'}),
        ({"role": "tool", "content": [{"id": 1}]}, {"role": "tool", "content": '[{"id": 1}]'}),
    ],
)
def test_a_message_means_the_same_in_every_spelling(item: Message, expected: Message) -> None:
    assert read(item) == [expected]


@pytest.mark.parametrize(
    ("item", "problem", "field"),
    [
        ("a", Problem.WRONG_TYPE, ""),
        ({"content": "a"}, Problem.MISSING_FIELD, ".role"),
        ({"role": "user"}, Problem.MISSING_FIELD, ".content"),
        ({"role": "user", "content": None}, Problem.MISSING_FIELD, ".content"),
        ({"role": "user", "content": ""}, Problem.EMPTY, ".content"),
        ({"from": "gpt", "value": " \n"}, Problem.EMPTY, ".value"),
        ({"role": "user", "content": "a\0b"}, Problem.NUL, ".content"),
        ({"role": "user", "content": 3}, Problem.WRONG_TYPE, ".content"),
        ({"role": "robot", "content": "a"}, Problem.UNKNOWN_ROLE, ".role"),
        ({"from": ["user"], "value": "a"}, Problem.UNKNOWN_ROLE, ".from"),
        ({"role": "user", "from": "gpt", "content": "a"}, Problem.TWO_FIELDS, ".from"),
        ({"role": "user", "content": "a", "value": "b"}, Problem.TWO_FIELDS, ".value"),
        (answer(thinking="r", reasoning="s"), Problem.TWO_FIELDS, ".thinking"),
        ({**USER, "reasoning": "r"}, Problem.WRONG_TYPE, ".reasoning"),
        (answer(content="<think>s</think>a", reasoning="r"), Problem.TWO_FIELDS, ".content"),
        (answer(tool_calls=[{"id": "c", "function": {"name": None}}]), Problem.MISSING_FIELD, ".tool_calls[0].name"),
        (answer(reasoning=[{"text": "r"}]), Problem.WRONG_TYPE, ".reasoning"),
        (answer(note="b"), Problem.UNKNOWN_FIELD, ".note"),
        (answer(refusal="No."), Problem.UNKNOWN_FIELD, ".refusal"),
        (answer(reasoning_details=[{"a": 1}]), Problem.UNKNOWN_FIELD, ".reasoning_details"),
        (answer(train_detail=[{"begin_offset": 0}]), Problem.UNKNOWN_FIELD, ".train_detail"),
        (answer(mask=True), Problem.UNKNOWN_FIELD, ".mask"),
        (answer(**{"a secret": 1}), Problem.UNKNOWN_FIELD, ".(other)"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, Problem.NOT_TEXT, ".content[0]"),
        ({"role": "user", "content": ["a", {"type": "input_audio"}]}, Problem.NOT_TEXT, ".content[1]"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a", "image_url": "u"}]},
            Problem.NOT_TEXT,
            ".content[0].image_url",
        ),
        ({"role": "user", "content": [{"type": "secret"}]}, Problem.NOT_TEXT, ".content[0]"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}, Problem.UNKNOWN_FIELD, ".content[0].x"),
        ({"role": "user", "content": [7]}, Problem.WRONG_TYPE, ".content[0]"),
        ({"role": "user", "content": []}, Problem.EMPTY, ".content"),
        ({**USER, "tool_calls": [CALL]}, Problem.WRONG_TYPE, ".tool_calls"),
        ({**USER, "tool_call_id": "c1"}, Problem.WRONG_TYPE, ".tool_call_id"),
        (answer(tool_calls="nothing"), Problem.WRONG_TYPE, ".tool_calls"),
        (answer(tool_calls=[3]), Problem.WRONG_TYPE, ".tool_calls[0]"),
        (answer(tool_calls=[{"type": "custom", "custom": {}}]), Problem.UNSUPPORTED_FIELD, ".tool_calls[0].type"),
        (answer(tool_calls=[{"function": {"arguments": {}}}]), Problem.MISSING_FIELD, ".tool_calls[0].name"),
        (
            answer(tool_calls=[{"function": {"name": "f", "arguments": "{town: Oslo}"}}]),
            Problem.WRONG_TYPE,
            ".tool_calls[0].arguments",
        ),
        (
            answer(tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}]),
            Problem.WRONG_TYPE,
            ".tool_calls[0].arguments",
        ),
        (
            answer(tool_calls=[{"function": {"name": "f"}, "result": "rain"}]),
            Problem.UNKNOWN_FIELD,
            ".tool_calls[0].result",
        ),
        ({"from": "function_call", "value": "Action: weather"}, Problem.WRONG_TYPE, ".value"),
    ],
)
def test_what_cannot_be_learned_is_refused_by_problem_and_field(item: object, problem: Problem, field: str) -> None:
    assert refused(item) == (problem, f"messages[0]{field}")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"weight": 0}, False),
        ({"weight": 1}, None),
        ({"weight": 0.0}, False),
        ({"weight": None}, None),
        ({"train": False}, False),
        ({"train": True}, True),
        ({"training": False}, False),
        ({"trainable": False}, False),
        ({"loss": False}, False),
        ({"loss": True}, True),
        ({"loss_mask": 0}, False),
        ({"loss_scale": 0.0}, False),
        ({"loss_weight": 0}, False),
        ({"learn": False}, False),
        ({"masked": True}, False),
        ({"masked": False}, None),
        ({"train": False, "weight": 0, "masked": True}, False),
    ],
)
def test_whether_an_answer_is_learned_may_be_said_in_all_ways_in_use(fields: Message, expected: bool | None) -> None:
    assert learned(answer(**fields)) is expected


@pytest.mark.parametrize("fields", [{"weight": 1}, {"weight": 0}, {"loss": False}, {"masked": False}])
def test_a_question_is_never_learned_and_may_say_so(fields: Message) -> None:
    assert learned({**USER, **fields}) is None


@pytest.mark.parametrize(
    ("item", "problem", "field"),
    [
        (answer(weight=0.5), Problem.MASK_NOT_CLEAR, "weight"),
        (answer(weight=2), Problem.MASK_NOT_CLEAR, "weight"),
        (answer(weight=-1), Problem.MASK_NOT_CLEAR, "weight"),
        (answer(loss_scale=0.3), Problem.MASK_NOT_CLEAR, "loss_scale"),
        (answer(train="no"), Problem.MASK_NOT_CLEAR, "train"),
        (answer(loss=[1]), Problem.MASK_NOT_CLEAR, "loss"),
        (answer(train=True, weight=0), Problem.TWO_FIELDS, "weight"),
        (answer(train=True, masked=True), Problem.TWO_FIELDS, "train"),
        ({**USER, "train": True}, Problem.MASK_OF_OTHERS, "train"),
    ],
)
def test_a_mask_that_is_not_clear_is_refused_by_name(item: Message, problem: Problem, field: str) -> None:
    assert refused(item) == (problem, f"messages[0].{field}")


def test_fields_that_the_job_names_are_passed_over_and_told() -> None:
    reader = MessageReader(("note", "weight"), {})
    (said,) = reader.read([answer(note="b", weight=0.5, id=7)], "messages")
    assert (said.message, said.learned) == (answer(), None)
    assert reader.passed_over == {"messages[].note", "messages[].weight", "messages[].id"}


def test_messages_may_be_the_json_text_of_a_list() -> None:
    said = MessageReader((), {}).read(json.dumps([USER, answer(weight=0)]), "messages")
    assert [(each.message, each.learned) for each in said] == [(USER, None), (answer(), False)]


def test_messages_may_be_one_list_for_each_of_their_fields() -> None:
    """`datasets` makes such columns of a Sequence of messages."""
    fields = {"role": ["user", "assistant"], "content": ["q", None], "tool_calls": [None, [CALL]]}
    assert [each.message for each in MessageReader((), {}).read(fields, "messages")] == [
        USER,
        {"role": "assistant", "tool_calls": [CALL]},
    ]


@pytest.mark.parametrize("fields", [{"weight": 0}, {"train": False}, {"masked": True}])
def test_a_message_that_is_not_to_be_learned_is_none_where_the_job_learns_everything(fields: Message) -> None:
    reader = MessageReader((), {}, learns_all=True)
    assert reader.read([USER | {"weight": 0}, answer(weight=1), answer(masked=False)], "messages")
    with pytest.raises(RefusedError) as caught:
        reader.read([USER, answer(**fields)], "messages")
    assert (caught.value.broken.problem, caught.value.broken.field) == (
        Problem.MASK_AND_ALL,
        f"messages[1].{next(iter(fields))}",
    )


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, Problem.MISSING_FIELD),
        ([], Problem.EMPTY),
        ("secret", Problem.WRONG_TYPE),
        ('{"role": "user"}', Problem.WRONG_TYPE),
        ({"role": ["user", "assistant"], "content": ["q"]}, Problem.WRONG_TYPE),
        ({"role": ["user", "assistant"], "content": "q"}, Problem.WRONG_TYPE),
        ({"texts": ["q", "a"]}, Problem.WRONG_TYPE),
        ({"role": [], "content": []}, Problem.EMPTY),
        ({"role": ["user"] * 513, "content": ["q"] * 513}, Problem.TOO_MANY_MESSAGES),
        ("[{'role': 'user'}]", Problem.WRONG_TYPE),
        ([USER] * 513, Problem.TOO_MANY_MESSAGES),
        ('[{"role": "user", "content": "kept", "content": "secret"}]', Problem.REPEATED_FIELD),
        ("[" * 100 + "]" * 100, Problem.TOO_DEEP),
    ],
)
def test_what_is_no_list_of_messages_is_refused(value: object, problem: Problem) -> None:
    with pytest.raises(RefusedError) as caught:
        MessageReader((), {}).read(value, "messages")
    assert (caught.value.broken.problem, caught.value.broken.field) == (problem, "messages")
    assert "secret" not in caught.value.broken.words


def test_an_item_may_hold_a_question_and_its_answer() -> None:
    assert read({"human": "q", "assistant": "a"}) == [USER, answer()]
    assert read({"system": "s", "input": "q", "output": "a"}) == [{"role": "system", "content": "s"}, USER, answer()]
    assert refused({"human": "q", "assistant": "a", "note": 1}) == (Problem.UNKNOWN_FIELD, "messages[0].note")


def test_names_of_role_and_content_may_be_given() -> None:
    reader = MessageReader((), {"speaker": "role", "words": "content"})
    said = reader.read([{"speaker": "user", "words": "q"}, {"speaker": "assistant", "words": "a"}], "messages")
    assert [each.message for each in said] == [USER, answer()]


@pytest.mark.parametrize(
    ("item", "change"),
    [
        ({"role": "user", "content": ["a", "b"]}, Change.PARTS_JOINED),
        ({"role": "tool", "content": {"a": 1}}, Change.RESULT_AS_JSON),
    ],
)
def test_what_is_changed_in_a_message_is_told(item: Message, change: Change) -> None:
    reader = MessageReader((), {})
    reader.read([item], "messages")
    assert reader.changes == {change}
