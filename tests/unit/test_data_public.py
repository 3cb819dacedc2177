"""Rows as public datasets, and the reports of people who could not train on theirs, have them."""

import json
from typing import Any

import pytest

from finetune_api.errors import StageError
from finetune_api.job import DatasetFormat, MethodType
from finetune_trainer.data.detect import detect
from finetune_trainer.data.problems import Broken
from finetune_trainer.data.rows import Completion, Conversation
from finetune_trainer.data.shapes import RowChoices, read_row

Row = dict[str, Any]
Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
F = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": "y"}'}}
SAYS_CALL = {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": "y"}}'}
RESULT = {"role": "tool_response", "content": "r"}
M, SHARE, ALPACA = DatasetFormat.MESSAGES, DatasetFormat.SHARE_GPT, DatasetFormat.ALPACA
QA, PC, DOLLY = DatasetFormat.QUESTION_ANSWER, DatasetFormat.PROMPT_COMPLETION, DatasetFormat.DOLLY

# What is shown: each message's role by its first letter, in capitals where it is learned; c after it for calls, r for
# reasoning. Of text that no template renders, "text".
TRAINED: list[tuple[str, Row, DatasetFormat, str]] = [
    ("OpenAI chat", {"messages": [{"role": "system", "content": "s"}, Q, A]}, M, "suA"),
    ("OpenAI weight", {"messages": [Q, {**A, "weight": 0}, Q, {**A, "weight": 1}]}, M, "uauA"),
    ("OpenAI completions", {"prompt": "q", "completion": "a"}, PC, "text"),
    (
        "OpenAI tools",
        {
            "messages": [
                Q,
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c", "content": "r"},
                A,
            ],
            "tools": [{"type": "function", "function": {**F, "strict": True}}],
            "parallel_tool_calls": False,
        },
        M,
        "uActA",
    ),
    (
        "OpenAI functions, before tools",
        {
            "messages": [
                Q,
                {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
                {"role": "function", "name": "f", "content": "r"},
                A,
            ],
            "functions": [F],
        },
        M,
        "uActA",
    ),
    (
        "OpenAI playground, all content as parts",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": [{"type": "text", "text": ""}], "tool_calls": [CALL]},
                {"role": "tool", "content": [{"type": "text", "text": "r"}], "tool_call_id": "c"},
                {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
            ],
            "tools": [{"type": "function", "function": F}],
        },
        M,
        "uActA",
    ),
    (
        "an answer as OpenAI's library dumps it",
        {
            "messages": [
                Q,
                {**A, "refusal": None, "audio": None, "function_call": None, "tool_calls": None, "annotations": []},
            ]
        },
        M,
        "uA",
    ),
    (
        "Mistral",
        {
            "messages": [
                Q,
                {**A, "content": "", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]},
            ]
        },
        M,
        "uAc",
    ),
    ("ShareGPT", {"id": "x_0", "conversations": [HUMAN, {**GPT, "markdown": None, "text": None}]}, SHARE, "uA"),
    ("ShareGPT, bing (axolotl#325)", {"conversations": [HUMAN, {"from": "bing", "value": "a"}]}, SHARE, "uA"),
    (
        "ShareGPT, assistant (axolotl#752)",
        {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
        SHARE,
        "uA",
    ),
    ("ShareGPT, gpt first", {"conversations": [GPT, HUMAN, GPT]}, SHARE, "auA"),
    ("ShareGPT, gpt twice (LLaMA-Factory#6926)", {"conversations": [GPT, GPT], "tools": "[]"}, SHARE, "aA"),
    (
        "SlimOrca",
        {
            "conversations": [
                {"from": "system", "value": "s", "weight": None},
                {**HUMAN, "weight": 0},
                {**GPT, "weight": 1},
            ]
        },
        SHARE,
        "suA",
    ),
    ("pygmalion", {"conversations": [{"role": "user", "value": "q"}, {"role": "model", "value": "a"}]}, SHARE, "uA"),
    (
        "Capybara",
        {"source": "x", "conversation": [{"input": "q", "output": "a"}, {"input": "q", "output": "a"}]},
        SHARE,
        "uAuA",
    ),
    ("xtuner", {"conversation": [{"system": "s", "input": "q", "output": "a"}]}, SHARE, "suA"),
    ("ms-swift ShareGPT", {"system": "s", "conversation": [{"human": "q", "assistant": "a"}]}, SHARE, "suA"),
    ("ms-swift query", {"system": "s", "query": "q", "response": "a", "history": [["q", "a"]]}, QA, "suAuA"),
    ("ms-swift, two calls at once", {"messages": [Q, SAYS_CALL, SAYS_CALL, *2 * [RESULT], A]}, M, "uActtA"),
    ("ms-swift, words before a call", {"messages": [Q, {**A, "loss": True}, SAYS_CALL, RESULT, A]}, M, "uActA"),
    (
        "ms-swift, words before a call that are not learned",
        {"messages": [Q, {**A, "loss": False}, SAYS_CALL, RESULT, A]},
        M,
        "uaActA",
    ),
    ("ms-swift loss", {"messages": [Q, {**A, "loss": False}, Q, {**A, "loss": True}]}, M, "uauA"),
    ("ms-swift loss_scale", {"messages": [Q, {**A, "loss_scale": 0.0}, Q, {**A, "loss_scale": 1.0}]}, M, "uauA"),
    (
        "axolotl train",
        {"conversations": [{**HUMAN, "train": False}, {**GPT, "train": False}, HUMAN, {**GPT, "train": True}]},
        SHARE,
        "uauA",
    ),
    ("axolotl training", {"messages": [Q, {**A, "training": False}, Q, A]}, M, "uauA"),
    (
        "torchtune masked",
        {"messages": [{**Q, "masked": True}, {**A, "masked": True}, Q, {**A, "masked": False}]},
        M,
        "uauA",
    ),
    (
        "LLaMA-Factory Alpaca",
        {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["q", "a"]]},
        ALPACA,
        "suAuA",
    ),
    (
        "LLaMA-Factory tools (APIGen-MT)",
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": "r"},
                GPT,
            ],
            "tools": json.dumps([F]),
            "system": "s",
        },
        SHARE,
        "suActA",
    ),
    ("LLaMA-Factory, tools of a space (#7547)", {"conversations": [HUMAN, GPT], "tools": " "}, SHARE, "uA"),
    (
        "reasoning before a call (Meissa#4)",
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": '<think>r</think>\n{"name": "f", "arguments": {}}'},
            ]
        },
        SHARE,
        "uAcr",
    ),
    (
        "Hermes, calls in the text",
        {
            "conversations": [
                HUMAN,
                {"from": "gpt", "value": "<tool_call>\n{}\n</tool_call>"},
                {"from": "tool", "value": "r"},
                GPT,
            ],
            "tools": json.dumps([{"type": "function", "function": F}]),
            "category": "x",
            "subcategory": "y",
            "task": "z",
        },
        SHARE,
        "uAtA",
    ),
    (
        "function-calling-sharegpt",
        {"conversations": [HUMAN, GPT, {"from": "function_response", "value": "r"}, GPT]},
        SHARE,
        "uAtA",
    ),
    (
        "several calls, then several results",
        {
            "messages": [
                Q,
                {"role": "assistant", "tool_calls": [CALL, CALL]},
                {"role": "tool", "content": "r"},
                {"role": "tool", "content": "r"},
                A,
            ]
        },
        M,
        "uActtA",
    ),
    ("DeepSeek reasoning", {"messages": [Q, {**A, "reasoning_content": "r"}]}, M, "uAr"),
    ("OpenRouter reasoning", {"messages": [Q, {**A, "reasoning": "r", "reasoning_details": None}]}, M, "uAr"),
    (
        "TRL and gpt-oss thinking",
        {"messages": [{"role": "developer", "content": "s"}, Q, {**A, "thinking": "r"}]},
        M,
        "suAr",
    ),
    (
        "SmolTalk 2",
        {"messages": [Q, A], "chat_template_kwargs": {"enable_thinking": False, "xml_tools": []}, "source": "x"},
        M,
        "uA",
    ),
    ("SmolTalk 2, two users (smol-course#260)", {"messages": [Q, A, Q, Q, A]}, M, "uAuuA"),
    ("no_robots, UltraChat", {"prompt": "q", "prompt_id": "x", "messages": [Q, A], "category": "c"}, M, "uA"),
    ("NuminaMath", {"source": "x", "problem": "q", "solution": "a", "messages": [Q, A]}, M, "uA"),
    ("Tulu", {"id": "x", "dataset": "d", "messages": [Q, A]}, M, "uA"),
    (
        "OpenThoughts",
        {
            "system": "s",
            "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "<|begin_of_thought|>"}],
        },
        SHARE,
        "suA",
    ),
    ("WizardLM", {"conversations": [HUMAN, GPT], "idx": "x"}, SHARE, "uA"),
    ("Alpaca cleaned", {"instruction": "q", "input": "i", "output": "a"}, ALPACA, "uA"),
    ("Platypus", {"instruction": "q", "input": "", "output": "a", "data_source": "x"}, ALPACA, "uA"),
    (
        "Alpaca, all of the question in the input (LLaMA-Factory joins what there is)",
        {"instruction": "", "input": "q", "output": "a"},
        ALPACA,
        "uA",
    ),
    ("Evol-Instruct", {"instruction": "q", "output": "a"}, ALPACA, "uA"),
    ("Dolly", {"instruction": "q", "context": "", "response": "a", "category": "open_qa"}, DOLLY, "uA"),
    ("OpenOrca", {"id": "x", "system_prompt": "s", "question": "q", "response": "a"}, QA, "suA"),
    ("a table with pandas' index", {"": "0", "question": "q", "answer": "a"}, QA, "uA"),
    ("the same, written twice", {"": 1, "Unnamed: 0": "1", "Unnamed: 0.1": 1.0, "query": "q", "answer": "a"}, QA, "uA"),
    ("GSM8K", {"question": "q", "answer": "a"}, QA, "uA"),
    ("input and output", {"input": "q", "output": "a"}, QA, "uA"),
    (
        "Cohere",
        {
            "messages": [
                {"role": "System", "content": "s"},
                {"role": "User", "content": "q"},
                {"role": "Chatbot", "content": "a"},
            ]
        },
        M,
        "suA",
    ),
    ("Bedrock", {"system": "s", "messages": [Q, A]}, M, "suA"),
    (
        "a Sequence of datasets, which is a list for each field",
        {"conversations": {"from": ["human", "gpt"], "value": ["q", "a"], "weight": [None, 1.0]}},
        SHARE,
        "uA",
    ),
    (
        "Guanaco (axolotl sharegpt.load_guanaco)",
        {"conversations": [{"from": "prompter", "value": "q"}, {"from": "assistant", "value": "a"}]},
        SHARE,
        "uA",
    ),
    ("messages as text, as tables have them", {"messages": json.dumps([Q, A])}, M, "uA"),
    (
        "a table that fills in null",
        {"messages": [{**Q, "tool_calls": None, "name": None}, {**A, "name": None}], "tools": None, "text": None},
        M,
        "uA",
    ),
    ("TRL in two parts", {"prompt": [Q], "completion": [A]}, PC, "uA"),
]
REFUSED: list[tuple[str, Row, str]] = [
    (
        "an image (LLaMA-Factory#6298)",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}, A]},
        "messages[0].content[0]",
    ),
    ("images beside (ms-swift)", {"messages": [Q, A], "images": ["x.jpg"]}, "images"),
    ("KTO", {"messages": [Q, A], "label": False}, "label"),
    ("DPO (ms-swift)", {"messages": [Q, A], "rejected_response": "b"}, "rejected_response"),
    ("masks beside (LLaMA-Factory#9630)", {"conversations": [HUMAN, GPT], "loss_mask": [0, 1]}, "loss_mask"),
    (
        "masks inside a message (axolotl)",
        {"messages": [Q, {**A, "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}]},
        "messages[1].train_detail",
    ),
    (
        "the question is to be learned (axolotl)",
        {"conversations": [{**HUMAN, "train": True}, GPT]},
        "conversations[0].train",
    ),
    ("a column without a name", {"": "no", "messages": [Q, A]}, "(other)"),
    ("another one", {"Unnamed: 0": "0.5", "messages": [Q, A]}, "(other)"),
    ("half a weight", {"messages": [Q, {**A, "weight": 0.5}]}, "messages[1].weight"),
    ("a refusal", {"messages": [Q, {**A, "refusal": "no"}]}, "messages[1].refusal"),
    (
        "original Alpaca, rendered text beside",
        {"instruction": "q", "input": "", "output": "a", "text": "### q"},
        "text",
    ),
    ("MetaMath", {"query": "q", "response": "a", "original_question": "o", "type": "t"}, "original_question"),
    ("SQuAD", {"question": "q", "context": "c", "answer": "a"}, "context"),
    (
        "a role of its own (LLaMA-Factory#2381)",
        {"conversations": [{"from": "hummany", "value": "q"}, GPT]},
        "conversations[0].from",
    ),
    ("LIMA, texts alone", {"conversations": ["q", "a"], "source": "x"}, "conversations[0]"),
    ("pieces of Python", {"messages": "[{'role': 'user', 'content': 'q'}]"}, "messages"),
    (
        "Anthropic's calls",
        {
            "messages": [
                Q,
                {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f", "input": {}}]},
            ]
        },
        "messages[1].content[0]",
    ),
]


def shape_of(row: Row) -> DatasetFormat:
    return detect([("f", 1, row)], MethodType.SFT, RowChoices()).shape


def shown(row: object) -> str:
    if isinstance(row, Completion):
        return "text"
    assert isinstance(row, Conversation)
    parts: list[str] = []
    for message, learned in zip(row.messages, row.learned, strict=True):
        role: str = message["role"][0]
        parts.append(role.upper() if learned else role)
        parts.append("c" if "tool_calls" in message else "")
        parts.append("r" if "reasoning_content" in message else "")
    return "".join(parts)


@pytest.mark.parametrize(
    ("row", "shape", "expected"), [each[1:] for each in TRAINED], ids=[each[0] for each in TRAINED]
)
def test_rows_as_people_have_them_are_learned_as_they_mean(row: Row, shape: DatasetFormat, expected: str) -> None:
    assert shape_of(row) is shape
    found = read_row(row, shape, RowChoices())
    assert not isinstance(found, Broken), found
    assert shown(found.row) == expected


@pytest.mark.parametrize(("row", "field"), [each[1:] for each in REFUSED], ids=[each[0] for each in REFUSED])
def test_rows_that_would_lose_something_are_refused_by_name(row: Row, field: str) -> None:
    found = read_row(row, shape_of(row), RowChoices())
    assert isinstance(found, Broken), found
    assert found.field == field


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"query": "q", "answers": "[]", "tools": "[]"},
        {"contents": [{"role": "user", "parts": [{"text": "q"}]}]},
        {"system": "s", "chat": "USER: q"},
        {"input_ids": [1, 2], "labels": [1, 2]},
        {"instruction": "q", "response": "a", "conversations": [HUMAN, GPT]},
    ],
    ids=["preference", "xLAM", "Gemini", "glaive", "tokens", "Magpie: two shapes"],
)
def test_rows_of_no_shape_or_of_two_end_the_job_before_anything_else(row: Row) -> None:
    with pytest.raises(StageError):
        shape_of(row)
