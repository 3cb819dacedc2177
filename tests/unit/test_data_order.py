"""Conversations come in all orders: what is meant is learned, and what was changed is told."""

from typing import Any

import pytest

from finetune_api.job import SameRoleMessages, SystemMessages
from finetune_trainer.data.messages import Said
from finetune_trainer.data.order import Ordered
from finetune_trainer.data.problems import Change, Problem, RefusedError

ROLES = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "t": "tool"}
USER, RESULT = Said({"role": "user", "content": "u"}), {"role": "tool", "content": "t"}
KEEP, JOIN = SameRoleMessages.KEEP, SameRoleMessages.JOIN


def ordered(
    roles: str,
    systems: SystemMessages = SystemMessages.KEEP,
    same_role: SameRoleMessages = KEEP,
    masks: dict[int, bool] | None = None,
) -> Ordered:
    """Order messages of these roles, each of which says its own place."""
    masks = masks or {}
    said = [
        Said({"role": ROLES[role], "content": f"{role}{index}"}, masks.get(index)) for index, role in enumerate(roles)
    ]
    return Ordered(said, systems, same_role, "messages")


def shown(found: Ordered) -> str:
    """Contents in order; what is learned stands in brackets."""
    texts = [each["content"] for each in found.messages]
    return " ".join(f"[{text}]" if learned else text for text, learned in zip(texts, found.learned, strict=True))


@pytest.mark.parametrize(
    ("roles", "expected", "changes"),
    [
        ("ua", "u0 [a1]", set()),
        ("sua", "s0 u1 [a2]", set()),
        ("uaua", "u0 [a1] u2 [a3]", set()),
        ("aua", "a0 u1 [a2]", {Change.GREETING_NOT_LEARNED}),
        ("sa", "s0 [a1]", set()),
        ("saua", "s0 [a1] u2 [a3]", set()),
        ("uau", "u0 [a1]", {Change.END_LEFT_OUT}),
        ("uaut", "u0 [a1]", {Change.END_LEFT_OUT}),
        ("uua", "u0 u1 [a2]", {Change.NEIGHBOURS_KEPT}),
        ("uaa", "u0 [a1] [a2]", {Change.NEIGHBOURS_KEPT}),
        ("dua", "d0 u1 [a2]", {Change.DEVELOPER_AS_SYSTEM}),
        ("ssua", "s0\n\ns1 u2 [a3]", {Change.SYSTEMS_JOINED}),
        ("sdua", "s0\n\nd1 u2 [a3]", {Change.SYSTEMS_JOINED, Change.DEVELOPER_AS_SYSTEM}),
        ("uatta", "u0 [a1] t2 t3 [a4]", set()),
        ("usa", "u0 s1 [a2]", {Change.LATE_SYSTEM_KEPT}),
        (
            "suasda",
            "s0 u1 [a2] s3 d4 [a5]",
            {Change.LATE_SYSTEM_KEPT, Change.DEVELOPER_AS_SYSTEM, Change.NEIGHBOURS_KEPT},
        ),
        ("auau", "a0 u1 [a2]", {Change.GREETING_NOT_LEARNED, Change.END_LEFT_OUT}),
    ],
)
def test_an_order_whose_meaning_is_plain_is_taken_and_what_was_changed_is_told(
    roles: str, expected: str, changes: set[Change]
) -> None:
    found = ordered(roles)
    assert (shown(found), found.changes) == (expected, changes)
    assert all(each["role"] != "developer" for each in found.messages)


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("uua", "u0\n\nu1 [a2]"),
        ("uuua", "u0\n\nu1\n\nu2 [a3]"),
        ("uaa", "u0 [a1\n\na2]"),
        ("uatta", "u0 [a1] t2 t3 [a4]"),
    ],
)
def test_neighbours_of_one_role_are_joined_where_that_is_chosen(roles: str, expected: str) -> None:
    assert shown(ordered(roles, same_role=JOIN)) == expected


def says_call(name: str, **more: Any) -> Said:
    """Return what a message of the role function_call says, for which others have a field of the answer."""
    call = {"type": "function", "function": {"name": name, "arguments": {}}}
    return Said({"role": "assistant", "tool_calls": [call], **more}, continues=True)


def test_messages_that_call_belong_to_the_answer_before_them() -> None:
    said = [USER, Said({"role": "assistant", "content": "a"}), says_call("f"), says_call("g"), Said(RESULT)]
    found = Ordered([*said, says_call("h")], SystemMessages.KEEP, KEEP, "messages")
    assert [[call["function"]["name"] for call in each.get("tool_calls", [])] for each in found.messages] == [
        [],
        ["f", "g"],
        [],
        ["h"],
    ]
    assert found.messages[1]["content"] == "a"
    assert (found.learned, found.changes) == ((False, True, False, True), {Change.CALLS_JOINED})
    assert said[1].message.keys() == {"role", "content"}, "what was read is not changed"


def test_a_call_after_reasoning_of_its_own_is_an_answer_of_its_own() -> None:
    said = [USER, says_call("f"), says_call("g", content="", reasoning_content="r")]
    found = Ordered(said, SystemMessages.KEEP, KEEP, "messages")
    assert (len(found.messages), found.changes) == (3, {Change.NEIGHBOURS_KEPT})


def test_answers_are_not_joined_where_only_one_of_them_is_learned() -> None:
    found = ordered("uaa", same_role=JOIN, masks={1: False})
    assert (shown(found), found.changes) == ("u0 a1 [a2]", {Change.NEIGHBOURS_KEPT})


@pytest.mark.parametrize(
    ("roles", "expected", "changes"),
    [
        ("sua", "s0\n\nu1 [a2]", {Change.SYSTEM_IN_USER}),
        ("dua", "d0\n\nu1 [a2]", {Change.SYSTEM_IN_USER, Change.DEVELOPER_AS_SYSTEM}),
        ("saua", "a1 s0\n\nu2 [a3]", {Change.SYSTEM_IN_USER, Change.GREETING_NOT_LEARNED}),
        ("sa", "s0 [a1]", set()),
        ("ua", "u0 [a1]", set()),
    ],
)
def test_the_system_message_begins_the_first_question_where_that_is_chosen(
    roles: str, expected: str, changes: set[Change]
) -> None:
    found = ordered(roles, systems=SystemMessages.IN_USER)
    assert (shown(found), found.changes) == (expected, changes)


@pytest.mark.parametrize("systems", SystemMessages)
def test_who_is_named_in_a_system_message_is_joined_with_no_other(systems: SystemMessages) -> None:
    messages = [
        {"role": "system", "content": "s0", "name": "example_user"},
        {"role": "system", "content": "s1", "name": "example_assistant"},
        {"role": "user", "content": "u2"},
        {"role": "assistant", "content": "a3"},
    ]
    found = Ordered([Said(each) for each in messages], systems, KEEP, "messages")
    assert (found.messages, found.changes) == (messages, {Change.NEIGHBOURS_KEPT})


def test_answers_that_are_not_to_be_learned_are_shown_alone() -> None:
    assert shown(ordered("uaua", masks={1: False})) == "u0 a1 u2 [a3]"
    assert shown(ordered("ua", masks={1: False})) == "u0 a1"


@pytest.mark.parametrize(
    ("roles", "masks", "problem"),
    [
        ("u", {}, Problem.NO_ASSISTANT),
        ("s", {}, Problem.NO_ASSISTANT),
        ("a", {}, Problem.NO_ASSISTANT),
        ("aua", {0: True}, Problem.ORDER),
        ("uta", {}, Problem.ORDER),
        ("ta", {}, Problem.ORDER),
    ],
)
def test_what_is_no_conversation_is_refused(roles: str, masks: dict[int, bool], problem: Problem) -> None:
    with pytest.raises(RefusedError) as caught:
        ordered(roles, masks=masks)
    assert caught.value.broken.problem is problem
