"""Preference methods and chains of jobs on the node: to adapters that act, killed in the middle, and in any order.

All jobs are submitted at once, and share the node.
"""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from e2e_assets import jsonl, model_files, pair_rows, thumb_rows
from e2e_faults import kill_trainer
from e2e_lab import PATIENCE_S, Lab, Submitted, until
from e2e_site import LONG_RUN_S
from finetune_api.names import API_VERSION, KIND, Stage
from likely_answers import share_preferred

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]

PAIRS, THUMBS = ({"datasets": [{"uri": f"s3://e2e-data/{name}/"}]} for name in ("pairs", "thumbs"))
LEARNS: dict[str, object] = {"hyperparameters": {"maxSteps": 60, "globalBatchSize": 8, "learningRate": 1e-2}}
LONG: dict[str, object] = {"hyperparameters": {"maxSteps": 400, "globalBatchSize": 4, "learningRate": 1e-3}}
METHODS: dict[str, dict[str, object]] = {
    "dpo": {"method": {"type": "DPO"}, **PAIRS, **LONG},
    "orpo": {"method": {"type": "ORPO", "orpo": {"lambda": 1}}, **PAIRS, **LEARNS},
    "kto": {"method": {"type": "KTO"}, **THUMBS, **LEARNS},
}
UNSEEN = pair_rows(20, seed=7)


@pytest.fixture(scope="module")
def rows(lab: Lab) -> None:
    """What all jobs learn from, in the bucket."""
    lab.s3.put_object(Bucket="e2e-data", Key="pairs/rows.jsonl", Body=jsonl(pair_rows(240)))
    lab.s3.put_object(Bucket="e2e-data", Key="thumbs/rows.jsonl", Body=jsonl(thumb_rows(240)))


@pytest.fixture(scope="module")
def killed(lab: Lab, rows: None) -> Submitted:
    """The same job as `dpo`, which is killed in the middle. Submitted, not yet finished."""
    return lab.submit("dpo-killed", **METHODS["dpo"])


@pytest.fixture(scope="module")
def jobs(lab: Lab, killed: Submitted) -> dict[str, Submitted]:
    """A job of each method. Submitted, not yet finished."""
    return {name: lab.submit(name, **spec) for name, spec in METHODS.items()}


@pytest.fixture(scope="module")
def chain(lab: Lab, rows: None) -> dict[str, Submitted]:
    """A chain of three in one apply, the last first. Submitted, not yet finished."""
    specs: dict[str, dict[str, object]] = {
        "chain-preferring": {"method": {"type": "DPO"}, **PAIRS, **LEARNS},
        "chain-answering": {},
        "chain-reading": {"method": {"type": "CPT"}, "datasets": [{"uri": "s3://e2e-data/texts/"}]},
    }
    names, documents = list(specs), []
    for name, earlier in zip(names, [*names[1:], None], strict=True):
        spec = lab.small_spec(name) | specs[name]
        if earlier is not None:
            model = {"uri": "s3://e2e-models/tiny", "adapterFrom": {"jobName": earlier}}
            spec |= {"model": model, "peft": {"type": "LoRA"}}
        documents.append({"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": spec})
    lab.kubectl("apply", "-f", "-", stdin="\n---\n".join(map(json.dumps, documents)))
    return {name: Submitted(lab, name) for name in names}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model of all jobs."""
    folder = tmp_path_factory.mktemp("base")
    for name, content in model_files().items():
        (folder / name).write_bytes(content)
    return folder


def test_a_chain_that_is_applied_in_the_wrong_order_waits_and_everybody_sees_for_what(
    lab: Lab, jobs: dict[str, Submitted], chain: dict[str, Submitted]
):
    preferring, answering, _ = chain.values()
    for job, earlier in ((preferring, "chain-answering"), (answering, "chain-reading")):
        until(lambda job=job: "WaitingForJob" in lab.shown(job.name), f"{job.name} waits", PATIENCE_S, job.explain)
        words = f"FineTuneJob {earlier} of model.adapterFrom "  # is Pending, or does not exist yet
        assert words in job.condition("Running")["message"]
        assert job.pods() == []
        told = until(lambda job=job: _waiting_event(job), f"{job.name} is told to wait", PATIENCE_S, job.explain)
        assert (told["type"], earlier in told["message"]) == ("Normal", True)


def _waiting_event(job: Submitted) -> dict[str, Any] | None:
    return next((event for event in job.events() if event["reason"] == "WaitingForJob"), None)


def test_dpo_that_is_killed_in_the_middle_ends_with_the_bits_of_a_job_that_is_not(
    lab: Lab, jobs: dict[str, Submitted], killed: Submitted
):
    before = killed.until_training_beyond(1)
    kill_trainer(killed.until_running(Stage.TRAIN))
    closed = killed.until_attempt_closed(before["attempt"])
    assert (closed["class"], closed["reason"]) == ("Failure", "Unknown")
    status = killed.until_succeeded(LONG_RUN_S)
    assert killed.attempts()[-1]["resumedFromStep"] >= before["checkpoint"]["step"] > 0
    jobs["dpo"].until_succeeded(LONG_RUN_S)
    figures = killed.figures()
    assert [row["step"] for row in figures if "loss" in row] == list(range(1, status["plan"]["steps"] + 1))
    assert figures == jobs["dpo"].figures()
    assert killed.adapter_sha256() == jobs["dpo"].adapter_sha256()
    log = lab.read(f"{killed.run_uri()}/.job/logs/train-{len(killed.attempts())}.jsonl").decode()
    assert re.findall(r"says of the answers: (\d+) parts were there", log) == ["1", "1"], (
        "of both splits, and nothing twice"
    )


@pytest.mark.parametrize("name", METHODS)
def test_each_method_ends_with_an_adapter_that_prefers_what_people_preferred(
    lab: Lab, jobs: dict[str, Submitted], base: Path, tmp_path: Path, name: str
):
    job = jobs[name]
    status = job.until_succeeded(LONG_RUN_S)
    data = status["data"]
    assert data["rowsIn"] == data["rowsUsed"] + data["rowsHeldOut"] == 240
    words = r"share of preferences that the model shares (\d\.\d+), (\d\.\d+) before training"
    measured = re.search(words, job.condition("QualityConcern")["message"])
    assert measured is not None, job.explain()
    assert measured.group() in job.describe()
    after, before = map(float, measured.groups())
    assert after >= 0.9
    assert 0.2 <= before <= 0.8
    assert share_preferred(base, job.fetch_adapter(tmp_path / name), UNSEEN) >= 0.9
    card = (tmp_path / name / "README.md").read_text()
    assert "share of preferences that the model shares" in card


def test_each_job_of_a_chain_goes_on_with_the_adapter_of_the_one_before_and_one_adapter_holds_it_all(
    lab: Lab, chain: dict[str, Submitted], base: Path, tmp_path: Path
):
    preferring, answering, reading = chain.values()
    artifacts = [job.until_succeeded(LONG_RUN_S)["artifacts"][0] for job in (reading, answering, preferring)]
    began = [job.status()["metrics"]["baseEvalLoss"] for job in (reading, answering)]
    assert began[1] < began[0] - 0.5, "it begins with what the texts taught"
    for earlier, artifact in pairwise(artifacts):
        manifest: dict[str, Any] = json.loads(lab.read(artifact["manifestUri"]))
        assert manifest["starting_adapter"] == {name: earlier[name] for name in ("uri", "digest")}
    folder = preferring.fetch_adapter(tmp_path / "adapter")
    start = json.loads((folder / "eval.json").read_text())["held_out"][0]["figures"]
    margin = pytest.approx(0, abs=1e-3)
    assert start["reward_margin"] == margin, (
        "it is compared with the adapter that it began with, not with the bare base"
    )
    assert share_preferred(base, folder, UNSEEN) >= 0.9
