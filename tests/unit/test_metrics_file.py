"""metrics.jsonl is for people: whatever becomes of it, training goes on."""

import json
from pathlib import Path

from finetune_trainer.metrics import MetricsFile


def test_rows_beyond_the_step_resumed_at_are_void_and_torn_ones_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 10, b'{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st', 2)
    file.step(3, loss=float("nan"))
    file.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "loss": None},
    ]


def test_a_disk_that_takes_no_rows_ends_nothing(tmp_path: Path) -> None:
    full = tmp_path / "full.jsonl"
    full.symlink_to("/dev/full")
    for path in (full, tmp_path / "no folder" / "metrics.jsonl"):
        file = MetricsFile(path, 10, b"", 0)
        file.step(1, loss=1.0)
        file.evaluation(1, 2.0, {"kl": 0.5})
        file.close()
