"""Single answers that were rated become pairs where a prompt has a good and a bad one; no row is lost on the way."""

from pathlib import Path
from typing import Any

import pytest

from data_run import Prepared, chat, chats, context, jsonl, prepare_run, put
from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_trainer import prepare

Row = dict[str, Any]
GOOD, BAD = True, False


def thumb(prompt: str, answer: str, label: object, **beside: Any) -> Row:
    return {**chat(prompt, answer), "label": label, **beside}


def pair(prompt: str, chosen: str, rejected: str, **beside: Any) -> Row:
    asked, one = chat(prompt, chosen)["messages"]
    other = chat(prompt, rejected)["messages"][1]
    return {"prompt": [asked], "chosen": [one], "rejected": [other], **beside}


def spec(method: str = "DPO", held_out: float = 0, **fields: Any) -> dict[str, Any]:
    return {"method": {"type": method}, "evaluation": {"holdoutFraction": held_out}, **fields}


def reasons(prepared: Prepared) -> dict[int, str]:
    return {each["row"]: each["reason"] for each in prepared.decisions if each["action"] == "drop"}


@pytest.mark.parametrize("method", ["DPO", "ORPO"])
@pytest.mark.parametrize(
    ("rows", "pairs", "dropped"),
    [
        ([thumb("q", "a", GOOD), thumb("q", "b", BAD)], [pair("q", "a", "b")], {}),
        ([thumb("q", "b", BAD), thumb("q", "a", GOOD)], [pair("q", "a", "b")], {}),
        (
            [thumb("q", "a", GOOD), thumb("r", "c", GOOD), thumb("q", "b", BAD), thumb("r", "d", BAD)],
            [pair("q", "a", "b"), pair("r", "c", "d")],
            {},
        ),
        (
            [thumb("q", "a", GOOD), thumb("q", "b", GOOD), thumb("q", "c", BAD), thumb("q", "d", BAD)],
            [pair("q", "a", "c"), pair("q", "b", "d")],
            {},
        ),
        (
            [thumb("q", "a", GOOD), thumb("r", "b", BAD), thumb("s", "c", GOOD), thumb("s", "d", BAD)],
            [pair("s", "c", "d")],
            {1: "one_sided", 2: "one_sided"},
        ),
        (
            [thumb("q", "a", GOOD), thumb("q", "b", BAD), thumb("q", "c", BAD)],
            [pair("q", "a", "b")],
            {3: "one_sided"},
        ),
        (
            [thumb("q", "a", GOOD), thumb("q", "a", BAD), thumb("q", "b", GOOD), thumb("q", "c", BAD)],
            [pair("q", "b", "c")],
            {1: "rated_both_ways", 2: "rated_both_ways"},
        ),
        (
            [thumb("q", "a", GOOD, system="s"), thumb("q", "b", BAD), thumb("q", "c", GOOD)],
            [pair("q", "c", "b")],
            {1: "one_sided"},
        ),
        (
            [pair("p", "x", "y"), thumb("q", "a", GOOD), pair("r", "v", "w"), thumb("q", "b", BAD)],
            [pair("p", "x", "y"), pair("q", "a", "b"), pair("r", "v", "w")],
            {},
        ),
    ],
)
def test_a_good_and_a_bad_answer_to_one_prompt_are_learned_as_a_pair_of_them_is(
    tmp_path: Path, method: str, rows: list[Row], pairs: list[Row], dropped: dict[int, str]
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    kinds = [[row for row in rows if "label" in row], [row for row in rows if "label" not in row]]
    if all(kinds):  # a dataset has rows of one shape
        rows, pairs = [*kinds[0], *kinds[1]], [pairs[1], pairs[0], pairs[2]]
        put(tmp_path / "one", a_jsonl=jsonl(kinds[0]), b_jsonl=jsonl(kinds[1]))
        given = [{"uri": (tmp_path / "one" / "data" / name).as_uri()} for name in ("a.jsonl", "b.jsonl")]
        found = prepare_run(tmp_path / "one", spec(method, datasets=given))
    else:
        put(tmp_path / "one", a_jsonl=jsonl(rows))
        found = prepare_run(tmp_path / "one", spec(method))
    put(tmp_path / "other", a_jsonl=jsonl(pairs))
    expected = prepare_run(tmp_path / "other", spec(method))
    assert found.train == expected.train
    ours, theirs = (each.examples(each.plan.train) for each in (found, expected))
    for name in ("segment_offsets", "parents", "example_offsets"):
        assert getattr(ours, name).tolist() == getattr(theirs, name).tolist()
    assert "label" not in ours.columns
    assert reasons(found) == dropped
    files = found.report["files"]
    assert sum(each["rows_used"] for each in files) == len(rows) - len(dropped)
    assert sum(each["rows_in"] for each in files) == len(rows)
    assert sum(each["dropped_by_stage"].get("pair", 0) for each in files) == len(dropped)


def test_kto_learns_the_same_rows_one_by_one(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl([thumb("q", "a", GOOD), thumb("q", "b", BAD), thumb("r", "c", BAD)]))
    prepared = prepare_run(tmp_path, spec("KTO"))
    examples = prepared.examples(prepared.plan.train)
    assert (len(examples), examples.columns["label"].tolist()) == (3, [1, -1, -1])


def test_the_pairs_of_one_prompt_are_held_out_together_and_all_their_rows_are_accounted_for(tmp_path: Path) -> None:
    rows = [
        thumb(f"number {n}?", f"it is {answer}", GOOD if answer % 2 else BAD) for answer in range(4) for n in range(20)
    ]
    put(tmp_path, a_jsonl=jsonl(rows))
    prepared = prepare_run(tmp_path, spec(held_out=0.25))
    assert prepared.plan.held_out is not None
    assert (prepared.plan.train.examples, prepared.plan.held_out.examples) == (30, 10)
    (file,) = prepared.report["files"]
    assert (file["rows_in"], file["rows_used"], file["rows_held_out"]) == (80, 60, 20)
    held_out = [each["row"] for each in prepared.decisions if each["action"] == "hold_out"]
    assert len(set(held_out)) == 20
    assert {(row - 1) % 20 for row in held_out} == {row - 1 for row in held_out if row <= 20}, "of all their answers"


def test_pairs_count_as_their_rows_do_on_average(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl([thumb("q", "a", GOOD, weight=2), thumb("q", "b", BAD, weight=4)]))
    prepared = prepare_run(tmp_path, spec())
    assert prepared.examples(prepared.plan.train).columns["weight"].tolist() == [3.0]


def test_ratings_say_what_is_good_where_the_job_says_from_when_on(tmp_path: Path) -> None:
    rows = [{**chat("q", answer), "rating": rating} for answer, rating in (("a", 5), ("b", 2), ("c", 1))]
    put(tmp_path, a_jsonl=jsonl(rows))
    datasets = [{"uri": (tmp_path / "data").as_uri() + "/", "preference": {"goodFrom": 4}}]
    prepared = prepare_run(tmp_path, spec(datasets=datasets))
    assert prepared.plan.train.examples == 1
    assert reasons(prepared) == {3: "one_sided"}


def test_an_answer_that_is_too_long_is_left_out_as_its_counterpart_keeps_the_whole_prompt(tmp_path: Path) -> None:
    turns = [words for n in range(6) for words in (f"number {n}? " + "fox " * 20, "yes")]
    rows = [
        {"messages": chat(*turns, "so?", answer)["messages"], "label": label} for answer, label in (("a", 1), ("b", 0))
    ]
    put(tmp_path, a_jsonl=jsonl([*rows, thumb("q", "a", GOOD), thumb("q", "b", BAD)]))
    limits = {"maxSequenceLength": 128, "tooLong": "Truncate", "maxTooLongFraction": 1}
    prepared = prepare_run(tmp_path, spec(preprocessing=limits))
    assert reasons(prepared) == {1: "too_long", 2: "too_long"}
    assert prepared.plan.train.examples == 1


def test_thumbs_that_make_no_pair_at_all_end_the_job_with_the_reason(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl([thumb(f"q{n}", "a", GOOD) for n in range(5)]))
    with pytest.raises(StageError, match="no other one is left that is rated the other way") as caught:
        prepare.run(context(tmp_path, spec()))
    assert caught.value.fault is Fault.NO_TRAINING_DATA


def test_a_pair_with_a_score_beside_it_is_a_pair(tmp_path: Path) -> None:
    rows: list[Row] = [
        {**pair(f"q{n}", "a", "b"), "messages": chat(f"q{n}", "a")["messages"], "score": 3} for n in range(3)
    ]
    for row in rows:
        row["chosen"] = row["messages"]
        row["rejected"] = chat(row["prompt"][0]["content"], "b")["messages"]
    put(tmp_path, a_jsonl=jsonl(rows))
    assert prepare_run(tmp_path, spec()).plan.train.examples == 3


def test_rows_that_nobody_rated_need_none_of_it(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(3)))
    prepare_run(tmp_path, spec("SFT"))
    assert not (tmp_path / "work" / "1" / "spool" / "prompts").stat().st_size
