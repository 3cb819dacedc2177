"""What rows teach, from the bucket to the answers of the adapter; and preparing them, killed in the middle."""

import json
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from e2e_assets import chat_rows, jsonl
from e2e_faults import freeze, send, stage_pid
from e2e_lab import Lab, Submitted
from finetune_api.names import Stage
from taught_forms import Judge, Lesson, qwen3_lessons, write_qwen3

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

Pod = dict[str, Any]
MANY_ROWS = 40_000  # of 17 MB: four partitions, which take seconds
REPEATED = 8  # times that each question says its words
OF_MANY_ROWS: dict[str, object] = {
    "datasets": [{"uri": "s3://e2e-data/many/"}],
    "hyperparameters": {"maxSteps": 3, "globalBatchSize": 4, "learningRate": 5e-3},
    "evaluation": {"holdoutFraction": 0.0015},
}


@pytest.fixture(scope="module")
def whole(lab: Lab) -> Submitted:
    """A job of many rows that nothing happens to. Submitted, not yet finished."""
    rows = chat_rows(MANY_ROWS)
    for row in rows:
        question = row["messages"][0]
        question["content"] = " ".join([question["content"]] * REPEATED)
    lab.s3.put_object(Bucket="e2e-data", Key="many/rows.jsonl", Body=jsonl(rows))
    return lab.submit("whole", **OF_MANY_ROWS)


@pytest.fixture(scope="module")
def cut_off(lab: Lab, whole: Submitted) -> Submitted:
    """The same job as `whole`, which prepares beside it. Submitted, not yet finished."""
    return lab.submit("cut-off", **OF_MANY_ROWS)


@pytest.fixture(scope="module")
def lessons() -> dict[str, Lesson]:
    return qwen3_lessons()


@pytest.fixture(scope="module")
def base(lessons: Mapping[str, Lesson], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    write_qwen3(folder, lessons)
    return folder


@pytest.fixture(scope="module")
def taught(lab: Lab, lessons: Mapping[str, Lesson], base: Path) -> Submitted:
    """A job of rows in three forms. Submitted, not yet finished."""
    for file in base.iterdir():
        lab.s3.put_object(Bucket="e2e-models", Key=f"qwen3/{file.name}", Body=file.read_bytes())
    for name, lesson in lessons.items():
        lab.s3.put_object(Bucket="e2e-data", Key=f"forms/{name}", Body=jsonl(lesson.rows))
    return lab.submit(
        "forms",
        model={"uri": "s3://e2e-models/qwen3"},
        peft={"type": "LoRA", "rank": 32},
        datasets=[{"uri": "s3://e2e-data/forms/"}],
        hyperparameters={"maxSteps": 150, "globalBatchSize": 6, "learningRate": 1e-2},
    )


@pytest.mark.usefixtures("taught")  # which has the node while a retry is waited for
def test_preparing_that_is_killed_in_the_middle_twice_ends_with_the_bits_of_one_that_is_not(
    lab: Lab, whole: Submitted, cut_off: Submitted
):
    def delete(pod: Pod) -> None:
        lab.kubectl("delete", "pod", pod["metadata"]["name"], "--grace-period=0", "--force", "--wait=false")

    def kill(pod: Pod) -> None:
        send(pod, signal.SIGKILL)

    deleted = "was deleted, by whom is not known, and its trainer killed before it had stopped"
    faults = ((delete, "PodLost", deleted), (kill, "Unknown", "the trainer was killed by signal SIGKILL"))
    for number, (fault, reason, told) in enumerate(faults, start=1):
        _hit_while_reading(cut_off, fault)
        closed = cut_off.until_attempt_closed(number, Stage.PREPARE)
        assert (closed["class"], closed["reason"], closed["exitCode"]) == ("Failure", reason, 137)
        assert "plan" not in cut_off.status()
        words = f"{told}; trying again ({number} failed so far)"
        cut_off.until(
            lambda said=words: any(said in event["message"] for event in cut_off.events()), "the event tells it"
        )
    status, expected = cut_off.until_succeeded(), whole.until_succeeded()
    assert [(each["number"], each["class"]) for each in cut_off.attempts(Stage.PREPARE)] == [
        (1, "Failure"),
        (2, "Failure"),
        (3, "Succeeded"),
    ]
    assert status["failures"] == 2
    told, also_told = ({**each["data"], "reportUri": "", "reportPageUri": ""} for each in (status, expected))
    assert told == also_told
    assert cut_off.adapter_sha256() == whole.adapter_sha256()
    kept = {
        job.name: json.loads(lab.read(f"{job.run_uri()}/.job/report.json"))["kept_rows"] for job in (whole, cut_off)
    }
    assert kept["whole"] == 0 < kept["cut-off"], "what was finished before the kill is not read again"
    assert lab.keys(f"{cut_off.run_uri()}/.job/partitions/") == []


def _hit_while_reading(job: Submitted, fault: Callable[[Pod], object]) -> None:
    """Let a fault happen to the prepare pod when some rows are read and kept, and others are not."""

    def reading() -> dict[str, Any] | None:
        said = job.progress(Stage.PREPARE)
        kept = job.lab.keys(f"{job.run_uri()}/.job/partitions/")
        return said if said.get("bytes_read") and kept else None

    said = job.until(reading, f"{job.name} reads rows")
    pod = job.until_running(Stage.PREPARE)
    pid = stage_pid(pod)
    assert pid is not None
    freeze(pid)  # so that it cannot end before the fault
    assert said["bytes_read"] < said["bytes_total"]
    fault(pod)


def test_tool_calls_reasoning_and_plain_answers_are_given_in_the_form_that_was_taught(
    lab: Lab, taught: Submitted, lessons: Mapping[str, Lesson], base: Path, tmp_path: Path
):
    taught.until_succeeded()
    before, after = Judge(base, None), Judge(base, taught.fetch_adapter(tmp_path / "adapter"))
    held_out = _held_out(lab, taught)
    for name, lesson in lessons.items():
        rows = [row for number, row in enumerate(lesson.rows, start=1) if (name, number) not in held_out]
        learned = replace(lesson, rows=rows)
        assert after.faults(learned) == [], name
        assert len(before.faults(learned)) == len(rows) * len(lesson.forms) * len(lesson.requests), name


def _held_out(lab: Lab, job: Submitted) -> set[tuple[str, int]]:
    """(file name, row) of those that were kept from training."""
    lines = lab.read(f"{job.run_uri()}/.job/decisions.jsonl").splitlines()
    decisions = [json.loads(line) for line in lines]
    return {(each["file"].rpartition("/")[2], each["row"]) for each in decisions if each["action"] == "hold_out"}
