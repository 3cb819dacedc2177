"""Tell what a file is: its notation by its name and first bytes, what it is packed by, or which wrong kind it is."""

import re
from enum import StrEnum
from typing import NamedTuple

from finetune_api.data_files import DOCUMENTS, ENDINGS, PACKED_ENDINGS
from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_trainer.data.problems import LFS_POINTER, place

HEAD_BYTES = 4096  # that tell what a file is
_PARQUET = b"PAR1"
_BINARY = re.compile(rb"[^\t\n\r\x20-\x7e]")
BOM = b"\xef\xbb\xbf"


class Notation(StrEnum):
    """How rows are written."""

    LINES = ".jsonl"  # JSON, a row a line
    JSON = ".json"  # a list of rows, or one behind another
    CSV = ".csv"
    TSV = ".tsv"
    PARQUET = ".parquet"


class DocumentKind(StrEnum):
    """What a document is."""

    TEXT = "plain text"
    MARKDOWN = "Markdown"
    HTML = "HTML"
    PDF = "PDF"
    WORD = "Word"
    EPUB = "EPUB"
    RST = "reStructuredText"
    MAIL = "mail"
    MAILBOX = "mailbox"
    CODE = "source code"


class Packing(StrEnum):
    """What a file is compressed by as a whole."""

    NONE = ""
    GZIP = "gzip"
    ZSTD = "zstd"


class FileKind(NamedTuple):
    """How a file is read."""

    notation: Notation
    packing: Packing


class WrongKind(NamedTuple):
    """What a file is that holds no rows as we read them, and what to do about it."""

    found: str
    remedy: str


_NOTATIONS = {ending: Notation(".jsonl" if ending == ".ndjson" else ending) for ending in ENDINGS}
_DOCUMENTS = {ending: DocumentKind(kind) for kind, files in DOCUMENTS.items() for ending in files.endings}
_PACKINGS = {".gz": Packing.GZIP, ".zst": Packing.ZSTD}
_MAGIC = {Packing.GZIP: (b"\x1f\x8b",), Packing.ZSTD: (b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18")}
assert set(_PACKINGS) == set(PACKED_ENDINGS)

_EXPORT = "export its rows as JSON Lines, CSV or Parquet"
_UNPACK = "unpack it, and name the files that were in it"
_AGAIN = "download it again, and look at what the server says"
# What a file of another kind begins with, as a regular expression over bytes. The first that fits counts.
_WRONG_KINDS = tuple(
    (re.compile(begin, re.DOTALL), WrongKind(found, remedy))
    for begin, found, remedy in (
        (re.escape(LFS_POINTER), "a Git LFS pointer, not the file itself", "run git lfs pull where it was cloned"),
        (rb"(\xff\xfe\0\0|\0\0\xfe\xff)", "text in UTF-32", "write it as UTF-8"),
        (rb"(\xff\xfe|\xfe\xff|[\x20-\x7e]\0[\x09-\x7e]\0|\0[\x20-\x7e]\0[\x09-\x7e])", "text in UTF-16",
         "write it as UTF-8"),
        (rb"%PDF-", "a PDF", "name it .pdf, which method CPT reads, or write its text as rows"),
        (rb"PK\x03\x04.{0,2000}(\[Content_Types\]\.xml|xl/|word/)", "an Excel or Word file", _EXPORT),
        (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel or Word file of before 2007", _EXPORT),
        (rb"PK(\x03\x04|\x05\x06)", "a zip archive", _UNPACK),
        (rb".{257}ustar", "a tar archive", _UNPACK),
        (rb"BZh[1-9]1AY&SY", "packed by bzip2", "pack it by gzip or zstd instead"),
        (rb"\xfd7zXZ\0", "packed by xz", "pack it by gzip or zstd instead"),
        (rb"\x04\x22\x4d\x18", "packed by lz4", "pack it by gzip or zstd instead"),
        (rb"(7z\xbc\xaf\x27\x1c|Rar!\x1a)", "an archive of 7-Zip or RAR", _UNPACK),
        (rb"\x80[\x02-\x05][\x80-\x95c(}\]]", "a pickle, which can run code and is never read", _EXPORT),
        (rb"\x93NUMPY", "an array of NumPy", _EXPORT),
        (rb"(ARROW1\0|\xff{4}..\0\0)", "an Arrow file", "write it as Parquet"),
        (rb"PARE[^\x20-\x7e]", "an encrypted Parquet file", "write it without encryption"),
        (rb"Obj\x01", "an Avro file", _EXPORT),
        (rb"ORC[^\x20-\x7e]", "an ORC file", _EXPORT),
        (rb"SQLite format 3\0", "a SQLite database", _EXPORT),
        (rb"(\x89PNG|\xff\xd8\xff|GIF8[79]a)", "an image", "images are not read"),
        (rb"\{\\rtf", "an RTF document", "save it as plain text"),
        (rb"(\xef\xbb\xbf)?\s*(?i:<!doctype html|<html|<head|<body)", "an HTML page", _AGAIN),
        (rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?<Error\b", "the error message of an object store, in XML", _AGAIN),
        (rb"(\xef\xbb\xbf)?\s*<(\?xml|[A-Za-z]+[ >])", "XML", _EXPORT),
        (rb"\0{16}", "nothing but zeros where it begins", "copy it again; it is not whole"),
    )
)  # fmt: skip


def notation_of(name: str) -> Notation | None:
    """Return how the rows of a file are written, by the end of its name in any case; None: it is no data file."""
    lower = name.lower()
    bare = next((lower.removesuffix(end) for end in PACKED_ENDINGS if lower.endswith(end)), lower)
    notation = next((each for end, each in _NOTATIONS.items() if bare.endswith(end)), None)
    return None if notation is Notation.PARQUET and bare != lower else notation


def document_of(name: str) -> DocumentKind | None:
    """Return which kind of document a file is, by the end of its name in any case; None: it is none."""
    dot = name.rfind(".")
    return _DOCUMENTS.get(name[dot:].lower()) if dot > name.rfind("/") else None


def packing_of(head: bytes) -> Packing:
    """Return what the bytes that begin a file say that it is packed by."""
    return next((each for each, begins in _MAGIC.items() if head.startswith(begins)), Packing.NONE)


def kind_of(name: str, head: bytes) -> FileKind:
    """Return how to read a file whose first HEAD_BYTES are `head`, whatever its name says of what packs it.

    Raises WRONG_FILE for what holds no rows, naming what it is."""
    packing = packing_of(head)
    lower = name.lower()
    notation = notation_of(name)
    if head.startswith(_PARQUET) and (notation is Notation.PARQUET or _BINARY.match(head, len(_PARQUET))):
        return FileKind(Notation.PARQUET, Packing.NONE)
    if not head:  # what is packed has a head in any case, and so has Parquet
        packing = next((each for end, each in _PACKINGS.items() if lower.endswith(end)), Packing.NONE)
    if packing is Packing.NONE:
        refuse_wrong_kind(head, name)
    if notation is Notation.PARQUET:
        problem = "packed as a whole" if packing is not Packing.NONE else "no Parquet, though its name says so"
        raise wrong_file(name, WrongKind(problem if head else "an empty file", "write it again as Parquet"))
    if notation is None:
        if not head.removeprefix(BOM).lstrip().startswith((b"{", b"[")):
            raise wrong_file(name, WrongKind("of a kind that cannot be told", "name it after what it is"))
        notation = Notation.JSON
    return FileKind(notation, packing)


def refuse_wrong_kind(head: bytes, name: str, packing: Packing = Packing.NONE) -> None:
    """Raise WRONG_FILE where a file begins as no file of rows does; `packing`: what `head` was packed by."""
    wrong = next((kind for begin, kind in _WRONG_KINDS if begin.match(head)), None)
    if packing is not Packing.NONE:
        if (inner := packing_of(head)) is not Packing.NONE:
            wrong = WrongKind(f"{inner} inside {packing}", "pack it once")
        elif head.startswith(_PARQUET):
            wrong = WrongKind(f"Parquet inside {packing}", f"unpack it by {packing}; Parquet packs its columns itself")
        elif wrong is not None:
            wrong = WrongKind(f"{wrong.found}, inside {packing}", wrong.remedy)
    if wrong is not None:
        raise wrong_file(name, wrong)


def wrong_file(name: str, kind: WrongKind) -> StageError:
    """Return what a file ends the job with that holds no rows as we read them."""
    return StageError(Fault.WRONG_FILE, file=place(name), found=kind.found, remedy=kind.remedy)
