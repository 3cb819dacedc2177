"""What only a GPU can show: flash attention over packed rows, no host sync in a step, a whole run in bf16."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune_trainer import attention, recipes, train
from finetune_trainer.attention import Segments
from finetune_trainer.inputs import fetch_rows, fetch_steps
from finetune_trainer.loop import Stepper, make_optimizer
from finetune_trainer.model import adapter_parameters, add_adapter, load_base
from finetune_trainer.stop import StopFlag
from tiny_run import TinyRun, context, make_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible to torch here")

# Heads as large as flash attention wants them.
WIDE: dict[str, Any] = {"hidden_size": 64, "head_dim": 16}


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 5])
def test_flash_attention_over_packed_rows_equals_the_dense_mask(kv_heads: int, window: int | None) -> None:
    bounds = np.cumsum([0, 9, 2, 13, 6])
    segments = Segments(tuple(bounds.tolist()), torch.from_numpy(bounds.astype(np.int32)).cuda(), 13)
    torch.manual_seed(0)
    q = torch.randn(1, 4, 30, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(1, kv_heads, 30, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "kv")
    flash = attention._flash(q, k, v, segments, None, window)  # pyright: ignore[reportPrivateUsage]
    wide_k, wide_v = (attention._repeat_heads(x, 4) for x in (k, v))  # pyright: ignore[reportPrivateUsage]
    dense = attention._dense(q, wide_k, wide_v, segments, None, window)  # pyright: ignore[reportPrivateUsage]
    torch.testing.assert_close(flash, dense, atol=2e-2, rtol=2e-2)
    upstream = torch.randn_like(dense)
    for found, expected in zip(
        torch.autograd.grad(flash, (q, k, v), upstream), torch.autograd.grad(dense, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=5e-2, rtol=5e-2)


def _stepper(run: TinyRun, folder: Path) -> Stepper:
    folder.mkdir()
    rows = fetch_rows(run.store, run.plan.train, folder / "train")
    steps = fetch_steps(run.store, run.plan, folder)
    lm = load_base(run.folder / "model", run.plan, torch.device("cuda"))
    parameters = list(adapter_parameters(add_adapter(lm, run.plan)).values())
    hyper = run.plan.hyperparameters
    return Stepper(
        lm, recipes.sft, parameters, make_optimizer(parameters, hyper), rows, steps, hyper, hyper.micro_batch_tokens
    )


def test_no_step_waits_for_the_device(tmp_path: Path) -> None:
    stepper = _stepper(make_run(tmp_path, model_changes=WIDE), tmp_path / "fetched")
    stepper.run(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        readings = [stepper.run(step) for step in range(1, 4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(reading[2]) for reading in readings)


def test_a_whole_run_on_the_gpu_is_committed(tmp_path: Path) -> None:
    run = make_run(tmp_path, model_changes=WIDE, gpus=1)
    result = train.run(context(run), StopFlag(60))
    assert result.exit_code == 0
    assert result.metrics is not None
    assert result.metrics.train_loss is not None
