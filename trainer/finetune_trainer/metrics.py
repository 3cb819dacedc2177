"""Figures for Prometheus beside those made from Progress (`serve`), and `metrics.jsonl` that outlives the pod."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from finetune_api.base import finite
from finetune_trainer.data.decided import Decided, DecisionKind
from finetune_trainer.patience import best_effort

log = logging.getLogger(__name__)

MAX_ROWS = 10_000
_STEP_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Figure(Collector):
    """A gauge without a sample until it has a value: what is not known is absent and not 0."""

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        self._name, self._text = name, text
        self._value: float | None = None
        registry.register(self)

    def set(self, value: float) -> None:
        self._value = value

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(self._name, self._text, value=self._value)


class TrainMetrics:
    """Definitions; names in base units, no user string in any label.

    There is no count of stalls: the process ends with the first, with exit code 32. Nor of padding: there is none."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str) -> Figure:
            return Figure(f"finetune_train_{name}", text, registry)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"finetune_train_{name}", text, registry=registry)

        self.grad_norm = gauge("grad_norm", "Gradient norm of the last step before clipping.")
        self.steps_above_start = gauge("steps_above_start", "Steps in a row with a loss far above the first step's.")
        self.end_probability = gauge("answer_end_probability", "Mean probability of ending held-out answers there.")
        self.base_end_probability = gauge("base_answer_end_probability", "The same of the model the job began with.")
        self.epoch_ratio = gauge("epoch_ratio", "Passes over the training rows so far.")
        self.goodput_ratio = gauge("goodput_ratio", "Time in kept steps divided by time since training first started.")
        self.mfu_ratio = gauge("mfu_ratio", "Model FLOPs per second divided by the GPU's dense bf16 peak.")
        self.method_figures = Gauge(
            "finetune_train_method_figure",
            "What the method measures beside the loss, in the last step: mean over its examples.",
            ["figure"],
            registry=registry,
        )
        self.label_tokens = counter(
            "label_tokens", "Tokens learned from, by all attempts, without those of skipped steps."
        )
        self.data_wait = counter("data_wait_seconds", "Time in which steps waited for their batches.")
        self.nonfinite_steps = counter(
            "nonfinite_steps", "Steps skipped because a loss, gradient or figure was not finite."
        )
        self.loss_spikes = counter("loss_spikes", "Steps whose loss stood far out from those before.")
        self.oom_retries = counter("oom_retries", "Steps repeated with less memory.")
        self.resumes = counter("resumes", "Whether this attempt continued a checkpoint.")
        self.checkpoint_stall = gauge("checkpoint_stall_seconds", "Time the last checkpoint kept training waiting.")
        self.checkpoint_write = gauge("checkpoint_write_seconds", "Time to write the last one to disk.")
        self.checkpoint_upload = gauge("checkpoint_upload_seconds", "Time to upload and publish the last one.")
        self.checkpoint_success = gauge("checkpoint_last_success_timestamp_seconds", "When a checkpoint was published.")
        self.checkpoint_failures = counter("checkpoint_failures", "Saves that failed and are tried again.")
        self.gpu_memory_peak = gauge("gpu_memory_peak_bytes", "Highest GPU memory in use so far.")
        self.gpu_memory_reserved = gauge("gpu_memory_reserved_bytes", "GPU memory held by the process.")
        self.step_seconds = Histogram(
            "finetune_train_step_seconds", "Duration of steps.", registry=registry, buckets=_STEP_BUCKETS
        )


class DecidedRows(Collector):
    """What prepare did to rows that do not go straight through: its labels come from fixed lists."""

    def __init__(self, decided: Decided) -> None:
        self._decided = decided

    def collect(self) -> Iterator[Metric]:
        counter = CounterMetricFamily(
            "finetune_prepare_decided_rows",
            "Rows that do not go straight through, by what was done to them, where and why.",
            labels=DecisionKind._fields,
        )
        for kind, rows in self._decided.rows.items():
            counter.add_metric(kind, rows)
        yield counter


class MetricsFile:
    """`metrics.jsonl`: a row per step, thinned to at most about MAX_ROWS rows, and a row per evaluation.

    A disk that takes no rows is logged once and ends nothing: the file is for people."""

    def __init__(self, path: Path, total_steps: int, earlier: bytes, resumed_step: int) -> None:
        """`earlier` is what the attempts before have written; rows beyond the step resumed at are void."""
        self.path = path
        self._every = -(-total_steps // MAX_ROWS)
        kept = [line for line in earlier.splitlines() if _step_of(line) <= resumed_step]
        self._file: IO[str] | None = None
        self._failed = False
        with best_effort(f"{path.name} cannot be written"):
            path.write_bytes(b"".join(line + b"\n" for line in kept))
            self._file = path.open("a")

    def step(self, step: int, **figures: Any) -> None:
        """Add the row of a finished step; `step` counts from 1."""
        if step == 1 or step % self._every == 0:
            self._write({"step": step, **figures})

    def evaluation(self, step: int, loss: float, figures: Mapping[str, float]) -> None:
        """Add the row of an evaluation. figures: what the method measures beside the loss."""
        self._write({"step": step, "eval_loss": loss} | {f"eval_{name}": value for name, value in figures.items()})

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({name: finite(value) for name, value in row.items()}) + "\n")
            self._file.flush()
        except OSError as error:
            if not self._failed:
                self._failed = True
                log.warning("%s cannot be written: %s", self.path.name, error)


def _step_of(line: bytes) -> float:
    """The step of a row; infinite for a torn line, which is left out."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
