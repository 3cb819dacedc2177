"""How long a run waits for a store that is away, and what it does without: one failed write never ends hours of work.

A write that fails is tried again after 30 s, then after twice as long each time, five minutes at most. Only when the
store has been away for half an hour does the attempt end, and not before one last try. A newer writer ends it at once.
"""

import logging
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_trainer.store import PreconditionFailed

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 30.0
MAX_PAUSE_S = 300.0
MAX_AWAY_S = 1800.0  # from the beginning of the first try that failed
FIRST_HURRIED_PAUSE_S = 1.0  # once asked to stop: the grace period is all there is
# Another writer has the folder, or the time to stop is over.
ENDS_AT_ONCE = (Fault.SUPERSEDED, Fault.OUTPUT_CONFLICT, Fault.INTERRUPTED, Fault.STOPPED)

T = TypeVar("T")


@dataclass(frozen=True)
class FailedTries:
    """Tries in a row that failed. Times are monotonic."""

    error: StageError  # of the last try
    since_s: float  # when the first of them began
    tries: int
    next_s: float  # when to try again


def pause_s(tries: int, *, hurried: bool = False) -> float:
    """Return how long to wait after so many failed tries."""
    return min(MAX_PAUSE_S, (FIRST_HURRIED_PAUSE_S if hurried else FIRST_PAUSE_S) * 2 ** min(tries - 1, 20))


def after_failure(before: FailedTries | None, error: StageError, began_s: float, now_s: float) -> FailedTries:
    """Return the trouble with one more try that began at `began_s` and failed.

    Raises `error` when no further try is due: another writer has taken over, or the try was the last one."""
    since_s = began_s if before is None else before.since_s
    tries = 1 if before is None else before.tries + 1
    if error.fault in ENDS_AT_ONCE:
        raise error
    if began_s - since_s >= MAX_AWAY_S:
        raise _over_all_tries(error, tries, now_s - since_s)
    # The last try comes when the bound is reached, not a whole pause later.
    next_s = max(now_s, min(now_s + pause_s(tries), since_s + MAX_AWAY_S))
    return FailedTries(error, since_s, tries, next_s)


def _over_all_tries(error: StageError, tries: int, seconds: float) -> StageError:
    """Return the error with the time over all tries, where its words tell a time."""
    if "seconds" not in error.args_by_name:
        return error
    return StageError(error.fault, **(error.args_by_name | {"tries": tries, "seconds": round(seconds)}))


@dataclass
class Patience:
    """Tries one piece of work after another until it succeeds, telling about the trouble meanwhile.

    `wait(seconds)` sleeps; it may raise to end the work, as when the time to stop is over."""

    clock: Callable[[], float]
    wait: Callable[[float], None]
    on_trouble: Callable[[FailedTries | None], None]
    trouble: FailedTries | None = field(default=None, init=False)

    def keep_trying(self, work: Callable[[], T]) -> T:
        """Return what `work()` returns. Raises what it failed with at the end of all patience; see `after_failure`."""
        while True:
            began_s = self.clock()
            try:
                done = work()
            except StageError as error:
                self.trouble = after_failure(self.trouble, error, began_s, self.clock())
                log.warning("%s; tried again in %.0f s", error, self.trouble.next_s - self.clock())
                self.on_trouble(self.trouble)
                self.wait(max(0.0, self.trouble.next_s - self.clock()))
                continue
            if self.trouble is not None:
                self.trouble = None
                self.on_trouble(None)
            return done


@contextmanager
def best_effort(what: str, but: Collection[Fault] = ()) -> Generator[None]:
    """Log what storage or the disk refuses instead of raising it, for work that no job may end of, such as tidying.

    but: faults that are raised all the same."""
    try:
        yield
    except (StageError, PreconditionFailed, OSError) as error:
        if isinstance(error, StageError) and error.fault in but:
            raise
        log.warning("%s: %s", what, error)
