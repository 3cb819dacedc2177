"""What a row says has one hash, and every problem has words."""

from typing import Any

import pytest

from finetune_api.row_words import CHANGE_WORDS, ROW_WORDS
from finetune_trainer.data.kinds import content_hash
from finetune_trainer.data.problems import Broken, Change, Drop, Problem
from finetune_trainer.data.rows import Completion, Conversation, Row, Text

USER: dict[str, Any] = {"role": "user", "content": "q"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "a"}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
LEARNED = (False, True)


def test_every_problem_and_every_change_has_words() -> None:
    assert set(ROW_WORDS) == {*Problem, *Drop, "other"}
    assert set(CHANGE_WORDS) == set(Change)


def test_rows_that_say_the_same_have_one_hash_whatever_the_order_of_their_fields() -> None:
    one = content_hash(Conversation([{"role": "user", "content": "q"}, ANSWER], LEARNED))
    assert one == content_hash(Conversation([{"content": "q", "role": "user"}, ANSWER], LEARNED))


def test_rows_that_say_different_things_have_different_hashes() -> None:
    rows: list[Row] = [
        Conversation([USER, ANSWER], LEARNED),
        Conversation([USER, {**ANSWER, "content": "b"}], LEARNED),
        Conversation([USER, {**ANSWER, "reasoning_content": "why"}], LEARNED),
        Conversation([USER, ANSWER], (False, False)),
        Conversation([USER, ANSWER], LEARNED, [TOOL]),
        Conversation([USER, ANSWER], LEARNED, None, {"enable_thinking": False}),
        Completion("q", "a"),
        Completion("qa", ""),
        Text("qa"),
    ]
    assert len({content_hash(row) for row in rows}) == len(rows)


def test_rows_that_say_the_same_are_copies_whatever_their_weights() -> None:
    assert content_hash(Text("q", 2.0)) == content_hash(Text("q"))
    assert content_hash(Conversation([USER, ANSWER], LEARNED, weight=0.5)) == content_hash(
        Conversation([USER, ANSWER], LEARNED)
    )


@pytest.mark.parametrize("message", [{**USER, "note": b"\xff"}])
def test_a_value_that_is_not_json_is_a_broken_row(message: dict[str, Any]) -> None:
    found = content_hash(Conversation([message, ANSWER], LEARNED))
    assert isinstance(found, Broken)
    assert found.problem is Problem.WRONG_TYPE
