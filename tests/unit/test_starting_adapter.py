"""Training that goes on with an earlier adapter: what is taken, what is refused, and that the work of both is in it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save

from chained import Prepared, begin_with, source_of, stopped_before
from finetune_api.base import sha256_digest
from finetune_api.errors import StageError
from finetune_api.layout import ADAPTER
from finetune_api.reasons import Fault
from finetune_trainer import train
from finetune_trainer.model import load_base
from finetune_trainer.starting_adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from finetune_trainer.stop import StopFlag
from tiny_run import TinyRun, context, make_run


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A job that has committed its adapter."""
    run = make_run(tmp_path_factory.mktemp("first"), steps=8)
    train.run(context(run), StopFlag(60))
    return run


def going_on(folder: Path, run: TinyRun, **changes: Any) -> TinyRun:
    """A second job with the adapter of `run` in its plan."""
    return begin_with(make_run(folder, steps=6, **changes), run)


def held_out_losses(run: TinyRun) -> list[float]:
    return [each["loss"] for each in json.loads(run.local(ADAPTER, "eval.json").read_bytes())["held_out"]]


def test_training_begins_where_the_earlier_adapter_ended_and_one_adapter_holds_the_work_of_both(
    tmp_path: Path, first: TinyRun
) -> None:
    second = going_on(tmp_path, first)
    result = train.run(context(second), StopFlag(60))
    assert result.exit_code == 0
    before, after = held_out_losses(first), held_out_losses(second)
    assert after[0] == before[-1] < before[0], "the start is measured with the earlier adapter in place"
    assert after[-1] < after[0]
    alone = load_base(second.folder / "model", second.plan, torch.device("cpu")).causal
    config = json.loads(second.local(ADAPTER, ADAPTER_CONFIG).read_bytes())
    assert (config["r"], config["lora_alpha"]) == (first.plan.hyperparameters.lora_rank, 32)
    PeftModel.from_pretrained(alone, str(second.local(ADAPTER)))  # on the bare base, with nothing of the first beside
    manifest = json.loads(second.local(ADAPTER, "manifest.json").read_bytes())
    assert manifest["starting_adapter"] == source_of(first).model_dump()
    card = second.local(ADAPTER, "README.md").read_text()
    assert f"going on with the adapter `{source_of(first).uri}`" in card
    assert str(source_of(first).digest) in card


def test_a_resumed_attempt_goes_on_with_its_checkpoint_and_not_with_the_earlier_adapter(
    tmp_path: Path, first: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (going_on(tmp_path / name, first) for name in ("whole", "cut"))
    train.run(context(whole), StopFlag(60))
    assert stopped_before(monkeypatch, cut, 3).fault is Fault.INTERRUPTED
    result = train.run(context(cut, attempt=2), StopFlag(60))
    assert result.resumed_from_step == 3
    assert cut.adapter_bytes() == whole.adapter_bytes()


def test_an_adapter_that_did_not_change_is_not_committed_as_if_it_had(tmp_path: Path, first: TinyRun) -> None:
    second = going_on(tmp_path, first, learning_rate=0.0)
    with pytest.raises(StageError) as caught:
        train.run(context(second), StopFlag(60))
    assert caught.value.fault is Fault.ADAPTER_NO_EFFECT


def test_weights_of_another_base_that_only_train_can_tell_are_refused_before_step_1(
    tmp_path: Path, first: TinyRun
) -> None:
    second = going_on(tmp_path, first)
    adapter = second.plan.starting_adapter
    assert adapter is not None
    files = adapter.base_files | {"model.safetensors": "sha256:" + "7" * 64}
    changed = adapter.model_copy(update={"base_files": files})
    second.write_plan(second.plan.model_copy(update={"starting_adapter": changed}))
    with pytest.raises(StageError) as caught:
        train.run(context(second), StopFlag(60))
    assert (caught.value.fault, caught.value.args_by_name["file"]) == (Fault.ADAPTER_OF_OTHER_BASE, "model.safetensors")


Weights = dict[str, torch.Tensor]


def with_more(weights: Weights) -> bytes:
    return save({**weights, "more": torch.zeros(2)})


def not_finite(weights: Weights) -> bytes:
    return save({name: each * float("nan") for name, each in weights.items()})


def cut_off(weights: Weights) -> bytes:
    return save(weights)[:-1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (with_more, "other layers"),
        (not_finite, "not finite"),
        (cut_off, "no safetensors file"),
    ],
)
def test_weights_that_do_not_fit_the_model_are_refused_before_step_1(
    tmp_path: Path, first: TinyRun, change: Callable[[Weights], bytes], problem: str
) -> None:
    second = going_on(tmp_path, first)
    adapter = second.plan.starting_adapter
    assert adapter is not None
    path = tmp_path / "weights.safetensors"
    path.write_bytes(change(load_file(first.local(ADAPTER, ADAPTER_WEIGHTS))))
    record = adapter.weights.model_copy(
        update={
            "uri": path.as_uri(),
            "size_bytes": path.stat().st_size,
            "sha256": sha256_digest(path.read_bytes()),
        }
    )
    changed = adapter.model_copy(update={"weights": record})
    second.write_plan(second.plan.model_copy(update={"starting_adapter": changed}))
    with pytest.raises(StageError) as caught:
        train.run(context(second), StopFlag(60))
    assert caught.value.fault is Fault.ADAPTER_UNUSABLE
    assert problem in str(caught.value.args_by_name["problem"])


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return Prepared(tmp_path)


def test_the_plan_holds_the_earlier_adapter_whose_rank_and_alpha_stay(prepared: Prepared) -> None:
    digest = prepared.write()
    plan = prepared.prepare(digest)
    assert plan.starting_adapter is not None
    assert plan.starting_adapter.digest == digest
    assert (plan.hyperparameters.lora_rank, plan.hyperparameters.lora_alpha) == (7, 9)
    reasons = {value.field: value.reason for value in plan.resolved}
    assert "model.adapterFrom" in reasons["peft.rank"]


def test_a_folder_without_an_adapter_is_named_with_what_to_write_instead(prepared: Prepared) -> None:
    error = prepared.fault()
    assert (error.fault, error.args_by_name["uri"]) == (Fault.ADAPTER_NOT_FOUND, prepared.adapter.as_uri())
    assert "status.artifacts[].uri" in str(error)


def test_an_adapter_that_was_changed_since_its_job_committed_it_is_refused(prepared: Prepared) -> None:
    digest = prepared.write()
    prepared.config["lora_alpha"] = 90
    prepared.write()
    assert "its manifest.json is not the one that its job committed" in str(prepared.fault(digest))
    (prepared.adapter / ADAPTER_CONFIG).write_text("{}")
    error = prepared.fault()
    assert error.fault is Fault.ADAPTER_UNUSABLE
    assert "its adapter_config.json is not the one that its job committed" in str(error)


def test_an_adapter_that_would_fill_the_disk_of_train_is_refused_in_prepare(prepared: Prepared) -> None:
    prepared.write()
    path = prepared.adapter / "manifest.json"
    manifest = json.loads(path.read_bytes())
    next(each for each in manifest["files"] if each["path"] == ADAPTER_WEIGHTS)["size_bytes"] = 10**15
    path.write_text(json.dumps(manifest))
    error = prepared.fault()
    assert error.fault is Fault.ADAPTER_UNUSABLE
    assert "its adapter_model.safetensors has 1,000,000,000,000,000 bytes" in str(error)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_adapter_of_another_base_model_is_refused_in_prepare(prepared: Prepared, name: str) -> None:
    prepared.base_files[name] = "sha256:" + "7" * 64
    prepared.write()
    error = prepared.fault()
    assert (error.fault, error.args_by_name["file"]) == (Fault.ADAPTER_OF_OTHER_BASE, name)


def test_a_base_with_more_weights_than_this_one_has_is_another(prepared: Prepared) -> None:
    prepared.base_files["model-2.safetensors"] = "sha256:" + "7" * 64
    prepared.write()
    assert prepared.fault().fault is Fault.ADAPTER_OF_OTHER_BASE


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"r": "eight"}, "(see r)"),
        ({"target_modules": ["q_proj"]}, "it adapts q_proj"),
    ],
)
def test_an_adapter_of_a_kind_that_is_not_trained_here_is_refused_in_words(
    prepared: Prepared, change: dict[str, Any], problem: str
) -> None:
    prepared.config |= change
    prepared.write()
    error = prepared.fault()
    assert error.fault is Fault.ADAPTER_UNUSABLE
    assert problem in str(error.args_by_name["problem"])


def test_a_manifest_of_somebody_else_is_refused(prepared: Prepared) -> None:
    prepared.write()
    (prepared.adapter / "manifest.json").write_text('{"files": []}')
    assert prepared.fault().fault is Fault.ADAPTER_UNUSABLE
