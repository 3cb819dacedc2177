"""What becomes of rows with personal data: counted, replaced or left out, told by type and field, never by value."""

import pickle
from pathlib import Path
from typing import Any

import orjson
import pytest

from finetune_api.errors import StageError
from finetune_api.pii import PiiSpec, PiiType, PiiTypesSpec
from finetune_api.reasons import Fault
from finetune_trainer.data.accounts import Action, FieldPlace
from finetune_trainer.data.kinds import content_hash, texts
from finetune_trainer.data.reading import Checked
from finetune_trainer.data.rows import Completion, Conversation, Pair, Row, Text, Thumb
from finetune_trainer.data.stages.pii import pii_stage
from finetune_trainer.data.stages.stage import Staged
from finetune_trainer.pii_key import read_key

MAIL, CARD = "ada@example.org", "4111 1111 1111 1111"
KEY = b"k" * 32
CALL: dict[str, Any] = {
    "role": "assistant",
    "tool_calls": [
        {
            "id": "4111111111111111",
            "type": "function",
            "function": {"name": "pay", "arguments": {"card": 4111111111111111, "to": {"mail": MAIL}, "n": 3}},
        }
    ],
}
CHAT = Conversation(
    [
        {"role": "user", "content": f"I am {MAIL}"},
        CALL,
        {
            "role": "tool",
            "content": f'{{"from": "{MAIL}", "card": 4111111111111111}}',
            "tool_call_id": "4111111111111111",
        },
        {"role": "assistant", "content": "Paid."},
    ],
    (False, True, False, True),
)
PLAIN = Conversation([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], (False, True))
ASKED = {"role": "user", "content": f"Mail {MAIL}?"}


def pair() -> Pair:
    yes, no = ({"role": "assistant", "content": text} for text in ("Yes.", f"No, {CARD}."))
    return Pair(Conversation([ASKED, yes], (False, True)), Conversation([ASKED, no], (False, True)))


def run(given: dict[str, Any], *rows: Row, key: bytes | None = None) -> Staged:
    spec = PiiSpec.model_validate(given)
    return pii_stage(spec, key).run([Checked(2, at, row, b"", 1) for at, row in enumerate(rows, 1)])


def test_report_changes_nothing_and_counts_by_type_where_they_are() -> None:
    staged = run({}, PLAIN, CHAT, pair())
    assert [each.row for each in staged.rows] == [PLAIN, CHAT, pair()]
    assert staged.decisions == []
    found = {name: count for name, count in staged.counters.items() if count}
    assert found == {"found.EMAIL": 4, "rows.EMAIL": 2, "found.CARD": 3, "rows.CARD": 2}
    assert staged.places == {
        "EMAIL": [FieldPlace(2, 2, "messages[0].content"), FieldPlace(2, 3, "chosen.messages[0].content")],
        "CARD": [FieldPlace(2, 2, "messages[2].content"), FieldPlace(2, 3, "rejected.messages[1].content")],
    }


def test_redact_writes_types_in_the_place_of_values_in_every_text_and_number_but_not_in_what_binds_calls() -> None:
    (item,) = run({"action": "Redact"}, CHAT).rows
    assert isinstance(item.row, Conversation)
    first, call, result, last = item.row.messages
    assert first == {"role": "user", "content": "I am <EMAIL>"}
    assert call["tool_calls"] == [
        {
            "id": "4111111111111111",
            "type": "function",
            "function": {"name": "pay", "arguments": {"card": "<CARD>", "to": {"mail": "<EMAIL>"}, "n": 3}},
        }
    ]
    assert result == {
        "role": "tool",
        "content": '{"from": "<EMAIL>", "card": "<CARD>"}',
        "tool_call_id": "4111111111111111",
    }
    assert last == {"role": "assistant", "content": "Paid."}
    assert item.row.learned == CHAT.learned
    assert item.content_hash == content_hash(item.row)


def test_a_changed_row_has_a_decision_with_fields_types_and_counts_and_no_value() -> None:
    (decision,) = run({"action": "Redact"}, PLAIN, CHAT).decisions
    assert (decision.file, decision.row, decision.action, decision.reason) == (
        2,
        2,
        Action.CHANGE,
        "personal_data_replaced",
    )
    assert decision.detail == (
        "messages[0].content: EMAIL 1; messages[1].tool_calls[0].function.arguments.to.mail: EMAIL 1; "
        "messages[2].content: CARD 1, EMAIL 1; messages[1].tool_calls[0].function.arguments.card: CARD 1"
    )


def test_of_many_fields_a_decision_names_the_first() -> None:
    messages = [{"role": ("user", "assistant")[at % 2], "content": f"{at} {MAIL}"} for at in range(12)]
    (decision,) = run({"action": "Redact"}, Conversation(messages, (False, True) * 6)).decisions
    assert decision.detail.count("EMAIL") == 8
    assert decision.detail.endswith("; and 4 more fields")


def test_drop_leaves_out_rows_with_that_type_and_the_others_are_treated_as_said() -> None:
    staged = run(
        {"action": "Redact", "types": {"CARD": "Drop"}}, Text(MAIL), Text(f"{MAIL} {CARD}"), Text(CARD), Text("a")
    )
    assert [(each.number, texts(each.row)["text"]) for each in staged.rows] == [(1, "<EMAIL>"), (4, "a")]
    assert [(each.row, each.action, each.reason) for each in staged.decisions] == [
        (1, Action.CHANGE, "personal_data_replaced"),
        (2, Action.DROP, "personal_data"),
        (3, Action.DROP, "personal_data"),
    ]
    found = {name: count for name, count in staged.counters.items() if count}
    assert found == {
        "found.EMAIL": 2,
        "rows.EMAIL": 2,
        "changed.EMAIL": 1,
        "found.CARD": 2,
        "rows.CARD": 2,
        "rows_dropped.CARD": 2,
    }


def test_a_type_that_is_only_reported_stays_beside_one_that_is_redacted() -> None:
    (item,) = run({"action": "Report", "types": {"CARD": "Redact"}}, Text(f"{MAIL} {CARD}")).rows
    assert item.row == Text(f"{MAIL} <CARD>")


def test_pseudonyms_are_the_same_in_all_fields_rows_and_kinds() -> None:
    spec = {"action": "Pseudonymise", "keySecretRef": {"name": "k"}}
    staged = run(spec, Text(MAIL), Completion("who?", MAIL.upper()), Thumb(Completion(MAIL, "ok"), True), key=KEY)
    names = [text for item in staged.rows for text in texts(item.row).values() if "EMAIL" in text]
    assert len(names) == 3
    assert len(set(names)) == 1
    assert MAIL not in names[0]


def test_both_sides_of_a_pair_keep_one_prompt() -> None:
    (item,) = run({"action": "Redact"}, pair()).rows
    assert isinstance(item.row, Pair)
    assert isinstance(item.row.chosen, Conversation)
    assert isinstance(item.row.rejected, Conversation)
    assert item.row.chosen.messages[0] == item.row.rejected.messages[0] == {"role": "user", "content": "Mail <EMAIL>?"}
    assert item.row.rejected.messages[1]["content"] == "No, <CARD>."


def test_a_value_that_is_spread_over_two_messages_is_not_told() -> None:
    """Said in docs/data.md: each text is read by itself."""
    messages = [{"role": "user", "content": "my mail is ada@"}, {"role": "assistant", "content": "example.org? Ok."}]
    assert run({}, Conversation(messages, (False, True))).counters == {}


def test_regions_choose_whose_numbers_are_told() -> None:
    text = Text("Steuer-ID 36 574 261 809, CPF 390.533.447-05")
    assert run({"regions": ["BR"]}, text).counters["found.NATIONAL_ID"] == 1
    assert run({}, text).counters["found.NATIONAL_ID"] == 2


def test_the_stage_can_be_sent_to_a_worker_and_shows_no_key() -> None:
    stage = pii_stage(PiiSpec.model_validate({"action": "Pseudonymise"}), KEY)
    assert pickle.loads(pickle.dumps(stage)).name == "pii"
    assert "kkkk" not in repr(stage)


def test_each_type_has_a_field_of_its_own_in_the_job() -> None:
    assert {each.alias for each in PiiTypesSpec.model_fields.values()} == set(PiiType)


PSEUDONYMISE = PiiSpec.model_validate({"types": {"EMAIL": "Pseudonymise"}})


def test_the_key_is_what_the_file_says_without_the_end_of_its_line(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789abcdef" * 4 + b"\n")
    (tmp_path / "b").write_bytes(b"0123456789abcdef" * 4)
    (tmp_path / "c").write_bytes(b"0123456789abcdeg" * 4)
    one, same, other = (read_key(PSEUDONYMISE, str(tmp_path / name)) for name in "abc")
    assert one == same != other
    assert one is not None
    assert len(one) == 32
    assert read_key(PiiSpec.model_validate({"action": "Redact"}), str(tmp_path / "a")) is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "the file of the key: No such file or directory"),
        (b"secret-but-short\n", "the key has 16 bytes; it must have 32 to 4,096"),
        (b"x" * 5000, "the key has 4,097 bytes"),
    ],
)
def test_a_key_that_cannot_be_used_ends_the_job_with_what_to_do(
    content: bytes | None, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StageError) as raised:
        read_key(PSEUDONYMISE, str(path))
    assert raised.value.fault is Fault.CONFIG_UNREADABLE
    assert problem in str(raised.value)
    assert "secret-but" not in orjson.dumps(raised.value.args_by_name).decode()


def test_a_job_with_pseudonyms_and_no_key_says_how_to_give_one() -> None:
    with pytest.raises(StageError, match="FINETUNE_PII_KEY_FILE"):
        read_key(PSEUDONYMISE, None)
