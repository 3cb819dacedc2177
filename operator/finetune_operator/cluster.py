"""The only module that talks to the API server: bounded requests with plain dictionaries in and out.

Rights it needs, in every watched namespace:
  finetune.dev   finetunejobs             get, list, watch (watch: by Kopf)
  finetune.dev   finetunejobs/status      patch
  finetune.dev   finetunejobs/finalizers  update, where OwnerReferencesPermissionEnforcement is on
  batch          jobs                     get, list, watch, create, patch, delete
  ""             pods                     list, watch
  ""             configmaps               get, create
  ""             events                   list, create
and in its own namespace:
  coordination.k8s.io  leases             create; get and update of the one of its release
It reads no Secret, node or namespace, and of Jobs and pods only those with its own label.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast
from urllib.parse import quote, urlencode, urlsplit

import orjson
import urllib3
from kubernetes import client, config

from finetune_api import names
from finetune_api.names import FIELD_MANAGER
from finetune_api.redact import shortened
from finetune_operator import phase_selectors
from finetune_operator.metrics import Metrics
from finetune_operator.phase_selectors import PhaseSelection

Body = dict[str, Any]
T = TypeVar("T")
Kind = Literal["jobs", "pods", "configmaps", "events", "leases", "finetunejobs"]
WatchedKind = Literal["jobs", "pods", "finished_finetunejobs"]

REQUEST_TIMEOUT_S = 30
CONNECT_TIMEOUT_S = 10
WATCH_TIMEOUT_S = 300
SILENCE_TIMEOUT_S = 90  # bookmarks come every minute: a watch that is silent for longer hangs
PAGE = 200  # objects; fewer where they are large
MAX_PAGE_BYTES = 8 * 2**20  # of JSON, which takes five times that once it is read
PAGES_AT_ONCE = 3  # of all lists together, in memory
PAGE_WAIT_S = 30.0  # for others to be read, which takes parts of a second
CREDENTIALS_S = 10.0  # between two looks at whether they are to be read again; the client's own bounds are minutes

_PREFIX: dict[Kind, str] = {
    "jobs": "/apis/batch/v1",
    "pods": "/api/v1",
    "configmaps": "/api/v1",
    "events": "/api/v1",
    "leases": "/apis/coordination.k8s.io/v1",
    "finetunejobs": f"/apis/{names.API_VERSION}",
}
_OURS = f"{names.LABEL_MANAGED_BY}={FIELD_MANAGER}"
_WATCHED: dict[WatchedKind, tuple[Kind, dict[str, str]]] = {
    "jobs": ("jobs", {"labelSelector": _OURS}),
    "pods": ("pods", {"labelSelector": _OURS}),
    "finished_finetunejobs": ("finetunejobs", {phase_selectors.PARAMETER: phase_selectors.FINISHED}),
}


class ApiError(Exception):
    """The API server answered with an error."""

    def __init__(self, status: int, reason: str, message: str, retry_after_s: float = 0) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after_s = retry_after_s


class UnreachableError(Exception):
    """No answer: the network, a time-out, or an answer cut short. Whether a write happened is not known."""


def brief(error: ApiError | UnreachableError) -> str:
    """Return the error without words from outside, for a port that answers whoever asks."""
    if isinstance(error, UnreachableError):
        return "no answer"
    reason = "".join(letter for letter in error.reason if letter.isascii() and letter.isalpha())
    return f"{error.status} {reason[:40]}".strip()


class Cluster:
    """Thread-safe. What asks the API server raises ApiError or UnreachableError, within REQUEST_TIMEOUT_S."""

    def __init__(
        self,
        metrics: Metrics,
        pool_size: int,
        selection: PhaseSelection,
        answered: Callable[[], None] = lambda: None,
    ) -> None:
        """In-cluster credentials, else those of KUBECONFIG. `answered` is called in the thread that asked, for each
        answer, whatever it says."""
        settings = client.Configuration()
        try:
            config.load_incluster_config(client_configuration=settings)
        except config.ConfigException:
            config.load_kube_config(client_configuration=settings)
        settings.connection_pool_maxsize = pool_size
        settings.retries = urllib3.Retry(0, redirect=0)  # one retry loop, with back-off, is enough: the queue's
        self._client = client.ApiClient(settings)
        self._pool = self._client.rest_client.pool_manager
        self._metrics, self._selection, self._answered = metrics, selection, answered
        self._entry: _Entry | None = None
        self._pages = threading.BoundedSemaphore(PAGES_AT_ONCE)
        self._limits: dict[str, int] = {}  # of the next list, by path, where PAGE objects are too large

    def get(self, kind: Kind, namespace: str, name: str) -> Body | None:
        """None if it does not exist."""
        try:
            return self._request("GET", _path(kind, namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def list_unfinished(self, namespace: str | None) -> Iterator[Body]:
        """The FineTuneJobs whose phase is not final, page by page; all of them where the server cannot select."""
        query = {phase_selectors.PARAMETER: phase_selectors.UNFINISHED}
        yield from self._list(_path("finetunejobs", namespace), query).items()

    def list_children(self, namespace: str, job_uid: str) -> list[Body]:
        """The Kubernetes Jobs of one FineTuneJob as they are now, not as a watch has seen them."""
        query = {"labelSelector": f"{_OURS},{names.LABEL_JOB_UID}={job_uid}"}
        return list(self._list(_path("jobs", namespace), query).items())

    def list_pods(self, namespace: str, job_uid: str) -> list[Body]:
        """The pods of one FineTuneJob as they are now."""
        query = {"labelSelector": f"{_OURS},{names.LABEL_JOB_UID}={job_uid}"}
        return list(self._list(_path("pods", namespace), query).items())

    def list_events(self, namespace: str) -> Iterator[Body]:
        """Events of a namespace, page by page, but those that we tell of FineTuneJobs."""
        query = {"fieldSelector": f"involvedObject.kind!={names.KIND}"}
        yield from self._list(_path("events", namespace), query).items()

    def list_events_of(self, namespace: str, uid: str) -> list[Body]:
        """Events on one object: all there are, for one that has just been made."""
        query = {"fieldSelector": f"involvedObject.uid={uid}", "limit": "50"}
        items = self._request("GET", _path("events", namespace), query).get("items") or []
        return cast(list[Body], items)

    def create(self, kind: Kind, body: Body) -> Body:
        path = _path(kind, body["metadata"]["namespace"])
        return self._write("create", kind, "POST", path, body, {"fieldManager": FIELD_MANAGER})

    def read_lease(self, namespace: str, name: str, timeout_s: float) -> Body | None:
        """None if it does not exist."""
        try:
            return self._request("GET", _path("leases", namespace, name), timeout_s=timeout_s)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def write_lease(self, body: Body, timeout_s: float) -> Body:
        """Replace the one that was read, or create it. Raises ApiError 409 if somebody else wrote it since."""
        meta = body["metadata"]
        if meta.get("resourceVersion"):
            path, method, verb = _path("leases", meta["namespace"], meta["name"]), "PUT", "update"
        else:
            path, method, verb = _path("leases", meta["namespace"]), "POST", "create"
        self._metrics.api_writes.labels(verb, "leases").inc()
        return self._request(method, path, {"fieldManager": FIELD_MANAGER}, body, timeout_s)

    def patch_status(self, namespace: str, name: str, resource_version: str, patch: Body) -> Body:
        """Merge `patch` into the status. Raises ApiError 409 if the object is not that version any more."""
        body = {"metadata": {"resourceVersion": resource_version}, "status": patch}
        path = _path("finetunejobs", namespace, name) + "/status"
        query = {"fieldManager": FIELD_MANAGER}
        return self._write("patch", "finetunejobs/status", "PATCH", path, body, query)

    def set_ttl(self, namespace: str, name: str, uid: str, seconds: int) -> Body | None:
        """Let Kubernetes remove a finished Job after that time. Return it as it is then; None if that one is gone."""
        body = {"metadata": {"uid": uid}, "spec": {"ttlSecondsAfterFinished": seconds}}
        path = _path("jobs", namespace, name)
        return self._gone_is_fine("patch", "PATCH", path, body, {"fieldManager": FIELD_MANAGER})

    def delete_k8s_job(self, namespace: str, name: str, uid: str) -> None:
        """In the background, because batch/v1's default leaves the pods running; only this very object."""
        body = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        self._gone_is_fine("delete", "DELETE", _path("jobs", namespace, name), body, {})

    def watch(self, kind: WatchedKind, namespace: str | None, version: str | None) -> Iterator[tuple[str, Body]]:
        """Follow objects from `version` on, or list them first where it is None, until the server ends it.

        Of Jobs and pods only ours; of FineTuneJobs those whose phase is final, or all where the server cannot select.

        The list yields (ITEM, object) for what exists, then (LISTED, the list without items); the watch (OPENED, {})
        once the server takes it, then (ADDED | MODIFIED | DELETED | BOOKMARK, object). Raises ApiError (410: the
        version is forgotten) or UnreachableError.
        """
        of_kind, query = _WATCHED[kind]
        path = _path(of_kind, namespace)
        if version is None:
            pages = self._list(path, query)
            for body in pages.items():
                self._metrics.watched.labels(kind).inc()
                yield "ITEM", body
            version = pages.version
            yield "LISTED", {"metadata": {"resourceVersion": version}}
        answer = self._follow(path, {**query, "resourceVersion": version}, WATCH_TIMEOUT_S)
        yield "OPENED", {}
        try:
            for line in _lines(answer):
                event = cast(Body, orjson.loads(line))
                body = cast(Body, event.get("object") or {})
                if event.get("type") == "ERROR":
                    raise ApiError(int(body.get("code") or 500), str(body.get("reason")), str(body.get("message")))
                self._metrics.watched.labels(kind).inc()
                yield str(event.get("type")), body
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise UnreachableError(f"watch of {kind}: {type(error).__name__}") from error
        finally:
            answer.close()

    def serves_finetunejobs(self) -> bool:
        """Return False while the CRD is not installed. Asks where Kopf looks, which looks only once."""
        groups = self._request("GET", "/apis").get("groups") or []
        if not any(group.get("name") == names.GROUP for group in groups):
            return False
        try:
            known = self._request("GET", f"/apis/{names.API_VERSION}").get("resources") or []
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return any(resource.get("name") == names.PLURAL for resource in known)

    def try_watch(self, namespace: str | None) -> None:
        """Raises ApiError where the server refuses a watch of FineTuneJobs."""
        query = {phase_selectors.PARAMETER: phase_selectors.UNFINISHED, "resourceVersion": "0"}
        self._follow(_path("finetunejobs", namespace), query, 1).close()

    def _follow(self, path: str, query: dict[str, str], timeout_s: int) -> urllib3.BaseHTTPResponse:
        follow = {**query, "watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(timeout_s)}
        return self._selecting(follow, lambda asked: self._send("GET", path, asked, None, SILENCE_TIMEOUT_S))

    def _list(self, path: str, query: dict[str, str]) -> "_Pages":
        return _Pages(self, path, query)

    def limit_of(self, path: str) -> int:
        """Return with how many objects in a page a list begins."""
        return self._limits.get(path, PAGE)

    def note_limit(self, path: str, limit: int) -> None:
        """Begin the next list so."""
        if limit < PAGE:
            self._limits[path] = limit
        else:
            self._limits.pop(path, None)

    @contextlib.contextmanager
    def page(self, path: str, query: dict[str, str]) -> Generator["_Page"]:
        """One page of a list, for as long as it is looked at; without content if it has more than MAX_PAGE_BYTES.

        The server is waited for before a place in memory is taken: a list that it is slow with holds up no others."""
        answer = self._selecting(query, lambda asked: self._send("GET", path, asked, None, REQUEST_TIMEOUT_S))
        if not self._pages.acquire(timeout=PAGE_WAIT_S):
            answer.close()
            raise UnreachableError(f"GET {path}: {PAGES_AT_ONCE} others are being read")
        try:
            yield self._content(answer, "GET", path, None if query["limit"] == "1" else MAX_PAGE_BYTES)
        finally:
            self._pages.release()

    def _selecting(self, query: dict[str, str], ask: Callable[[dict[str, str]], T]) -> T:
        """Ask, and where FineTuneJobs are selected by a field that the server does not know, once more without that."""
        if phase_selectors.PHASE_FIELD not in query.get(phase_selectors.PARAMETER, ""):
            return ask(query)
        try:
            answer = ask(query)
        except ApiError as error:
            if error.status != phase_selectors.BAD_REQUEST:
                raise
            answer = ask({name: value for name, value in query.items() if name != phase_selectors.PARAMETER})
            self._selection.answered(selected=False)
        else:
            self._selection.answered(selected=True)
        return answer

    def _gone_is_fine(self, verb: str, method: str, path: str, body: Body, query: dict[str, str]) -> Body | None:
        try:
            return self._write(verb, "jobs", method, path, body, query)
        except ApiError as error:
            # 409: the precondition failed, so another object has the name by now; of a patch that says 422.
            is_another = error.status == 422 and "metadata.uid" in error.message
            if error.status not in (404, 409) and not is_another:
                raise
            return None

    def _write(
        self, verb: str, resource: str, method: str, path: str, body: Body, query: dict[str, str] | None = None
    ) -> Body:
        self._metrics.api_writes.labels(verb, resource).inc()
        return self._request(method, path, query, body)

    def _request(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        body: Body | None = None,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> Body:
        answer = self._send(method, path, query or {}, body, timeout_s)
        return cast(Body, self._content(answer, method, path, None).content)

    def _content(self, answer: urllib3.BaseHTTPResponse, method: str, path: str, max_bytes: int | None) -> "_Page":
        """Read an answer, at most so many bytes."""
        try:
            text = answer.read(max_bytes + 1 if max_bytes is not None else None)
            if max_bytes is not None and len(text) > max_bytes:
                answer.close()
                return _Page(None, len(text))
            content = cast(Body, orjson.loads(text))
            self._answered()
            return _Page(content, len(text))
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise UnreachableError(f"{method} {path}: {type(error).__name__}") from error
        finally:
            answer.release_conn()

    def _send(
        self, method: str, path: str, query: dict[str, str], body: Body | None, read_timeout_s: float
    ) -> urllib3.BaseHTTPResponse:
        waits = urllib3.Timeout(connect=min(CONNECT_TIMEOUT_S, read_timeout_s), read=read_timeout_s)
        try:
            entry = self._current_entry()
            url = f"{entry.prefix}{path}" + (f"?{urlencode(query, quote_via=quote)}" if query else "")
            headers = entry.headers | ({"Content-Type": _CONTENT[method]} if method in _CONTENT else {})
            content = None if body is None else json.dumps(body).encode()
            answer = entry.pool.urlopen(
                method, url, body=content, headers=headers, timeout=waits, preload_content=False
            )
            if answer.status >= 400:
                self._answered()
                raise self._error(answer)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            self._metrics.api_errors.labels("unreachable").inc()
            raise UnreachableError(f"{method} {path}: {type(error).__name__}") from error
        return answer

    def _current_entry(self) -> "_Entry":
        """Return what the client, which is asked once in a while, says of each request.

        Each time it sets all that it already has, looks through the whole environment for a proxy, and copies what it
        is given, field by field."""
        entry = self._entry
        if entry is None or time.monotonic() >= entry.until_s:
            given = {"Accept": "application/json", "User-Agent": FIELD_MANAGER}
            _, host, headers, *_ = self._client.param_serialize(
                "GET", "", header_params=given, auth_settings=["BearerToken"]
            )
            # Else it is searched for, and the address read, with each request.
            pool = self._pool.connection_from_url(host)
            prefix = urlsplit(host).path.rstrip("/")
            self._entry = entry = _Entry(pool, prefix, headers, time.monotonic() + CREDENTIALS_S)
        return entry

    def _error(self, answer: urllib3.BaseHTTPResponse) -> ApiError:
        self._metrics.api_errors.labels(str(answer.status)).inc()
        if answer.status == 429:
            self._metrics.api_throttled.inc()
        text = answer.data.decode(errors="replace")
        try:
            status = cast(Body, orjson.loads(text))
        except ValueError:
            status = {"message": shortened(text, 256)}
        retry_after = answer.headers.get("Retry-After", "")
        wait_s = float(retry_after) if retry_after.isdecimal() else 0.0
        return ApiError(answer.status, str(status.get("reason", "")), str(status.get("message", "")), wait_s)


_CONTENT = {
    "POST": "application/json",
    "PUT": "application/json",
    "DELETE": "application/json",
    "PATCH": "application/merge-patch+json",
}


@dataclass(frozen=True)
class _Entry:
    """The connections to the server, with what stands before each path and the headers of each request, with the
    credentials. until_s: monotonic."""

    pool: urllib3.HTTPConnectionPool
    prefix: str
    headers: dict[str, str]
    until_s: float


@dataclass(frozen=True)
class _Page:
    """An answer as it was read. content: None if it has more bytes than may be read."""

    content: Body | None
    size_bytes: int


class _Pages:
    """A list in pages; `version` is that of the whole list, known after the first page."""

    def __init__(self, cluster: Cluster, path: str, query: dict[str, str]) -> None:
        self._cluster, self._path, self._query = cluster, path, query
        self.version = ""

    def items(self) -> Iterator[Body]:
        token, limit = "", self._cluster.limit_of(self._path)
        while True:
            query = {**self._query, "limit": str(limit)} | ({"continue": token} if token else {})
            with self._cluster.page(self._path, query) as page:
                if page.content is None:
                    limit = max(1, limit // 10)
                else:
                    meta = cast(Mapping[str, Any], page.content.get("metadata") or {})
                    self.version, token = str(meta.get("resourceVersion", "")), str(meta.get("continue") or "")
                    if page.size_bytes < MAX_PAGE_BYTES / 4:  # one large object must not slow down all that follow
                        limit = min(PAGE, limit * 2)
                    yield from cast(list[Body], page.content.get("items") or [])
                is_last = page.content is not None and not token
            del page  # before the next one is read
            self._cluster.note_limit(self._path, limit)
            if is_last:
                return


def _path(kind: Kind, namespace: str | None, name: str | None = None) -> str:
    parts = [_PREFIX[kind], *(["namespaces", quote(namespace)] if namespace else []), kind]
    return "/".join([*parts, *([quote(name)] if name else [])])


def _lines(answer: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    """Whole lines of a stream; an object of the API is at most a few MiB."""
    rest = bytearray()
    for chunk in answer.stream(65536, decode_content=True):
        rest += chunk
        *whole, last = bytes(rest).split(b"\n")
        rest = bytearray(last)
        yield from (line for line in whole if line)
