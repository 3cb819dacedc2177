"""The window into a running stage: GET /progress for the operator, GET /metrics for Prometheus, nothing else."""

import logging
import socket
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, cast

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from finetune_api.base import finite
from finetune_api.connections import CONNECTION_TIMEOUT_S, BoundedHttpServer, OneAtATime
from finetune_api.names import Stage
from finetune_api.run import MAX_PROGRESS_BYTES, Progress
from finetune_trainer.logs import bind_step

log = logging.getLogger(__name__)

# Progress field -> metric name and its help.
_TRAIN_GAUGES = {
    "step": ("finetune_train_step", "Finished optimizer steps."),
    "step_tokens": ("finetune_train_running_step_tokens", "Tokens of the running step that are done."),
    "total_steps": ("finetune_train_planned_steps", "Optimizer steps of the plan."),
    "train_loss": ("finetune_train_loss", "Loss of the last step, nats per label token."),
    "eval_loss": ("finetune_train_eval_loss", "Last loss on held-out rows, nats per label token."),
    "base_eval_loss": ("finetune_train_base_eval_loss", "Loss of the base model on held-out rows."),
    "answers_to_score": (
        "finetune_train_answers_to_score",
        "Answers of which the start's log-probability is computed.",
    ),
    "answers_scored": ("finetune_train_answers_scored", "Those of them that are done."),
    "learning_rate": ("finetune_train_learning_rate", "Learning rate of the last step."),
    "tokens_per_second": ("finetune_train_tokens_per_second", "Real tokens per second."),
    "eta_seconds": ("finetune_train_eta_seconds", "Time left at the present speed."),
    "seconds_since_step": ("finetune_train_since_step_seconds", "Time since anything moved: a pass, a file."),
    "seconds_since_checkpoint": ("finetune_train_since_checkpoint_seconds", "Work not yet in a checkpoint."),
}
_TRAIN_COUNTERS = {"tokens_total": ("finetune_train_tokens", "Tokens trained on, by all attempts.")}
_PREPARE_GAUGES = {
    "bytes_read": ("finetune_prepare_read_bytes", "Bytes of the data files that are read, as they lie in the bucket."),
    "bytes_total": ("finetune_prepare_input_bytes", "Bytes of all data files."),
    "rows_per_second": ("finetune_prepare_rows_per_second", "Rows read per second, on the mean since the first."),
    "eta_seconds": ("finetune_prepare_eta_seconds", "Time left for reading at that speed."),
}
_PREPARE_COUNTERS = {"rows_read": ("finetune_prepare_rows_read", "Rows read by this attempt.")}


class Reporter:
    """Holds the newest figures of a stage and answers for them over HTTP. Thread-safe; `update` costs microseconds."""

    def __init__(self, stage: Stage, attempt: int, registry: CollectorRegistry) -> None:
        self._lock = threading.Lock()
        self._fields: dict[str, object] = {"stage": stage, "attempt": attempt, "activity": "Starting"}
        self._step_at_s = self._checkpoint_at_s = self._activity_at_s = time.monotonic()
        self._activity_seconds: dict[str, float] = {}
        self.registry = registry  # for the stage's own metrics
        self._server: _Server | None = None
        registry.register(_ProgressCollector(self))

    def update(self, **fields: object) -> None:
        """Set fields of Progress; the times since step and checkpoint, and the step of log lines, follow by themselves.

        A figure that is not finite is unknown (None): JSON has no NaN. Raises TypeError for a name that Progress
        does not have."""
        if unknown := fields.keys() - Progress.model_fields.keys():
            raise TypeError(f"Progress has no {', '.join(sorted(unknown))}")
        known = {name: finite(value) for name, value in fields.items()}
        with self._lock:
            now_s = time.monotonic()
            if "step" in known and known["step"] != self._fields.get("step"):
                self._step_at_s = now_s
                bind_step(cast("int", known["step"]))
            if "rows_read" in known and known["rows_read"] != self._fields.get("rows_read"):
                self._step_at_s = now_s
            if "checkpoint" in known and known["checkpoint"] != self._fields.get("checkpoint"):
                self._checkpoint_at_s = now_s
            if "activity" in known and known["activity"] != self._fields["activity"]:
                self._add_activity(now_s)
                self._step_at_s = now_s
            self._fields.update(known)

    def touch(self, while_activity: str | None = None) -> None:
        """Tell that something was done that is no step, if the stage does `while_activity`: it does not stand still."""
        with self._lock:
            if while_activity in (None, self._fields["activity"]):
                self._step_at_s = time.monotonic()

    def progress(self) -> Progress:
        """Where the stage is now. Raises pydantic.ValidationError for a field of a wrong type."""
        with self._lock:
            now_s = time.monotonic()  # read with the lock held: whoever had it meanwhile has noted no later time
            since = {
                "seconds_since_step": now_s - self._step_at_s,
                "seconds_since_checkpoint": now_s - self._checkpoint_at_s,
            }
            return Progress.model_validate(since | self._fields)

    def activity_seconds(self) -> dict[str, float]:
        """How long the stage has done what it does and did, by Progress.activity."""
        with self._lock:
            self._add_activity(time.monotonic())
            return dict(self._activity_seconds)

    def _add_activity(self, now_s: float) -> None:
        """Count the time since the last call for the present activity; the lock is held."""
        activity = cast("str", self._fields["activity"])
        self._activity_seconds[activity] = self._activity_seconds.get(activity, 0.0) + now_s - self._activity_at_s
        self._activity_at_s = now_s

    def start(self, port: int) -> int:
        """Serve on `port` until `close`; return the port. Raises OSError when it is taken.

        0: any free port, for this machine alone."""
        self._server = _Server(port, self.registry, self)
        threading.Thread(target=self._server.serve_forever, name="report", daemon=True).start()
        return self._server.server_port

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class _ProgressCollector(Collector):
    """Metrics made from Progress when they are asked for, so that training never waits for them."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def collect(self) -> Iterator[Metric]:
        progress = self._reporter.progress()
        yield InfoMetricFamily(
            "finetune_stage",
            "What this pod is doing.",
            value={
                "stage": progress.stage.value,
                "attempt": str(progress.attempt),
                "activity": progress.activity,
            },
        )
        seconds = CounterMetricFamily(
            "finetune_stage_seconds", "Time spent on each activity.", labels=("stage", "activity")
        )
        for activity, spent_s in self._reporter.activity_seconds().items():
            seconds.add_metric((progress.stage.value, activity), spent_s)
        yield seconds
        training = progress.stage is Stage.TRAIN
        for field, (name, text) in (_TRAIN_GAUGES if training else _PREPARE_GAUGES).items():
            if (value := getattr(progress, field)) is not None:
                yield GaugeMetricFamily(name, text, value=value)
        for field, (name, text) in (_TRAIN_COUNTERS if training else _PREPARE_COUNTERS).items():
            yield CounterMetricFamily(name, text, value=getattr(progress, field))


class _Server(BoundedHttpServer):
    def __init__(self, port: int, registry: CollectorRegistry, reporter: Reporter) -> None:
        self.metrics = OneAtATime(lambda: generate_latest(registry))
        self.reporter = reporter
        super().__init__(("", port), _Handler, bind_and_activate=False)
        self.socket.close()
        # A pod's port is asked by the operator and Prometheus, over IPv4, IPv6 or both; any free port, by a run on this
        # machine alone.
        if port == 0:
            self.socket = socket.create_server(("127.0.0.1", port))
        elif socket.has_dualstack_ipv6():
            self.socket = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            self.socket = socket.create_server(("", port))
        self.server_port = self.socket.getsockname()[1]

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 (the name of the hook)
        """A client that hangs up is no news; the default prints a trace to stderr."""
        log.debug("a client of /progress or /metrics broke off", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = CONNECTION_TIMEOUT_S
    server_version = "finetune"
    sys_version = ""

    def do_GET(self) -> None:
        match self.path.partition("?")[0]:
            case "/progress":
                body = self.server.reporter.progress().model_dump_json(exclude_none=True).encode()
                if len(body) > MAX_PROGRESS_BYTES:
                    self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR)
                    return
                self._answer(body, "application/json")
            case "/metrics":
                self._answer(self.server.metrics.get(), CONTENT_TYPE_PLAIN_0_0_4)
            case _:
                self.send_error(HTTPStatus.NOT_FOUND)

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)

    def _answer(self, body: bytes, content_type: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)
