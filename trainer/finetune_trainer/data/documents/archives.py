"""Files in zip archives, as Word documents and EPUB books are: read in memory, up to a bound, and never unpacked."""

import zipfile
import zlib
from pathlib import Path

from finetune_trainer.data.documents.found import NoTextError
from finetune_trainer.data.problems import Drop

MAX_UNPACKED_BYTES = 256 * 2**20  # of all files of an archive that are read
_MAX_FILES = 20_000
# What reading a file of an archive that is damaged ends with.
DAMAGED = (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, OSError, RuntimeError, UnicodeDecodeError)
_ENCRYPTED = 1  # flag of a file in an archive


class Archive:
    """A zip archive that is read file by file. Raises NoTextError."""

    def __init__(self, path: Path) -> None:
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, ValueError, NotImplementedError, UnicodeDecodeError) as error:
            raise NoTextError(Drop.BROKEN_DOCUMENT, "it is no whole zip archive, as such a file is") from error
        self._left_bytes = MAX_UNPACKED_BYTES
        if len(self._zip.infolist()) > _MAX_FILES:
            raise NoTextError(Drop.DOCUMENT_TOO_LARGE, f"more than {_MAX_FILES:,} files in it")
        self.names = frozenset(self._zip.namelist())

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        if name not in self.names:
            raise NoTextError(Drop.BROKEN_DOCUMENT, "a file that it must have is not in it")
        info = self._zip.getinfo(name)
        if info.flag_bits & _ENCRYPTED:
            raise NoTextError(Drop.ENCRYPTED)
        try:
            with self._zip.open(info) as stream:
                content = stream.read(self._left_bytes + 1)
        except DAMAGED as error:
            raise NoTextError(Drop.BROKEN_DOCUMENT, "a file in it is damaged") from error
        self._left_bytes -= len(content)
        if self._left_bytes < 0:
            raise NoTextError(Drop.DOCUMENT_TOO_LARGE, f"it unpacks to more than {MAX_UNPACKED_BYTES // 2**20} MiB")
        return content

    def require_bounded(self) -> None:
        """Raise NoTextError where all its files together, as it says, are more than may be unpacked."""
        if sum(info.file_size for info in self._zip.infolist()) > MAX_UNPACKED_BYTES:
            raise NoTextError(Drop.DOCUMENT_TOO_LARGE, f"it unpacks to more than {MAX_UNPACKED_BYTES // 2**20} MiB")
