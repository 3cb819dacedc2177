"""Training methods, one file each: `METHODS` is the only place that knows them all."""

from finetune_api.job import MethodType
from finetune_trainer.methods.cpt import CPT
from finetune_trainer.methods.dpo import DPO
from finetune_trainer.methods.kto import KTO
from finetune_trainer.methods.method import Method
from finetune_trainer.methods.orpo import ORPO
from finetune_trainer.methods.sft import SFT
from finetune_trainer.runplan import RunPlan

METHODS: dict[MethodType, Method] = {
    MethodType.CPT: CPT,
    MethodType.SFT: SFT,
    MethodType.DPO: DPO,
    MethodType.ORPO: ORPO,
    MethodType.KTO: KTO,
}


def method_of(chosen: MethodType) -> Method:
    """Return what the method of a job decides, whatever its options."""
    return METHODS[chosen]


def planned_method(plan: RunPlan) -> Method:
    """Return what the method of a plan decides, with the job's options."""
    method = METHODS[plan.method]
    return method if plan.options is None else method.bound(method, plan.options)
