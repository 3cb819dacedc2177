"""What the store makes of servers and networks that misbehave; the server is a stub that does so on demand."""

import errno
import os
from collections.abc import Generator
from functools import partial
from pathlib import Path

import pytest

from finetune_api.errors import StageError
from finetune_api.reasons import FINAL_EXIT_CODES, Fault
from finetune_api.run import StorageConfig
from finetune_trainer.store import PreconditionFailed, Store, client, multipart, open_store, reading, s3, spec_field
from stub_s3 import StubS3, Trouble, etag, stub_s3, without_botocore_pauses

URI = "s3://bucket/folder/object"
NAME = "bucket/folder/object"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries as in production, without the waits between them."""
    without_botocore_pauses(monkeypatch)
    monkeypatch.setattr(reading, "_MAX_PAUSE_S", 0.0)
    monkeypatch.setattr(s3, "_CONFLICT_PAUSE_S", 0.0)
    monkeypatch.setattr(client, "_ROTATION_POLL_S", 0.05)


@pytest.fixture
def server() -> Generator[StubS3]:
    with stub_s3() as stub:
        yield stub


@pytest.fixture
def credentials(tmp_path: Path) -> Path:
    folder = tmp_path / "credentials"
    folder.mkdir()
    write_key(folder, "first")
    return folder


@pytest.fixture
def store(server: StubS3, credentials: Path) -> Store:
    return open_store(StorageConfig(endpoint=server.endpoint, path_style=True, credentials_dir=str(credentials)))


def write_key(folder: Path, access_key: str) -> None:
    """As the kubelet does: new files moved over the old ones."""
    for name, value in (("AWS_ACCESS_KEY_ID", access_key), ("AWS_SECRET_ACCESS_KEY", "secret\n")):
        staged = folder / f".{name}"
        staged.write_text(value)
        staged.replace(folder / name)


def test_a_download_survives_connections_cut_in_the_middle(store: Store, server: StubS3, tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    server.objects[NAME] = content
    server.troubles = [Trouble("GET", cut_after=1_000_001), Trouble("GET", cut_after=5), Trouble("GET", cut_after=0)]
    store.download(URI, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert server.requests == [
        f"GET {NAME}",
        f"GET {NAME} bytes=1000001-",
        f"GET {NAME} bytes=1000006-",
        f"GET {NAME} bytes=1000006-",
    ]


def test_an_object_that_changes_between_two_parts_of_a_stream_is_noticed(store: Store, server: StubS3) -> None:
    server.objects[NAME] = b"a" * 100_000
    server.troubles = [Trouble("GET", cut_after=10, then_write=b"b" * 100_000)]
    with pytest.raises(StageError) as caught, store.open(URI) as stream:
        stream.read()
    assert caught.value.fault is Fault.INPUT_CHANGED
    assert caught.value.args_by_name == {"file": URI}


def test_connections_that_break_without_end_are_given_up(store: Store, server: StubS3) -> None:
    server.objects[NAME] = b"a" * 100_000
    server.troubles = [Trouble("GET", cut_after=1)] * 100
    with pytest.raises(StageError) as caught, store.open(URI) as stream:
        stream.read()
    assert caught.value.fault is Fault.STORAGE_UNAVAILABLE
    assert len(server.requests) == reading.MAX_CUTS + 1


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_errors_of_the_server_are_tried_again(store: Store, server: StubS3, status: int) -> None:
    server.troubles = [Trouble("PUT", status=status, code="SlowDown")] * 5
    store.put(URI, b"content")
    assert server.objects[NAME] == b"content"


def test_a_server_that_stays_down_is_named_with_the_tries(store: Store, server: StubS3) -> None:
    server.troubles = [Trouble("PUT", status=503, code="SlowDown")] * 100
    with pytest.raises(StageError) as caught:
        store.put(URI, b"content")
    assert caught.value.fault is Fault.STORAGE_UNAVAILABLE
    assert caught.value.args_by_name["tries"] == client.MAX_TRIES
    assert caught.value.args_by_name["problem"] == "the store answered SlowDown (HTTP 503)"


@pytest.mark.parametrize(
    ("status", "code", "fault"),
    [
        (403, "AccessDenied", Fault.ACCESS_DENIED),
        (403, "SignatureDoesNotMatch", Fault.ACCESS_DENIED),
        (403, "InvalidAccessKeyId", Fault.ACCESS_DENIED),
        (404, "XAdminUserNotFound", Fault.ACCESS_DENIED),
        (400, "ExpiredToken", Fault.TOKEN_EXPIRED),
        (403, "RequestTimeTooSkewed", Fault.STORAGE_UNAVAILABLE),
        (404, "NoSuchBucket", Fault.BUCKET_NOT_FOUND),
        (404, "NoSuchKey", Fault.OBJECT_NOT_FOUND),
        (400, "<script>", Fault.STORAGE_UNAVAILABLE),
    ],
)
def test_every_refusal_has_its_own_fault(store: Store, server: StubS3, status: int, code: str, fault: Fault) -> None:
    server.troubles = [Trouble("GET", status=status, code=code.replace("<", "&lt;"))]
    with pytest.raises(StageError) as caught:
        store.read(URI)
    assert caught.value.fault is fault
    assert "?" not in str(caught.value)
    assert "<" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code", "more", "words"),
    [
        (
            301,
            "PermanentRedirect",
            "",
            "the bucket bucket is not in region us-east-1 of {endpoint}; fix storage.region",
        ),
        (400, "AuthorizationHeaderMalformed", "<Message>the region 'us-east-1' is wrong</Message>", "storage.region"),
        (400, "AuthorizationHeaderMalformed", "<Message>the Credential is mal-formed</Message>", "storage.secretRef"),
        (400, "IllegalLocationConstraintException", "", "storage.region"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD"])
def test_a_bucket_in_another_region_is_told_and_not_tried_again(
    store: Store, server: StubS3, method: str, status: int, code: str, more: str, words: str
) -> None:
    server.troubles = [Trouble(one, status=status, code=code, more=more) for one in {method, "GET"}]
    ask = {"GET": store.read, "HEAD": store.head, "PUT": partial(store.put, data=b"")}[method]
    with pytest.raises(StageError) as caught:
        ask(URI)
    assert words.format(endpoint=server.endpoint) in str(caught.value)
    assert caught.value.exit_code in FINAL_EXIT_CODES


def test_a_store_that_names_the_bucket_s_region_is_asked_there(store: Store, server: StubS3) -> None:
    server.objects[NAME] = b"content"
    region = "<Message>the region is wrong</Message><Region>eu-west-1</Region>"
    server.troubles = [Trouble("GET", status=400, code="AuthorizationHeaderMalformed", more=region)]
    assert store.read(URI)[0] == b"content"


def test_a_refused_head_is_explained_although_its_answer_has_no_body(store: Store, server: StubS3) -> None:
    server.troubles = [
        Trouble("HEAD", status=400),
        Trouble("GET", status=400, code="ExpiredToken"),
    ]
    with pytest.raises(StageError) as caught:
        store.head(URI)
    assert caught.value.fault is Fault.TOKEN_EXPIRED


def test_a_missing_bucket_is_not_taken_for_a_missing_object(store: Store) -> None:
    assert store.head(URI) is None
    with pytest.raises(StageError) as caught, spec_field("model.uri"):
        store.head("s3://elsewhere/object")
    assert caught.value.fault is Fault.BUCKET_NOT_FOUND
    assert str(caught.value).endswith("create it, or fix model.uri")


def test_an_object_in_a_bucket_that_may_not_be_listed_can_be_missing(store: Store, server: StubS3) -> None:
    server.troubles = [Trouble("GET", status=403, code="AccessDenied")]
    assert store.head(URI) is None


@pytest.mark.parametrize("condition", ["if_none_match", "if_match"])
def test_a_lost_answer_to_a_conditional_write_is_decided_by_the_content(
    store: Store, server: StubS3, condition: str
) -> None:
    arguments: dict[str, bool | str] = {"if_none_match": True}
    if condition == "if_match":
        server.objects[NAME] = b"before"
        arguments = {"if_match": etag(b"before")}
    server.troubles = [Trouble("PUT", lose_answer=True)]
    assert store.put(URI, b"mine", **arguments) == etag(b"mine")  # type: ignore[arg-type]


def test_a_lost_answer_does_not_hide_that_another_has_won(store: Store, server: StubS3) -> None:
    server.troubles = [Trouble("PUT", lose_answer=True, then_write=b"theirs")]
    with pytest.raises(PreconditionFailed):
        store.put(URI, b"mine", if_none_match=True)
    assert server.objects[NAME] == b"theirs"


def test_a_conflict_of_two_writers_is_tried_again_a_few_times(store: Store, server: StubS3) -> None:
    server.troubles = [Trouble("PUT", status=409, code="ConditionalRequestConflict")] * 2
    store.put(URI, b"mine", if_none_match=True)
    server.troubles = [Trouble("PUT", status=409, code="ConditionalRequestConflict")] * 100
    with pytest.raises(PreconditionFailed):
        store.put(f"{URI}2", b"mine", if_none_match=True)
    assert 100 - len(server.troubles) == s3.MAX_CONFLICTS


def test_a_store_without_conditional_writes_is_named(store: Store, server: StubS3) -> None:
    server.troubles = [Trouble("PUT", status=501, code="NotImplemented")] * 20
    with pytest.raises(StageError) as caught:
        store.put(URI, b"mine", if_none_match=True)
    assert caught.value.fault is Fault.CONDITIONAL_WRITES_UNSUPPORTED


def test_rotated_credentials_are_taken_up_without_a_restart(store: Store, server: StubS3, credentials: Path) -> None:
    server.objects[NAME] = b"content"
    server.accepted_keys = {"first"}
    store.read(URI)
    server.accepted_keys = {"second"}
    write_key(credentials, "second")
    assert store.read(URI)[0] == b"content"
    assert len(server.requests) == 2, "the change is seen before a request fails"


def test_an_expired_token_waits_for_the_rotated_secret_to_arrive(
    store: Store, server: StubS3, credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.objects[NAME] = b"content"
    server.accepted_keys = {"first"}
    store.read(URI)
    server.accepted_keys = {"second"}

    def rotate(_seconds: float) -> None:
        write_key(credentials, "second")

    monkeypatch.setattr(client.time, "sleep", rotate)
    assert store.read(URI)[0] == b"content"


def test_wrong_credentials_are_reported_at_once(store: Store, server: StubS3) -> None:
    server.accepted_keys = set()
    with pytest.raises(StageError) as caught:
        store.read(URI)
    assert caught.value.fault is Fault.TOKEN_EXPIRED
    assert len(server.requests) == 1


def test_missing_credential_files_are_named(server: StubS3, tmp_path: Path) -> None:
    store = open_store(StorageConfig(endpoint=server.endpoint, path_style=True, credentials_dir=str(tmp_path)))
    with pytest.raises(StageError) as caught:
        store.read(URI)
    assert caught.value.fault is Fault.NO_CREDENTIALS


def test_a_missing_ca_bundle_is_named() -> None:
    store = open_store(StorageConfig(ca_bundle_path="/nowhere/ca.crt"))
    with pytest.raises(StageError) as caught:
        store.read(URI)
    assert caught.value.fault is Fault.CONFIG_UNREADABLE


def test_an_endpoint_that_does_not_answer_is_named(credentials: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_TRIES", 2)
    store = open_store(StorageConfig(endpoint="http://127.0.0.1:9", path_style=True, credentials_dir=str(credentials)))
    with pytest.raises(StageError) as caught:
        store.read(URI)
    assert caught.value.fault is Fault.STORAGE_UNAVAILABLE
    assert caught.value.args_by_name["problem"] == "no connection to http://127.0.0.1:9"


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "MULTIPART_THRESHOLD_BYTES", 100)
    monkeypatch.setattr(multipart, "PART_BYTES", 64)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("size_bytes", [100, 101, 128, 640, 1001])
def test_large_files_are_sent_in_parts(store: Store, server: StubS3, tmp_path: Path, size_bytes: int) -> None:
    content = os.urandom(size_bytes)
    (tmp_path / "file").write_bytes(content)
    assert store.upload(tmp_path / "file", URI).size_bytes == size_bytes
    assert server.objects[NAME] == content


@pytest.mark.usefixtures("small_parts")
def test_a_lost_answer_to_the_end_of_a_large_upload_is_no_failure(store: Store, server: StubS3, tmp_path: Path) -> None:
    content = os.urandom(1000)
    (tmp_path / "file").write_bytes(content)
    server.troubles = [Trouble("POST"), Trouble("POST", lose_answer=True)]
    store.upload(tmp_path / "file", URI)
    assert server.objects[NAME] == content


@pytest.mark.usefixtures("small_parts")
def test_a_failed_large_upload_gives_its_parts_up(store: Store, server: StubS3, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(1000))
    server.troubles = [Trouble("PUT", status=403, code="AccessDenied")]
    with pytest.raises(StageError) as caught:
        store.upload(tmp_path / "file", URI)
    assert caught.value.fault is Fault.ACCESS_DENIED
    assert any(request.startswith("DELETE") for request in server.requests)


@pytest.mark.usefixtures("small_parts")
def test_every_part_of_a_large_upload_is_told_and_a_stop_gives_the_parts_up(
    store: Store, server: StubS3, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(os.urandom(640))
    told: list[int] = []

    def beat() -> None:
        told.append(1)
        if len(told) == 13:
            raise StageError(Fault.STOPPED)

    telling = store.telling(beat)
    telling.upload(tmp_path / "file", URI)
    assert len(told) == 10
    with pytest.raises(StageError):
        telling.upload(tmp_path / "file", f"{URI}-2")
    assert f"{NAME}-2" not in server.objects
    assert any(request.startswith("DELETE") for request in server.requests)


def test_a_file_that_arrives_with_another_size_is_refused(store: Store, server: StubS3, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    server.troubles = [Trouble("PUT", then_write=b"cont")]
    with pytest.raises(StageError) as caught:
        store.upload(tmp_path / "file", URI)
    assert caught.value.fault is Fault.CORRUPT_TRANSFER


def test_parts_grow_so_that_the_largest_object_fits() -> None:
    assert multipart.part_bytes(1) == multipart.PART_BYTES
    five_tib = 5 << 40
    assert -(-five_tib // multipart.part_bytes(five_tib)) <= multipart.MAX_PARTS


def test_a_full_disk_is_named_and_leaves_nothing_behind(
    store: Store, server: StubS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    server.objects[NAME] = b"content"
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StageError) as caught:
        store.download(URI, tmp_path / "target" / "copy")
    assert caught.value.fault is Fault.DISK_FULL
    assert list((tmp_path / "target").iterdir()) == []


def test_lists_of_many_pages_are_whole_sorted_and_bounded(store: Store, server: StubS3) -> None:
    server.objects |= {f"bucket/p/{i:02}": b"x" * i for i in range(7)} | {"bucket/p/folder/": b""}
    assert [info.size_bytes for info in store.list("s3://bucket/p/")] == list(range(7))
    with pytest.raises(StageError) as caught:
        store.list("s3://bucket/p/", limit=6)
    assert caught.value.fault is Fault.TOO_MANY_FILES
    assert caught.value.args_by_name == {"uri": "s3://bucket/p/", "limit": 6}


def test_an_object_larger_than_expected_is_not_read(store: Store, server: StubS3) -> None:
    server.objects[NAME] = b"x" * 11
    with pytest.raises(StageError) as caught:
        store.read(URI, max_bytes=10)
    assert caught.value.fault is Fault.OBJECT_TOO_LARGE
    assert store.read(URI, max_bytes=11)[0] == b"x" * 11
