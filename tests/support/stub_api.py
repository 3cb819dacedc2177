"""A small Kubernetes API server in memory that refuses, stalls and cuts as a test tells it to."""

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

from finetune_api import names

Body = dict[str, Any]
_OURS = f"/apis/{names.API_VERSION}"
_PREFIXES = {
    _OURS: ("finetunejobs",),
    "/apis/batch/v1": ("jobs",),
    "/apis/coordination.k8s.io/v1": ("leases",),
    "/api/v1": ("pods", "configmaps", "events"),
}
_BOOKMARK_S = 0.5
_TICK_S = 0.05


@dataclass(frozen=True)
class Trouble:
    """What happens to each request whose "METHOD path?query" contains all of `words`, and none of `but`."""

    words: tuple[str, ...]
    status: int = 0  # answer so
    wait_s: float = 0.0  # before anything else
    but: tuple[str, ...] = ()
    stream: str = ""  # a watch brings this line alone, and ends

    def meets(self, request: str) -> bool:
        return all(word in request for word in self.words) and not any(word in request for word in self.but)


@dataclass(frozen=True)
class _Change:
    version: int
    resource: str
    event: str
    body: Body
    before: Body | None  # the object as it was

    def told_to(self, query: dict[str, str]) -> tuple[str, Body] | None:
        """The event of a watch with these selectors: for it an object that they leave out does not exist."""
        was, now = self.before is not None and _selects(query, self.before), _selects(query, self.body)
        if self.event == "DELETED" or not now:
            version = {"resourceVersion": str(self.version)}
            last = self.before or self.body
            return ("DELETED", {**last, "metadata": {**last["metadata"], **version}}) if was else None
        return ("MODIFIED" if was else "ADDED"), self.body


@dataclass
class StubApi:
    """Objects by (resource, namespace, name), the troubles now, and the requests seen ("METHOD path?query")."""

    port: int = 0
    objects: dict[tuple[str, str, str], Body] = field(default_factory=dict[tuple[str, str, str], Body])
    troubles: list[Trouble] = field(default_factory=list[Trouble])
    requests: list[str] = field(default_factory=list[str])
    forgotten: int = 0  # watches that want to go on from a version up to this one get 410
    lock: threading.RLock = field(default_factory=threading.RLock)
    selects_by_phase: bool = True  # False: as with a CRD of an earlier release
    _changes: list["_Change"] = field(default_factory=list["_Change"])
    _versions: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _cuts: int = 0
    ended: bool = False

    def store(self, resource: str, body: Body, event: str = "ADDED") -> Body:
        """Create or replace an object, or delete it (`event` DELETED), and tell it."""
        with self.lock:
            version = next(self._versions)
            meta = body["metadata"]
            made = {"uid": f"uid-{version}", "creationTimestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
            body = {**body, "metadata": {**made, **meta, "resourceVersion": str(version)}}
            key = (resource, meta["namespace"], meta["name"])
            before = self.objects.get(key)
            if event == "DELETED":
                del self.objects[key]
            else:
                self.objects[key] = body
            self._changes.append(_Change(version, resource, event, body, before))
            return body

    def submit(self, namespace: str, name: str, spec: Body) -> Body:
        """A FineTuneJob, as `kubectl apply` makes it."""
        meta = {"namespace": namespace, "name": name, "generation": 1}
        return self.store("finetunejobs", {"metadata": meta, "spec": spec})

    def cut_watches(self) -> None:
        """End every open watch in the middle of a line."""
        self._cuts += 1

    def all(self, resource: str, namespace: str | None = None) -> list[Body]:
        with self.lock:
            return [b for (r, ns, _), b in self.objects.items() if r == resource and namespace in (None, ns)]

    def version(self) -> int:
        with self.lock:
            return self._changes[-1].version if self._changes else 0

    def asked(self, *words: str) -> list[str]:
        return [request for request in list(self.requests) if all(word in request for word in words)]


@contextlib.contextmanager
def stub_api(folder: Path) -> Generator[tuple[StubApi, Path]]:
    """The server, and a kubeconfig for it below `folder`."""
    stub = StubApi()
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(stub))
    http.daemon_threads = True
    stub.port = http.server_address[1]
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "x", "users": [{"name": "x", "user": {"token": "x"}}],
        "clusters": [{"name": "x", "cluster": {"server": f"http://127.0.0.1:{stub.port}"}}],
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
    }  # fmt: skip
    path = folder / "kubeconfig"
    path.write_text(json.dumps(config))
    threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield stub, path
    finally:
        stub.ended = True
        http.shutdown()
        http.server_close()


def _handler(stub: StubApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = cast(Body, json.loads(self.rfile.read(length))) if length else {}
            asked = f"{self.command} {self.path}"
            stub.requests.append(asked)
            for trouble in list(stub.troubles):
                if trouble.meets(asked):
                    _sleep(stub, trouble.wait_s)
                    if trouble.status:
                        return self.refuse(trouble.status)
                    if trouble.stream:
                        return self.say_in_a_stream(trouble.stream)
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            if (found := _discovery(url.path)) is not None:
                return self.say(200, found)
            place = _place(url.path)
            if place is None:
                return self.refuse(404)
            resource, namespace, name, sub = place
            if "status.phase" in query.get("fieldSelector", "") and not stub.selects_by_phase:
                return self.refuse(400)
            if query.get("watch") == "true":
                return self.stream(resource, namespace, query)
            with stub.lock:
                status, answer = _answer(stub, self.command, resource, namespace, name, sub, body, query)
            return self.refuse(status) if answer is None else self.say(status, answer)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = serve  # noqa: N815 - the names that http.server calls

        def refuse(self, status: int) -> None:
            reason = {400: "BadRequest", 403: "Forbidden", 404: "NotFound", 409: "Conflict", 410: "Expired"}.get(
                status, "InternalError"
            )
            self.say(status, {"kind": "Status", "code": status, "reason": reason, "message": "the stub says no"})

        def say(self, status: int, content: Body) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def stream(self, resource: str, namespace: str | None, query: dict[str, str]) -> None:
            version, cuts = int(query.get("resourceVersion") or 0), stub._cuts  # pyright: ignore[reportPrivateUsage]
            end_s = time.monotonic() + float(query.get("timeoutSeconds") or 300)
            self.begin_stream()
            if version and version < stub.forgotten:  # told in the stream, as by Kubernetes
                self.event("ERROR", {"kind": "Status", "code": 410, "reason": "Expired", "message": "the stub forgot"})
                return self.chunk(b"")
            bookmark_s = time.monotonic() + _BOOKMARK_S
            with contextlib.suppress(OSError):
                while not stub.ended and time.monotonic() < end_s:
                    for event, body in _since(stub, version, resource, namespace, query):
                        self.event(event, body)
                        version = int(body["metadata"]["resourceVersion"])
                    if stub._cuts != cuts:  # pyright: ignore[reportPrivateUsage]
                        self.wfile.write(b'80\r\n{"type": "MODI')
                        self.wfile.flush()
                        return None
                    if time.monotonic() > bookmark_s:
                        bookmark_s += _BOOKMARK_S
                        version = max(version, stub.version())
                        meta = {"resourceVersion": str(version)}
                        self.event("BOOKMARK", {"metadata": meta})
                    time.sleep(_TICK_S)
                self.chunk(b"")
            return None

        def say_in_a_stream(self, line: str) -> None:
            self.begin_stream()
            self.chunk(f"{line}\n".encode())
            self.chunk(b"")

        def begin_stream(self) -> None:
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()

        def event(self, kind: str, body: Body) -> None:
            self.chunk(json.dumps({"type": kind, "object": body}).encode() + b"\n")

        def chunk(self, data: bytes) -> None:
            """Send a part of the answer; an empty one ends it."""
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

        def log_message(self, format: str, *args: object) -> None:
            """Nobody reads it."""

    return Handler


def _sleep(stub: StubApi, seconds: float) -> None:
    end_s = time.monotonic() + seconds
    while not stub.ended and time.monotonic() < end_s:
        time.sleep(min(_TICK_S, max(0.0, end_s - time.monotonic())))


def _discovery(path: str) -> Body | None:
    if path == "/apis":
        version = {"groupVersion": names.API_VERSION, "version": names.VERSION}
        return {"groups": [{"name": names.GROUP, "versions": [version], "preferredVersion": version}]}
    if path == "/api":
        return {"versions": ["v1"]}
    if path == _OURS:
        verbs = ["get", "list", "watch", "patch"]
        kind = {"name": names.PLURAL, "singularName": "x", "namespaced": True, "kind": names.KIND, "verbs": verbs}
        return {"resources": [kind, {**kind, "name": f"{names.PLURAL}/status"}]}
    if path == "/api/v1":  # Kopf watches nothing before it has seen that there are namespaces
        kind = {"name": "namespaces", "singularName": "namespace", "namespaced": False, "kind": "Namespace"}
        return {"resources": [{**kind, "verbs": ["get", "list", "watch"]}]}
    return None


def _place(path: str) -> tuple[str, str | None, str | None, str | None] | None:
    """Resource, namespace, name and subresource that a path names."""
    for prefix, resources in _PREFIXES.items():
        parts = path.removeprefix(f"{prefix}/").split("/")
        namespace = None
        if path.startswith(f"{prefix}/") and parts[0] == "namespaces" and len(parts) > 2:
            namespace, parts = parts[1], parts[2:]
        if path.startswith(f"{prefix}/") and parts[0] in resources:
            rest: list[str | None] = [*parts[1:], None, None]
            return parts[0], namespace, rest[0], rest[1]
    return None


def _selects(query: dict[str, str], body: Body) -> bool:
    labels = body["metadata"].get("labels") or {}
    pairs = [pair.split("=", 1) for pair in query.get("labelSelector", "").split(",") if pair]
    fields = [term.partition("!=") for term in query.get("fieldSelector", "").split(",") if term]
    phase = (body.get("status") or {}).get("phase", "")
    return all(labels.get(name) == value for name, value in pairs) and all(
        name == "status.phase" and phase != value for name, _, value in fields
    )


def _since(
    stub: StubApi, version: int, resource: str, namespace: str | None, query: dict[str, str]
) -> list[tuple[str, Body]]:
    with stub.lock:
        told = [
            change.told_to(query)
            for change in stub._changes  # pyright: ignore[reportPrivateUsage]
            if change.version > version
            and change.resource == resource
            and namespace in (None, change.body["metadata"]["namespace"])
        ]
    return [event for event in told if event is not None]


def _answer(
    stub: StubApi, method: str, resource: str, namespace: str | None, name: str | None, sub: str | None,
    body: Body, query: dict[str, str],
) -> tuple[int, Body | None]:  # fmt: skip
    """Status and content, or None for a refusal of that status."""
    if method == "GET" and name is None:
        items = [item for item in stub.all(resource, namespace) if _selects(query, item)]
        first = int(query.get("continue") or 0)
        end = first + int(query.get("limit") or len(items))
        meta = {"resourceVersion": str(stub.version()), "continue": str(end) if end < len(items) else ""}
        return 200, {"kind": "List", "metadata": meta, "items": items[first:end]}
    if method == "POST":
        key = (resource, str(namespace), body["metadata"]["name"])
        return (409, None) if key in stub.objects else (201, stub.store(resource, body))
    key = (resource, str(namespace), str(name))
    found = stub.objects.get(key)
    if found is None:
        return 404, None
    if method == "GET":
        return 200, found
    if method == "DELETE":
        stub.store(resource, found, "DELETED")
        return 200, {"kind": "Status"}
    wanted = body["metadata"].get("resourceVersion")
    if wanted not in (None, found["metadata"]["resourceVersion"]):
        return 409, None
    if method == "PUT":
        return 200, stub.store(resource, body, "MODIFIED")
    part = {sub: body[sub]} if sub else {**body, "metadata": {}}
    return 200, stub.store(resource, _merge(found, part), "MODIFIED")


def _merge(old: Body, patch: Body) -> Body:
    """JSON merge patch."""
    merged = dict(old)
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict):
            merged[name] = _merge(cast(Body, merged.get(name) or {}), cast(Body, value))
        else:
            merged[name] = value
    return merged
