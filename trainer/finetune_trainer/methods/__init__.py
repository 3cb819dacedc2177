"""Training methods, one file each: `METHODS` is the only place that knows them all."""

from finetune_api.job import MethodType
from finetune_trainer.methods.cpt import CPT
from finetune_trainer.methods.method import Method
from finetune_trainer.methods.sft import SFT

METHODS: dict[MethodType, Method] = {MethodType.CPT: CPT, MethodType.SFT: SFT}


def method_of(chosen: MethodType) -> Method:
    """Return what the method of a job decides."""
    return METHODS[chosen]
