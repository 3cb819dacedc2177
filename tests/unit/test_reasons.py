"""The table of reasons is complete, consistent with the exit codes of the design, and its page is current."""

import re
import string
from pathlib import Path

import pytest

from finetune_api.errors import StageError
from finetune_api.names import MAX_NAME_LENGTH, Stage, child_name
from finetune_api.reasons import EXIT_CODES, FAULTS, FINAL_EXIT_CODES, Fault, Reason, words
from finetune_api.reference import page
from finetune_api.run import MAX_RESULT_BYTES, RunResult
from finetune_api.status import PlanStatus, ResolvedValue

ROOT = Path(__file__).parents[2]


def test_every_fault_has_words_and_a_reason_with_an_exit_code() -> None:
    assert set(FAULTS) == set(Fault)
    assert {FAULTS[fault].reason for fault in Fault} <= set(EXIT_CODES)


def test_every_exit_code_can_be_reached_by_a_fault() -> None:
    assert {FAULTS[fault].reason for fault in Fault} == set(EXIT_CODES)


@pytest.mark.parametrize(("code", "final"), [(0, False), (1, False), (10, True), (22, True), (30, False), (137, False)])
def test_only_exit_codes_10_to_29_are_final(code: int, final: bool) -> None:
    assert (code in FINAL_EXIT_CODES) is final


def test_every_reason_of_the_operator_is_one_that_it_gives() -> None:
    code = " ".join(path.read_text() for path in (ROOT / "operator/finetune_operator").glob("*.py"))
    assert [r for r in Reason if r not in EXIT_CODES and f"Reason.{r.name}" not in code] == []


def test_the_page_of_reasons_explains_each_reason_in_one_place() -> None:
    explained, _, others = page().partition("Reasons of the operator itself")
    listed = re.findall(r"`(\w+)`", others.partition("\n")[0])
    assert listed
    assert not [reason for reason in listed if f"| `{reason}` |" in explained]


def test_the_page_of_reasons_says_what_to_do_in_words() -> None:
    assert not [line for line in page().splitlines() if "{remedy}" in line or "{message} {difference}" in line]
    assert "raise resources.disk, or resources.prepare.disk while data is prepared" in page()


def test_words_name_the_place_and_survive_a_missing_argument() -> None:
    error = StageError(
        Fault.BROKEN_ROW, file="s3://b/x.jsonl", row=7, field=" field messages", problem="is empty", broken=1
    )
    assert "s3://b/x.jsonl row 7 field messages: is empty. 1 of ? rows" in str(error)
    assert error.exit_code == EXIT_CODES[Reason.DATA_INVALID]


@pytest.mark.parametrize("fault", list(Fault))
def test_words_use_plain_places_only(fault: Fault) -> None:
    places = [name for _, name, _, _ in string.Formatter().parse(FAULTS[fault].text) if name is not None]
    assert all(place.isidentifier() for place in places)
    assert "{" not in words(fault, dict.fromkeys(places, "x"))


def test_the_longest_child_name_is_a_valid_host_name_of_an_indexed_pod() -> None:
    longest = child_name("n" * MAX_NAME_LENGTH, "12345678-0000", Stage.PREPARE, 999)
    assert len(f"{longest}-0") <= 63


def test_a_result_too_long_for_the_kubelet_loses_resolved_values_first() -> None:
    plan = PlanStatus(
        uri="s3://b/" + "p" * 500,
        digest="sha256:" + "0" * 64,
        steps=1,
        train_tokens=1,
        label_tokens=1,
        memory_bytes=1,
        disk_bytes=1,
        resolved=[ResolvedValue(field=f"f{i}", value="v" * 64, reason="r" * 160) for i in range(20)],
    )
    result = RunResult(stage=Stage.PREPARE, attempt=1, fault=Fault.PREPARED, exit_code=0, plan=plan)
    message = result.to_message()
    assert len(message) <= MAX_RESULT_BYTES
    kept = RunResult.model_validate_json(message)
    assert kept.plan is not None
    assert 5 < len(kept.plan.resolved) < 20
