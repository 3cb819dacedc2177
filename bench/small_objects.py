"""Small objects a second from S3 with latency: as prepare fetches and reads documents, beside boto3 one by one.

A server in a process of its own answers each request after 20 ms, as a bucket in the same region does. Ours fetches
Markdown files, hashes them, has them read in child processes and yields their rows in order; boto3 gets them alone.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from bench import tables

LATENCY_S = 0.02
_CONTENT = ("A line of text that says something about rivers and foxes.\n" * 70).encode()
_START_TIMEOUT_S = 60


class _Slow(BaseHTTPRequestHandler):
    """Answers each GET with the same few KB, late."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body in one packet

    def do_GET(self) -> None:
        time.sleep(LATENCY_S)
        self.send_response(200)
        self.send_header("Content-Length", str(len(_CONTENT)))
        self.send_header("ETag", '"one"')
        self.end_headers()
        self.wfile.write(_CONTENT)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


def _serve(told: Connection) -> None:
    server = _Server(("127.0.0.1", 0), _Slow)
    told.send(server.server_port)
    server.serve_forever()


def ours(endpoint: str, count: int) -> float:
    """Return the seconds that prepare takes to fetch and read so many documents."""
    from finetune_api.run import StorageConfig
    from finetune_trainer.data.documents.reading import Document, extracted
    from finetune_trainer.data.file_kinds import DocumentKind
    from finetune_trainer.store import open_store

    store = open_store(StorageConfig(endpoint=endpoint, region="us-east-1"))
    documents = [Document(f"s3://bucket/{at}.md", len(_CONTENT), DocumentKind.TEXT, f"{at}.md") for at in range(count)]
    with tempfile.TemporaryDirectory() as name:
        began_s = time.perf_counter()
        rows = sum(len(list(each.rows())) for each in extracted(store, documents, Path(name) / "documents", 1))
        spent_s = time.perf_counter() - began_s
    if rows != count:
        raise SystemExit(f"{rows} rows of {count} documents")
    return spent_s


def one_by_one(endpoint: str, count: int) -> float:
    """Return the seconds that boto3 takes to get so many objects, one after another."""
    import boto3

    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    began_s = time.perf_counter()
    for at in range(count):
        client.get_object(Bucket="bucket", Key=f"{at}.md")["Body"].read()
    return time.perf_counter() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench"}
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(there,), daemon=True)
    server.start()
    if not here.poll(_START_TIMEOUT_S):
        raise SystemExit("the server does not start")
    endpoint = f"http://127.0.0.1:{here.recv()}"
    try:
        few = asked.objects // 8
        ours(endpoint, few)  # loads libraries
        runs = [(ours(endpoint, asked.objects), one_by_one(endpoint, few)) for _ in range(asked.runs)]
    finally:
        server.terminate()
        server.join()
    own = median(asked.objects / spent_s for spent_s, _ in runs)
    other = median(few / spent_s for _, spent_s in runs)
    rows = [
        ["finetune-operator, fetched and read", f"{own:.0f}", f"{own / other:.1f} x"],
        ["boto3 one by one, fetched alone", f"{other:.0f}", "1.0 x"],
    ]
    body = (
        f"{asked.objects:,} Markdown files of {len(_CONTENT) / 1000:.1f} kB, {few} for boto3; each request is answered "
        f"after {1000 * LATENCY_S:.0f} ms. Wall time, median of {asked.runs}; the start of the process that reads them "
        "is in ours.\n\n" + tables.table(["", "objects per second", "of boto3"], rows)
    )
    command = f"python -m bench.small_objects --objects {asked.objects} --runs {asked.runs}"
    tables.write("small-objects", "Small objects from S3", command, ["boto3"], body)


if __name__ == "__main__":
    main()
