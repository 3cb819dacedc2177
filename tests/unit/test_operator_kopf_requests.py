"""What Kopf reads of a watch: nothing in it ends the watch for good."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from finetune_operator import kopf_requests
from finetune_operator.kopf_requests import FORGOTTEN_S, RETRY_AFTER_S, Failures, IsEcho, WatchStream
from hand_clock import Clock

ADDED = b'{"type":"ADDED","object":{"metadata":{"name":"a"}}}'
LIST_ANEW = {"type": "ERROR", "object": {"code": 410}}


class Content:
    def __init__(self, *chunks: bytes) -> None:
        self._chunks = chunks

    def exception(self) -> str:
        return "as aiohttp asks"

    async def iter_chunked(self, n: int) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            yield chunk


@pytest.fixture
def slept_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(kopf_requests.asyncio, "sleep", sleep)
    return slept


def read(*chunks: bytes, failures: Failures | None = None, is_echo: IsEcho = lambda _: False) -> list[bytes]:
    async def all_lines() -> list[bytes]:
        stream = WatchStream("/jobs", Content(*chunks), failures or Failures(), is_echo)
        return [line async for line in stream.iter_chunked(1024)]

    return asyncio.run(all_lines())


def test_events_pass_however_they_are_cut_into_chunks_and_what_has_no_end_does_not(slept_s: list[float]):
    text = ADDED + b"\n" + ADDED + b"\n" + ADDED[:20]
    for size in (1, 7, 1000):
        assert read(*(text[at : at + size] for at in range(0, len(text), size))) == [ADDED + b"\n"] * 2
    assert slept_s == []
    assert WatchStream("/jobs", Content(), Failures(), lambda _: False).exception() == "as aiohttp asks"


@pytest.mark.usefixtures("slept_s")
def test_changes_that_are_echoes_are_left_out_and_nothing_else():
    def line(event: str, version: str) -> bytes:
        return b'{"type":"%s","object":{"metadata":{"resourceVersion":"%s"}}}' % (event.encode(), version.encode())

    lines = [line("ADDED", "7"), line("MODIFIED", "7"), line("MODIFIED", "8"), line("DELETED", "7")]
    no_object = b'{"type":"MODIFIED","object":[]}'
    seen = read(
        b"\n".join([*lines, no_object, b""]), is_echo=lambda body: body == {"metadata": {"resourceVersion": "7"}}
    )
    assert seen == [each + b"\n" for each in (lines[0], *lines[2:], no_object)]


@pytest.mark.parametrize(
    "line",
    [
        b'{"type":"ERROR","object":{"kind":"Status","code":500,"reason":"InternalError"}}',
        b'{"type": "ERROR", "object": {"code": 403}}',
        b'{"type":"ERROR","object":{"code":504,"reason":"Timeout"}}',
        b'{"type":"ERROR","object":{"code":410,"reason":"Expired"}}',
        b'{"type":"ERROR","object":{"message":"no code"}}',
        b'{"type":"ERROR","object":',
        b'{"type":"ERROR","object":"x"}',
        b"upstream connect error or disconnect/reset before headers",
    ],
)
def test_an_error_of_any_kind_makes_kopf_list_anew(line: bytes, slept_s: list[float]):
    first, last = read(ADDED + b"\n" + line + b"\n" + ADDED + b"\n")
    assert first == ADDED + b"\n"
    assert json.loads(last) == LIST_ANEW
    assert slept_s == [RETRY_AFTER_S[0]]


def test_a_watch_that_is_broken_off_again_and_again_is_begun_anew_at_longer_intervals(slept_s: list[float]):
    clock = Clock()
    failures = Failures(clock)
    for _ in range(7):
        read(b"no event\n", failures=failures)
    assert slept_s == [*RETRY_AFTER_S, RETRY_AFTER_S[-1]]
    clock.now_s += FORGOTTEN_S + 1
    read(b"no event\n", failures=failures)
    assert slept_s[-1] == RETRY_AFTER_S[0]
