"""The operator on the node: killed in every phase of a job, and watched by a real Prometheus."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2e_faults import held, send
from e2e_lab import Lab, Submitted, fetch, until
from e2e_prometheus import Prometheus, lint, running
from e2e_site import LONG_RUN
from finetune_api.names import HTTP_PORT, LABEL_STAGE, Stage

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def stop_operator(lab: Lab) -> None:
    """SIGSTOP: it does nothing more, so that what happens next happens without it."""
    send(lab.operator(), signal.SIGSTOP)


def kill_operator(lab: Lab) -> Callable[[], object]:
    """SIGKILL its container's process; what is returned waits until the kubelet has started the next."""
    before = lab.operator()
    send(before, signal.SIGKILL)
    restarts = _container(before)["restartCount"]

    def back() -> bool:
        container = _container(lab.operator_pod() or {})
        return container.get("restartCount", 0) > restarts and container.get("ready", False)

    return lambda: until(back, "the operator is back", 90)


def _container(pod: dict[str, Any]) -> dict[str, Any]:
    return next(iter(pod.get("status", {}).get("containerStatuses", [])), {})


def _complete(job: Submitted, stage: Stage) -> bool:
    """Whether its Kubernetes Job of that stage is complete."""
    jobs = [j for j in job.jobs() if j["metadata"]["labels"][LABEL_STAGE] == stage]
    return any(
        c["type"] == "Complete" and c["status"] == "True" for j in jobs for c in j["status"].get("conditions", [])
    )


def _stages(job: Submitted) -> list[str]:
    return [j["metadata"]["labels"][LABEL_STAGE] for j in job.jobs()]


def test_an_operator_killed_in_five_phases_reaches_the_same_end_with_one_job_per_stage(
    lab: Lab, undisturbed: Submitted
):
    stop_operator(lab)
    job = lab.submit("orphaned", **LONG_RUN)
    assert _stages(job) == []
    operator_is_back = kill_operator(lab)  # 1: after apply, before the prepare Job

    # The new operator needs longer to be called ready than prepare needs to be done.
    with held(job, Stage.PREPARE):
        operator_is_back()
        job.until_running(Stage.PREPARE)
        kill_operator(lab)()  # 2: while preparing
        stop_operator(lab)
    job.until(lambda: _complete(job, Stage.PREPARE), "the prepare Job is complete")
    assert _stages(job) == ["prepare"]
    kill_operator(lab)()  # 3: between the stages

    job.until_training_beyond(1)
    with held(job, Stage.TRAIN):
        kill_operator(lab)()  # 4: while training
        stop_operator(lab)
    job.until(lambda: _complete(job, Stage.TRAIN), "the train Job is complete")
    assert job.condition("Finished")["status"] == "False"
    kill_operator(lab)()  # 5: after training, before the verdict

    status = job.until_succeeded()
    assert _stages(job) == ["prepare", "train"]
    undisturbed.until_succeeded(400)
    assert _essence(status) == _essence(undisturbed.status())
    assert job.adapter_sha256() == undisturbed.adapter_sha256()


def _essence(status: dict[str, Any]) -> dict[str, Any]:
    """What two runs of the same spec must agree in: no times, no names, no places."""
    metrics = {key: status["metrics"][key] for key in ("trainLoss", "evalLoss", "baseEvalLoss")}
    plan = {key: status["plan"][key] for key in ("steps", "trainTokens", "labelTokens", "memoryBytes", "resolved")}
    data = {key: value for key, value in status["data"].items() if key != "reportUri"}
    return {
        "phase": status["phase"],
        "conditions": {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]},
        "attempts": [(e["stage"], e["number"], e["class"], e["exitCode"], e.get("reason")) for e in status["attempts"]],
        "step": (status["progress"]["step"], status["progress"]["totalSteps"]),
        "failures": status.get("failures", 0),
        "metrics": metrics,
        "plan": plan,
        "data": data,
    }


def test_prometheus_scrapes_operator_and_trainer_and_knows_loss_step_speed_and_phase(
    lab: Lab, in_training: Submitted, tmp_path: Path
):
    with running(lab, tmp_path) as prometheus:
        until(
            lambda: len(prometheus.query("up == 1")) >= 2, "both are scraped", 60, lambda: str(prometheus.query("up"))
        )
        trainer, operator = f'{{ftj="{in_training.name}",stage="train"}}', f'name="{in_training.name}"'
        first_step = _value(prometheus, f"finetune_train_step{trainer}")
        assert 0 < _value(prometheus, f"finetune_train_loss{trainer}") < 20
        assert _value(prometheus, f"finetune_train_tokens_per_second{trainer}") > 0
        assert _value(prometheus, f"finetune_train_tokens_total{trainer}") > 0
        until(lambda: _value(prometheus, f"finetune_train_step{trainer}") > first_step, "steps go on", 30)
        phase = f'finetune_job_phase{{{operator},phase="Training"}}'
        until(lambda: prometheus.value(phase) == 1, "the operator tells the phase", 30)
        for figure in ("step", "train_loss", "tokens_per_second"):
            assert _value(prometheus, f"finetune_job_{figure}{{{operator}}}") > 0, figure

    pod = in_training.until_running(Stage.TRAIN)
    texts = {
        "trainer": fetch(f"http://{pod['status']['podIP']}:{HTTP_PORT}/metrics"),
        "operator": fetch(f"http://{lab.operator()['status']['podIP']}:8080/metrics"),
    }
    assert {name: lint(text or "") for name, text in texts.items()} == {"trainer": "", "operator": ""}


def _value(prometheus: Prometheus, expression: str) -> float:
    return until(lambda: prometheus.value(expression), f"Prometheus knows {expression}", 30)
