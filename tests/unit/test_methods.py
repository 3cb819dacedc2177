"""A method is one file: nothing else asks which one a job has, so a new one is prepared for and trained with."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from data_run import context, jsonl, put, train_context, write_model
from finetune_api.errors import StageError
from finetune_api.job import MethodType
from finetune_api.layout import METRICS, join
from finetune_api.reasons import Fault
from finetune_trainer import prepare, train
from finetune_trainer.data.examples import TokenRun
from finetune_trainer.inputs import fetch_examples, fetch_steps, pack_rows
from finetune_trainer.methods import METHODS, method_of
from finetune_trainer.model import load_base
from finetune_trainer.policy import Scores
from finetune_trainer.runplan import Denominator, RunPlan, read_plan
from finetune_trainer.stop import StopFlag
from finetune_trainer.store import Store
from tiny_run import make_run
from toy_method import TOY

ROOT = Path(__file__).resolve().parents[2]
_NAMES = "|".join(MethodType)
_ASKS = re.compile(rf"MethodType\.[A-Z]+|\bcpt\b|[\"']?({_NAMES})[\"']? *(==|!=)|(==|!=|\bis|\bin) *[\"']?({_NAMES})\b")


def _completions(count: int) -> list[dict[str, Any]]:
    weights = {0: 2.0, 1: 0.5}
    return [
        {"prompt": f"what is {i} and one? ", "completion": f"the answer is {'so ' * (i % 5)}{i + 1}."}
        | ({"weight": weights[i % 7]} if i % 7 in weights else {})
        for i in range(count)
    ]


def _random_model(folder: Path) -> None:
    """Write the tiny model, its weights drawn at random instead of 0."""
    write_model(folder)
    path, generator = folder / "model.safetensors", np.random.default_rng(0)
    shapes = {name: tensor.shape for name, tensor in safetensors.numpy.load_file(path).items()}
    drawn = {
        name: (np.ones(shape) if "norm" in name else generator.normal(0, 0.08, shape)).astype("f4")
        for name, shape in shapes.items()
    }
    safetensors.numpy.save_file(drawn, path)


def _expected(model: Path, runs: list[TokenRun]) -> Tensor:
    """(examples,) the toy's losses by transformers' own full logits."""
    causal: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    losses: list[Tensor] = []
    for run in runs:
        ids, labels = torch.from_numpy(run.tokens.astype("int64")), torch.from_numpy(run.labels.astype(bool))
        with torch.no_grad():
            logprobs = causal(input_ids=ids[None]).logits[0].log_softmax(-1)
        answer = logprobs[:-1].gather(1, ids[1:, None])[:, 0][labels[1:]]
        losses.append(torch.nn.functional.softplus(-answer.mean()))
    return torch.stack(losses)


def _runs(store: Store, plan: RunPlan, split: str, folder: Path) -> tuple[list[TokenRun], np.ndarray]:
    files = plan.train if split == "train" else plan.held_out
    assert files is not None
    examples = fetch_examples(store, files, folder / split)
    return [examples.read(each) for each in examples.sequences_of(range(len(examples)))], examples.columns["weight"]


def test_a_method_in_one_file_goes_from_rows_to_a_committed_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, MethodType.SFT, TOY)  # under a name that the API knows
    _random_model(tmp_path / "model")
    put(tmp_path, a_jsonl=jsonl(_completions(60)))
    ctx = context(tmp_path, {"evaluation": {"holdoutFraction": 0.2}, "hyperparameters": {"learningRate": 0.01}})
    prepared = prepare.run(ctx)
    assert prepared.plan is not None
    result = train.run(train_context(ctx, prepared.plan.digest, tmp_path / "train"), StopFlag(60))
    assert result.fault is Fault.COMMITTED
    assert result.artifact is not None

    plan = read_plan(ctx.store, ctx.config.run_uri, prepared.plan.digest).plan
    chosen = {value.field: (value.value, value.reason) for value in plan.resolved}
    assert (plan.denominator, plan.hyperparameters.lora_rank) == (Denominator.EXAMPLES, 3)
    assert chosen["hyperparameters.epochs"] == ("2", "a toy is played with twice")
    assert chosen["hyperparameters.schedule"] == ("Constant", "toys are all alike")

    runs, weights = _runs(ctx.store, plan, "train", tmp_path)
    losses, steps = _expected(tmp_path / "model", runs), fetch_steps(ctx.store, plan, tmp_path)
    first = steps.examples_of(0)
    of_first = torch.from_numpy(weights[first].copy())
    assert steps.denominators[0] == pytest.approx(float(of_first.sum())), "weights, not tokens"
    assert {0.5, 1.0, 2.0} == set(weights.tolist())
    store = ctx.store
    rows = [json.loads(line) for line in store.read(join(ctx.config.run_uri, METRICS), max_bytes=2**20)[0].splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert trained[0]["loss"] == pytest.approx(float((losses[first] * of_first).sum() / of_first.sum()), abs=1e-5)
    assert 0 < trained[0]["certainty"] < trained[-1]["certainty"] < 1

    held_out, _ = _runs(ctx.store, plan, "held_out", tmp_path)
    evaluated = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert evaluated[0] == pytest.approx(float(_expected(tmp_path / "model", held_out).mean()), abs=1e-5)
    assert evaluated[-1] < evaluated[0] - 0.1, "it learned"
    card = store.read(join(ctx.config.run_uri, "adapter", "README.md"), max_bytes=2**20)[0].decode()
    assert "trained by playing." in card
    assert f"read {len(steps.examples)} toys, " in card
    assert f"loss on {len(held_out)} held-out rows (nats per example)" in card
    assert "perplexity" not in card


def test_rows_of_a_kind_that_a_method_does_not_take_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, MethodType.SFT, TOY)
    put(tmp_path, a_jsonl=jsonl([{"messages": []}]))
    with pytest.raises(StageError, match="needs rows with `prompt` and `completion`") as caught:
        prepare.run(context(tmp_path, {}))
    assert caught.value.fault is Fault.WRONG_FORMAT


def test_nothing_outside_the_methods_asks_which_one_a_job_has() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted((ROOT / "trainer").rglob("*.py"))
        if path.parent.name != "methods"
        for line in path.read_text().splitlines()
        if _ASKS.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("method", MethodType)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_of_a_step_is_the_weighted_sum_of_what_held_out_rows_are_measured_by(
    tmp_path: Path, method: MethodType, weighted: bool
) -> None:
    run, chosen = make_run(tmp_path, steps=1), method_of(method)
    lm = load_base(run.folder / "model", run.plan, torch.device("cpu"))
    generator = np.random.default_rng(1)
    rows = [generator.integers(0, 256, length) for length in (9, 4, 17, 6)]
    labels = [np.arange(len(row)) > 2 for row in rows]
    counts = [chosen.sequences] * (4 // chosen.sequences)
    of_examples = np.array([0.5, 2.0, 1.0, 4.0][: len(counts)], dtype="f4") if weighted else np.ones(len(counts), "f4")
    weights = np.repeat(of_examples, counts) if weighted else None
    batch = replace(
        pack_rows(rows, labels, lm.device, weights, counts),
        reference=-torch.arange(4.0) - 20,
        desirable=torch.tensor([True, False] * 2),
        drift=torch.tensor(0.3),
    )
    with torch.no_grad():
        scores = Scores(lm, batch)
        loss, losses = chosen.loss(scores, batch), chosen.losses(scores, batch)
        measures = chosen.measures(scores, batch)
    label_counts = np.array(batch.label_counts).reshape(len(counts), -1).sum(1)
    units = chosen.denominator.units(label_counts)
    assert len(losses) == units.sum()
    each = torch.from_numpy(np.repeat(of_examples, units))
    torch.testing.assert_close(loss.sum, (losses * each).sum())
    assert set(loss.figures) == set(measures) == set(chosen.figures)
    for name, values in measures.items():
        torch.testing.assert_close(loss.figures[name], (values * each).sum())
