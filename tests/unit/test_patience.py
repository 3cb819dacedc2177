"""How long a run waits for a store: growing pauses, a bound, one last try, and no wait for another writer."""

import pytest

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_trainer.patience import (
    MAX_AWAY_S,
    MAX_PAUSE_S,
    FailedTries,
    Patience,
    after_failure,
    best_effort,
    pause_s,
)

AWAY = StageError(Fault.STORAGE_UNAVAILABLE, action="write", uri="s3://b/x", tries=12, seconds=70, problem="down")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


def test_pauses_grow_from_30_seconds_to_five_minutes() -> None:
    assert [pause_s(tries) for tries in (1, 2, 3, 4, 5, 6, 999)] == [30, 60, 120, 240, 300, 300, MAX_PAUSE_S]
    assert [pause_s(tries, hurried=True) for tries in (1, 2, 3)] == [1, 2, 4]


def test_the_last_try_comes_when_the_bound_is_reached_and_tells_the_whole_time() -> None:
    clock, told = Clock(), list[FailedTries | None]()

    def work() -> None:
        clock.now_s += 70  # the store's own tries
        raise AWAY

    with pytest.raises(StageError) as caught:
        Patience(clock, clock.sleep, told.append).keep_trying(work)
    assert clock.now_s == pytest.approx(100 + MAX_AWAY_S + 70)
    assert caught.value.args_by_name["seconds"] == MAX_AWAY_S + 70
    assert caught.value.args_by_name["tries"] == len(told) + 1
    assert [trouble.since_s for trouble in told if trouble is not None] == [100.0] * len(told)


def test_a_try_under_way_when_the_bound_is_reached_is_not_the_last_one() -> None:
    trouble = after_failure(None, AWAY, 0.0, MAX_AWAY_S + 5)
    assert trouble.next_s == MAX_AWAY_S + 5, "the store may be back by now"
    with pytest.raises(StageError):
        after_failure(trouble, AWAY, MAX_AWAY_S + 5, MAX_AWAY_S + 9)


def test_success_ends_the_trouble() -> None:
    clock, told, failures = Clock(), list[FailedTries | None](), [AWAY, AWAY]

    def work() -> str:
        if failures:
            raise failures.pop()
        return "done"

    assert Patience(clock, clock.sleep, told.append).keep_trying(work) == "done"
    assert clock.slept == [30, 60]
    assert [trouble and trouble.tries for trouble in told] == [1, 2, None]


@pytest.mark.parametrize("fault", [Fault.SUPERSEDED, Fault.OUTPUT_CONFLICT])
def test_another_writer_is_not_waited_for(fault: Fault) -> None:
    with pytest.raises(StageError) as caught:
        after_failure(None, StageError(fault), 0.0, 1.0)
    assert caught.value.fault is fault


def test_best_effort_hides_what_storage_and_disk_refuse_and_no_bug() -> None:
    for error in (AWAY, OSError(28, "full")):
        with best_effort("tidying"):
            raise error
    with pytest.raises(ZeroDivisionError), best_effort("tidying"):
        raise ZeroDivisionError
