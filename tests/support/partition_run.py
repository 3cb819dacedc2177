"""Prepare with several workers and small partitions, so that a few rows are cut and merged as many are."""

import os
from dataclasses import replace

import pytest

from data_run import GIB
from finetune_api.run import RunResources
from finetune_trainer import kept_partitions
from finetune_trainer.context import StageContext
from finetune_trainer.data import partitions


def cut_partitions(monkeypatch: pytest.MonkeyPatch, size_bytes: int) -> None:
    """Let four cores be usable, and partitions have so many bytes."""
    monkeypatch.setattr(os, "sched_getaffinity", _four_cores)
    monkeypatch.setattr(partitions, "MIN_PARTITION_BYTES", size_bytes)
    monkeypatch.setattr(partitions, "MAX_PARTITION_BYTES", size_bytes)


def keep_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave finished partitions where they are, as a store may that does not delete them."""
    monkeypatch.setattr(kept_partitions.KeptPartitions, "tidy", _stay)


def with_workers(
    ctx: StageContext, workers: int, memory_bytes: int = 64 * GIB, disk_bytes: int = 10 * GIB
) -> StageContext:
    """Return the stage of a pod with cores for so many workers."""
    granted = RunResources(cpu_count=workers, memory_bytes=memory_bytes, disk_bytes=disk_bytes, gpus=0)
    return replace(ctx, config=ctx.config.model_copy(update={"prepare_resources": granted}))


def _four_cores(process: int) -> set[int]:
    return set(range(4))


def _stay(_: kept_partitions.KeptPartitions) -> None: ...
