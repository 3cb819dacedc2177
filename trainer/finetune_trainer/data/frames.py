"""Messages between a stage and its child processes: four bytes of length, then the content."""

from typing import IO

_HEAD_BYTES = 4


def read_frame(stream: IO[bytes], max_bytes: int) -> bytes | None:
    """Return the next message; None at the stream's end, or where it is cut off or longer than `max_bytes`."""
    head = stream.read(_HEAD_BYTES)
    size = int.from_bytes(head, "big")
    if len(head) < _HEAD_BYTES or size > max_bytes:
        return None
    body = stream.read(size)
    return body if len(body) == size else None


def write_frame(stream: IO[bytes], body: bytes) -> None:
    """Send one message. Raises OverflowError above 4 GiB, BrokenPipeError when nobody reads."""
    stream.write(len(body).to_bytes(_HEAD_BYTES, "big"))
    stream.write(body)
    stream.flush()
