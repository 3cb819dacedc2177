"""A training run whose folder lies in the stub S3, for stores that fail while it trains."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune_api.layout import PLAN
from finetune_api.run import StorageConfig
from finetune_trainer import patience
from finetune_trainer.store import client
from stub_s3 import StubS3, stub_s3, without_botocore_pauses
from tiny_run import TinyRun, make_run

RUN_URI = "s3://bucket/out/tiny-1a2b3"
NAME = "bucket/out/tiny-1a2b3"


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tries of the store's own without a pause, and no pauses between those of the run."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    without_botocore_pauses(monkeypatch)
    monkeypatch.setattr(client, "MAX_TRIES", 2)
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(patience, "FIRST_HURRIED_PAUSE_S", 0.01)


@contextmanager
def run_in_bucket(folder: Path, **changes: Any) -> Generator[tuple[TinyRun, StubS3]]:
    """A run as `make_run` gives it, with `run_uri` in the stub; model and rows stay files."""
    run = make_run(folder, **changes)
    with stub_s3() as server:
        storage = StorageConfig(endpoint=server.endpoint, path_style=True)
        run.config = run.config.model_copy(update={"run_uri": RUN_URI, "storage": storage})
        server.objects[f"{NAME}/{PLAN}"] = run.plan.model_dump_json().encode()
        yield run, server
