"""Prepared examples on local disk, in the order of the rows that they are of; `division` says what each is for."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.examples import ARRAYS, COLUMNS, Tree, leaves_of
from finetune_trainer.data.sketches import Sketch

Array = npt.NDArray[Any]

# One record per row of the input: where it came from, the hash of its content, and what became of it.
ROW = np.dtype(
    [
        ("hash_high", "<u8"),
        ("hash_low", "<u8"),
        ("file", "<u4"),
        ("number", "<u8"),
        ("examples", "<u4"),
        ("prompt_tokens", "<u4"),
        ("weight", "<f4"),
        ("label", "<i1"),  # as in examples.COLUMNS; 0: it has none
    ]
)
EXAMPLE = np.dtype(
    [
        ("segments", "<u4"),
        ("stored_tokens", "<u4"),  # of all segments
        ("sequences", "<u4"),  # flat ones
        ("tokens", "<u8"),  # of all flat sequences
        ("longest", "<u4"),  # tokens of the longest flat sequence
        ("labels", "<u4"),
    ]
)
SEGMENT = np.dtype([("length", "<u4"), ("parent", "<u4")])
_COPY_BYTES = 2**20
CLUSTER = np.dtype([("hash_high", "<u8"), ("hash_low", "<u8")])  # a hash, as rows have one of their content
# prompts: (rows,) CLUSTER, empty unless rows are to be paired
# groups: (rows,) CLUSTER, empty unless rows of one value of a field are held out together
# sizes: (rows,) SIZES, bands: (rows, bands) hashes, shingles: hashes of each row in turn, of what is asked, then of
# what is said; empty unless near copies are looked for
SIZES = np.dtype([("asked", "<u4"), ("said", "<u4"), ("size_bytes", "<u4")])
COMPARED_FILES = ("sizes", "bands", "shingles", "groups")
FILES = ("tokens", "labels", "segments", "rows", "examples", "prompts", *COMPARED_FILES)


class Spool:
    """Appends rows, each of one or more examples, to files in `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._files = {name: (folder / name).open("wb") for name in FILES}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def take(self, part: Path, first_file: int) -> None:
        """Add the rows of a partition that another spool wrote. first_file: what its file 0 is here."""
        for name, file in self._files.items():
            if name == "rows":
                rows = np.fromfile(part / name, dtype=ROW)
                rows["file"] += first_file
                file.write(rows.tobytes())
                continue
            with (part / name).open("rb") as source:
                shutil.copyfileobj(source, file, _COPY_BYTES)

    def append(
        self,
        content_hash: bytes,
        file: int,
        number: int,
        examples: list[Tree],
        *,
        prompt_tokens: int = 0,
        weight: float = 1.0,
        answers: Sequence[str] = (),  # noqa: ARG002 (only for people)
        label: int = 0,
        prompt_hash: bytes = b"",
        group_hash: bytes = b"",
        sketch: Sketch | None = None,
    ) -> None:
        """Add one row of the input. prompt_tokens: of its first flat sequence, before what is to be answered; label: 1
        where its answer is a good one, -1 for a bad one, 0 where nothing says so; prompt_hash: by which rows are
        paired, of all rows or of none; group_hash: equal for rows that are held out together, of all rows or of none;
        sketch: by which near copies are found, of all rows or of none."""
        if sketch is not None:
            self._write_sketch(sketch)
        for name, digest in (("prompts", prompt_hash), ("groups", group_hash)):
            self._files[name].write(_halves(digest) if digest else b"")
        record = np.array((*_hash(content_hash), file, number, len(examples), prompt_tokens, weight, label), dtype=ROW)
        self._files["rows"].write(record.tobytes())
        for tree in examples:
            segments = np.empty(len(tree.lengths), dtype=SEGMENT)
            segments["length"], segments["parent"] = tree.lengths, tree.parents
            self._files["tokens"].write(tree.tokens.astype("<u4", copy=False).tobytes())
            self._files["labels"].write(tree.labels.tobytes())
            self._files["segments"].write(segments.tobytes())
            self._files["examples"].write(_example(tree).tobytes())

    def _write_sketch(self, sketch: Sketch) -> None:
        asked, said, size_bytes = sketch.shingles
        sizes = np.array((len(asked), len(said), min(size_bytes, 2**32 - 1)), dtype=SIZES)
        self._files["sizes"].write(sizes.tobytes())
        self._files["bands"].write(sketch.bands.astype("<u8", copy=False).tobytes())
        for part in (asked, said):
            self._files["shingles"].write(part.astype("<u4", copy=False).tobytes())


def _hash(digest: bytes) -> tuple[int, int]:
    """Return a digest of 16 bytes as the two numbers of a CLUSTER."""
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def _halves(digest: bytes) -> bytes:
    return np.array(_hash(digest), dtype=CLUSTER).tobytes()


def _example(tree: Tree) -> Array:
    """Return the record of one example."""
    until = flat_lengths(tree)
    labels = int(tree.labels.sum(dtype=np.int64))
    return np.array(
        (len(tree.lengths), len(tree.tokens), len(until), sum(until), max(until), labels),
        dtype=EXAMPLE,
    )


def flat_lengths(tree: Tree) -> list[int]:
    """Return the tokens of each flat sequence of a tree."""
    if len(tree.lengths) == 1:
        return [len(tree.tokens)]
    through = tree.lengths.tolist()  # tokens from the root through each segment
    for segment, up in enumerate(tree.parents.tolist()):
        if up:
            through[segment] += through[segment - up]
    return [through[leaf] for leaf in leaves_of(tree.parents).tolist()]


def prepared_bytes(examples: Array) -> int:
    """Return what the arrays of these examples take on disk. examples: (examples,) EXAMPLE."""
    tokens, segments = (int(examples[name].sum(dtype=np.int64)) for name in ("stored_tokens", "segments"))
    per_example = sum(COLUMNS[name].itemsize for name in COLUMNS) + ARRAYS["example_offsets"].itemsize
    per_segment = ARRAYS["segment_offsets"].itemsize + ARRAYS["parents"].itemsize
    return 5 * tokens + per_segment * segments + per_example * len(examples) + 64
