"""The loss and the LoRA gradients of preference methods, which are TRL's on the same tokens."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune_api.job import MethodType
from finetune_trainer.data.examples import Examples, FlatSequence
from finetune_trainer.inputs import fetch_examples, fetch_steps, make_batch
from finetune_trainer.loop import Stepper, make_optimizer
from finetune_trainer.methods import planned_method
from finetune_trainer.mismatched import Mismatched
from finetune_trainer.model import adapter_parameters, add_adapter, load_base
from finetune_trainer.policy import Scores
from pair_run import preference_run
from tiny_run import TinyRun, byte_tokenizer, plain_peft

DPO, ORPO, KTO = MethodType.DPO, MethodType.ORPO, MethodType.KTO
CPU = torch.device("cpu")


def _perturbed(parameters: dict[str, Any]) -> dict[str, Tensor]:
    """Draw other weights: B starts at zero, where A has no gradient and nothing has changed."""
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(p.shape, generator=generator) * 0.05 for name, p in sorted(parameters.items())}


def _referred(rows: Examples, lm: Any, adapted: Any) -> Examples:
    """Add what the base says of the answers, each in a pass of its own."""
    values = torch.full((len(rows.parents),), float("nan"))
    with torch.no_grad(), adapted.disable_adapter():
        for each in rows.sequences_of(range(len(rows))):
            values[each.leaf] = Scores(lm, make_batch(rows, [each], CPU)).sequences[0]
    return replace(rows, reference=values.numpy())


class OurStep:
    """The first step of a run with a perturbed adapter: its loss, its gradients, and its rows."""

    def __init__(self, run: TinyRun, folder: Path) -> None:
        hyper = run.plan.hyperparameters
        lm = load_base(run.folder / "model", run.plan, CPU)
        adapted = add_adapter(lm, run.plan)
        rows = fetch_examples(run.store, run.plan.train, folder / "train")
        self.rows = _referred(rows, lm, adapted)
        if planned_method(run.plan).needs_drift:
            others = Mismatched.of(rows, hyper.seed, hyper.max_sequence_length)
            self.rows = replace(self.rows, mismatched=_referred(others, lm, adapted))
        steps = fetch_steps(run.store, run.plan, folder)
        self.numbers = steps.examples_of(0)
        self.parameters = adapter_parameters(adapted)
        self.values = _perturbed(self.parameters)
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.values[name])
        trained = list(self.parameters.values())
        stepper = Stepper(
            lm,
            planned_method(run.plan),
            trained,
            make_optimizer(trained, hyper),
            self.rows,
            steps,
            hyper,
            hyper.micro_batch_tokens,
        )
        self.loss = float(stepper.run(0)[0])

    def sequences(self) -> list[FlatSequence]:
        return self.rows.sequences_of(self.numbers)


def _rows_of_trl(ours: OurStep) -> list[dict[str, list[int]]]:
    runs = [ours.rows.read(each) for each in ours.sequences()]
    found: list[dict[str, list[int]]] = []
    for chosen, rejected in zip(runs[::2], runs[1::2], strict=True):
        begins = [int(run.labels.argmax()) for run in (chosen, rejected)]
        answers = [run.tokens[begin:].tolist() for run, begin in zip((chosen, rejected), begins, strict=True)]
        prompt = chosen.tokens[: begins[0]].tolist()
        found.append({"prompt_ids": prompt, "chosen_ids": answers[0], "rejected_ids": answers[1]})
    return found


def _as_it_is(_: Any, dataset: Any, *__: Any, **___: Any) -> Any:
    """Prepare nothing: the tokens are there."""
    return dataset


_TRAINING = {
    "max_steps": 1,
    "learning_rate": 0.0,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}


def _compare(ours: OurStep, model: Any, loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    assert ours.loss == pytest.approx(float(loss.detach()), abs=1e-5)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == ours.parameters.keys()
    for name, parameter in ours.parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "settings", "trees"),
    [
        ({"beta": 0.3}, {"beta": 0.3}, True),
        ({"beta": 0.3, "loss": "IPO"}, {"beta": 0.3, "loss_type": ["ipo"]}, False),
    ],
)
def test_loss_and_lora_gradients_of_dpo_are_those_of_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], settings: dict[str, Any], trees: bool
) -> None:
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    # No clipping, and several passes per step, so that our accumulation is compared with TRL's one padded batch.
    passes: dict[str, Any] = {"micro_batch_tokens": 90, "trees": trees}
    run = preference_run(tmp_path, DPO, options, batch=8, equal=False, max_grad_norm=1e9, **passes)
    ours = OurStep(run, tmp_path / "fetched")
    rows, model = _rows_of_trl(ours), plain_peft(run)
    monkeypatch.setattr(trl.DPOTrainer, "_prepare_dataset", _as_it_is)
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"), per_device_train_batch_size=8, max_length=None, **_TRAINING, **settings
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
    )
    for name, value in ours.values.items():
        trainer.model.get_parameter(name).data.copy_(value)  # after it has taken the model it was given as reference
    trainer.model.eval()
    loss = trainer._compute_loss(trainer.model, trainer.data_collator(rows), False)
    _compare(ours, trainer.model, loss)


def test_loss_and_lora_gradients_of_kto_are_those_of_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the answers of the same others under each prompt, and z0 over all of the step."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    options = {"beta": 0.3, "desirableWeight": 1.4, "undesirableWeight": 0.7}
    run = preference_run(tmp_path, KTO, options, batch=8, micro_batch_tokens=60, max_grad_norm=1e9)
    ours = OurStep(run, tmp_path / "fetched")
    others = ours.rows.mismatched
    assert isinstance(others, Mismatched)
    rows: list[dict[str, Any]] = []
    for number in ours.numbers:
        own, other = (ours.rows.read(ours.rows.sequences_of([each])[0]) for each in (number, others.partner(number)))
        begins = [int(run.labels.argmax()) for run in (own, other)]
        rows.append(
            {
                "prompt_ids": own.tokens[: begins[0]].tolist(),
                "completion_ids": own.tokens[begins[0] :].tolist(),
                "KL_completion_ids": other.tokens[begins[1] :].tolist(),
                "label": bool(ours.rows.columns["label"][number] > 0),
            }
        )
    monkeypatch.setattr(trl.KTOTrainer, "_prepare_dataset", _as_it_is)
    trainer = trl.KTOTrainer(
        model=plain_peft(run),
        args=trl.KTOConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=8,
            max_length=None,
            beta=0.3,
            desirable_weight=1.4,
            undesirable_weight=0.7,
            **_TRAINING,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
    )
    for name, value in ours.values.items():
        trainer.model.get_parameter(name).data.copy_(value)
    trainer.model.eval()
    loss = trainer._compute_loss(trainer.model, trainer.data_collator(rows), False)
    _compare(ours, trainer.model, loss)


def _padded(rows: list[dict[str, list[int]]], side: str) -> dict[str, Tensor]:
    """Return one side of pairs as TRL's experimental trainers take them."""
    ids = [torch.tensor(row["prompt_ids"] + row[f"{side}_ids"]) for row in rows]
    labels = [torch.tensor([-100] * len(row["prompt_ids"]) + row[f"{side}_ids"]) for row in rows]

    def stacked(values: list[Tensor], padding: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)

    mask = [torch.ones_like(each) for each in ids]
    names = (f"{side}_input_ids", f"{side}_attention_mask", f"{side}_labels")
    return dict(zip(names, (stacked(ids, 0), stacked(mask, 0), stacked(labels, -100)), strict=True))


@pytest.mark.parametrize(
    ("method", "options"), [(ORPO, {"lambda": 0.4}), (DPO, {"loss": "SimPO", "beta": 0.3, "gamma": 0.7})]
)
def test_loss_and_lora_gradients_without_a_reference_are_those_of_trl(
    tmp_path: Path, method: MethodType, options: dict[str, Any]
) -> None:
    """TRL's likelihood of ORPO covers the prompt too, so it is put together of TRL's parts as the paper has it."""
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    run = preference_run(tmp_path, method, options, batch=8, equal=False, micro_batch_tokens=90, max_grad_norm=1e9)
    ours = OurStep(run, tmp_path / "fetched")
    rows, model = _rows_of_trl(ours), plain_peft(run)
    for name, value in ours.values.items():
        model.get_parameter(name).data.copy_(value)
    used = orpo if method is ORPO else cpo
    trainer = SimpleNamespace(
        is_encoder_decoder=False, padding_value=0, pad_token_id=0, aux_loss_enabled=False,
        accelerator=SimpleNamespace(device="cpu"), concatenated_inputs=used.concatenated_inputs,
        get_batch_logps=used.get_batch_logps, label_smoothing=0.0,
        beta=0.4 if method is ORPO else 0.3, loss_type="simpo", simpo_gamma=0.7, cpo_alpha=0.0, alpha=0.0,
    )  # fmt: skip
    chosen, rejected, *_ = used.concatenated_forward(
        trainer, model, _padded(rows, "chosen") | _padded(rows, "rejected")
    )
    if method is ORPO:
        loss = (-chosen - orpo.odds_ratio_loss(trainer, chosen, rejected)[0]).mean()
    else:
        loss = cpo.cpo_loss(trainer, chosen, rejected)[0].mean()
    _compare(ours, model, loss)
