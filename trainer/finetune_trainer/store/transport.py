"""Bounds what a server may do to one request: how long it takes, and how much it answers.

botocore bounds the pause before each byte, not their number: headers, listings and errors that never end, or that come
a byte at a time, would hold a stage for ever. The bounds stand at the socket, below all that reads from it, so that
they hold for status lines, headers, sizes of chunks and trailers too.
"""

import io
import time
from contextvars import ContextVar
from typing import Any, cast

import urllib3
from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
)
from botocore.exceptions import ConnectionClosedError, HTTPClientError

# One call with all its tries. An ordinary one takes milliseconds; AWS takes minutes to complete the largest uploads.
CALL_TIMEOUT_S = 600
# A slower connection is given up, as another one often is not. What is sent adds its size at this speed to the time.
SLOW_BYTES_PER_S = 64 << 10
SLOW_WINDOW_S = 60.0  # of waiting for the network, without what the reader does in between
STALL_TIMEOUT_S = 30.0  # without a single byte
# All of an answer but an object's content. The largest in S3 is a page of 1000 keys of 1024 bytes, each written as %XX.
MAX_ANSWER_BYTES = 4 << 20

_READ_COST_BYTES = 64  # what a shorter read counts as: botocore reads byte by byte what follows "100 Continue"
_MAX_ENDS = 8  # botocore looks for the end of the headers after "100 Continue" even where the connection has ended
_DEADLINE = "finetune_deadline_s"  # in botocore's context of a call, which all its tries share


class CallTimeoutError(HTTPClientError):
    """All tries of a call together took too long."""

    fmt = "no complete answer within the time of a call"

    def __init__(self, tries: int, **known: Any) -> None:
        self.tries = tries
        super().__init__(**known)


class AnswerTooLargeError(HTTPClientError):
    """An answer that is not an object's content goes on and on."""

    fmt = "an answer of more than {limit_bytes} bytes"


class ForbiddenAnswerError(HTTPClientError):
    """An answer declares entities, by which a few bytes become gigabytes, or is no text."""

    fmt = "an answer that is no plain XML"


class SlowConnectionError(OSError):
    """The content of an object comes too slowly."""


def is_slow(error: BaseException | None) -> bool:
    """Return whether SlowConnectionError is among what led to an error of urllib3 or botocore."""
    while error is not None and not isinstance(error, SlowConnectionError):
        error = error.__cause__ or error.__context__
    return error is not None


class _OverrunError(OSError):
    """More was answered than is taken."""


class Exchange:
    """One request and its answer: bounded by time and size, then, for the content of an object, by its speed."""

    def __init__(self, deadline_s: float, max_bytes: int) -> None:
        """`deadline_s` is a time of the monotonic clock."""
        self.overrun = False
        self._deadline_s = deadline_s
        self._bytes_left = max_bytes
        self._streams = False
        self._window_s = 0.0
        self._window_bytes = 0

    def stream(self) -> None:
        """From now on an object's content is read, whose size the reader knows."""
        self._streams = True

    def wait_s(self) -> float:
        """Return how long the next read or write may wait. Raises TimeoutError when there is no time left."""
        if not self._streams:
            left_s = self._deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            return min(STALL_TIMEOUT_S, left_s)
        if self._window_s >= SLOW_WINDOW_S:
            if self._window_bytes < SLOW_BYTES_PER_S * self._window_s:
                raise SlowConnectionError
            self._window_s, self._window_bytes = 0.0, 0
        return STALL_TIMEOUT_S

    def received(self, count: int, waited_s: float) -> None:
        """Count what one read brought. Raises OSError when it is more than this answer may have."""
        if self._streams:
            self._window_s += waited_s
            self._window_bytes += count
            return
        self._bytes_left -= max(count, _READ_COST_BYTES)
        if self._bytes_left < 0:
            self.overrun = True
            raise _OverrunError


_current: ContextVar[Exchange] = ContextVar("exchange")


def call_deadline_s(context: dict[str, Any], sent_bytes: int = 0) -> float:
    """Return when the call has to be over, the same for all its tries; the clock starts with the first."""
    allowed_s = CALL_TIMEOUT_S + sent_bytes / SLOW_BYTES_PER_S
    return cast("float", context.setdefault(_DEADLINE, time.monotonic() + allowed_s))


class BoundedSession:
    """botocore's HTTP session, of which no answer is longer, or takes longer, than it may."""

    def __init__(self, session: Any) -> None:
        """Takes over a session of botocore that has opened no connection yet."""
        self._session = session
        session._pool_classes_by_scheme = dict(_POOLS)
        session._manager.pool_classes_by_scheme = session._pool_classes_by_scheme

    def send(self, request: Any) -> Any:
        """Return botocore's answer; the content of an object is still to be read from it.

        Raises HTTPClientError, such as AnswerTooLargeError and ForbiddenAnswerError."""
        sent_bytes = int(request.headers.get("Content-Length") or 0)
        exchange = Exchange(call_deadline_s(request.context, sent_bytes), MAX_ANSWER_BYTES)
        token = _current.set(exchange)
        try:
            answer = self._session.send(request)
            if request.stream_output and answer.status_code < 300:
                exchange.stream()
                return answer
            content: bytes = answer.content
        except (HTTPClientError, urllib3.exceptions.HTTPError) as error:
            if exchange.overrun:
                raise AnswerTooLargeError(error=error, limit_bytes=MAX_ANSWER_BYTES) from error
            if isinstance(error, HTTPClientError):
                raise
            raise ConnectionClosedError(error=error, endpoint_url=request.url) from error
        finally:
            _current.reset(token)
        # expat expands what is declared a hundredfold; S3 declares nothing, and its XML is UTF-8.
        if b"<!DOCTYPE" in content or b"\0" in content:
            if answer.status_code < 500:
                raise ForbiddenAnswerError(error=None)
            answer._content = b""  # a page of HTML of a proxy, which may pass: its status says enough
        return answer

    def close(self) -> None:
        self._session.close()


class _Incoming(io.RawIOBase):
    """What comes in on a socket, within the bounds of the exchange."""

    def __init__(self, sock: Any, exchange: Exchange) -> None:
        self._sock, self._exchange = sock, exchange
        self._file = sock.makefile("rb", buffering=0)  # keeps the socket open until it is closed, too
        self._ends = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        self._sock.settimeout(self._exchange.wait_s())
        asked_s = time.monotonic()
        count = self._file.readinto(buffer)
        self._exchange.received(count or 0, time.monotonic() - asked_s)
        self._ends = 0 if count else self._ends + 1
        if self._ends > _MAX_ENDS:
            raise ConnectionResetError
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _Socket:
    """A connected socket, plain or TLS, within the bounds of the exchange that its connection is in."""

    def __init__(self, sock: Any, connection: "_BoundedConnection") -> None:
        self._sock, self._connection = sock, connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def makefile(self, _mode: str, buffering: int = -1) -> io.RawIOBase | io.BufferedReader:
        incoming = _Incoming(self._sock, self._connection.exchange)
        return incoming if buffering == 0 else io.BufferedReader(incoming)

    def sendall(self, data: Any) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            self._sock.settimeout(self._connection.exchange.wait_s())
            rest = rest[self._sock.send(rest) :]


class _BoundedConnection:
    """Beside a connection class: each request is within the exchange that its sender is in."""

    exchange: Exchange
    sock: Any

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]  # pyright: ignore
        self.sock = _Socket(self.sock, self)

    def request(self, *args: Any, **kwargs: Any) -> Any:
        self.exchange = _current.get()
        return super().request(*args, **kwargs)  # type: ignore[misc]  # pyright: ignore


class _HttpConnection(_BoundedConnection, AWSHTTPConnection):
    pass


class _HttpsConnection(_BoundedConnection, AWSHTTPSConnection):
    pass


class _HttpPool(AWSHTTPConnectionPool):
    ConnectionCls = _HttpConnection


class _HttpsPool(AWSHTTPSConnectionPool):
    ConnectionCls = _HttpsConnection


_POOLS = {"http": _HttpPool, "https": _HttpsPool}
