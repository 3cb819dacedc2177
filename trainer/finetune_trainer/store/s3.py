"""`s3://`: the operations on any S3-compatible store."""

import io
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from botocore.exceptions import BotoCoreError, ClientError

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.run import StorageConfig
from finetune_trainer.store import client as clients
from finetune_trainer.store import faults, multipart
from finetune_trainer.store.objects import ObjectInfo, PreconditionFailed
from finetune_trainer.store.reading import Answer, ResumingReader
from finetune_trainer.store.uri import s3_location

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MULTIPART_THRESHOLD_BYTES = 64 << 20
MAX_CONFLICTS = 6  # answers 409 to a conditional write: another one on the same key was under way
_CONFLICT_PAUSE_S = 0.1
_BUFFER_BYTES = 1 << 20
_CHECKSUMS = ("SHA256", "CRC64NVME", "CRC32C", "CRC32", "SHA1")  # what a store may keep, the strongest first
_WHOLE_CHECKSUM = re.compile(r"[A-Za-z0-9+/]{1,64}={0,2}")

MAX_LISTED = 1_000_000  # objects of one listing, whether they match or not: all files of the largest data sets
LIST_TIMEOUT_S = 1800  # of all pages together: a million objects take about five minutes

T = TypeVar("T")


class S3Files:
    """Objects in buckets; one instance may be used by many threads."""

    def __init__(self, storage: StorageConfig) -> None:
        self._clients = clients.Clients(storage)
        self._endpoint = storage.endpoint or f"AWS S3 in {storage.region}"
        self._region = storage.region
        self._existing_buckets: set[str] = set()

    def list(self, prefix_uri: str, *, deep: bool = True) -> Iterator[ObjectInfo]:
        """Objects in the order of their keys, a page at a time; not deep: in the prefix's folder alone.

        Raises StageError(TOO_MANY_FILES) beyond MAX_LISTED, STORAGE_UNAVAILABLE when it takes LIST_TIMEOUT_S."""
        bucket, prefix = s3_location(prefix_uri)
        request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix} | ({} if deep else {"Delimiter": "/"})
        started_s = time.monotonic()
        tokens: set[int] = set()
        listed = 0
        while True:
            page = self._call(
                "list", prefix_uri, lambda s3: _page(bucket, prefix, s3.list_objects_v2(**request), tokens)
            )
            yield from page.objects
            listed += page.listed
            if page.token is None:
                return
            if listed > MAX_LISTED:
                raise StageError(Fault.TOO_MANY_FILES, uri=prefix_uri, limit=MAX_LISTED)
            if (spent_s := time.monotonic() - started_s) > LIST_TIMEOUT_S:
                problem = f"the listing goes on after {listed} objects and {LIST_TIMEOUT_S} s"
                raise faults.unavailable(self._tried("list", prefix_uri, spent_s), 1, problem)
            tokens.add(hash(page.token))
            request["ContinuationToken"] = page.token

    def head(self, uri: str) -> ObjectInfo | None:
        bucket, key = s3_location(uri)

        def ask(s3: "S3Client") -> ObjectInfo | None:
            try:
                found = s3.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
            except ClientError as error:
                if faults.http_status(error) == 404:
                    return None
                # Answers to HEAD have no body and so no code: a GET tells an expired token from a denial.
                s3.get_object(Bucket=bucket, Key=key, Range="bytes=0-0")["Body"].close()
                raise
            answer = cast("dict[str, Any]", found)
            return ObjectInfo(uri, faults.size_of(answer, "ContentLength"), faults.etag_of(answer), _checksum(answer))

        found = self._call("read", uri, ask)
        if found is None:
            self._require_bucket(uri, bucket)
        return found

    def open(self, uri: str, if_match: str | None) -> tuple[io.BufferedReader, ObjectInfo]:
        """The stream and what it is.

        Raises PreconditionFailed when it is not the version asked for."""
        first = self._get(uri, 0, if_match)
        reader = ResumingReader(uri, first, lambda offset, etag: self._get(uri, offset, etag))
        return io.BufferedReader(reader, _BUFFER_BYTES), ObjectInfo(uri, first.size_bytes, first.etag)

    def read_range(self, uri: str, offset: int, size_bytes: int, if_match: str | None) -> bytes:
        """Raises PreconditionFailed as `open`, INPUT_CHANGED when the object is shorter."""
        end = offset + size_bytes
        first = self._get(uri, offset, if_match, end)
        if first.size_bytes < end:
            raise StageError(Fault.INPUT_CHANGED, file=uri)
        reader = ResumingReader(uri, first, lambda at, etag: self._get(uri, at, etag, end), offset, end)
        with io.BufferedReader(reader, _BUFFER_BYTES) as stream:
            return stream.read(size_bytes)

    def put(self, uri: str, data: bytes, *, if_none_match: bool, if_match: str | None) -> str:
        bucket, key = s3_location(uri)
        conditions = _conditions(if_none_match, if_match)
        return self._conditional(
            uri,
            lambda s3: s3.put_object(Bucket=bucket, Key=key, Body=data, **conditions)["ETag"],
            lambda: self._etag_if_same(uri, data),
            conditional=bool(conditions),
        )

    def upload(self, path: Path, uri: str, *, if_none_match: bool, beat: Callable[[], None]) -> ObjectInfo:
        bucket, key = s3_location(uri)
        size_bytes = path.stat().st_size
        conditions = _conditions(if_none_match, None)

        def send(s3: "S3Client") -> str:
            if size_bytes > MULTIPART_THRESHOLD_BYTES:
                return multipart.send(s3, bucket, key, path, size_bytes, conditions, beat)
            with path.open("rb") as body:
                return s3.put_object(Bucket=bucket, Key=key, Body=body, **conditions)["ETag"]

        self._conditional(
            uri, send, lambda: multipart.etag_if_same_file(self.open, uri, path), conditional=bool(conditions)
        )
        found = self.head(uri)
        if found is None or found.size_bytes != size_bytes:
            raise StageError(Fault.CORRUPT_TRANSFER, uri=uri, tries=1)
        return found

    def delete(self, uri: str) -> None:
        bucket, key = s3_location(uri)

        def remove(s3: "S3Client") -> None:
            try:
                s3.delete_object(Bucket=bucket, Key=key)
            except ClientError as error:
                if faults.error_code(error) not in ("NoSuchKey", "404"):
                    raise

        self._call("delete", uri, remove)

    def _get(self, uri: str, offset: int, if_match: str | None, end: int | None = None) -> Answer:
        bucket, key = s3_location(uri)
        request: dict[str, Any] = {"Bucket": bucket, "Key": key}
        if if_match is not None:
            request["IfMatch"] = if_match
        if offset or end is not None:
            request["Range"] = f"bytes={offset}-" + ("" if end is None else str(end - 1))

        def ask(s3: "S3Client") -> Answer:
            try:
                answer = cast("dict[str, Any]", s3.get_object(**request))
            except ClientError as error:
                if if_match is not None and faults.http_status(error) == 412:
                    raise PreconditionFailed(uri) from error
                raise
            if "transfer-encoding" in answer["ResponseMetadata"]["HTTPHeaders"]:  # its end could be put off for ever
                raise faults.OddAnswerError("the content of an object comes without its size")
            # A whole answer to a request for the rest would be appended wrongly.
            start, size_bytes = 0, faults.size_of(answer, "ContentLength")
            if "ContentRange" in answer:
                start, size_bytes = faults.range_of(answer["ContentRange"])
            if start != offset:
                raise faults.OddAnswerError("it does not answer to Range")
            etag = faults.etag_of(answer)
            if if_match is not None and _version(etag) != _version(if_match):  # some stores do not heed If-Match
                answer["Body"].close()
                raise PreconditionFailed(uri)
            return Answer(answer["Body"], size_bytes, etag)

        return self._call("read", uri, ask)

    def _conditional(
        self, uri: str, send: "Callable[[S3Client], str]", etag_if_ours: Callable[[], str | None], *, conditional: bool
    ) -> str:
        """Write, deciding what an answer to a condition means.

        When an answer was lost, the retry meets our own object and is told 412: so the content decides."""
        for conflict in range(MAX_CONFLICTS):

            def attempt(s3: "S3Client", seen_conflict: bool = conflict > 0) -> str | None:
                try:
                    return send(s3)
                except ClientError as error:
                    code, status = faults.error_code(error), faults.http_status(error)
                    if conditional and (status == 412 or (status == 404 and code == "NoSuchKey")):
                        if (faults.tries(error) > 1 or seen_conflict) and (etag := etag_if_ours()):
                            return etag
                        raise PreconditionFailed(uri) from error
                    if conditional and (status == 501 or code == "NotImplemented"):
                        raise StageError(Fault.CONDITIONAL_WRITES_UNSUPPORTED, endpoint=self._endpoint) from error
                    if conditional and status == 409:
                        return None
                    raise

            etag = self._call("write", uri, attempt)
            if etag is not None:
                return etag
            time.sleep(random.uniform(0, _CONFLICT_PAUSE_S * 2**conflict))
        raise PreconditionFailed(uri)

    def _etag_if_same(self, uri: str, data: bytes) -> str | None:
        try:
            stream, info = self.open(uri, None)
        except StageError as error:
            if error.fault is Fault.OBJECT_NOT_FOUND:
                return None
            raise
        with stream:
            return info.etag if info.size_bytes == len(data) and stream.read(len(data)) == data else None

    def _require_bucket(self, uri: str, bucket: str) -> None:
        """Tell a missing bucket from a missing object, once per bucket."""
        if bucket in self._existing_buckets:
            return

        def ask(s3: "S3Client") -> None:
            try:
                s3.list_objects_v2(Bucket=bucket, MaxKeys=1)
            except ClientError as error:
                if faults.http_status(error) != 403 or faults.error_code(error) in faults.REFUSED_CREDENTIALS:
                    raise  # else it exists, and only listing it is denied

        self._call("read", uri, ask)
        self._existing_buckets.add(bucket)

    def _call(self, action: str, uri: str, operation: "Callable[[S3Client], T]") -> T:
        """Run an operation; once more with renewed credentials when those it had were refused."""
        started_s = time.monotonic()
        renewed = False
        while True:
            s3 = self._clients.get()
            try:
                done = operation(s3)
            except ClientError as error:
                if not renewed and faults.error_code(error) in faults.REFUSED_CREDENTIALS and self._clients.renew(s3):
                    renewed = True
                    continue
                raise faults.answered(error, self._tried(action, uri, time.monotonic() - started_s)) from error
            except BotoCoreError as error:
                tried = self._tried(action, uri, time.monotonic() - started_s)
                raise faults.unanswered(error, tried, clients.MAX_TRIES) from error
            except faults.ODD as error:
                raise faults.odd(error, self._tried(action, uri, time.monotonic() - started_s)) from error
            if done is not None:  # some stores answer 404, without a body, to HEAD by an unknown key
                self._clients.accepted = True
            return done

    def _tried(self, action: str, uri: str, seconds: float) -> faults.Attempted:
        return faults.Attempted(action, uri, s3_location(uri).bucket, self._endpoint, self._region, seconds)


class _Page(NamedTuple):
    """A part of a listing; `listed` counts folder markers too, `token` leads to the next page."""

    objects: list[ObjectInfo]
    listed: int
    token: str | None


def _page(bucket: str, prefix: str, answer: Any, earlier: set[int]) -> _Page:
    """Raises OddAnswerError, also when the page leads back to one of the `earlier` tokens, which are hashes."""
    found: list[dict[str, Any]] = answer.get("Contents", [])
    objects: list[ObjectInfo] = []
    for each in found:
        key = each.get("Key")
        if not isinstance(key, str) or not key.startswith(prefix):
            raise faults.OddAnswerError("it lists keys that were not asked for")
        if not key.endswith("/"):  # folder markers are no files
            etag = faults.etag_of(each) if each.get("ETag") else ""
            objects.append(ObjectInfo(f"s3://{bucket}/{key}", faults.size_of(each, "Size"), etag))
    if not isinstance(more := answer.get("IsTruncated"), bool):  # any XML would do for a listing of nothing
        raise faults.OddAnswerError("it does not say whether the listing is complete")
    if not more:
        return _Page(objects, len(found), None)
    token = answer.get("NextContinuationToken")
    if not isinstance(token, str) or not token or hash(token) in earlier:
        raise faults.OddAnswerError("a listing that is not complete does not lead on")
    return _Page(objects, len(found), token)


def _checksum(found: dict[str, Any]) -> str | None:
    """The best checksum over the whole object in an answer to HEAD; one over the parts' checksums depends on how the
    object was sent, and says nothing about its content."""
    if found.get("ChecksumType") == "COMPOSITE":
        return None
    for algorithm in _CHECKSUMS:
        value = found.get(f"Checksum{algorithm}")
        if isinstance(value, str) and _WHOLE_CHECKSUM.fullmatch(value):  # of parts: "base64-NUMBER"
            return f"{algorithm}:{value}"
    return None


def _version(etag: str) -> str:
    """Return an ETag without its quotes and the mark of a weak one, which one store may write here and not there."""
    return etag.removeprefix("W/").strip('"')


def _conditions(if_none_match: bool, if_match: str | None) -> dict[str, Any]:
    if if_none_match:
        return {"IfNoneMatch": "*"}
    return {} if if_match is None else {"IfMatch": if_match}
