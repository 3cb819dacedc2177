"""`batches.safetensors`: the arrays of the batch plan, mapped from the file, to write them once and to read them."""

import json
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.mapped import reserve

IntArray = npt.NDArray[np.int64]
_DTYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "F64": np.dtype("<f8")}
READ_BYTES, STEP_BYTES = 8, 4 * 8  # of disk, for every example that is read, and for every step
_LENGTH_BYTES = 8  # of the header's length, before it


@dataclass(frozen=True)
class StepPlan:
    """Which examples every step reads, and what its loss is divided by; the arrays of `runplan`.

    Step g reads examples[step_offsets[g]:step_offsets[g + 1]]."""

    examples: IntArray  # (sum of batch sizes,)
    step_offsets: IntArray  # (steps + 1,)
    label_tokens: IntArray  # (steps,)
    denominators: npt.NDArray[np.float64]  # (steps,)
    tokens: IntArray  # (steps,)

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.step_offsets) - 1

    @cached_property
    def total_tokens(self) -> int:
        return int(self.tokens.sum())

    def examples_of(self, step: int) -> list[int]:
        return self.examples[self.step_offsets[step] : self.step_offsets[step + 1]].tolist()


def new_steps(path: Path, reads: int, steps: int) -> StepPlan:
    """Make the file, as the library safetensors writes it, and map its arrays to fill them."""
    lengths = {
        "examples": reads,
        "label_tokens": steps,
        "step_offsets": steps + 1,
        "tokens": steps,
        "denominators": steps,
    }
    header: dict[str, Any] = {}
    end = 0
    for name, length in lengths.items():
        begin, end = end, end + 8 * length
        kind = "F64" if name == "denominators" else "I64"
        header[name] = {"dtype": kind, "shape": [length], "data_offsets": [begin, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _LENGTH_BYTES)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(_LENGTH_BYTES, "little") + content)
        file.flush()
        reserve(file, _LENGTH_BYTES + len(content) + end)
    return _mapped(path, "r+")


def open_steps(path: Path) -> StepPlan:
    """Map the arrays of a file to read them. Raises KeyError where one is missing."""
    return _mapped(path, "r")


def _mapped(path: Path, mode: Any) -> StepPlan:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
    begin = _LENGTH_BYTES + length
    whole = np.memmap(path, dtype=np.uint8, mode=mode).view(np.ndarray)
    spans = {
        name: (begin + first, begin + last) for name, each in header.items() for first, last in [each["data_offsets"]]
    }
    return StepPlan(
        **{
            each.name: whole[slice(*spans[each.name])].view(_DTYPES[header[each.name]["dtype"]])
            for each in fields(StepPlan)
        }
    )
