"""The work queue, with a clock of the test's own."""

import threading
import tracemalloc

import pytest

from finetune_operator.queue import ROUND_LIMIT_S, WorkQueue
from hand_clock import Clock
from waiting import PATIENCE_S, until


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


@pytest.fixture
def queue(clock: Clock) -> WorkQueue[str]:
    return WorkQueue(clock, jitter=lambda: 1.0)


def drain(queue: WorkQueue[str]) -> list[str]:
    """Every key that is due now, without waiting."""
    queue.put("end", 0)
    found: list[str] = []
    while (key := queue.get()) is not None:
        queue.done(key)
        if key == "end":
            return found
        found.append(key)
    return found


def test_a_key_put_many_times_is_handed_out_once(queue: WorkQueue[str]):
    for _ in range(5):
        queue.put("a")
    assert drain(queue) == ["a"]


def test_keys_come_in_the_order_they_are_due(queue: WorkQueue[str], clock: Clock):
    queue.put("late", 5)
    queue.put("early", 1)
    clock.now_s += 5
    assert drain(queue) == ["early", "late"]


def test_a_delayed_key_is_not_handed_out_before_it_is_due(queue: WorkQueue[str], clock: Clock):
    queue.put("a", 10)
    assert drain(queue) == []
    clock.now_s += 10
    assert drain(queue) == ["a"]


def test_the_earlier_of_two_requests_counts(queue: WorkQueue[str], clock: Clock):
    queue.put("a", 10)
    queue.put("a")
    assert drain(queue) == ["a"]
    clock.now_s += 10
    assert drain(queue) == []


@pytest.mark.parametrize(("waited_s", "order"), [(29.0, ["new", "old"]), (31.0, ["old", "new"])])
def test_a_head_start_is_before_those_that_wait_for_less(
    queue: WorkQueue[str], clock: Clock, waited_s: float, order: list[str]
):
    queue.put("old")
    clock.now_s += waited_s
    queue.put("new", -30)
    assert drain(queue) == order


def test_a_key_is_never_in_work_twice_and_a_change_meanwhile_is_not_lost(queue: WorkQueue[str]):
    queue.put("a")
    assert queue.get() == "a"
    queue.put("a")
    assert drain(queue) == []
    queue.done("a")
    assert drain(queue) == ["a"]


def test_failures_back_off_from_1_to_60_seconds_and_success_starts_anew(queue: WorkQueue[str], clock: Clock):
    delays: list[float] = []
    for _ in range(8):
        queue.put("a")
        assert queue.get() == "a"
        delays.append(queue.retry("a"))
        clock.now_s += 100
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60]
    assert queue.get() == "a"
    queue.done("a")
    queue.put("a")
    assert queue.get() == "a"
    assert queue.retry("a") == 1


def test_half_of_the_back_off_is_chance(clock: Clock):
    queue: WorkQueue[str] = WorkQueue(clock, jitter=lambda: 0.0)
    queue.put("a")
    assert queue.get() == "a"
    assert queue.retry("a") == 0.5


def test_the_server_may_ask_for_a_longer_wait(queue: WorkQueue[str]):
    queue.put("a")
    assert queue.get() == "a"
    assert queue.retry("a", at_least_s=30) == 30


def test_an_event_ends_the_back_off(queue: WorkQueue[str]):
    queue.put("a")
    assert queue.get() == "a"
    queue.retry("a", at_least_s=50)
    queue.put("a")
    assert drain(queue) == ["a"]


def test_a_far_date_that_is_asked_for_in_every_round_does_not_fill_the_memory(queue: WorkQueue[str], clock: Clock):
    tracemalloc.start()
    try:
        for _ in range(2000):
            queue.put("a", 7 * 86400)
            queue.put("a")
            assert queue.get() == "a"
            queue.done("a")
            clock.now_s += 60
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()
    queue.put("a", 5)
    clock.now_s += 5
    assert queue.get() == "a"


def test_a_stuck_round_and_a_key_that_nobody_takes_are_seen(queue: WorkQueue[str], clock: Clock):
    assert queue.stuck_s() == 0
    queue.put("a")
    clock.now_s += 7
    assert queue.stuck_s() == 7
    assert queue.get() == "a"
    clock.now_s += 3
    assert queue.stuck_s() == 3
    assert queue.depth() == 1
    queue.done("a")
    assert queue.stuck_s() == 0


def test_a_long_queue_from_which_keys_are_taken_is_not_stuck(queue: WorkQueue[str], clock: Clock):
    for number in range(10_000):
        queue.put(str(number))
    for _ in range(100):
        key = queue.get()
        clock.now_s += 20
        assert key is not None
        queue.done(key)
        assert queue.stuck_s() == 20
    clock.now_s += 150
    assert queue.stuck_s() == 170


def test_a_slow_round_whose_requests_are_answered_is_not_stuck_until_it_never_ends(queue: WorkQueue[str], clock: Clock):
    for key in ("slow", "waits"):
        queue.put(key)
    assert queue.get() == "slow"
    for _ in range(int(ROUND_LIMIT_S / 30)):
        clock.now_s += 30
        assert queue.stuck_s() == 30
        queue.moved("slow")
    clock.now_s += 1
    queue.moved("slow")
    assert queue.stuck_s() > ROUND_LIMIT_S


def test_one_stuck_round_is_seen_beside_others_that_move(queue: WorkQueue[str], clock: Clock):
    for key in ("stuck", "moves"):
        queue.put(key)
    assert {queue.get(), queue.get()} == {"stuck", "moves"}
    for _ in range(5):
        clock.now_s += 30
        queue.moved("moves")
    assert queue.stuck_s() == 150


def test_who_closes_the_queue_can_wait_for_the_rounds_in_work():
    queue: WorkQueue[str] = WorkQueue()
    queue.put("a")
    assert queue.get() == "a"
    queue.close()
    assert not queue.wait_until_idle(0.01)
    threading.Timer(0.05, queue.done, ("a",)).start()
    assert queue.wait_until_idle(PATIENCE_S)


def test_closing_wakes_all_workers():
    queue: WorkQueue[str] = WorkQueue()
    found: list[str | None] = []
    workers = [threading.Thread(target=lambda: found.append(queue.get())) for _ in range(3)]
    for worker in workers:
        worker.start()
    queue.close()
    for worker in workers:
        worker.join(PATIENCE_S)
    assert found == [None, None, None]


def test_many_workers_do_every_key_and_none_at_the_same_time():
    queue: WorkQueue[int] = WorkQueue()
    lock, busy, rounds = threading.Lock(), set[int](), list[int]()

    def work() -> None:
        while (key := queue.get()) is not None:
            with lock:
                assert key not in busy
                busy.add(key)
                rounds.append(key)
            with lock:
                busy.remove(key)
            queue.done(key)

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for number in range(3000):
        queue.put(number % 50)
    until(lambda: not queue.depth(), "all keys are done")
    queue.close()
    for worker in workers:
        worker.join(PATIENCE_S)
    assert set(rounds) == set(range(50))
