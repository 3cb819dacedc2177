"""The step, nothing else: forward, backward, clip, AdamW. The device always has a pass to work on.

The loss of a step is the sum over its units, which the method names, each times its example's weight, divided by the
step's planned denominator, so accumulation over forward passes changes nothing but rounding, however the sequences are
packed.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from finetune_api.job import Schedule
from finetune_trainer.data.examples import Examples, FlatSequence
from finetune_trainer.inputs import Batch, make_batch
from finetune_trainer.methods.method import Method
from finetune_trainer.model import LanguageModel
from finetune_trainer.passes import computed_tokens, passes
from finetune_trainer.policy import Scores
from finetune_trainer.runplan import Hyperparameters
from finetune_trainer.step_plan import StepPlan

ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8
_COSINE_FLOOR = 0.1  # share of the peak at the end, as in continued pre-training (https://arxiv.org/abs/2403.08763)


def learning_rate(step: int, hyper: Hyperparameters) -> float:
    """Learning rate of step `step`, counted from 0: linear warm-up, then the schedule down to the last step."""
    if step < hyper.warmup_steps:
        return hyper.learning_rate * (step + 1) / (hyper.warmup_steps + 1)
    done = (step - hyper.warmup_steps) / max(1, hyper.total_steps - hyper.warmup_steps)
    match hyper.schedule:
        case Schedule.CONSTANT:
            share = 1.0
        case Schedule.LINEAR:
            share = 1.0 - done
        case Schedule.COSINE:
            share = _COSINE_FLOOR + (1 - _COSINE_FLOOR) * (1 + math.cos(math.pi * done)) / 2
    return hyper.learning_rate * share


@dataclass(frozen=True)
class StepPart:
    """How far a running step has come."""

    step: int
    passes_done: int
    passes: int
    tokens_done: int


@torch.no_grad()
def log_ratios(lm: LanguageModel, batch: Batch) -> Tensor:
    """(S,) log of how many times as likely each sequence's labels are as they were before training."""
    assert batch.reference is not None, "they are compared with the model that the job began with"
    return Scores(lm, batch).sequences - batch.reference


class StepAbandonedError(Exception):
    """The step was given up between two passes; parameters and moments are those of the step before."""


@dataclass
class Stepper:
    """Runs planned steps on one model; the only state is the optimizer's and the parameters'."""

    lm: LanguageModel
    method: Method
    parameters: list[nn.Parameter]
    optimizer: torch.optim.AdamW
    examples: Examples
    steps: StepPlan
    hyper: Hyperparameters
    budget_tokens: int
    after_pass: Callable[[StepPart], bool] = lambda _part: True  # False gives the step up, if passes are left
    data_wait_s: float = 0.0  # host time spent on making batches; whoever reads it sets it back

    def run(self, step: int) -> Tensor:
        """Train step `step`; returns (3 + figures,) fp64 on the device: loss in nats per unit, gradient norm before
        clipping, 1 if all were finite, and the method's figures. Where they were not, AdamW leaves all as it was.

        Raises StepAbandonedError when `after_pass` says so.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), dtype=torch.float64, device=self.lm.device)
        figures = torch.zeros(len(self.method.figures), dtype=torch.float64, device=self.lm.device)
        denominator = float(self.steps.denominators[step]) or 1.0
        groups = self._passes_of(step)
        before = self._mismatched_passes(step)
        drift = self._drift(step, before, len(before) + len(groups))
        tokens_done = 0
        running: deque[torch.cuda.Event] = deque()
        for done, batch in enumerate(self._batches(self.examples, groups), start=1):
            compared = batch if drift is None else replace(batch, drift=drift)
            found = self.method.loss(Scores(self.lm, compared), compared)
            part = found.sum / denominator
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
            for place, name in enumerate(self.method.figures):
                figures[place] += found.figures[name].detach() / denominator
            tokens_done += batch.tokens
            self._let_run_ahead(running)
            self._go_on(StepPart(step, len(before) + done, len(before) + len(groups), tokens_done))
        norm = nn.utils.clip_grad_norm_(self.parameters, self.hyper.max_grad_norm)
        finite = torch.isfinite(loss) & torch.isfinite(norm) & torch.isfinite(figures).all()
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # fused AdamW skips on the device
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.hyper)
        self.optimizer.step()
        return torch.cat([torch.stack([loss, norm.double(), finite.double()]), figures])

    def _go_on(self, part: StepPart) -> None:
        """Tell of a pass that has ended. Raises StepAbandonedError where passes are left that shall not be run."""
        if not self.after_pass(part) and part.passes_done < part.passes:
            self.optimizer.zero_grad(set_to_none=True)
            raise StepAbandonedError

    def _drift(self, step: int, groups: Sequence[Sequence[FlatSequence]], passes: int) -> Tensor | None:
        """Return what `Batch.drift` is in this step; None for methods that do not ask for it."""
        if self.examples.mismatched is None:
            return None
        ratios: list[Tensor] = []
        for done, batch in enumerate(self._batches(self.examples.mismatched, groups), start=1):
            ratios.append(log_ratios(self.lm, batch))
            self._go_on(StepPart(step, done, passes, 0))
        return torch.cat(ratios).mean()

    def _mismatched_passes(self, step: int) -> list[list[FlatSequence]]:
        """Return the passes without gradients that come before those of a step."""
        if self.examples.mismatched is None:
            return []
        others, numbers = self.examples.mismatched, self.steps.examples_of(step)
        return list(passes(others, numbers, self.budget_tokens, self.hyper.layout))

    def largest_pass_tokens(self, step: int) -> int:
        """Return the tokens of the largest pass of a step."""
        layout = self.hyper.layout
        return max(sum(computed_tokens(self.examples, group, layout)) for group in self._passes_of(step))

    def _passes_of(self, step: int) -> list[list[FlatSequence]]:
        numbers, whole = self.steps.examples_of(step), self.method.denominator.keeps_examples_whole
        return list(passes(self.examples, numbers, self.budget_tokens, self.hyper.layout, whole=whole))

    def _let_run_ahead(self, running: deque[torch.cuda.Event]) -> None:
        """Wait for the pass before this one on CUDA: the host is one pass ahead, and what it reports has happened."""
        if self.lm.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        running.append(event)
        if len(running) > 1:
            running.popleft().synchronize()

    def _batches(self, examples: Examples, groups: Sequence[Sequence[FlatSequence]]) -> Iterator[Batch]:
        began_s = time.perf_counter()
        for group in groups:
            batch = make_batch(examples, group, self.lm.device, self.hyper.layout)
            self.data_wait_s += time.perf_counter() - began_s
            yield batch
            began_s = time.perf_counter()


def make_optimizer(parameters: list[nn.Parameter], hyper: Hyperparameters) -> torch.optim.AdamW:
    """Fused AdamW (https://arxiv.org/abs/1711.05101) with its state in place, so that a checkpoint can be copied in."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=hyper.learning_rate,
        betas=ADAM_BETAS,
        eps=ADAM_EPSILON,
        weight_decay=hyper.weight_decay,
        fused=True,
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer
