"""Which files hold rows, told by the end of their names, and how much may come out of one."""

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PACKED_ENDINGS = (".gz", ".zst")  # behind one of the others; Parquet packs its columns itself
MAX_UNPACKED_BYTES = 256 * 2**30  # of one file: nothing of it lies on disk or in memory, so this bounds time alone


def listed_endings() -> str:
    """Return all endings as the words of a sentence."""
    *most, last = ENDINGS
    return f"{', '.join(most)} or {last} (all but {last} also with {' or '.join(PACKED_ENDINGS)} behind it)"
