"""URIs and patterns: `s3://bucket/key`, `file:///absolute/path`, `*`, `**` and `?`."""

import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

from finetune_api.errors import StageError
from finetune_api.reasons import Fault


class Location(NamedTuple):
    """An S3 object or prefix."""

    bucket: str
    key: str


def is_s3(uri: str) -> bool:
    """Whether the URI is `s3://`; False means `file://`.

    Raises StageError(CONFIG_UNREADABLE) for any other scheme."""
    if uri.startswith("s3://"):
        return True
    if uri.startswith("file:///"):
        return False
    raise StageError(Fault.CONFIG_UNREADABLE, field=uri, problem="expected s3://BUCKET/KEY or file:///PATH")


def s3_location(uri: str) -> Location:
    """Bucket and key; the key may be empty or end in a slash."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise StageError(Fault.CONFIG_UNREADABLE, field=uri, problem="it names no bucket")
    return Location(bucket, key)


def local_path(uri: str) -> Path:
    """Absolute path of a `file://` URI. Raises StageError(CONFIG_UNREADABLE) for one that no file can have."""
    path = plain(uri).removeprefix("file://")
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise StageError(Fault.CONFIG_UNREADABLE, field=uri, problem="not a path that a file can have")
    return Path(path)


def local_name(path: str) -> str:
    """A path as part of a `file://` URI: only `%`, and bytes that are no UTF-8, are escaped."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return quote(os.fsencode(path))
    return path.replace("%", "%25")


def plain(uri: str) -> str:
    """The URI as patterns see it: of `file://`, where `%20` may stand for a space, without escapes."""
    return uri if is_s3(uri) else unquote(uri, errors="surrogateescape")


def is_pattern(uri: str) -> bool:
    return "*" in uri or "?" in uri


def fixed_prefix(pattern: str) -> str:
    """The part before the first wildcard: what has to be listed."""
    return re.split(r"[*?]", pattern, maxsplit=1)[0]


def reaches_below(pattern: str) -> bool:
    """Whether a match may lie deeper than the folder of the fixed prefix."""
    wild = pattern[len(fixed_prefix(pattern)) :]
    return "/" in wild or "**" in wild


def compiled(pattern: str) -> re.Pattern[str]:
    """`*` and `?` stay within one path segment, `**` crosses segments; everything else is literal.

    `**/` as a segment also stands for no folder at all, as in shells. Between two wildcards the first place where
    the text fits is always right, so groups are atomic: time stays quadratic, however many stars there are."""
    first, *rest = re.split(r"((?<![^/])\*\*+/|\*\*+)", pattern)
    deep = list(zip(rest[::2], rest[1::2], strict=True))
    parts = [_within_segments(first, last=not deep)]
    for number, (wildcard, text) in enumerate(deep, start=1):
        folders = wildcard.endswith("/")
        if number == len(deep):
            parts.append(("(?:.*/)?" if folders else ".*") + _within_segments(text, last=True))
        else:
            parts.append(f"(?>{'(?:.*?/)??' if folders else '.*?'}{_within_segments(text, last=False)})")
    return re.compile("".join(parts), re.DOTALL)


def _within_segments(text: str, *, last: bool) -> str:
    """Regex of a pattern without `**`; the last one has to reach the end, so its last star may take all it can."""
    first, *rest = [re.escape(piece).replace(r"\?", "[^/]") for piece in re.split(r"\*", text)]
    middle, end = (rest[:-1], rest[-1:]) if last else (rest, [])
    return first + "".join(f"(?>[^/]*?{piece})" for piece in middle) + "".join(f"[^/]*{piece}" for piece in end)
