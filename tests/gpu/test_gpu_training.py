"""What only a GPU can show: flash attention over packed rows, no host sync in a step, whole runs in bf16."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune_api.errors import StageError
from finetune_api.job import MethodType
from finetune_api.layout import ADAPTER, METRICS
from finetune_api.reasons import Fault
from finetune_trainer import attention, train
from finetune_trainer.attention import Segments
from finetune_trainer.export import EVAL
from finetune_trainer.guard import OomRetry
from finetune_trainer.inputs import fetch_examples, fetch_steps, pack_rows
from finetune_trainer.loop import Stepper, make_optimizer
from finetune_trainer.methods import planned_method
from finetune_trainer.methods.sft import SFT
from finetune_trainer.model import adapter_parameters, add_adapter, load_base
from finetune_trainer.stop import StopFlag
from finetune_trainer.world import release_memory
from pair_run import preference_run
from tiny_run import TinyRun, context, make_run, stop_before, use_model

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


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 5])
def test_flash_attention_over_rows_that_share_beginnings_equals_that_of_the_cpu(
    kv_heads: int, window: int | None
) -> None:
    """A row that goes on behind seven tokens of the first, one behind all but two of that, and one by itself."""
    rows = [np.arange(length) for length in (9, 12, 15, 6)]
    shared = [0, 7, 10, 0]
    labels = [np.arange(len(row)) >= max(1, begin) for row, begin in zip(rows, shared, strict=True)]
    on_gpu, on_cpu = (pack_rows(rows, labels, torch.device(name), shared=shared) for name in ("cuda", "cpu"))
    tokens = on_cpu.input_ids.numel()
    torch.manual_seed(0)
    q = torch.randn(1, 4, tokens, 16, requires_grad=True)
    k, v = (torch.randn(1, kv_heads, tokens, 16, requires_grad=True) for _ in "kv")
    half_q, half_k, half_v = half = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in (q, k, v)]
    flash = attention._flash(half_q, half_k, half_v, on_gpu.segments, None, window)  # pyright: ignore[reportPrivateUsage]
    wide_k, wide_v = (attention._repeat_heads(x, 4) for x in (k, v))  # pyright: ignore[reportPrivateUsage]
    plain = attention._per_row(q, wide_k, wide_v, on_cpu.segments, None, window)  # pyright: ignore[reportPrivateUsage]
    torch.testing.assert_close(flash.cpu().float(), plain, atol=2e-2, rtol=2e-2)
    upstream = torch.randn_like(plain)
    found = torch.autograd.grad(flash, half, upstream.to("cuda", torch.bfloat16))
    for one, expected in zip(found, torch.autograd.grad(plain, (q, k, v), upstream), strict=True):
        torch.testing.assert_close(one.cpu().float(), expected, atol=5e-2, rtol=5e-2)


def test_a_step_of_pairs_in_trees_is_that_of_their_flat_sequences_in_bf16(tmp_path: Path) -> None:
    run = preference_run(tmp_path, MethodType.ORPO, batch=8, equal=False, model_changes=WIDE)
    losses: list[float] = []
    for trees in (False, True):
        stepper = _stepper(run, tmp_path / str(trees))
        stepper.method = planned_method(run.plan)
        stepper.hyper = stepper.hyper.model_copy(update={"trees": trees})
        losses.append(float(stepper.run(0)[0]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def _stepper(run: TinyRun, folder: Path) -> Stepper:
    folder.mkdir()
    rows = fetch_examples(run.store, run.plan.train, folder / "train")
    steps = fetch_steps(run.store, run.plan, folder)
    lm = load_base(run.folder / "model", run.plan, torch.device("cuda"))
    parameters = list(adapter_parameters(add_adapter(lm, run.plan)).values())
    hyper = run.plan.hyperparameters
    return Stepper(lm, SFT, parameters, make_optimizer(parameters, hyper), rows, steps, hyper, hyper.micro_batch_tokens)


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


def _losses(run: TinyRun) -> dict[int, float]:
    rows = [json.loads(line) for line in run.local(METRICS).read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_a_run_that_was_stopped_half_way_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention's backward adds in any order, so not to the last bit as on the CPU."""
    undisturbed, stopped = (make_run(tmp_path / name, model_changes=WIDE, gpus=1) for name in ("whole", "stopped"))
    train.run(context(undisturbed), StopFlag(60))
    stop = StopFlag(60)
    stop_before(monkeypatch, stop, 7)
    with pytest.raises(StageError) as caught:
        train.run(context(stopped), stop)
    assert caught.value.fault is Fault.INTERRUPTED
    monkeypatch.undo()
    result = train.run(context(stopped, attempt=2), StopFlag(60))
    assert (result.exit_code, result.resumed_from_step) == (0, 7)
    assert _losses(stopped) == pytest.approx(_losses(undisturbed), rel=0.01)
    assert json.loads(stopped.local(ADAPTER, EVAL).read_bytes())["computed_in"] == "bf16"


def test_a_step_for_which_memory_runs_out_is_done_in_smaller_passes(tmp_path: Path) -> None:
    """Really out of memory: the process may hold little more than the smaller passes need."""
    run = make_run(tmp_path, rows=256, batch=256, longest=250, micro_batch_tokens=2**17, model_changes=WIDE, gpus=1)
    stepper = _stepper(run, tmp_path / "fetched")
    torch.cuda.reset_peak_memory_stats()
    whole = stepper.run(0)
    limit = 0.7 * torch.cuda.max_memory_allocated() / torch.cuda.get_device_properties(0).total_memory
    stepper = _stepper(run, tmp_path / "fetched again")
    retry = OomRetry(lambda: None)
    release_memory()
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        divided = retry.run(0, stepper)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert retry.retries > 0
    torch.testing.assert_close(divided, whole, rtol=0.01, atol=0.0)


@pytest.mark.real_model
def test_a_real_model_trains_on_the_gpu(tmp_path: Path) -> None:
    from demo import assets

    run = make_run(tmp_path, gpus=1)
    use_model(run, assets.ensure_model())
    assert train.run(context(run), StopFlag(60)).exit_code == 0
