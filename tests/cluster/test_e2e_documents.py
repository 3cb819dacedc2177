"""Documents and personal data on the node, from a bucket of raw files to adapters that hold none of it; a refusal."""

import json
from collections import Counter
from typing import Any

import pytest
from tokenizers import Tokenizer

from data_run import prose
from e2e_assets import chat_rows, jsonl, model_files
from e2e_lab import Lab, Submitted
from e2e_site import GOVERNED, LONG_RUN_S
from finetune_api.layout import DECISIONS, REPORT, join
from finetune_api.names import Stage
from team_folder import BROKEN, COPY, NEAR_COPY, PLANTED, planted_in, team_folder

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

TOKENIZER: Any = Tokenizer.from_buffer(model_files()["tokenizer.json"])
REDACT = {"pii": {"action": "Redact"}}
CHATS, COPIES, NEAR_COPIES = 100, 7, 5


@pytest.fixture(scope="module")
def documents(lab: Lab) -> Submitted:
    """A CPT job of a folder of documents. Submitted, not yet finished."""
    for name, content in team_folder().items():
        lab.s3.put_object(Bucket="e2e-data", Key=f"team/{name}", Body=content)
    return lab.submit(
        "documents",
        method={"type": "CPT"},
        datasets=[{"uri": "s3://e2e-data/team/"}],
        preprocessing={**REDACT, "documents": {"headingContext": True}},
    )


@pytest.fixture(scope="module")
def telling(lab: Lab, documents: Submitted, chats: None) -> Submitted:
    """An SFT job of chats, which tell what they should not, and some of which say what others do. Not yet finished."""
    return lab.submit(
        "telling",
        datasets=[{"uri": "s3://e2e-data/telling/"}],
        preprocessing={**REDACT, "deduplication": {"near": "Drop"}},
    )


@pytest.fixture(scope="module")
def chats(lab: Lab) -> None:
    """The rows of `telling` in the bucket: half of them tell, and behind them all are copies and near copies."""
    rows = chat_rows(CHATS, seed=12)
    for number, row in enumerate(rows):
        question, answer = row["messages"]
        question["content"] += f" {prose(number, 40)}"
        if number % 2:
            name, value = list(PLANTED.items())[number // 2 % len(PLANTED)]
            question["content"] += f" My {name} is {value}."
            answer["content"] += f" and {value}"
    near = json.loads(json.dumps(rows[:NEAR_COPIES]))
    for row in near:
        row["messages"][0]["content"] += " Well"
    lab.s3.put_object(Bucket="e2e-data", Key="telling/rows.jsonl", Body=jsonl([*rows, *rows[:COPIES], *near]))


@pytest.mark.usefixtures("telling")  # which has the node beside it
def test_a_folder_of_documents_becomes_an_adapter_and_every_file_is_accounted_for(lab: Lab, documents: Submitted):
    status = documents.until_succeeded(LONG_RUN_S)
    data = status["data"]
    assert data["files"] == data["rowsIn"] == len(team_folder())
    assert data["rowsIn"] == data["rowsUsed"] + data["rowsHeldOut"] + sum(each["rows"] for each in data["dropped"])
    files = {each["uri"].removeprefix("s3://e2e-data/team/"): each for each in _report(lab, documents)["files"]}
    assert set(files) == set(team_folder())
    assert {each["rows_in"] for each in files.values()} == {1}
    left_out = {name: next(iter(each["dropped"])) for name, each in files.items() if each["dropped"]}
    assert left_out.pop(BROKEN) == "broken_document", "it costs itself alone"
    assert sorted(left_out.values()) == ["duplicate", "near_duplicate"]
    assert left_out.keys() <= {COPY, "notes/1.md", NEAR_COPY, "pages/1.html"}
    held_out = {each["file"] for each in _decisions(lab, documents) if each["action"] == "hold_out"}
    assert len(held_out) == data["rowsHeldOut"] > 0
    page = lab.read(data["reportPageUri"]).decode()
    assert f"{len(files)} rows in {len(files)} files: " in page
    assert "broken_document" in page
    assert data["reportPageUri"] in documents.describe()


def test_personal_data_copies_and_near_copies_are_found_in_rows_and_documents(
    lab: Lab, documents: Submitted, telling: Submitted
):
    telling.until_succeeded(LONG_RUN_S)
    dropped = Counter(each["reason"] for each in _decisions(lab, telling) if each["action"] == "drop")
    assert dropped == {"duplicate": COPIES, "near_duplicate": NEAR_COPIES}
    documents.until_succeeded(LONG_RUN_S)
    for job, least in ((documents, 4), (telling, 2 * CHATS // 2 // len(PLANTED))):
        found = {each["type"]: each for each in _report(lab, job)["pii"]["types"]}
        assert set(found) == set(PLANTED)
        assert all(each["found"] == each["changed"] >= least for each in found.values())


def test_no_planted_value_is_in_anything_that_a_job_leaves_or_says(lab: Lab, documents: Submitted, telling: Submitted):
    for key in ("telling/rows.jsonl", "team/notes/0.md"):
        assert planted_in(lab.read(f"s3://e2e-data/{key}"), TOKENIZER) == list(PLANTED), "else nothing is looked for"
    for job in (documents, telling):
        job.until_succeeded(LONG_RUN_S)
        left = {uri: lab.read(uri) for uri in lab.keys(f"s3://e2e-adapters/{job.name}/")}
        names = {uri.rpartition("/")[2] for uri in left}
        assert {"report.html", "report.json", "decisions.jsonl", "eval.json", "plan.json", "tokens"} <= names
        said = {pod["metadata"]["name"]: lab.kubectl("logs", pod["metadata"]["name"]) for pod in job.pods()}
        assert len(said) == 2, "the logs of both stages"
        said |= {"object": json.dumps(job.body()), "events": json.dumps(job.events()), "described": job.describe()}
        left |= {name: text.encode() for name, text in said.items()}
        assert {name: found for name, text in left.items() if (found := planted_in(text, TOKENIZER))} == {}


def test_a_job_whose_licence_its_runtime_does_not_take_is_refused_in_words_before_any_pod(lab: Lab):
    taken = {"license": "MIT", "uri": "s3://e2e-data/chat/", "name": "taken"}
    refused = {"license": "GPL-3.0-only", "uri": "s3://e2e-data/telling/", "name": "tainted"}
    job = lab.submit("governed", runtime=GOVERNED, datasets=[taken, refused])
    assert job.until_finished()["phase"] == "Failed", job.explain()
    verdict = job.condition("Succeeded")
    assert (verdict["status"], verdict["reason"]) == ("False", "RefusedByPolicy")
    for words in ("datasets[1] (tainted): license is GPL-3.0-only", "allowed is MIT", "ask legal@example.com"):
        assert words in verdict["message"]
    assert verdict["message"] in job.describe()
    assert (job.pods(), job.jobs(), job.attempts(Stage.PREPARE)) == ([], [], [])


def _report(lab: Lab, job: Submitted) -> dict[str, Any]:
    return json.loads(lab.read(join(job.run_uri(), REPORT)))


def _decisions(lab: Lab, job: Submitted) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lab.read(join(job.run_uri(), DECISIONS)).splitlines()]
