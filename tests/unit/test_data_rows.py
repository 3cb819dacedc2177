"""Every row is checked, and what is wrong has a name and a place."""

from typing import Any

import pytest

from finetune_api.job import DatasetFormat
from finetune_api.row_words import ROW_WORDS
from finetune_trainer.data.problems import Broken, Drop, Problem
from finetune_trainer.data.rows import Completion, Conversation, Row, Text, check, content_hash

M, PC, T = DatasetFormat.MESSAGES, DatasetFormat.PROMPT_COMPLETION, DatasetFormat.TEXT
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": ""}


def messages(*items: object) -> dict[str, Any]:
    return {"messages": list(items)}


@pytest.mark.parametrize(
    ("data_format", "row", "problem", "field"),
    [
        (T, [1], Problem.NOT_AN_OBJECT, ""),
        (T, {"txt": "a"}, Problem.MISSING_FIELD, "text"),
        (T, {"text": None}, Problem.MISSING_FIELD, "text"),
        (T, {"text": 3}, Problem.WRONG_TYPE, "text"),
        (T, {"text": " \n"}, Problem.EMPTY, "text"),
        (T, {"text": "a\0b"}, Problem.NUL, "text"),
        (M, {"text": "a"}, Problem.MISSING_FIELD, "messages"),
        (M, {"messages": "a"}, Problem.WRONG_TYPE, "messages"),
        (M, messages(), Problem.EMPTY, "messages"),
        (M, messages(USER, "a"), Problem.WRONG_TYPE, "messages[1]"),
        (M, messages({"content": "a"}), Problem.MISSING_FIELD, "messages[0].role"),
        (M, messages({"role": "user"}), Problem.MISSING_FIELD, "messages[0].content"),
        (M, messages({"role": "tool", "content": "a"}), Problem.UNKNOWN_ROLE, "messages[0].role"),
        (M, messages({"role": ["user"], "content": "a"}), Problem.UNKNOWN_ROLE, "messages[0].role"),
        (M, messages(USER, {"role": "assistant", "content": ["a"]}), Problem.WRONG_TYPE, "messages[1].content"),
        (M, messages(USER, {"role": "assistant", "content": " "}), Problem.EMPTY, "messages[1].content"),
        (M, messages(USER, USER, ANSWER), Problem.ROLES_NOT_ALTERNATING, "messages[1].role"),
        (M, messages(USER, ANSWER, ANSWER), Problem.ROLES_NOT_ALTERNATING, "messages[2].role"),
        (M, messages(ANSWER), Problem.ROLES_NOT_ALTERNATING, "messages[0].role"),
        (M, messages(SYSTEM, ANSWER), Problem.ROLES_NOT_ALTERNATING, "messages[1].role"),
        (M, messages(USER, SYSTEM, ANSWER), Problem.ROLES_NOT_ALTERNATING, "messages[1].role"),
        (M, messages(USER), Problem.NO_ASSISTANT, "messages"),
        (M, messages(USER, ANSWER, USER), Problem.LAST_NOT_ASSISTANT, "messages"),
        (M, messages(*[USER, ANSWER] * 257), Problem.TOO_MANY_MESSAGES, "messages"),
        (M, messages(USER, {**ANSWER, "weight": 0}), Problem.UNSUPPORTED_FIELD, "messages[1].weight"),
        (M, messages(USER, {**ANSWER, "tool_calls": [{}]}), Problem.UNSUPPORTED_FIELD, "messages[1].tool_calls"),
        (M, {**messages(USER, ANSWER), "tools": [{}]}, Problem.UNSUPPORTED_FIELD, "tools"),
        (PC, {"prompt": "a"}, Problem.MISSING_FIELD, "completion"),
        (PC, {"prompt": 1, "completion": "b"}, Problem.WRONG_TYPE, "prompt"),
        (PC, {"prompt": "a", "completion": ""}, Problem.EMPTY, "completion"),
        (PC, {"prompt": [USER], "completion": "b"}, Problem.WRONG_TYPE, "completion"),
        (PC, {"prompt": [USER], "completion": [USER]}, Problem.ROLES_NOT_ALTERNATING, "completion[0].role"),
        (PC, {"prompt": [USER, ANSWER], "completion": [USER]}, Problem.NO_ASSISTANT, "completion"),
    ],
)
def test_a_broken_row_is_told_by_problem_and_field(
    data_format: DatasetFormat, row: object, problem: Problem, field: str
) -> None:
    found = check(row, data_format)
    assert isinstance(found, Broken)
    assert (found.problem, found.field) == (problem, field)


@pytest.mark.parametrize(
    ("data_format", "row", "expected"),
    [
        (T, {"text": "a", "id": 7}, Text("a")),
        (PC, {"prompt": "a", "completion": "b"}, Completion("a", "b")),
        (PC, {"prompt": [USER], "completion": [ANSWER]}, Conversation([USER, ANSWER], (False, True))),
        (M, messages(USER, ANSWER), Conversation([USER, ANSWER], (False, True))),
        (M, messages(SYSTEM, USER, ANSWER), Conversation([SYSTEM, USER, ANSWER], (False, False, True))),
        (M, messages(USER, {**ANSWER, "tool_calls": None}), Conversation([USER, ANSWER], (False, True))),
    ],
)
def test_a_good_row_is_taken_as_it_is(data_format: DatasetFormat, row: object, expected: Row) -> None:
    assert check(row, data_format) == expected


def test_every_problem_has_words() -> None:
    assert set(ROW_WORDS) == {*Problem, *Drop, "other"}


def test_rows_that_say_the_same_have_one_hash_whatever_the_order_of_their_fields() -> None:
    one = content_hash(Conversation([{"role": "user", "content": "q"}, ANSWER], (False, True)))
    other = content_hash(Conversation([{"content": "q", "role": "user"}, ANSWER], (False, True)))
    assert one == other
    assert one != content_hash(Conversation([USER, {**ANSWER, "content": "b"}], (False, True)))


def test_a_value_that_is_not_json_is_a_broken_row() -> None:
    found = content_hash(Conversation([{**USER, "note": b"\xff"}, ANSWER], (False, True)))
    assert isinstance(found, Broken)
    assert found.problem is Problem.WRONG_TYPE
