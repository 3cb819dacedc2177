"""Which files the datasets of a job are: what their URIs match, without what is no data, and each once."""

import logging
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

from finetune_api.errors import StageError
from finetune_api.job import DatasetSpec
from finetune_api.reasons import Fault
from finetune_trainer.data import parquet
from finetune_trainer.data.accounts import FileAccount, Ledger
from finetune_trainer.data.documents.reading import Document, most_text_bytes
from finetune_trainer.data.file_kinds import HEAD_BYTES, FileKind, Notation, document_of, kind_of, notation_of
from finetune_trainer.data.problems import place
from finetune_trainer.data.unpacking import most_unpacked_bytes
from finetune_trainer.runplan import FileRecord
from finetune_trainer.store import ObjectInfo, Store, spec_field
from finetune_trainer.store.uri import fixed_prefix, is_pattern, is_s3

log = logging.getLogger(__name__)

_MAX_FILES = 10_000
_MAX_REREAD_BYTES = 2**30
_THREADS = 16  # that look at how files begin: thousands of small requests
# Names of files and folders that programs leave beside data: hidden ones, half-written ones, lists of what there is.
_NO_DATA = re.compile(
    r"\..*|~\$.*|#.*#|.*~|.*\.(tmp|temp|part|partial|crdownload|crc|swp)"
    r"|_temporary|_SUCCESS|_started_.*|_committed_.*|_metadata|_common_metadata|_delta_log|__MACOSX"
    r"|dataset_infos?\.json|dataset_dict\.json"
)


class Inputs(NamedTuple):
    """The files of one dataset, as indices into the ledger, how each is read, and those that were passed over.

    documents: the files where they are that, in the place of `kinds`."""

    files: range
    kinds: list[FileKind]
    ignored: list[str]
    documents: Sequence[Document] = ()


class _Matched(NamedTuple):
    """What a dataset's URI matches. beside: documents that are passed over, as there are files of rows."""

    data: list[ObjectInfo]
    hidden: list[str]
    others: list[str]  # whose names end as those of no data file
    beside: Sequence[str] = ()
    are_documents: bool = False
    folder: str = ""  # what all their URIs begin with

    @property
    def ignored(self) -> list[str]:
        return [*self.hidden, *self.others, *self.beside]


def find_files(
    store: Store, datasets: Sequence[DatasetSpec], ledger: Ledger, *, takes_documents: bool = False
) -> list[Inputs]:
    """Register the files of all datasets in the ledger, and look at how each begins, before any is read.

    takes_documents: whether the job learns plain texts, so that files may be documents. How these begin is seen when
    they are read. Raises NO_FILES_MATCH, TOO_MANY_FILES, FILE_NAMED_TWICE, WRONG_FILE."""
    matched: list[_Matched] = []
    for index, dataset in enumerate(datasets):
        with spec_field(f"datasets[{index}].uri"):
            found = _match(store, dataset.uri, takes_documents)
        if not found.data:
            raise StageError(Fault.NO_FILES_MATCH, uri=place(dataset.uri), found=_others_found(found))
        matched.append(found)
        if sum(len(each.data) for each in matched) > _MAX_FILES:
            raise StageError(Fault.TOO_MANY_FILES, uri=place(dataset.uri), limit=_MAX_FILES)
    _refuse_repeated(matched)
    kinds = iter(_kinds(store, [info for each in matched if not each.are_documents for info in each.data]))
    inputs: list[Inputs] = []
    for found in matched:
        first = len(ledger.files)
        own: list[FileKind] = []
        documents: list[Document] = []
        if found.are_documents:
            documents = [_document(info, found.folder) for info in found.data]
            ledger.files += [_document_account(info) for info in found.data]
        else:
            own = list(islice(kinds, len(found.data)))
            ledger.files += [_account(info, kind) for info, kind in zip(found.data, own, strict=True)]
        _tell(found)
        inputs.append(Inputs(range(first, len(ledger.files)), own, found.ignored, documents))
    return inputs


def _account(info: ObjectInfo, kind: FileKind) -> FileAccount:
    most_bytes, is_table = _most_bytes(info, kind), kind.notation is Notation.PARQUET
    return FileAccount(info.uri, info.size_bytes, info.etag, most_bytes=most_bytes, is_table=is_table)


def _document_account(info: ObjectInfo) -> FileAccount:
    return FileAccount(info.uri, info.size_bytes, info.etag, most_bytes=most_text_bytes(info.size_bytes))


def _document(info: ObjectInfo, folder: str) -> Document:
    kind = document_of(info.uri)
    assert kind is not None
    return Document(info.uri, info.size_bytes, kind, info.uri.removeprefix(folder))


def changed_files(
    store: Store, datasets: Sequence[DatasetSpec], planned: Sequence[FileRecord], *, takes_documents: bool = False
) -> list[str]:
    """Return the URIs of files that were added, removed or given another content since they were read as `planned`.

    A file with another ETag is read again, up to 1 GiB in all; of those beyond it cannot be told, and they are left
    out."""
    now = {info.uri: info for dataset in datasets for info in _match(store, dataset.uri, takes_documents).data}
    then = {file.uri: file for file in planned}
    changed = list(now.keys() ^ then.keys())
    unread_bytes = _MAX_REREAD_BYTES
    for uri in sorted(now.keys() & then.keys()):
        if now[uri].size_bytes != then[uri].size_bytes:
            changed.append(uri)
        elif now[uri].etag != then[uri].etag and now[uri].size_bytes <= unread_bytes:
            unread_bytes -= now[uri].size_bytes
            if store.digest(uri)[0] != then[uri].sha256:
                changed.append(uri)
    return sorted(changed)


def _match(store: Store, uri: str, takes_documents: bool) -> _Matched:
    """Return what a URI matches; a file that is named itself is data, whatever its name.

    Beside files of rows a document is none: a dataset that was downloaded has a README.md beside its rows."""
    found, folder = store.match(uri, _MAX_FILES), uri[: fixed_prefix(uri).rfind("/") + 1]
    if not is_pattern(uri) and not uri.endswith("/"):
        return _Matched(found, [], [], are_documents=takes_documents and document_of(uri) is not None, folder=folder)
    matched, documents = _Matched([], [], [], folder=folder), list[ObjectInfo]()
    for info in found:
        if any(_NO_DATA.fullmatch(part) for part in info.uri[len(folder) :].split("/")):
            matched.hidden.append(info.uri)
        elif notation_of(info.uri) is not None:
            matched.data.append(info)
        elif takes_documents and document_of(info.uri) is not None:
            documents.append(info)
        else:
            matched.others.append(info.uri)
    if documents and not matched.data:
        return matched._replace(data=documents, are_documents=True)
    return matched._replace(beside=[info.uri for info in documents])


def _others_found(found: _Matched) -> str:
    """Return the part of a sentence that says what else is there."""
    passed_over = [*found.others, *found.hidden]
    if not passed_over:
        return ""
    files = "1 other file" if len(passed_over) == 1 else f"{len(passed_over):,} other files"
    return f" among {files}, such as {place(passed_over[0])[-200:]}"


def _refuse_repeated(matched: Iterable[_Matched]) -> None:
    """Raise FILE_NAMED_TWICE where two URIs of a job, or two names of this machine, lead to one file."""
    first: dict[str, tuple[int, str]] = {}
    for index, each in enumerate(matched):
        for info in each.data:
            key = info.uri if is_s3(info.uri) or not info.etag else info.etag  # of this machine: it tells the inode
            if key in first:
                of_first, uri = first[key]
                same = "" if uri == info.uri else f" (as {place(uri)[-200:]})"
                fields = {"first": f"datasets[{of_first}].uri{same}", "second": f"datasets[{index}].uri"}
                raise StageError(Fault.FILE_NAMED_TWICE, file=place(info.uri), **fields)
            first[key] = index, info.uri


def _kinds(store: Store, found: Sequence[ObjectInfo]) -> list[FileKind]:
    """Return how to read each file, by how it begins. Raises WRONG_FILE for the first that holds no rows."""

    def kind(info: ObjectInfo) -> FileKind:
        size_bytes = min(HEAD_BYTES, info.size_bytes) if info.etag else HEAD_BYTES  # a link to nothing is read in vain
        return kind_of(info.uri, store.read_range(info.uri, 0, size_bytes) if size_bytes else b"")

    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        return list(pool.map(kind, found))


def _most_bytes(info: ObjectInfo, kind: FileKind) -> int:
    """Return what the rows of a file cannot come to more than."""
    if kind.notation is Notation.PARQUET:
        return parquet.most_bytes(info.size_bytes)
    return most_unpacked_bytes(info.size_bytes, kind.packing)


def _tell(found: _Matched) -> None:
    if found.beside:
        words = (
            "%d documents are passed over, as there are files of rows beside them; a pattern such as **.md names them"
        )
        log.warning(words, len(found.beside))
    if found.others:
        log.warning("%d files are passed over, as their names end as those of no data file", len(found.others))
    if found.hidden:
        log.warning("%d hidden or temporary files are passed over", len(found.hidden))
    if empty := [info.uri for info in found.data if not info.size_bytes]:
        log.warning("%d files are empty, the first of them %s", len(empty), place(empty[0]))
