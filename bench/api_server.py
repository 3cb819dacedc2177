"""A plain client of the API server for benchmarks: it sends, watches and counts, and decides nothing."""

import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import urllib3

Body = dict[str, Any]
TIMEOUT_S = 30.0
WATCH_PAUSE_S = 0.2
JOBS = "/apis/batch/v1"
CORE = "/api/v1"
_REQUESTS = re.compile(r"^apiserver_request_total\{(.*)\} ([0-9.e+]+)$", re.MULTILINE)


class ApiServer:
    """Thread-safe. Every request has a time limit; what the server refuses is a RuntimeError."""

    def __init__(self, kubeconfig: Path, connections: int = 16) -> None:
        """kubeconfig: one of the testbed's, which are JSON and hold a token."""
        settings = json.loads(kubeconfig.read_text())
        place = settings["clusters"][0]["cluster"]
        self._url, self._token = place["server"], settings["users"][0]["user"]["token"]
        # The server answers 429 with Retry-After for a second or two while it takes in another version of a CRD.
        patience = urllib3.Retry(total=10, status_forcelist=(429,), allowed_methods=None, backoff_factor=0.2)
        self._pool = urllib3.PoolManager(maxsize=connections, ca_certs=place["certificate-authority"], retries=patience)

    def send(self, method: str, path: str, body: Body | None = None) -> Body:
        """One request; a PATCH is a merge patch."""
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        data = None if body is None else json.dumps(body).encode()
        answer = self._ask(method, path, data, kind, TIMEOUT_S, preload=True)
        return json.loads(answer.data)

    def follow(self, path: str, on_event: Callable[[str, Body], None], ended: threading.Event) -> threading.Thread:
        """Watch a list of objects from now on, in a thread, until `ended` is set.

        A busy server ends a watch that it is ahead of: it is gone on with where it ended. What ends the thread before,
        is raised in it."""
        first = str(self.send("GET", f"{path}?limit=1")["metadata"]["resourceVersion"])
        opened = self._watch(path, first)

        def read() -> None:
            version, answer = first, opened
            while not ended.is_set():
                try:
                    for line in _lines(answer):
                        event = json.loads(line)
                        if event["type"] == "ERROR":
                            raise RuntimeError(f"watch {path}: {event['object'].get('message')}")
                        version = event["object"]["metadata"]["resourceVersion"]
                        if ended.is_set():
                            return
                        if event["type"] != "BOOKMARK":
                            on_event(event["type"], event["object"])
                except (urllib3.exceptions.HTTPError, OSError) as error:
                    if not ended.is_set():
                        print(f"watch {path}: {type(error).__name__}, gone on with", file=sys.stderr, flush=True)
                finally:
                    answer.close()
                if not ended.wait(WATCH_PAUSE_S):
                    answer = self._watch(path, version)

        thread = threading.Thread(target=read, name=f"watch {path}", daemon=True)
        thread.start()
        return thread

    def _watch(self, path: str, version: str) -> urllib3.BaseHTTPResponse:
        query = f"watch=true&allowWatchBookmarks=true&resourceVersion={version}&timeoutSeconds=1800"
        return self._ask("GET", f"{path}?{query}", None, "application/json", 1900.0, preload=False)

    def requests(self) -> Counter[tuple[str, str]]:
        """Requests that the server has answered so far, of everybody, by (verb, resource with subresource)."""
        text = self._ask("GET", "/metrics", None, "", TIMEOUT_S, preload=True).data.decode()
        found: Counter[tuple[str, str]] = Counter()
        for labels, value in _REQUESTS.findall(text):
            of = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            resource = of["resource"] + (f"/{of['subresource']}" if of["subresource"] else "")
            found[of["verb"], resource] += int(float(value))
        return found

    def _ask(
        self, method: str, path: str, data: bytes | None, kind: str, timeout_s: float, *, preload: bool
    ) -> urllib3.BaseHTTPResponse:
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": kind}
        answer = self._pool.request(
            method, self._url + path, body=data, headers=headers, timeout=timeout_s, preload_content=preload
        )
        if answer.status >= 400:
            text = answer.data.decode(errors="replace")[:500]
            raise RuntimeError(f"{method} {path}: {answer.status}: {text}")
        return answer


def at_even_rate(count: int, seconds: float, act: Callable[[int], None], workers: int = 8) -> None:
    """Call `act` with 0 to count - 1, spread evenly; raises what it raises first, and then begins no others."""
    begun_s = time.monotonic()

    def act_in_time(number: int) -> None:
        time.sleep(max(0.0, begun_s + number * seconds / count - time.monotonic()))
        act(number)

    with ThreadPoolExecutor(workers) as pool:
        try:
            for done in [pool.submit(act_in_time, number) for number in range(count)]:
                done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _lines(answer: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    rest = b""
    for chunk in answer.stream(65536):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line for line in whole if line)
