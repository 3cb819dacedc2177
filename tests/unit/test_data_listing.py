"""Which files a job reads: known by name and first bytes before any is read, hidden ones passed over, each once."""

import gzip
import json
import os
import random
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data_run import LFS_POINTER
from finetune_api.data_files import MAX_UNPACKED_BYTES
from finetune_api.errors import StageError
from finetune_api.job import DatasetSpec
from finetune_api.reasons import Fault
from finetune_api.run import StorageConfig
from finetune_trainer.data.accounts import Ledger
from finetune_trainer.data.file_kinds import FileKind, Notation, Packing, kind_of, notation_of
from finetune_trainer.data.listing import Inputs, find_files
from finetune_trainer.data.text_rows import text_rows
from finetune_trainer.data.unpacking import most_unpacked_bytes, unpacked
from finetune_trainer.store import open_store

ROW = b'{"text": "words"}\n'


def gzipped(content: bytes) -> bytes:
    """Return the same bytes at any time of day, as they become names of tests."""
    return gzip.compress(content, mtime=0)


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def zipped(name: str) -> bytes:
    written = BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr(name, "x")
    return written.getvalue()


def tarred() -> bytes:
    written = BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jsonl"))
    return written.getvalue()


@pytest.mark.parametrize(
    ("name", "notation"),
    [
        ("a.jsonl", Notation.LINES),
        ("A.JSONL", Notation.LINES),
        ("a.NdJson.GZ", Notation.LINES),
        ("a.json.zst", Notation.JSON),
        ("a.csv.gz", Notation.CSV),
        ("a.tsv", Notation.TSV),
        ("a.Parquet", Notation.PARQUET),
        ("a.parquet.gz", None),
        ("a.jsonl.bz2", None),
        ("a.gz", None),
        ("jsonl", None),
        ("a.txt", None),
    ],
)
def test_the_end_of_a_name_tells_how_rows_are_written_in_any_case(name: str, notation: Notation | None) -> None:
    assert notation_of(name) is notation


@pytest.mark.parametrize(
    ("name", "head", "kind"),
    [
        ("a.jsonl", ROW, (Notation.LINES, Packing.NONE)),
        ("a.jsonl.gz", ROW, (Notation.LINES, Packing.NONE)),
        ("a.jsonl", gzipped(ROW), (Notation.LINES, Packing.GZIP)),
        ("a.csv.zst", zstd(b"a\n1\n"), (Notation.CSV, Packing.ZSTD)),
        ("a.csv", b"ORCID,PARENT\n1,2\n", (Notation.CSV, Packing.NONE)),
        ("a.csv", b"PAR1,PAR2\n1,2\n", (Notation.CSV, Packing.NONE)),
        ("a.jsonl", b"PAR1\x15\x04", (Notation.PARQUET, Packing.NONE)),
        ("a.jsonl", b"", (Notation.LINES, Packing.NONE)),
        ("a.jsonl.gz", b"", (Notation.LINES, Packing.GZIP)),
        ("data", ROW, (Notation.JSON, Packing.NONE)),
    ],
)
def test_the_first_bytes_tell_what_packs_a_file_whatever_its_name(
    name: str, head: bytes, kind: tuple[Notation, Packing]
) -> None:
    assert kind_of(name, head) == FileKind(*kind)


WRONG = {
    "a Git LFS pointer": LFS_POINTER,
    "an HTML page": b"\n<!DOCTYPE html><html>",
    "the error message of an object store, in XML": b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code>',
    "XML": b"<?xml version='1.0'?><rows/>",
    "a PDF": b"%PDF-1.7",
    "a zip archive": zipped("a.jsonl"),
    "an Excel or Word file": zipped("[Content_Types].xml"),
    "an Excel or Word file of before 2007": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 9,
    "a pickle": b"\x80\x04\x95\x10\0\0\0",
    "a tar archive": tarred(),
    "text in UTF-16": '{"a": 1}'.encode("utf-16"),
    "text in UTF-16 ": '{"a": 1}'.encode("utf-16-le"),
    "packed by bzip2": b"BZh91AY&SY",
    "an Arrow file": b"ARROW1\0\0",
    "nothing but zeros": b"\0" * 100,
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "notes"])
@pytest.mark.parametrize("found", WRONG)
def test_a_file_of_a_wrong_kind_is_named_with_what_to_do(name: str, found: str) -> None:
    with pytest.raises(StageError, match=f"{name} cannot be read: it is {found.strip()}.*; ") as caught:
        kind_of(name, WRONG[found])
    assert caught.value.fault is Fault.WRONG_FILE


@pytest.mark.parametrize("packing", [Packing.GZIP, Packing.ZSTD])
@pytest.mark.parametrize(
    ("inner", "words"),
    [
        (gzipped(ROW), "gzip inside {}; pack it once"),
        (zstd(ROW), "zstd inside {}; pack it once"),
        (b"PAR1\x15\x04", "Parquet inside {}; unpack it"),
        (tarred(), "a tar archive, inside {}; unpack it"),
        (b"<html>", "an HTML page, inside {}"),
    ],
)
def test_what_is_packed_is_looked_at_too(packing: Packing, inner: bytes, words: str) -> None:
    content = gzipped(inner) if packing is Packing.GZIP else zstd(inner)
    with pytest.raises(StageError) as caught:
        list(unpacked(iter([content]), packing, "a.jsonl.gz", 2**30))
    assert caught.value.fault is Fault.WRONG_FILE
    assert words.format(packing) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "head", "words"),
    [
        ("a.parquet", ROW, "it is no Parquet, though its name says so"),
        ("a.parquet", b"", "it is an empty file"),
        ("a.parquet", gzipped(b"PAR1"), "it is packed as a whole"),
        ("a.txt", b"some words", "it is of a kind that cannot be told"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(name: str, head: bytes, words: str) -> None:
    with pytest.raises(StageError, match=words):
        kind_of(name, head)


@pytest.mark.parametrize("pack", [gzipped, zstd])
def test_packed_streams_one_behind_another_are_one_file_in_a_few_pieces(pack: Any) -> None:
    packing = Packing.GZIP if pack is gzipped else Packing.ZSTD
    content = pack(b"x" * 20) * 10_000
    pieces = list(unpacked((content[at : at + 999] for at in range(0, len(content), 999)), packing, "f", 2**30))
    assert b"".join(pieces) == b"x" * 200_000
    assert len(pieces) < 5


@pytest.mark.parametrize(
    ("content", "packing", "words"),
    [
        (gzipped(ROW * 1000)[:-9], Packing.GZIP, "gzip stream is cut off"),
        (b"", Packing.GZIP, "gzip stream is cut off"),
        (b"no gzip at all", Packing.GZIP, "gzip stream is damaged"),
        (gzipped(ROW) + b"no gzip", Packing.GZIP, "gzip stream is damaged"),
        (zstd(ROW * 1000)[:-2], Packing.ZSTD, "zstd stream is cut off"),
        (b"", Packing.ZSTD, "zstd stream is cut off"),
        (b"no zstd at all", Packing.ZSTD, "zstd stream is damaged"),
        (zstd(ROW) + b"no zstd", Packing.ZSTD, "zstd stream is damaged"),
        # A frame with a window of 2 GiB, as zstd --long=31 writes.
        (b"\x28\xb5\x2f\xfd\x00\xa8" + b"\x01\0\0", Packing.ZSTD, "larger than 128 MiB; pack it again without --long"),
        (gzipped(b"x" * 2**22), Packing.GZIP, r"more than 0\.00195312 GiB"),
        (zstd(b"x" * 2**22), Packing.ZSTD, r"more than 0\.00195312 GiB"),
    ],
)
def test_a_packed_stream_that_cannot_be_read_on_is_told_by_name(content: bytes, packing: Packing, words: str) -> None:
    with pytest.raises(StageError, match=words) as caught:
        list(unpacked(iter([content]), packing, "a.jsonl.gz", 2**21))
    assert caught.value.fault is Fault.BROKEN_FILE


@pytest.mark.parametrize(("packing", "pack"), [(Packing.GZIP, gzipped), (Packing.ZSTD, zstd)])
def test_ordinary_rows_that_are_packed_by_more_than_a_hundred_are_read(packing: Packing, pack: Any) -> None:
    system = "".join(random.Random(0).choices("abcdefghij ", k=7000))
    rows = b"".join(json.dumps({"prompt": system, "completion": str(i)}).encode() + b"\n" for i in range(3000))
    packed = pack(rows)
    assert len(rows) > 100 * len(packed)
    found = text_rows(unpacked(iter([packed]), packing, "f", MAX_UNPACKED_BYTES), Notation.LINES, "f")
    assert sum(1 for _ in found) == 3000


@pytest.mark.parametrize("packing", [Packing.GZIP, Packing.ZSTD])
def test_a_fault_of_the_store_is_not_one_of_the_file(packing: Packing) -> None:
    def broken() -> Any:
        yield (gzipped(ROW) if packing is Packing.GZIP else zstd(ROW))[:9]
        raise StageError(Fault.INPUT_CHANGED, file="a")

    with pytest.raises(StageError) as caught:
        list(unpacked(broken(), packing, "a.jsonl.gz", 2**30))
    assert caught.value.fault is Fault.INPUT_CHANGED


@pytest.mark.parametrize(("packing", "pack"), [(Packing.GZIP, gzipped), (Packing.ZSTD, zstd)])
def test_nothing_unpacks_to_more_than_is_counted_with(packing: Packing, pack: Any) -> None:
    for content in (b"\0" * 2**24, b"", b"x"):
        packed = pack(content)
        assert len(content) <= most_unpacked_bytes(len(packed), packing)


def found(tmp_path: Path, *uris: str) -> tuple[list[Inputs], list[str]]:
    datasets = [DatasetSpec.model_validate({"uri": uri}) for uri in uris]
    with Ledger(tmp_path / "decisions.jsonl") as ledger:
        inputs = find_files(open_store(StorageConfig()), datasets, ledger)
    begin = (tmp_path / "data").as_uri() + "/"
    return inputs, [account.uri.removeprefix(begin) for account in ledger.files]


def write(tmp_path: Path, *names: str) -> str:
    for name in names:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ROW)
    return (tmp_path / "data").as_uri() + "/"


HIDDEN = [
    ".ipynb_checkpoints/train-checkpoint.jsonl", "._a.jsonl", ".a.jsonl.swp.jsonl", "__MACOSX/a.jsonl", "~$a.csv",
    "_temporary/0/part-0.jsonl", "_delta_log/0.json", "x.tmp/a.jsonl", "_SUCCESS", ".part-0.json.crc", ".DS_Store",
    "a.jsonl~", "a.jsonl.tmp", "dataset_info.json",
]  # fmt: skip


@pytest.mark.parametrize("pattern", ["", "**", "**/*"])
def test_hidden_and_temporary_files_are_no_data_and_are_told(tmp_path: Path, pattern: str) -> None:
    folder = write(tmp_path, "a.jsonl", "b/C.JSON", "_train.jsonl", "notes.txt", *HIDDEN)
    (inputs,), files = found(tmp_path, folder + pattern)
    assert files == ["_train.jsonl", "a.jsonl", "b/C.JSON"]
    assert sorted(inputs.ignored) == sorted(folder + name for name in ["notes.txt", *HIDDEN])


def test_a_folder_or_file_that_is_named_itself_is_data_though_its_name_is_that_of_a_hidden_one(tmp_path: Path) -> None:
    folder = write(tmp_path, ".hidden/a.jsonl", ".b.jsonl", "c.txt")
    assert found(tmp_path, folder + ".hidden/")[1] == [".hidden/a.jsonl"]
    assert found(tmp_path, folder + ".b.jsonl", folder + "c.txt")[1] == [".b.jsonl", "c.txt"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), r"no data file matches .*data/; expected at least one \.jsonl"),
        (("a.txt",), "data/ among 1 other file, such as .*a.txt; expected"),
        ((".a.jsonl", "b.txt"), "data/ among 2 other files, such as .*b.txt; expected"),
    ],
)
def test_a_uri_without_a_data_file_says_what_is_there_instead(
    tmp_path: Path, names: tuple[str, ...], words: str
) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(StageError, match=words) as caught:
        found(tmp_path, write(tmp_path, *names))
    assert caught.value.fault is Fault.NO_FILES_MATCH


@pytest.mark.parametrize("second", ["a.jsonl", "*.jsonl", "**"])
def test_a_file_that_two_datasets_name_is_an_error_that_names_both(tmp_path: Path, second: str) -> None:
    folder = write(tmp_path, "a.jsonl")
    with pytest.raises(
        StageError, match=r"a\.jsonl is named by datasets\[0\]\.uri and again by datasets\[1\]\.uri"
    ) as caught:
        found(tmp_path, folder, folder + second)
    assert caught.value.fault is Fault.FILE_NAMED_TWICE


def test_a_linked_folder_is_read_and_a_link_to_itself_is_not_followed_for_ever(tmp_path: Path) -> None:
    folder = write(tmp_path, "a.jsonl")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.jsonl").write_bytes(ROW)
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "other")
    (tmp_path / "data" / "round").symlink_to(tmp_path / "data")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "data")
    for uri in (folder, folder + "**"):
        assert found(tmp_path, uri)[1] == ["a.jsonl", "linked/b.jsonl"]


def test_two_names_of_one_file_are_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path, "a.jsonl")
    os.link(tmp_path / "data" / "a.jsonl", tmp_path / "data" / "b.jsonl")
    with pytest.raises(StageError, match=r"b\.jsonl is named by datasets\[0\]\.uri \(as .*a\.jsonl\) and again by"):
        found(tmp_path, folder)


def test_a_link_to_a_file_that_is_gone_is_not_passed_over(tmp_path: Path) -> None:
    folder = write(tmp_path, "a.jsonl")
    (tmp_path / "data" / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(StageError, match=r"b\.jsonl does not exist"):
        found(tmp_path, folder)
