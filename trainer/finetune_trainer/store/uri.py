"""URIs and patterns: `s3://bucket/key`, `file:///absolute/path`, `*`, `**` and `?`."""

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

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
    raise StageError(Fault.CONFIG_UNREADABLE, field=uri[:200], problem="expected s3://BUCKET/KEY or file:///PATH")


def s3_location(uri: str) -> Location:
    """Bucket and key; the key may be empty or end in a slash."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise StageError(Fault.CONFIG_UNREADABLE, field=uri[:200], problem="it names no bucket")
    return Location(bucket, key)


def local_path(uri: str) -> Path:
    """Absolute path of a `file://` URI."""
    return Path(unquote(urlsplit(uri.replace("?", "%3F").replace("#", "%23")).path))


def is_pattern(uri: str) -> bool:
    return "*" in uri or "?" in uri


def fixed_prefix(pattern: str) -> str:
    """The part before the first wildcard: what has to be listed."""
    return re.split(r"[*?]", pattern, maxsplit=1)[0]


def compiled(pattern: str) -> re.Pattern[str]:
    """`*` and `?` stay within one path segment, `**` crosses segments; everything else is literal."""
    # `**/` also stands for no folder at all, as in shells and in .gitignore.
    parts = re.split(r"(\*\*+/|\*\*+|\*|\?)", pattern)
    wild = {"*": "[^/]*", "?": "[^/]"}

    def translated(part: str) -> str:
        if part.startswith("**"):
            return "(?:.*/)?" if part.endswith("/") else ".*"
        return wild.get(part, re.escape(part))

    return re.compile("".join(translated(part) for part in parts), re.DOTALL)
