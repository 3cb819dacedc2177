"""What Kopf's requests need to survive answers that would end its watch, or Kopf as a whole, and to leave out our own
writes."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol, cast

import aiohttp
import orjson

from finetune_operator.cluster import ApiError, brief
from finetune_operator.object_watch import EXPIRED
from finetune_operator.phase_selectors import BAD_REQUEST, PARAMETER, PhaseSelection

log = logging.getLogger(__name__)

RETRY_AFTER_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
FORGOTTEN_S = 120.0  # after the last one a failure counts as the first; more than the longest of the waits
_EVENT = b'{"type"'  # as Kubernetes begins each line of a watch
_MODIFIED = b'"MODIFIED"'
_LIST_ANEW = json.dumps({"type": "ERROR", "object": {"code": EXPIRED}}).encode() + b"\n"


IsEcho = Callable[[Mapping[str, Any]], bool]  # whether an object is told that nobody needs to hear of


class Chunks(Protocol):
    """The part of an answer's content that Kopf uses."""

    def iter_chunked(self, n: int) -> Any: ...


class AskedAgain:
    """Asks again without the field selector what a server refuses that knows no such field, lets a list of which the
    server has forgotten the rest be begun anew, and watches what each watch brings.

    Kopf ends as a whole when a request is refused so, and a CRD may change while it runs."""

    def __init__(self, selection: PhaseSelection, is_echo: IsEcho) -> None:
        self._selection, self._is_echo = selection, is_echo
        self._failures: dict[str, Failures] = {}  # of watches, by path

    async def __call__(self, request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        answer = await self._ask(request, send)
        if answer.ok and "watch" in request.url.query:
            path = request.url.path
            failures = self._failures.setdefault(path, Failures())
            watched = WatchStream(path, answer.content, failures, self._is_echo)
            answer.content = cast(aiohttp.StreamReader, watched)
        return answer

    async def _ask(self, request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        answer = await send(request)
        if PARAMETER not in request.url.query:
            return answer
        refused = answer.status == BAD_REQUEST
        if refused:
            answer.close()
            request.url = request.url.without_query_params(PARAMETER)
            answer = await send(request)
        if answer.status == EXPIRED and "continue" in request.url.query:
            answer.close()
            await asyncio.sleep(RETRY_AFTER_S[0])
            raise aiohttp.ClientPayloadError("the rest of the list is forgotten")  # as if it was cut: listed anew
        if answer.ok:
            self._selection.answered(selected=not refused)
        return answer


class Failures:
    """How long to wait before a watch that was broken off is begun anew."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._count = 0
        self._last_s = float("-inf")

    def next_delay_s(self) -> float:
        now_s = self._clock()
        self._count = 0 if now_s - self._last_s > FORGOTTEN_S else self._count + 1
        self._last_s = now_s
        return RETRY_AFTER_S[min(self._count, len(RETRY_AFTER_S) - 1)]


class WatchStream:
    """The content of a watch, line by line, as Kopf reads it.

    At an error in it that does not say that the version is forgotten, and at a line that is no event, Kopf would end
    this watch for good, and nobody would notice before jobs are missed. Both become that error here: all is listed
    anew, after a while. Echoes are left out, as Kopf takes several milliseconds of CPU for each event."""

    def __init__(self, path: str, content: Chunks, failures: Failures, is_echo: IsEcho) -> None:
        self._path, self._content, self._failures, self._is_echo = path, content, failures, is_echo

    def __getattr__(self, name: str) -> Any:
        """Be its content in all else: aiohttp asks it how it ended."""
        return getattr(self._content, name)

    async def iter_chunked(self, n: int) -> AsyncIterator[bytes]:
        rest = bytearray()
        async for chunk in self._content.iter_chunked(n):
            rest += chunk
            *lines, last = bytes(rest).split(b"\n")
            rest = bytearray(last)
            for line in filter(None, lines):
                problem = _problem(line)
                if problem is not None:
                    delay_s = self._failures.next_delay_s()
                    log.info("watch of %s: %s; listing anew in %.0f s", self._path, problem, delay_s)
                    await asyncio.sleep(delay_s)
                    yield _LIST_ANEW
                    return
                if _MODIFIED not in line[:32] or not self._is_echo(_object_of(line)):
                    yield line + b"\n"
        # What has no end was cut in the middle: the next watch brings it once more.


def _problem(line: bytes) -> str | None:
    """Return why a line is no event that Kopf can take, without words from outside."""
    if not line.startswith(_EVENT):
        return "a line that is no event"
    if b'"ERROR"' not in line[:32]:
        return None
    status = _object_of(line)
    code = status.get("code")
    return brief(ApiError(code if isinstance(code, int) else 500, str(status.get("reason", "")), ""))


def _object_of(line: bytes) -> Mapping[str, Any]:
    """Return the object that an event tells of; empty where the line has none."""
    try:
        told: object = orjson.loads(line)["object"]
    except (ValueError, KeyError):
        return {}
    return cast(dict[str, Any], told) if isinstance(told, dict) else {}
