"""The step, nothing else: forward, backward, clip, AdamW. The device always has a pass to work on.

The loss of a step is the sum over its units, which the method names, each times its example's weight, divided by the
step's planned denominator, so accumulation over forward passes changes nothing but rounding, however the sequences are
packed.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune_api.job import Schedule
from finetune_trainer.batches import pack
from finetune_trainer.data.examples import Examples, FlatSequence
from finetune_trainer.inputs import Batch, make_batch
from finetune_trainer.methods.method import Method
from finetune_trainer.model import LanguageModel
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


def passes(
    sequences: Sequence[FlatSequence], lengths: Sequence[int], budget_tokens: int, packing: bool
) -> Iterator[list[FlatSequence]]:
    """Divide a step's sequences into forward passes of at most `budget_tokens`, or of one each without packing."""
    if not packing:
        yield from ([sequence] for sequence in sequences)
        return
    for places in pack(lengths, max(budget_tokens, max(lengths))):
        yield [sequences[place] for place in places]


@dataclass(frozen=True)
class StepPart:
    """How far a running step has come."""

    step: int
    passes_done: int
    passes: int
    tokens_done: int


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
        clipping, 1 if both were finite, and the method's figures. Where they were not, AdamW leaves all as it was.

        Raises StepAbandonedError when `after_pass` says so.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), dtype=torch.float64, device=self.lm.device)
        figures = torch.zeros(len(self.method.figures), dtype=torch.float64, device=self.lm.device)
        denominator = float(self.steps.denominators[step]) or 1.0
        groups = self._passes_of(step)
        tokens_done = 0
        running: deque[torch.cuda.Event] = deque()
        for done, batch in enumerate(self._batches(groups), start=1):
            found = self.method.loss(Scores(self.lm, batch), batch)
            part = found.sum / denominator
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
            for place, name in enumerate(self.method.figures):
                figures[place] += found.figures[name].detach() / denominator
            tokens_done += batch.tokens
            self._let_run_ahead(running)
            if not self.after_pass(StepPart(step, done, len(groups), tokens_done)) and done < len(groups):
                self.optimizer.zero_grad(set_to_none=True)
                raise StepAbandonedError
        norm = nn.utils.clip_grad_norm_(self.parameters, self.hyper.max_grad_norm)
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # fused AdamW skips on the device
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.hyper)
        self.optimizer.step()
        return torch.cat([torch.stack([loss, norm.double(), finite.double()]), figures])

    def largest_pass_tokens(self, step: int) -> int:
        """Return the tokens of the largest pass of a step."""
        return max(sum(self.examples.lengths(group)) for group in self._passes_of(step))

    def _passes_of(self, step: int) -> list[list[FlatSequence]]:
        sequences = self.examples.sequences_of(self.steps.examples_of(step))
        return list(passes(sequences, self.examples.lengths(sequences), self.budget_tokens, self.hyper.packing))

    def _let_run_ahead(self, running: deque[torch.cuda.Event]) -> None:
        """Wait for the pass before this one on CUDA: the host is one pass ahead, and what it reports has happened."""
        if self.lm.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        running.append(event)
        if len(running) > 1:
            running.popleft().synchronize()

    def _batches(self, groups: Sequence[Sequence[FlatSequence]]) -> Iterator[Batch]:
        began_s = time.perf_counter()
        for group in groups:
            batch = make_batch(self.examples, group, self.lm.device)
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
