"""Rows that say what a named evaluation set says are left out, counted by set, whoever reads them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_run import Prepared, accounted, chat, chats, context, jsonl, prepare_run, prose, put
from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.row_words import SHARED_WORDS
from finetune_trainer import prepare
from finetune_trainer.data import shared_runs
from finetune_trainer.data.shared_runs import RunsWriter, SharedRuns, TooManyRunsError, runs_of
from finetune_trainer.report_html.page import report_page
from finetune_trainer.shown import Wanted, check_unrendered, show
from partition_run import cut_partitions, keep_partitions, with_workers

NONE_HELD_OUT = {"evaluation": {"holdoutFraction": 0}}
QUESTION = "a train leaves the town at noon and another one follows it an hour later on the same track"
OTHER = "which of the seven bridges of the old city can be crossed once and only once by one walk"
SMALL = 2_000


def against(folder: Path, **files: bytes) -> dict[str, Any]:
    """Return a job's spec that names a set for each of these files, which are written to a folder of their own."""
    sets: list[dict[str, str]] = []
    for given_name, content in files.items():
        name, _, ending = given_name.rpartition("_")
        path = folder / "evaluation" / f"{name}.{ending}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        sets.append({"name": name, "uri": path.as_uri()})
    return {"preprocessing": {"decontaminateAgainst": sets}, **NONE_HELD_OUT}


def left_out(found: Prepared) -> dict[str, str]:
    """Return the rows that evaluation sets have too, as NAME#ROW, each with the sets."""
    chosen = [each for each in found.decisions if each["reason"] == "in_evaluation_set"]
    assert {(each["stage"], each["action"]) for each in chosen} <= {("leaks", "drop")}
    return {f"{Path(each['file']).name}#{each['row']}": each["detail"] for each in chosen}


def shared(texts: list[str], said: str) -> bool:
    """Whether one text shares a run with one of some others, by the plainest way to tell."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[at : at + SHARED_WORDS]) for at in range(len(words) - SHARED_WORDS + 1)}

    return any(runs(each) & runs(said) for each in texts)


def index(folder: Path, *sets: list[str]) -> SharedRuns:
    writer = RunsWriter()
    for number, texts in enumerate(sets):
        writer.begin(number)
        writer.add(runs_of(texts).hashes)
    writer.write(folder)
    return SharedRuns(folder)


TEXTS = st.lists(st.sampled_from("ab"), max_size=20).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(TEXTS, max_size=3), min_size=1, max_size=3), st.lists(st.lists(TEXTS, max_size=2), max_size=4))
def test_rows_share_runs_with_the_sets_that_have_thirteen_words_of_a_text_in_their_order(
    tmp_path_factory: pytest.TempPathFactory, sets: list[list[str]], rows: list[list[str]]
) -> None:
    found = index(tmp_path_factory.mktemp("runs"), *sets).sets_of(rows)
    assert found == [
        sum(1 << at for at, texts in enumerate(sets) if any(shared(texts, said) for said in row)) for row in rows
    ]


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        (f"He asked: {QUESTION}? I do not know.", True),
        (QUESTION.upper().replace(" ", "\n"), True),
        (QUESTION.replace(" and", ", and"), True),
        (" ".join(QUESTION.split()[:SHARED_WORDS]), True),
        (" ".join(QUESTION.split()[: SHARED_WORDS - 1]), False),
        (" ".join(reversed(QUESTION.split())), False),
        (QUESTION.replace("noon", "night").replace("follows", "precedes").replace("later", "early"), False),
    ],
)
def test_case_punctuation_and_line_ends_tell_no_words_apart(tmp_path: Path, text: str, is_found: bool) -> None:
    assert index(tmp_path / "runs", [QUESTION]).sets_of([[text]]) == [int(is_found)]


def test_more_runs_than_memory_has_room_for_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_runs, "MAX_RUNS", 5)
    writer = RunsWriter()
    writer.begin(0)
    writer.add(runs_of([QUESTION, QUESTION]).hashes)
    writer.add(runs_of([OTHER]).hashes)
    with pytest.raises(TooManyRunsError):
        writer.count()


def leaking(folder: Path) -> dict[str, Any]:
    """Write rows of which some say what sets say in question or answer, and return the job's spec."""
    rows = [*chats(20), chat(f"So: {QUESTION.title()}?", "2 o'clock"), chat("Tell me a riddle.", f"Well, {OTHER}!")]
    more = [chat("hello", "you"), chat(QUESTION, OTHER)]
    system = {"messages": [{"role": "system", "content": QUESTION}, *chat("fine?", "yes, fine")["messages"]]}
    put(folder, a_jsonl=jsonl(rows), b_jsonl=jsonl([*more, system]))
    return against(
        folder,
        trains_jsonl=jsonl([{"problem": QUESTION, "solution": 14}, {"problem": "short", "solution": 1}]),
        bridges_jsonl=jsonl([{"id": 1, "turns": [{"from": "human", "value": OTHER}]}]),
    )


def test_rows_that_share_words_with_an_evaluation_set_are_dropped_and_counted_by_set(tmp_path: Path) -> None:
    found = prepare_run(tmp_path, leaking(tmp_path))
    accounted(found)
    assert left_out(found) == {"a.jsonl#21": "trains", "a.jsonl#22": "bridges", "b.jsonl#2": "trains, bridges"}
    assert found.report["dropped"] == {"in_evaluation_set": 3}
    assert found.report["counted"]["leaks"] == {"bridges": 2, "trains": 2}
    leaks = found.report["leaks"]
    assert [
        (each["name"], each["files"], each["rows"], each["short_rows"], each["left_out"]) for each in leaks["sets"]
    ] == [
        ("trains", 1, 2, 1, 2),
        ("bridges", 1, 1, 0, 2),
    ]
    places = [[f"{Path(at['uri']).name}#{at['row']}" for at in each["places"]] for each in leaks["sets"]]
    assert places == [["a.jsonl#21", "b.jsonl#2"], ["a.jsonl#22", "b.jsonl#2"]]
    assert leaks["words"] == SHARED_WORDS
    assert QUESTION not in json.dumps(found.report)


def test_the_page_tells_leaks_by_set_and_in_the_way_of_the_rows(tmp_path: Path) -> None:
    page = report_page(prepare_run(tmp_path, leaking(tmp_path)).report).decode()
    assert "after leaks" in page
    assert "<h2>Leaks</h2>" in page.replace(' id="leaks"', "")
    assert "trains" in page
    assert "bridges" in page


def test_a_job_without_evaluation_sets_looks_for_no_leaks(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl([*chats(5), chat(QUESTION, OTHER)]))
    found = prepare_run(tmp_path, NONE_HELD_OUT)
    assert (found.report["leaks"], "leaks" in found.report["chain"]) == ({}, False)


def set_files(folder: Path, kind: str) -> str:
    (folder / "evaluation").mkdir()
    rows = [{"question": "short?", "choices": {"text": ["no", QUESTION]}}, {"question": None, "choices": None}]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "evaluation" / "a.parquet")
    elif kind == "csv":
        (folder / "evaluation" / "a.csv").write_text(f"question,answer\nshort,x\n{QUESTION},y\n")
    elif kind == "json":
        (folder / "evaluation" / "a.json").write_text(json.dumps(rows))
    else:
        (folder / "evaluation" / f"a.{kind}").write_text(f"# Tasks\n\n{QUESTION}\n")
        (folder / "evaluation" / f"b.{kind}").write_text(prose(1, 40))
    return (folder / "evaluation").as_uri() + "/"


@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "txt", "md"])
def test_a_set_may_be_any_files_that_data_may_be(tmp_path: Path, kind: str) -> None:
    put(tmp_path, a_jsonl=jsonl([*chats(5), chat(QUESTION, "yes")]))
    named = [{"name": "tasks", "uri": set_files(tmp_path, kind)}]
    found = prepare_run(tmp_path, {"preprocessing": {"decontaminateAgainst": named}, **NONE_HELD_OUT})
    assert left_out(found) == {"a.jsonl#6": "tasks"}


@pytest.mark.parametrize(
    ("method", "row"),
    [
        ("CPT", {"text": f"{prose(1, 60)} {QUESTION} {prose(2, 60)}"}),
        ("SFT", {"prompt": QUESTION, "completion": " two"}),
        ("DPO", {"prompt": "why?", "chosen": QUESTION, "rejected": "so"}),
        ("DPO", {"prompt": "why?", "chosen": "so", "rejected": QUESTION}),
        ("KTO", {"prompt": "why?", "completion": QUESTION, "label": False}),
    ],
)
def test_rows_of_every_kind_are_compared(tmp_path: Path, method: str, row: dict[str, Any]) -> None:
    names, words = (("text",), 60) if method == "CPT" else (tuple(row), 12)
    others = [{name: prose(seed * 7 + at, words) for at, name in enumerate(names)} for seed in range(3, 9)]
    others = [each | ({"label": at % 2 == 0} if "label" in row else {}) for at, each in enumerate(others)]
    put(tmp_path, a_jsonl=jsonl([*others, row]))
    spec = {**against(tmp_path, tasks_jsonl=jsonl([{"q": QUESTION}])), "method": {"type": method}}
    assert left_out(prepare_run(tmp_path, spec)) == {"a.jsonl#7": "tasks"}


@pytest.mark.parametrize(
    ("name", "content", "fault", "says"),
    [
        ("tasks_jsonl", b"", Fault.EVALUATION_SET_SAYS_NOTHING, "has 0 rows"),
        ("tasks_jsonl", jsonl([{"q": "what?"}]), Fault.EVALUATION_SET_SAYS_NOTHING, "has 1 rows"),
        (
            "tasks_jsonl",
            jsonl([{"q": QUESTION}]) + b"{oops\n",
            Fault.EVALUATION_SET_UNREADABLE,
            "row 2 is not valid JSON",
        ),
        ("tasks_parquet", b"no table", Fault.EVALUATION_SET_UNREADABLE, "tasks.parquet cannot be read"),
        ("tasks_exe", b"no data", Fault.EVALUATION_SET_UNREADABLE, "tasks.exe"),
    ],
)
def test_a_set_that_cannot_be_read_or_says_nothing_ends_the_job_by_the_name_of_its_field(
    tmp_path: Path, name: str, content: bytes, fault: Fault, says: str
) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(5)))
    spec = against(tmp_path, first_jsonl=jsonl([{"q": OTHER}]), **{name: content})
    with pytest.raises(StageError) as caught:
        prepare.run(context(tmp_path, spec))
    assert caught.value.fault is fault
    assert "preprocessing.decontaminateAgainst[1].uri" in str(caught.value)
    assert says in str(caught.value)


def test_a_set_that_is_not_there_ends_the_job_by_the_name_of_its_field(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(5)))
    named = [{"name": "gone", "uri": (tmp_path / "gone.jsonl").as_uri()}]
    with pytest.raises(StageError, match=r"preprocessing.decontaminateAgainst\[0\].uri"):
        prepare.run(context(tmp_path, {"preprocessing": {"decontaminateAgainst": named}}))


def test_sets_beyond_the_limit_end_the_job_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_runs, "MAX_RUNS", 3)
    with pytest.raises(StageError) as caught:
        prepare.run(context(tmp_path, leaking(tmp_path)))
    assert caught.value.fault is Fault.EVALUATION_SETS_TOO_LARGE
    assert "name fewer or smaller ones" in str(caught.value)


def test_data_without_a_model_is_compared_too_and_a_row_that_is_left_out_is_shown_so(tmp_path: Path) -> None:
    ctx = context(tmp_path, leaking(tmp_path))
    assert check_unrendered(ctx).report["dropped"] == {"in_evaluation_set": 3}
    (shown,) = show(ctx, Wanted(1, "a.jsonl", 21))
    assert shown.dropped == "in_evaluation_set: trains"


def many(folder: Path) -> dict[str, Any]:
    rows = [
        chat(QUESTION if i % 7 == 0 else f"what is {i}?", OTHER if i % 11 == 0 else prose(i, 9)) for i in range(200)
    ]
    put(folder, a_jsonl=jsonl(rows[:150]), b_jsonl=jsonl(rows[150:]))
    return against(folder, trains_jsonl=jsonl([{"q": QUESTION}]), bridges_jsonl=jsonl([{"q": OTHER}]))


@pytest.fixture
def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let partitions be small and kept ones stay where they are."""
    cut_partitions(monkeypatch, SMALL)
    keep_partitions(monkeypatch)


def prepared_by(folder: Path, spec: dict[str, Any], workers: int, attempt: int = 1) -> dict[str, Any]:
    """Prepare with so many workers; return report.json without what is about time and disk."""
    prepare.run(with_workers(context(folder, spec, attempt), workers))
    return json.loads((folder / "out/bot-1a2b3/.job/report.json").read_text())


def test_leaks_are_the_same_for_any_number_of_workers(tmp_path: Path, cut_small: None) -> None:
    spec, found = many(tmp_path), dict[int, Any]()
    for workers in (1, 2, 4):
        report = prepared_by(tmp_path, spec, workers, workers)
        decisions = (tmp_path / "out/bot-1a2b3/.job/decisions.jsonl").read_text()
        found[workers] = report["leaks"], report["dropped"], report["drop_places"], decisions
    assert found[1] == found[2] == found[4]
    assert {each["name"]: each["left_out"] for each in found[1][0]["sets"]} == {"trains": 29, "bridges": 19}


def test_kept_partitions_are_made_anew_where_an_evaluation_set_says_something_else(
    tmp_path: Path, cut_small: None
) -> None:
    spec = many(tmp_path)
    assert prepared_by(tmp_path, spec, 1)["kept_rows"] == 0
    assert prepared_by(tmp_path, spec, 1, 2)["kept_rows"] > 0
    (tmp_path / "evaluation" / "trains.jsonl").write_bytes(jsonl([{"q": prose(99, 30)}]))
    report = prepared_by(tmp_path, spec, 1, 3)
    assert (report["kept_rows"], report["leaks"]["sets"][0]["left_out"]) == (0, 0)
