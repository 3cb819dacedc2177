"""The loop around the step: reads figures late so that no step waits, evaluates, saves, stops on request."""

import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from torch import Tensor, nn

from finetune_api.errors import StageError
from finetune_api.quality import Quality
from finetune_api.reasons import Fault
from finetune_trainer import guard, quality
from finetune_trainer.checkpoint import MAX_EVALUATIONS, Checkpointer, Position, Snapshot, snapshot
from finetune_trainer.data.examples import Examples
from finetune_trainer.evaluate import HeldOut, Measurement, held_out_loss, sampled_rows
from finetune_trainer.flops import ModelSize, step_flops
from finetune_trainer.logs import bind_step
from finetune_trainer.loop import StepAbandonedError, StepPart, Stepper, learning_rate
from finetune_trainer.metrics import MetricsFile, TrainMetrics
from finetune_trainer.passes import computed_tokens
from finetune_trainer.patience import ENDS_AT_ONCE
from finetune_trainer.replay import losses_apart
from finetune_trainer.serve import Reporter
from finetune_trainer.stop import StopFlag
from finetune_trainer.world import device_memory

log = logging.getLogger(__name__)

_SPEED_WINDOW_STEPS = 50
_LOG_INTERVAL_S = 10.0


class _Figures(NamedTuple):
    """What a step came to. others: those that its method names, in their order."""

    loss: float
    norm: float
    finite: bool
    others: list[float]


@dataclass(frozen=True)
class _Reading:
    """A step's figures on their way to the host."""

    step: int
    values: Tensor  # (3 + figures,) fp64 on the host once `arrived`: what `Stepper.run` returns
    arrived: torch.cuda.Event | None

    def wait(self) -> _Figures:
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm, finite, *others = self.values.tolist()
        return _Figures(loss, norm, bool(finite), others)


def _read_later(step: int, values: Tensor) -> _Reading:
    """Begin to copy a step's figures to the host."""
    if not values.is_cuda:
        return _Reading(step, values, None)
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return _Reading(step, host, arrived)


class _Timed(NamedTuple):
    """What a step did, and in which time."""

    tokens: int
    seconds: float
    flops: int


@dataclass
class Session:
    """One attempt's training, from a position to the last step of the plan or a request to stop."""

    stepper: Stepper
    adapted: PeftModel
    parameters: dict[str, nn.Parameter]
    held_out: Examples | None
    end_ids: list[int] | None  # tokens that end answers, measured on the held-out rows; None: there are no answers
    last_ends: bool  # only the last end of a row is an answer's for sure
    position: Position
    checkpointer: Checkpointer
    stop: StopFlag
    reporter: Reporter
    metrics: TrainMetrics
    metrics_file: MetricsFile
    watchdog: guard.Watchdog
    replayed: npt.NDArray[np.bool_] | None = None  # (held-out rows,) which are replayed; None: nothing is
    model_size: ModelSize | None = None
    peak_flops: float | None = None  # of the GPU; without it, or without the model's size, there is no MFU
    _pending: deque[_Reading] = field(default_factory=deque[_Reading])
    _recent: deque[_Timed] = field(default_factory=partial(deque[_Timed], maxlen=_SPEED_WINDOW_STEPS))
    _losses: deque[float] = field(default_factory=partial(deque[float], maxlen=guard.SPIKE_WINDOW_STEPS))
    _step_began_s: float = 0.0
    _running_since_s: float = 0.0
    _logged_s: float = 0.0

    def run(self) -> bool:
        """Run the remaining steps; False when asked to stop before the last one. Ends with a checkpoint either way.

        After the last step a checkpoint that cannot be saved is done without, as the commit makes it needless. Raises
        NOT_FINITE, GPU_OOM, ADAPTER_NO_EFFECT, what ends an attempt that cannot save (see `patience`), and STOPPED
        when asked to stop and the time did not suffice for a checkpoint.
        """
        total = self.stepper.hyper.total_steps
        self.stepper.after_pass = self._after_pass
        self.reporter.update(quality=self.quality())
        if not self.position.evaluations:
            self._evaluate()  # a new adapter changes nothing yet, and an earlier one belongs to the start
        self.reporter.update(activity="Training")
        self._train(total)
        done = self.position.step == total
        if done and self.held_out is not None and self._evaluated_step() != total:
            self._evaluate()
            done = self._evaluated_step() == total
        self.reporter.update(activity="Saving")
        saved = self.checkpointer.finish(self._snapshot, self.position.step, self.stop)
        if not saved and self.stop.is_set():
            raise StageError(Fault.STOPPED)
        return done

    @property
    def saved(self) -> bool:
        """Whether the state after the newest step is in a checkpoint."""
        return self.checkpointer.is_saved(self.position.step)

    def save_last(self) -> None:
        """Try once more, for half of the time that a stop leaves, to save the state after the last step.

        What storage refuses ends nothing: the commit may still go through. Raises as a newer writer ends an attempt.
        """
        if self.saved:
            return
        try:
            self.checkpointer.start(self._snapshot())
            self.checkpointer.wait(self.stop.remaining_s() / 2)
        except StageError as error:
            if error.fault in ENDS_AT_ONCE:
                raise
            log.warning("the last step is in no checkpoint: %s", error)

    def quality(self) -> Quality | None:
        """Return what is known of the model: only what its steps say until it is measured, None if that is nothing."""
        position = self.position
        measured = self.held_out is None or self._evaluated_step() == position.step
        if position.step < self.stepper.hyper.total_steps or not measured:
            start = position.evaluations[0] if position.evaluations else None
            return quality.while_training(position.first_loss, position.steps_above_start, start)
        no_ends = self.end_ids is not None and not self.end_ids
        return quality.after_training(
            position.evaluations,
            position.first_loss,
            position.steps_above_start,
            no_ends=no_ends,
            unit=self.stepper.method.denominator.unit,
        )

    def _evaluated_step(self) -> int | None:
        evaluations = self.position.evaluations
        return evaluations[-1].step if evaluations else None

    def _train(self, total: int) -> None:
        first = self.position.step
        oom = guard.OomRetry(self.metrics.oom_retries.inc)
        lag = 1 if self.stepper.lm.device.type == "cuda" else 0
        self._step_began_s = time.monotonic()
        for step in range(first, total):
            if step % self.stepper.hyper.eval_interval_steps == 0 and step not in (0, self._evaluated_step()):
                self._account(keep=0)
                self._evaluate(sampled=True)
            if self.stop.is_set():
                break
            self.checkpointer.check()
            self.watchdog.begin(step)
            self._running_since_s = time.monotonic()
            try:
                self._pending.append(_read_later(step, oom.run(step, self.stepper)))
            except StepAbandonedError:
                log.info(
                    "step %d would take longer than the stop leaves time for: it is left to the next attempt", step
                )
                break
            self._account(keep=lag)
            self.watchdog.end()
            if step == first:
                guard.check_gradients(self.parameters)
            if self.checkpointer.is_due():
                self._account(keep=0)
                self.checkpointer.start(self._snapshot())
        self._account(keep=0)
        self.watchdog.end()

    def _after_pass(self, part: StepPart) -> bool:
        """Tell that the step moves; False gives it up, when a stop leaves no time for its other passes."""
        self.watchdog.beat()
        self.reporter.touch()
        seconds = max(1e-9, time.monotonic() - self._running_since_s)
        fields: dict[str, object] = {"step_tokens": part.tokens_done}
        if (
            not self._recent and part.tokens_done and part.passes_done < part.passes
        ):  # the first step has no other speed to tell
            speed = part.tokens_done / seconds
            left = self.stepper.steps.total_tokens - self.position.tokens - part.tokens_done
            fields |= {"tokens_per_second": speed, "eta_seconds": left / speed}
        self.reporter.update(**fields)
        return self.stop.leaves(seconds * (part.passes - part.passes_done) / part.passes_done)

    def _account(self, keep: int) -> None:
        """Take in the figures of all steps but the newest `keep`. Raises NOT_FINITE."""
        while len(self._pending) > keep:
            reading = self._pending.popleft()
            figures = reading.wait()
            loss, finite = figures.loss, figures.finite
            now_s = time.monotonic()
            seconds, self._step_began_s = now_s - self._step_began_s, now_s
            steps, before = self.stepper.steps, self.position
            tokens, labels = int(steps.tokens[reading.step]), int(steps.label_tokens[reading.step])
            first_loss = before.first_loss if before.first_loss is not None or not finite else loss
            above = before.steps_above_start
            if finite and first_loss is not None:
                above = quality.steps_above_start(above, loss, first_loss)
            self.position = before.model_copy(
                update={
                    "step": reading.step + 1,
                    "tokens": before.tokens + tokens,
                    "label_tokens": before.label_tokens + (labels if finite else 0),
                    "first_loss": first_loss,
                    "steps_above_start": above,
                    "nonfinite_steps": before.nonfinite_steps + (not finite),
                    "nonfinite_in_a_row": guard.nonfinite_in_a_row(before.nonfinite_in_a_row, finite, reading.step + 1),
                    "kept_seconds": before.kept_seconds + seconds,
                }
            )
            self._recent.append(_Timed(tokens, seconds, self._flops(reading.step, labels)))
            bind_step(self.position.step)
            self._report(reading.step, figures, tokens, labels, seconds)

    def _flops(self, step: int, labels: int) -> int:
        if self.peak_flops is None or self.model_size is None:
            return 0
        examples = self.stepper.examples
        sequences = examples.sequences_of(self.stepper.steps.examples_of(step))
        computed = computed_tokens(examples, sequences, self.stepper.hyper.layout)
        return step_flops(self.model_size, examples.lengths(sequences), labels, computed)

    def _report(self, step: int, figures: _Figures, tokens: int, labels: int, seconds: float) -> None:
        steps, position = self.stepper.steps, self.position
        loss, norm, finite, others = figures
        recent_s = max(1e-9, sum(timed.seconds for timed in self._recent))
        speed = sum(timed.tokens for timed in self._recent) / recent_s
        rate = learning_rate(step, self.stepper.hyper)
        measured = dict(zip(self.stepper.method.figures, others, strict=True))
        self.reporter.update(
            step=position.step,
            step_tokens=0,
            train_loss=loss,
            figures={name: value for name, value in measured.items() if math.isfinite(value)},
            learning_rate=rate,
            tokens_per_second=speed,
            tokens_total=position.tokens,
            eta_seconds=(steps.total_tokens - position.tokens) / max(1e-9, speed),
            quality=self.quality(),
        )
        self.metrics.step_seconds.observe(seconds)
        self.metrics.grad_norm.set(norm)
        for name, value in measured.items():
            self.metrics.method_figures.labels(name).set(value)
        self.metrics.label_tokens.inc(labels if finite else 0)
        self.metrics.steps_above_start.set(position.steps_above_start)
        self.metrics.nonfinite_steps.inc(not finite)
        waited_s, self.stepper.data_wait_s = self.stepper.data_wait_s, 0.0
        self.metrics.data_wait.inc(waited_s)
        if finite:
            self.metrics.loss_spikes.inc(guard.is_spike(loss, self._losses))
            self._losses.append(loss)
        if self.peak_flops is not None and self.model_size is not None:
            self.metrics.mfu_ratio.set(sum(timed.flops for timed in self._recent) / recent_s / self.peak_flops)
        self.metrics.epoch_ratio.set(steps.step_offsets[step + 1] / max(1, len(self.stepper.examples)))
        self.metrics.goodput_ratio.set(position.kept_seconds / max(1e-9, time.time() - position.first_started_at))
        if memory := device_memory(self.stepper.lm.device):
            self.metrics.gpu_memory_peak.set(memory.peak_bytes)
            self.metrics.gpu_memory_reserved.set(memory.reserved_bytes)
        self.metrics_file.step(
            position.step,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens=tokens,
            seconds=round(seconds, 4),
            **measured,
        )
        now_s = time.monotonic()
        if position.steps_above_start == quality.DIVERGING_STEPS:
            log.warning("the loss has been far above the first step's for %d steps", position.steps_above_start)
        if not finite:
            log.warning("step %d had a loss, gradient or figure that is not finite and was skipped", position.step)
        elif now_s - self._logged_s >= _LOG_INTERVAL_S:
            self._logged_s = now_s
            log.info("step %d/%d loss %.4f, %.0f tokens/s", position.step, len(steps), loss, speed)

    def _evaluate(self, sampled: bool = False) -> None:
        """Measure the loss of all held-out rows or of the sample; nothing without such or once asked to stop."""
        if self.held_out is None:
            return
        sample = sampled_rows(len(self.held_out), self.stepper.hyper.seed)
        rows = sample if sampled else None
        self.reporter.update(activity="Evaluating")
        stepper = self.stepper
        measured = held_out_loss(
            stepper.lm,
            stepper.method,
            self.held_out,
            stepper.budget_tokens,
            stepper.hyper.layout,
            self.position.step,
            self.stop,
            self.reporter.touch,
            rows=rows,
            end_ids=self.end_ids or (),
            last_ends=self.last_ends,
        )
        if measured is not None:
            measured = self._told_apart(measured, rows)
            found = self._compared(measured if sampled or len(sample) == len(self.held_out) else measured.of(sample))
            # The base's stays first, the oldest of the others go.
            earlier = self.position.evaluations
            kept = [*earlier[:1], *earlier[1:][-(MAX_EVALUATIONS - 2) :], found]
            self.position = self.position.model_copy(update={"evaluations": kept})
            self.reporter.update(eval_loss=found.loss, base_eval_loss=kept[0].loss, quality=self.quality())
            if kept[0].end_probability is not None and found.end_probability is not None:
                self.metrics.base_end_probability.set(kept[0].end_probability)
                self.metrics.end_probability.set(found.end_probability)
            self.metrics_file.evaluation(found.step, found.loss, found.figures)
            log.info("held-out loss %.4f after step %d", found.loss, found.step)
        self.reporter.update(activity="Training")
        self._step_began_s = time.monotonic()

    def _told_apart(self, measured: Measurement, rows: Sequence[int] | None) -> Measurement:
        """Add the losses of new and of replayed rows: the second says what was forgotten. rows: None for all."""
        if self.replayed is None:
            return measured
        replayed = self.replayed if rows is None else self.replayed[rows]
        apart = losses_apart(measured.row_losses, measured.row_units, replayed)
        figures = {**measured.held_out.figures, **apart}
        return replace(measured, held_out=measured.held_out.model_copy(update={"figures": figures}))

    def _compared(self, measured: Measurement) -> HeldOut:
        """Compare a measurement of the sample with the first one, row by row, which is kept to be compared with."""
        if not self.position.evaluations:
            self.position = self.position.model_copy(update={"start_row_losses": measured.row_losses})
            return measured.held_out
        start = self.position.start_row_losses
        if len(start) != len(measured.row_losses):  # resumed from a checkpoint of a release that kept none
            return measured.held_out
        change = quality.paired_change(start, measured.row_losses, measured.row_units)
        return measured.held_out.model_copy(update={"change": change.nats, "change_error": change.standard_error})

    def _snapshot(self) -> Snapshot:
        """Copy what a checkpoint holds; the loop waits for this alone."""
        began_s = time.monotonic()
        copied = snapshot(self.parameters, self.stepper.optimizer, self.position)
        self._step_began_s = time.monotonic()
        self.metrics.checkpoint_stall.set(self._step_began_s - began_s)
        return copied
