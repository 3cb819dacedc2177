"""The promises that numbers can be held to: equal to TRL, and equal to itself however often it is killed."""

import multiprocessing
import os
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finetune_api.job import MethodType
from finetune_trainer import train
from finetune_trainer.data.examples import Examples
from finetune_trainer.inputs import fetch_examples, fetch_steps
from finetune_trainer.loop import Stepper, make_optimizer
from finetune_trainer.methods import method_of
from finetune_trainer.model import adapter_parameters, add_adapter, load_base
from finetune_trainer.stop import StopFlag
from pair_run import preference_run
from tiny_run import (
    TinyRun,
    byte_tokenizer,
    context,
    make_run,
    plain_peft,
    steps_file,
    train_in_child,
    use_model,
)
from waiting import PATIENCE_S, until

CPU = torch.device("cpu")

REAL_KILLS = int(os.environ.get("FINETUNE_REAL_KILLS", "3"))


def _trl(
    run: TinyRun, rows: Examples, ids: list[int], values: dict[str, Tensor], folder: Path
) -> tuple[float, dict[str, Tensor]]:
    """Loss and LoRA gradients of TRL's SFTTrainer on the rows `ids` as one padded batch, with LoRA weights `values`."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    model = plain_peft(run)
    for name, value in values.items():
        model.get_parameter(name).data.copy_(value)
    runs = [rows.read(sequence) for sequence in rows.sequences_of(ids)]
    data = datasets.Dataset.from_dict(
        {
            "input_ids": [run.tokens.tolist() for run in runs],
            "completion_mask": [run.labels.tolist() for run in runs],
        }
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=len(ids),
            max_steps=1,
            learning_rate=0.0,
            completion_only_loss=True,
            gradient_checkpointing=False,
            max_length=None,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=byte_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=int((batch["labels"][:, 1:] != -100).sum()))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients


def test_loss_and_lora_gradients_equal_those_of_trl_on_the_same_token_ids(tmp_path: Path) -> None:
    # No clipping, and several passes per step, so that our accumulation is compared with TRL's one padded batch.
    run = make_run(tmp_path, rows=24, batch=8, micro_batch_tokens=60, max_grad_norm=1e9)
    folder = tmp_path / "fetched"
    folder.mkdir()
    rows = fetch_examples(run.store, run.plan.train, folder / "train")
    steps = fetch_steps(run.store, run.plan, folder)
    lm = load_base(tmp_path / "model", run.plan, CPU)
    parameters = adapter_parameters(add_adapter(lm, run.plan))
    hyper = run.plan.hyperparameters
    # B starts at zero, where A has no gradient: both sides begin at the same other place.
    generator = torch.Generator().manual_seed(7)
    values = {name: torch.randn(p.shape, generator=generator) * 0.05 for name, p in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data.copy_(values[name])
    optimizer = make_optimizer(list(parameters.values()), hyper)
    method = method_of(run.plan.method)
    stepper = Stepper(lm, method, list(parameters.values()), optimizer, rows, steps, hyper, hyper.micro_batch_tokens)
    loss = float(stepper.run(0)[0])
    trl_loss, trl_gradients = _trl(run, rows, steps.examples_of(0), values, tmp_path / "trl")
    assert loss == pytest.approx(trl_loss, abs=1e-5)
    assert trl_gradients.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, trl_gradients[name], atol=1e-4, rtol=1e-4)


@dataclass(frozen=True)
class Kill:
    """When an attempt is killed: so many steps and seconds after its start."""

    steps: int
    delay_s: float

    @property
    def most_steps(self) -> int:
        """How many steps it may run on until the signal comes, however late."""
        return self.steps + 4


def _kills(count: int, start_s: float) -> list[Kill]:
    """A few steps after the start each or, one time in five, while it still starts, which takes about `start_s`."""
    chance = random.Random(20)
    found: list[Kill] = []
    for _ in range(count):
        starting = chance.random() < 0.2
        steps = 0 if starting else chance.randint(1, 7)
        found.append(Kill(steps, chance.uniform(0.0, start_s if starting else 0.05)))
    return found


def _steps_for(kills: Sequence[Kill]) -> int:
    """How many steps a run needs to be killed so often."""
    return sum(kill.most_steps for kill in kills) + 1


def _start(processes: ForkServerContext, run: TinyRun, number: int, *more: int) -> ForkServerProcess:
    process = processes.Process(target=train_in_child, args=(run, number, *more), daemon=True)
    process.start()
    return process


def _kill(process: ForkServerProcess, run: TinyRun, kill: Kill) -> None:
    def has_run() -> bool:
        assert process.is_alive(), f"it ended by itself with {process.exitcode}"
        return steps_file(run).stat().st_size >= kill.steps

    until(has_run, f"{kill.steps} steps", poll_s=0.002)
    process.join(kill.delay_s)
    process.kill()
    process.join(PATIENCE_S)
    assert process.exitcode == -signal.SIGKILL


def _checkpoint_often(run: TinyRun) -> None:
    """Below the spec's minimum of a second, as these steps take milliseconds."""
    often = {"interval_seconds": 0.02, "keep_last": 2}
    spec = run.config.spec
    assert spec.checkpoint is not None
    quick = spec.model_copy(update={"checkpoint": spec.checkpoint.model_copy(update=often)})
    run.config = run.config.model_copy(update={"spec": quick})


def _train_with_kills(run: TinyRun, kills: Sequence[Kill]) -> None:
    """As many attempts that are killed, and a last one that is not."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["finetune_trainer.train"])
    for number, kill in enumerate(kills, 1):
        steps_file(run).write_bytes(b"")
        _kill(_start(processes, run, number, kill.most_steps), run, kill)
    process = _start(processes, run, len(kills) + 1)
    process.join(PATIENCE_S)
    assert process.exitcode == 0


@pytest.mark.timeout(3600)
def test_weights_after_20_random_kills_are_bit_equal_to_the_undisturbed_run(tmp_path: Path) -> None:
    kills = _kills(20, start_s=0.6)
    undisturbed, killed = (make_run(tmp_path / name, steps=_steps_for(kills)) for name in ("undisturbed", "killed"))
    train.run(context(undisturbed), StopFlag(60))
    _checkpoint_often(killed)
    _train_with_kills(killed, kills)
    assert undisturbed.adapter_bytes() == killed.adapter_bytes()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", [MethodType.DPO, MethodType.KTO])
def test_preference_methods_too_are_bit_equal_after_20_random_kills(tmp_path: Path, method: MethodType) -> None:
    kills = _kills(20, start_s=0.6)
    undisturbed, killed = (
        preference_run(tmp_path / name, method, steps=_steps_for(kills), trees=True)
        for name in ("undisturbed", "killed")
    )
    train.run(context(undisturbed), StopFlag(60))
    _checkpoint_often(killed)
    _train_with_kills(killed, kills)
    assert undisturbed.adapter_bytes() == killed.adapter_bytes()


@pytest.mark.real_model
@pytest.mark.timeout(3600)
def test_the_real_model_too_is_bit_equal_after_random_kills(tmp_path: Path) -> None:
    """Three, as each attempt loads the model; `make soak` kills twenty times."""
    from demo import assets

    model, kills = assets.ensure_model(), _kills(REAL_KILLS, start_s=5.0)
    runs = [
        make_run(tmp_path / name, steps=_steps_for(kills), rows=32, batch=2, longest=12)
        for name in ("undisturbed", "killed")
    ]
    for run in runs:
        use_model(run, model)
        run.write_plan(run.plan.model_copy(update={"sample_prompts": []}))  # answers change no weights
    undisturbed, killed = runs
    train.run(context(undisturbed), StopFlag(60))
    _checkpoint_often(killed)
    _train_with_kills(killed, kills)
    assert undisturbed.adapter_bytes() == killed.adapter_bytes()
