"""Settings, lease, health, metrics and the small pure parts of a round."""

import threading
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from prometheus_client import CollectorRegistry

from finetune_api.names import Stage
from finetune_api.reasons import Reason
from finetune_api.status import FineTuneJobStatus
from finetune_operator.clock import format_time, parse_time
from finetune_operator.cluster import ApiError, UnreachableError
from finetune_operator.decision import JobEvent
from finetune_operator.health import STALL_S, Health, HttpServer, answer, problems
from finetune_operator.job_reader import read_job
from finetune_operator.lease import Lease
from finetune_operator.metrics import Metrics
from finetune_operator.pod_waits import explain, explain_events
from finetune_operator.reconcile import event_manifest, status_patch
from finetune_operator.runtimes import Runtimes, parse_runtimes
from finetune_operator.settings import MAX_INTERVAL_S, Settings, SettingsError
from finetune_trainer.metrics import TrainMetrics
from finetune_trainer.serve import Reporter
from hand_clock import Clock
from status_samples import PLAN
from waiting import PATIENCE_S

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_the_environment_decides_and_everything_has_a_default():
    settings = Settings.from_env({"FINETUNE_WATCH_NAMESPACES": " b, a,,a", "FINETUNE_WORKERS": "3"})
    assert settings.watch_namespaces == ("a", "b")
    assert settings.workers == 3
    assert Settings.from_env({}).watch_namespaces == ()
    assert Settings.from_env({}).lease_name == "finetune-operator"
    assert Settings.from_env({"FINETUNE_LEASE_NAME": "x-finetune-operator"}).lease_name == "x-finetune-operator"


def test_an_unknown_level_of_the_log_is_named():
    with pytest.raises(SettingsError, match="FINETUNE_LOG_LEVEL is 'verbose'"):
        Settings.from_env({"FINETUNE_LOG_LEVEL": "verbose"})


@pytest.mark.parametrize("name", ["FINETUNE_RESYNC_INTERVAL_S", "FINETUNE_PROGRESS_INTERVAL_S"])
def test_an_interval_so_long_that_healthz_would_call_it_a_stall_is_refused(name: str):
    assert MAX_INTERVAL_S < STALL_S
    with pytest.raises(SettingsError, match=name):
        Settings.from_env({name: str(STALL_S + 1)})


@pytest.mark.parametrize("text", ["many", "0", "1e9"])
def test_a_number_that_is_none_or_out_of_bounds_is_named(text: str):
    with pytest.raises(SettingsError, match="FINETUNE_WORKERS"):
        Settings.from_env({"FINETUNE_WORKERS": text})


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("runtimes: {default: {}}", "runtimes.default.image"),
        ("runtimes: {default: {image: x, imagePulPolicy: Always}}", "runtimes.default.imagePulPolicy"),
        ("runtimes: {default: {image: x, env: {HOME: /}}}", "runtimes.default.env"),
        ('runtimes: {default: {image: x, env: {AWS_EC2_METADATA_DISABLED: "false"}}}', "runtimes.default.env"),
        ("runtimes: {default: {image: x, defaults: {memory: 16GB}}}", "runtimes.default.defaults.memory"),
        ("runtimes: {default: {image: x, defaults: {cpu: 0}}}", "runtimes.default.defaults.cpu"),
        ("runtimes: {default: {image: x, prepare: {cpu: -1}}}", "runtimes.default.prepare.cpu"),
        ("[", "not YAML"),
    ],
)
def test_a_mistake_in_the_runtimes_file_is_named(text: str, place: str):
    with pytest.raises(SettingsError, match=place):
        parse_runtimes(text)


def test_a_changed_runtimes_file_is_taken_and_a_broken_one_is_not(tmp_path: Path):
    path = tmp_path / "runtimes.yaml"
    path.write_text("runtimes: {default: {image: one}}")
    runtimes = Runtimes(path)
    path.write_text("runtimes: {default: {image: one}, gpu: {image: second}}")
    assert runtimes.get("gpu") is not None
    path.write_text("runtimes: [")
    assert runtimes.get("gpu") is not None
    path.unlink()
    assert runtimes.get("gpu") is not None
    assert runtimes.get("tpu") is None


class FakeApi:
    """A lease as the API server keeps it."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self.refusal: Exception | None = None
        self.hangs: threading.Event | None = None  # every call waits for it
        self.calls: list[str] = []

    def read_lease(self, namespace: str, name: str, timeout_s: float) -> dict[str, Any] | None:
        self._call("read")
        return None if self.lease is None else {**self.lease, "spec": dict(self.lease["spec"])}

    def write_lease(self, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        self._call("write")
        version = body["metadata"].get("resourceVersion")
        if version is None and self.lease is not None:
            raise ApiError(409, "AlreadyExists", "")
        if version is not None and version != str(self.version):
            raise ApiError(409, "Conflict", "")
        self.version += 1
        self.lease = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.version)}}
        return self.lease

    def _call(self, verb: str) -> None:
        self.calls.append(verb)
        if self.hangs is not None:
            self.hangs.wait(PATIENCE_S)
        if self.refusal is not None:
            raise self.refusal


def lease(api: FakeApi, identity: str, clock: Clock, duration_s: float = 30) -> Lease:
    return Lease(api, "ns", "release", identity, duration_s, clock)


def test_one_operator_holds_the_lease_and_another_takes_it_only_when_it_is_not_renewed():
    api, clock = FakeApi(), Clock()
    first, second = lease(api, "one", clock), lease(api, "two", clock)
    assert first.try_acquire()
    assert not second.try_acquire()
    clock.now_s = 29
    assert first.try_acquire()
    assert not second.try_acquire()
    clock.now_s = 58
    assert not second.try_acquire()
    clock.now_s = 60
    assert second.try_acquire()
    assert not first.try_acquire()


def test_renewing_takes_one_call_and_heeds_what_others_wrote_in_between():
    api, clock = FakeApi(), Clock()
    first = lease(api, "one", clock)
    assert first.try_acquire()
    assert first.try_acquire()
    assert api.calls == ["read", "write", "write"]
    assert api.lease is not None
    api.version += 1  # somebody annotates it
    api.lease["metadata"]["resourceVersion"] = str(api.version)
    assert first.try_acquire()
    api.lease = None  # somebody deletes it
    assert first.try_acquire()


def test_a_restarted_operator_takes_its_own_lease_at_once_and_a_released_one_is_free():
    api, clock = FakeApi(), Clock()
    assert lease(api, "one", clock).try_acquire()
    again = lease(api, "one", clock)
    assert again.try_acquire()
    again.stop()
    again.release()
    assert lease(api, "two", clock).try_acquire()


def test_a_lease_that_was_given_back_is_not_taken_again_by_a_renewal_that_comes_late():
    api, clock = FakeApi(), Clock()
    first = lease(api, "one", clock)
    assert first.try_acquire()
    first.stop()
    first.release()
    assert not first.try_acquire()
    assert api.lease is not None
    assert api.lease["spec"]["holderIdentity"] == ""


def test_a_lost_race_for_the_lease_is_not_won():
    api, clock = FakeApi(), Clock()
    first, second = lease(api, "one", clock), lease(api, "two", clock)
    assert first.try_acquire()
    clock.now_s = 100
    assert not second.try_acquire()  # first seen now
    clock.now_s = 200
    stale = api.lease
    assert first.try_acquire()
    api.read_lease = lambda namespace, name, timeout_s: stale  # type: ignore[method-assign]
    assert not second.try_acquire()


def test_an_operator_that_cannot_renew_gives_up_before_another_may_start():
    api, clock = FakeApi(), Clock()
    held = lease(api, "one", clock, 0.03)
    assert held.try_acquire()
    api.refusal = UnreachableError("down")
    clock.now_s = 0.025
    lost: list[bool] = []
    held.hold(lambda: lost.append(True))
    assert lost == [True]


def test_a_call_that_hangs_keeps_no_operator_from_giving_up_in_time():
    """Two calls of 40 s each against a lease of 30 s, at a fiftieth of the time."""
    api = FakeApi()
    held, lost = Lease(api, "ns", "release", "one", 0.6), threading.Event()
    assert held.try_acquire()
    api.hangs = threading.Event()
    threading.Thread(target=held.hold, args=(lost.set,), daemon=True).start()
    try:
        assert lost.wait(PATIENCE_S)  # while the call itself hangs
        assert len(api.calls) == 3
    finally:
        api.hangs.set()


def test_a_lease_whose_answer_comes_too_late_is_not_acted_on():
    api, clock = FakeApi(), Clock()
    late = lease(api, "one", clock)
    read = api.read_lease

    def slow(namespace: str, name: str, timeout_s: float) -> dict[str, Any] | None:
        clock.now_s += 40
        return read(namespace, name, timeout_s)

    api.read_lease = slow  # type: ignore[method-assign]
    assert not late.try_acquire()
    assert late.try_acquire()  # the next one is one quick write
    assert late.age_s() == 0


def test_the_calls_for_the_lease_end_in_time_for_another_one():
    api, waits_s = FakeApi(), list[float]()
    api.read_lease = lambda namespace, name, timeout_s: waits_s.append(timeout_s)  # type: ignore[method-assign]
    assert lease(api, "one", Clock()).try_acquire()
    assert waits_s == [12]


@pytest.mark.parametrize(
    ("refusal", "why"), [(ApiError(403, "Forbidden", "user x"), "403 Forbidden"), (UnreachableError("x"), "no answer")]
)
def test_an_operator_that_cannot_read_its_lease_says_so_after_a_while(refusal: Exception, why: str):
    api, clock = FakeApi(), Clock()
    mine = lease(api, "one", clock)
    api.refusal = refusal
    with pytest.raises((ApiError, UnreachableError)):
        mine.try_acquire()
    clock.now_s = 60
    assert mine.problem() is None
    clock.now_s = 61
    assert mine.problem() == f"lease ns/release: {why}, neither ours nor another's for 61 s"
    api.refusal = None
    assert mine.try_acquire()
    assert mine.problem() is None
    assert mine.note() == "lease ns/release: held by this operator, renewed 0 s ago"


def test_a_standby_beside_a_holder_who_lives_has_no_problem_and_one_who_never_wins_has():
    api, clock = FakeApi(), Clock()
    first, standby = lease(api, "one", clock), lease(api, "two", clock)
    for _ in range(20):
        assert first.try_acquire()
        assert not standby.try_acquire()
        clock.now_s += 10
    assert standby.problem() is None
    assert standby.note() == "lease ns/release: held by one, this operator waits"
    api.lease, third = None, lease(api, "three", clock)
    api.refusal = ApiError(409, "Conflict", "")
    api.read_lease = lambda namespace, name, timeout_s: None  # type: ignore[method-assign]
    for _ in range(7):
        assert not third.try_acquire()
        clock.now_s += 10
    assert third.problem() == "lease ns/release: 409 Conflict, neither ours nor another's for 70 s"


@pytest.mark.parametrize(
    ("ages_s", "stuck_s", "wrong"),
    [
        ({"resync": 10.0, "watch of pods": 100.0}, 5.0, []),
        ({"resync": 200.0}, 0.0, ["resync: nothing for 200 s"]),
        ({"watch of pods": 181.0}, 0.0, ["watch of pods: nothing for 181 s"]),
        ({}, 121.0, ["queue: stuck for 121 s"]),
    ],
)
def test_health_names_what_stalled(ages_s: dict[str, float], stuck_s: float, wrong: list[str]):
    assert problems(ages_s, stuck_s) == wrong


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/healthz", 200, "ok"),
        ("/readyz", 503, "no lease"),
        ("/healthz?verbose", 200, "ok\nno lease\nnamespace b: pods: 403"),
        ("/readyz?verbose", 503, "no lease\nnamespace b: pods: 403"),
    ],
)
def test_what_no_restart_mends_makes_an_operator_unready_but_not_dead(path: str, status: int, text: str):
    url = urlsplit(path)
    assert answer(url.path, url.query, Health((), ("no lease",), ("namespace b: pods: 403",))) == (status, text)


def test_healthz_fails_with_words_and_metrics_are_served():
    wrong: list[str] = []
    metrics = Metrics(CollectorRegistry())
    server = HttpServer(0, metrics.registry, lambda: Health(tuple(wrong)))
    try:
        base = f"http://127.0.0.1:{server.port}"
        for path in ("/healthz", "/readyz", "/healthz?verbose"):
            assert urllib.request.urlopen(f"{base}{path}", timeout=PATIENCE_S).read() == b"ok"
        assert b"finetune_queue_depth" in urllib.request.urlopen(f"{base}/metrics", timeout=PATIENCE_S).read()
        wrong.append("resync: nothing for 200 s")
        for path, status in (("/healthz", 503), ("/readyz", 503), ("/", 404)):
            with pytest.raises(urllib.error.HTTPError) as refusal:
                urllib.request.urlopen(f"{base}{path}", timeout=PATIENCE_S)
            assert refusal.value.code == status
            assert status == 404 or refusal.value.read() == b"resync: nothing for 200 s"
    finally:
        server.close()


def test_last_known_figures_are_exported_until_the_job_is_deleted():
    metrics = Metrics(CollectorRegistry())
    status = FineTuneJobStatus.model_validate(
        {
            "phase": "Training",
            "metrics": {"trainLoss": 1.5},
            "progress": {"step": 7, "totalSteps": 9, "percentage": 77, "text": "7/9", "lastUpdatedTime": "x"},
        }
    )
    metrics.export("a", "bot", status, 5.0)
    job = {"job_namespace": "a", "job_name": "bot"}
    value = metrics.registry.get_sample_value
    assert value("finetune_job_step", job) == 7
    assert value("finetune_job_train_loss", job) == 1.5
    assert value("finetune_job_phase", {**job, "phase": "Training"}) == 1
    metrics.forget("a", "bot")
    assert value("finetune_job_step", job) is None
    assert value("finetune_job_train_loss", job) is None
    assert value("finetune_job_phase", {**job, "phase": "Training"}) is None


def test_what_speaks_against_a_model_is_a_metric_once_it_was_measured():
    metrics = Metrics(CollectorRegistry())
    condition = {"type": "QualityConcern", "message": "", "lastTransitionTime": "x", "observedGeneration": 1}
    labels = {"job_namespace": "a", "job_name": "bot"}
    seen: list[list[float | None]] = []
    for status, reason in (("Unknown", "NotMeasured"), ("True", "WorseThanStart"), ("False", "NoConcern")):
        conditions = [{**condition, "status": status, "reason": reason}]
        metrics.export("a", "bot", FineTuneJobStatus.model_validate({"conditions": conditions}), None)
        value, name = metrics.registry.get_sample_value, "finetune_job_quality_concern"
        seen.append([value(name, {**labels, "reason": each}) for each in ("WorseThanStart", "AnswersDoNotEnd")])
    assert seen == [[None, None], [1, 0], [0, 0]]
    metrics.forget("a", "bot")
    assert metrics.registry.get_sample_value(name, {**labels, "reason": "WorseThanStart"}) is None


def test_time_left_and_speed_are_not_shown_any_more_once_nobody_knows_them():
    metrics = Metrics(CollectorRegistry())
    progress: dict[str, Any] = {
        "step": 7, "totalSteps": 9, "percentage": 77, "text": "7/9", "lastUpdatedTime": "x",
    }  # fmt: skip
    running = FineTuneJobStatus.model_validate(
        {"progress": {**progress, "estimatedRemainingSeconds": 60, "rowsPerSecond": 7}}
    )
    ended = FineTuneJobStatus.model_validate({"progress": progress})
    for status, seconds, rate in ((running, 60, 7), (ended, None, None)):
        metrics.export("a", "bot", status, 5.0)
        labels = {"job_namespace": "a", "job_name": "bot"}
        assert metrics.registry.get_sample_value("finetune_job_remaining_seconds", labels) == seconds
        assert metrics.registry.get_sample_value("finetune_job_rows_per_second", labels) == rate


def test_figures_of_a_method_are_exported_while_they_are_known():
    metrics = Metrics(CollectorRegistry())
    progress: dict[str, Any] = {
        "step": 7, "totalSteps": 9, "percentage": 77, "text": "7/9", "lastUpdatedTime": "x",
    }  # fmt: skip
    known = {"figures": [{"name": "reward_accuracy", "value": 0.75}]}
    labels = {"job_namespace": "a", "job_name": "bot"}
    seen: list[list[float | None]] = []
    for figures in (known, {}, known, None):
        if figures is None:
            metrics.forget("a", "bot")
        else:
            metrics.export("a", "bot", FineTuneJobStatus.model_validate({"progress": progress | figures}), 5.0)
        value, name = metrics.registry.get_sample_value, "finetune_job_method_figure"
        seen.append([value(name, {**labels, "figure": each}) for each in ("reward_accuracy", "kl")])
    assert seen == [[0.75, None], [None, None], [0.75, None], [None, None]]


# What Prometheus itself, a ServiceMonitor or a PodMonitor puts on every series: one of ours would become `exported_…`.
TARGET_LABELS = {"job", "instance", "namespace", "pod", "container", "endpoint", "service", "node", "prometheus"}


def test_no_label_of_ours_is_one_that_prometheus_gives_to_what_it_scrapes():
    metrics = Metrics(CollectorRegistry())
    reporter = Reporter(Stage.TRAIN, 1, CollectorRegistry())
    TrainMetrics(reporter.registry)
    collectors = [*metrics.registry._collector_to_names, *reporter.registry._collector_to_names]  # pyright: ignore[reportPrivateUsage]
    declared = {label for each in collectors for label in getattr(each, "_labelnames", ())}
    samples = {
        label for each in collectors for family in each.collect() for one in family.samples for label in one.labels
    }
    assert {"job_namespace", "job_name", "reason", "activity"} <= declared | samples
    assert not (declared | samples) & TARGET_LABELS


def test_a_figure_that_the_status_does_not_hold_any_more_has_no_series():
    metrics = Metrics(CollectorRegistry())
    plan = FineTuneJobStatus.model_validate(
        {"plan": PLAN, "metrics": {"evalLoss": 2.0}, "usage": {"seconds": 9, "gpuSeconds": 9}}
    )
    labels = {"job_namespace": "a", "job_name": "bot"}
    names = ("planned_steps", "eval_loss", "gpu_seconds")
    seen: list[list[float | None]] = []
    for status in (plan, FineTuneJobStatus()):  # as when the data is prepared again
        metrics.export("a", "bot", status, None)
        seen.append([metrics.registry.get_sample_value(f"finetune_job_{name}", labels) for name in names])
    assert seen == [[100, 2.0, 9], [None] * 3]


@pytest.mark.parametrize(
    ("old", "new", "patch"),
    [
        ({"a": 1}, {"a": 1}, {}),
        ({"a": 1, "b": 2}, {"a": 1}, {"b": None}),
        ({"p": {"x": 1, "y": 2}}, {"p": {"x": 1}}, {"p": {"y": None}}),
        ({}, {"l": [1]}, {"l": [1]}),
        ({"l": [1, 2]}, {"l": [2]}, {"l": [2]}),
    ],
)
def test_a_status_patch_holds_what_differs(old: dict[str, Any], new: dict[str, Any], patch: dict[str, Any]):
    assert status_patch(old, new) == patch


def test_an_event_has_a_name_of_its_own_that_a_repetition_has_too():
    job = read_job({"metadata": {"name": "bot", "namespace": "a", "uid": "u"}, "spec": None})
    event = JobEvent("Warning", Reason.DATA_INVALID, "a.jsonl row 3")
    first, again = event_manifest(job, event, NOW), event_manifest(job, event, NOW)
    assert first == again
    later = event_manifest(job, event, NOW + timedelta(seconds=1))
    assert later["metadata"]["name"] != first["metadata"]["name"]
    assert first["involvedObject"]["uid"] == "u"


@pytest.mark.parametrize(
    ("reason", "message", "meant"),
    [
        (
            "FailedMount",
            'MountVolume.SetUp failed for volume "credentials" : secret "s3" not found',
            "Secret a/s3 does",
        ),
        (
            "FailedMount",
            'MountVolume.SetUp failed for volume "pii-key" : secret "k" not found',
            "Secret a/k does not exist: create it, or name another in preprocessing.pii.keySecretRef",
        ),
        ("FailedMount", 'MountVolume.SetUp failed for volume "ca" : configmap "ca" not found', "ConfigMap a/ca does"),
        ("FailedMount", "references non-existent secret key: x", "cannot be mounted"),
        ("FailedCreate", 'error looking up service account a/x: serviceaccount "x" not found', "ServiceAccount a/x"),
        ("FailedCreate", "pods is forbidden: exceeded quota: q, requested: pods=1", "waiting for quota"),
        ("FailedCreate", "pods is forbidden: violates PodSecurity", "refuses the pod"),
        ("FailedCreatePodSandBox", "Failed to create pod sandbox: plugin cni failed", "node cannot set up the pod"),
        ("FailedAttachVolume", "Multi-Attach error for volume x", "cannot be attached"),
        ("NodeNotReady", "Node is not ready", "node of the pod"),
        ("TaintManagerEviction", "Marking for deletion Pod a/b", "node of the pod"),
    ],
)
def test_events_of_the_cluster_become_words_that_name_the_object(reason: str, message: str, meant: str):
    blocked = explain(reason, message, "a")
    assert blocked is not None
    assert meant in blocked.message


def test_events_that_say_nothing_to_mend_are_passed_over():
    assert explain("Scheduled", "assigned to a node", "a") is None


def cluster_event(reason: str, second: int) -> dict[str, Any]:
    return {"reason": reason, "message": 'secret "s3" not found', "lastTimestamp": f"2026-01-01T00:00:{second:02}Z"}


def test_a_volume_that_is_missing_now_is_named_whatever_was_told_before():
    blocked = explain_events([cluster_event("FailedMount", 9), cluster_event("Scheduled", 1)], "a", NOW)
    assert blocked is not None
    assert "Secret a/s3" in blocked.message


@pytest.mark.parametrize("pulled_at", [5, 9])
def test_a_volume_that_was_late_is_not_blamed_for_a_long_pull_of_the_image(pulled_at: int):
    events = [cluster_event("Pulling", pulled_at), cluster_event("FailedMount", 5), cluster_event("Scheduled", 1)]
    assert explain_events(events, "a", NOW) is None


@pytest.mark.parametrize("time", ["2126-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "zzz", "2026-01-01T00:06:00Z"])
def test_an_event_that_claims_to_be_of_the_future_does_not_hide_what_comes_after_it(time: str):
    """Whoever may create events could else let a job wait, and end, for what is not so, by one of them."""
    forged = {**cluster_event("FailedMount", 1), "lastTimestamp": time}
    forged["metadata"] = {"creationTimestamp": "2026-01-01T00:00:02Z"}
    later = cluster_event("Pulling", 9)
    assert explain_events([forged, later], "a", NOW) is None
    assert explain_events([forged], "a", NOW) is not None, "a node's clock may be wrong"


def test_a_node_whose_clock_is_ahead_is_read_in_the_order_of_its_own_times():
    late = [{**cluster_event("FailedMount", 0), "lastTimestamp": f"2026-01-01T00:04:0{n}Z"} for n in range(2)]
    late[1]["reason"] = "Pulling"
    assert explain_events(late, "a", NOW) is None
    assert explain_events(late[:1], "a", NOW) is not None


def test_times_are_read_with_their_zone_or_not_at_all():
    assert format_time(parse_time("2026-01-01T01:00:00+01:00") or NOW) == "2026-01-01T00:00:00Z"
    assert parse_time("2026-01-01T00:00:00") is None
    assert parse_time(7) is None


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "9999-12-31T23:59:59Z"])
def test_a_time_at_the_end_of_the_calendar_is_none(text: str):
    assert parse_time(text) is None
