"""The load without values passes whole models of every family and names what is not whole in the others."""

from typing import Any

import pytest

from finetune_trainer.dry_load import judge
from finetune_trainer.families import PACKING_FAMILIES
from tiny_run import saved_shapes

EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
OTHERS: dict[str, dict[str, Any]] = {
    "bloom": {},
    "deepseek_v3": {
        **EXPERTS,
        **LATENT,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "gemma2": {},
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_oss": {},
    "granitemoe": {},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {},
    "opt": {},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**EXPERTS, "num_experts": 4},
    "stablelm": {},
}
FAMILIES = [*((family, {}) for family in sorted(PACKING_FAMILIES)), *OTHERS.items()]


def said(config: dict[str, Any], shapes: dict[str, list[int]]) -> str:
    return judge(config, shapes).problem(lambda _: "a file", config) or ""


@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=[family for family, _ in FAMILIES])
def test_a_whole_model_passes_and_what_is_lost_bent_or_renamed_is_named(family: str, changes: dict[str, Any]) -> None:
    config, shapes = saved_shapes(family, **changes)
    assert said(config, shapes) == ""
    # One expert of many is what conversions hide best.
    names = [name for name in shapes if ".1." in name]
    name = next((each for each in reversed(names) if ".experts." in each), names[0])
    lost = {key: shape for key, shape in shapes.items() if key != name}
    assert f"{name} is missing from a file" in said(config, lost)
    assert f"{name} in a file is " in said(config, shapes | {name: [side + 1 for side in shapes[name]]})
    assert " begin with module." in said(config, {f"module.{key}": shape for key, shape in shapes.items()})
    one_layer_more = name.replace(".1.", ".2.", 1)
    assert "has no place in the model" in said(config, shapes | {one_layer_more: shapes[name]})
