"""What the operator measures of itself, and the last known figures of jobs: `job_series` says of which.

Labels are bounded: the namespace and name of jobs that exist, and words of fixed lists. Never a user's text. None is
called `namespace`, `job` or `pod`, which Prometheus gives to what it scrapes: ours would become `exported_namespace`.
"""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from finetune_api.quality import FIGURE_WORDS
from finetune_api.status import ConditionType, FineTuneJobStatus, MetricsStatus, Phase
from finetune_operator.conditions import find
from finetune_operator.quality import CONCERNS

_JOB = ("job_namespace", "job_name")


class Metrics:
    """All metrics on one registry. Thread-safe, as prometheus_client is."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, text, labels, registry=registry)

        self.jobs = gauge("finetune_jobs", "FineTuneJobs by phase, at the last resync.", ("phase",))
        self.transitions = counter("finetune_transitions", "Transitions of jobs by reason.", ("reason",))
        self.reconcile_duration = Histogram(
            "finetune_reconcile_duration_seconds", "Time of one reconcile.", ("result",), registry=registry
        )
        self.queue_depth = gauge("finetune_queue_depth", "Keys waiting to be reconciled.")
        self.last_resync = gauge("finetune_last_resync_timestamp_seconds", "When the last resync ended.")
        self.api_writes = counter("finetune_api_writes", "Writes to the API server.", ("verb", "resource"))
        self.api_errors = counter("finetune_api_errors", "Failed requests to the API server.", ("code",))
        self.api_throttled = counter("finetune_api_throttled", "Requests that the API server asked to repeat later.")
        self.watched = counter("finetune_watched_objects", "Objects that lists and watches brought.", ("kind",))
        self.watch_trouble = gauge(
            "finetune_watch_trouble", "1 while a kind of objects cannot be read there.", ("kind", "watched_namespace")
        )
        self.progress_pulls = counter("finetune_progress_pulls", "Pulls of pods' progress.", ("result",))
        self.job_figures = {
            "step": gauge("finetune_job_step", "Last known finished optimizer step.", _JOB),
            "planned_steps": gauge("finetune_job_planned_steps", "Optimizer steps of the plan.", _JOB),
            "train_loss": gauge("finetune_job_train_loss", "Last known training loss, nats per label token.", _JOB),
            "eval_loss": gauge("finetune_job_eval_loss", "Last known loss on held-out rows.", _JOB),
            "base_eval_loss": gauge("finetune_job_base_eval_loss", "Loss of the base model on held-out rows.", _JOB),
            "learning_rate": gauge("finetune_job_learning_rate", "Last known learning rate.", _JOB),
            "tokens_per_second": gauge("finetune_job_tokens_per_second", "Last known real tokens per second.", _JOB),
            "remaining_seconds": gauge("finetune_job_remaining_seconds", "Estimated time left.", _JOB),
            "rows_per_second": gauge(
                "finetune_job_rows_per_second", "Last known rows read per second in prepare.", _JOB
            ),
            "failures": gauge("finetune_job_failures", "Attempts that counted as retries.", _JOB),
            "disruptions": gauge("finetune_job_disruptions", "Disrupted pods.", _JOB),
            "gpu_seconds": gauge("finetune_job_gpu_seconds", "GPU seconds of ended attempts.", _JOB),
            "last_progress_timestamp_seconds": gauge(
                "finetune_job_last_progress_timestamp_seconds", "When the pod last answered.", _JOB
            ),
            "method_figure": gauge(
                "finetune_job_method_figure", "Last known figures of preference methods.", (*_JOB, "figure")
            ),
            "quality_concern": gauge(
                "finetune_job_quality_concern", "1 for what speaks against the model, once measured.", (*_JOB, "reason")
            ),
            "phase": Gauge("finetune_job_phase", "1 for the job's phase.", (*_JOB, "phase"), registry=registry),
        }

    def export(self, namespace: str, name: str, status: FineTuneJobStatus, progress_at_s: float | None) -> None:
        """Show the job's last known figures, which outlive its pod."""
        progress, record = status.progress, status.record
        figures: dict[str, float | None] = dict.fromkeys(MetricsStatus.model_fields)
        if status.metrics is not None:
            figures |= status.metrics.model_dump(by_alias=False)
        del figures["loss"]  # the same once more, as text
        figures |= {
            "failures": status.failures,
            "step": progress.step if progress is not None and progress.total_steps else None,
            "remaining_seconds": progress.estimated_remaining_seconds if progress is not None else None,
            "rows_per_second": progress.rows_per_second if progress is not None else None,
            "last_progress_timestamp_seconds": progress_at_s if progress is not None else None,
            "planned_steps": status.plan.steps if status.plan is not None else None,
            "gpu_seconds": status.usage.gpu_seconds if status.usage is not None else None,
            "disruptions": record.disruptions if record is not None else None,
        }
        for key, value in figures.items():
            if value is not None:
                self.job_figures[key].labels(namespace, name).set(value)
            else:
                self.job_figures[key].remove(namespace, name)
        self._export_quality(namespace, name, status)
        measured = {each.name: each.value for each in (progress and progress.figures) or ()}
        for figure in FIGURE_WORDS:
            if figure in measured:
                self.job_figures["method_figure"].labels(namespace, name, figure).set(measured[figure])
            else:
                self.job_figures["method_figure"].remove(namespace, name, figure)
        for phase in Phase:
            self.job_figures["phase"].labels(namespace, name, phase.value).set(float(status.phase == phase))

    def _export_quality(self, namespace: str, name: str, status: FineTuneJobStatus) -> None:
        """Nothing was measured: no sample, as 0 would say that the model is good."""
        found = find(status, ConditionType.QUALITY_CONCERN)
        for reason in CONCERNS if found is not None and found.status != "Unknown" else ():
            holds = found is not None and found.status == "True" and found.reason == reason
            self.job_figures["quality_concern"].labels(namespace, name, reason.value).set(float(holds))

    def forget(self, namespace: str, name: str) -> None:
        """The job is deleted: its series end."""
        for key, metric in self.job_figures.items():
            if key == "phase":
                for phase in Phase:
                    metric.remove(namespace, name, phase.value)
            elif key == "method_figure":
                for figure in FIGURE_WORDS:
                    metric.remove(namespace, name, figure)
            elif key == "quality_concern":
                for reason in CONCERNS:
                    metric.remove(namespace, name, reason.value)
            else:
                metric.remove(namespace, name)

    def count_phases(self, phases: Mapping[str, int], known: Iterable[Phase]) -> None:
        for phase in known:
            self.jobs.labels(phase.value).set(phases.get(phase.value, 0))
