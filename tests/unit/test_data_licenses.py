"""Rows by their own licence, and names of licences that SPDX does not have."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_run import Prepared, chats, jsonl, prepare_run, put
from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_trainer.data.licenses import RowLicense, RowLicenses, check_license
from finetune_trainer.data.problems import Drop

OTHER, UNKNOWN = Drop.OTHER_LICENSE, Drop.UNKNOWN_LICENSE


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("MIT", RowLicense("MIT")),
        (" mit ", RowLicense("MIT")),
        ("Free for all", RowLicense("free for all")),
        ("MIT OR GPL-3.0-only", RowLicense("(other)")),
        ("MIT AND GPL-3.0-only", RowLicense("(other)", OTHER)),
        ("gpl-3.0-only", RowLicense("GPL-3.0-only", OTHER)),
        ("see the attached file", RowLicense("(other)", OTHER)),
        ("M" * 100_000, RowLicense("(other)", OTHER)),
        (["MIT"], RowLicense("MIT")),
        (["MIT", "free for all"], RowLicense("(several)")),
        (["MIT", "GPL-3.0-only"], RowLicense("(several)", OTHER)),
        ([str(number) for number in range(1000)], RowLicense("(several)", OTHER)),
        ([], RowLicense("(none)", UNKNOWN)),
        (["MIT", None], RowLicense("(none)", UNKNOWN)),
        ("", RowLicense("(none)", UNKNOWN)),
        (None, RowLicense("(none)", UNKNOWN)),
        (7, RowLicense("(none)", UNKNOWN)),
        ({"name": "MIT"}, RowLicense("(none)", UNKNOWN)),
    ],
)
def test_a_row_is_taken_by_its_own_licence_and_counted_by_a_name_that_is_no_data(
    said: object, expected: RowLicense
) -> None:
    row = {"license": said, "text": "a"}
    assert RowLicenses("license", ["MIT", "free for all"]).take(row) == expected
    assert row == {"text": "a"}
    taken = RowLicenses("license", []).take({"license": said})
    assert taken.drop is None, "nothing is chosen, and so nothing is left out"


def test_a_row_without_the_field_says_nothing_of_its_licence() -> None:
    assert RowLicenses("license", ["MIT"]).take({}) == RowLicense("(none)", UNKNOWN)


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("GPL3", "SPDX has no licence GPL3; write GPL-3.0-only or "),
        ("MIT OR Apache2", "SPDX has no licence Apache2; write Apache-2.0 or "),
        ("Acme-1", "LicenseRef-Acme-1 for one of your own"),
        ("(MIT", "its parentheses do not match"),
    ],
)
def test_a_name_that_spdx_does_not_have_is_refused_with_those_that_are_like_it(expression: str, words: str) -> None:
    with pytest.raises(StageError) as caught:
        check_license(expression, 3)
    assert caught.value.fault is Fault.CONFIG_UNREADABLE
    assert words in str(caught.value)
    assert "spec.datasets[3].license cannot be used" in str(caught.value)


@pytest.mark.parametrize(
    "expression",
    [
        None, "MIT", "apache-2.0", "CC-BY-SA-4.0", "GPL-2.0-only WITH Classpath-exception-2.0", "GPL-3.0-or-later",
        "(MIT OR Apache-2.0) AND LicenseRef-ours", "Apache-2.0+", "CC0-1.0", "ODbL-1.0", "CDLA-Permissive-2.0",
    ],
)  # fmt: skip
def test_names_that_spdx_has_and_ones_of_ones_own_are_taken(expression: str | None) -> None:
    check_license(expression, 0)


LICENSES = ["MIT", "GPL-3.0-only", None, "mit", "cc by 4.0"]


def licensed(count: int, field: str = "license") -> list[dict[str, Any]]:
    return [row | {field: LICENSES[number % len(LICENSES)]} for number, row in enumerate(chats(count))]


def prepared(folder: Path, **dataset: Any) -> Prepared:
    given = {"uri": (folder / "data").as_uri() + "/"} | dataset
    return prepare_run(folder, {"datasets": [given]})


@pytest.mark.parametrize("notation", ["jsonl", "parquet"])
@pytest.mark.parametrize("field", ["license", "terms"])
def test_rows_of_other_licences_are_dropped_each_with_a_decision_and_counted(
    tmp_path: Path, notation: str, field: str
) -> None:
    rows = licensed(20, field)
    put(tmp_path, **({"a_jsonl": jsonl(rows)} if notation == "jsonl" else {}))
    if notation == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "a.parquet")
    found = prepared(tmp_path, licenseField=field, licenses=["MIT", "CC BY 4.0"])
    assert found.report["dropped"] == {"other_license": 4, "unknown_license": 4}
    assert found.report["files"][0]["dropped_by_stage"] == {"license": 8}
    assert found.report["licenses"] == [
        {
            "dataset": 0,
            "field": field,
            "taken": {"MIT": 8, "CC BY 4.0": 4},
            "left_out": {"(none)": 4, "GPL-3.0-only": 4},
        }
    ]
    assert (found.report["rows_in"], found.report["files"][0]["rows_used"]) == (20, 12)
    dropped = [each for each in found.decisions if each["action"] == "drop"]
    assert {(each["stage"], each["reason"], each["detail"]) for each in dropped} == {
        ("license", "other_license", field),
        ("license", "unknown_license", field),
    }
    assert "GPL" not in json.dumps(found.decisions), "what a row says is data"
    assert field not in found.report["ignored_fields"]


def test_a_row_of_another_licence_ends_no_job_by_being_broken(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl([*licensed(10), {"license": "GPL-3.0-only", "messages": 7}]))
    found = prepared(tmp_path, licenseField="license", licenses=["MIT"])
    assert found.report["dropped"] == {"other_license": 5, "unknown_license": 2}
    with pytest.raises(StageError):
        prepared(tmp_path, licenseField="license")


def test_licences_are_counted_before_anybody_chooses_by_them(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(licensed(10)))
    found = prepared(tmp_path, licenseField="license")
    assert found.report["dropped"] == {}
    (counted,) = found.report["licenses"]
    assert counted["taken"] == {"MIT": 4, "(none)": 2, "(other)": 2, "GPL-3.0-only": 2}


def test_a_job_that_fails_by_its_choice_of_licences_says_which_there_are(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(licensed(10)))
    with pytest.raises(StageError) as caught:
        prepared(tmp_path, licenseField="license", licenses=["BSD-3-Clause"])
    assert caught.value.fault is Fault.NO_TRAINING_DATA
    assert "datasets[].licenses does not allow" in str(caught.value)
    report = json.loads((tmp_path / "out" / "bot-1a2b3" / ".job" / "report.json").read_bytes())
    assert report["licenses"][0]["left_out"]["MIT"] == 4


ORIGIN = {
    "name": "chats",
    "license": "CC-BY-4.0",
    "source": "a dump of 2026",
    "confidentiality": "Internal",
    "copyrightHolder": "us",
}


def test_what_is_said_of_a_dataset_is_in_plan_and_report(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(4)))
    found = prepared(tmp_path, **ORIGIN)
    (origin,) = found.plan.data
    said = (origin.name, origin.under, origin.source, origin.confidentiality, origin.copyright_holder)
    assert said == tuple(ORIGIN.values())
    (dataset,) = found.report["datasets"]
    assert dataset | {"license": "CC-BY-4.0", "copyright_holder": "us", "confidentiality": "Internal"} == dataset
    unsaid = prepare_run(tmp_path, attempt=2)
    assert unsaid.plan.data[0].license is None
    assert unsaid.plan.digest() != found.plan.digest(), "what was said when it was planned is part of the plan"


def test_a_licence_that_spdx_does_not_have_ends_the_job_before_the_model_is_read(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(4)))
    with pytest.raises(StageError, match="SPDX has no licence Nobodys"):
        prepare_run(
            tmp_path,
            {
                "model": {"uri": (tmp_path / "none").as_uri()},
                "datasets": [{"uri": (tmp_path / "data").as_uri() + "/", "license": "Nobodys"}],
            },
        )
