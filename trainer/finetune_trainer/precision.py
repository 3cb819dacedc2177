"""Choose what training computes in: bf16 on a GPU; on a CPU fp32, or bf16 where that is faster and loses nothing.

Whether a CPU has instructions for bf16 is known only on the node that trains, so the plan holds the rule and not its
outcome: equal jobs have equal plans, wherever they were prepared. The outcome is in the checkpoint and in the card.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_trainer import world
from finetune_trainer.data.examples import Examples
from finetune_trainer.inputs import make_batch
from finetune_trainer.model import LanguageModel, load_base
from finetune_trainer.passes import passes
from finetune_trainer.runplan import RunPlan
from finetune_trainer.step_plan import StepPlan

log = logging.getLogger(__name__)

ComputedIn = Literal["fp32", "bf16", "bf16, then fp32"]  # the latter: it went on where bf16 is slow
_FASTER = 1.3  # to begin in bf16
_SLOWER = 0.8  # to leave it: two measurements on one node differ by less than these two bounds
_WORTH_FLOPS = 1e13  # of a whole run: with less, it is over before trying both has paid, and chance would choose
_SAME_LOSS_RATIO = 0.01  # of the first step: bf16 rounds each product by up to 0.4 %, a mean over tokens by far less


@dataclass(frozen=True)
class FirstPass:
    """The forward part of the first step's first pass."""

    loss: float  # nats per label token
    seconds: float


def computed_in(earlier: ComputedIn | None, dtype: torch.dtype, steps_left: int) -> ComputedIn:
    """Return what all steps of a run will have been computed in. earlier: those before this attempt, None: there are
    none.

    No attempt changes from fp32 to bf16: an earlier "fp32" before it is of a checkpoint that does not say what it is.
    """
    if dtype == torch.bfloat16:
        return "bf16"
    if earlier == "bf16" and steps_left:
        return "bf16, then fp32"
    return earlier or "fp32"


def load_for_training(
    folder: Path,
    plan: RunPlan,
    device: torch.device,
    *,
    examples: Examples,
    steps: StepPlan,
    earlier: ComputedIn | None,
) -> LanguageModel:
    """Return the base model in the precision that training computes in.

    earlier: what the steps before the resumed checkpoint were computed in, which is kept unless it is slow here; None:
    training begins, and in fp32 where the whole run is small. Raises as `load_base`.
    """
    exact = world.weight_dtype(device)
    is_small = 4 * plan.model.parameters * plan.train_tokens < _WORTH_FLOPS  # as in flops.py, by its largest part
    if exact != torch.float32 or earlier not in (None, "bf16") or (earlier is None and is_small):
        return load_base(folder, plan, device, exact)
    if world.bf16_speedup() < (_FASTER if earlier is None else _SLOWER):
        if earlier is not None:
            log.warning("earlier steps were computed in bf16, which is slow on this CPU: the others are in fp32")
        return load_base(folder, plan, device, exact)
    if earlier is not None:
        return load_base(folder, plan, device, torch.bfloat16)
    expected = first_pass(load_base(folder, plan, device, exact), plan, examples, steps)
    return _in_bf16(folder, plan, device, examples, steps, expected) or load_base(folder, plan, device, exact)


def _in_bf16(
    folder: Path, plan: RunPlan, device: torch.device, examples: Examples, steps: StepPlan, expected: FirstPass
) -> LanguageModel | None:
    """Return the model in bf16; None where its first pass has another loss than fp32's, or is hardly faster.

    The probe multiplies alone, a model does more: on 8 cores with AMX, which multiply over 5 times as fast in bf16,
    SmolLM2-135M's steps of 430 tokens became 1.15 times as fast, for a held-out loss that was 2 % higher.
    """
    try:
        lm = load_base(folder, plan, device, torch.bfloat16)
    except StageError as error:
        if error.fault is not Fault.UNSUPPORTED_MODEL:
            raise
        log.warning("computes in fp32, as in bf16 it does not pass: %s", error)
        return None
    found = first_pass(lm, plan, examples, steps)
    same = abs(found.loss - expected.loss) <= _SAME_LOSS_RATIO * expected.loss
    times = expected.seconds / max(1e-9, found.seconds)
    chosen = same and times >= _FASTER
    log.info(
        "computes in %s: the first pass is %.2g times as fast in bf16, its loss %.4f in bf16 and %.4f in fp32",
        "bf16" if chosen else "fp32",
        times,
        found.loss,
        expected.loss,
    )
    return lm if chosen else None


@torch.no_grad()
def first_pass(lm: LanguageModel, plan: RunPlan, examples: Examples, steps: StepPlan) -> FirstPass:
    """Run the first step's first pass forward twice and time the second, as the first one warms up."""
    hyper = plan.hyperparameters
    group = next(passes(examples, steps.examples_of(0), hyper.micro_batch_tokens, hyper.layout))
    batch = make_batch(examples, group, lm.device, hyper.layout)
    lm.nll_sum(batch)
    began_s = time.perf_counter()
    loss = float(lm.nll_sum(batch)) / max(1, len(batch.targets))
    return FirstPass(loss, time.perf_counter() - began_s)
