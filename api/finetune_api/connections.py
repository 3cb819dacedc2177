"""Which connections of a small HTTP server have to end, so that slow clients keep nobody else out.

A timeout for each read ends no client that sends a byte now and then, and a server that refuses the newest of too many
is shut by the first few who stay.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# An answer takes milliseconds, the operator's own for thousands of jobs a second or two. The kubelet, Prometheus and
# the operator ask, each on one connection at a time.
MAX_CONNECTIONS = 16
CONNECTION_TIMEOUT_S = 10.0


class Connections(Generic[T]):
    """The open connections of a server, at most MAX_CONNECTIONS, none open for longer than CONNECTION_TIMEOUT_S.

    Thread-safe. `hang_up` makes whatever reads from or writes to a connection end, and does not wait for it."""

    def __init__(self, hang_up: Callable[[T], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._hang_up, self._clock = hang_up, clock
        self._lock = threading.Lock()
        self._since_s: dict[int, tuple[float, T]] = {}  # by identity, the oldest first

    def enter(self, connection: T) -> None:
        """Count a connection that was opened, and hang up on the oldest when they are too many."""
        with self._lock:
            while len(self._since_s) >= MAX_CONNECTIONS:
                self._drop(next(iter(self._since_s)))
            self._since_s[id(connection)] = (self._clock(), connection)

    def leave(self, connection: T) -> None:
        """Count a connection no longer; to be called before it is closed."""
        with self._lock:
            self._since_s.pop(id(connection), None)

    def end_overdue(self) -> None:
        """Hang up on those that were open for too long; to be called about once a second."""
        with self._lock:
            latest_s = self._clock() - CONNECTION_TIMEOUT_S
            for key in [key for key, (since_s, _) in self._since_s.items() if since_s <= latest_s]:
                self._drop(key)

    def _drop(self, key: int) -> None:
        self._hang_up(self._since_s.pop(key)[1])


class OneAtATime(Generic[T]):
    """Makes an answer for all who wait for one, so that many who ask at once cost no more than one does.

    Thread-safe. None gets an answer that was begun before he asked."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._turn = threading.Lock()
        self._begun = 0  # answers
        self._newest: tuple[int, T] | None = None  # which of them it was

    def get(self) -> T:
        """Raises what `make` raises."""
        asked = self._begun
        with self._turn:
            if self._newest is not None and self._newest[0] > asked:
                return self._newest[1]
            self._begun += 1
            self._newest = (self._begun, self._make())
            return self._newest[1]


class BoundedHttpServer(ThreadingHTTPServer):
    """A server with a thread for each connection, of which Connections ends those that are too many or too slow."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._connections = Connections(_hang_up)
        super().__init__(*args, **kwargs)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.enter(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.leave(request)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        self._connections.end_overdue()


def _hang_up(request: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the client was faster
        request.shutdown(socket.SHUT_RDWR)
