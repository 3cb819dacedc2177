"""The weights of an earlier adapter in the model: trained on, or kept as they are beside those of a new one.

Kept beside (`mode: Stack`), both are one LoRA of the joint rank from the first step on, of which a part is trained; s
is the scale of each and of the whole:

    s1·B1·A1 + s2·B2·A2  =  s · [s1/s·B1, s2/s·B2] · [A1; A2]

So what is trained is what is exported, to the last bit: PEFT's two adapters in one layer would round otherwise than
the one that is served. s is that of the new adapter, or the nearest that a whole alpha gives.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_api.run import MAX_ARG_CHARS
from finetune_trainer.runplan import MAX_ALPHA, AdapterFacts, RunPlan

_TRAINED = "default"  # as PEFT names the adapter that a model is made with


class _Stacked(nn.Module):
    """A linear layer of LoRA, of whose matrix a part is trained. dim: along which the parts lie, kept ones first."""

    def __init__(self, trained: nn.Parameter, kept: Tensor, *, dim: int, factor: float = 1.0) -> None:
        super().__init__()
        self.weight = trained  # named as in a layer that is trained whole; PEFT asks it for its precision too
        self.kept: Tensor
        # A buffer, since PEFT makes the parameters of an adapter trainable whenever it switches that on.
        self.register_buffer("kept", kept.to(trained), persistent=False)
        self._dim, self._factor = dim, factor

    def joint(self) -> Tensor:
        """Return the whole matrix."""
        return torch.cat((self.kept, self.weight if self._factor == 1 else self._factor * self.weight), self._dim)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.joint())


def load_starting_adapter(adapted: PeftModel, path: Path, plan: RunPlan) -> None:
    """Put the weights of an earlier adapter into the one that is trained, or beside them; all of them.

    Raises ADAPTER_UNUSABLE."""
    adapter = plan.starting_adapter
    assert adapter is not None
    uri = shortened(adapter.uri, MAX_ARG_CHARS)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise StageError(Fault.ADAPTER_UNUSABLE, uri=uri, problem="its weights are no safetensors file") from error
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if {name: each.shape for name, each in tensors.items()} != _shapes(own, plan):
        raise StageError(Fault.ADAPTER_UNUSABLE, uri=uri, problem="its weights are of other layers than the model has")
    if not all(bool(torch.isfinite(each).all()) for each in tensors.values()):
        raise StageError(Fault.ADAPTER_UNUSABLE, uri=uri, problem="some of its weights are not finite")
    if plan.stacked_on is None:
        set_peft_model_state_dict(adapted, tensors)
    else:
        _stack(adapted, tensors, plan, plan.stacked_on)


def _shapes(own: dict[str, Tensor], plan: RunPlan) -> dict[str, torch.Size]:
    """Return the shapes that the earlier adapter's weights must have."""
    kept = plan.stacked_on
    if kept is None:
        return {name: each.shape for name, each in own.items()}
    return {
        name: torch.Size((len(each), kept.rank) if _is_b(name) else (kept.rank, each.shape[1]))
        for name, each in own.items()
        if name.split(".lora_")[0].endswith(tuple(f".{module}" for module in kept.target_modules))
    }


def _is_b(name: str) -> bool:
    return ".lora_B." in name


def _stack(adapted: PeftModel, tensors: dict[str, Tensor], plan: RunPlan, kept: AdapterFacts) -> None:
    """Put the earlier adapter's weights beside those that are trained, and zeros in layers that it does not adapt."""
    hyper = plan.hyperparameters
    scale = _joint_alpha(plan) / plan.exported_rank
    for name, layer in adapted.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        a, b = (cast(nn.Parameter, part[_TRAINED].weight) for part in (layer.lora_A, layer.lora_B))
        kept_a = tensors.get(f"{name}.lora_A.weight", a.new_zeros(kept.rank, a.shape[1]))
        kept_b = tensors.get(f"{name}.lora_B.weight", b.new_zeros(len(b), kept.rank))
        layer.lora_A[_TRAINED] = _Stacked(a, kept_a, dim=0)
        own_factor = hyper.lora_alpha / hyper.lora_rank / scale
        layer.lora_B[_TRAINED] = _Stacked(b, kept.scale / scale * kept_b, dim=1, factor=own_factor)
        layer.scaling[_TRAINED] = scale


def _joint_alpha(plan: RunPlan) -> int:
    """Return the alpha that gives the joint rank the scale of the trained adapter, or nearly so."""
    hyper = plan.hyperparameters
    return min(MAX_ALPHA, max(1, round(hyper.lora_alpha * plan.exported_rank / hyper.lora_rank)))


def _stacked(adapted: PeftModel) -> Iterator[tuple[str, _Stacked]]:
    """Yield the parts of layers that hold an earlier adapter, by the names that their matrices have in a file."""
    for name, module in adapted.named_modules():
        if isinstance(module, _Stacked):
            yield f"{name.removesuffix(f'.{_TRAINED}')}.weight", module


def kept_weights(adapted: PeftModel) -> int:
    """Return how many weights are kept as they are beside those that are trained."""
    return sum(part.kept.numel() for _, part in _stacked(adapted))


def write_joint(adapted: PeftModel, folder: Path, plan: RunPlan) -> None:
    """Write the joint adapter over the folder's files, which have the trained part alone."""
    joint = {name: part.joint().detach().cpu() for name, part in _stacked(adapted)}
    save_file(joint, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text()) | {"r": plan.exported_rank, "lora_alpha": _joint_alpha(plan)}
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def is_unchanged(folder: Path, starting_adapter: Path, plan: RunPlan) -> bool:
    """Return whether the adapter in the folder computes the same as the one that training began with."""
    after = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    if plan.stacked_on is not None:
        return not any(bool(each[:, plan.stacked_on.rank :].any()) for name, each in after.items() if _is_b(name))
    before = load_file(starting_adapter)
    return all(torch.equal(before[name].to(each.dtype), each) for name, each in after.items())
