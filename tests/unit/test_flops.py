"""Model FLOPs against what torch counts while it computes, and the peaks of GPUs by their names."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from finetune_trainer.flops import ModelSize, peak_flops, step_flops
from finetune_trainer.inputs import fetch_examples, fetch_steps
from finetune_trainer.loop import Stepper, make_optimizer
from finetune_trainer.methods.sft import SFT
from finetune_trainer.model import adapter_parameters, add_adapter, load_base, model_size
from tiny_run import make_run


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A10G", None),
        ("Tesla T4", None),
        ("", None),
    ],
)
def test_the_peak_is_known_for_whole_gpus_of_the_table_only(name: str, teraflops: float | None) -> None:
    assert peak_flops(name) == (None if teraflops is None else teraflops * 1e12)


def test_the_formula_is_a_sum_over_weights_and_pairs_of_tokens() -> None:
    size = ModelSize(layer_weights=1000, head_weights=100, adapter_weights=10, layers=2, width=8)
    assert step_flops(size, [], 0) == 0
    assert step_flops(size, [3, 4], 5) == (4 * 1000 + 6 * 10) * 7 + 12 * 2 * 8 * (9 + 16) + 4 * 100 * 5
    # Of the second only one token, which sees all four.
    assert step_flops(size, [3, 4], 5, [3, 1]) == (4 * 1000 + 6 * 10) * 4 + 12 * 2 * 8 * (9 + 4) + 4 * 100 * 5


@pytest.mark.parametrize("tied", [False, True])
def test_the_count_is_what_torch_does_in_a_step(tmp_path: Path, tied: bool) -> None:
    changes = {"num_hidden_layers": 12, "tie_word_embeddings": tied}
    run = make_run(tmp_path, steps=2, batch=6, model_changes=changes)
    lm = load_base(run.folder / "model", run.plan, torch.device("cpu"))
    adapted = add_adapter(lm, run.plan)
    size = model_size(lm, adapted)
    assert size is not None
    assert (size.layers, size.width, size.head_weights) == (12, 32, 320 * 32)
    parameters = list(adapter_parameters(adapted).values())
    assert size.adapter_weights == sum(parameter.numel() for parameter in parameters)
    hyper = run.plan.hyperparameters
    rows, steps = fetch_examples(run.store, run.plan.train, tmp_path / "t"), fetch_steps(run.store, run.plan, tmp_path)
    stepper = Stepper(lm, SFT, parameters, make_optimizer(parameters, hyper), rows, steps, hyper, 2048)
    with FlopCounterMode(display=False) as counter:
        stepper.run(0)
    counted = counter.get_flop_counts()["Global"]
    lengths, labels = rows.lengths(rows.sequences_of(steps.examples_of(0))), int(steps.label_tokens[0])
    # In the first layer there is no gradient to hand down: 1 % less than the formula says.
    assert counted[torch.ops.aten.mm] == pytest.approx(step_flops(replace(size, layers=0), lengths, labels), rel=0.03)
    # Backward is twice forward; the kernel does half as much again, as it computes what it did not keep.
    attention = step_flops(replace(size, layer_weights=0, adapter_weights=0), lengths, 0)
    assert 3 * counted[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] == attention


def test_a_mixture_of_experts_has_no_count_as_it_uses_a_part_of_its_weights(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    lm = load_base(run.folder / "model", run.plan, torch.device("cpu"))
    adapted = add_adapter(lm, run.plan)
    lm.causal.config.num_local_experts = 8
    assert model_size(lm, adapted) is None
