"""What both kinds of store speak of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectInfo:
    """An object as it was when it was looked at."""

    uri: str
    size_bytes: int
    etag: str  # of this version of the object: another one says nothing about its content
    checksum: str | None = None  # "ALGORITHM:base64" over the whole content, where `head` found that the store keeps it


class PreconditionFailed(Exception):  # noqa: N818 (the name of the HTTP status, 412)
    """A conditional read or write lost: the object is not (or no longer) what the caller expected."""
