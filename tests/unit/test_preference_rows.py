"""Preference methods from the user's rows to a committed adapter, and the jobs that they refuse."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_run import context, jsonl, prepare_run, put, train_context
from finetune_api.errors import StageError
from finetune_api.job import MethodSpec, MethodType
from finetune_api.layout import ADAPTER, join
from finetune_api.reasons import Fault
from finetune_trainer import prepare, sizing, train
from finetune_trainer.methods import method_of
from finetune_trainer.runplan import PassLayout
from finetune_trainer.sizing import Choices
from finetune_trainer.stop import StopFlag
from tiny_run import byte_tokenizer, tiny_config, tiny_model


def _pairs(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"what is {i} and one? ",
            "chosen": f"it is {i + 1}.",
            "rejected": f"oh, {'well ' * (i % 3)}go away.",
        }
        for i in range(count)
    ]


def _thumbs(count: int, good: float = 1 / 3) -> list[dict[str, Any]]:
    return [
        {"prompt": f"what is {i} and one? ", "completion": f"it is {i + 1}.", "label": (i % 12) < 12 * good}
        for i in range(count)
    ]


def _model(folder: Path) -> None:
    tiny_model(tiny_config("llama", max_position_embeddings=512)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def _spec(method: dict[str, Any]) -> dict[str, Any]:
    return {
        "method": method,
        "peft": {"type": "LoRA", "rank": 4},
        "evaluation": {"holdoutFraction": 0.2},
        "hyperparameters": {"maxSteps": 4, "globalBatchSize": 8, "learningRate": 1e-3},
    }


@pytest.mark.parametrize("method", ["DPO", "ORPO", "KTO"])
def test_rows_become_a_committed_adapter(tmp_path: Path, method: str) -> None:
    _model(tmp_path / "model")
    put(tmp_path, a_jsonl=jsonl(_thumbs(60) if method == "KTO" else _pairs(60)))
    ctx = context(tmp_path, _spec({"type": method}))
    prepared = prepare.run(ctx)
    assert prepared.plan is not None
    chosen = {value.field: value for value in prepared.plan.resolved}
    training = train_context(ctx, prepared.plan.digest, tmp_path / "train")
    result = train.run(training, StopFlag(60))
    progress = training.reporter.progress()
    assert progress.answers_scored == progress.answers_to_score
    assert bool(progress.answers_scored) is method_of(MethodType(method)).needs_reference
    assert result.artifact is not None
    assert result.quality is not None
    figures = set(method_of(MethodType(method)).figures)
    assert set(result.quality.figures) == set(result.quality.start_figures) == figures
    assert result.quality.start_figures["reward_accuracy"] == pytest.approx(0.5, abs=0.5)
    assert result.quality.unit == "example"
    card = ctx.store.read(join(ctx.config.run_uri, ADAPTER, "README.md"), max_bytes=2**20)[0].decode()
    assert f"trained by {method_of(MethodType(method)).name}." in card
    assert "| share of preferences that the model shares |" in card
    assert "(nats per example)" in card
    if method == "KTO":
        assert "count alike" in chosen["method.kto.desirableWeight"].reason
        assert float(chosen["method.kto.undesirableWeight"].value) == 1


def test_options_and_learning_rate_are_chosen_with_their_reasons(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(_pairs(40)))
    plan = prepare_run(tmp_path, {"method": {"type": "DPO", "dpo": {"loss": "SimPO"}}}).plan
    chosen = {value.field: value.value for value in plan.resolved}
    assert (chosen["method.dpo.beta"], chosen["method.dpo.gamma"]) == ("2", "1")
    assert "method.dpo.loss" not in chosen
    assert (chosen["hyperparameters.learningRate"], chosen["hyperparameters.epochs"]) == ("1e-05", "1")
    assert plan.options is not None
    assert plan.options.dpo is not None
    assert (plan.options.dpo.beta, plan.options.dpo.gamma, plan.options.dpo.nll_weight) == (2, 1, 0)


def test_the_margin_of_simpo_is_chosen_for_the_beta_that_is_given() -> None:
    spec = MethodSpec.model_validate({"type": "DPO", "dpo": {"loss": "SimPO", "beta": 10}})
    chosen = method_of(MethodType.DPO).choose(spec, Choices())
    assert chosen.dpo is not None
    assert chosen.dpo.gamma == 5


@pytest.mark.parametrize(
    ("good", "bad", "given", "weights", "words"),
    [
        (10, 40, {}, (4, 1), "10 good and 40 bad answers count alike"),
        (40, 10, {}, (1, 4), "40 good and 10 bad answers count alike"),
        (10, 40, {"desirableWeight": 1}, (1, 0.25), "count alike"),
        (10, 40, {"undesirableWeight": 2}, (8, 2), "count alike"),
        (1, 30_000, {}, (10_000, 1), "as nearly alike as weights may make them"),
        (30_000, 1, {"undesirableWeight": 0.1}, (1 / 300_000, 0.1), "count alike"),
    ],
)
def test_good_and_bad_answers_count_alike_unless_the_job_says_both_weights(
    good: int, bad: int, given: dict[str, float], weights: tuple[float, float], words: str
) -> None:
    choices = Choices()
    spec = MethodSpec.model_validate({"type": "KTO", "kto": given})
    label = np.array([1] * good + [-1] * bad)
    found = MethodSpec.model_validate_json(
        method_of(MethodType.KTO).settle(spec, {"label": label}, choices).model_dump_json(by_alias=True)
    ).kto
    assert found is not None
    assert (found.desirable_weight, found.undesirable_weight) == pytest.approx(weights)
    assert len(choices.resolved) == 2 - len(given)
    assert all(words in value.reason for value in choices.resolved)


def test_both_answers_of_a_pair_are_planned_into_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are no smaller than the largest pair, though each of its answers would fit a smaller one."""
    monkeypatch.setattr(sizing, "_CPU_MICRO_BATCH_TOKENS", 16)
    long = "word " * 60
    put(tmp_path, a_jsonl=jsonl([{"prompt": "q", "chosen": long + "yes", "rejected": long + "no"}, *_pairs(9)]))
    prepared = prepare_run(tmp_path, {"method": {"type": "DPO"}})
    *_, one, other = sorted(len(ids) for ids, _ in prepared.train)
    assert prepared.plan.hyperparameters.micro_batch_tokens == one + other - 1, "the prompt, a token, is computed once"


def test_a_prompt_that_is_long_beside_its_answers_is_planned_and_computed_once(tmp_path: Path) -> None:
    prompts = [f"{'word ' * 40}{number}" for number in range(40)]
    put(tmp_path, a_jsonl=jsonl([{"prompt": each, "chosen": "yes", "rejected": "no"} for each in prompts]))
    prepared = prepare_run(tmp_path, {"method": {"type": "DPO"}, "evaluation": {"holdoutFraction": 0}})
    plan, chosen = prepared.plan, {value.field: value for value in prepared.plan.resolved}
    assert plan.hyperparameters.layout is PassLayout.TREES
    assert plan.computed_tokens is not None
    assert plan.train_tokens == plan.train.total_tokens, "each pair is read once"
    assert plan.computed_tokens == plan.train.stored_tokens < 0.6 * plan.train.total_tokens
    tokens = f"{plan.train.stored_tokens:,} tokens are computed in the place of {plan.train.total_tokens:,}"
    assert (chosen["treeAttention"].value, tokens in chosen["treeAttention"].reason) == ("true", True)
    assert prepared.report["packing"]["sharing_saved"] > 0.4


@pytest.mark.parametrize("label", [True, False])
def test_thumbs_that_all_point_one_way_are_refused(tmp_path: Path, label: bool) -> None:
    put(tmp_path, a_jsonl=jsonl(_thumbs(20, good=float(label))))
    with pytest.raises(StageError) as caught:
        prepare.run(context(tmp_path, _spec({"type": "KTO"}) | {"evaluation": {"holdoutFraction": 0}}))
    assert caught.value.fault is Fault.ONE_SIDED_THUMBS
    assert caught.value.args_by_name == {"good": 20 * label, "bad": 20 * (not label)}


def test_pairs_that_are_all_left_out_end_the_job_with_the_reason(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl([{"prompt": f"q{i}", "chosen": "the same", "rejected": "the same"} for i in range(5)]))
    with pytest.raises(StageError, match="two answers that say the same") as caught:
        prepare.run(context(tmp_path, _spec({"type": "DPO"})))
    assert caught.value.fault is Fault.NO_TRAINING_DATA
    report = json.loads((tmp_path / "out" / "bot-1a2b3" / ".job" / "report.json").read_text())
    assert report["state"] == "failed"
