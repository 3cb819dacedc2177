"""The processes that read what others wrote need no more memory on a machine of many cores than on one of few."""

import io
import os
from pathlib import Path

import orjson
import pytest

from finetune_trainer.data import child
from finetune_trainer.data.frames import read_frame, write_frame

BEGIN = {
    "finetune_trainer.data.parquet_worker": [],
    "finetune_trainer.data.tokenizer_worker": [orjson.dumps({"memory_bytes": 2**30, "load_cpu_s": 60})],
}


def threads_on(cores: set[int], module: str) -> int:
    """Count the threads of a child that is ready for its first file on a machine of these cores."""
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        process = child.start(module)
        assert child.exchange(process, *BEGIN[module], max_bytes=2**20) is not None
    finally:
        os.sched_setaffinity(0, every)
    count = len(list(Path(f"/proc/{process.pid}/task").iterdir()))
    child.end(process)
    return count


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="needs two cores")
@pytest.mark.parametrize("module", BEGIN)
def test_no_child_starts_threads_by_the_number_of_cores(module: str) -> None:
    every = os.sched_getaffinity(0)
    assert threads_on(every, module) == threads_on({min(every)}, module)


@pytest.mark.parametrize(("size", "found"), [(10, b"x" * 10), (11, None)])
def test_a_message_beyond_its_limit_is_not_read(size: int, found: bytes | None) -> None:
    stream = io.BytesIO()
    write_frame(stream, b"x" * size)
    stream.seek(0)
    assert read_frame(stream, 10) == found
