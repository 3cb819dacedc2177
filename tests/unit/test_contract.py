"""Operator and trainer of different releases: what each reads of the other, and what stays as it was begun."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.base import sha256_digest
from finetune_api.errors import StageError
from finetune_api.reasons import Fault, words
from finetune_api.run import CONTRACT_VERSION, Progress, RunResult
from finetune_operator.observed import parse_result
from finetune_operator.progress import parse
from finetune_trainer import config

SAMPLES = Path(__file__).parents[1] / "support" / f"contract_{CONTRACT_VERSION - 1}"
HEAD = b"HTTP/1.0 200 OK\r\n\r\n"


def sample(name: str) -> dict[str, Any]:
    """A message of the contract before this one, as it was sent."""
    return json.loads((SAMPLES / f"{name}.json").read_text())


def newer(value: Any) -> Any:
    """The same with a field in every object that nobody here knows."""
    if isinstance(value, dict):
        return {name: newer(inner) for name, inner in value.items()} | {"of_the_future": {"x": 1}}
    return [newer(inner) for inner in value] if isinstance(value, list) else value


def loaded(tmp_path: Path, content: dict[str, Any]) -> Any:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    return config.load(path)


@pytest.mark.parametrize("version", range(1, CONTRACT_VERSION + 1))
def test_a_trainer_obeys_every_contract_up_to_its_own_and_ignores_what_it_does_not_know(
    tmp_path: Path, version: int
) -> None:
    content = sample("run") | {"contract_version": version}
    known = loaded(tmp_path, content)
    assert (known.contract_version, known.spec.model.uri, known.job.name) == (version, "s3://models/model", "bot")
    assert loaded(tmp_path, newer(content)) == known


def test_a_trainer_refuses_a_configuration_that_is_not_the_one_that_its_operator_wrote(tmp_path: Path) -> None:
    known, path = loaded(tmp_path, sample("run")), tmp_path / "run.json"
    written = sha256_digest(path.read_bytes())
    assert config.load(path, written) == known
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(StageError) as caught:
        config.load(path, written)
    assert (caught.value.fault, caught.value.exit_code) == (Fault.CONFIG_REPLACED, 38)


@pytest.mark.parametrize("version", [CONTRACT_VERSION + 1, 0, -1, "1", None, True, 1.0, [1]])
def test_a_trainer_refuses_a_later_contract_and_what_is_no_number(tmp_path: Path, version: object) -> None:
    with pytest.raises(StageError) as caught:
        loaded(tmp_path, sample("run") | {"contract_version": version})
    assert (caught.value.fault, caught.value.exit_code) == (Fault.CONTRACT_SKEW, 10)


@pytest.mark.parametrize("name", ["prepared", "committed", "interrupted"])
def test_an_operator_reads_the_results_of_the_contract_before_and_of_a_newer_trainer(name: str) -> None:
    told = sample(name)
    report, bad = parse_result(json.dumps(told))
    assert (report is not None, bad) == (True, False)
    assert report is not None
    again = json.loads(report.to_message())
    assert again == told, "a field of the contract before has gone, or has another meaning"
    of_newer, bad = parse_result(json.dumps(newer(told) | {"args": told["args"], "contract_version": 99}))
    assert (of_newer, bad) == (report.model_copy(update={"contract_version": 99}), False)


def test_an_operator_reads_the_progress_of_the_contract_before_and_of_a_newer_trainer() -> None:
    told = sample("progress")
    progress = parse(HEAD + json.dumps(told).encode())
    assert {name: value for name, value in progress.model_dump(mode="json", by_alias=True).items() if name in told} == (
        told
    )
    assert parse(HEAD + json.dumps(newer(told)).encode()) == progress
    unknown = parse(HEAD + json.dumps(told | {"activity": "Distilling"}).encode())
    assert unknown == progress.model_copy(update={"activity": "Working"})
    assert Progress.model_validate(sample("progress")).activity == "Training"


def test_a_fault_of_a_newer_trainer_is_told_by_its_code() -> None:
    told = sample("interrupted") | {"fault": "OfTheFuture", "args": {"any": "thing"}, "contract_version": 99}
    report, bad = parse_result(json.dumps(told))
    assert not bad
    assert report is not None
    assert (report.fault, report.args, report.step) == (Fault.UNRECOGNISED, {"code": "OfTheFuture"}, 40)
    assert "OfTheFuture" in words(report.fault, report.args)
    long = RunResult.model_validate(told | {"fault": "x" * 5000})
    assert len(str(long.args["code"])) == 64


@pytest.mark.parametrize(
    ("concerns", "told"),
    [(["OfTheFuture"], None), (["OfTheFuture", "Diverging"], ["Diverging"]), ([], []), ([7], None), ("x", None)],
)
def test_a_concern_of_a_newer_trainer_hides_neither_the_adapter_nor_itself_as_none(
    concerns: object, told: list[str] | None
) -> None:
    found = {"quality": {"concerns": concerns, "held_out_rows": 60, "loss": 3.0, "start_loss": 2.0}}
    report, broken = parse_result(json.dumps(sample("committed") | found))
    assert not broken
    assert report is not None
    assert report.artifact is not None
    progress = Progress.model_validate(sample("progress") | found)
    for quality in (report.quality, progress.quality):
        assert (quality and quality.concerns) == told, "without its concerns a model would be said to raise none"


def test_figures_of_a_newer_trainer_and_those_that_are_no_number_are_left_out() -> None:
    told = {"reward_accuracy": 0.5, "of_the_future": 1.0, "kl": None, "x" * 500: 2, "reward_margin": "0.1"}
    assert Progress.model_validate(sample("progress") | {"figures": told}).figures == {"reward_accuracy": 0.5}
    assert Progress.model_validate(sample("progress")).figures == {}


@pytest.mark.parametrize("stage", ["evaluate", "", 7, None])
def test_a_stage_of_a_newer_trainer_makes_a_bad_result(stage: object) -> None:
    assert parse_result(json.dumps(sample("interrupted") | {"stage": stage})) == (None, True)
