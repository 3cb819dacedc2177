"""report.html: made of report.json alone, without data, scripts or network, whatever it says; seen in a browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_run import chats, context, jsonl, prepare_run, put, write_model
from finetune_api.errors import StageError
from finetune_api.layout import DECISIONS, REPORT, REPORT_PAGE
from finetune_cli.errors import CommandError, Exit
from finetune_cli.main import app
from finetune_trainer import prepare
from finetune_trainer.data.decided import MAX_PLACES, Decided, DecisionKind
from finetune_trainer.data.redacted_shape import MAX_SHAPE_CHARS, redacted_shape
from finetune_trainer.report_html.details import SECTIONS
from finetune_trainer.report_html.page import MAX_PAGE_BYTES, report_page
from finetune_trainer.report_html.warnings import warnings
from finetune_trainer.shown import Segment, ShownRow

SECRET = "the-words-of-a-row"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
RUN = Path("out", "bot-1a2b3")


def page_in(tmp: Path) -> str:
    return (tmp / RUN / REPORT_PAGE).read_text()


def rows() -> list[dict[str, Any]]:
    broken = [{"messages": [{"role": "user", "content": SECRET}]}, {"messages": []}, {"mood": SECRET, **chats(1)[0]}]
    return [*chats(40), *broken]


QUARANTINE = {"preprocessing": {"onBadRow": "Quarantine", "maxBrokenFraction": 0.5}}


def test_a_prepared_job_leaves_a_page_beside_its_report_with_the_way_of_its_rows_and_none_of_their_words(
    tmp_path: Path,
) -> None:
    put(tmp_path, a_jsonl=jsonl(rows()), b_jsonl=jsonl(chats(9, 100)))
    prepared = prepare_run(tmp_path, QUARANTINE)
    page = page_in(tmp_path)
    assert prepared.result.data is not None
    assert prepared.result.data.report_page_uri == (tmp_path / RUN / REPORT_PAGE).as_uri()
    assert "52 rows in 2 files: " in page
    assert "a.jsonl row 42, messages" in page
    assert "it has no assistant message to learn from" in page
    assert "hyperparameters.learningRate" in page
    assert page.count("<svg") >= 3
    assert SECRET not in page
    assert not re.search(r"<script|<link|<img|@import|url\((?!#)|src=|http://(?!www.w3.org)|https://", page)


def test_the_same_report_is_the_same_page_and_other_numbers_are_another(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(rows()))
    report = prepare_run(tmp_path, QUARANTINE).report
    assert report_page(report) == report_page(json.loads(json.dumps(report)))
    assert report_page({**report, "rows_in": report["rows_in"] + 1}) != report_page(report)


def test_a_job_that_ends_by_its_data_leaves_a_page_that_says_why_and_where(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(rows()))
    with pytest.raises(StageError) as caught:
        prepare.run(context(tmp_path, {}))
    page = page_in(tmp_path)
    assert "The job ends here, before any GPU." in page
    assert "a.jsonl row 41" in str(caught.value)
    assert "a.jsonl row 41" in page
    assert json.loads((tmp_path / RUN / REPORT).read_bytes())["problem"] == str(caught.value)
    assert SECRET not in page


def test_places_of_each_reason_are_the_first_of_the_decisions_however_the_rows_were_cut(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl([*chats(20), *([{"messages": []}] * 9), *chats(20, 50)]))
    found = prepare_run(tmp_path, QUARANTINE)
    places = found.report["drop_places"]["empty"]
    assert [place["row"] for place in places] == list(range(21, 21 + MAX_PLACES))
    assert places[0] == {"file": (tmp_path / "data" / "a.jsonl").as_uri(), "row": 21, "stage": "read",
                         "detail": "messages", "shape": "{messages: []}"}  # fmt: skip
    assert (tmp_path / RUN / DECISIONS).exists()


def test_decisions_are_counted_by_stage_action_and_reason_whatever_their_texts_hold() -> None:
    decided = Decided()
    tricky = {"file": 'a","stage":"x","action":"drop","reason":"y', "row": 1, "stage": "read", "action": "drop",
              "reason": "empty", "words": '"reason":"z"'}  # fmt: skip
    decided.add(json.dumps(tricky, separators=(",", ":")).encode())
    decided.add(b'{"not_listed":{"empty":3}}\n')
    assert decided.rows == {DecisionKind("read", "drop", "empty"): 1}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"dropped": {"too_long": 40}}, "are left out, most of them (40)"),
        ({"special_tokens_in_words": {"<|im_end|>": 3}}, "3 rows have the special token &lt;|im_end|&gt;"),
        ({"ignored_files_total": 2}, "2 files are passed over"),
        ({"duplicates": {"distinct_rows": 40, "exact": {"action": "Report", "copies": 9}}}, "9 rows say what"),
    ],
)  # fmt: skip
def test_what_speaks_against_the_data_is_said_with_what_to_do(
    tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(40)))
    report = prepare_run(tmp_path).report
    assert says not in report_page(report).decode()
    page = report_page({**report, **changed}).decode()
    assert says in page
    assert len(warnings({**report, **changed})) == 1 + len(warnings(report))


def test_the_way_of_the_rows_is_told_in_the_order_in_which_they_go_it(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(12)))
    report = prepare_run(tmp_path).report
    way = [
        "extract",
        "license",
        "read",
        *report["chain"],
        "render",
        "tokenise",
        "length",
        "duplicates",
        "pair",
        "split",
    ]
    (file,) = report["files"]
    told = {**report, "files": [{**file, "dropped_by_stage": dict.fromkeys(sorted(way), 1)}]}
    page = report_page(told).decode()
    assert sorted(way, key=lambda stage: page.index(f"after {stage}<")) == way


@pytest.mark.parametrize("key", SECTIONS)
def test_what_a_stage_tells_beside_rows_has_a_section_of_its_own_and_none_where_it_tells_nothing(
    tmp_path: Path, key: str
) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(12)))
    report = prepare_run(tmp_path).report
    heading = f'<h2 id="{key}">'
    told = {"rows": 3, "by_type": {"one": {"rows": 2}, "two": {"rows": 1}}, "largest": [{"file": "f", "row": 7}]}
    assert heading not in report_page({**report, key: {}}).decode()
    page = report_page({**report, key: told}).decode()
    assert heading in page
    assert all(f"<h3>{title}</h3>" in page for title in ("by type", "largest"))


def test_hostile_names_are_letters_on_the_page_and_no_page_is_larger_than_it_may_be(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(12)))
    report = prepare_run(tmp_path).report
    evil = "s3://b/<script>alert(1)</script>\u202e\x00" + "x" * 900
    file = {**report["files"][0], "uri": evil, "dropped": {"empty": 1}}
    drops = {f"reason_{number}": 7 for number in range(5000)}
    places = {reason: [{"file": evil, "row": 1, "stage": "read", "words": evil}] * MAX_PLACES for reason in drops}
    report |= {
        "files": [file] * 20_000, "dropped": drops, "drop_places": places, "ignored_files": [evil] * 100,
        "datasets": report["datasets"] * 100, "resolved": report["resolved"] * 100, "changed": drops,
        "ignored_fields": drops, "pii": {"types": [{evil: evil}] * 10_000},
    }  # fmt: skip
    shown = [ShownRow(file=evil, row=1, segments=[Segment(evil * 500, True)])] * 2000
    for with_rows in ((), shown):
        page = report_page(report, with_rows)
        assert len(page) <= MAX_PAGE_BYTES
        for forbidden in ("<script", "\u202e", "\x00"):
            assert forbidden.encode() not in page


def test_finetune_data_check_writes_the_page_and_rows_only_where_they_are_asked_for(tmp_path: Path) -> None:
    put(
        tmp_path,
        a_jsonl=jsonl([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": SECRET}]}]),
    )
    write_model(tmp_path / "model")
    target, model = str(tmp_path / "data"), ["--model", (tmp_path / "model").as_uri()]
    for name, more in {
        "bare": [],
        "rows": ["--with-rows", "1"],
        "whole": model,
        "all": [*model, "--with-rows", "1"],
    }.items():
        path = tmp_path / f"{name}.html"
        done = CliRunner().invoke(app, ["data", "check", target, "--report", str(path), *more])
        assert done.exit_code == 0, done.output
        page = path.read_text()
        assert (SECRET in page) is ("--with-rows" in more)
        assert ("Lengths" in page) is ("--model" in more)
    refused = CliRunner().invoke(app, ["data", "check", target, "--with-rows", "1"]).exception
    assert isinstance(refused, CommandError)
    assert refused.code is Exit.USAGE
    put(tmp_path, b_jsonl=jsonl([{"messages": []}]))
    failed = CliRunner().invoke(app, ["data", "check", target, "--report", str(tmp_path / "failed.html")]).exception
    assert isinstance(failed, CommandError)
    assert failed.code == 11
    assert "The job ends here" in (tmp_path / "failed.html").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium, or python3 -m testbed packages")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page_in_light_and_dark(tmp_path: Path, scheme: str) -> None:
    put(tmp_path, a_jsonl=jsonl(rows()), b_jsonl=jsonl(chats(30, 100)))
    prepare_run(tmp_path, QUARANTINE)
    shot = tmp_path / "page.png"
    colours = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    profile, page = f"--user-data-dir={tmp_path / 'chromium'}", (tmp_path / RUN / REPORT_PAGE).as_uri()
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,3000"]
    command = [str(CHROMIUM), *quiet, colours, profile, f"--screenshot={shot}", page]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert shot.stat().st_size > 50_000


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (
            {"messages": [{"role": "user", "content": SECRET}, {}]},
            "{messages: [{role: text of 4, content: text of 18}, 1 more]}",
        ),
        ({SECRET + " x": 1, "ok": True, "n": None}, "{(other): number, ok: true or false, n: null}"),
        ([[[[[[1]]]]]], "[[[[[1 values]]]]]"),
        ({"a": "x" * 9, **{f"field_{n}": [] for n in range(90)}}, "{a: text of 9, field_0: [], "),
        (SECRET, "text of 18"),
        (
            {"password": SECRET, "authorization": SECRET, "n": 1},
            "{password: text of 18, authorization: text of 18, n: number}",
        ),
    ],
)
def test_a_broken_row_is_shown_by_its_fields_and_sizes_alone(value: object, shape: str) -> None:
    found = redacted_shape(value)
    assert found.startswith(shape)
    assert len(found) <= MAX_SHAPE_CHARS
    assert SECRET not in found
