"""The trainers that `bench.throughput` compares, each as somebody would write or start it for the same rows.

Each function trains a LoRA adapter on the workload's rows and leaves it in a folder, with the held-out loss measured
before and after and a checkpoint at the end, as the others do. Nothing of ours is imported but by `ours`.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.workload import LEARNING_RATE, RANK, Row, Workload, local_path

IGNORED = -100


@dataclass
class Trained:
    """What one run left behind: seconds and loss of every step, and where the adapter is."""

    adapter: Path
    step_s: list[float] = field(default_factory=list[float])
    step_tokens: list[int] = field(default_factory=list[int])
    losses: list[float] = field(default_factory=list[float])  # nats per learned token
    compute: str = "fp32"


def ours_in_fp32(work: Workload, folder: Path) -> Trained:
    """As `ours`, on a CPU that is not asked whether it multiplies faster in bf16."""
    from finetune_trainer import world

    world.bf16_speedup = lambda: 0.0
    return ours(work, folder)


def ours(work: Workload, folder: Path) -> Trained:
    """The train stage as its container runs it, from the fetch of the model to the commit."""
    from finetune_api.layout import METRICS, join
    from finetune_api.run import RunResult
    from finetune_trainer.__main__ import main
    from finetune_trainer.export import EVAL

    folder.mkdir()
    result_file = folder / "result.json"
    arguments = ["train", "--config", str(work.config_file), "--attempt", "1", "--plan-digest", work.plan_digest]
    code = main([*arguments, "--result", str(result_file)])
    result = RunResult.model_validate_json(result_file.read_bytes())
    if code != 0 or result.artifact is None:
        raise SystemExit(f"our train stage ended with {code}: {result.fault} {result.args}")
    rows = [json.loads(line) for line in local_path(join(work.config.run_uri, METRICS)).read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    return Trained(
        adapter=local_path(result.artifact.uri),
        step_s=[row["seconds"] for row in steps],
        step_tokens=[row["tokens"] for row in steps],
        losses=[row["loss"] for row in steps],
        compute=json.loads(local_path(join(result.artifact.uri, EVAL)).read_bytes())["computed_in"],
    )


def plain(work: Workload, folder: Path) -> Trained:
    """A loop against transformers and PEFT alone: padded batches, the model's own loss, AdamW, linear decay.

    On a GPU the base is loaded in bf16, its adapter stays in fp32, as PEFT makes it.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_folder = local_path(work.config.spec.model.uri)
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    dtype = torch.bfloat16 if work.device == "cuda" else torch.float32
    base: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    base.to(work.device)
    torch.manual_seed(0)
    model: Any = get_peft_model(base, _lora(work))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(work.steps))
    pad = tokenizer.pad_token_id or 0

    def evaluate() -> float:
        model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for rows in _chunks(work.held_out, work.batch_rows):
                batch = _padded(rows, pad, work.device)
                labels = int((batch["labels"] != IGNORED).sum())
                total, count = total + float(model(**batch).loss) * labels, count + labels
        model.train()
        return total / count

    trained = Trained(folder / "adapter", compute="bf16" if work.device == "cuda" else "fp32")
    evaluate()
    for rows in work.steps:
        began_s = time.perf_counter()
        loss = model(**_padded(rows, pad, work.device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        trained.losses.append(float(loss))
        trained.step_s.append(time.perf_counter() - began_s)
        trained.step_tokens.append(sum(len(row.input_ids) for row in rows))
    evaluate()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, _made(folder) / "state.pt")
    model.save_pretrained(trained.adapter)
    tokenizer.save_pretrained(trained.adapter)
    return trained


def step_clock(step_s: list[float], on_step_log: Callable[[dict[str, float]], None]) -> Any:
    """Return what adds the seconds of each step of a trainer of transformers, and hands on what that logs of it."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        began_s = 0.0

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.began_s = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            step_s.append(time.perf_counter() - self.began_s)

        def on_log(self, *_: object, logs: dict[str, float], **__: object) -> None:
            if "loss" in logs:
                on_step_log(logs)

    return Clock()


def trl(work: Workload, folder: Path, tuned: bool) -> Trained:
    """TRL's SFTTrainer. As it comes: its own defaults, bf16 and recomputation among them. Tuned: as its pages on speed
    and memory say for a machine whose memory suffices, without recomputation.

    On the CPU tuned is also packed (best fit), which on a GPU wants the flash-attn package, or rows see each other (2 %
    more held-out loss seen), and in fp32, as somebody would who sees how long bf16 takes without instructions for it.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    on_gpu = work.device == "cuda"
    trained = Trained(folder / "adapter", compute="fp32" if tuned and not on_gpu else "bf16")

    rows = [row for step in work.steps for row in step]
    longest = max(len(row.input_ids) for row in rows)
    step_tokens = sum(work.tokens) // len(work.steps)
    # A packed sequence holds as many tokens as one of the plan's steps, so that the steps are about as many.
    is_packed = tuned and not on_gpu
    packed = {"packing": True, "max_length": max(step_tokens, longest), "eval_packing": False} if is_packed else {}
    make_config: Any = SFTConfig
    config = make_config(
        output_dir=str(_made(folder) / "checkpoints"),
        per_device_train_batch_size=1 if is_packed else work.batch_rows,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        train_sampling_strategy="sequential",
        logging_steps=1,
        eval_strategy="no",
        save_strategy="no",
        use_cpu=not on_gpu,
        disable_tqdm=True,
        report_to=[],
        **packed,
        **({"gradient_checkpointing": False, "bf16": on_gpu} if tuned else {}),
    )
    make_trainer: Any = SFTTrainer
    model_folder = local_path(work.config.spec.model.uri)
    trainer = make_trainer(
        str(model_folder),
        args=config,
        train_dataset=Dataset.from_dict(_columns(rows)),
        eval_dataset=Dataset.from_dict(_columns(work.held_out)),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=_lora(work),
        callbacks=[step_clock(trained.step_s, lambda logs: trained.losses.append(logs["loss"]))],
    )
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trainer._save_checkpoint(trainer.model, trial=None)  # pyright: ignore[reportPrivateUsage]
    trainer.save_model(str(trained.adapter))
    steps = len(trained.step_s)
    trained.step_tokens = _shares(sum(work.tokens), steps) if is_packed else work.tokens
    return trained


def _shares(total: int, parts: int) -> list[int]:
    """`total` in `parts` equal parts: TRL does not tell which rows a packed step read."""
    return [total // parts] * parts


def _columns(rows: list[Row]) -> dict[str, list[list[int]]]:
    return {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}


def _chunks(rows: list[Row], size: int) -> Iterator[list[Row]]:
    for begin in range(0, len(rows), size):
        yield rows[begin : begin + size]


def _padded(rows: list[Row], pad: int, device: str) -> dict[str, Any]:
    """(rows, longest) tensors on the device, padded at the right."""
    import torch

    longest = max(len(row.input_ids) for row in rows)
    short = [longest - len(row.input_ids) for row in rows]
    columns = {
        "input_ids": [row.input_ids + [pad] * n for row, n in zip(rows, short, strict=True)],
        "attention_mask": [[1] * (longest - n) + [0] * n for n in short],
        "labels": [row.labels + [IGNORED] * n for row, n in zip(rows, short, strict=True)],
    }
    return {name: torch.tensor(column, device=device) for name, column in columns.items()}


def held_out_loss(work: Workload, adapter: Path | None) -> float:
    """Judge: nats per learned token over all held-out rows, by plain PEFT in fp32, one row at a time."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(local_path(work.config.spec.model.uri), dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval().to(work.device)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in work.held_out:
            labels = sum(label != IGNORED for label in row.labels[1:])
            total += float(model(**_padded([row], 0, work.device)).loss) * labels
            count += labels
    return total / count


def _lora(work: Workload) -> Any:
    from peft import LoraConfig

    alpha = work.plan["hyperparameters"]["lora_alpha"]
    return LoraConfig(r=RANK, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
