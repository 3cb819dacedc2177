"""/healthz and /metrics on one port. An operator that only looks alive is worse than one that is restarted."""

import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from finetune_api.connections import CONNECTION_TIMEOUT_S, BoundedHttpServer, OneAtATime

STALL_S = 180.0
STUCK_S = 120.0


def problems(ages_s: dict[str, float], stuck_s: float) -> list[str]:
    """What stalled: `ages_s` since each activity was last seen, `stuck_s` of the oldest work in the queue."""
    found = [f"{name}: nothing for {age:.0f} s" for name, age in sorted(ages_s.items()) if age > STALL_S]
    return [*found, f"queue: stuck for {stuck_s:.0f} s"] if stuck_s > STUCK_S else found


class _Server(BoundedHttpServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, or is hung up on, is no news; the default prints its trace."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class HttpServer:
    """Serves in daemon threads until `close`. `check` gives what is wrong, in words."""

    def __init__(self, port: int, registry: CollectorRegistry, check: Callable[[], list[str]]) -> None:
        """Port 0 takes a free one; see `port`."""

        metrics = OneAtATime(lambda: generate_latest(registry))

        class Handler(BaseHTTPRequestHandler):
            timeout = CONNECTION_TIMEOUT_S

            def do_GET(self) -> None:
                if self.path == "/healthz":
                    wrong = check()
                    self._answer(503 if wrong else 200, "text/plain", ("\n".join(wrong) or "ok").encode())
                elif self.path.split("?")[0] == "/metrics":
                    self._answer(200, CONTENT_TYPE_LATEST, metrics.get())
                else:
                    self._answer(404, "text/plain", b"/healthz or /metrics")

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
