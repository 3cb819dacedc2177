"""Arrays that lie in files and are mapped, so that the kernel holds of them what there is room for."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Map a file to read it; of what is empty there is nothing to map."""
    if not path.stat().st_size:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def new_mapped(path: Path, dtype: np.dtype[Any], length: int) -> npt.NDArray[Any]:
    """Map a new file of so many zeros to write it; what is not written takes no disk."""
    if not length:
        path.write_bytes(b"")
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="w+", shape=(length,)).view(np.ndarray)
