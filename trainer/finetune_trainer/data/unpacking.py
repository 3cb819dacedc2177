"""Unpack gzip and zstd streams a bounded piece at a time, up to a bound in bytes."""

import io
import zlib
from collections.abc import Iterator

import pyarrow as pa

from finetune_api.data_files import MAX_UNPACKED_BYTES
from finetune_api.errors import StageError
from finetune_trainer.data.file_kinds import HEAD_BYTES, Packing, refuse_wrong_kind
from finetune_trainer.data.files import damaged

_PIECE_BYTES = 2**20
_SLICE_BYTES = 2**16  # what is copied at the end of every gzip member, and what is lost where zstd is damaged
# What a byte of each may become at most. Deflate: 258 bytes by a bit of length and one of distance. A block of zstd has
# at least four bytes and at most 128 KiB.
_MOST_PER_BYTE = {Packing.NONE: 1, Packing.GZIP: 1032, Packing.ZSTD: 2**15}


def most_unpacked_bytes(size_bytes: int, packing: Packing) -> int:
    """Return what a file of that size cannot unpack to more than."""
    return min(MAX_UNPACKED_BYTES, _MOST_PER_BYTE[packing] * size_bytes) if packing is not Packing.NONE else size_bytes


def unpacked(chunks: Iterator[bytes], packing: Packing, file: str, most_bytes: int) -> Iterator[bytes]:
    """Yield what a packed stream holds, in pieces below 2 MiB.

    Raises BROKEN_FILE, once all before it was yielded, where the stream is damaged, cut off or longer than
    `most_bytes`, and WRONG_FILE where what it holds is no rows."""
    pieces = (_gunzipped if packing is Packing.GZIP else _unzstd)(chunks, file)
    given_bytes = 0
    for piece in _joined(pieces):
        if not given_bytes:
            refuse_wrong_kind(piece[:HEAD_BYTES], file, packing)
        given_bytes += len(piece)
        if given_bytes > most_bytes:
            raise damaged(file, 0, f"it unpacks to more than {most_bytes / 2**30:g} GiB; divide it into several files")
        yield piece


def _joined(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the bytes of pieces, which may be very many and small, a MiB or more at a time; none is empty."""
    held: list[bytes] = []
    held_bytes = 0
    try:
        for piece in pieces:
            held.append(piece)
            held_bytes += len(piece)
            if held_bytes >= _PIECE_BYTES:
                yield b"".join(held)
                held, held_bytes = [], 0
    except StageError:
        if held_bytes:
            yield b"".join(held)  # the rows before the damage count
        raise
    if held_bytes:
        yield b"".join(held)


def _gunzipped(chunks: Iterator[bytes], file: str) -> Iterator[bytes]:
    """Decompress one or more members."""
    member = zlib.decompressobj(wbits=31)
    slices = (chunk[at : at + _SLICE_BYTES] for chunk in chunks for at in range(0, len(chunk), _SLICE_BYTES))
    for data in slices:
        while data:
            if member.eof:
                data = data.lstrip(b"\0")  # tar-style padding after the last member
                if not data:
                    break
                member = zlib.decompressobj(wbits=31)
            try:
                piece = member.decompress(data, _PIECE_BYTES)
            except zlib.error as error:
                raise damaged(file, 0, "the gzip stream is damaged") from error
            data = member.unused_data if member.eof else member.unconsumed_tail
            if piece:
                yield piece
    if not member.eof:  # nothing at all is cut off too: even an empty file has a header
        raise damaged(file, 0, "the gzip stream is cut off")


class _Compressed(io.RawIOBase):
    """Chunks as the file that Arrow reads from."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""
        self.size_bytes = 0
        self.error: BaseException | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            self._rest = self._rest or next(self._chunks, b"")
        except BaseException as error:
            self.error = error  # Arrow would tell of it in words of its own
            raise
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        self.size_bytes += count
        return count


def _unzstd(chunks: Iterator[bytes], file: str) -> Iterator[bytes]:
    """Decompress one or more frames. Of a window above 128 MiB, which libzstd would have to hold, none is."""
    source = _Compressed(chunks)
    problem = "the zstd stream is cut off"
    try:
        with pa.CompressedInputStream(pa.PythonFile(io.BufferedReader(source), "r"), "zstd") as stream:
            while piece := stream.read(_SLICE_BYTES):
                yield piece
        if source.size_bytes:
            return
    except OSError as error:
        if source.error is not None:
            raise source.error from None
        if "too much memory" in str(error):
            problem = "its zstd window is larger than 128 MiB; pack it again without --long and --ultra"
        elif "Truncated" not in str(error):
            problem = "the zstd stream is damaged"
    raise damaged(file, 0, problem)
