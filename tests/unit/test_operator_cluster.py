"""What the operator makes of the answers of an API server that is busy, restarted, cut off, or wrong."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from kubernetes import client
from prometheus_client import CollectorRegistry

from finetune_operator import cluster as cluster_module
from finetune_operator.cluster import ApiError, Cluster, UnreachableError, brief
from finetune_operator.metrics import Metrics
from finetune_operator.phase_selectors import CANNOT_SELECT, PhaseSelection

Answer = tuple[int, dict[str, str], bytes]


class Server:
    """Gives the scripted answers in turn, and notes what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.asked: list[tuple[str, str, dict[str, Any] | None]] = []
        self.tokens: list[str | None] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            def serve(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                script.asked.append((self.command, self.path, body))
                script.tokens.append(self.headers.get("Authorization"))
                status, headers, content = script.answers.pop(0)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = serve  # noqa: N815 - the names that http.server calls

            def log_message(self, format: str, *args: object) -> None:
                """Nobody reads it."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def says(self, status: int, content: object, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answers.append((status, named, content if isinstance(content, bytes) else json.dumps(content).encode()))

    def refuses(self, status: int, reason: str, message: str = "", **headers: str) -> None:
        self.says(status, {"kind": "Status", "code": status, "reason": reason, "message": message}, **headers)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


@pytest.fixture
def selection() -> PhaseSelection:
    return PhaseSelection()


@pytest.fixture
def cluster(
    server: Server, metrics: Metrics, selection: PhaseSelection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Cluster:
    port = server.http.server_address[1]
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "x", "users": [{"name": "x", "user": {}}],
        "clusters": [{"name": "x", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
    }  # fmt: skip
    path = tmp_path / "kubeconfig"
    path.write_text(json.dumps(config))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    return Cluster(metrics, 4, selection)


def line(kind: str, **body: Any) -> bytes:
    return json.dumps({"type": kind, "object": body}).encode() + b"\n"


def listed(*names: str, version: str = "7", token: str = "") -> dict[str, Any]:
    items = [{"metadata": {"name": name}} for name in names]
    return {"metadata": {"resourceVersion": version, "continue": token}, "items": items}


@pytest.mark.parametrize(("least_s", "looks"), [(3600.0, 1), (0.0, 5)])
def test_credentials_are_looked_at_now_and_then_and_not_for_each_request(
    server: Server, metrics: Metrics, monkeypatch: pytest.MonkeyPatch, least_s: float, looks: int
):
    seen: list[str] = []

    def load(client_configuration: client.Configuration) -> None:
        client_configuration.host = f"http://127.0.0.1:{server.http.server_address[1]}"
        client_configuration.api_key["BearerToken"] = "old"

        def look(settings: client.Configuration) -> None:
            seen.append(settings.api_key["BearerToken"])
            settings.api_key["BearerToken"] = "new"
            setattr(settings, "refresh_api_key_hook", look)  # noqa: B010 - as the client's own do; typed as None

        setattr(client_configuration, "refresh_api_key_hook", look)  # noqa: B010 - the same

    monkeypatch.setattr("kubernetes.config.load_kube_config", load)
    monkeypatch.setattr("finetune_operator.cluster.CREDENTIALS_S", least_s)
    cluster = Cluster(metrics, 4, PhaseSelection())
    for _ in range(5):
        server.says(200, {})
        cluster.get("jobs", "a", "bot")
    assert seen == ["old", *["new"] * (looks - 1)]
    assert server.tokens == ["new"] * 5  # the first request has what the first look found


def test_what_is_not_there_is_none(cluster: Cluster, server: Server):
    server.refuses(404, "NotFound")
    assert cluster.get("finetunejobs", "a", "bot") is None


@pytest.mark.parametrize("status", [400, 403, 409, 422, 429, 500, 503])
def test_a_refusal_keeps_its_code_and_reason_and_is_asked_only_once(
    cluster: Cluster, server: Server, metrics: Metrics, status: int
):
    server.refuses(status, "Because", "in words")
    with pytest.raises(ApiError, match="in words") as refusal:
        cluster.get("finetunejobs", "a", "bot")
    assert (refusal.value.status, refusal.value.reason) == (status, "Because")
    assert len(server.asked) == 1
    assert metrics.registry.get_sample_value("finetune_api_errors_total", {"code": str(status)}) == 1


def test_a_busy_server_says_how_long_to_wait(cluster: Cluster, server: Server, metrics: Metrics):
    server.refuses(429, "TooManyRequests", Retry_After="17")
    with pytest.raises(ApiError) as refusal:
        cluster.get("finetunejobs", "a", "bot")
    assert refusal.value.retry_after_s == 17
    assert metrics.registry.get_sample_value("finetune_api_throttled_total") == 1


def test_a_proxy_that_answers_no_json_is_an_error_with_its_words(cluster: Cluster, server: Server):
    server.says(502, b"<html>bad gateway</html>")
    with pytest.raises(ApiError, match="bad gateway"):
        cluster.get("finetunejobs", "a", "bot")


def test_an_answer_that_is_cut_short_says_nothing_about_whether_the_write_happened(cluster: Cluster, server: Server):
    server.says(201, b'{"metadata": ', Content_Length="1000", Connection="close")
    with pytest.raises(UnreachableError):
        cluster.create("jobs", {"metadata": {"namespace": "a", "name": "x"}})


def test_a_server_that_is_gone_is_unreachable(cluster: Cluster, server: Server):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(UnreachableError):
        cluster.get("finetunejobs", "a", "bot")


def test_a_status_is_written_only_onto_the_version_that_was_read(cluster: Cluster, server: Server):
    server.says(200, {"metadata": {}})
    cluster.patch_status("a", "bot", "41", {"phase": "Training"})
    method, path, body = server.asked[0]
    assert (method, path.partition("?")[0]) == (
        "PATCH",
        "/apis/finetune.dev/v1alpha1/namespaces/a/finetunejobs/bot/status",
    )
    assert body == {"metadata": {"resourceVersion": "41"}, "status": {"phase": "Training"}}


@pytest.mark.parametrize("status", [404, 409])
def test_a_deletion_is_in_the_background_of_one_object_and_fine_if_it_is_gone(
    cluster: Cluster, server: Server, status: int
):
    server.refuses(status, "x")
    cluster.delete_k8s_job("a", "train-1", "uid-1")
    assert server.asked[0][2] == {"propagationPolicy": "Background", "preconditions": {"uid": "uid-1"}}


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "gone"),
        (409, "x"),
        (422, 'Job.batch "train-1" is invalid: metadata.uid: Invalid value: "uid-1": field is immutable'),
    ],
)
def test_a_kubernetes_job_that_took_the_name_of_a_finished_one_is_given_no_ttl(
    cluster: Cluster, server: Server, status: int, message: str
):
    server.refuses(status, "x", message)
    assert cluster.set_ttl("a", "train-1", "uid-1", 60) is None
    assert server.asked[0][2] == {"metadata": {"uid": "uid-1"}, "spec": {"ttlSecondsAfterFinished": 60}}


def test_a_ttl_that_is_refused_for_another_reason_is_tried_again(cluster: Cluster, server: Server):
    server.refuses(422, "Invalid", "spec.ttlSecondsAfterFinished: Invalid value")
    with pytest.raises(ApiError):
        cluster.set_ttl("a", "train-1", "uid-1", 60)


def test_a_watch_lists_in_pages_what_has_our_label_and_follows_from_there(cluster: Cluster, server: Server):
    server.says(200, listed("one", token="more"))
    server.says(200, listed("two", version="9"))
    server.says(200, line("ADDED", metadata={"name": "three"}) + line("BOOKMARK"))
    seen = [(kind, (body.get("metadata") or {}).get("name")) for kind, body in cluster.watch("pods", "a", None)]
    told = [
        ("ITEM", "one"),
        ("ITEM", "two"),
        ("LISTED", None),
        ("OPENED", None),
        ("ADDED", "three"),
        ("BOOKMARK", None),
    ]
    assert seen == told
    queries = [parse_qs(urlsplit(path).query) for _, path, _ in server.asked]
    assert {query["labelSelector"][0] for query in queries} == {"app.kubernetes.io/managed-by=finetune-operator"}
    assert queries[1]["continue"] == ["more"]
    assert queries[2]["resourceVersion"] == ["9"]


def test_a_page_that_is_too_large_is_asked_for_again_with_fewer_objects(
    cluster: Cluster, server: Server, monkeypatch: pytest.MonkeyPatch
):
    """Whoever may create FineTuneJobs could else end an operator of all namespaces with annotations of 256 KiB."""
    monkeypatch.setattr(cluster_module, "MAX_PAGE_BYTES", 500)
    server.says(200, listed("one", token="more"))
    server.says(200, listed("x" * 500, "y", token="more"))
    server.says(200, listed("two", token="last"))
    server.says(200, listed("x" * 500))
    server.says(200, listed("end"))
    assert [body["metadata"]["name"] for body in cluster.list_unfinished("a")] == ["one", "two", "end"]
    queries = [parse_qs(urlsplit(path).query) for _, path, _ in server.asked]
    asked = [(query["limit"], query.get("continue")) for query in queries]
    assert asked == [(["200"], None), (["200"], ["more"]), (["20"], ["more"]), (["40"], ["last"]), (["4"], ["last"])]


def test_the_next_list_begins_with_as_many_objects_as_the_last_could_have(
    cluster: Cluster, server: Server, monkeypatch: pytest.MonkeyPatch
):
    """Each resync would else read megabytes for nothing first."""
    monkeypatch.setattr(cluster_module, "MAX_PAGE_BYTES", 2000)
    server.says(200, listed("x" * 2000, "y"))
    server.says(200, listed("x" * 1000))
    server.says(200, listed("x" * 1000))
    for _ in range(6):
        server.says(200, listed("one"))
    for _ in range(8):
        list(cluster.list_unfinished("a"))
    limits = [parse_qs(urlsplit(path).query)["limit"] for _, path, _ in server.asked]
    assert [limit for (limit,) in limits] == ["200", "20", "20", "20", "40", "80", "160", "200", "200"]


def test_an_object_that_is_larger_than_a_page_may_be_is_read_alone(
    cluster: Cluster, server: Server, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cluster_module, "MAX_PAGE_BYTES", 10)
    for _ in range(4):
        server.says(200, listed("one"))
    assert list(cluster.list_unfinished("a")) == listed("one")["items"]
    assert [parse_qs(urlsplit(path).query)["limit"] for _, path, _ in server.asked] == [["200"], ["20"], ["2"], ["1"]]


def test_of_all_lists_that_go_on_a_few_pages_at_a_time_are_in_memory(
    cluster: Cluster, server: Server, monkeypatch: pytest.MonkeyPatch
):
    """Fifty watched namespaces are listed at once, and each page of whole objects takes megabytes."""
    monkeypatch.setattr(cluster_module, "PAGE_WAIT_S", 0.01)
    lists = [cluster.list_unfinished("a") for _ in range(cluster_module.PAGES_AT_ONCE)]
    for going_on in lists:
        server.says(200, listed("one", "two"))
        next(going_on)
    server.says(200, listed("one"))
    with pytest.raises(UnreachableError, match="others are being read"):
        list(cluster.list_unfinished("a"))
    assert len(list(lists.pop())) == 1
    server.says(200, listed("one"))
    assert len(list(cluster.list_unfinished("a"))) == 1
    lists.pop().close()  # type: ignore[attr-defined]
    server.says(200, listed("one"))
    assert len(list(cluster.list_unfinished("a"))) == 1


def test_a_watch_that_goes_on_lists_nothing(cluster: Cluster, server: Server):
    server.says(200, line("ADDED", metadata={"name": "three"}))
    assert [kind for kind, _ in cluster.watch("pods", "a", "41")] == ["OPENED", "ADDED"]
    ((_, path, _),) = server.asked
    assert parse_qs(urlsplit(path).query)["resourceVersion"] == ["41"]


def test_a_lease_is_created_once_and_then_replaced_by_its_version(cluster: Cluster, server: Server):
    server.says(201, {})
    server.says(200, {})
    meta = {"name": "mine", "namespace": "a"}
    cluster.write_lease({"metadata": meta}, 5)
    cluster.write_lease({"metadata": {**meta, "resourceVersion": "3"}}, 5)
    place = "/apis/coordination.k8s.io/v1/namespaces/a/leases"
    assert [(method, path.partition("?")[0]) for method, path, _ in server.asked] == [
        ("POST", place),
        ("PUT", f"{place}/mine"),
    ]


def test_each_answer_is_noticed_in_the_thread_that_asked_whatever_it_says(
    server: Server, metrics: Metrics, cluster: Cluster
):
    noticed: list[str] = []
    cluster = Cluster(metrics, 4, PhaseSelection(), lambda: noticed.append(threading.current_thread().name))
    server.says(200, {})
    server.refuses(404, "NotFound")
    cluster.get("finetunejobs", "a", "bot")
    assert cluster.get("finetunejobs", "a", "bot") is None
    assert noticed == [threading.current_thread().name] * 2


def test_of_an_error_only_its_number_and_word_are_for_everybody():
    assert brief(ApiError(403, "Forbidden", "user x may not")) == "403 Forbidden"
    assert brief(ApiError(502, "<script>\n" + "a" * 99, "")) == "502 script" + "a" * 34
    assert brief(UnreachableError("GET /secret")) == "no answer"


def test_a_watch_whose_past_is_gone_says_so(cluster: Cluster, server: Server):
    server.says(200, listed())
    server.says(200, line("ERROR", code=410, reason="Expired", message="too old resource version"))
    with pytest.raises(ApiError, match="410"):
        list(cluster.watch("jobs", None, None))


@pytest.mark.parametrize("part", [b'{"type": "ADD', b"", b"\xff\xff\n"])
def test_a_watch_that_is_cut_or_garbled_is_unreachable(cluster: Cluster, server: Server, part: bytes):
    server.says(200, listed())
    server.says(200, part, Content_Length="1000")
    with pytest.raises(UnreachableError):
        list(cluster.watch("jobs", None, None))


def test_only_lists_of_our_own_objects_tell_whether_the_server_selects_them_by_phase(
    cluster: Cluster, server: Server, selection: PhaseSelection
):
    server.refuses(400, "BadRequest")
    server.says(200, listed("bot"))
    assert list(cluster.list_unfinished("a")) == listed("bot")["items"]
    assert selection.notes() == [CANNOT_SELECT]
    server.says(200, listed("event"))
    assert list(cluster.list_events("a")) == listed("event")["items"]
    assert selection.notes() == [CANNOT_SELECT]
    server.refuses(400, "BadRequest")
    with pytest.raises(ApiError, match="400"):
        list(cluster.list_events("a"))  # never all of them
