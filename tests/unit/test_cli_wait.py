"""`finetune wait` and `finetune describe`: what they say of a job, and how they end."""

import io
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from finetune_api.status import DataStatus, PlanStatus
from finetune_cli import show
from finetune_cli.cluster import UnavailableError
from finetune_cli.describe import describe
from finetune_cli.errors import CommandError, Exit
from finetune_cli.wait import MAX_SILENCE_S, POLL_S, line, verdict, wait
from status_samples import DATA, PLAN

DIGEST = "sha256:" + "a" * 64


def job(phase: str, succeeded: str = "Unknown", generation: int = 1, **status: Any) -> dict[str, Any]:
    conditions = [{"type": "Succeeded", "status": succeeded, "reason": "R", "message": "as [told]"}]
    return {
        "metadata": {"name": "bot", "generation": generation},
        "status": {"observedGeneration": 1, "phase": phase, "conditions": conditions, **status},
    }


class Played:
    """Answers one after another; the last is repeated. Time passes only in `sleep`."""

    def __init__(self, *answers: dict[str, Any] | Exception) -> None:
        self._answers: Iterator[dict[str, Any] | Exception] = iter(answers)
        self._last: dict[str, Any] | Exception = UnavailableError("nothing")
        self.now_s = 0.0
        self.said = ""

    def get(self, namespace: str, name: str) -> dict[str, Any]:
        self._last = next(self._answers, self._last)
        if isinstance(self._last, Exception):
            raise self._last
        return self._last

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def wait(self, timeout_s: float | None = None) -> Exit:
        output = io.StringIO()
        try:
            return wait(
                self,  # pyright: ignore[reportArgumentType]
                "ns",
                "bot",
                timeout_s,
                Console(file=output, width=200),
                clock=lambda: self.now_s,
                sleep=self.sleep,
            )
        finally:
            self.said = output.getvalue()


def test_success_ends_it_and_names_the_adapter():
    artifact = {"type": "Adapter", "uri": "s3://a/b", "digest": DIGEST}
    played = Played(job("Preparing"), job("Training"), job("Succeeded", "True", artifacts=[artifact]))
    assert played.wait() == Exit.SUCCEEDED
    assert [
        text for text in ("Preparing", "Training", "Succeeded", "s3://a/b", DIGEST) if text not in played.said
    ] == []


def test_failure_ends_it_with_the_reason_in_words():
    played = Played(job("Training"), job("Failed", "False"))
    assert played.wait() == Exit.FAILED
    assert "as [told]" in played.said


def test_each_phase_is_said_once():
    played = Played(job("Training"), job("Training"), job("Training"), job("Succeeded", "True"))
    played.wait()
    assert played.said.count("Training") == 1


def test_time_out():
    played = Played(job("Training"))
    assert played.wait(timeout_s=10) == Exit.TIMEOUT
    assert played.now_s == pytest.approx(10, abs=POLL_S)


def test_a_short_silence_of_the_cluster_is_waited_out():
    assert Played(*[UnavailableError("503")] * 20, job("Succeeded", "True")).wait() == Exit.SUCCEEDED


def test_a_long_silence_of_the_cluster_ends_it():
    played = Played(job("Training"), UnavailableError("the API server answered 503"))
    with pytest.raises(CommandError, match="answered 503") as ended:
        played.wait()
    assert ended.value.code == Exit.CLUSTER
    assert played.now_s > MAX_SILENCE_S


def planned_only() -> dict[str, Any]:
    found = job("Planned", "False")
    found["status"]["conditions"][0]["reason"] = "Planned"
    return found


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"metadata": {"generation": 1}}, None),
        (job("Training"), None),
        (job("Succeeded", "True"), Exit.SUCCEEDED),
        (job("Failed", "False"), Exit.FAILED),
        (planned_only(), Exit.SUCCEEDED),
        (job("Failed", "False", generation=2), None),  # suspend was patched, and the operator has not seen it
    ],
)
def test_verdict(found: dict[str, Any], expected: Exit | None):
    assert verdict(found) == expected


def test_a_job_nobody_has_looked_at():
    assert line({"metadata": {"name": "bot"}}) == "Waiting for the operator"


def test_a_degraded_job_says_why():
    found = job("Preparing")
    found["status"]["conditions"].append({"type": "Degraded", "status": "True", "reason": "S", "message": "no bucket"})
    assert line(found) == "Preparing · no bucket"


def test_a_job_that_waits_says_for_what():
    found = job("Waiting")
    found["status"]["conditions"][0]["message"] = ""
    message = "FineTuneJob texts of model.adapterFrom is Training"
    running = {"type": "Running", "status": "False", "reason": "WaitingForJob", "message": message}
    found["status"]["conditions"].append(running)
    assert line(found) == f"Waiting · {message}"
    running["status"] = "True"
    assert line(found) == "Waiting"


def test_while_data_are_read_the_speed_is_told():
    found = job("Preparing", progress={"text": "45% of data", "rowsPerSecond": 3400.1, "eta": "3m"})
    assert line(found) == "Preparing · 45% of data · 3,400 rows/s · 3m left · as [told]"


def test_describe_shows_all_there_is():
    found = job(
        "Training",
        plan={
            "uri": "s3://p",
            "steps": 20,
            "trainTokens": 1000,
            "resolved": [{"field": "peft.rank", "value": "16", "reason": "few tokens"}],
        },
        data={
            "files": 1,
            "rowsIn": 10,
            "rowsUsed": 8,
            "rowsHeldOut": 1,
            "dropped": [{"reason": "too_long", "rows": 1}],
            "reportUri": "s3://r/report.json",
            "reportPageUri": "s3://r/report.html",
        },
        attempts=[{"number": 1, "stage": "train", "class": "Disruption", "reason": "Disrupted", "exitCode": 30}],
        artifacts=[{"type": "Adapter", "uri": "s3://a", "digest": DIGEST}],
    )
    output = io.StringIO()
    describe(found, Console(file=output, width=200))
    page = "s3://r/report.html"
    expected = ["as [told]", "20 steps", "few tokens", "10 rows", page, "too_long", "Disruption", "s3://a", DIGEST]
    assert [text for text in expected if text not in output.getvalue()] == []
    del found["status"]["data"]["reportPageUri"]  # as an older trainer leaves it
    describe(found, Console(file=output, width=200))
    assert "s3://r/report.json" in output.getvalue()


def test_in_a_narrow_terminal_a_table_cuts_nothing_and_breaks_no_name_of_a_field():
    place = f"s3://data/{'folder-' * 12}/chat.jsonl"
    value = {"field": "hyperparameters.warmupRatio", "value": "0.03", "reason": "of " + "the family " * 9}
    found = job("Training", plan={"uri": "s3://p", "steps": 20, "trainTokens": 1000, "resolved": [value]})
    found["status"]["conditions"][0]["message"] = f"there is no {place}"
    output = io.StringIO()
    console = Console(file=output, width=80)
    describe(found, console)
    show.show_prepared(
        console, DataStatus.model_validate(DATA), PlanStatus.model_validate({**PLAN, "resolved": [value]})
    )
    assert "…" not in output.getvalue()
    assert place in "".join(output.getvalue().split())
    assert output.getvalue().count("\nhyperparameters.warmupRatio ") == 2


def test_the_preferences_that_a_model_shares_are_told_and_all_figures_described():
    figures = [{"name": "reward_accuracy", "value": 0.875}, {"name": "chosen_logprob", "value": -41.5}]
    found = job("Training", progress={"text": "45/90", "figures": figures})
    assert line(found) == "Training · 45/90 · reward accuracy 0.88 · as [told]"
    output = io.StringIO()
    describe(found, Console(file=output, width=200))
    assert "log-probability of chosen answers" in output.getvalue()
    assert "-41.5" in output.getvalue()


def test_what_is_said_of_the_data_is_described_where_anything_is():
    rows = {"uri": "s3://data/a/", "licenses": ["MIT", "CC0-1.0"], "confidentiality": "Internal"}
    said = job("Pending") | {"spec": {"datasets": [rows, {"name": "b", "uri": "s3://data/b/", "license": "[MIT]"}]}}
    output = io.StringIO()
    describe(said, Console(file=output, width=200))
    assert [line.split() for line in output.getvalue().splitlines() if "data" in line or "[MIT]" in line] == [
        ["dataset", "licence", "of", "its", "rows", "source", "confidentiality", "copyright", "holder"],
        ["s3://data/a/", "MIT,", "CC0-1.0", "Internal"],
        ["b", "[MIT]"],
    ]
    output = io.StringIO()
    describe(job("Pending") | {"spec": {"datasets": [{"uri": "s3://data/a/"}]}}, Console(file=output))
    assert "licence" not in output.getvalue()


def test_describe_shows_a_job_without_status():
    output = io.StringIO()
    describe({"metadata": {"name": "bot"}}, Console(file=output))
    assert "Waiting for the operator" in output.getvalue()


def test_what_speaks_against_the_model_is_said_by_wait_and_describe():
    found = job("Succeeded", "True")
    concern = {"type": "QualityConcern", "status": "True", "reason": "WorseThanStart", "message": "28 [nats]"}
    found["status"]["conditions"].append(concern)
    played = Played(found)
    assert played.wait() == Exit.SUCCEEDED
    assert "WorseThanStart 28 [nats]" in played.said
    output = io.StringIO()
    describe(found, Console(file=output, width=200))
    assert "WorseThanStart 28 [nats]" in output.getvalue().splitlines()[1]
