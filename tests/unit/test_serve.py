"""/progress and /metrics of a running stage."""

import http.client
import time
from collections.abc import Generator

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from finetune_api.names import Stage
from finetune_api.run import Progress
from finetune_trainer import serve
from finetune_trainer.serve import Reporter
from waiting import PATIENCE_S


@pytest.fixture
def reporter() -> Generator[Reporter]:
    reporter = Reporter(Stage.TRAIN, 2, CollectorRegistry())
    yield reporter
    reporter.close()


def get(port: int, path: str, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_progress_is_what_was_reported_last(reporter: Reporter) -> None:
    port = reporter.start(0)
    reporter.update(activity="Training", step=3, total_steps=10, train_loss=1.5, tokens_total=1000)
    reporter.update(step=4)
    status, body = get(port, "/progress")
    progress = Progress.model_validate_json(body)
    assert (status, progress.step, progress.train_loss, progress.attempt) == (200, 4, 1.5, 2)


def test_times_since_step_and_checkpoint_are_kept_by_the_reporter(
    reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = time.monotonic() + 100
    monkeypatch.setattr(serve.time, "monotonic", lambda: now_s)
    reporter.update(step=1)
    now_s += 7
    reporter.update(step=1, train_loss=1.0)
    assert reporter.progress().seconds_since_step == pytest.approx(7)
    assert reporter.progress().seconds_since_checkpoint >= 107
    reporter.update(checkpoint={"step": 1, "uri": "s3://b/c", "digest": f"sha256:{'0' * 64}"})
    assert reporter.progress().seconds_since_checkpoint == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_unknown_so_that_the_answer_stays_json(reporter: Reporter, value: float) -> None:
    reporter.update(train_loss=value)
    assert reporter.progress().train_loss is None


def test_a_figure_that_progress_does_not_have_is_a_bug(reporter: Reporter) -> None:
    with pytest.raises(TypeError, match="Progress has no los"):
        reporter.update(los=1.0)


def test_metrics_are_readable_by_prometheus_and_name_no_job(reporter: Reporter) -> None:
    port = reporter.start(0)
    reporter.update(activity="Training", step=4, total_steps=10, learning_rate=2e-4, tokens_total=1000)
    status, body = get(port, "/metrics")
    samples = {
        sample.name: sample for family in text_string_to_metric_families(body.decode()) for sample in family.samples
    }
    assert status == 200
    assert samples["finetune_train_step"].value == 4
    assert samples["finetune_train_planned_steps"].value == 10
    assert samples["finetune_train_tokens_total"].value == 1000
    assert samples["finetune_stage_info"].labels == {"stage": "train", "attempt": "2", "activity": "Training"}
    assert "finetune_train_loss" not in samples, "an unknown figure is absent, not 0"
    assert "finetune_prepare_rows_read_total" not in samples, "train reads no rows"


def test_prepare_has_rows_and_no_steps() -> None:
    reporter = Reporter(Stage.PREPARE, 1, CollectorRegistry())
    reporter.update(rows_read=5)
    text = generate_latest(reporter.registry).decode()
    assert "finetune_prepare_rows_read_total 5.0" in text
    assert "finetune_train_" not in text


def test_passes_of_an_evaluation_and_a_new_activity_show_that_it_does_not_stand_still(
    reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = time.monotonic() + 100
    monkeypatch.setattr(serve.time, "monotonic", lambda: now_s)
    reporter.update(activity="Evaluating")
    assert reporter.progress().seconds_since_step == 0
    now_s += 9
    assert reporter.progress().seconds_since_step == pytest.approx(9)
    reporter.touch()
    assert reporter.progress().seconds_since_step == 0


def test_a_time_that_another_thread_notes_while_progress_waits_for_it_is_in_the_past(
    reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Contended:
        """A lock that another thread had, which noted a step and a checkpoint before it let go."""

        def __enter__(self) -> None:
            for name in ("_step_at_s", "_checkpoint_at_s"):
                monkeypatch.setattr(reporter, name, time.monotonic())

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(reporter, "_lock", Contended())
    assert reporter.progress().seconds_since_step >= 0


def test_the_time_of_every_activity_is_counted(reporter: Reporter, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = time.monotonic() + 100
    monkeypatch.setattr(serve.time, "monotonic", lambda: now_s)
    for activity, seconds in (("Training", 5.0), ("Evaluating", 2.0), ("Training", 3.0)):
        reporter.update(activity=activity)
        now_s += seconds
        reporter.update(activity=activity, step=1)
    spent = reporter.activity_seconds()
    assert spent.pop("Starting") >= 100
    assert spent == {"Training": pytest.approx(8.0), "Evaluating": pytest.approx(2.0)}
    labels = '{activity="Evaluating",stage="train"}'
    assert f"finetune_stage_seconds_total{labels} 2.0" in generate_latest(reporter.registry).decode()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/progress/x", 404), ("GET", "/../etc/passwd", 404), ("POST", "/progress", 501)],
)
def test_nothing_else_is_served(reporter: Reporter, method: str, path: str, status: int) -> None:
    assert get(reporter.start(0), path, method)[0] == status


def test_a_port_that_is_taken_is_an_error_of_the_system(reporter: Reporter) -> None:
    other = Reporter(Stage.TRAIN, 1, CollectorRegistry())
    with pytest.raises(OSError, match="in use"):
        other.start(reporter.start(0))
