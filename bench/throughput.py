"""Real tokens per second of our step loop, of the bare PyTorch loop on the same packed ids, and of TRL's SFTTrainer.

All train LoRA (rank 16, all linear layers, fp32) on SmolLM2-135M with the same rows in the same steps: real
conversations, tokenised once. Each runs in a process of its own with pinned threads; the implementations take turns.
The first steps are left out. The losses of the first step must agree to 1e-3, or there is no table.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench import tables
from bench.workload import BATCH_ROWS, LEARNING_RATE, PASS_TOKENS, RANK, Workload, read_workload, write_workload

SKIPPED_STEPS = 2
IMPLEMENTATIONS = {
    "bare": "bare PyTorch loop",
    "ours": "finetune-operator",
    "trl": "TRL SFTTrainer, defaults",
    "trl-tuned": "TRL SFTTrainer, no recomputation",
}
Step = Callable[[int], float]  # step number -> loss in nats per label token


def bare(work: Workload, model_folder: Path) -> Step:
    """Forward, backward, clip and fused AdamW on the passes our loop makes, head on label tokens only; nothing else."""
    import torch
    from peft import get_peft_model
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    from finetune_trainer import attention
    from finetune_trainer.loop import passes

    attention.register()
    causal = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation=attention.PACKED
    )
    get_peft_model(causal, _lora())
    causal.train()
    parameters = [parameter for parameter in causal.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    device = torch.device("cpu")
    groups = [list(passes(rows, work.rows.lengths(rows), PASS_TOKENS, True)) for rows in work.steps]
    batches = [[work.rows.batch(group, device) for group in step] for step in groups]
    denominators = [sum(len(batch.targets) for batch in step) for step in batches]

    def step(number: int) -> float:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for batch in batches[number]:
            hidden = causal.model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, segments=batch.segments, use_cache=False
            ).last_hidden_state
            logits = causal.lm_head(hidden[0, batch.sources])
            loss = cross_entropy(logits, batch.targets, reduction="sum") / denominators[number]
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - number / len(batches))
        optimizer.step()
        return float(total)

    return step


def ours(work: Workload, model_folder: Path) -> Step:
    """The step loop of the training stage, as it runs in the container."""
    import torch

    from finetune_trainer.loop import Stepper, make_optimizer
    from finetune_trainer.model import adapter_parameters, add_adapter, load_base
    from finetune_trainer.recipes import sft

    plan = work.plan(model_folder)
    lm = load_base(model_folder, plan, torch.device("cpu"))
    parameters = list(adapter_parameters(add_adapter(lm, plan)).values())
    stepper = Stepper(
        lm=lm,
        recipe=sft,
        parameters=parameters,
        optimizer=make_optimizer(parameters, plan.hyperparameters),
        rows=work.rows,
        steps=work.step_plan(),
        hyper=plan.hyperparameters,
        budget_tokens=PASS_TOKENS,
    )
    return lambda number: float(stepper.run(number)[0])


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def run_stepwise(step: Step, work: Workload) -> tuple[list[float], list[float]]:
    """Times and losses of all steps."""
    seconds: list[float] = []
    losses: list[float] = []
    for number in range(len(work.steps)):
        started = time.perf_counter()
        losses.append(step(number))
        seconds.append(time.perf_counter() - started)
    return seconds, losses


def run_trl(work: Workload, model_folder: Path, tuned: bool) -> tuple[list[float], list[float]]:
    """TRL with its own defaults; only what makes the work the same is set: rows, order, batch, rate, LoRA, fp32."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    seconds: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        started = 0.0

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            seconds.append(time.perf_counter() - self.started)

        def on_log(self, *_: object, logs: dict[str, float], **__: object) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    records: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for row in np.concatenate(work.steps).tolist():
        span = slice(int(work.rows.offsets[row]), int(work.rows.offsets[row + 1]))
        ids, learned = work.rows.tokens[span].astype(np.int64), work.rows.labels[span]
        records["input_ids"].append(ids.tolist())
        records["labels"].append(np.where(learned == 1, ids, -100).tolist())
    with tempfile.TemporaryDirectory() as folder:
        make_config: Any = SFTConfig
        config = make_config(
            output_dir=folder,
            per_device_train_batch_size=BATCH_ROWS,
            max_steps=len(work.steps),
            learning_rate=LEARNING_RATE,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            model_init_kwargs={"dtype": "float32"},
            disable_tqdm=True,
            **({"gradient_checkpointing": False} if tuned else {}),
        )
        make_trainer: Any = SFTTrainer
        trainer = make_trainer(
            str(model_folder),
            args=config,
            train_dataset=Dataset.from_dict(records),
            processing_class=AutoTokenizer.from_pretrained(model_folder),
            peft_config=_lora(),
            callbacks=[Clock()],
        )
        trainer.train()
    return seconds, losses


def measure(implementation: str, folder: Path, threads: int) -> dict[str, Any]:
    """One run, in this process: tokens per second without the first steps, losses, peak memory."""
    import torch

    torch.set_num_threads(threads)
    work = read_workload(folder)
    model_folder = Path(os.environ["BENCH_MODEL"])
    if implementation.startswith("trl"):
        seconds, losses = run_trl(work, model_folder, tuned=implementation == "trl-tuned")
    else:
        seconds, losses = run_stepwise({"bare": bare, "ours": ours}[implementation](work, model_folder), work)
    tokens = [sum(work.rows.lengths(rows)) for rows in work.steps]
    return {
        "tokens_per_s": sum(tokens[SKIPPED_STEPS:]) / sum(seconds[SKIPPED_STEPS:]),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _run_in_process(implementation: str, folder: Path, threads: int, model_folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.throughput", "--one", implementation, "--folder", str(folder)]
    env = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "BENCH_MODEL": str(model_folder),
    }
    done = subprocess.run(
        [*command, "--threads", str(threads)], env=env, capture_output=True, text=True, timeout=1800, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{implementation} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--one", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.folder, arguments.threads)))
        return
    from demo.assets import ensure_model

    model_folder = ensure_model()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in IMPLEMENTATIONS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = write_workload(folder, model_folder, arguments.steps)
        for run in range(arguments.runs):
            for implementation, results in found.items():
                results.append(_run_in_process(implementation, folder, arguments.threads, model_folder))
                print(f"run {run + 1} {implementation}: {results[-1]}", file=sys.stderr, flush=True)
    first = [results[0]["first_loss"] for results in found.values()]
    if max(first) - min(first) > 1e-3:
        raise SystemExit(f"the losses of the first step differ, so this is not the same work: {first}")
    floor = float(np.median([result["tokens_per_s"] for result in found["bare"]]))
    rows = [
        [
            title,
            tables.spread([result["tokens_per_s"] for result in found[key]]),
            f"{100 * float(np.median([result['tokens_per_s'] for result in found[key]])) / floor:.0f} %",
            f"{found[key][0]['first_loss']:.4f}",
            f"{found[key][0]['last_loss']:.4f}",
            tables.spread([result["peak_gib"] for result in found[key]]),
        ]
        for key, title in IMPLEMENTATIONS.items()
    ]
    tokens = sum(sum(work.rows.lengths(step)) for step in work.steps)
    padded = sum(max(work.rows.lengths(step)) * len(step) for step in work.steps)
    body = (
        f"SmolLM2-135M-Instruct, LoRA rank {RANK} on all linear layers, fp32, {arguments.threads} threads; "
        f"{arguments.steps} steps of {BATCH_ROWS} conversations, {tokens} real tokens ({padded} when padded), "
        f"the first {SKIPPED_STEPS} steps left out, {arguments.runs} runs in turns, medians (quartiles).\n\n"
        + tables.table(
            ["", "real tokens/s", "of bare", "loss, first step", "loss, last step", "peak memory, GiB"], rows
        )
        + "\n\nThe bare loop reads the same packed passes, made beforehand, and computes the head only where there is "
        "a label. The losses of the first step agree to 1e-3, or this table is not written."
    )
    tables.write(
        "throughput",
        "Throughput on the CPU",
        "python -m bench.throughput",
        ["torch", "transformers", "peft", "trl"],
        body,
    )


if __name__ == "__main__":
    main()
