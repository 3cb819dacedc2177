"""What transformers says about the tensors it loaded, as a LoadReport with the names that the model's files have."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from finetune_trainer.data.structure import LoadReport, Mismatch, natural

Shapes = Mapping[str, Sequence[int]]
# Tables that old versions saved and new ones compute: the frequencies of rotary positions, and causal masks.
_COMPUTED = re.compile(r"inv_freq$|\.(masked_)?bias$")
_DIMENSIONS_OF_WEIGHTS = (1, 2, 3)


def report_of(causal: PreTrainedModel, info: Mapping[str, Any] | None, shapes: Shapes) -> LoadReport:
    """Return the report on a model that was loaded from tensors of these names and shapes.

    `info` is transformers' own loading report; None when the tensors could not be converted at all.
    """
    report = LoadReport(architecture=type(causal).__name__, unconvertible=info is None)
    if info is not None:
        absent, source_of = info["missing_keys"], causal.all_tied_weights_keys
        report.missing = sorted((name for name in absent if source_of.get(name) not in absent), key=natural)
        report.mismatched = [
            Mismatch(name=name, found=list(found), wanted=list(wanted))
            for name, found, wanted in sorted(info["mismatched_keys"], key=lambda entry: natural(entry[0]))
        ]
        for name in sorted(info["unexpected_keys"], key=natural):
            if not _computed(name, shapes.get(name)):
                (report.unexpected if _is_inside(name, causal) else report.beside).append(name)
        if not (report.missing or report.mismatched):
            return report
    return _as_in_the_files(report, causal, shapes) or report


def _computed(name: str, shape: Sequence[int] | None) -> bool:
    """Return True for a table that is no weight. Masks are told from biases by their dimensions."""
    if not _COMPUTED.search(name):
        return False
    return name.endswith("inv_freq") or (shape is not None and len(shape) not in _DIMENSIONS_OF_WEIGHTS)


def _is_inside(name: str, causal: PreTrainedModel) -> bool:
    """Return True when the tensor is of a part that the model has, though not with this tensor in it."""
    decoder: torch.nn.Module = getattr(causal, causal.base_model_prefix, causal)
    first, _, rest = name.partition(".")
    if first == causal.base_model_prefix:
        return rest.partition(".")[0] in dict(decoder.named_children())
    return first in {**dict(causal.named_children()), **dict(decoder.named_children())}


def _as_in_the_files(report: LoadReport, causal: PreTrainedModel, shapes: Shapes) -> LoadReport | None:
    """Return the report with the names and shapes that the files should have; None where they cannot be told.

    Transformers reports its own tensors, one for all experts of a layer; a file may hold one for each."""
    try:
        with torch.device("meta"):
            own = {name: torch.empty_like(tensor, device="meta") for name, tensor in causal.state_dict().items()}
            wanted = {name: list(each.shape) for name, each in revert_weight_conversion(causal, own).items()}
    except (NotImplementedError, ValueError, RuntimeError, KeyError, IndexError):
        wanted = {}
    tied = {*causal.all_tied_weights_keys.keys(), *causal.all_tied_weights_keys.values()} - {*report.missing}
    absent = [name for name in wanted if name not in shapes and name not in tied]
    mismatched = [
        Mismatch(name=name, found=list(shapes[name]), wanted=shape)
        for name, shape in wanted.items()
        if name in shapes and list(shapes[name]) != shape
    ]
    if not (absent or mismatched) or 2 * len(absent) > len(wanted):  # the files have another layout
        return None
    absent.sort(key=natural)
    mismatched.sort(key=lambda each: natural(each.name))
    return report.model_copy(update={"missing": absent, "mismatched": mismatched})
