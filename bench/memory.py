"""Peak memory of training above the loaded model, planned and measured, at real widths of eight model families.

Each case is the real configuration with its whole vocabulary and random weights, but four layers (eight once, to see
that layers add what the plan says). The product's own Stepper trains two steps, first on a short row and then on a
full pass: forward, backward, clip, AdamW. On the CPU, fp32: a row of 2,048 tokens, each case in a child process with
one thread; the peak is the kernel's VmHWM. `--device cuda`, bf16: four such rows in one pass, all cases in this
process, the peak is torch.cuda.max_memory_allocated.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bench import tables
from finetune_api.job import DatasetFormat, LossOn, MethodType, Schedule
from finetune_trainer import memory
from finetune_trainer.data.examples import ARRAYS
from finetune_trainer.data.model_facts import adapted_shapes
from finetune_trainer.data.widths import layer_widths
from finetune_trainer.families import PACKING_FAMILIES
from finetune_trainer.runplan import FileRecord, Hyperparameters, ModelFacts, RunPlan, SplitFiles

RANK = 16
ROW_TOKENS = 2048
# Rows of the steps before the full pass.
EARLIER_STEPS = ((256,),)
ROWS_OF_PASS = {"cpu": 1, "cuda": 4}
LABEL_SHARE = 8  # the last eighth of each row is an answer
LAYERS = 4
MIB = 2**20
_NO_FILE = FileRecord(uri="file:///dev/null", size_bytes=0, etag="")
_CHILD_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Case:
    """A published model: what its config.json says, as far as memory goes."""

    family: str
    hidden: int
    mlp: int
    heads: int
    key_heads: int
    vocabulary: int
    head_dim: int | None = None
    window: int | None = None
    tied: bool = True
    layers: int = LAYERS


CASES = {
    "Llama-3.2-1B": Case("llama", 2048, 8192, 32, 8, 128_256, 64),
    "Qwen2.5-0.5B": Case("qwen2", 896, 4864, 14, 2, 151_936),
    "Qwen3-0.6B": Case("qwen3", 1024, 3072, 16, 8, 151_936, 128),
    "gemma-2b": Case("gemma", 2048, 16384, 8, 1, 256_000, 256),
    "gemma-3-1b": Case("gemma3_text", 1152, 6912, 4, 1, 262_144, 256, window=512),
    "phi-1.5": Case("phi", 2048, 8192, 32, 32, 51_200, tied=False),
    "pythia-410m": Case("gpt_neox", 1024, 4096, 16, 16, 50_304, tied=False),
    "OLMo-2-1B": Case("olmo2", 2048, 8192, 16, 16, 100_352, tied=False),
    "pythia-410m, 8 layers": Case("gpt_neox", 1024, 4096, 16, 16, 50_304, tied=False, layers=8),
}


def configuration(case: Case) -> Any:
    """Return the transformers configuration of a case."""
    from transformers import AutoConfig

    optional = {"head_dim": case.head_dim, "sliding_window": case.window}
    return AutoConfig.for_model(
        case.family,
        hidden_size=case.hidden,
        intermediate_size=case.mlp,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.key_heads,
        vocab_size=case.vocabulary,
        tie_word_embeddings=case.tied,
        max_position_embeddings=8192,
        **{name: value for name, value in optional.items() if value is not None},
    )


def facts(case: Case) -> ModelFacts:
    """Return what prepare reads of a case, from its configuration and the shapes of its weights; makes no weights."""
    import torch
    from transformers import AutoModelForCausalLM

    config = configuration(case)
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config)
    shapes = {name: list(parameter.shape) for name, parameter in causal.named_parameters()}
    linear = adapted_shapes(shapes, config.model_type)
    return ModelFacts(
        uri="file:///dev/null",
        digest="sha256:" + "0" * 64,
        files=[],
        architecture=type(causal).__name__,
        hidden_size=case.hidden,
        layers=case.layers,
        vocabulary_size=case.vocabulary,
        parameters=sum(int(np.prod(shape)) for shape in shapes.values()),
        context_length=8192,
        lora_parameters_per_rank=sum(sum(shape) for _, shape in linear.values()),
        target_modules=sorted({module for module, _ in linear.values()}),
        packing_safe=case.family in PACKING_FAMILIES,
        widths=layer_widths(config.to_dict(), case.hidden, case.layers, [shape for _, shape in linear.values()]),
    )


def planned_bytes(case: Case, device: str) -> int:
    """Return what the plan says of a case, above the loaded model."""
    tokens = ROW_TOKENS * ROWS_OF_PASS[device]
    labels = tokens // LABEL_SHARE
    return memory.pass_bytes(facts(case), case.family, RANK, tokens, ROW_TOKENS, device == "cuda", labels)


def measured_bytes(case: Case, device_type: str) -> int:
    """Train a few steps in this process; return the peak above the loaded model."""
    import torch

    from finetune_trainer.loop import Stepper, make_optimizer
    from finetune_trainer.methods.sft import SFT
    from finetune_trainer.model import adapter_parameters, add_adapter, language_model

    device = torch.device(device_type)
    plan = _plan(facts(case))
    lm = language_model(_random_model(case, device), plan, device)
    before = _reset_peak(device)
    parameters = list(adapter_parameters(add_adapter(lm, plan)).values())
    rows, steps = _work(case, ROWS_OF_PASS[device_type])
    stepper = Stepper(
        lm=lm,
        method=SFT,
        parameters=parameters,
        optimizer=make_optimizer(parameters, plan.hyperparameters),
        examples=rows,
        steps=steps,
        hyper=plan.hyperparameters,
        budget_tokens=plan.hyperparameters.micro_batch_tokens,
    )
    losses = [float(stepper.run(step)[0]) for step in range(len(steps))]
    if not all(np.isfinite(losses)):
        raise SystemExit(f"{case.family} has losses {losses}: nothing was trained")
    return _peak(device) - before


def _random_model(case: Case, device: Any) -> Any:
    """Make the model with weights of the usual size; on the CPU every page is written, as after loading."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with torch.device(device), no_init_weights():
        causal = AutoModelForCausalLM.from_config(configuration(case), dtype=dtype)
    # Copies of one block are made faster than a billion random numbers; its length fits no width, so rows differ.
    block = (0.02 * torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))).to(device, dtype)
    for name, parameter in causal.named_parameters():
        flat = parameter.data.view(-1)
        if parameter.dim() == 1:
            flat.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        for begin in range(0, len(flat), len(block)):
            part = flat[begin : begin + len(block)]
            part.copy_(block[: len(part)])
    return causal


def _work(case: Case, rows_of_pass: int) -> tuple[Any, Any]:
    """Return rows of random tokens, and the steps that read them: the earlier ones, then the full pass."""
    from finetune_trainer.data.examples import Examples
    from finetune_trainer.step_plan import StepPlan

    step_lengths = [*EARLIER_STEPS, (ROW_TOKENS,) * rows_of_pass]
    lengths = [length for step in step_lengths for length in step]
    offsets = np.cumsum([0, *lengths])
    labels = np.zeros(offsets[-1], dtype=np.uint8)
    for begin, end in pairwise(offsets.tolist()):
        labels[end - (end - begin) // LABEL_SHARE : end] = 1
    tokens = np.random.default_rng(0).integers(0, case.vocabulary, offsets[-1]).astype(np.uint32)
    step_labels = [sum(length // LABEL_SHARE for length in step) for step in step_lengths]
    steps = StepPlan(
        examples=np.arange(len(lengths)),
        step_offsets=np.cumsum([0, *map(len, step_lengths)]),
        label_tokens=np.array(step_labels),
        denominators=np.array(step_labels, dtype=np.float64),
        tokens=np.array([sum(step) for step in step_lengths]),
    )
    return Examples.of_rows(tokens, labels, offsets), steps


def _plan(model: ModelFacts) -> RunPlan:
    tokens = ROW_TOKENS * max(ROWS_OF_PASS.values())
    split = SplitFiles(
        examples=1,
        segments=1,
        sequences=1,
        stored_tokens=tokens,
        total_tokens=tokens,
        label_tokens=tokens,
        longest_row=ROW_TOKENS,
        arrays=dict.fromkeys(ARRAYS, _NO_FILE),
    )
    hyper = Hyperparameters(
        learning_rate=1e-4,
        warmup_steps=0,
        schedule=Schedule.CONSTANT,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=0,
        total_steps=len(EARLIER_STEPS) + 1,
        global_batch_size=1,
        max_sequence_length=ROW_TOKENS,
        micro_batch_tokens=tokens,
        packing=True,
        lora_rank=RANK,
        lora_alpha=32,
        eval_interval_steps=1,
    )
    return RunPlan(
        method=MethodType.SFT,
        loss_on=LossOn.ASSISTANT,
        formats=[DatasetFormat.MESSAGES],
        stop_token_ids=[],
        model=model,
        hyperparameters=hyper,
        train=split,
        held_out=None,
        batches=_NO_FILE,
        sample_prompts=[],
        inputs=[],
        resolved=[],
        train_tokens=tokens,
        label_tokens=tokens,
        memory_bytes=0,
        gpu_memory_bytes=None,
        disk_bytes=0,
    )


def _reset_peak(device: Any) -> int:
    """Forget the peak so far; return what is in use now."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets the peak to what is in use
    return _status_bytes("VmRSS")


def _peak(device: Any) -> int:
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def _measured_in_child(name: str) -> int:
    command = [sys.executable, "-m", "bench.memory", "--one", name]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_CHILD_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def row(name: str, case: Case, device: str, measured: int) -> list[str]:
    """Return one line of the table."""
    planned = planned_bytes(case, device)
    widths = f"{case.hidden} / {case.mlp} / {case.heads} / {case.key_heads} / {case.vocabulary:,}"
    error = f"{100 * (planned / measured - 1):+.1f} %"
    return [name, case.family, widths, str(case.layers), f"{planned / MIB:,.0f}", f"{measured / MIB:,.0f}", error]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=list(ROWS_OF_PASS), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="CPU cases at once, each with up to 8 GiB")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="leave the table unwritten")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device: str = arguments.device
    if arguments.one:
        import torch

        torch.set_num_threads(1)
        print(measured_bytes(CASES[arguments.one], device))
        return
    names: list[str] = arguments.cases
    rows: list[list[str]] = []
    with ThreadPoolExecutor(arguments.jobs) as children:
        found = (
            (measured_bytes(CASES[name], device) for name in names)
            if device == "cuda"
            else children.map(_measured_in_child, names)
        )
        for name, measured in zip(names, found, strict=True):
            rows.append(row(name, CASES[name], device, measured))
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    if names == list(CASES):
        _write(device, rows)


def _write(device: str, rows: list[list[str]]) -> None:
    tokens = ROW_TOKENS * ROWS_OF_PASS[device]
    header = ["", "family", "hidden / MLP / heads / key heads / vocabulary", "layers"]
    where = "fp32 on the CPU, one thread" if device == "cpu" else f"bf16 on {_gpu_name()}"
    body = (
        f"Random weights on the real configuration with fewer layers, LoRA rank {RANK} on all linear layers, {where}; "
        f"a pass of {tokens:,} tokens in rows of {ROW_TOKENS:,}, no recomputation. Above the loaded model: adapter, "
        "moments, gradients, all that forward and backward hold.\n\n"
        + tables.table([*header, "planned, MiB", "measured, MiB", "plan against measured"], rows)
    )
    suffix, command = ("", "") if device == "cpu" else ("-gpu", " --device cuda")
    packages = ["torch", "transformers", "peft"]
    tables.write(f"memory{suffix}", "Memory of training", f"python -m bench.memory{command}", packages, body)


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


if __name__ == "__main__":
    main()
