"""Damaged characters are put right before rows are compared or rendered; code and what programs read stay."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_run import chat, jsonl, prepare_run, put
from finetune_api.job import FineTuneJobSpec
from finetune_trainer.data.accounts import Action
from finetune_trainer.data.kinds import content_hash
from finetune_trainer.data.prose import looks_like_code, parts, prose
from finetune_trainer.data.reading import Checked
from finetune_trainer.data.repairs import repaired
from finetune_trainer.data.rows import Completion, Conversation, Pair, Row, Text
from finetune_trainer.data.stages.chain import chain_of
from finetune_trainer.data.stages.repair import REPAIR

CODE = 'import os\n\n\ndef name(text):\n    table = {"Ã©": "é", "e\u0301": "\x01"}\n    return table[text];\n'


def checked(row: Row, held_bytes: int = 100) -> Checked:
    hashed = content_hash(row)
    assert isinstance(hashed, bytes)
    return Checked(0, 1, row, hashed, held_bytes)


@pytest.mark.parametrize(
    ("text", "better", "changes"),
    [
        ("It is cafÃ© au lait, â€œsaidâ€\x9d he.", "It is café au lait, “said” he.", ["mojibake"]),
        ("Ð\x9fÑ\x80Ð¸Ð²ÐµÑ\x82, Ð¼Ð¸Ñ\x80", "Привет, мир", ["mojibake"]),  # noqa: RUF001
        ("good é\nbad Ã¼ber\ngood ü", "good é\nbad über\ngood ü", ["mojibake"]),
        ("wait\x85 for it", "wait… for it", ["mojibake"]),
        ("cafe\u0301", "café", ["unicode_form"]),
        ("a\r\nb\rc\n", "a\nb\nc\n", ["line_ends"]),
        ("\ufeffFirst words", "First words", ["byte_order_mark"]),
        ("a\x01b\x7fc", "abc", ["control_characters"]),
        ("N\x08NA\x08AM\x08ME\x08E _\x08f_\x08i_\x08l_\x08e", "NAME file", ["control_characters"]),
        ("one\x0btwo\x1fthree", "one\ntwo three", ["control_characters"]),
        (
            "\ufeffÃ©t\x02e\u0301\r\n",
            "été\n",
            ["byte_order_mark", "line_ends", "mojibake", "control_characters", "unicode_form"],
        ),
    ],
)
def test_what_is_damaged_is_put_right_and_named(text: str, better: str, changes: list[str]) -> None:
    assert repaired(text) == (better, tuple(changes))


@pytest.mark.parametrize(
    "text",
    [
        "plain words,\ttabs, a page\x0cbreak and \x1b[31mcolours\x1b[0m",
        "“curly” quotes, an ﬁ ligature, ｗｉｄｅ letters, ½, non\u00a0breaking, a line\u2028separator",  # noqa: RUF001
        "Größe, naïve, señor, Ångström, Привет, її, 日本語, العربية, हिन्दी, ไทย, 🙂👩‍👩‍👧",
        "&amp; and &lt;b&gt; are as they were written",
        "SÃO PAULO and CÂMARA are no mojibake",
        "\x01\x02\x03",  # nothing would be left of it
        CODE,
        f"Write it so:\n```python\n{CODE}```\nThat is all.",
        f"~~~\n{CODE}",
    ],
)
def test_what_may_be_meant_stays_as_it_is(text: str) -> None:
    assert repaired(text) == (text, ())


def test_around_code_texts_are_put_right_and_in_it_only_the_ends_of_lines() -> None:
    fenced = f"cafÃ©:\r\n```\r\n{CODE}```\r\nso\x02\r\n"
    assert repaired(fenced).text == f"café:\n```\n{CODE}```\nso\n"
    assert looks_like_code(CODE)
    assert not looks_like_code("To import a car into a country,\nreturn the form:\n(see page 3)\n" * 3)


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab`~\n é\u0301;{}"))
def test_the_parts_of_a_text_are_all_of_it(text: str) -> None:
    assert "".join(part.text for part in parts(text)) == text


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_a_text_that_is_changed_says_so_and_something_is_left_of_it(text: str) -> None:
    once = repaired(text)
    assert (once.text != text) == bool(once.changes)
    assert once.text.strip() or not text.strip()


CALL = {"id": "c\u0301", "type": "function", "function": {"name": "e\u0301", "arguments": {"town": "Ã©"}}}


def test_rows_of_every_kind_are_repaired_but_not_what_functions_are_called_with() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "cafÃ©?\r\n"},
        {"role": "assistant", "content": "", "reasoning_content": "a\x01b", "tool_calls": [CALL]},
        {"role": "tool", "content": "cafe\u0301", "tool_call_id": "c\u0301"},
        {"role": "assistant", "content": "yes"},
    ]
    row = Conversation(messages, (False, True, False, True), [{"type": "function", "name": "e\u0301"}], {"x": "Ã©"})
    assert list(prose(row)) == [
        "messages[0].content",
        "messages[1].content",
        "messages[1].reasoning_content",
        "messages[2].content",
        "messages[3].content",
    ]
    staged = REPAIR.run(
        [checked(row), checked(Text("good")), checked(Pair(Completion("q", "a\r"), Completion("q", "b")))]
    )
    (changed, same, pair) = (each.row for each in staged.rows)
    assert isinstance(changed, Conversation)
    assert changed.messages[0]["content"] == "café?\n"
    assert changed.messages[1] == {**messages[1], "reasoning_content": "ab"}
    assert changed.messages[2] == {**messages[2], "content": "café"}
    assert (changed.learned, changed.tools, changed.template_kwargs) == (row.learned, row.tools, row.template_kwargs)
    assert (same, pair) == (Text("good"), Pair(Completion("q", "a\n"), Completion("q", "b")))
    assert [(each.action, each.reason, each.detail) for each in staged.decisions] == [
        (Action.CHANGE, "line_ends", "messages[0].content"),
        (Action.CHANGE, "mojibake", "messages[0].content"),
        (Action.CHANGE, "control_characters", "messages[1].reasoning_content"),
        (Action.CHANGE, "unicode_form", "messages[2].content"),
        (Action.CHANGE, "line_ends", "chosen.completion"),
    ]


def test_a_changed_row_has_the_hash_and_the_size_of_what_it_says_now() -> None:
    whole, item = checked(Text("é" * 10)), checked(Text("Ã©" * 10), held_bytes=100)
    (found,) = REPAIR.run([item]).rows
    assert (found.row, found.content_hash, found.held_bytes) == (whole.row, whole.content_hash, 90)
    with pytest.raises(AssertionError, match="has no hash"):
        item.with_row(Text("\ud800"))


def test_rows_that_say_the_same_once_they_are_repaired_are_copies_and_each_change_is_counted(tmp_path: Path) -> None:
    rows = [
        chat(f"cafÃ© {at}" if at % 2 else f"café {at - at % 2 + 1}", "yes\r\n" if at % 2 else "yes\n")
        for at in range(200)
    ]
    put(tmp_path, a_jsonl=jsonl(rows))
    prepared = prepare_run(tmp_path)
    assert prepared.report["changed"] == {"line_ends": 100, "mojibake": 100}
    copies = {each["ref"] for each in prepared.decisions if each["reason"] == "duplicate"}
    assert len(copies) == 100, "of each row there is a copy, which was written otherwise"
    off = prepare_run(tmp_path, {"preprocessing": {"quality": {"repair": False}}}, attempt=2)
    assert off.report["changed"] == {}
    assert "repair" not in off.report["counted"]


def test_repair_comes_first_unless_it_is_switched_off() -> None:
    spec: dict[str, Any] = {
        "model": {"uri": "s3://models/a"},
        "method": {"type": "CPT"},
        "datasets": [{"uri": "s3://data/a/"}],
        "output": {"uri": "s3://out/a"},
    }
    assert chain_of(FineTuneJobSpec.model_validate(spec))[0] is REPAIR
    off = spec | {"preprocessing": {"quality": {"repair": False}}}
    assert REPAIR not in chain_of(FineTuneJobSpec.model_validate(off))
