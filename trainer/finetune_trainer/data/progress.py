"""How much of a job's files is read, and how long the rest will take. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune_trainer.data.accounts import FileAccount

_PACKED_ENDINGS = (".gz", ".zst")
_UNPACKED_RATIO = 4.0  # of packed files, until one of them was read to its end


def bytes_read(files: Sequence[FileAccount], current: int) -> int:
    """Return how many bytes of the files, as they lie in the bucket, are read: of all before the current, and of it.

    Of a file whose rows are counted it is their share; else the share of its bytes, where what a packed file unpacks
    to is estimated by those before it.
    """
    before, file = files[:current], files[current]
    done = sum(each.size_bytes for each in before)
    if file.most_rows:
        share = file.rows_in / file.most_rows
    else:
        share = file.bytes_in / max(1.0, file.size_bytes * _unpacked_ratio(before, file))
    return done + int(min(1.0, share) * file.size_bytes)


def _unpacked_ratio(before: Sequence[FileAccount], file: FileAccount) -> float:
    if not file.uri.lower().endswith(_PACKED_ENDINGS):
        return 1.0
    packed = [each for each in before if each.uri.lower().endswith(_PACKED_ENDINGS)]
    size_bytes = sum(each.size_bytes for each in packed)
    return sum(each.bytes_in for each in packed) / size_bytes if size_bytes else _UNPACKED_RATIO


def reading_figures(files: Sequence[FileAccount], current: int, rows: int, seconds: float) -> dict[str, object]:
    """Return the fields of Progress that tell of reading. current: the file of the last row; seconds: since the first.

    The time left is that at the mean speed so far; None before anything is read."""
    return _figures(bytes_read(files, current), sum(each.size_bytes for each in files), rows, seconds)


def _figures(
    read: int, total: int, rows: int, seconds: float, known_bytes: int = 0, known_rows: int = 0
) -> dict[str, object]:
    """Return the fields of Progress. known_bytes, known_rows: of earlier attempts, which say nothing of the speed."""
    new_bytes = read - known_bytes
    return {
        "rows_read": rows,
        "bytes_read": read,
        "bytes_total": total,
        "rows_per_second": (rows - known_rows) / max(1e-9, seconds),
        "eta_seconds": seconds * (total - read) / new_bytes if new_bytes > 0 else None,
    }


@dataclass
class ReadSoFar:
    """How much of a job's bytes is read where partitions are worked on at once. Never tells less than before."""

    total_bytes: int
    began_s: float
    _merged_bytes: int = 0
    _known_bytes: int = 0
    _known_rows: int = 0
    _told_bytes: int = 0

    def add(self, stored_bytes: int, rows: int, *, is_known: bool) -> None:
        """Add a partition. is_known: whether an earlier attempt had worked on it."""
        self._merged_bytes += stored_bytes
        if is_known:
            self._known_bytes += stored_bytes
            self._known_rows += rows

    def figures(self, rows: int, in_flight_bytes: int, now_s: float) -> dict[str, object]:
        """Return the fields of Progress. rows: read so far; in_flight_bytes: read of partitions that are worked on."""
        read = max(self._told_bytes, self._merged_bytes + in_flight_bytes)
        self._told_bytes = min(read, self.total_bytes)
        seconds = now_s - self.began_s
        return _figures(self._told_bytes, self.total_bytes, rows, seconds, self._known_bytes, self._known_rows)
