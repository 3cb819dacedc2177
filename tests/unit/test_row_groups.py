"""Rows of one value of a field are trained on or held out together, with all that belongs to them."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_run import Prepared, accounted, chat, chats, context, jsonl, prepare_run, prose, put
from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_trainer import prepare
from finetune_trainer.data.components import Components
from finetune_trainer.data.left_out import LEFT_OUT
from finetune_trainer.data.problems import Broken, Problem
from finetune_trainer.data.row_groups import group_hash
from finetune_trainer.data.spool import CLUSTER, ROW
from finetune_trainer.finding_duplicates import join_groups
from partition_run import cut_partitions, with_workers

BY_USER = {"evaluation": {"groupBy": "user", "holdoutFraction": 0.3}}
SMALL = 2_000


def held_out(decisions: list[dict[str, Any]]) -> set[tuple[str, int]]:
    return {(Path(each["file"]).name, each["row"]) for each in decisions if each["action"] == "hold_out"}


def together(found: Prepared, users: dict[tuple[str, int], Any]) -> None:
    """Ask that some rows are held out, and of each user all or none."""
    sides: defaultdict[Any, set[bool]] = defaultdict(set)
    out = held_out(found.decisions)
    for where, user in users.items():
        sides[user].add(where in out)
    assert {len(each) for each in sides.values()} == {1}
    assert {True, False} <= set().union(*sides.values())


def by_users(count: int, users: int) -> list[dict[str, Any]]:
    return [{**row, "user": f"u{at * 7 % users}"} for at, row in enumerate(chats(count))]


def test_rows_of_one_value_are_held_out_together_wherever_they_stand(tmp_path: Path) -> None:
    rows = by_users(120, 20)
    put(tmp_path, a_jsonl=jsonl(rows[:70]), b_jsonl=jsonl(rows[70:]))
    found = prepare_run(tmp_path, BY_USER)
    accounted(found)
    users = {("a.jsonl" if at < 70 else "b.jsonl", at % 70 + 1): row["user"] for at, row in enumerate(rows)}
    together(found, users)
    assert len(held_out(found.decisions)) == 36
    groups = found.report["duplicates"]["groups"]
    assert (groups["column"], groups["values"], groups["groups"], groups["rows"]) == ("user", 20, 20, 120)
    (resolved,) = [each for each in found.plan.resolved if each.field == "evaluation.groupBy"]
    assert (resolved.value, resolved.reason.split(";")[0]) == ("user", "20 values")
    assert "u7" not in str(found.report)


@pytest.mark.parametrize("near", ["Off", "Report", "Drop"])
def test_values_whose_rows_are_copies_of_one_another_are_held_out_together(tmp_path: Path, near: str) -> None:
    rows: list[dict[str, Any]] = [{**chat(prose(at, 20), prose(at + 50, 20)), "user": at} for at in range(40)]
    long = rows[0]["messages"][1]["content"]
    rows += [{**chat(prose(0, 20), f"{long} indeed"), "user": 1}, {**rows[2], "user": 3}]
    put(tmp_path, a_jsonl=jsonl(rows))
    copies = {"preprocessing": {"deduplication": {"exact": "Drop" if near == "Drop" else "Report", "near": near}}}
    for fraction in (0.1, 0.2, 0.3, 0.4, 0.5):
        spec = {**copies, "evaluation": {"groupBy": "user", "holdoutFraction": fraction}}
        found = prepare_run(tmp_path, spec, attempt=round(10 * fraction))
        out = {row for _, row in held_out(found.decisions)}
        left = {each["row"] for each in found.decisions if each["action"] == "drop"}
        chains = {"Off": [{3, 4, 42}], "Report": [{1, 2, 41}, {3, 4, 42}], "Drop": [{2, 41}, {3}, {4}]}[near]
        assert all(len({row in out for row in chain - left}) <= 1 for chain in chains)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_groups_join_what_belongs_together_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder, count = tmp_path_factory.mktemp("s"), data.draw(st.integers(1, 12))
    values = data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
    gone = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    joined = data.draw(st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=4))
    rows, hashes = np.zeros(count, dtype=ROW), np.zeros(count, dtype=CLUSTER)
    rows["hash_low"], hashes["hash_high"] = np.arange(count), values
    (folder / "groups").write_bytes(hashes.tobytes())
    left_out = np.zeros(count, dtype=LEFT_OUT)
    left_out["why"] = gone
    components = Components(rows, folder / "components")
    for one, other in joined:
        components.join(one, other)
    found = join_groups(components, folder, left_out, str, lambda: None)
    staying = [row for row in range(count) if not gone[row]]
    edges = joined + [(one, other) for one in staying for other in staying if values[one] == values[other]]
    reached = {row: {row} for row in range(count)}
    for _ in range(count):
        for one, other in edges:
            both = reached[one] | reached[other]
            for row in both:
                reached[row] = both
    assert [components.root(row) for row in range(count)] == [min(reached[row]) for row in range(count)]
    assert found.values == len({values[row] for row in staying})


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, Problem.MISSING_FIELD),
        ("  ", Problem.MISSING_FIELD),
        (True, Problem.WRONG_TYPE),
        (1.5, Problem.WRONG_TYPE),
        (["a"], Problem.WRONG_TYPE),
        ({"a": 1}, Problem.WRONG_TYPE),
    ],
)
def test_a_value_that_is_no_text_or_whole_number_says_nothing_of_a_group(value: object, problem: Problem) -> None:
    found = group_hash({"user": value}, "user")
    assert isinstance(found, Broken)
    assert (found.problem, found.field) == (problem, "user")


def test_values_are_told_by_what_they_say_however_a_table_writes_them() -> None:
    assert group_hash({"user": 7}, "user") == group_hash({"user": "7 "}, "user") == group_hash({"user": 7.0}, "user")
    assert group_hash({"user": "a"}, "user") != group_hash({"user": "A"}, "user")


def test_a_row_without_the_field_is_broken(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl([*by_users(60, 10), *chats(1, 900)]))
    with pytest.raises(StageError) as caught:
        prepare.run(context(tmp_path, BY_USER))
    assert caught.value.fault is Fault.BROKEN_ROW
    assert "row 61, field user: is missing" in str(caught.value)
    assert "evaluation.groupBy reads it" in str(caught.value)
    quarantine = {"preprocessing": {"onBadRow": "Quarantine", "maxBrokenFraction": 0.5}}
    found = prepare_run(tmp_path, {**BY_USER, **quarantine}, attempt=2)
    accounted(found)
    assert found.report["dropped"] == {"missing_field": 1}


@pytest.mark.parametrize(
    ("method", "field"), [("CPT", "doc"), ("SFT", "user_id"), ("SFT", "prompt"), ("KTO", "user"), ("DPO", "user")]
)
def test_rows_of_every_kind_are_divided_by_a_field_of_any_name(tmp_path: Path, method: str, field: str) -> None:
    rows: list[dict[str, Any]] = []
    for at in range(80):
        said = prose(at, 40 if method == "CPT" else 8)
        pair = {"chosen": f"{said} yes", "rejected": f"{said} no"}
        answer = {"completion": said} if method != "KTO" else {"completion": said, "label": at % 3 > 0}
        asked = {"prompt": prose(1000 + at, 8)} | (pair if method == "DPO" else answer)
        rows.append(({"text": said} if method == "CPT" else asked) | {field: f"value {at % 16}"})
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "a.parquet")
    spec = {"method": {"type": method}, "evaluation": {"groupBy": field, "holdoutFraction": 0.3}}
    found = prepare_run(tmp_path, spec)
    accounted(found)
    together(found, {("a.parquet", at + 1): row[field] for at, row in enumerate(rows)})


def test_rated_answers_become_pairs_that_are_held_out_with_their_users(tmp_path: Path) -> None:
    rows = [
        {**chat(prose(at // 2, 9), prose(at + 500, 9)), "label": at % 2 == 0, "user": f"u{at // 4}"}
        for at in range(160)
    ]
    put(tmp_path, a_jsonl=jsonl(rows))
    found = prepare_run(tmp_path, {**BY_USER, "method": {"type": "DPO"}})
    accounted(found)
    together(found, {("a.jsonl", at + 1): row["user"] for at, row in enumerate(rows)})


@pytest.mark.parametrize("given", [{}, {"holdoutFraction": 0.05}])
def test_where_every_value_has_more_rows_than_are_to_be_held_out_the_plan_says_how_many(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    put(tmp_path, a_jsonl=jsonl(by_users(60, 3)))
    found = prepare_run(tmp_path, {"evaluation": {"groupBy": "user", **given}})
    assert held_out(found.decisions) == set()
    (resolved,) = [each for each in found.plan.resolved if each.field == "evaluation.holdoutFraction"]
    assert "the smallest cluster of rows that belong together has 20" in resolved.reason


def test_the_division_is_the_same_for_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_partitions(monkeypatch, SMALL)
    rows = by_users(200, 25)
    put(tmp_path, a_jsonl=jsonl(rows[:150]), b_jsonl=jsonl(rows[150:]))
    decided: set[bytes] = set()
    for workers in (1, 2, 4):
        prepare.run(with_workers(context(tmp_path, BY_USER, workers), workers))
        decided.add((tmp_path / "out/bot-1a2b3/.job/decisions.jsonl").read_bytes())
    assert len(decided) == 1
    assert b"hold_out" in decided.pop()
