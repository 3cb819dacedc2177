"""Judge if the weights are those of the architecture: transformers loads them without their values, in a child process.

The child (`finetune_trainer.dry_load`), which may take MEMORY_BYTES, builds the empty model and gives transformers'
own loader tensors that have shapes alone. What it reports is what the train stage's load would, with all renamings,
conversions and ties of the family; it loads what an adapter is exported with, too. The process costs what importing
torch and transformers costs, measured as 10 s of one CPU and 0.8 GiB; a mixture of 128 experts and 94 layers, 36,945
tensors, 12 s more.
"""

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from finetune_api.redact import shortened
from finetune_trainer.data.model_folder import ModelFolder
from finetune_trainer.data.weights import FLOATS, Weights

log = logging.getLogger(__name__)

Judge = Callable[[ModelFolder, str, dict[str, Any], Weights, Mapping[str, str]], "LoadReport"]  # as `check_structure`

READY = b"ready\n"  # what the child says once its imports are done
TOO_LARGE, MACHINE_FAILED = 70, 71  # the child's exit codes; the second where the model is not to blame
MEMORY_BYTES = 4 * 2**30  # of data that the child may have
_MAX_REPORT_BYTES = 2**28
TIME_LIMIT_S = 600
_ENVIRONMENT = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "HOME", "TMPDIR")  # no credentials
_QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
# What transformers and safetensors raise for files and configurations that are not as they should be.
REFUSALS = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, ImportError, OSError, RuntimeError, ArithmeticError,
    AssertionError,
)  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# What transformers calls in every family what config.json may call otherwise, or leave to the family's default.
SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
_MAX_NAME = 100  # of a tensor, in words
_TRIED = 8  # missing names that a prefix is looked for with; a tied head is not among what files hold


class Mismatch(BaseModel):
    """A tensor of another shape than the architecture has."""

    name: str
    found: list[int]
    wanted: list[int]


class LoadReport(BaseModel):
    """What loading a model's tensors said; names as in its files where they can be told. Sorted, layer by layer."""

    architecture: str  # the class that transformers builds
    sizes: dict[str, int] = {}  # SIZES of the configuration as transformers completes it, as far as the family has them
    missing: list[str] = []
    mismatched: list[Mismatch] = []
    unexpected: list[str] = []  # of a part that the model has: a layer too many, a bias that the configuration denies
    beside: list[str] = []  # of parts that the model does not have, such as a value head; they change nothing
    unconvertible: bool = False  # the tensors do not go together as the family's conversions need
    failed: str | None = None  # why the empty model could not be built, so that no tensor was judged
    not_exported: str | None = None  # why what is exported beside an adapter could not be loaded

    def problem(self, file_of: Callable[[str], str], config: dict[str, Any]) -> str | None:
        """Return what keeps the model from being the one that its configuration describes, the worst first."""
        if found := self._wrapper():
            head, part = found
            first = next(name for name in (*self.unexpected, *self.beside) if name.startswith(head + part))
            where = f"have {part} after {head}" if head else f"begin with {part}"
            return (
                f"the names of its tensors {where} ({_cut(first)} in {file_of(first)}), as a wrapper wrote "
                "them; save the model inside it with save_pretrained"
            )
        if self.mismatched:
            first = self.mismatched[0]
            fields = _fields(first, config)
            return (
                f"{_cut(first.name)} in {file_of(first.name)} is {_sides(first.found)}, "
                f"but config.json asks for {_sides(first.wanted)}{fields}{_more(len(self.mismatched))}"
            )
        if self.missing:
            name = self.missing[0]
            return (
                f"{_cut(name)} is missing from {file_of(name)}{_more(len(self.missing))}; "
                "copy or save the model again, whole"
            )
        if self.unexpected:
            name = self.unexpected[0]
            if ".lora_" in name:
                return (
                    f"{_cut(name)} in {file_of(name)} is of an adapter that was not merged; "
                    "merge it with merge_and_unload of PEFT and save the model again"
                )
            return (
                f"{_cut(name)} in {file_of(name)} has no place in the model that config.json describes"
                f"{_more(len(self.unexpected))}; its config.json is of another model"
            )
        if self.unconvertible:
            return f"transformers cannot put its tensors together as a {self.architecture}; save the model again, whole"
        return None

    def _wrapper(self) -> tuple[str, str] | None:
        """Return what most missing tensors have more in their names, after which head, if that is why they are missing.

        The head is "" or a first part such as "model."."""
        extra = {*self.unexpected, *self.beside}
        for missing in self.missing[:_TRIED]:
            for head in ("", missing[: missing.find(".") + 1]):
                tail = missing.removeprefix(head)
                for name in extra:
                    part = name.removeprefix(head).removesuffix(tail)
                    if not (name.startswith(head) and name.endswith(tail) and part.endswith(".")):
                        continue
                    found = sum(head + part + each.removeprefix(head) in extra for each in self.missing)
                    if 2 * found > len(self.missing):
                        return head, part
        return None


def check_structure(
    folder: ModelFolder, architecture: str, config: dict[str, Any], weights: Weights, exported: Mapping[str, str]
) -> LoadReport:
    """Return what a load of the model says: its sizes, and tensors that are beside it.

    exported: the files that an adapter is exported with, name -> content. Raises BROKEN_MODEL or UNSUPPORTED_MODEL
    unless the weights are all that a load of this model needs, and those files can be loaded too.
    """
    layers = [config[name] for name in _LAYERS if type(config.get(name)) is int]
    wrong = next((each for each in layers if not 0 < each <= len(weights.tensors)), None)
    if wrong is not None:  # the empty model must not be larger than what is there
        found = f"config.json asks for {wrong:,} layers, but its files hold {len(weights.tensors):,} tensors"
        raise folder.broken(f"{found}; its config.json is of another model")
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    request = {"config": config, "shapes": shapes, "exported": exported, "memory_bytes": MEMORY_BYTES}
    report = load_without_values(json.dumps(request).encode())  # may hold Infinity
    if report.failed is not None:
        raise folder.unsupported(architecture, report.failed)
    holders = weights.index | {name: tensor.file for name, tensor in weights.tensors.items()}
    problem = report.problem(lambda tensor: file_of(tensor, holders, weights.files), config)
    if problem is not None:
        raise folder.broken(problem)
    for name, tensor in weights.tensors.items():
        if name.endswith(".weight") and len(tensor.shape) <= 3 and tensor.dtype not in FLOATS:
            problem = f"its weights are quantized ({_cut(name)} in {tensor.file} is {tensor.dtype}); "
            raise folder.unsupported(architecture, problem + "use the model they were made from")
    if report.beside:
        log.warning(
            "the model at %s holds %d tensors of parts that a %s does not have, which are left out: %s …",
            folder.uri, len(report.beside), report.architecture, report.beside[0],
        )  # fmt: skip
    if report.not_exported is not None:
        raise folder.broken(report.not_exported)
    return report


def sizes_alone(
    folder: ModelFolder, architecture: str, config: dict[str, Any], weights: Weights, exported: Mapping[str, str]
) -> LoadReport:
    """Return the sizes that config.json names, where nobody will load the weights; where it leaves some to the family,
    what `check_structure` does."""
    sizes = {name: size for name in SIZES if type(size := config.get(name)) is int and size > 0}
    if len(sizes) == len(SIZES):
        return LoadReport(architecture=architecture, sizes=sizes)
    return check_structure(folder, architecture, config, weights, exported)


def load_without_values(request: bytes) -> LoadReport:
    """Have the child process judge one model; `request` is JSON with its config and the shapes of its tensors."""
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-m", "finetune_trainer.dry_load"],
            env=environment | _QUIET,
            input=request,
            capture_output=True,
            timeout=TIME_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        if not (expired.stdout or b"").startswith(READY):  # the machine's fault, as no model was looked at yet
            raise RuntimeError(f"finetune_trainer.dry_load did not start within {TIME_LIMIT_S} s") from None
        return LoadReport(architecture="", failed=f"transformers did not build it within {TIME_LIMIT_S} s")
    ready, reply = child.stdout[: len(READY)], child.stdout[len(READY) :]
    said = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    if ready != READY:
        raise RuntimeError(f"finetune_trainer.dry_load did not start ({child.returncode}): {shortened(said, 500)}")
    if child.returncode == -signal.SIGKILL:  # by the kernel, most likely for its memory
        raise MemoryError(f"finetune_trainer.dry_load ended with {child.returncode}")
    if child.returncode in (TOO_LARGE, -signal.SIGABRT):
        words = f"transformers needs more than {MEMORY_BYTES / 2**30:.3g} GiB to build it without its values"
        return LoadReport(architecture="", failed=words)
    if child.returncode == MACHINE_FAILED:
        raise RuntimeError("finetune_trainer.dry_load could not work on this machine")
    if child.returncode or len(reply) > _MAX_REPORT_BYTES:
        return LoadReport(
            architecture="", failed=f"transformers cannot build it from its config.json: {shortened(said, 160)}"
        )
    return LoadReport.model_validate_json(reply)


def is_of_the_machine(error: Exception) -> bool:
    """Return whether the system refused something, such as one more open file; missing files are the model's."""
    return isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


def file_of(tensor: str, holders: Mapping[str, str], files: Sequence[str]) -> str:
    """Return the file that holds the tensor, or, of one that none holds, where it should be."""
    return holders.get(tensor) or (files[0] if len(files) == 1 else f"its {len(files)} files")


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts layer 2 before layer 10."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"\.", name)]


def _fields(mismatch: Mismatch, config: dict[str, Any]) -> str:
    """Return the fields of the configuration that the differing sides may come from."""
    if len(mismatch.found) != len(mismatch.wanted):
        return ""
    sides = {wanted for found, wanted in zip(mismatch.found, mismatch.wanted, strict=True) if found != wanted}
    names = [f"{name} {value}" for name, value in config.items() if type(value) is int and value in sides]
    return f" ({', '.join(names)})" if 0 < len(names) <= 2 else ""


def _sides(shape: list[int]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def _more(count: int) -> str:
    return f" ({count:,} such tensors)" if count > 1 else ""


def _cut(name: str) -> str:
    return name if len(name) <= _MAX_NAME else "…" + name[1 - _MAX_NAME :]
