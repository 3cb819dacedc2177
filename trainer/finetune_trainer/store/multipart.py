"""Sending a large file in parts: invisible until it is complete, a bounded number of parts in memory."""

import contextlib
import hashlib
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from finetune_trainer.store.faults import ODD, error_code
from finetune_trainer.store.objects import ObjectInfo

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

PART_BYTES = 16 << 20
MAX_PARTS = 10_000  # S3's own limit
PARALLEL_PARTS = 4


def part_bytes(size_bytes: int) -> int:
    """Size of one part, so that the object has at most MAX_PARTS of them."""
    return max(PART_BYTES, -(-size_bytes // MAX_PARTS))


def send(
    s3: "S3Client",
    bucket: str,
    key: str,
    path: Path,
    size_bytes: int,
    conditions: dict[str, Any],
    beat: Callable[[], None],
) -> str:
    """Upload `path`, calling `beat` after every part; returns the ETag.

    On failure, also of `beat`, the parts are given up, so that they cost nothing."""
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    step = part_bytes(size_bytes)

    def send_part(number: int) -> "CompletedPartTypeDef":
        with path.open("rb") as file:
            body = os.pread(file.fileno(), step, number * step)
        answer = s3.upload_part(Bucket=bucket, Key=key, UploadId=upload_id, PartNumber=number + 1, Body=body)
        return {"PartNumber": number + 1, "ETag": answer["ETag"]}

    try:
        with ThreadPoolExecutor(PARALLEL_PARTS, thread_name_prefix="upload") as pool:
            parts: list[CompletedPartTypeDef] = []
            for part in pool.map(send_part, range(-(-size_bytes // step))):
                parts.append(part)
                beat()
        return _complete(s3, bucket, key, upload_id, parts, conditions)
    except BaseException:
        with contextlib.suppress(ClientError, BotoCoreError, *ODD):  # the reason of the failure is the news
            s3.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
        raise


def etag_if_same_file(
    open_object: Callable[[str, str | None], tuple[io.BufferedReader, ObjectInfo]], uri: str, path: Path
) -> str | None:
    """The object's ETag when its content is the file's; None otherwise."""
    stream, info = open_object(uri, None)
    with stream, path.open("rb") as file:
        if info.size_bytes != path.stat().st_size:
            return None
        same = hashlib.file_digest(stream, "sha256").digest() == hashlib.file_digest(file, "sha256").digest()
    return info.etag if same else None


def _complete(
    s3: "S3Client",
    bucket: str,
    key: str,
    upload_id: str,
    parts: "list[CompletedPartTypeDef]",
    conditions: dict[str, Any],
) -> str:
    try:
        answer = s3.complete_multipart_upload(
            Bucket=bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts}, **conditions
        )
    except ClientError as error:
        if error_code(error) != "NoSuchUpload":
            raise
        # The answer to an earlier try was lost: the upload is complete. The caller compares sizes.
        return s3.head_object(Bucket=bucket, Key=key)["ETag"]
    return answer["ETag"]
