"""The operator on the node: killed in every phase of a job, and watched by a real Prometheus."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from e2e_faults import held
from e2e_lab import PATIENCE_S, Lab, Submitted, fetch, until
from e2e_operator import is_complete, kill_operator, operator_away, until_operator_ready
from e2e_prometheus import Prometheus, lint, running
from e2e_site import LONG_RUN, LONG_RUN_S
from finetune_api.names import HTTP_PORT, LABEL_STAGE, Stage

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]


def _stages(job: Submitted) -> list[str]:
    return [j["metadata"]["labels"][LABEL_STAGE] for j in job.jobs()]


def test_an_operator_killed_in_five_phases_reaches_the_same_end_with_one_job_per_stage(
    lab: Lab, undisturbed: Submitted
):
    with operator_away(lab):  # 1: after apply, before the prepare Job
        job = lab.submit("orphaned", **LONG_RUN)
        assert _stages(job) == []

    # The new operator needs longer to be called ready than prepare needs to be done.
    with ExitStack() as away:
        with held(job, Stage.PREPARE):
            until_operator_ready(lab)
            job.until_running(Stage.PREPARE)
            kill_operator(lab)  # 2: while preparing
            away.enter_context(operator_away(lab))  # 3: between the stages
        job.until(lambda: is_complete(job, Stage.PREPARE), "the prepare Job is complete")
        assert _stages(job) == ["prepare"]

    job.until_training_beyond(1)
    with ExitStack() as away:
        with held(job, Stage.TRAIN):
            until_operator_ready(lab)
            kill_operator(lab)  # 4: while training
            away.enter_context(operator_away(lab))  # 5: after training, before the verdict
        job.until(lambda: is_complete(job, Stage.TRAIN), "the train Job is complete", LONG_RUN_S)
        assert job.condition("Finished")["status"] == "False"

    status = job.until_succeeded()
    assert _stages(job) == ["prepare", "train"]
    undisturbed.until_succeeded(LONG_RUN_S)
    assert _essence(status) == _essence(undisturbed.status())
    assert job.adapter_sha256() == undisturbed.adapter_sha256()


def _essence(status: dict[str, Any]) -> dict[str, Any]:
    """What two runs of the same spec must agree in: no times, no names, no places."""
    metrics = {key: status["metrics"][key] for key in ("trainLoss", "evalLoss", "baseEvalLoss")}
    plan = {key: status["plan"][key] for key in ("steps", "trainTokens", "labelTokens", "memoryBytes", "resolved")}
    data = {key: value for key, value in status["data"].items() if key not in ("reportUri", "reportPageUri")}
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
            lambda: len(prometheus.query("up == 1")) >= 2,
            "both are scraped",
            PATIENCE_S,
            lambda: str(prometheus.query("up")),
        )
        trainer, operator = f'{{ftj="{in_training.name}",stage="train"}}', f'job_name="{in_training.name}"'
        first_step = _value(prometheus, f"finetune_train_step{trainer}")
        assert 0 < _value(prometheus, f"finetune_train_loss{trainer}") < 20
        assert _value(prometheus, f"finetune_train_tokens_per_second{trainer}") > 0
        assert _value(prometheus, f"finetune_train_tokens_total{trainer}") > 0
        until(lambda: _value(prometheus, f"finetune_train_step{trainer}") > first_step, "steps go on", PATIENCE_S)
        phase = f'finetune_job_phase{{{operator},phase="Training"}}'
        until(lambda: prometheus.value(phase) == 1, "the operator tells the phase", PATIENCE_S)
        for figure in ("step", "train_loss", "tokens_per_second"):
            assert _value(prometheus, f"finetune_job_{figure}{{{operator}}}") > 0, figure

    pod = in_training.until_running(Stage.TRAIN)
    for address in (f"{pod['status']['podIP']}:{HTTP_PORT}", f"{lab.operator()['status']['podIP']}:8080"):
        text = until(lambda at=address: fetch(f"http://{at}/metrics"), f"{address} answers", PATIENCE_S)
        assert lint(text) == ""


def _value(prometheus: Prometheus, expression: str) -> float:
    return until(lambda: prometheus.value(expression), f"Prometheus knows {expression}", PATIENCE_S)
