"""A small S3 in memory that fails as a test tells it to: for what a real server cannot be made to do."""

import base64
import contextlib
import hashlib
import itertools
import threading
import zlib
from collections.abc import Generator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Trouble:
    """What happens to one request instead of, or beside, its proper answer."""

    method: str
    status: int = 0  # answer so, with `code`, and do nothing
    code: str = "InternalError"
    more: str = ""  # further XML elements of that answer
    lose_answer: bool = False  # do it, then hang up
    cut_after: int | None = None  # send so many bytes of the body, then hang up
    then_write: bytes | None = None  # afterwards the object has this content
    name: str = ""  # only requests whose "bucket/key" contains this
    lasts: bool = False  # happens to every such request, until it is taken out of the list


@dataclass
class StubS3:
    """Buckets, objects, the troubles to come (first match is used up), and the requests seen."""

    endpoint: str
    objects: dict[str, bytes] = field(default_factory=dict[str, bytes])  # "bucket/key"
    buckets: set[str] = field(default_factory=lambda: {"bucket"})
    troubles: list[Trouble] = field(default_factory=list[Trouble])
    requests: list[str] = field(default_factory=list[str])
    parts: dict[int, bytes] = field(default_factory=dict[int, bytes])
    ignores_conditions: bool = False
    random_etags: bool = False  # every write of the same bytes gets another one, as with encryption
    etags: dict[str, str] = field(default_factory=dict[str, str])  # those that are not made of the content
    tells_checksums: bool = False
    checksum_type: str = "FULL_OBJECT"
    retags_after_list: bool = False
    accepted_keys: set[str] | None = None  # access keys that work; None = all
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tag(self, name: str) -> str:
        return self.etags.get(name) or etag(self.objects[name])

    def retag(self) -> None:
        """Give every object another ETag, as if all were written again with the same bytes."""
        for name in self.objects:
            self.etags[name] = f'"of-no-content-{next(_NUMBERS)}"'

    def write(self, name: str, content: bytes) -> None:
        self.objects[name] = content
        self.etags.pop(name, None)
        if self.random_etags:
            self.etags[name] = f'"of-no-content-{next(_NUMBERS)}"'

    def take_trouble(self, method: str, name: str) -> Trouble | None:
        for trouble in self.troubles:
            if trouble.method == method and trouble.name in name:
                if not trouble.lasts:
                    self.troubles.remove(trouble)
                return trouble
        return None


@contextlib.contextmanager
def stub_s3() -> Generator[StubS3]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.s3 = StubS3(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.s3  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def without_botocore_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let botocore try again as in production, without the waits between."""

    def no_delay(_self: object, _context: object) -> float:
        return 0.0

    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", no_delay)


def etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 3600  # a client that pauses, on a busy machine say, finds its connection as it was

    @property
    def s3(self) -> StubS3:
        return self.server.s3  # type: ignore[attr-defined]

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        name, query = unquote(url.path[1:]), parse_qs(url.query, keep_blank_values=True)
        with self.s3.lock:
            self.s3.requests.append(f"{self.command} {name} {self.headers.get('Range', '')}".strip())
            trouble = self.s3.take_trouble(self.command, name)
            if trouble and trouble.status:
                self._error(trouble.status, trouble.code, trouble.more)
                return
            key = self.headers.get("Authorization", "").partition("Credential=")[2].partition("/")[0]
            if self.s3.accepted_keys is not None and key not in self.s3.accepted_keys:
                self._error(400, "ExpiredToken")
                return
            self._act(name, query, body, trouble)
            if trouble and trouble.then_write is not None:
                self.s3.write(name, trouble.then_write)

    def _act(self, name: str, query: dict[str, list[str]], body: bytes, trouble: Trouble | None) -> None:
        bucket, _, key = name.partition("/")
        if bucket not in self.s3.buckets:
            self._error(404, "NoSuchBucket")
        elif not key:
            self._list(bucket, query)
        elif self.command == "POST":
            self._multipart(name, query, trouble)
        elif "partNumber" in query:
            self.s3.parts[int(query["partNumber"][0])] = body
            self._answer(200, b"", etag(body), trouble)
        elif self.command == "PUT":
            self._put(name, body, trouble)
        elif self.command == "DELETE":
            self.s3.objects.pop(name, None)
            self._answer(204, b"", "", trouble)
        else:
            self._get(name, trouble)

    def _multipart(self, name: str, query: dict[str, list[str]], trouble: Trouble | None) -> None:
        if "uploads" in query:
            self.s3.parts.clear()
            answer = "<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
            self._answer(200, answer.encode(), "", trouble)
        elif not self.s3.parts:
            self._error(404, "NoSuchUpload")
        else:
            content = b"".join(self.s3.parts[number] for number in sorted(self.s3.parts))
            self.s3.write(name, content)
            self.s3.parts.clear()
            answer = f"<CompleteMultipartUploadResult><ETag>{self.s3.tag(name)}</ETag></CompleteMultipartUploadResult>"
            self._answer(200, answer.encode(), "", trouble)

    def _put(self, name: str, body: bytes, trouble: Trouble | None) -> None:
        present = self.s3.objects.get(name)
        wanted = self.headers.get("If-Match")
        lost = (self.headers.get("If-None-Match") == "*" and present is not None) or (
            wanted is not None and (present is None or self.s3.tag(name) != wanted)
        )
        if lost and not self.s3.ignores_conditions:
            self._error(412, "PreconditionFailed")
            return
        self.s3.write(name, body)
        self._answer(200, b"", self.s3.tag(name), trouble)

    def _get(self, name: str, trouble: Trouble | None) -> None:
        content = self.s3.objects.get(name)
        if content is None:
            self._error(404, "NoSuchKey")
            return
        tag = self.s3.tag(name)
        if self.headers.get("If-Match", tag) != tag:
            self._error(412, "PreconditionFailed")
        elif wanted := self.headers.get("Range"):
            start, _, last = wanted.removeprefix("bytes=").partition("-")
            part = content[int(start) : int(last) + 1 if last else None]
            self._answer(206, part, tag, trouble, int(start), len(content))
        else:
            self._answer(200, content, tag, trouble)

    def _list(self, bucket: str, query: dict[str, list[str]]) -> None:
        """Two keys a page, so that paging is tested too."""
        prefix, after = query.get("prefix", [""])[0], query.get("continuation-token", [""])[0]
        keys = sorted(n.partition("/")[2] for n in self.s3.objects if n.startswith(f"{bucket}/{prefix}"))
        keys = [key for key in keys if key > after]
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.s3.objects[f'{bucket}/{key}'])}</Size>"
            f"<ETag>{self.s3.tag(f'{bucket}/{key}')}</ETag></Contents>"
            for key in keys[:2]
        )
        more = (
            f"<IsTruncated>true</IsTruncated><NextContinuationToken>{escape(keys[1])}</NextContinuationToken>"
            if len(keys) > 2
            else "<IsTruncated>false</IsTruncated>"
        )
        self._answer(200, f"<ListBucketResult>{more}{entries}</ListBucketResult>".encode(), "", None)
        if self.s3.retags_after_list:
            self.s3.retag()

    def _answer(
        self, status: int, body: bytes, tag: str, trouble: Trouble | None, start: int = 0, total: int | None = None
    ) -> None:
        if trouble and trouble.lose_answer:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if tag:
            self.send_header("ETag", tag)
        if total is not None:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{total}")
        if self.command == "HEAD" and self.s3.tells_checksums and self.headers.get("x-amz-checksum-mode"):
            self.send_header("x-amz-checksum-type", self.s3.checksum_type)
            self.send_header("x-amz-checksum-crc32", base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode())
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if trouble is None else body[: trouble.cut_after])
        if trouble and trouble.cut_after is not None:
            self.close_connection = True

    def _error(self, status: int, code: str, more: str = "") -> None:
        content = f"<Error><Code>{code}</Code>{more or '<Message>m</Message>'}</Error>"
        body = b"" if self.command == "HEAD" else content.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
