"""A job with personal data, prepared: what is left holds none of it, and figures say what was found, and where."""

import logging
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from data_run import byte_bpe, chats, context, jsonl, put
from finetune_api.errors import StageError
from finetune_api.run import RunResult
from finetune_trainer import prepare
from finetune_trainer.context import StageContext
from finetune_trainer.shown import Wanted, check_unrendered, show
from partition_run import cut_partitions, keep_partitions, with_workers

MAIL, PHONE, CARD = "ada.lovelace@example.org", "+1 415-555-2671", "4111 1111 1111 1111"
TOKEN = "ghp_" + "a1B2c3D4e5F6" * 3
VALUES = (MAIL, PHONE, CARD, TOKEN)
SECRET = "0123456789abcdef" * 4
SMALL = 4_000
BPE = byte_bpe()
TREATED = [
    {"action": "Redact"},
    {"action": "Pseudonymise", "keySecretRef": {"name": "pii-key"}},
    {"action": "Drop"},
    {"action": "Redact", "types": {"API_KEY": "Drop", "EMAIL": "Drop"}},
]


def rows(count: int) -> list[dict[str, Any]]:
    """Conversations, in a third of which somebody tells something, in the question and in the answer."""
    generator = random.Random(7)
    found = chats(count)
    for row in found[::3]:
        value = generator.choice(VALUES)
        row["messages"][0]["content"] += f" I am {value}."
        row["messages"][1]["content"] += f" Hello {value}!"
    return found


def job(folder: Path, pii: dict[str, Any] | None, workers: int = 1) -> StageContext:
    """Return a prepare stage over two files. workers: for which its pod has cores."""
    put(folder, a_jsonl=jsonl(rows(60)), b_jsonl=jsonl(rows(30)))
    (folder / "key").write_text(SECRET)
    ctx = with_workers(context(folder, {"preprocessing": {"pii": pii}} if pii else {}), workers)
    return replace(ctx, config=ctx.config.model_copy(update={"pii_key_path": str(folder / "key")}))


def sought() -> list[bytes]:
    """Return the values as they would be told, and as tokens of four bytes would hold them."""
    inner = [value[2:-2] for value in VALUES]
    ids = [BPE.encode(each).ids[2:-2] for each in inner]
    return [each.encode() for each in (*inner, SECRET)] + [np.array(each, dtype="<u4").tobytes() for each in ids]


def holders(*folders: Path) -> list[str]:
    """Return which files below the folders hold a value or the key."""
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path.name for path in files if any(each in path.read_bytes() for each in sought())]


def report_of(folder: Path) -> dict[str, Any]:
    return orjson.loads((folder / "out/bot-1a2b3/.job/report.json").read_bytes())


@pytest.fixture
def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let partitions be small and kept ones stay where they are."""
    cut_partitions(monkeypatch, SMALL)
    keep_partitions(monkeypatch)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("pii", TREATED)
def test_nothing_that_a_treated_job_leaves_holds_a_value_or_the_key(
    pii: dict[str, Any],
    workers: int,
    tmp_path: Path,
    cut_small: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    result = prepare.run(job(tmp_path, pii, workers))
    assert list((tmp_path / "out/bot-1a2b3/.job/partitions").iterdir()), "kept partitions are among what is looked at"
    assert holders(tmp_path / "out", tmp_path / "work") == []
    told = (caplog.text + result.model_dump_json()).encode()
    assert not [each for each in sought() if each in told]
    plan = (tmp_path / "out/bot-1a2b3/.job/plan.json").read_text()
    assert ("<" in plan) or pii["action"] == "Drop"


def test_the_same_search_finds_values_where_they_are_only_reported(tmp_path: Path, cut_small: None) -> None:
    prepare.run(job(tmp_path, None))
    assert {"tokens"} < set(holders(tmp_path / "out"))
    shutil.rmtree(tmp_path / "work/1/spool")
    assert holders(tmp_path / "work") != []


def test_the_report_says_by_type_what_was_found_changed_and_dropped_and_where(tmp_path: Path) -> None:
    prepare.run(job(tmp_path, {"action": "Redact", "types": {"EMAIL": "Drop", "CARD": "Report"}}))
    pii = report_of(tmp_path)["pii"]
    types = {each["type"]: each for each in pii["types"]}
    assert {name: each["action"] for name, each in types.items()} == {
        "EMAIL": "Drop",
        "CARD": "Report",
        "PHONE": "Redact",
        "API_KEY": "Redact",
    }
    for name, each in types.items():
        assert each["found"] == 2 * each["rows"] > 0
        assert each["rows_dropped"] == (each["rows"] if name == "EMAIL" else 0)
        assert each["changed"] == (each["found"] if name in ("PHONE", "API_KEY") else 0)
        assert 0 < len(each["places"]) <= 5
    assert types["PHONE"]["places"][0].keys() == {"uri", "row", "field"}
    assert "CARD" in pii["advice"]


def test_what_is_only_reported_remains_and_the_report_says_what_to_do(tmp_path: Path) -> None:
    prepare.run(job(tmp_path, None))
    pii = report_of(tmp_path)["pii"]
    assert "preprocessing.pii.action" in pii["advice"]
    assert sum(each["found"] for each in pii["types"]) == 60


def test_a_job_without_any_says_so(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(20)))
    prepare.run(context(tmp_path, {}))
    assert report_of(tmp_path)["pii"] == {"types": [], "advice": ""}


def test_rows_that_cannot_be_used_leave_no_raw_rows_in_the_work_folder(tmp_path: Path, cut_small: None) -> None:
    ctx = job(tmp_path, {"action": "Redact"})
    put(tmp_path, a_jsonl=jsonl(rows(60)) + b"not json\n" + jsonl(rows(60)))
    with pytest.raises(StageError):
        prepare.run(ctx)
    assert holders(tmp_path / "out", tmp_path / "work") == []


def test_another_key_makes_other_names_and_takes_no_kept_partition(tmp_path: Path, cut_small: None) -> None:
    pii = {"action": "Pseudonymise", "keySecretRef": {"name": "pii-key"}}

    def names() -> set[str]:
        prepare.run(ctx)
        ids = np.fromfile(tmp_path / "work/1/spool/tokens", dtype="<u4").tolist()
        text = BPE.decode(ids, skip_special_tokens=False)
        return {part.split(">")[0] for part in text.split("<EMAIL_")[1:]}

    ctx = job(tmp_path, pii)
    first = names()
    assert len(first) == 1
    assert names() == first
    assert report_of(tmp_path)["kept_rows"] > 0
    (tmp_path / "key").write_text(SECRET[::-1])
    assert names().isdisjoint(first)
    assert report_of(tmp_path)["kept_rows"] == 0


def test_a_row_is_shown_as_it_will_be_learned(tmp_path: Path) -> None:
    (shown,) = show(job(tmp_path, {"action": "Redact"}), Wanted(file="a.jsonl", number=1))
    text = "".join(each.text for each in shown.segments)
    assert not any(value in text for value in VALUES)
    assert text.count("<") > text.count("<|")
    assert shown.changed[0].startswith("personal_data_replaced: messages[0].content: ")


def test_data_without_a_model_is_checked_for_personal_data_too(tmp_path: Path) -> None:
    found = check_unrendered(job(tmp_path, {"action": "Drop"}))
    assert found.report["dropped"] == {"personal_data": 30}


def test_masks_are_those_of_the_new_words(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(rows(60)[:1]))
    ctx = replace(job(tmp_path, {"action": "Redact"}))
    (tmp_path / "data/b.jsonl").unlink()
    put(tmp_path, a_jsonl=jsonl(rows(60)[:1]))
    result: RunResult = prepare.run(ctx)
    assert result.data is not None
    (shown,) = show(ctx, Wanted(file="a.jsonl", number=1))
    learned = "".join(each.text for each in shown.segments if each.learned)
    assert learned.startswith("the answer is 1. Hello <")
    assert learned.endswith("!<|im_end|>")
