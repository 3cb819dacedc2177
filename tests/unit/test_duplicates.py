"""Rows that say the same as others are found in any file, and of each such group one goes on."""

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_run import Prepared, accounted, chat, chats, jsonl, prepare_run, put
from finetune_trainer.data import buckets
from finetune_trainer.data.exact_copies import find_copies
from finetune_trainer.data.kinds import content_hash
from finetune_trainer.data.left_out import LEFT_OUT, Why
from finetune_trainer.data.normal_text import normal_text
from finetune_trainer.data.rows import Completion, Conversation, Text
from finetune_trainer.data.spool import ROW

CPT = {"method": {"type": "CPT"}}
NONE_HELD_OUT = {"evaluation": {"holdoutFraction": 0}}


@pytest.mark.parametrize(
    ("one", "other", "are_equal"),
    [
        ("a\nb", "a\r\nb\r\n", True),
        ("a\nb", "a  \nb\t", True),
        (" a", "a\n", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("a b", "a  b", False),
        ("if a:\n b\nc", "if a:\n b\n c", False),
        ("a\nb", "a\n\nb", False),
        ("Polish", "polish", False),
        ("x\u00b2", "x2", False),
    ],
)
def test_texts_are_the_same_but_for_unicode_form_line_ends_and_blanks_at_ends(
    one: str, other: str, are_equal: bool
) -> None:
    assert (normal_text(one) == normal_text(other)) is are_equal
    assert (content_hash(Text(one)) == content_hash(Text(other))) is are_equal
    assert (content_hash(Completion("p", one)) == content_hash(Completion("p", other))) is are_equal
    chats = [Conversation([{"role": "user", "content": each}], (False,)) for each in (one, other)]
    assert (content_hash(chats[0]) == content_hash(chats[1])) is are_equal


@given(st.text())
def test_a_text_as_it_is_compared_stays_what_it_is(text: str) -> None:
    once = normal_text(text)
    assert normal_text(once) == once
    assert unicodedata.is_normalized("NFC", once)


def drops(found: Prepared, reason: str = "duplicate") -> dict[str, str]:
    """Return the rows dropped for a reason, each with the one that is kept, as NAME#ROW."""
    chosen = [each for each in found.decisions if each["reason"] == reason]
    assert {(each["stage"], each["action"]) for each in chosen} <= {("duplicates", "drop")}
    return {f"{Path(each['file']).name}#{each['row']}": Path(each["ref"]).name for each in chosen}


def test_of_rows_that_say_the_same_the_first_is_kept_in_whatever_file_the_others_are(tmp_path: Path) -> None:
    rows = chats(4)
    question, answer = (each["content"] for each in rows[1]["messages"])
    other = chat(f"{question} \n", f"\n{answer}\t")
    put(tmp_path, a_jsonl=jsonl([*rows, rows[0]]), b_jsonl=jsonl([rows[2], chat("new", "row"), other]))
    found = prepare_run(tmp_path, NONE_HELD_OUT)
    accounted(found)
    assert drops(found) == {"a.jsonl#5": "a.jsonl#1", "b.jsonl#1": "a.jsonl#3", "b.jsonl#3": "a.jsonl#2"}
    assert len(found.train) == 5
    told = found.report["duplicates"]
    assert (told["exact"]["action"], told["exact"]["copies"], told["exact"]["groups"]) == ("Drop", 3, 3)
    assert {tuple(Path(place).name for place in each["first"]) for each in told["exact"]["largest"]} == {
        ("a.jsonl#1", "a.jsonl#5"),
        ("a.jsonl#3", "b.jsonl#1"),
        ("a.jsonl#2", "b.jsonl#3"),
    }
    (resolved,) = [each for each in found.plan.resolved if each.field == "preprocessing.deduplication.exact"]
    assert (resolved.value, resolved.reason) == ("Drop", "3 rows say the same as one of 3 others")


@pytest.mark.parametrize(("action", "train", "copies"), [("Report", 40, 20), ("Off", 40, None)])
def test_copies_are_kept_where_the_job_says_so(tmp_path: Path, action: str, train: int, copies: int | None) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(20) * 2))
    spec = {**NONE_HELD_OUT, "preprocessing": {"deduplication": {"exact": action}}}
    found = prepare_run(tmp_path, spec)
    accounted(found)
    assert len(found.train) == train
    assert found.report["duplicates"].get("exact", {}).get("copies") == copies
    assert found.report["duplicates"]["distinct_rows"] == 20


def test_of_copies_the_one_that_counts_the_most_is_kept_and_other_weights_are_told(tmp_path: Path) -> None:
    rows = chats(3)
    put(
        tmp_path,
        a_jsonl=jsonl([rows[0], {**rows[0], "weight": 5}, {**rows[1], "weight": 3}, rows[2]]),
        b_jsonl=jsonl([rows[1], {**rows[1], "weight": 2}, rows[2]]),
    )
    datasets = [
        {"uri": (tmp_path / "data" / name).as_uri(), "weight": w} for name, w in (("a.jsonl", 1), ("b.jsonl", 2))
    ]
    found = prepare_run(tmp_path, {**NONE_HELD_OUT, "datasets": datasets})
    accounted(found)
    assert drops(found) == {
        "a.jsonl#1": "a.jsonl#2",
        "a.jsonl#3": "b.jsonl#2",  # 2 in a dataset that is read twice
        "b.jsonl#1": "b.jsonl#2",
        "a.jsonl#4": "b.jsonl#3",
    }
    detail = {f"{Path(each['file']).name}#{each['row']}": each.get("detail") for each in found.decisions}
    assert detail == {"a.jsonl#1": "weight", "a.jsonl#3": "weight", "b.jsonl#1": "weight", "a.jsonl#4": None}
    (resolved,) = [each for each in found.plan.resolved if each.field == "preprocessing.deduplication.exact"]
    assert resolved.reason.endswith("; 3 have another weight than the one that is kept, which counts the most")


def test_copies_of_rated_answers_make_no_second_pair_and_those_rated_otherwise_are_none(tmp_path: Path) -> None:
    rows = [
        {**chat("q", answer), "label": label}
        for answer, label in (("a", True), ("a", True), ("b", False), ("c", False), ("c", True), ("b", False))
    ]
    put(tmp_path, a_jsonl=jsonl(rows))
    found = prepare_run(tmp_path, {**NONE_HELD_OUT, "method": {"type": "DPO"}})
    accounted(found)
    assert found.plan.train.examples == 1
    reasons = {each["row"]: each["reason"] for each in found.decisions if each["action"] == "drop"}
    assert reasons == {2: "duplicate", 6: "duplicate", 4: "rated_both_ways", 5: "rated_both_ways"}


def spooled(contents: list[int], weights: list[float]) -> Any:
    rows = np.zeros(len(contents), dtype=ROW)
    rows["hash_high"] = np.array(contents, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    rows["weight"], rows["number"] = weights, np.arange(1, len(contents) + 1)
    return rows


@given(data=st.data())
def test_copies_are_found_as_if_all_rows_were_in_memory_however_small_buckets_are(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    contents = data.draw(st.lists(st.integers(0, data.draw(st.sampled_from([2, 30, 400]))), max_size=80))
    weights = data.draw(st.lists(st.sampled_from([1.0, 1.0, 2.0]), min_size=len(contents), max_size=len(contents)))
    rows, left_out = spooled(contents, weights), np.zeros(len(contents), dtype=LEFT_OUT)
    path = tmp_path_factory.mktemp("c") / "hashes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "BUCKET_ROWS", data.draw(st.sampled_from([1, 3, 16, 1000])))
        patch.setattr(buckets, "CHUNK", data.draw(st.sampled_from([1, 7, 1000])))
        found = find_copies(rows, np.ones(1), left_out, path, str, lambda: None)
    of_content: dict[int, list[int]] = {}
    for row, content in enumerate(contents):
        of_content.setdefault(content, []).append(row)
    kept = {row: min(same, key=lambda each: (-weights[each], each)) for same in of_content.values() for row in same}
    assert [int(each["of"]) if each["why"] else row for row, each in enumerate(left_out)] == [
        kept[row] for row in range(len(contents))
    ]
    assert set(left_out["why"].tolist()) <= {0, Why.COPY}
    several = sorted((-len(same), same) for same in of_content.values() if len(same) > 1)
    assert (found.copies, found.told.groups) == (sum(-each[0] - 1 for each in several), len(several))
    told = found.told.report()
    assert [each["rows"] for each in told["largest"]] == [-size for size, _ in several][:10]
    assert all(
        each["first"] == [str(row) for row in of_content[contents[int(each["first"][0])]]][:5]
        for each in told["largest"]
    )
