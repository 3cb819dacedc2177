"""Rows of every usual shape become what they say, and a field that nobody knows is never lost without a word."""

import json
from typing import Any

import pytest

from finetune_api.errors import StageError
from finetune_api.job import ColumnsSpec, DatasetFormat, MethodType
from finetune_api.reasons import Fault
from finetune_api.row_words import MAX_ROW_WEIGHT, MIN_ROW_WEIGHT
from finetune_trainer.data.detect import detect
from finetune_trainer.data.field_names import METADATA, METADATA_OF_MESSAGES
from finetune_trainer.data.kinds import KINDS
from finetune_trainer.data.messages import Message
from finetune_trainer.data.problems import Broken, Change, Problem
from finetune_trainer.data.rows import Completion, Conversation, Text
from finetune_trainer.data.shapes import SHAPES, Found, RowChoices, read_row
from finetune_trainer.methods import METHODS

Row = dict[str, Any]
USER: Message = {"role": "user", "content": "q"}
ANSWER: Message = {"role": "assistant", "content": "a"}
SYSTEM: Message = {"role": "system", "content": "s"}
FUNCTION: Row = {"name": "weather", "parameters": {"type": "object"}}
TOOL: Row = {"type": "function", "function": FUNCTION}
SFT, CPT = MethodType.SFT, MethodType.CPT
SHARE_GPT, ALPACA, DOLLY = DatasetFormat.SHARE_GPT, DatasetFormat.ALPACA, DatasetFormat.DOLLY
QA, PC, TEXT = DatasetFormat.QUESTION_ANSWER, DatasetFormat.PROMPT_COMPLETION, DatasetFormat.TEXT


def shape_of(*rows: object, method: MethodType = SFT, choices: RowChoices | None = None) -> DatasetFormat:
    return detect([("f", number, row) for number, row in enumerate(rows, 1)], method, choices or RowChoices()).shape


def read(row: Row, choices: RowChoices | None = None) -> Found:
    """Read a row by the shape that is detected."""
    chosen = choices or RowChoices()
    method = CPT if row.keys() <= {"text", "id"} and not chosen.columns else SFT
    found = read_row(row, shape_of(row, method=method, choices=chosen), chosen)
    assert isinstance(found, Found), found
    return found


def conversation(row: Row, choices: RowChoices | None = None) -> Conversation:
    found = read(row, choices).row
    assert isinstance(found, Conversation)
    return found


def refused(row: Row, shape: DatasetFormat = DatasetFormat.MESSAGES, **choices: Any) -> tuple[Problem, str]:
    found = read_row(row, shape, RowChoices(**choices))
    assert isinstance(found, Broken), found
    return found.problem, found.field


def with_messages(*messages: Message, **beside: Any) -> Row:
    return {"messages": list(messages or (USER, ANSWER)), **beside}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (with_messages(), [USER, ANSWER]),
        ({"messages": json.dumps([USER, ANSWER])}, [USER, ANSWER]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [USER, ANSWER]),
        ({"conversation": [{"role": "user", "content": "q"}, ANSWER]}, [USER, ANSWER]),
        ({"conversations": json.dumps([USER, ANSWER])}, [USER, ANSWER]),
        ({"conversation": [{"human": "q", "assistant": "a"}], "system": "s"}, [SYSTEM, USER, ANSWER]),
        ({"instruction": "q", "input": "", "output": "a"}, [USER, ANSWER]),
        ({"instruction": "q", "output": "a"}, [USER, ANSWER]),
        ({"instruction": "q", "input": " ", "output": "a"}, [USER, ANSWER]),
        ({"instruction": "q", "input": "i", "output": "a"}, [{**USER, "content": "q\n\ni"}, ANSWER]),
        ({"instruction": " ", "input": "q", "output": "a"}, [USER, ANSWER]),
        ({"instruction": "q", "input": "", "output": "a", "system": "s"}, [SYSTEM, USER, ANSWER]),
        ({"instruction": "q", "output": "a", "history": [["q", "a"]]}, [USER, ANSWER, USER, ANSWER]),
        ({"instruction": "q", "output": "a", "history": []}, [USER, ANSWER]),
        (
            {"instruction": "q", "context": "c", "response": "a", "category": "qa"},
            [{**USER, "content": "q\n\nc"}, ANSWER],
        ),
        ({"instruction": "q", "context": "", "response": "a"}, [USER, ANSWER]),
        ({"question": "q", "answer": "a"}, [USER, ANSWER]),
        ({"query": "q", "response": "a", "history": [["q", "a"]]}, [USER, ANSWER, USER, ANSWER]),
        ({"prompt": "q", "response": "a"}, [USER, ANSWER]),
        ({"prompt": "q", "output": "a"}, [USER, ANSWER]),
        ({"input": "q", "output": "a"}, [USER, ANSWER]),
        ({"system_prompt": "s", "question": "q", "response": "a"}, [SYSTEM, USER, ANSWER]),
        ({"prompt": [USER], "completion": [ANSWER]}, [USER, ANSWER]),
        (with_messages(system="s"), [SYSTEM, USER, ANSWER]),
        (with_messages(SYSTEM, USER, ANSWER, system="s"), [SYSTEM, USER, ANSWER]),
        (with_messages(system="", tools=[], weight=1, id=3, source="x"), [USER, ANSWER]),
    ],
)
def test_rows_of_every_shape_become_the_conversation_that_they_say(row: Row, expected: list[Message]) -> None:
    found = conversation(row)
    assert found.messages == expected
    assert found.learned == tuple(each["role"] == "assistant" for each in expected)
    assert (found.tools, found.template_kwargs, found.weight) == (None, {}, 1.0)


def test_a_prompt_and_a_completion_of_text_are_not_rendered() -> None:
    assert read({"prompt": "a", "completion": "b"}).row == Completion("a", "b")
    assert read({"text": "a", "id": 7}).row == Text("a")


def test_only_the_completion_of_a_conversation_in_two_parts_is_learned() -> None:
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    assert conversation(row).learned == (False, False, False, True)
    row = {"prompt": [USER], "completion": [{**ANSWER, "weight": 0}, USER, ANSWER]}
    assert conversation(row).learned == (False, False, False, True)


def test_a_conversation_in_two_parts_of_json_text_is_no_plain_text() -> None:
    """As tables have them, whose cells are texts."""
    row = {"prompt": json.dumps([USER], indent=1), "completion": json.dumps([ANSWER])}
    assert conversation(row).messages == [USER, ANSWER]
    written_by_python = {"prompt": str([USER]), "completion": str([ANSWER])}
    assert refused(written_by_python, PC) == (Problem.WRONG_TYPE, "prompt")


@pytest.mark.parametrize("completion", ['[{"role": "user"}]', '[{"name": "Ada"}]', "[1]"])
def test_json_that_is_to_be_written_after_words_is_learned_as_it_stands(completion: str) -> None:
    assert read({"prompt": "Write JSON.", "completion": completion}).row == Completion("Write JSON.", completion)
    listed = '[{"name": "Bo"}]'
    assert read({"prompt": listed, "completion": completion}).row == Completion(listed, completion)


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        [FUNCTION],
        [{"type": "function", **FUNCTION}],
        [{"name": "weather", "input_schema": {"type": "object"}, "parameters": None}],
        json.dumps([TOOL]),
        json.dumps([FUNCTION]),
        TOOL,
        [json.dumps(TOOL)],
    ],
)
@pytest.mark.parametrize("name", ["tools", "functions"])
def test_tools_mean_the_same_in_every_spelling(tools: object, name: str) -> None:
    assert conversation(with_messages(**{name: tools})).tools == [TOOL]


def test_nulls_that_a_table_fills_in_are_no_part_of_tools_and_calls() -> None:
    call = {"function": {"name": "f", "arguments": {"town": "Oslo", "date": None}}}
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": {"a": {"type": "s"}, "b": None}}},
    }
    row = with_messages(USER, {**ANSWER, "tool_calls": [call]}, tools=[tool])
    found = read(row, RowChoices(nulls_are_absent=True))
    assert isinstance(found.row, Conversation)
    assert found.row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"town": "Oslo"}
    assert found.row.tools == [
        {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "s"}}}}}
    ]
    assert found.changes == {Change.NULLS_LEFT_OUT}
    assert conversation(row).messages[1]["tool_calls"][0]["function"]["arguments"] == {"town": "Oslo", "date": None}
    text = with_messages(USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": '{"date": null}'}}]})
    exact = conversation(text, RowChoices(nulls_are_absent=True))
    assert exact.messages[1]["tool_calls"][0]["function"]["arguments"] == {"date": None}, "JSON text is exact"


@pytest.mark.parametrize("nothing", [None, [], "", " ", "[]", "null", {}])
def test_tools_that_are_none_mean_nothing(nothing: object) -> None:
    assert conversation(with_messages(tools=nothing)).tools is None


def test_what_the_row_says_to_the_template_is_kept() -> None:
    kwargs = {"enable_thinking": False, "absent": None}
    assert conversation(with_messages(chat_template_kwargs=kwargs)).template_kwargs == {"enable_thinking": False}
    assert conversation(with_messages(chat_template_kwargs='{"a": 1}')).template_kwargs == {"a": 1}
    assert conversation(with_messages(chat_template_kwargs={})).template_kwargs == {}


@pytest.mark.parametrize(
    ("given", "weight"),
    [
        (0.5, 0.5),
        (2, 2.0),
        (0, 0.0),
        (-0.0, 0.0),
        (MIN_ROW_WEIGHT, MIN_ROW_WEIGHT),
        (MAX_ROW_WEIGHT, MAX_ROW_WEIGHT),
        ("0.5", 0.5),
        (" 2 ", 2.0),
        (".5", 0.5),
        ("1e-2", 0.01),
        ("0", 0.0),
        ("", 1.0),
        (None, 1.0),
    ],
)
def test_a_rows_weight_is_kept(given: object, weight: float) -> None:
    assert conversation(with_messages(weight=given)).weight == weight
    assert read({"prompt": "a", "completion": "b", "weight": given}).row == Completion("a", "b", weight)
    found = read_row({"text": "a", "weight": given}, TEXT, RowChoices())
    assert isinstance(found, Found)
    assert found.row == Text("a", weight)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (-1, Problem.OUT_OF_RANGE),
        (1e39, Problem.OUT_OF_RANGE),
        (1e-50, Problem.OUT_OF_RANGE),
        (10**400, Problem.OUT_OF_RANGE),
        ("1e39", Problem.OUT_OF_RANGE),
        ("1e-50", Problem.OUT_OF_RANGE),
        ("1e9999", Problem.OUT_OF_RANGE),
        (float("inf"), Problem.OUT_OF_RANGE),
        (float("nan"), Problem.WRONG_TYPE),
        ("nan", Problem.WRONG_TYPE),
        ("inf", Problem.WRONG_TYPE),
        ("0,5", Problem.WRONG_TYPE),
        ("1_0", Problem.WRONG_TYPE),
        ("\u0661", Problem.WRONG_TYPE),
        ("much", Problem.WRONG_TYPE),
        ("9" * 1000, Problem.WRONG_TYPE),
        (True, Problem.WRONG_TYPE),
        ([1], Problem.WRONG_TYPE),
    ],
)
def test_a_weight_that_is_no_number_or_too_small_or_too_large_is_refused(given: object, problem: Problem) -> None:
    assert refused(with_messages(weight=given)) == (problem, "weight")


@pytest.mark.parametrize(
    ("row", "problem", "field"),
    [
        ({}, Problem.MISSING_FIELD, "messages"),
        (with_messages(label=True), Problem.UNKNOWN_FIELD, "label"),
        (with_messages(prompt="p"), Problem.UNKNOWN_FIELD, "prompt"),
        (with_messages(images=["a.png"]), Problem.UNKNOWN_FIELD, "images"),
        (with_messages(rejected_response="b"), Problem.UNKNOWN_FIELD, "rejected_response"),
        (with_messages(loss_mask=[0, 1]), Problem.UNKNOWN_FIELD, "loss_mask"),
        (with_messages(**{"a secret": 1}), Problem.UNKNOWN_FIELD, "(other)"),
        (with_messages(**{"x" * 33: 1}), Problem.UNKNOWN_FIELD, "(other)"),
        (with_messages(SYSTEM, USER, ANSWER, system="t"), Problem.TWO_FIELDS, "system"),
        (with_messages(system="s", system_prompt="t"), Problem.TWO_FIELDS, "system_prompt"),
        (with_messages(system=3), Problem.WRONG_TYPE, "system"),
        (with_messages(tools="weather: tells the weather"), Problem.WRONG_TYPE, "tools"),
        (with_messages(tools=[3]), Problem.WRONG_TYPE, "tools[0]"),
        (with_messages(tools=[{**FUNCTION, "input_schema": {"a": 1}}]), Problem.TWO_FIELDS, "tools[0].input_schema"),
        (with_messages(tools=[{"type": "function", "function": {}}]), Problem.WRONG_TYPE, "tools[0]"),
        (
            with_messages(tools=[{"type": "search", "function": {"a": 1}}]),
            Problem.UNSUPPORTED_FIELD,
            "tools[0].type",
        ),
        (with_messages(tools=[TOOL], functions=[{"name": "f"}]), Problem.TWO_FIELDS, "functions"),
        (with_messages(chat_template_kwargs=[1]), Problem.WRONG_TYPE, "chat_template_kwargs"),
        (
            with_messages(chat_template_kwargs={"messages": []}),
            Problem.UNSUPPORTED_FIELD,
            "chat_template_kwargs.messages",
        ),
        (with_messages(USER), Problem.NO_ASSISTANT, "messages"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(row: Row, problem: Problem, field: str) -> None:
    assert refused(row) == (problem, field)


@pytest.mark.parametrize(
    ("shape", "row", "problem", "field"),
    [
        (ALPACA, {"instruction": "q", "output": ""}, Problem.EMPTY, "output"),
        (ALPACA, {"instruction": "", "input": " ", "output": "a"}, Problem.EMPTY, "instruction"),
        (ALPACA, {"instruction": "", "input": 3, "output": "a"}, Problem.WRONG_TYPE, "input"),
        (DOLLY, {"instruction": "", "context": "c", "response": "a"}, Problem.EMPTY, "instruction"),
        (ALPACA, {"instruction": "q", "input": 3, "output": "a"}, Problem.WRONG_TYPE, "input"),
        (ALPACA, {"instruction": "q", "output": "a", "context": "c"}, Problem.UNKNOWN_FIELD, "context"),
        (ALPACA, {"instruction": "q", "output": "a", "history": "x"}, Problem.WRONG_TYPE, "history"),
        (ALPACA, {"instruction": "q", "output": "a", "history": [["q"]]}, Problem.WRONG_TYPE, "history"),
        (DOLLY, {"context": "c", "response": "a"}, Problem.MISSING_FIELD, "instruction"),
        (QA, {"question": "q", "answer": 4}, Problem.WRONG_TYPE, "answer"),
        (
            QA,
            {"question": "q", "answer": "a", "response": "b"},
            Problem.TWO_FIELDS,
            "response",
        ),
        (
            QA,
            {"question": "q", "answer": "a", "context": "c"},
            Problem.UNKNOWN_FIELD,
            "context",
        ),
        (SHARE_GPT, {"conversations": []}, Problem.EMPTY, "conversations"),
        (SHARE_GPT, {}, Problem.MISSING_FIELD, "conversations"),
        (PC, {"prompt": "a"}, Problem.MISSING_FIELD, "completion"),
        (PC, {"prompt": 1, "completion": "b"}, Problem.WRONG_TYPE, "prompt"),
        (PC, {"prompt": "a", "completion": ""}, Problem.EMPTY, "completion"),
        (
            PC,
            {"prompt": "a", "completion": "b", "system": "s"},
            Problem.UNKNOWN_FIELD,
            "system",
        ),
        (
            PC,
            {"prompt": "a", "completion": "b", "tools": [TOOL]},
            Problem.UNKNOWN_FIELD,
            "tools",
        ),
        (PC, {"prompt": [USER], "completion": "b"}, Problem.WRONG_TYPE, "completion"),
        (PC, {"prompt": [USER], "completion": [USER]}, Problem.NO_ASSISTANT, "completion"),
        (TEXT, {"txt": "a"}, Problem.MISSING_FIELD, "text"),
        (TEXT, {"text": None}, Problem.MISSING_FIELD, "text"),
        (TEXT, {"text": 3}, Problem.WRONG_TYPE, "text"),
        (TEXT, {"text": " \n"}, Problem.EMPTY, "text"),
        (TEXT, {"text": "a\0b"}, Problem.NUL, "text"),
        (TEXT, {"text": "a", "title": "t"}, Problem.UNKNOWN_FIELD, "title"),
    ],
)
def test_a_row_that_is_not_of_its_shape_is_refused_by_name(
    shape: DatasetFormat, row: Row, problem: Problem, field: str
) -> None:
    assert refused(row, shape) == (problem, field)


def test_a_row_that_is_no_object_is_refused() -> None:
    assert read_row([1], TEXT, RowChoices()) == Broken(Problem.NOT_AN_OBJECT)


def test_what_a_row_says_is_in_no_error() -> None:
    for row in (with_messages(label="secret"), with_messages({**USER, "role": "secret"}), {"messages": "secret"}):
        found = read_row(row, DatasetFormat.MESSAGES, RowChoices())
        assert isinstance(found, Broken)
        assert "secret" not in found.words + found.field


def test_a_field_that_says_nothing_is_no_loss() -> None:
    row = with_messages(label=None, note="", tags=[], images=[], extra={}, system=None, chosen=None)
    assert read(row).passed_over == set()


def test_a_text_that_is_a_message_too_says_nothing_more() -> None:
    assert read(with_messages(prompt="q ", solution="a")).passed_over == {"prompt", "solution"}
    assert refused(with_messages(prompt="q", solution="b")) == (Problem.UNKNOWN_FIELD, "solution")


def test_all_fields_that_nobody_knows_are_told_at_once() -> None:
    found = read_row(with_messages(views=1, title="t", **{"a secret": 1}), DatasetFormat.MESSAGES, RowChoices())
    assert isinstance(found, Broken)
    assert (found.field, found.detail) == ("views", "and so are title, (other)")


def test_facts_about_a_row_are_passed_over_and_told() -> None:
    assert read(with_messages(id=1, source="web", __index_level_0__=3)).passed_over == {
        "id",
        "source",
        "__index_level_0__",
    }


def test_fields_that_the_job_names_are_passed_over_and_told() -> None:
    choices = RowChoices(ignored=frozenset(("label", "note", "tools", "weight", "a secret")))
    row = with_messages(USER, {**ANSWER, "note": "b"}, label=1, tools="no JSON", weight="much", **{"a secret": 1})
    found = read_row(row, DatasetFormat.MESSAGES, choices)
    assert isinstance(found, Found)
    assert found.row == Conversation([USER, ANSWER], (False, True))
    assert found.passed_over == {"label", "messages[].note", "tools", "weight", "(other)"}


def test_no_name_is_read_and_passed_over() -> None:
    read_by_shapes = {name for shape in SHAPES.values() for name in shape.reads}
    assert not METADATA & read_by_shapes
    assert not METADATA_OF_MESSAGES & {"role", "content", "from", "value", "weight", "train", "name"}


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        ({"dialog_text": "messages"}, {"dialog_text": [USER, ANSWER]}, [USER, ANSWER]),
        ({"Q": "question", "A": "answer"}, {"Q": "q", "A": "a"}, [USER, ANSWER]),
        ({"rules": "system"}, with_messages(rules="s"), [SYSTEM, USER, ANSWER]),
        ({"id": "instruction", "text": "output"}, {"id": "q", "text": "a"}, [USER, ANSWER]),
        (
            {"log": "messages", "speaker": "role", "words": "content"},
            {"log": [{"speaker": "user", "words": "q"}, {"speaker": "assistant", "words": "a"}]},
            [USER, ANSWER],
        ),
        ({"reply": "messages"}, {"reply": [USER, ANSWER], "messages": None}, [USER, ANSWER]),
    ],
)
def test_fields_may_have_other_names(columns: dict[str, str], row: Row, expected: list[Message]) -> None:
    assert conversation(row, RowChoices(columns=columns)).messages == expected


def test_an_error_names_the_field_as_the_file_does() -> None:
    row = {"log": [USER, {"role": "robot", "content": "a"}]}
    assert refused(row, columns={"log": "messages"}) == (Problem.UNKNOWN_ROLE, "log[1].role")


def test_a_renamed_field_never_hides_another() -> None:
    row = {"log": [USER, ANSWER], "messages": [USER]}
    assert refused(row, columns={"log": "messages"}) == (Problem.TWO_FIELDS, "messages")
    found = read_row(
        row, DatasetFormat.MESSAGES, RowChoices(columns={"log": "messages"}, ignored=frozenset(["messages"]))
    )
    assert isinstance(found, Found)


def test_every_name_that_can_be_given_is_one_that_is_read() -> None:
    read_by_shapes = {name for shape in SHAPES.values() for name in shape.reads.union(*shape.needs)}
    assert set(ColumnsSpec.model_fields) <= read_by_shapes | {"role", "content"}
    needed = {group[0] for shape in SHAPES.values() for group in shape.needs} - {"conversations"}
    assert needed <= set(ColumnsSpec.model_fields)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_examples_of_a_shape_are_detected_and_read(shape: DatasetFormat) -> None:
    method = next((name for name, method in METHODS.items() if shape in method.formats), None)
    for example in SHAPES[shape].examples:
        row = json.loads(example)
        assert method is None or shape_of(row, method=method) is shape
        assert isinstance(read_row(row, shape, RowChoices()), Found)


def test_every_format_has_a_shape_and_becomes_a_kind_and_methods_take_no_others() -> None:
    assert set(SHAPES) == set(DatasetFormat) == {each for kind in KINDS.values() for each in kind.formats}
    assert {kind.name for method in METHODS.values() for kind in method.kinds} <= {kind.name for kind in KINDS.values()}


def test_a_few_rows_of_another_shape_are_broken_rows_and_not_another_dataset() -> None:
    assert shape_of(*[with_messages()] * 30, {"question": "q", "answer": "a"}, 7, Broken(Problem.NOT_JSON)) is (
        DatasetFormat.MESSAGES
    )


@pytest.mark.parametrize(
    ("rows", "number", "names"),
    [
        ([with_messages(conversations=[USER, ANSWER])], 1, ("Messages", "ShareGPT")),
        ([{"instruction": "q", "output": "a", "response": "b"}], 1, ("Alpaca", "Dolly")),
        ([{"prompt": "q", "completion": "a", "response": "b"}], 1, ("QuestionAnswer", "PromptCompletion")),
        ([with_messages()] * 3 + [{"question": "q", "answer": "a"}], 4, ("Messages", "QuestionAnswer")),
    ],
)
def test_rows_that_fit_two_shapes_are_asked_about_and_both_are_named(
    rows: list[Row], number: int, names: tuple[str, str]
) -> None:
    with pytest.raises(StageError) as caught:
        shape_of(*rows)
    assert caught.value.fault is Fault.WRONG_FORMAT
    assert caught.value.args_by_name["row"] == number
    assert all(name in str(caught.value) for name in (*names, "set datasets[].format to one of them"))
    assert all(len(str(each)) <= 256 for each in caught.value.args_by_name.values())


def test_of_two_shapes_in_one_dataset_the_first_row_of_each_is_named() -> None:
    qa, pc = {"question": "q", "answer": "a"}, {"prompt": "q", "completion": "a"}
    rows = [("s3://b/" + "n" * 90, 999_999, each) for each in (qa, pc, qa, pc)]
    with pytest.raises(StageError) as caught:
        detect([("s3://b/a.jsonl", 1, None), ("s3://b/a.jsonl", 2, qa), *rows[1:]], SFT, RowChoices())
    said = caught.value.args_by_name["expected"]
    assert "2 fit QuestionAnswer (first row 2 of a.jsonl), 2 PromptCompletion (first row 999999 of nnnn" in str(said)
    assert len(str(said)) <= 256
    assert "make two datasets of them" in str(said)


@pytest.mark.parametrize(
    ("row", "shape", "detail"),
    [
        (
            {"instruction": "q", "output": "a"},
            DatasetFormat.MESSAGES,
            "it is Alpaca, not Messages, which row 1 of f has",
        ),
        (with_messages(USER, ANSWER), ALPACA, "it is Messages, not Alpaca, which row 1 of f has"),
        ({"instruction": "q", "response": "a"}, ALPACA, "it is Dolly, not Alpaca, which row 1 of f has"),
        ({"text": "t"}, DatasetFormat.MESSAGES, "it is Text, not Messages, which row 1 of f has"),
    ],
)
def test_a_row_of_another_shape_than_its_datasets_is_told_both_and_by_which_row(
    row: Row, shape: DatasetFormat, detail: str
) -> None:
    found = read_row(row, shape, RowChoices(told_by="row 1 of f has"))
    assert found == Broken(Problem.OTHER_SHAPE, detail=detail)
    assert refused({"mood": "m"}, shape)[0] is Problem.MISSING_FIELD


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER], "label": True},
        {"messages": [USER, ANSWER], "mood": "m", "label": 0},
        {"question": "q", "answer": "a", "kto_tag": "good"},
    ],
)
def test_a_rated_answer_that_is_to_be_learned_as_it_is_names_the_methods_that_learn_from_ratings(row: Row) -> None:
    shape = DatasetFormat.MESSAGES if "messages" in row else DatasetFormat.QUESTION_ANSWER
    found = read_row(row, shape, RowChoices())
    assert isinstance(found, Broken)
    assert (found.problem, found.field) == (Problem.UNKNOWN_FIELD, "label" if "label" in row else "kto_tag")
    assert "method.type KTO" in found.words
    assert "DPO and ORPO" in found.words
    assert len(found.words) <= 256


def test_rows_of_no_shape_are_refused_with_what_is_needed_and_what_was_found() -> None:
    with pytest.raises(StageError) as caught:
        shape_of({"chosen": "a", "rejected": "b", "a secret": 1})
    words = str(caught.value)
    assert "`messages`, or `conversations`, or `instruction` and `output`" in words
    assert "found the fields chosen, rejected and 1 more" in words
    assert "secret" not in words
    assert all(len(str(each)) <= 256 for each in caught.value.args_by_name.values())


@pytest.mark.parametrize(
    ("row", "method", "says"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, MethodType.SFT, "; this one fits method.type DPO or ORPO;"),
        ({"prompt": "q", "completion": "a", "mood": 1}, MethodType.KTO, "or `label`, `prompt` and `completion`; "),
        ({"prompt": "q", "scores": [1]}, MethodType.DPO, "`responses` and `scores`, or datasets[].columns that says"),
    ],
)
def test_rows_of_other_methods_are_refused_with_the_methods_that_take_them(
    row: Row, method: MethodType, says: str
) -> None:
    with pytest.raises(StageError) as caught:
        shape_of(row, method=method)
    assert says in str(caught.value)
    assert all(len(str(each)) <= 256 for each in caught.value.args_by_name.values())


def test_rows_none_of_whose_names_is_shown_are_told_to_have_some() -> None:
    with pytest.raises(StageError, match="found the fields 2, none of whose names is shown as it may be data"):
        shape_of({"Question Text": "a", "Model Answer": "b"})


def test_changes_of_messages_and_of_their_order_are_told_together() -> None:
    row = with_messages({"role": "user", "content": ["q", "r"]}, ANSWER, USER)
    assert read(row).changes == {Change.PARTS_JOINED, Change.END_LEFT_OUT}
