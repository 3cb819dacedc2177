"""/healthz, /readyz and /metrics on one port.

/healthz is liveness: it fails for what a restart mends, an activity that stands still. Slow is not still: what counts
is the time since an activity last made progress. /readyz also fails for what a person has to mend. Both list all that
is known with `?verbose`.
"""

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from finetune_api.connections import CONNECTION_TIMEOUT_S, BoundedHttpServer, OneAtATime

STALL_S = 180.0
STUCK_S = 120.0


@dataclass(frozen=True)
class Health:
    """In words: what stands still, what else keeps the operator from its work, and what is good to know."""

    stuck: tuple[str, ...] = ()
    unready: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def problems(ages_s: dict[str, float], stuck_s: float) -> list[str]:
    """What stalled: `ages_s` since each activity last made progress, `stuck_s` of the queue."""
    found = [f"{name}: nothing for {age:.0f} s" for name, age in sorted(ages_s.items()) if age > STALL_S]
    return [*found, f"queue: stuck for {stuck_s:.0f} s"] if stuck_s > STUCK_S else found


def answer(path: str, query: str, health: Health) -> tuple[int, str] | None:
    """Status and text for a path of ours; None for another."""
    wrong = {"/healthz": health.stuck, "/readyz": (*health.stuck, *health.unready)}.get(path)
    if wrong is None:
        return None
    lines = wrong or ("ok",)
    if query == "verbose":
        told = (*health.stuck, *health.unready, *health.notes)
        lines = (*lines, *(line for line in told if line not in lines))
    return 503 if wrong else 200, "\n".join(lines)


class _Server(BoundedHttpServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, or is hung up on, is no news; the default prints its trace."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class HttpServer:
    """Serves in daemon threads until `close`. `check` gives the health of now."""

    def __init__(self, port: int, registry: CollectorRegistry, check: Callable[[], Health]) -> None:
        """Port 0 takes a free one; see `port`."""

        metrics = OneAtATime(lambda: generate_latest(registry))

        class Handler(BaseHTTPRequestHandler):
            timeout = CONNECTION_TIMEOUT_S

            def do_GET(self) -> None:
                path, _, query = self.path.partition("?")
                if path == "/metrics":
                    self._answer(200, CONTENT_TYPE_LATEST, metrics.get())
                    return
                status, text = answer(path, query, check()) or (404, "/healthz, /readyz or /metrics")
                self._answer(status, "text/plain", text.encode())

            def _answer(self, status: int, content_type: str, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                """Probes are no news."""

        self._server = _Server(("", port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="http", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
