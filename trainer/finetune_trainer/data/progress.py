"""How much of a job's files is read, and how long the rest will take. Pure."""

from collections.abc import Sequence

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
    read, total = bytes_read(files, current), sum(each.size_bytes for each in files)
    return {
        "rows_read": rows,
        "bytes_read": read,
        "bytes_total": total,
        "rows_per_second": rows / max(1e-9, seconds),
        "eta_seconds": seconds * (total - read) / read if read else None,
    }
