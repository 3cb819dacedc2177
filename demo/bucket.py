"""The S3 server's content: model, rows, and room for adapters."""

import hashlib
import json
from typing import Any

import boto3
from botocore.exceptions import ClientError

import testbed
from demo.assets import ensure_model
from demo.rows import BROKEN_LINES, demo_files, good_rows

MODEL_PREFIX = "smollm2-135m-instruct"
ROWS_PREFIX = "chat"
_DIGEST = "content-sha256"


def client(cluster: testbed.Cluster) -> Any:
    return boto3.client(  # pyright: ignore[reportUnknownMemberType]
        "s3",
        endpoint_url=cluster.s3_endpoint_host,
        aws_access_key_id=cluster.s3_access_key,
        aws_secret_access_key=cluster.s3_secret_key,
        region_name=cluster.s3_region,
    )


def fill(cluster: testbed.Cluster) -> None:
    """Make the buckets and put the model and the rows there; what is there already is left alone."""
    s3 = client(cluster)
    for bucket in ("models", "data", "adapters"):
        try:
            s3.create_bucket(Bucket=bucket)
        except ClientError as error:
            if _code(error) not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise
    model = ensure_model()
    for path in sorted(model.iterdir()):
        _put(s3, "models", f"{MODEL_PREFIX}/{path.name}", path.read_bytes())
    for name, content in demo_files().items():
        _put(s3, "data", f"{ROWS_PREFIX}/{name}", content)
    print(f"s3://models/{MODEL_PREFIX}/  {sum(path.stat().st_size for path in model.iterdir()) / 1e6:.0f} MB")
    print(f"s3://data/{ROWS_PREFIX}/  {len(good_rows())} conversations and {len(BROKEN_LINES)} broken rows in 2 files")


def _code(error: ClientError) -> str:
    return error.response.get("Error", {}).get("Code", "")


def _put(s3: Any, bucket: str, key: str, content: bytes) -> None:
    digest = hashlib.sha256(content).hexdigest()
    try:
        if s3.head_object(Bucket=bucket, Key=key)["Metadata"].get(_DIGEST) == digest:
            return
    except ClientError as error:
        if _code(error) not in ("404", "NoSuchKey", "NotFound"):
            raise
    s3.put_object(Bucket=bucket, Key=key, Body=content, Metadata={_DIGEST: digest})


def read_json(cluster: testbed.Cluster, uri: str) -> Any:
    """A small JSON object of the bucket."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return json.loads(client(cluster).get_object(Bucket=bucket, Key=key)["Body"].read(1 << 20))
