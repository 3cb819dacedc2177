"""Load the base model's weights: all of them, in their shapes, and finite, or fail naming the tensor and its file."""

import json
import os
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_api.run import MAX_ARG_CHARS
from finetune_trainer.data.structure import REFUSALS, file_of, is_of_the_machine
from finetune_trainer.load_report import report_of
from finetune_trainer.runplan import RunPlan

_OF_THE_GPU = re.compile(r"^(CUDA|cuDNN|cuBLAS|NCCL)\b")  # how torch's own RuntimeErrors about it begin
_MAX_SAID = 160


def load_weights(folder: Path, plan: RunPlan, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model in `folder` on the CPU, in `dtype`; safetensors only, no remote code.

    Raises BROKEN_MODEL when transformers would fill or leave out anything, UNSUPPORTED_MODEL when it cannot load it.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    loader: Any = AutoModelForCausalLM  # whose types do not know of a loading report
    with told_of_the_model(plan, "transformers could not load it"):
        causal, info = loader.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            generation_config=GenerationConfig(),  # the model's own is never read: `evaluate` decides alone
            ignore_mismatched_sizes=True,  # named below
            output_loading_info=True,
        )
    if any(info[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys")):
        _require_whole(causal, info, folder, plan)
    return causal


@contextmanager
def told_of_the_model(plan: RunPlan, problem: str) -> Generator[None]:
    """Raise UNSUPPORTED_MODEL with `problem` for what the model's files or code refuse, not what the machine does."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (*REFUSALS, SafetensorError, StrictDataclassError) as error:
        _require_of_the_model(error)
        if "can't allocate memory" in str(error):  # as torch's CPU allocator says it, in a RuntimeError
            raise MemoryError from error
        if _OF_THE_GPU.search(str(error)):
            raise
        raise _unsupported(plan, problem, error) from error


def _require_of_the_model(error: Exception) -> None:
    """Raise `error` again where it is the machine's, such as too many open files, and says nothing of the model."""
    if is_of_the_machine(error):
        raise error


def _require_whole(causal: PreTrainedModel, info: Mapping[str, Any], folder: Path, plan: RunPlan) -> None:
    shapes, files = dict[str, list[int]](), dict[str, str]()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dict)
                shapes[name], files[name] = list(file.get_slice(name).get_shape()), path.name
    config = json.loads((folder / "config.json").read_bytes())
    names = sorted({*files.values()})
    problem = report_of(causal, info, shapes).problem(lambda tensor: file_of(tensor, files, names), config)
    if problem is not None:
        raise _broken(plan, problem)


def require_finite(causal: PreTrainedModel, folder: Path, plan: RunPlan) -> None:
    """Read every weight once. Raises BROKEN_MODEL when one is NaN or infinite."""
    tensors = {name: each for name, each in causal.state_dict().items() if each.is_floating_point() and each.numel()}
    finite = torch.stack(
        [torch.stack([*torch.aminmax(tensor)]).isfinite().all() for tensor in tensors.values()]
    ).tolist()
    wrong = [name for name, good in zip(tensors, finite, strict=True) if not good]
    if wrong:
        found = _not_finite_in(folder) or f"{wrong[0]} holds values that are NaN or infinite once loaded"
        raise _broken(plan, f"{found}; the weights are damaged, copy or save the model again")


def _not_finite_in(folder: Path) -> str | None:
    """Return the first tensor of the files that is not finite, with its file."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dict)
                tensor: Tensor = file.get_tensor(name)
                count = tensor.numel() - int(tensor.isfinite().sum())
                if count:
                    return f"{name} in {path.name} has {count:,} of {tensor.numel():,} values that are NaN or infinite"
    return None


def _unsupported(plan: RunPlan, problem: str, error: Exception) -> StageError:
    said = shortened(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", _MAX_SAID)
    facts = plan.model
    return StageError(
        Fault.UNSUPPORTED_MODEL, uri=facts.uri, architecture=facts.architecture, problem=f"{problem} ({said})"
    )


def _broken(plan: RunPlan, problem: str) -> StageError:
    return StageError(Fault.BROKEN_MODEL, uri=plan.model.uri, problem=shortened(problem, MAX_ARG_CHARS))
