"""What prepare plans to adapt is what PEFT adapts, in families whose layers PEFT renames or refuses."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import transformers_weight_conversion as conversion
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune_trainer.data.model_facts import adapted_shapes
from finetune_trainer.families import not_adapted
from tiny_run import saved_shapes, tiny_config

EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**EXPERTS, **LATENT, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "ernie4_5_moe": {**EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "falcon_h1": {},
    "glm4_moe": {**EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "mlp_only_layers": [0]},
    "qwen3_next": {**EXPERTS, "num_experts": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_adapts_the_planned_layers_and_no_others(family: str) -> None:
    _, shapes = saved_shapes(family, **FAMILIES[family])
    planned = adapted_shapes(shapes, family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family, **FAMILIES[family]))
    config = LoraConfig(target_modules=sorted({module for module, _ in planned.values()}))
    adapted = get_peft_model(model, config)
    found = {name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    assert found == {"base_model.model." + name.removesuffix(".weight") for name in planned}


def test_every_mixture_whose_layers_peft_takes_for_experts_is_known() -> None:
    peft: Any = conversion  # whose tables are not public
    expected: dict[str, set[str]] = {}
    for family, pattern in peft._MODEL_TO_CONVERSION_PATTERN.items():
        if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and pattern in peft._MOE_FUSED_TARGETS:
            expected[family] = set(peft._MOE_TARGET_MODULE_MAPPING[pattern])
    assert expected
    assert {family: set(not_adapted(family)) for family in expected} == expected
