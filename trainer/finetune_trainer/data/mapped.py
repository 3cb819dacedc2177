"""Arrays that lie in files and are mapped, so that the kernel holds of them what there is room for."""

import os
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt


def mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Map a file to read it; of what is empty there is nothing to map."""
    if not path.stat().st_size:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def new_mapped(path: Path, dtype: np.dtype[Any], length: int) -> npt.NDArray[Any]:
    """Map a new file of so many zeros to write it. Raises OSError where the disk has no room for it."""
    with path.open("wb") as file:
        reserve(file, length * dtype.itemsize)
    if not length:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r+", shape=(length,)).view(np.ndarray)


def reserve(file: IO[bytes], size_bytes: int) -> None:
    """Make a file so large, with disk for all of it: writing to what is mapped of a full disk would kill the process.

    Raises OSError."""
    if size_bytes:
        os.posix_fallocate(file.fileno(), 0, size_bytes)
