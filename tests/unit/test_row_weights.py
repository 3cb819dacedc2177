"""What a row weighs, from its file through prepare and real steps to the adapter."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from prometheus_client import CollectorRegistry

import data_run
from data_run import chat, jsonl, put
from finetune_api.layout import ADAPTER, METRICS
from finetune_api.names import Stage
from finetune_trainer import prepare, train
from finetune_trainer.serve import Reporter
from finetune_trainer.stop import StopFlag
from tiny_run import byte_tokenizer, tiny_config, tiny_model

WORDS = ("one", "twenty-two", "three and more", "the last")
FIRST, SECOND, THIRD, FOURTH = (chat(f"what is {number}?", words) for number, words in enumerate(WORDS))


def trained(folder: Path, rows: list[dict[str, Any]], batch: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Prepare the rows, train three steps of `batch` on them; return the losses and the adapter."""
    tiny_model(tiny_config("llama", max_position_embeddings=512)).save_pretrained(folder / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer.save_pretrained(folder / "model")
    put(folder, a_jsonl=jsonl(rows))
    spec = {
        "preprocessing": {"deduplication": {"exact": "Off"}},
        "peft": {"type": "LoRA", "rank": 4},
        "evaluation": {"holdoutFraction": 0},
        "hyperparameters": {"maxSteps": 3, "globalBatchSize": batch, "learningRate": 1e-3},
    }
    ctx = data_run.context(folder, spec)
    plan = prepare.run(ctx).plan
    assert plan is not None
    reporter = Reporter(Stage.TRAIN, 1, CollectorRegistry())
    train.run(replace(ctx, stage=Stage.TRAIN, plan_digest=plan.digest, reporter=reporter), StopFlag(60))
    run = Path(ctx.config.run_uri.removeprefix("file://"))
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [each["loss"] for each in lines if "loss" in each], safetensors.torch.load_file(
        run / ADAPTER / "adapter_model.safetensors"
    )


def test_a_rows_weight_acts_like_the_row_so_many_times(tmp_path: Path) -> None:
    """2 as twice, 0 as not there, a half as half of the others."""
    rows = [{**FIRST, "weight": 2}, {**SECOND, "weight": 0}, {**THIRD, "weight": 0.5}, FOURTH]
    losses, adapter = trained(tmp_path / "weighted", rows, batch=3)
    expected, repeated = trained(tmp_path / "repeated", [*[FIRST] * 4, THIRD, *[FOURTH] * 2], batch=7)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert len({f"{each:.5f}" for each in losses}) == 3, "every step learns"
    assert adapter.keys() == repeated.keys()
    for name, tensor in adapter.items():
        torch.testing.assert_close(tensor, repeated[name], atol=1e-6, rtol=1e-4)
