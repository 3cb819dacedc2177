"""The load without values passes whole models of every family and names what is not whole in the others."""

import errno
import subprocess
import sys
from typing import Any

import pytest

from data_run import CHILD
from finetune_trainer.data import structure
from finetune_trainer.data.structure import MACHINE_FAILED, READY, TOO_LARGE
from finetune_trainer.dry_load import judge
from finetune_trainer.families import PACKING_FAMILIES
from tiny_run import saved_shapes
from waiting import PATIENCE_S

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


def test_names_of_a_wrapper_and_of_an_adapter_are_told_as_what_they_are() -> None:
    config, shapes = saved_shapes("llama")
    inside = {name.replace("model.", "model.language_model.", 1): shape for name, shape in shapes.items()}
    assert "the names of its tensors have language_model. after model. (" in said(config, inside)
    left = shapes | {"model.layers.0.self_attn.q_proj.lora_A.weight": [4, 32]}
    assert "is of an adapter that was not merged" in said(config, left)


@pytest.mark.parametrize(("code", "expected"), [(-9, MemoryError), (MACHINE_FAILED, RuntimeError)])
def test_a_child_that_the_machine_failed_says_nothing_of_the_model(
    monkeypatch: pytest.MonkeyPatch, code: int, expected: type[Exception]
) -> None:
    def ended(*_args: object, **_more: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess([], code, READY, b"")

    monkeypatch.setattr(structure.subprocess, "run", ended)
    with pytest.raises(expected):
        CHILD(b"{}")


@pytest.mark.parametrize(
    ("error", "code"),
    [(MemoryError(), TOO_LARGE), (OSError(errno.EMFILE, "Too many open files"), MACHINE_FAILED)],
)
def test_the_child_tells_what_the_machine_refused_from_what_is_wrong_with_the_model(
    error: Exception, code: int
) -> None:
    """In a process of its own, as the child gives its standard output away."""
    script = (
        "import errno, sys; from finetune_trainer import dry_load\n"
        f"def judge(config, shapes): raise {error!r}\n"
        "dry_load.judge = judge; sys.exit(dry_load.main())"
    )
    request = b'{"config": {}, "shapes": {}}'
    done = subprocess.run(
        [sys.executable, "-c", script], input=request, capture_output=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == code, done.stderr.decode()
