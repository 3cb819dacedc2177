"""Rows that say what is preferred become what a server sends and gets back, for each answer, or say why not."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from data_run import CHATML, Prepared, byte_bpe, context, jsonl, prepare_run, put, write_model
from finetune_api.errors import StageError
from finetune_api.job import PreferenceSpec
from finetune_api.reasons import Fault
from finetune_trainer.data.problems import Broken, Change, Problem
from finetune_trainer.data.renderer import Rendered, Renderer
from finetune_trainer.data.rows import Conversation, Pair, Thumb
from finetune_trainer.data.shapes import SHAPES, Found, RowChoices, read_row
from finetune_trainer.shown import Wanted, show, show_unrendered

Row = dict[str, Any]
Messages = list[dict[str, Any]]
BPE = byte_bpe()
JUDGE = PreTrainedTokenizerFast(
    tokenizer_object=BPE, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHATML
)
ASKED: Messages = [{"role": "user", "content": "what is two and two?"}]
SYSTEM: Messages = [{"role": "system", "content": "Be brief."}]
TALK: Messages = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi, what is it?"},
    {"role": "user", "content": "two and two?"},
]
AND_THEN = {"role": "user", "content": "and then?"}
GOOD, BAD = "the answer is four.", "the answer is fox"
ALL: dict[str, Any] = {"method": {"type": "DPO"}, "evaluation": {"holdoutFraction": 0}}
ONE_BY_ONE = {**ALL, "method": {"type": "KTO"}}


def says(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def share_gpt(messages: Messages) -> Messages:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[each["role"]], "value": each["content"]} for each in messages]


def rendered(messages: Messages, answer: str, **variables: Any) -> tuple[list[int], list[int]]:
    """What transformers gives for a conversation with this answer, and 1 for each token of it and its stop."""
    before: Any = JUDGE.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **variables)
    ids: Any = JUDGE.apply_chat_template([*messages, says(answer)], return_dict=False, **variables)
    stop = len(ids) - ids[::-1].index(JUDGE.eos_token_id)
    return ids, [int(len(before) <= place < stop) for place in range(len(ids))]


def plain(prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """A text and how it goes on, with the end token and without a template."""
    before = JUDGE.encode(prompt, add_special_tokens=False)
    end: Any = JUDGE.eos_token_id
    ids = [*JUDGE.encode(prompt + answer, add_special_tokens=False), end]
    return ids, [int(place >= len(before)) for place in range(len(ids))]


PAIRS: dict[str, tuple[Row, Messages | str]] = {
    "texts": ({"prompt": "two and two is", "chosen": " four.", "rejected": " a fox"}, "two and two is"),
    "messages": ({"prompt": ASKED, "chosen": [says(GOOD)], "rejected": [says(BAD)]}, ASKED),
    "messages as text": (
        {"prompt": json.dumps(ASKED), "chosen": json.dumps([says(GOOD)]), "rejected": json.dumps([says(BAD)])},
        ASKED,
    ),
    "prompt of several turns": ({"prompt": TALK, "chosen": [says(GOOD)], "rejected": [says(BAD)]}, TALK),
    "implicit prompt": ({"chosen": [*TALK, says(GOOD)], "rejected": [*TALK, says(BAD)]}, TALK),
    "implicit prompt in ShareGPT's names": (
        {"chosen": share_gpt([*TALK, says(GOOD)]), "rejected": share_gpt([*TALK, says(BAD)])},
        TALK,
    ),
    "UltraFeedback, binarized": (
        {
            "prompt": ASKED[0]["content"],
            "prompt_id": "a1",
            "chosen": [*ASKED, says(GOOD)],
            "rejected": [*ASKED, says(BAD)],
            "messages": [*ASKED, says(GOOD)],
            "score_chosen": 9.0,
            "score_rejected": 2.5,
        },
        ASKED,
    ),
    "Orca": (
        {"system": "Be brief.", "question": ASKED[0]["content"], "chosen": GOOD, "rejected": BAD},
        [*SYSTEM, *ASKED],
    ),
    "input": ({"input": ASKED[0]["content"], "chosen": GOOD, "rejected": BAD}, ASKED),
    "Alpaca": (
        {"instruction": "Add.", "input": "2 and 2", "chosen": GOOD, "rejected": BAD, "history": [["hello", "hi"]]},
        [{"role": "user", "content": "hello"}, says("hi"), {"role": "user", "content": "Add.\n\n2 and 2"}],
    ),
    "LLaMA-Factory": (
        {
            "system": "Be brief.",
            "conversations": share_gpt(TALK),
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
        [*SYSTEM, *TALK],
    ),
    "LLaMA-Factory in OpenAI's names": ({"messages": TALK, "chosen": says(GOOD), "rejected": says(BAD)}, TALK),
    "a question as text and answers as messages": (
        {"prompt": ASKED[0]["content"], "chosen": [says(GOOD)], "rejected": [says(BAD)]},
        ASKED,
    ),
    "Anthropic's HH": (
        {
            "chosen": f"\n\nHuman: hello\n\nAssistant: hi, what is it?\n\nHuman: two and two?\n\nAssistant: {GOOD}",
            "rejected": f"\n\nHuman: hello\n\nAssistant: hi, what is it?\n\nHuman: two and two?\n\nAssistant: {BAD}",
        },
        TALK,
    ),
}


@pytest.mark.parametrize(("row", "prompt"), PAIRS.values(), ids=PAIRS)
def test_a_pair_of_every_spelling_is_its_two_answers_after_one_prompt_as_transformers_has_them(
    tmp_path: Path, row: Row, prompt: Messages | str
) -> None:
    put(tmp_path, a_jsonl=jsonl([row]))
    prepared = prepare_run(tmp_path, ALL)
    if isinstance(prompt, str):
        assert prepared.train == [plain(prompt, row["chosen"]), plain(prompt, row["rejected"])]
    else:
        assert prepared.train == [rendered(prompt, GOOD), rendered(prompt, BAD)]
    assert len(prepared.examples(prepared.plan.train)) == 1


THUMBS: dict[str, tuple[Row, bool, Messages | str]] = {
    "texts": ({"prompt": "two and two is", "completion": " four.", "label": True}, True, "two and two is"),
    "messages": ({"prompt": ASKED, "completion": [says(GOOD)], "label": False}, False, ASKED),
    "a conversation": ({"messages": [*TALK, says(GOOD)], "label": 1}, True, TALK),
    "ShareGPT": ({"conversations": share_gpt([*TALK, says(GOOD)]), "kto_tag": False}, False, TALK),
    "a question": ({"question": ASKED[0]["content"], "answer": GOOD, "label": "desirable"}, True, ASKED),
    "Alpaca": (
        {"system": "Be brief.", "instruction": ASKED[0]["content"], "output": GOOD, "label": "bad"},
        False,
        [*SYSTEM, *ASKED],
    ),
}


@pytest.mark.parametrize(("row", "is_good", "prompt"), THUMBS.values(), ids=THUMBS)
def test_a_thumb_of_every_spelling_is_its_last_answer_with_what_is_said_of_it(
    tmp_path: Path, row: Row, is_good: bool, prompt: Messages | str
) -> None:
    other = {**row, next(name for name in ("label", "kto_tag") if name in row): not is_good}
    put(tmp_path, a_jsonl=jsonl([row, other]))
    prepared = prepare_run(tmp_path, ONE_BY_ONE)
    expected = plain(prompt, " four.") if isinstance(prompt, str) else rendered(prompt, GOOD)
    assert prepared.train == [expected, expected]
    assert prepared.examples(prepared.plan.train).columns["label"].tolist() == ([1, -1] if is_good else [-1, 1])
    (found,) = show_unrendered(context(tmp_path, ONE_BY_ONE, attempt=2), Wanted())
    assert found.answer == ("good" if is_good else "bad")


def refusal(row: Row, format_: str) -> tuple[Problem, str]:
    shape = next(each for each in SHAPES if each == format_)
    found = read_row(row, shape, RowChoices())
    assert isinstance(found, Broken), found
    return found.problem, found.field


@pytest.mark.parametrize(
    ("row", "problem", "field"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": " "}, Problem.EMPTY, "rejected"),
        ({"prompt": ASKED, "chosen": [says("")], "rejected": [says("b")]}, Problem.EMPTY, "chosen[0].content"),
        ({"chosen": "a", "rejected": "b"}, Problem.MISSING_FIELD, "prompt"),
        ({"chosen": [says("a")], "rejected": [says("b")]}, Problem.MISSING_FIELD, "prompt"),
        ({"prompt": ASKED, "chosen": [says("a")], "rejected": TALK}, Problem.TWO_FIELDS, "rejected"),
        ({"chosen": [*TALK, says("a")], "rejected": TALK}, Problem.LAST_NOT_ASSISTANT, "rejected"),
        (
            {"chosen": [*TALK, says("a")], "rejected": [*ASKED, *TALK[1:], says("b")]},
            Problem.PROMPTS_DIFFER,
            "rejected",
        ),
        (
            {"prompt": ASKED, "chosen": [says("a")], "rejected": [says("b"), says("c")]},
            Problem.PROMPTS_DIFFER,
            "rejected",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": [says("b")]}, Problem.WRONG_TYPE, "rejected"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"}, Problem.UNKNOWN_FIELD, "system"),
        ({"prompt": "q", "question": "r", "chosen": "a", "rejected": "b"}, Problem.TWO_FIELDS, "question"),
        (
            {"prompt": ASKED, "chosen": [{**says("a"), "train": False}], "rejected": [says("b")]},
            Problem.MASKED_ANSWER,
            "chosen",
        ),
        (
            {"conversations": share_gpt(TALK), "prompt": "other", "chosen": says("a"), "rejected": says("b")},
            Problem.UNKNOWN_FIELD,
            "prompt",
        ),
        (
            {
                "prompt": ASKED,
                "chosen": [*TALK, says("c"), *ASKED, says("d"), AND_THEN, says("a")],
                "rejected": [*TALK, says("c"), *ASKED, says("d"), AND_THEN, says("b")],
            },
            Problem.TWO_FIELDS,
            "chosen",
        ),
        ({"prompt": ASKED, "chosen": [says("a")], "rejected": [says("b")], "mood": "m"}, Problem.UNKNOWN_FIELD, "mood"),
    ],
)
def test_a_pair_that_cannot_be_compared_is_refused_by_its_field(row: Row, problem: Problem, field: str) -> None:
    assert refusal(row, "Pair") == (problem, field)


@pytest.mark.parametrize(
    ("row", "says_what"),
    [
        ({"chosen": "a", "rejected": "b"}, "say what is answered there, or make each answer a list of all messages"),
        (
            {"prompt": ASKED, "chosen": [says("a"), AND_THEN, says("b")], "rejected": [says("a"), AND_THEN, says("c")]},
            "it has a user's messages, but not those of the row's prompt; write all of the conversation in it",
        ),
    ],
)
def test_a_pair_without_its_prompt_is_told_what_to_write(row: Row, says_what: str) -> None:
    found = read_row(row, next(each for each in SHAPES if each == "Pair"), RowChoices())
    assert isinstance(found, Broken)
    assert found.detail.startswith(says_what)


@pytest.mark.parametrize("word", ["up", "like", "good", "desirable", "chosen", 1, "1", True])
def test_every_word_for_a_good_answer_that_the_page_names_is_read(word: object) -> None:
    opposites = {"up": "down", "like": "dislike", "good": "bad", "desirable": "undesirable", "chosen": "rejected"}
    for label, is_good in ((word, True), (opposites.get(str(word), -1), False)):
        row = {"messages": [*ASKED, says("a")], "label": label}
        found = read_row(row, next(each for each in SHAPES if each == "Thumb"), RowChoices())
        assert isinstance(found, Found)
        assert isinstance(found.row, Thumb)
        assert found.row.is_good is is_good


@pytest.mark.parametrize(
    ("row", "problem", "field"),
    [
        ({"messages": [*ASKED, says("a")], "label": "maybe"}, Problem.WRONG_TYPE, "label"),
        ({"messages": [*ASKED, says("a")], "label": 0.5}, Problem.WRONG_TYPE, "label"),
        ({"messages": [*ASKED, says("a")], "label": True, "kto_tag": False}, Problem.TWO_FIELDS, "kto_tag"),
        ({"messages": [*ASKED, says("a"), *ASKED], "label": True}, Problem.LAST_NOT_ASSISTANT, ""),
        ({"messages": [*ASKED, {**says("a"), "weight": 0}], "label": True}, Problem.MASKED_ANSWER, ""),
        ({"completion": "a", "label": True}, Problem.MISSING_FIELD, "prompt"),
        ({"messages": [*ASKED, says("a")], "label": None}, Problem.MISSING_FIELD, "label"),
        ({"prompt": ASKED, "completion": [says("a")]}, Problem.MISSING_FIELD, "label"),
        ({"prompt": ASKED, "chosen": [says("a")], "rejected": [says("b")]}, Problem.OTHER_SHAPE, ""),
        ({"prompt": "q", "completion": "a", "label": True, "system": "s"}, Problem.UNKNOWN_FIELD, "system"),
        ({"messages": [*ASKED, says("a")], "label": True, "mood": "m"}, Problem.UNKNOWN_FIELD, "mood"),
    ],
)
def test_a_thumb_that_is_not_clear_is_refused_by_its_field(row: Row, problem: Problem, field: str) -> None:
    assert refusal(row, "Thumb") == (problem, field)


def test_what_an_earlier_answer_says_of_itself_changes_nothing_as_the_last_alone_is_learned() -> None:
    talk = [TALK[0], {**TALK[1], "train": True}, TALK[2]]
    found = read_row(
        {"messages": [*talk, says("a")], "label": True}, next(each for each in SHAPES if each == "Thumb"), RowChoices()
    )
    assert isinstance(found, Found)
    assert isinstance(found.row, Thumb)
    assert isinstance(found.row.answer, Conversation)
    assert found.row.answer.learned == (False, False, False, True)


def test_changes_of_both_answers_are_told_once_and_the_row_has_its_weight() -> None:
    row = {"chosen": [*TALK, TALK[2], says("a")], "rejected": [*TALK, TALK[2], says("b")], "weight": 2}
    found = read_row(row, next(each for each in SHAPES if each == "Pair"), RowChoices())
    assert isinstance(found, Found)
    assert found.changes == {Change.NEIGHBOURS_KEPT}
    assert isinstance(found.row, Pair)
    assert (found.row.weight, found.row.chosen.weight) == (2.0, 1.0)


def reasons(prepared: Prepared) -> dict[int, str]:
    return {each["row"]: each["reason"] for each in prepared.decisions if each["action"] == "drop"}


def pair(prompt: Messages, chosen: str, rejected: str) -> Row:
    return {"prompt": prompt, "chosen": [says(chosen)], "rejected": [says(rejected)]}


def test_pairs_in_which_nothing_is_preferred_are_dropped_each_for_its_reason(tmp_path: Path) -> None:
    trimming = CHATML.replace("message['content']", "message['content'] | trim")
    write_model(tmp_path / "model", template=trimming)
    rows = [pair(ASKED, GOOD, BAD), pair(ASKED, GOOD, GOOD), pair(ASKED, GOOD, f" {GOOD}")]
    put(tmp_path, a_jsonl=jsonl([*rows, {**pair(ASKED, GOOD, BAD), "weight": 0}]))
    prepared = prepare_run(tmp_path, ALL)
    assert reasons(prepared) == {2: "equal_answers", 3: "identical_tokens", 4: "no_label"}
    assert [each["rows_in"] for each in prepared.report["files"]] == [4]


def test_a_pair_that_is_too_long_loses_the_same_turns_before_both_answers(tmp_path: Path) -> None:
    long = [
        each for n in range(6) for each in ({"role": "user", "content": f"number {n}? " + "fox " * 20}, says("yes"))
    ]
    rows = [pair([*SYSTEM, *long, *ASKED], GOOD, BAD), pair(ASKED, "fox " * 200, BAD)]
    put(tmp_path, a_jsonl=jsonl(rows))
    limits = {"maxSequenceLength": 128, "tooLong": "Truncate", "maxTooLongFraction": 1}
    prepared = prepare_run(tmp_path, {**ALL, "preprocessing": limits})
    kept = [*long[-2:], *ASKED]
    assert prepared.train == [rendered([*SYSTEM, *kept], GOOD), rendered([*SYSTEM, *kept], BAD)]
    (change,) = [each for each in prepared.decisions if each["action"] == "change"]
    assert (change["reason"], change["detail"]) == ("too_long", "the oldest 10 messages are left out")
    assert reasons(prepared) == {2: "too_long"}


def test_plain_texts_that_are_too_long_keep_one_prompt_before_both_answers(tmp_path: Path) -> None:
    prompt = "a quick brown fox " * 60
    put(tmp_path, a_jsonl=jsonl([{"prompt": prompt, "chosen": " jumps", "rejected": " sleeps over the lazy dog"}]))
    limits = {"maxSequenceLength": 64, "tooLong": "Truncate", "maxTooLongFraction": 1}
    (chosen, one), (rejected, other) = prepare_run(tmp_path, {**ALL, "preprocessing": limits}).train
    assert max(len(chosen), len(rejected)) == 64
    before = one.index(1)
    assert before == other.index(1)
    assert chosen[:before] == rejected[:before]


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_reasoning_of_both_answers_is_learned_and_that_before_is_as_a_server_sends_it(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template=THINKING)
    chosen, rejected = ({**says(words), "reasoning_content": f"so {words}"} for words in (GOOD, BAD))
    put(tmp_path, a_jsonl=jsonl([{"prompt": TALK, "chosen": [chosen], "rejected": [rejected]}]))
    learned = [
        BPE.decode([i for i, label in zip(ids, labels, strict=True) if label], skip_special_tokens=False)
        for ids, labels in prepare_run(tmp_path, ALL).train
    ]
    assert learned == [f"<think>\nso {words}\n</think>\n{words}<|im_end|>" for words in (GOOD, BAD)]


def test_what_a_template_loses_of_one_answer_ends_the_job_and_says_of_which(tmp_path: Path) -> None:
    rejected = {**says(BAD), "reasoning_content": "because"}
    put(tmp_path, a_jsonl=jsonl([{"prompt": ASKED, "chosen": [says(GOOD)], "rejected": [rejected]}]))
    with pytest.raises(StageError) as caught:
        prepare_run(tmp_path, ALL)
    assert caught.value.fault is Fault.PART_VANISHES
    assert caught.value.args_by_name["field"] == "rejected.messages[1].reasoning_content"
    aside = {"onBadRow": "Quarantine", "maxBrokenFraction": 1}
    put(tmp_path, b_jsonl=jsonl([pair(ASKED, GOOD, BAD)]))
    prepared = prepare_run(tmp_path, {**ALL, "preprocessing": aside}, attempt=2)
    assert reasons(prepared) == {1: "vanishes"}
    assert len(prepared.train) == 2


def test_an_answer_that_does_not_end_says_which_message_of_which_answer(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template=CHATML.replace("+ '<|im_end|>'", ""))
    put(tmp_path, a_jsonl=jsonl([pair(ASKED, GOOD, BAD)]))
    with pytest.raises(StageError, match="message 2 of chosen in no token") as caught:
        prepare_run(tmp_path, ALL)
    assert caught.value.fault is Fault.NO_STOP_TOKEN


def test_pairs_are_rendered_whole_however_much_is_rendered_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [pair([{"role": "user", "content": f"number {n}?"}], GOOD, BAD) for n in range(7)]
    put(tmp_path, a_jsonl=jsonl(rows))
    whole = prepare_run(tmp_path, ALL)
    render = Renderer.render

    def three(self: Renderer, asked: list[Conversation]) -> list[Rendered | Broken]:
        return render(self, asked[:3])

    monkeypatch.setattr(Renderer, "render", three)
    again = prepare_run(tmp_path, ALL, attempt=2)
    assert sorted(again.train) == sorted(whole.train)
    assert len(whole.train) == 14


def test_every_answer_of_pairs_is_compared_with_transformers(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl([pair(ASKED, f"{GOOD} {n}", BAD) for n in range(3)]))
    assert prepare_run(tmp_path, ALL).report["same_ids"]["rows"] == 6


def test_finetune_data_show_says_which_answer_is_which(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl([pair(ASKED, GOOD, BAD)]))
    for found in (show(context(tmp_path, ALL), Wanted()), show_unrendered(context(tmp_path, ALL), Wanted())):
        assert [(each.answer, each.sequence, each.sequences) for each in found] == [
            ("chosen", 1, 2),
            ("rejected", 2, 2),
        ]
        assert [next(part.text for part in each.segments if part.learned).strip()[-9:] for each in found]
    chosen, rejected = show(context(tmp_path, ALL), Wanted())
    assert [part.text for part in chosen.segments if part.learned] == [f"{GOOD}<|im_end|>"]
    assert [part.text for part in rejected.segments if part.learned] == [f"{BAD}<|im_end|>"]


def ranked(responses: Sequence[object], scores: Sequence[object], **beside: Any) -> Row:
    return {
        "prompt": ASKED,
        "responses": [[says(each)] if isinstance(each, str) else each for each in responses],
        "scores": list(scores),
        **beside,
    }


BEST, MIDDLE, WORST = "four.", "it may be four.", "a fox"


@pytest.mark.parametrize(
    ("row", "preference", "expected"),
    [
        (ranked([MIDDLE, BEST, WORST], [2, 3, 1]), {}, [(BEST, WORST)]),
        (ranked([BEST, WORST], [2, 1]), {"minMargin": 1}, [(BEST, WORST)]),
        (ranked([BEST, WORST, BEST], [5, 3, 1]), {}, [(BEST, WORST)]),  # of the best and the worst no pair can be made
        (ranked([WORST, BEST], [2, 1], rank=None), {"pairs": "BestVsWorst"}, [(WORST, BEST)]),
        ({"question": ASKED[0]["content"], "responses": [WORST, BEST], "rank": [2, 1]}, {}, [(BEST, WORST)]),
        (
            {
                "instruction": ASKED[0]["content"],
                "completions": [{"response": WORST, "overall_score": 1}, {"response": BEST, "overall_score": 9.5}],
            },
            {},
            [(BEST, WORST)],
        ),
        ({"messages": ASKED, "answers": json.dumps([WORST, BEST]), "ratings": "[1, 2]"}, {}, [(BEST, WORST)]),
        (
            ranked([MIDDLE, BEST, WORST], [2, 3, 1]),
            {"pairs": "All"},
            [(BEST, WORST), (MIDDLE, WORST), (BEST, MIDDLE)],
        ),
        (ranked([MIDDLE, BEST, WORST], [2, 3, 1]), {"pairs": "All", "minMargin": 1.5}, [(BEST, WORST)]),
        (ranked([MIDDLE, BEST, WORST], [2, 3, 1]), {"pairs": "All", "maxPairsPerPrompt": 1}, [(BEST, WORST)]),
        (ranked([MIDDLE, BEST, WORST], [3, 3, 1]), {"pairs": "All"}, [(MIDDLE, WORST), (BEST, WORST)]),
        (ranked([BEST, WORST, BEST], [3, 2, 1]), {"pairs": "All"}, [(BEST, WORST), (WORST, BEST)]),
    ],
)
def test_a_ranking_makes_the_pairs_that_the_job_asks_for_as_examples_of_one_row(
    tmp_path: Path, row: Row, preference: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    put(tmp_path, a_jsonl=jsonl([row]))
    datasets = [{"uri": (tmp_path / "data").as_uri() + "/", "preference": preference}]
    prepared = prepare_run(tmp_path, {**ALL, "datasets": datasets})
    assert prepared.train == [rendered(ASKED, each) for pair in expected for each in pair]
    assert len(prepared.examples(prepared.plan.train)) == len(expected)
    assert prepared.report["files"][0]["rows_used"] == 1


def test_a_ranking_of_texts_stays_plain(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl([{"prompt": "two and two is", "responses": [" five", " four"], "scores": [1, 2]}]))
    assert prepare_run(tmp_path, ALL).train == [plain("two and two is", " four"), plain("two and two is", " five")]


def test_rankings_without_a_pair_are_dropped_each_for_its_reason(tmp_path: Path) -> None:
    rows = [
        ranked([BEST, WORST], [3, 1]),
        ranked([BEST, WORST], [2, 2]),
        ranked([BEST], [2]),
        ranked([BEST, WORST], [2, 1]),
        ranked([BEST, BEST], [3, 1]),
    ]
    put(tmp_path, a_jsonl=jsonl(rows))
    datasets = [{"uri": (tmp_path / "data").as_uri() + "/", "preference": {"minMargin": 1.5}}]
    prepared = prepare_run(tmp_path, {**ALL, "datasets": datasets})
    assert reasons(prepared) == {2: "tied", 3: "one_answer", 4: "small_margin", 5: "equal_answers"}


def test_of_a_ranking_a_pair_that_is_too_long_is_left_out_and_the_others_stay(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl([ranked([MIDDLE, BEST, "fox " * 200], [2, 3, 1])]))
    datasets = [{"uri": (tmp_path / "data").as_uri() + "/", "preference": {"pairs": "All"}}]
    prepared = prepare_run(tmp_path, {**ALL, "datasets": datasets, "preprocessing": {"maxSequenceLength": 64}})
    assert prepared.train == [rendered(ASKED, BEST), rendered(ASKED, MIDDLE)]
    (change,) = prepared.decisions
    assert (change["action"], change["reason"]) == ("change", "too_long")
    assert change["detail"] == "2 of 3 pairs are left out"


@pytest.mark.parametrize(
    ("row", "problem", "field"),
    [
        (ranked([BEST, WORST], [1]), Problem.WRONG_TYPE, "scores"),
        (ranked([BEST, WORST], [1, "high"]), Problem.WRONG_TYPE, "scores[1]"),
        (ranked([BEST, WORST], [1, None]), Problem.WRONG_TYPE, "scores[1]"),
        (ranked([BEST, WORST], [1, True]), Problem.WRONG_TYPE, "scores[1]"),
        (ranked([BEST, WORST], [1, math.nan]), Problem.WRONG_TYPE, "scores[1]"),
        ({"prompt": "q", "responses": ["a", "b"]}, Problem.MISSING_FIELD, "scores"),
        ({"prompt": "q", "responses": [], "scores": []}, Problem.EMPTY, "responses"),
        ({"prompt": "q", "responses": ["a", ""], "scores": [1, 2]}, Problem.EMPTY, "responses[1]"),
        ({"prompt": "q", "responses": ["a"] * 65, "scores": [1] * 65}, Problem.TOO_MANY_ANSWERS, "responses"),
        ({"prompt": "q", "responses": ["a", [says("b")]], "scores": [1, 2]}, Problem.WRONG_TYPE, "responses[1]"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 2], "mood": 1}, Problem.UNKNOWN_FIELD, "mood"),
        ({"responses": ["a", "b"], "scores": [1, 2]}, Problem.MISSING_FIELD, "prompt"),
    ],
)
def test_a_ranking_that_is_not_clear_is_refused_by_its_field(row: Row, problem: Problem, field: str) -> None:
    assert refusal(row, "Ranking") == (problem, field)


@pytest.mark.parametrize(("rating", "says_good"), [(4, True), (3.5, True), (3, False), ("5", True)])
def test_a_rating_is_good_from_where_the_job_says(rating: object, says_good: bool) -> None:
    choices = RowChoices(preference=PreferenceSpec(good_from=3.5))
    row = {"messages": [*ASKED, says("a")], "rating": rating}
    found = read_row(row, next(each for each in SHAPES if each == "Thumb"), choices)
    assert isinstance(found, Found)
    assert isinstance(found.row, Thumb)
    assert found.row.is_good is says_good
    assert refusal(row, "Thumb") == (Problem.MISSING_FIELD, "label")


@pytest.mark.parametrize(
    ("label", "rating", "is_refused"), [(True, 1, True), (False, 5, True), (True, 5, False), (False, 1, False)]
)
def test_a_label_that_a_rating_contradicts_is_refused_where_the_job_says_what_is_good(
    label: bool, rating: int, is_refused: bool
) -> None:
    row = {"messages": [*ASKED, says("a")], "rating": rating, "label": label}
    shape = next(each for each in SHAPES if each == "Thumb")
    found = read_row(row, shape, RowChoices(preference=PreferenceSpec(good_from=3)))
    assert isinstance(found, Broken) is is_refused
    assert not isinstance(found, Broken) or (found.problem, found.field) == (Problem.TWO_FIELDS, "rating")
    assert isinstance(read_row(row, shape, RowChoices()), Found)


@pytest.mark.parametrize(
    ("method", "row", "preference", "field"),
    [
        ("DPO", {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1}, {"minMargin": 1}, "minMargin"),
        ("DPO", {"prompt": "q", "chosen": "a", "rejected": "b"}, {"pairs": "All", "maxPairsPerPrompt": 2}, "pairs"),
        ("DPO", {"prompt": "q", "chosen": "a", "rejected": "b"}, {"goodFrom": 3}, "goodFrom"),
        ("DPO", {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]}, {"goodFrom": 3}, "goodFrom"),
        ("KTO", {"prompt": "q", "completion": "a", "label": True}, {"minMargin": 1}, "minMargin"),
        ("KTO", {"prompt": "q", "completion": "a", "label": True}, {"goodFrom": 3}, "goodFrom"),
    ],
)
@pytest.mark.parametrize("is_given", [False, True])
def test_a_choice_about_preferences_that_no_row_of_the_dataset_can_follow_ends_the_job(
    tmp_path: Path, method: str, row: Row, preference: dict[str, Any], field: str, is_given: bool
) -> None:
    put(tmp_path, a_jsonl=jsonl([row] * 3))
    shape = {"chosen": "Pair", "responses": "Ranking", "label": "Thumb"}[
        next(name for name in row if name in ("chosen", "responses", "label"))
    ]
    dataset = {"uri": (tmp_path / "data").as_uri() + "/", "preference": preference}
    datasets = [{**dataset, "format": shape} if is_given else dataset]
    with pytest.raises(StageError) as caught:
        prepare_run(tmp_path, {"method": {"type": method}, "datasets": datasets})
    assert caught.value.fault is Fault.CONFIG_UNREADABLE
    assert f"spec.datasets[0].preference.{field}" in str(caught.value)


def test_which_answers_make_pairs_stands_in_the_plan_where_the_job_does_not_say(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl([ranked([BEST, WORST], [3, 1])]))
    for preference, chosen in (({}, "BestVsWorst"), ({"pairs": "All"}, None)):
        datasets = [{"uri": (tmp_path / "data").as_uri() + "/", "preference": preference}]
        prepared = prepare_run(tmp_path, {**ALL, "datasets": datasets}, attempt=1 if chosen else 2)
        values = {each.field: each.value for each in prepared.plan.resolved}
        assert values.get("datasets[].preference.pairs") == chosen


@pytest.mark.parametrize(
    ("label", "is_good"),
    [("1.0", True), ("0.0", False), ("-1.0", False), (" TRUE ", True), ("False", False), (1.0, True), ("+1", True)],
)
def test_a_thumb_is_read_as_tables_write_it(label: object, is_good: bool) -> None:
    row = {"messages": [*ASKED, says("a")], "label": label}
    found = read_row(row, next(each for each in SHAPES if each == "Thumb"), RowChoices())
    assert isinstance(found, Found), found
    assert isinstance(found.row, Thumb)
    assert found.row.is_good is is_good
