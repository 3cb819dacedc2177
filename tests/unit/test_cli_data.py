"""`finetune data`: what is shown and judged before a job is paid for, and that nothing is written for it."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from data_cli import check, job
from data_run import CHATML, HIDDEN, LAYERS, chat, chats, jsonl, put
from finetune_api.job import MethodType
from finetune_cli import data
from finetune_cli.errors import CommandError, Exit
from finetune_cli.main import app
from finetune_cli.screen import cleaned
from finetune_trainer.data.structure import LoadReport

SFT = MethodType.SFT
SIZES_OF_THE_FAMILY = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "max_position_embeddings": 2048}
UNROLLED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ 'old ' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def shown(target: str, most: int = 3, row: str | None = None, model: str | None = None) -> list[dict[str, Any]]:
    output = io.StringIO()
    assert data.show(target, most, row, True, model, SFT, cleaned(Console(file=output))) == Exit.SUCCEEDED
    return json.loads(output.getvalue())


def test_rows_are_shown_as_they_are_learned_and_dropped_ones_with_their_reason(tmp_path: Path):
    masked = chat("q", "never")
    masked["messages"][1]["weight"] = 0
    put(tmp_path, a_jsonl=jsonl([chat("Hi\x7f", "Höllo\x1b"), {"messages": []}, masked, *chats(5)]))
    as_it_is = {"preprocessing": {"quality": {"repair": False}}}  # else DEL is left out
    first, broken, unlearned = shown(job(tmp_path, as_it_is))
    file = (tmp_path / "data" / "a.jsonl").as_uri()
    assert first == {
        "file": file,
        "row": 1,
        "sequence": 1,
        "sequences": 1,
        "segments": [
            {"text": "<|im_start|>user\nHi\x7f<|im_end|>\n<|im_start|>assistant\n", "learned": False},
            {"text": "Höllo\x1b<|im_end|>", "learned": True},
            {"text": "\n", "learned": False},
        ],
        "stop": "<|im_end|>",
        "answer": None,
        "dropped": None,
        "words": None,
        "changed": [],
    }
    assert (broken["row"], broken["segments"], broken["dropped"]) == (2, [], "empty: messages")
    assert (unlearned["row"], unlearned["dropped"]) == (3, "no_label")
    (one,) = shown(str(tmp_path / "job.yaml"), row="a.jsonl:5")
    assert (one["row"], one["segments"][1]) == (5, {"text": "the answer is 2.<|im_end|>", "learned": True})
    output = io.StringIO()
    data.show(str(tmp_path / "job.yaml"), 2, None, False, None, SFT, cleaned(Console(file=output, width=200)))
    said = output.getvalue()
    assert "user\nHi\ufffd<|im_end|>\n<|im_start|>assistant\n⟦Höllo\ufffd<|im_end|>⟧" in said
    assert "a.jsonl row 2\ndropped: messages is empty (empty)\n" in said
    output = io.StringIO()
    coloured = cleaned(Console(file=output, width=200, force_terminal=True, color_system="standard"))
    data.show(str(tmp_path / "job.yaml"), 1, None, False, None, SFT, coloured)
    assert "assistant\n\x1b[1;32m⟦Höllo\ufffd<|im_end|>⟧\x1b[0m\n" in output.getvalue(), "what is learned, and no more"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("b.jsonl:1", "no files of the data"),
        ("a.jsonl:9", "is no row of the data; rows are numbered from 1, of CSV and TSV from 2"),
        ("a.jsonl", "FILE:N"),
        ("a.jsonl:x", "FILE:N"),
    ],
)
def test_a_row_that_is_not_there_is_named(tmp_path: Path, row: str, says: str):
    put(tmp_path, a_jsonl=jsonl(chats(3)))
    with pytest.raises(CommandError, match=says) as refused:
        shown(str(tmp_path / "data"), row=row)
    assert refused.value.code == Exit.USAGE


def test_each_sequence_of_an_unrolled_row_is_shown(tmp_path: Path):
    put(tmp_path, a_jsonl=jsonl([chat("a", "b", "c", "d")]))
    path = job(tmp_path)
    (tmp_path / "model" / "chat_template.jinja").write_text(UNROLLED)
    rows = shown(path)
    assert [(each["row"], each["sequence"], each["sequences"]) for each in rows] == [(1, 1, 2), (1, 2, 2)]
    learned = [[part["text"] for part in each["segments"] if part["learned"]] for each in rows]
    assert learned == [["b<|im_end|>"], ["d<|im_end|>"]]


ALTERNATING = "{{ raise_exception('Roles must alternate') if messages[0].role == 'assistant' }}" + CHATML
SECRET = "a secret"
PART_OF_A_ROW: dict[str, tuple[object, str | None, str]] = {
    "a type": (
        {"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": SECRET}]},
        "must be a string",
        "messages[0].content has the wrong type: must be a string (wrong_type)",
    ),
    "JSON": (SECRET, None, "it is not a JSON object (not_an_object)"),
    "a number": (
        chat("q", SECRET) | {"weight": 1e9},
        "it may be 0, or from 0.000001 to 1,000,000",
        "weight is a number beyond what it may be: it may be 0, or from 0.000001 to 1,000,000 (out_of_range)",
    ),
    "more fields": (
        chat("q", "a") | {"mood": SECRET, "tone": SECRET},
        "and so is tone",
        "ignoreFields: and so is tone (unknown_field)",
    ),
    "the template's own words": (
        {"messages": [{"role": "assistant", "content": SECRET}, *chat("q", "a")["messages"]]},
        "Roles must alternate",
        "it is refused by the chat template: Roles must alternate (template_failed)",
    ),
}


@pytest.mark.parametrize(("row", "words", "says"), PART_OF_A_ROW.values(), ids=PART_OF_A_ROW)
def test_what_is_wrong_with_a_row_is_told_by_show_check_and_decisions_without_the_row(
    tmp_path: Path, row: object, words: str | None, says: str
):
    put(tmp_path, a_jsonl=jsonl([row, *chats(20)]))
    path = job(tmp_path, {"preprocessing": {"onBadRow": "Quarantine", "maxBrokenFraction": 0.5}})
    (tmp_path / "model" / "chat_template.jinja").write_text(ALTERNATING)
    (dropped,) = shown(path, most=1)
    assert dropped["words"] == words
    _, said = check(path)
    assert says in said
    assert SECRET not in said


def test_where_no_row_can_be_read_to_leave_the_file_out_is_the_remedy_and_no_fraction_is_raised(tmp_path: Path):
    put(tmp_path, a_jsonl=b"1\n2\n")
    with pytest.raises(CommandError, match=r"2 of 2 rows read are broken; fix them, or leave the file out") as refused:
        shown(str(tmp_path / "data"))
    assert "Fraction" not in str(refused.value)


WITHOUT_TOOLS = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [{"function": {"name": "weather"}}]},
]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (
            chat("a", "b", "Thanks")["messages"],
            "it ends with messages that no answer follows, which are left out (end_left_out)",
        ),
        (
            chat("a", "b", "c", "d")["messages"],
            "learned in one sequence for each answer, as the chat template writes an answer differently once others "
            "follow (unrolled)",
        ),
        (WITHOUT_TOOLS, "ToolCalls is not in what the chat template makes of the row (vanishes)"),
        (chat("a " * 3000, "b", "c", "d")["messages"], "it is longer than preprocessing.maxSequenceLength"),
    ],
    ids=["its end is left out", "unrolled", "a part that may vanish", "cut"],
)
def test_what_was_done_to_a_row_is_said_in_words(tmp_path: Path, messages: list[dict[str, Any]], says: str):
    put(tmp_path, a_jsonl=jsonl([{"messages": messages}]))
    choices = {"acceptVanishing": ["ToolCalls"], "tooLong": "Truncate", "maxSequenceLength": 256}
    path = job(tmp_path, {"preprocessing": choices})
    (tmp_path / "model" / "chat_template.jinja").write_text(UNROLLED)
    output = io.StringIO()
    data.show(path, 1, None, False, None, SFT, cleaned(Console(file=output)))
    assert f"changed: {says}" in output.getvalue()


@pytest.mark.parametrize("with_model", [True, False])
def test_check_names_the_files_that_are_passed_over_and_says_what_rows_are_changed(tmp_path: Path, with_model: bool):
    put(tmp_path, a_jsonl=jsonl([*chats(3), {"messages": chat("a", "b", "c")["messages"]}]))
    (tmp_path / "data" / ".hidden.jsonl").write_text("{")
    _, said = check(job(tmp_path) if with_model else str(tmp_path / "data"))
    assert "rows    4, none of them dropped; 1 file passed over\n" in said
    assert f"passed over {(tmp_path / 'data' / '.hidden.jsonl').as_uri()}\n" in said
    assert (
        "changed 1 of 4 rows: it ends with messages that no answer follows, which are left out (end_left_out)" in said
    )


def test_rows_are_shown_without_building_the_model_where_its_configuration_says_how_large_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    put(tmp_path, a_jsonl=jsonl([chat("Hi", "Hello " * 100), *chats(2)]))
    path, asked = job(tmp_path), list[bytes]()

    def judged(request: bytes) -> LoadReport:
        asked.append(request)
        return LoadReport(architecture="LlamaForCausalLM", sizes={**SIZES_OF_THE_FAMILY, "vocab_size": 600})

    monkeypatch.setattr("finetune_trainer.data.structure.load_without_values", judged)
    assert [row["dropped"] is None for row in shown(path)] == [False, True, True], "the first is too long"
    assert not asked
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["max_position_embeddings"]  # then it is for transformers to say what the family's is
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert [row["dropped"] for row in shown(path)] == [None, None, None]
    assert len(asked) == 1


def test_without_a_model_the_messages_are_shown_and_said_to_be_all_that_can_be_told(tmp_path: Path):
    put(tmp_path, a_jsonl=jsonl([{"instruction": "Add.", "input": "2 and 3", "output": "5"}]))
    (row,) = shown(str(tmp_path / "data"))
    assert row["segments"] == [
        {"text": "user: Add.\n\n2 and 3\n", "learned": False},
        {"text": "assistant: 5\n", "learned": True},
    ]
    assert row["stop"] is None
    code, said = check(str(tmp_path / "data"))
    assert code == Exit.SUCCEEDED
    assert "shapes  Alpaca" in said
    assert "--model" in said


def test_the_commands_of_the_page_about_data_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = (Path(__file__).parents[2] / "docs/data.md").read_text()
    commands = re.findall(r"^finetune (data .*)$", page, re.MULTILINE)
    assert len(commands) >= 6
    put(tmp_path, a_jsonl=jsonl(chats(6)))
    job(tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        words = command.replace("file:///models/base", (tmp_path / "model").as_uri()).split()
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (command, done.output, done.exception)


def test_check_says_what_personal_data_there_is_and_what_becomes_of_it(tmp_path: Path):
    put(tmp_path, a_jsonl=jsonl([*chats(3), chat("I am ada@example.org", "Hello ada@example.org!")]))
    _, said = check(job(tmp_path))
    assert "private 2 EMAIL in 1 rows (Report)\n" in said
    assert "set preprocessing.pii.action to Redact" in said
    _, said = check(job(tmp_path, {"preprocessing": {"pii": {"action": "Redact"}}}))
    assert "private 2 EMAIL in 1 rows (Redact)\n" in said
    assert "set preprocessing.pii.action" not in said
    assert "ada@" not in said


def test_check_says_which_evaluation_sets_rows_share_words_with(tmp_path: Path):
    question = "a train leaves the town at noon and another one follows it an hour later"
    put(tmp_path, a_jsonl=jsonl([*chats(20), chat(question, "two")]))
    (tmp_path / "tasks.jsonl").write_bytes(jsonl([{"q": question}, {"q": "short"}]))
    named = [{"name": "tasks", "uri": (tmp_path / "tasks.jsonl").as_uri()}]
    code, said = check(job(tmp_path, {"preprocessing": {"decontaminateAgainst": named}}))
    assert code == Exit.SUCCEEDED
    assert "a.jsonl row 21: it shares 13 words in a row" in said
    told = "leaks   1 rows share 13 words in a row with tasks (2 rows, of which 1 are too short to be found)"
    assert told in said


def test_check_says_what_prepare_would_and_writes_nothing(tmp_path: Path):
    put(tmp_path, a_jsonl=jsonl([*chats(30), {"messages": []}]))
    quarantine = {"preprocessing": {"onBadRow": "Quarantine", "maxBrokenFraction": 0.5}}
    code, said = check(job(tmp_path, quarantine))
    assert code == Exit.SUCCEEDED
    assert "rows    31, 1 of them dropped" in said
    assert "a.jsonl row 31: messages is empty (empty)\n" in said
    assert "datasets[].format: Messages" in said
    code, said = check(job(tmp_path))
    assert code == 11
    assert "row 31" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "code"), [([*chats(2), {"messages": []}], 11), (chats(3), 0)], ids=["a broken row", "good rows"]
)
def test_data_without_a_model_are_judged_by_the_exit_code(tmp_path: Path, rows: list[Any], code: int):
    put(tmp_path, a_jsonl=jsonl(rows))
    assert check(str(tmp_path / "data" / "a.jsonl"))[0] == code
    assert check(str(tmp_path / "nowhere.jsonl"))[0] == 12


ASKED = [{"role": "user", "content": "two and two?"}]


def said(*answers: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": each}] for each in answers]


PREFERRED: dict[str, tuple[str, list[dict[str, Any]], list[tuple[str, str]], str]] = {
    "pairs": (
        "DPO",
        [
            {"prompt": ASKED, "chosen": said("four")[0], "rejected": said("five")[0]},
            {"prompt": ASKED, "chosen": said("four")[0], "rejected": said("four")[0]},
        ],
        [("chosen", "four"), ("rejected", "five")],
        "two answers that say the same",
    ),
    "rankings": (
        "ORPO",
        [
            {"prompt": ASKED, "responses": said("five", "four", "six"), "scores": [2, 3, 1]},
            {"prompt": ASKED, "responses": said("five", "four"), "scores": [1, 1]},
        ],
        [("chosen", "four"), ("rejected", "six")],
        "scored alike",
    ),
    "rated answers that become pairs": (
        "DPO",
        [
            {**chat("two and two?", "four"), "label": True},
            {**chat("two and two?", "five"), "label": False},
            {**chat("and three?", "five"), "label": True},
        ],
        [("good", "four")],
        "no other one is left that is rated the other way",
    ),
    "rated answers": (
        "KTO",
        [
            {**chat("two and two?", "four"), "label": True},
            {**chat("two and two?", "five"), "label": False},
            {**chat("two and two?", "six"), "label": False, "weight": 0},
        ],
        [("good", "four")],
        "its weight is 0",
    ),
}


@pytest.mark.parametrize(("method", "rows", "first", "reason"), PREFERRED.values(), ids=PREFERRED)
def test_rows_that_say_what_is_preferred_are_shown_by_answer_and_checked_as_prepare_does(
    tmp_path: Path, method: str, rows: list[dict[str, Any]], first: list[tuple[str, str]], reason: str
):
    put(tmp_path, a_jsonl=jsonl(rows))
    path = job(tmp_path, {"method": {"type": method}})
    found = [each for each in shown(path) if each["row"] == 1]
    assert [(each["answer"], each["segments"][1]["text"]) for each in found] == [
        (answer, f"{text}<|im_end|>") for answer, text in first
    ]
    assert {each["sequences"] for each in found} == {len(first)}
    code, text = check(path)
    assert code == Exit.SUCCEEDED
    assert f"rows    {len(rows)}, 1 of them dropped" in text
    assert reason in text
    assert not (tmp_path / "out").exists()


def test_check_shows_which_rows_are_poor_before_it_says_that_the_job_would_fail(tmp_path: Path):
    put(
        tmp_path,
        a_jsonl=jsonl([{"text": f"Oslo is the capital of Norway, said {n}."} for n in range(8)] + [{"text": "-"}] * 2),
    )
    code, said = check(job(tmp_path, {"method": {"type": "CPT"}}))
    assert code == 11
    assert "quality Documents: would drop 20.00% of 10 rows; 0.1 of them may be left out\n" in said
    assert "2   20.00%  has few words (few_words): a.jsonl row 9, a.jsonl row 10\n" in said
    assert "would leave out 2 of 10 rows (20 %)" in said
    refusals = [chat(f"{n}?", "I'm sorry, but I cannot help with that.") for n in range(4)]
    put(tmp_path, a_jsonl=jsonl(refusals))
    for target in (job(tmp_path), str(tmp_path / "data")):
        code, said = check(target)
        assert code == Exit.SUCCEEDED
        assert "quality Chat: of 4 rows, none of which is left out\n" in said
        assert "(refusal): a.jsonl row 1, a.jsonl row 2" in said
        assert "spoken  en 4\n" in said


RATED = [{**chat("two and two?", "four"), "label": True}, {**chat("and three?", "five"), "label": True}]


@pytest.mark.parametrize(
    ("method", "rows", "says"),
    [
        ("DPO", [PREFERRED["pairs"][1][1]] * 3, "no row is left to train on: 3 rows read, 3 dropped"),
        ("SFT", [{**chat("a", "b"), "weight": 0}], "no row is left to train on: 1 rows read, 1 dropped"),
        ("SFT", [], "the files are empty"),
        ("KTO", RATED, "of the answers to train on 2 are good and 0 are bad"),
        ("DPO", RATED, "most because each rates an answer to whose prompt no other one is left"),
    ],
)
def test_without_a_model_data_of_which_nothing_can_be_learned_are_not_good(
    tmp_path: Path, method: str, rows: list[dict[str, Any]], says: str
):
    put(tmp_path, a_jsonl=jsonl(rows))
    code, text = check(str(tmp_path / "data"), method=MethodType(method))
    assert code == 11
    assert says in text
    assert "Good" not in text


def test_plain_texts_are_said_to_be_learned_without_the_chat_template(tmp_path: Path):
    put(tmp_path, a_jsonl=jsonl([{"prompt": f"{n} and 2 is", "chosen": " 4.", "rejected": " 5."} for n in range(3)]))
    _, text = check(job(tmp_path, {"method": {"type": "DPO"}}))
    assert "chat template: none, prompts and answers are plain texts, which it does not render" in text
    put(tmp_path, a_jsonl=jsonl(PREFERRED["pairs"][1]))
    assert "chat template: none" not in check(job(tmp_path, {"method": {"type": "DPO"}}))[1]
