"""How far reading has come, and what is left of it."""

import pytest

from finetune_trainer.data.accounts import FileAccount
from finetune_trainer.data.progress import bytes_read, reading_figures


def file(name: str, size_bytes: int, bytes_in: int = 0, rows_in: int = 0, most_rows: int | None = None) -> FileAccount:
    return FileAccount(f"s3://b/{name}", size_bytes, "", bytes_in=bytes_in, rows_in=rows_in, most_rows=most_rows)


@pytest.mark.parametrize(
    ("files", "read"),
    [
        ([file("a.jsonl", 1000, bytes_in=250)], 250),
        ([file("a.jsonl", 1000, bytes_in=990), file("b.jsonl", 500, bytes_in=100)], 1100),
        ([file("a.parquet", 1000, bytes_in=70_000, rows_in=30, most_rows=40)], 750),
        ([file("a.jsonl.gz", 1000, bytes_in=2000)], 500),  # unpacked, of which nothing is known yet
        ([file("a.jsonl.gz", 1000, bytes_in=10_000), file("b.jsonl.gz", 1000, bytes_in=5000)], 1500),
        ([file("a.jsonl.gz", 100, bytes_in=10_000)], 100),  # never more than there is
        ([file("a.jsonl", 0)], 0),
    ],
)
def test_what_is_read_is_told_in_the_bytes_of_the_bucket(files: list[FileAccount], read: int) -> None:
    assert bytes_read(files, len(files) - 1) == read


def test_the_time_left_is_that_of_the_bytes_left_at_the_speed_so_far() -> None:
    files = [file("a.jsonl", 1000, bytes_in=1000), file("b.jsonl", 3000, bytes_in=500)]
    figures = reading_figures(files, 1, rows=300, seconds=30.0)
    assert figures == {
        "rows_read": 300,
        "bytes_read": 1500,
        "bytes_total": 4000,
        "rows_per_second": 10.0,
        "eta_seconds": 50.0,
    }
    assert reading_figures([file("a.jsonl", 10)], 0, rows=0, seconds=1.0)["eta_seconds"] is None
