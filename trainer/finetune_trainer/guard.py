"""What stops a run that goes wrong: values that are not finite, a step that never ends, a GPU without memory."""

import faulthandler
import logging
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_trainer.loop import Stepper
from finetune_trainer.world import release_memory

log = logging.getLogger(__name__)

MAX_NONFINITE_IN_A_ROW = 3
SPIKE_WINDOW_STEPS = 50
MIN_SPIKE_STEPS = 10
MAX_OOM_RETRIES = 3
STALL_FLOOR_S = 300.0
FIRST_STALL_S = 1800.0
STALL_FACTOR = 10
WATCH_EVERY_S = 1.0
# A turn of the watch that took as long: the process was paused, as a container and a virtual machine can be.
PAUSE_S = 30.0
_MAX_NAMED = 8


def nonfinite_in_a_row(before: int, finite: bool, step: int) -> int:
    """The new number of steps in a row that were skipped. Raises NOT_FINITE at the third."""
    if finite:
        return 0
    if before + 1 >= MAX_NONFINITE_IN_A_ROW:
        raise StageError(Fault.NOT_FINITE, count=before + 1, step=step)
    return before + 1


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """Whether a loss stands out from those of the steps before it: above median + 6·MAD, and above 1.5·median, as a
    loss that hardly varied must not count for every ripple."""
    if len(before) < MIN_SPIKE_STEPS:
        return False
    median = statistics.median(before)
    deviation = statistics.median(abs(value - median) for value in before)
    return loss > max(median + 6 * deviation, 1.5 * median)


def check_gradients(parameters: dict[str, nn.Parameter]) -> None:
    """After an attempt's first step: the loss must depend on the adapter.

    Single matrices may have no gradient, such as those of queries in rows of two tokens, or of a layer whose weights
    the model multiplies by itself: they are named in the log. All of them may not: raises ADAPTER_NO_EFFECT.
    """
    # The gradient of A is zero as long as B is, so B tells.
    gradients = {name: p.grad for name, p in parameters.items() if "lora_B" in name}
    idle = [name for name, gradient in gradients.items() if gradient is None or not bool((gradient != 0).any())]
    if len(idle) == len(gradients):
        raise StageError(Fault.ADAPTER_NO_EFFECT, difference=0.0)
    if idle:
        named = ", ".join(name.partition(".lora_B")[0] for name in idle[:_MAX_NAMED])
        log.warning("%d of %d adapted layers did not learn in this step: %s", len(idle), len(gradients), named)


@dataclass
class OomRetry:
    """Repeats a step in passes of half the tokens when the GPU's memory runs out: same rows, same update."""

    on_retry: Callable[[], None]
    retries: int = 0

    def run(self, step: int, stepper: Stepper) -> Tensor:
        """What `stepper.run(step)` returns. Raises GPU_OOM when three halvings over the attempt did not help."""
        while True:
            try:
                return stepper.run(step)
            except torch.cuda.OutOfMemoryError as error:
                if self.retries == MAX_OOM_RETRIES:
                    raise StageError(Fault.GPU_OOM, step=step) from error
            # Outside the handler: the error's trace holds the failed pass's tensors.
            self.retries += 1
            self.on_retry()
            # Half of what the pass held: the plan's budget may be many times the tokens of a step.
            stepper.budget_tokens = max(1, min(stepper.budget_tokens, stepper.largest_pass_tokens(step)) // 2)
            log.warning("GPU memory ran out at step %d; passes of %d tokens from now on", step, stepper.budget_tokens)
            release_memory()


def stall_limit_s(pass_seconds: Sequence[float], first_limit_s: float = FIRST_STALL_S) -> float:
    """Return how long a forward and backward pass may take: ten times the median so far, at least five minutes.

    Nothing is known of the first one but what was planned: it may take `first_limit_s`."""
    return max(STALL_FLOOR_S, STALL_FACTOR * statistics.median(pass_seconds)) if pass_seconds else first_limit_s


class Watchdog:
    """Notices that no pass ends any more, dumps all stacks to stderr and calls `on_stall(step, seconds)`, once.

    Passes are watched, not steps: a step has as many of them as its batch needs, and one pass knows no other's number.
    The main thread is stuck then, perhaps in a kernel, and cannot be interrupted: `on_stall` has to end the process.
    """

    def __init__(
        self,
        on_stall: Callable[[int, float], None],
        clock: Callable[[], float] = time.monotonic,
        first_limit_s: float = FIRST_STALL_S,
    ) -> None:
        self._on_stall = on_stall
        self._clock = clock
        self._first_limit_s = first_limit_s
        self._durations: deque[float] = deque(maxlen=100)
        self._lock = threading.Lock()
        self._last_s: float | None = None  # None: not watching
        self._looked_s = clock()
        self._step = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._looked_s = self._clock()
        self._thread.start()

    def begin(self, step: int) -> None:
        """A step begins."""
        with self._lock:
            self._step, self._last_s = step, self._clock()

    def beat(self) -> None:
        """A pass of the running step has ended."""
        with self._lock:
            if self._last_s is not None:
                now_s = self._clock()
                self._durations.append(now_s - self._last_s)
                self._last_s = now_s

    def end(self) -> None:
        """A step has ended; nothing is watched until the next one begins."""
        with self._lock:
            self._last_s = None

    def overdue(self) -> tuple[int, float] | None:
        """Return (step, seconds) if the running pass takes too long."""
        with self._lock:
            return self._overdue(self._clock())

    def look(self) -> tuple[int, float] | None:
        """Return what `overdue` does. After a pause the running pass gets its whole time again: it could not go on."""
        with self._lock:
            now_s = self._clock()
            if self._last_s is not None and now_s - self._looked_s > PAUSE_S:
                self._last_s = now_s
            self._looked_s = now_s
            return self._overdue(now_s)

    def _overdue(self, now_s: float) -> tuple[int, float] | None:
        if self._last_s is None:
            return None
        elapsed_s = now_s - self._last_s
        limit_s = stall_limit_s(list(self._durations), self._first_limit_s)
        return (self._step, elapsed_s) if elapsed_s > limit_s else None

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(WATCH_EVERY_S):
            if late := self.look():
                faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
                log.error("no forward or backward pass finished for %.0f s after step %d", late[1], late[0])
                self._on_stall(*late)
                return


@contextmanager
def watching(watchdog: Watchdog) -> Generator[None]:
    """Run the watchdog for the length of a block."""
    watchdog.start()
    try:
        yield
    finally:
        watchdog.close()
