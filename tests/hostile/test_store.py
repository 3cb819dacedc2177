"""An object store that answers without end, byte by byte, or wrongly: every call ends by a named fault."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from socket import socket

import pytest
from botocore.retries.quota import RetryQuota

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.run import StorageConfig
from finetune_trainer.store import Store, multipart, open_store, reading, s3, transport
from hand_clock import Clock
from hostile_http import Answer, serving
from stub_s3 import without_botocore_pauses
from waiting import PATIENCE_S

OBJECT = "s3://bucket/folder/object"
OK = b"HTTP/1.1 200 OK\r\n"
TAG = b'ETag: "e"\r\n'
MIB = 1 << 20


def sized(body: bytes, *headers: bytes, status: bytes = OK) -> bytes:
    # As the server ends each connection, it says so: one that is used again would be found broken, or not, by chance.
    headers = (b"Connection: close\r\n", *headers)
    return status + b"".join(headers) + b"Content-Length: %d\r\n\r\n" % len(body) + body


def listing(inner: str) -> bytes:
    inner = inner if "IsTruncated" in inner else f"<IsTruncated>false</IsTruncated>{inner}"
    return sized(f"<ListBucketResult>{inner}</ListBucketResult>".encode())


def says(answer: bytes) -> Answer:
    return lambda connection, _request: connection.sendall(answer)


def for_ever(beginning: bytes, then: bytes) -> Answer:
    """Never stops, as fast as it is read."""
    block = then * (65536 // len(then) + 1)

    def answer(connection: socket, _request: str) -> None:
        connection.sendall(beginning)
        while True:
            connection.sendall(block)

    return answer


def dripping(clock: Clock, beginning: bytes, then: bytes = b" ") -> Answer:
    """Never stops, and never stalls: the next byte comes 20 s of the clock later."""

    def answer(connection: socket, _request: str) -> None:
        connection.sendall(beginning)
        while True:
            clock.now_s += 20
            connection.sendall(then)
            time.sleep(0.01)  # lets the reader wait for the next one

    return answer


def _more_retries(_quota: RetryQuota, _amount: int) -> bool:
    return True


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries as in production, without the waits between them."""
    without_botocore_pauses(monkeypatch)
    # One client has a number of retries for all its calls, here those of other tests.
    monkeypatch.setattr(RetryQuota, "acquire", _more_retries)
    monkeypatch.setattr(reading, "_MAX_PAUSE_S", 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The product's clock, which only the server moves: how fast this machine is ends nothing."""
    clock = Clock(1000.0)
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


ACTIONS: dict[str, Callable[[Store], object]] = {
    "list": lambda store: store.list("s3://bucket/folder/"),
    "head": lambda store: store.head(OBJECT),
    "read": lambda store: store.read(OBJECT),
    "rest": lambda store: store.read_range(OBJECT, 5, 5),
    "put": lambda store: store.put(OBJECT, b"content"),
}


class Hostile:
    """A store whose server gives the answer that a test sets."""

    def __init__(self, store: Store, keys: Path) -> None:
        self.store, self.keys = store, keys
        self.answer = says(b"")

    def fault_of(self, answer: Answer, action: str) -> StageError:
        """How an action on such a store ends."""
        self.answer = answer
        with pytest.raises(StageError) as caught:
            ACTIONS[action](self.store)
        return caught.value


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Generator[Hostile]:
    """One for all tests: its client takes longer to make than to use."""
    keys = tmp_path_factory.mktemp("keys")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        (keys / name).write_text("key")
    with serving(lambda connection, request: found.answer(connection, request)) as endpoint:
        found = Hostile(open_store(StorageConfig(endpoint=endpoint, path_style=True, credentials_dir=str(keys))), keys)
        yield found


ENDLESS = {
    "a listing": ("list", for_ever(OK + b"\r\n<ListBucketResult>", b" ")),
    "a listing in chunks": (
        "list",
        for_ever(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b" " * 4096 + b"\r\n"),
    ),
    "the end of the chunks": ("list", for_ever(OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n")),
    "an error": ("read", for_ever(b"HTTP/1.1 404 Not Found\r\n\r\n<Error>", b" ")),
    "an error of a write": ("put", for_ever(b"HTTP/1.1 403 Forbidden\r\n\r\n<Error>", b" ")),
    "answers that say Continue": ("put", for_ever(b"", b"HTTP/1.1 100 Continue\r\n\r\n")),
    "headers after Continue": ("put", for_ever(b"HTTP/1.1 100 Continue\r\n", b"a: b\r\n")),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_an_answer_without_end_is_given_up(hostile: Hostile, what: str) -> None:
    action, answer = ENDLESS[what]
    error = hostile.fault_of(answer, action)
    assert error.fault is Fault.STORAGE_UNAVAILABLE
    assert "more than 4 MiB" in str(error)


DRIPPING = {
    "a status line": ("list", b"", b"H"),
    "headers of a listing": ("list", OK + b"a: ", b" "),
    "headers of a head": ("head", OK + b"a: ", b" "),
    "headers of an object": ("read", OK + b"a: ", b" "),
    "a listing": ("list", OK + b"\r\n<ListBucketResult>", b" "),
    "an error": ("read", b"HTTP/1.1 404 Not Found\r\n\r\n<Error>", b" "),
    "an answer to a write": ("put", OK + TAG + b"Content-Length: 100000\r\n\r\n", b" "),
}


@pytest.mark.parametrize("what", DRIPPING)
def test_an_answer_that_drips_ends_with_the_time_of_the_call(hostile: Hostile, clock: Clock, what: str) -> None:
    action, beginning, then = DRIPPING[what]
    error = hostile.fault_of(dripping(clock, beginning, then), action)
    assert error.fault is Fault.STORAGE_UNAVAILABLE
    assert "does not answer to the end" in str(error)


def test_the_content_of_an_object_that_drips_is_given_up(hostile: Hostile, clock: Clock) -> None:
    error = hostile.fault_of(dripping(clock, OK + TAG + b"Content-Length: 100000\r\n\r\n"), "read")
    assert error.fault is Fault.STORAGE_UNAVAILABLE
    assert "slower than 64 KiB/s" in str(error)
    assert error.args_by_name["tries"] == reading.MAX_CUTS + 1


def test_a_connection_that_crawls_is_replaced_by_one_for_the_rest(
    hostile: Hostile, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(256)) * 12_000
    fast, came, taken = content[: 2 * MIB], list[int](), threading.Event()
    received = transport.Exchange.received
    begins: list[int] = []

    def received_and_counted(self: transport.Exchange, count: int, waited_s: float) -> None:
        came.append(count)
        if sum(came) >= len(fast):
            taken.set()
        received(self, count, waited_s)

    def answer(connection: socket, request: str) -> None:
        begins.append(int(request.partition("Range: bytes=")[2].partition("-")[0] or 0))
        rest = content[begins[-1] :]
        if begins[-1] == 0:
            connection.sendall(OK + TAG + b"Content-Length: %d\r\n\r\n" % len(content) + fast)
            assert taken.wait(PATIENCE_S)
            dripping(clock, b"")(connection, "")
        place = b"Content-Range: bytes %d-%d/%d\r\n" % (begins[-1], len(content) - 1, len(content))
        connection.sendall(sized(rest, TAG, place, status=b"HTTP/1.1 206 Partial Content\r\n"))

    monkeypatch.setattr(transport.Exchange, "received", received_and_counted)
    hostile.answer = answer
    assert hostile.store.read(OBJECT)[0] == content
    assert begins[-1] >= MIB


def test_a_server_that_does_not_take_what_is_written_is_given_up(
    hostile: Hostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "STALL_TIMEOUT_S", 0.1)
    monkeypatch.setattr(transport, "CALL_TIMEOUT_S", 0.3)
    monkeypatch.setattr(transport, "SLOW_BYTES_PER_S", 1 << 40)  # else its size would be allowed a minute

    given_up = threading.Event()

    def answer(_connection: socket, _request: str) -> None:
        given_up.wait(PATIENCE_S)

    hostile.answer = answer
    with pytest.raises(StageError) as caught:
        hostile.store.put(OBJECT, b"x" * (32 * MIB))
    given_up.set()
    assert caught.value.fault is Fault.STORAGE_UNAVAILABLE


def leading_on(*tokens: str, entries: str = "") -> Answer:
    """Listings that are never complete, each with the next of the tokens, over and over."""
    pages = iter(range(10**9))

    def answer(connection: socket, _request: str) -> None:
        number = next(pages)
        token = tokens[number % len(tokens)].format(number)
        inner = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>{entries}"
        connection.sendall(listing(inner))

    return answer


ENTRY = "<Contents><Key>folder/{}</Key><Size>1</Size></Contents>"


@pytest.mark.parametrize(
    "answer",
    [
        leading_on("again"),
        leading_on("a", "b", "c"),
        leading_on(""),
        says(listing("<IsTruncated>true</IsTruncated>" + ENTRY.format("a"))),
    ],
)
def test_a_listing_that_leads_nowhere_is_given_up(hostile: Hostile, answer: Answer) -> None:
    error = hostile.fault_of(answer, "list")
    assert error.fault is Fault.STORAGE_UNAVAILABLE
    assert "a listing that is not complete does not lead on" in str(error)


def test_a_listing_whose_pages_never_end_ends_with_its_time(hostile: Hostile, clock: Clock) -> None:
    pages = leading_on("{}")

    def answer(connection: socket, request: str) -> None:
        clock.now_s += 100
        pages(connection, request)

    error = hostile.fault_of(answer, "list")
    assert error.fault is Fault.STORAGE_UNAVAILABLE
    assert "the listing goes on" in str(error)


def test_a_listing_without_end_of_what_does_not_match_is_given_up(
    hostile: Hostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "MAX_LISTED", 1000)
    hostile.answer = leading_on("{}", entries="".join(ENTRY.format(number) for number in range(100)))
    with pytest.raises(StageError) as caught:
        hostile.store.match("s3://bucket/folder/**/none.jsonl")
    assert caught.value.fault is Fault.TOO_MANY_FILES


# Otherwise a listing of nothing.
DECLARED = """<!DOCTYPE a [<!ENTITY b "false">]><ListBucketResult><IsTruncated>&b;</IsTruncated></ListBucketResult>"""
ODD = {
    "no bytes at all": ("list", OK + b"\r\n"),
    "a page of something else": ("list", sized(b"<html/>")),
    "a size in words": ("list", listing(ENTRY.format("a").replace(">1<", ">many<"))),
    "a negative size": ("list", listing(ENTRY.format("a").replace(">1<", ">-1<"))),
    "a size beyond all objects": ("list", listing(ENTRY.format("a").replace(">1<", f">{10**30}<"))),
    "an entry without a size": ("list", listing("<Contents><Key>folder/a</Key></Contents>")),
    "an entry without a name": ("list", listing("<Contents><Size>1</Size></Contents>")),
    "a name that was not asked for": ("list", listing(ENTRY.format("a").replace("folder/", "../../etc/"))),
    "a time that is none": ("list", listing("<Contents><LastModified>soon</LastModified></Contents>")),
    "declared entities": ("list", sized(DECLARED.encode())),
    "declared entities in UTF-16": ("list", sized(DECLARED.encode("utf-16"))),
    "a head without an ETag": ("head", sized(b"")),
    "a head without a size": ("head", OK + TAG + b"\r\n"),
    "a head with a size in words": ("head", OK + TAG + b"Content-Length: many\r\n\r\n"),
    "a head with a time that is none": ("head", sized(b"", TAG, b"Last-Modified: soon\r\n")),
    "a head of the year 10^15": ("head", sized(b"", TAG, b"Last-Modified: 99999999999999999\r\n")),
    "a head with parts in words": ("head", sized(b"", TAG, b"x-amz-mp-parts-count: many\r\n")),
    "content without an ETag": ("read", sized(b"content")),
    "content without a size": ("read", OK + TAG + b"\r\ncontent"),
    "content in chunks beside a size": (
        "read",
        OK + TAG + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n",
    ),
    "an ETag of thousands of characters": ("read", sized(b"a", b"ETag: " + b"e" * 9000 + b"\r\n")),
    "a range without a size": ("rest", sized(b"56789", TAG, b"Content-Range: bytes 5-9/*\r\n")),
    "a range in words": ("rest", sized(b"56789", TAG, b"Content-Range: bytes five-nine/ten\r\n")),
    "a range with a negative size": ("rest", sized(b"56789", TAG, b"Content-Range: bytes 5-9/-10\r\n")),
    "a range of another place": ("rest", sized(b"56789", TAG, b"Content-Range: bytes 4-8/10\r\n")),
    "a range beyond its object": ("rest", sized(b"56789", TAG, b"Content-Range: bytes 5-9/7\r\n")),
    "an empty range": ("rest", sized(b"56789", TAG, b"Content-Range: \r\n")),
    "a range of all": ("rest", sized(b"0123456789", TAG)),
    "a write without an ETag": ("put", sized(b"")),
    "a listing with a key twice": (
        "list",
        listing("<EncodingType>url</EncodingType>" + ENTRY.format("a").replace("<Size>", "<Key>folder/b</Key><Size>")),
    ),
    "a listing with a size twice": ("list", listing(ENTRY.format("a").replace("<Size>", "<Size>1</Size><Size>"))),
}


@pytest.mark.parametrize("what", ODD)
def test_an_answer_that_is_none_is_named(hostile: Hostile, what: str) -> None:
    action, answer = ODD[what]
    error = hostile.fault_of(says(answer), action)
    assert error.fault is Fault.STORAGE_UNAVAILABLE
    assert "does not answer as S3 does" in str(error)


# Errors whose parts are not where those of S3 are. The library takes them from there without looking.
ODD_ERRORS = {
    "a code of elements": b"<Error><Code><a>b</a></Code></Error>",
    "a code that is twice there": b"<Error><Code>a</Code><Code>b</Code></Error>",
    "a message of elements": b"<Error><Code>AuthorizationHeaderMalformed</Code><Message><a>b</a></Message></Error>",
    "a region of elements": b"<Error><Code>AuthorizationHeaderMalformed</Code><Region><a>b</a></Region></Error>",
    "a region that is no region": b"<Error><Code>PermanentRedirect</Code><Region>evil.example/</Region></Error>",
    "an error that is a word": b"<a><Error>b</Error></a>",
    "an error within another element": b"<a><Error><Code><b>c</b></Code></Error></a>",
    "facts of the answer that are a word": b"<a><ResponseMetadata>b</ResponseMetadata></a>",
    "elements within each other without end": b"<Error>" + b"<a>" * 3000 + b"</a>" * 3000 + b"</Error>",
    "a listing": b"<ListBucketResult><EncodingType>url</EncodingType><Contents/></ListBucketResult>",
}


@pytest.mark.parametrize("what", ODD_ERRORS)
@pytest.mark.parametrize("status", [b"200 OK", b"301 Moved", b"400 Bad Request", b"403 Forbidden", b"503 Unavailable"])
@pytest.mark.parametrize("action", ["list", "read", "put"])
def test_an_error_that_is_none_is_named_whatever_its_status(
    hostile: Hostile, action: str, status: bytes, what: str
) -> None:
    error = hostile.fault_of(says(sized(ODD_ERRORS[what], status=b"HTTP/1.1 %s\r\n" % status)), action)
    assert error.fault in (Fault.STORAGE_UNAVAILABLE, Fault.ACCESS_DENIED, Fault.WRONG_REGION)


@pytest.mark.parametrize("action", ["read", "rest"])
def test_a_condition_that_nobody_set_and_that_fails_is_named(hostile: Hostile, action: str) -> None:
    error = hostile.fault_of(says(sized(b"", status=b"HTTP/1.1 412 Precondition Failed\r\n")), action)
    assert error.fault is Fault.STORAGE_UNAVAILABLE


def test_a_version_that_was_not_asked_for_is_not_read(hostile: Hostile) -> None:
    hostile.answer = says(sized(b"another", b'ETag: "f"\r\n'))
    with pytest.raises(StageError) as caught:
        hostile.store.open(OBJECT, if_match='"e"')
    assert caught.value.fault is Fault.INPUT_CHANGED


@pytest.mark.parametrize(
    ("etag", "total"), [(b'"f"', 2 * MIB), (b'"e"', 3 * MIB)], ids=["another version", "another size"]
)
def test_the_rest_of_another_version_is_not_taken_for_that_of_the_first(
    hostile: Hostile, etag: bytes, total: int
) -> None:
    """Some stores do not heed If-Match."""

    def answer(connection: socket, request: str) -> None:
        if "Range" not in request:
            connection.sendall(OK + TAG + b"Content-Length: %d\r\n\r\n" % (2 * MIB) + b"a" * MIB)
            return
        place = b"Content-Range: bytes %d-%d/%d\r\n" % (MIB, total - 1, total)
        status = b"HTTP/1.1 206 Partial Content\r\n"
        connection.sendall(sized(b"b" * (total - MIB), b"ETag: %s\r\n" % etag, place, status=status))

    hostile.answer = answer
    with pytest.raises(StageError) as caught:
        hostile.store.read(OBJECT)
    assert caught.value.fault is Fault.INPUT_CHANGED


@pytest.mark.parametrize("etag", [b'W/"e"', b"e"])
def test_an_etag_in_another_form_is_of_the_same_version(hostile: Hostile, etag: bytes) -> None:
    hostile.answer = says(sized(b"content", b"ETag: %s\r\n" % etag))
    assert hostile.store.open(OBJECT, if_match='"e"').read() == b"content"


def test_no_more_than_the_rest_of_an_object_is_read(hostile: Hostile) -> None:
    def answer(connection: socket, request: str) -> None:
        if "Range" not in request:
            connection.sendall(OK + TAG + b"Content-Length: 10\r\n\r\n" + b"a" * 5)
            return
        place = b"Content-Range: bytes 5-9/10\r\n"
        connection.sendall(sized(b"b" * 5000, TAG, place, status=b"HTTP/1.1 206 Partial Content\r\n"))

    hostile.answer = answer
    with hostile.store.open(OBJECT) as stream:
        assert stream.read() == b"aaaaabbbbb"


PAGE = b"<!DOCTYPE html>\n<html lang=en><meta charset=utf-8><title>Error (Server Error)!!1</title>"


@pytest.mark.parametrize("action", ["list", "read", "put"])
@pytest.mark.parametrize("status", [b"502 Bad Gateway", b"503 Service Unavailable"])
def test_an_error_page_of_what_stands_before_the_store_is_tried_again(
    hostile: Hostile, action: str, status: bytes
) -> None:
    pages = [sized(PAGE, status=b"HTTP/1.1 %s\r\n" % status)] * 3
    proper = listing("") if action == "list" else sized(b"", TAG)

    def answer(connection: socket, _request: str) -> None:
        connection.sendall(pages.pop() if pages else proper)

    hostile.answer = answer
    ACTIONS[action](hostile.store)
    assert not pages


def test_an_error_page_that_stays_is_told_by_its_status(hostile: Hostile) -> None:
    error = hostile.fault_of(says(sized(PAGE, status=b"HTTP/1.1 503 Service Unavailable\r\n")), "list")
    assert error.fault is Fault.STORAGE_UNAVAILABLE
    assert "the store answered 503 (HTTP 503)" in str(error)


def test_a_listing_that_is_cut_off_is_not_taken_for_all_there_is(hostile: Hostile) -> None:
    whole = listing(ENTRY.format("a"))
    error = hostile.fault_of(says(sized(whole.partition(b"\r\n\r\n")[2][:-9])), "list")
    assert error.fault is Fault.STORAGE_UNAVAILABLE


def test_an_upload_that_is_given_no_number_is_named(
    hostile: Hostile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "MULTIPART_THRESHOLD_BYTES", 100)
    monkeypatch.setattr(multipart, "PART_BYTES", 64)
    (tmp_path / "file").write_bytes(b"x" * 200)
    hostile.answer = says(sized(b"<InitiateMultipartUploadResult/>"))
    with pytest.raises(StageError) as caught:
        hostile.store.upload(tmp_path / "file", OBJECT)
    assert caught.value.fault is Fault.STORAGE_UNAVAILABLE


def test_a_store_that_cannot_give_an_upload_up_hides_no_reason_for_it(
    hostile: Hostile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "MULTIPART_THRESHOLD_BYTES", 100)
    monkeypatch.setattr(multipart, "PART_BYTES", 64)
    (tmp_path / "file").write_bytes(b"x" * 200)

    def answer(connection: socket, request: str) -> None:
        begun = sized(b"<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>")
        answers = {"POST": begun, "PUT": sized(b"", TAG), "DELETE": sized(b"no XML")}
        connection.sendall(answers[request.partition(" ")[0]])

    def stop() -> None:
        raise InterruptedError

    hostile.answer = answer
    with pytest.raises(InterruptedError):
        hostile.store.telling(stop).upload(tmp_path / "file", OBJECT)


def test_a_connection_that_ends_after_continue_does_not_spin(hostile: Hostile) -> None:
    error = hostile.fault_of(says(b"HTTP/1.1 100 Continue\r\n"), "put")
    assert error.fault is Fault.STORAGE_UNAVAILABLE


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
def test_a_key_with_a_line_break_is_named_and_not_quoted(name: str, tmp_path: Path) -> None:
    for each in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", name):
        (tmp_path / each).write_text("very\nsecret" if each == name else "key")
    with pytest.raises(StageError) as caught:
        open_store(StorageConfig(credentials_dir=str(tmp_path))).read(OBJECT)
    assert caught.value.fault is Fault.CONFIG_UNREADABLE
    assert name in str(caught.value)
    assert "very" not in str(caught.value)


PEAK = """
import json, resource, sys
from finetune_api.errors import StageError
from finetune_api.run import StorageConfig
from finetune_trainer.store import open_store
def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
store = open_store(StorageConfig(endpoint=sys.argv[1], path_style=True, credentials_dir=sys.argv[2]))
store.head("s3://bucket/warm")
before = peak_mib()
try:
    getattr(store, sys.argv[3])("s3://bucket/folder/x")
    fault = ""
except StageError as error:
    fault = error.fault.value
print(json.dumps({"fault": fault, "more_mib": peak_mib() - before}))
"""
MANY = "<Contents/>" * ((4 * MIB - 100) // len("<Contents/>"))


@pytest.mark.parametrize(
    ("action", "answer"),
    [
        ("list", for_ever(OK + b"\r\n<ListBucketResult>", b"<Contents></Contents>")),
        ("read", for_ever(b"HTTP/1.1 404 Not Found\r\n\r\n<Error>", b" ")),
        ("list", says(listing(MANY))),
    ],
    ids=["an endless listing", "an endless error", "the largest listing there may be"],
)
def test_no_answer_takes_much_memory(hostile: Hostile, action: str, answer: Answer) -> None:
    def first_a_head(connection: socket, request: str) -> None:
        (says(sized(b"", TAG)) if request.startswith("HEAD") else answer)(connection, request)

    with serving(first_a_head) as endpoint:
        done = subprocess.run(
            [sys.executable, "-P", "-c", PEAK, endpoint, str(hostile.keys), action],
            capture_output=True,
            check=True,
            timeout=PATIENCE_S,
        )
    found = json.loads(done.stdout)
    assert found["fault"] == Fault.STORAGE_UNAVAILABLE
    assert found["more_mib"] < 256
