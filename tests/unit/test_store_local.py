"""The `file://` store: the promises of object storage on a local file system; and URIs and patterns."""

import errno
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.run import StorageConfig
from finetune_trainer.store import PreconditionFailed, Store, open_store
from finetune_trainer.store.uri import compiled, fixed_prefix


@pytest.fixture
def store() -> Store:
    return open_store(StorageConfig())


@pytest.mark.parametrize(
    ("pattern", "uri", "matches"),
    [
        ("s3://b/chat/*.jsonl", "s3://b/chat/a.jsonl", True),
        ("s3://b/chat/*.jsonl", "s3://b/chat/.jsonl", True),
        ("s3://b/chat/*.jsonl", "s3://b/chat/2024/a.jsonl", False),
        ("s3://b/chat/*.jsonl", "s3://b/chat/a.jsonl.gz", False),
        ("s3://b/chat/*.jsonl", "s3://b/chat/axjsonl", False),
        ("s3://b/**/*.jsonl", "s3://b/x/y/a.jsonl", True),
        ("s3://b/**/*.jsonl", "s3://b/a.jsonl", True),
        ("s3://b/**", "s3://b/x/y/z", True),
        ("s3://b/part-?", "s3://b/part-1", True),
        ("s3://b/part-?", "s3://b/part-10", False),
        ("s3://b/part?1", "s3://b/part/1", False),
        ("s3://b/2024-*/a*", "s3://b/2024-05/abc", True),
        ("s3://b/[a]*", "s3://b/[a]1", True),
        ("s3://b/[a]*", "s3://b/a1", False),
        ("s3://b/**a*b", "s3://b/xa/yab", True),
        ("s3://b/**a*b**c/*", "s3://b/xa/yab/zc/1", True),
        ("s3://b/**/x/**/*.gz", "s3://b/x/a.gz", True),
        ("s3://b/**/x/**/*.gz", "s3://b/y/xx/a.gz", False),
        ("s3://b/**/x/**/*.gz", "s3://b/y/x/z/w/a.gz", True),
        ("s3://b/*a*a*b", "s3://b/aaab", True),
        ("s3://b/a*\n", "s3://b/ab\n", True),
    ],
)
def test_patterns_stay_within_a_segment_unless_doubled(pattern: str, uri: str, matches: bool) -> None:
    assert bool(compiled(pattern).fullmatch(uri)) is matches
    if matches:
        assert uri.startswith(fixed_prefix(pattern))


@pytest.mark.parametrize("repeated", ["*a", "**a", "**/a", "**/*a"])
def test_a_pattern_of_many_stars_is_matched_in_time(repeated: str) -> None:
    assert not compiled("s3://b/" + repeated * 30 + "b").fullmatch("s3://b/" + "a" * 500 + "/a" * 250)


@settings(max_examples=500, deadline=None)
@given(
    pattern=st.lists(st.sampled_from(["a", "b", "/", "*", "**", "**/", "?"]), max_size=7).map("".join),
    text=st.text("ab/", max_size=8),
)
def test_patterns_mean_what_a_plain_regex_says(pattern: str, text: str) -> None:
    plain = {"*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"((?<![^/])\*\*+/|\*\*+|\*|\?)", pattern)
    regex = "".join(("(?:.*/)?" if p.endswith("/") else ".*") if p[:2] == "**" else plain.get(p, p) for p in parts)
    assert bool(compiled(pattern).fullmatch(text)) == bool(re.fullmatch(regex, text))


def test_an_unknown_scheme_is_named(store: Store) -> None:
    with pytest.raises(StageError) as caught:
        store.read("gs://bucket/object")
    assert caught.value.fault is Fault.CONFIG_UNREADABLE


def test_objects_appear_whole_and_are_listed_by_prefix(store: Store, tmp_path: Path) -> None:
    base = f"file://{tmp_path}"
    for name in ("data/b.jsonl", "data/a #1?.jsonl", "data/sub/c.jsonl", "database", "other/d"):
        store.put(f"{base}/{name}", name.encode())
    listed = [info.uri.removeprefix(base) for info in store.list(f"{base}/data")]
    assert listed == ["/data/a #1?.jsonl", "/data/b.jsonl", "/data/sub/c.jsonl", "/database"]
    assert len(store.list(f"{base}/data/")) == 3
    assert [info.uri.removeprefix(base) for info in store.match(f"{base}/data/*.jsonl")] == listed[:2]
    assert len(store.match(f"{base}/**/*.jsonl")) == 3
    assert store.match(f"{base}/data/b.jsonl")[0].size_bytes == len("data/b.jsonl")
    assert store.match(f"{base}/nothing/") == []
    assert store.match(f"{base}/nothing") == []
    assert store.head(f"{base}/data") is None, "a folder is no object"
    assert store.read(f"{base}/data/a #1?.jsonl")[0] == b"data/a #1?.jsonl"


AWKWARD = [
    b"a%20b",
    b"100%",
    b"tab\tx",
    b"line\nx",
    b"semi;x",
    b"q?",
    b"h#x",
    b"sp ace",
    "\u00fc".encode(),
    b"no\xffutf8",
    b"+",
]


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("folder", ["data", "my data", "100%25 mine"])
def test_no_name_of_a_file_or_folder_makes_it_missing(store: Store, tmp_path: Path, folder: str, name: bytes) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path / folder) + b"/" + name + b".jsonl"))
    path.parent.mkdir()
    path.write_bytes(b"{}")
    for base in (path.parent.as_uri(), f"file://{path.parent}".replace("%", "%25")):
        (listed,) = store.list(f"{base}/")
        assert listed.uri.startswith(f"{base}/"), "listed as asked for"
        assert store.match(f"{base}/*.jsonl") == [listed]
        assert store.read(listed.uri, if_match=listed.etag)[0] == b"{}"
        json.dumps(listed.uri).encode()
    (by_own_uri,) = store.match(path.as_uri())
    assert by_own_uri.etag == listed.etag


def test_a_folder_that_may_not_be_read_is_an_error_only_where_it_could_hold_a_match(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "closed").mkdir(parents=True)
    (tmp_path / "data" / "a.jsonl").write_bytes(b"")
    scandir = os.scandir

    def refuse(path: str) -> object:  # root may read everything
        if os.fspath(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(store.match(f"file://{tmp_path}/data/*.jsonl")) == 1
    for uri in ("data/", "data/**.jsonl", "data/*/*.jsonl"):
        with pytest.raises(StageError) as caught:
            store.match(f"file://{tmp_path}/{uri}")
        assert caught.value.fault is Fault.ACCESS_DENIED
        assert f"file://{tmp_path}/data/closed" in str(caught.value)


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"y")
    os.utime(path, ns=(1, 1))  # as a clock that has moved on


def _cut(path: Path) -> None:
    os.truncate(path, 10)


def _in_one(stream: BinaryIO) -> None:
    stream.read()


def _in_pieces(stream: BinaryIO) -> None:
    while stream.read(1000):
        pass


@pytest.mark.parametrize("change", [_append, _overwrite, _cut])
@pytest.mark.parametrize("rest", [_in_one, _in_pieces])
def test_a_file_that_is_written_to_while_it_is_read_is_noticed(
    store: Store, tmp_path: Path, change: Callable[[Path], None], rest: Callable[[BinaryIO], None]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 3_000_000)
    with store.open(path.as_uri()) as stream:
        stream.read(1)
        change(path)
        with pytest.raises(StageError) as caught:
            rest(stream)
    assert caught.value.fault is Fault.INPUT_CHANGED


def test_more_objects_than_allowed_are_an_error(store: Store, tmp_path: Path) -> None:
    for i in range(4):
        store.put(f"file://{tmp_path}/{i}", b"")
    with pytest.raises(StageError) as caught:
        store.list(f"file://{tmp_path}/", limit=3)
    assert caught.value.fault is Fault.TOO_MANY_FILES


def test_conditions_hold(store: Store, tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/object"
    first = store.put(uri, b"one", if_none_match=True)
    with pytest.raises(PreconditionFailed):
        store.put(uri, b"two", if_none_match=True)
    second = store.put(uri, b"two", if_match=first)
    assert first != second
    with pytest.raises(PreconditionFailed):
        store.put(uri, b"three", if_match=first)
    with pytest.raises(PreconditionFailed):
        store.put(f"{uri}2", b"three", if_match=first)
    with pytest.raises(PreconditionFailed):
        store.read(uri, if_match=first)
    with pytest.raises(StageError) as caught:
        store.open(uri, if_match=first)
    assert caught.value.fault is Fault.INPUT_CHANGED
    assert store.read(uri, if_match=second) == (b"two", second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["object"], "nothing temporary is left"


def test_of_many_writers_one_wins(store: Store, tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/object"

    def won(content: bytes, **condition: bool | str) -> bool:
        try:
            store.put(uri, content, **condition)  # type: ignore[arg-type]
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        created = [race.result() for race in [pool.submit(won, b"%d" % i, if_none_match=True) for i in range(8)]]
        assert created.count(True) == 1
        content, etag = store.read(uri)
        assert content == b"%d" % created.index(True)
        replaced = [race.result() for race in [pool.submit(won, b"new %d" % i, if_match=etag) for i in range(8)]]
        assert replaced.count(True) == 1
        assert store.read(uri)[0] == b"new %d" % replaced.index(True)


def test_files_are_uploaded_and_downloaded_with_their_digest(store: Store, tmp_path: Path) -> None:
    content = os.urandom(3_000_001)
    (tmp_path / "file").write_bytes(content)
    info = store.upload(tmp_path / "file", f"file://{tmp_path}/store/file")
    assert info == store.head(info.uri)
    digest = store.download(info.uri, tmp_path / "new folder/copy", if_match=info.etag)
    assert (tmp_path / "new folder/copy").read_bytes() == content
    assert store.digest(info.uri) == (digest, len(content))
    with pytest.raises(PreconditionFailed):
        store.upload(tmp_path / "file", info.uri, if_none_match=True)


def test_what_is_not_there_is_named(store: Store, tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/nothing"
    store.delete(uri)
    assert store.head(uri) is None
    assert store.head(f"{uri}/below") is None
    for action in (store.read, store.open, store.digest, partial(store.download, path=tmp_path / "copy")):
        with pytest.raises(StageError) as caught:
            action(uri)
        assert caught.value.fault is Fault.OBJECT_NOT_FOUND


def test_a_full_disk_is_named(store: Store) -> None:
    with pytest.raises(StageError) as caught:
        store.upload(Path("/dev/null"), "file:///dev/full/object")
    assert caught.value.fault in (Fault.DISK_FULL, Fault.OBJECT_NOT_FOUND, Fault.STORAGE_UNAVAILABLE)
