"""Why pods do not start, read from the cluster's events for all jobs that wait at once."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_operator import event_reader
from finetune_operator.cluster import UnreachableError
from finetune_operator.event_reader import MAX_AGE_S, EventReader
from hand_clock import Clock
from waiting import PATIENCE_S


class Events:
    """Namespaces with their events, and how often they were asked for."""

    def __init__(self) -> None:
        self.of: dict[str, list[dict[str, Any]]] = {}
        self.lists: list[str] = []
        self.single: list[str] = []
        self.fails = False

    def add(self, namespace: str, uid: str, reason: str, message: str = "no") -> None:
        event = {"involvedObject": {"uid": uid}, "reason": reason, "message": message, "lastTimestamp": "t", "x": "y"}
        self.of.setdefault(namespace, []).append(event)

    def list_events(self, namespace: str) -> Iterator[dict[str, Any]]:
        if self.fails:
            raise UnreachableError("cut")
        self.lists.append(namespace)
        return iter(self.of.get(namespace, []))

    def list_events_of(self, namespace: str, uid: str) -> list[dict[str, Any]]:
        self.single.append(uid)
        return [event for event in self.of[namespace] if event["involvedObject"]["uid"] == uid]


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reader(events: Events, clock: Clock) -> EventReader:
    return EventReader(events, lambda uid: uid.startswith("ours"), clock)


def messages(found: list[dict[str, Any]]) -> list[str]:
    return [event["message"] for event in found]


def test_three_hundred_jobs_that_wait_in_a_namespace_cost_one_list_in_ten_seconds(
    reader: EventReader, events: Events, clock: Clock
):
    for number in range(300):
        events.add("a", f"ours-{number}", "FailedCreate", f"quota {number}")
    for _ in range(3):
        told = [messages(reader.of("a", f"ours-{number}")) for number in range(300)]
        assert told == [[f"quota {number}"] for number in range(300)]
        clock.now_s += MAX_AGE_S + 1
    assert events.lists == ["a"] * 3
    assert events.single == []


def test_each_namespace_is_read_by_itself(reader: EventReader, events: Events):
    events.add("a", "ours-1", "FailedMount", "of a")
    events.add("b", "ours-1", "FailedMount", "of b")
    assert [messages(reader.of(namespace, "ours-1")) for namespace in ("a", "b", "a", "b")] == [
        ["of a"], ["of b"], ["of a"], ["of b"],
    ]  # fmt: skip
    assert events.lists == ["a", "b"]


def test_what_is_younger_than_the_last_list_is_read_with_the_next(reader: EventReader, events: Events, clock: Clock):
    assert reader.of("a", "ours-1") == []
    events.add("a", "ours-1", "FailedMount")
    clock.now_s += MAX_AGE_S + 0.1
    assert messages(reader.of("a", "ours-1")) == ["no"]


def test_only_telling_events_of_our_own_children_are_kept(reader: EventReader, events: Events):
    events.add("a", "ours-1", "Scheduled")
    events.add("a", "theirs", "FailedMount")
    events.add("a", "ours-1", "FailedMount", "volume")
    assert reader.of("a", "theirs") == []
    kept = reader.of("a", "ours-1")
    told = {"reason": "FailedMount", "message": "volume", "lastTimestamp": "t", "eventTime": None}
    assert kept == [{**told, "metadata": {"creationTimestamp": None}}]


def test_in_a_namespace_of_very_many_events_an_objects_own_are_asked_for(
    reader: EventReader, events: Events, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(event_reader, "MAX_READ", 3)
    for number in range(4):
        events.add("a", f"ours-{number}", "FailedMount", str(number))
    assert messages(reader.of("a", "ours-3")) == ["3"]
    assert events.single == ["ours-3"]


def test_a_namespace_where_nothing_waits_any_more_is_forgotten(reader: EventReader, events: Events, clock: Clock):
    reader.of("a", "ours-1")
    clock.now_s += MAX_AGE_S + 1
    reader.of("b", "ours-1")
    assert set(reader._reads) == {"b"}  # pyright: ignore[reportPrivateUsage]


def test_who_waits_too_long_for_the_reading_of_another_asks_for_its_own_events(
    reader: EventReader, events: Events, monkeypatch: pytest.MonkeyPatch
):
    """Else eight rounds would stand still one after the other, and the operator be restarted as stuck."""
    monkeypatch.setattr(event_reader, "MAX_WAIT_S", 0.01)
    begun, go_on = threading.Event(), threading.Event()
    events.add("a", "ours-1", "FailedMount", "volume")

    def slow(namespace: str) -> Iterator[dict[str, Any]]:
        begun.set()
        go_on.wait(PATIENCE_S)
        return iter(events.of[namespace])

    monkeypatch.setattr(events, "list_events", slow)
    first: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: first.extend(reader.of("a", "ours-1")), daemon=True)
    thread.start()
    assert begun.wait(PATIENCE_S)
    assert messages(reader.of("a", "ours-1")) == ["volume"]
    assert events.single == ["ours-1"]
    go_on.set()
    thread.join(PATIENCE_S)
    assert messages(first) == ["volume"]


def test_a_list_that_fails_is_told_and_asked_for_again(reader: EventReader, events: Events):
    events.fails = True
    with pytest.raises(UnreachableError):
        reader.of("a", "ours-1")
    events.fails = False
    assert reader.of("a", "ours-1") == []
    assert events.lists == ["a"]
