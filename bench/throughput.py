"""The whole run and the step: ours, a plain loop against transformers alone, and TRL's SFTTrainer.

All train LoRA (rank 16, all linear layers) on SmolLM2-135M on the same rows of real conversations. Each run is a
process of its own with pinned threads; the implementations take turns. The whole run is timed from the model's load to
the exported adapter, imports left out: with each trainer's own held-out losses before and after and its own
checkpoint, and for ours also sample answers, the reload check, digests and the commit. A separate process then judges
every adapter: plain PEFT, fp32, the same held-out rows.

Where ours computes in bf16 on a CPU, it also runs held to fp32. `--device cuda` does the same on a GPU, in bf16, with
longer rows.

There is no table unless the first steps' losses agree where rows and precision are the same (to 1e-3 in fp32, 0.02 in
bf16), and every adapter's held-out loss is within 2 % of the plain loop's.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from bench import child, tables, trainers
from bench.trainers import Trained
from bench.workload import RANK, Workload, prepare

SKIPPED_STEPS = 2
SAME_FIRST_LOSS = {"fp32": 1e-3, "bf16": 2e-2}
SAME_HELD_OUT_RATIO = 0.02
TRAINERS: dict[str, tuple[str, Callable[[Workload, Path], Trained]]] = {
    "ours": ("finetune-operator", trainers.ours),
    "ours-fp32": ("finetune-operator, held to fp32", trainers.ours_in_fp32),
    "plain": ("plain loop, transformers + PEFT", trainers.plain),
    "trl": ("TRL SFTTrainer as it comes", lambda work, folder: trainers.trl(work, folder, tuned=False)),
    "trl-tuned": (
        "TRL tuned: no recomputation, on the CPU packed",
        lambda work, folder: trainers.trl(work, folder, tuned=True),
    ),
}
_SAME_STEPS = ("ours", "ours-fp32")  # as the plain loop's, where they compute in the same; TRL tuned packs otherwise
# Without bf16 instructions in the CPU its default precision takes many times as long: measured once, not in each turn.
_ONCE = ("trl",)
Run = dict[str, Any]


def measure(name: str, work: Workload, threads: int) -> Run:
    """One run, in this process."""
    import torch

    for module in ("transformers.trainer", "peft", "finetune_trainer.train"):
        import_module(module)  # no part of the run: everybody pays for them
    torch.set_num_threads(threads)
    began_s = time.perf_counter()
    trained = TRAINERS[name][1](work, work.folder / name)
    whole_s = time.perf_counter() - began_s
    return {
        **asdict(trained),
        "adapter": str(trained.adapter),
        "whole_s": whole_s,
        "peak_gib": child.peak_bytes(work.device) / 2**30,
    }


def judge(work: Workload, adapter: str) -> Run:
    """The held-out loss of one adapter, or of the base model for ''."""
    return {"held_out": trainers.held_out_loss(work, Path(adapter) if adapter else None)}


def _child(work: Workload, threads: int, *arguments: str) -> Run:
    own = ("--folder", str(work.folder), "--digest", work.plan_digest)
    return child.run("bench.throughput", threads, *own, *arguments)


def step_speed(run: Run) -> float:
    """Real tokens per second of the steps alone, without the first ones."""
    return sum(run["step_tokens"][SKIPPED_STEPS:]) / sum(run["step_s"][SKIPPED_STEPS:])


def check_same_work(runs: dict[str, list[Run]]) -> None:
    """Raise SystemExit where the losses say that the runs did not do the same work."""
    compute = runs["plain"][0]["compute"]
    same = [run for name in ("plain", *_SAME_STEPS) for run in runs[name] if run["compute"] == compute]
    first = [run["losses"][0] for run in same]
    if max(first) - min(first) > SAME_FIRST_LOSS[compute]:
        raise SystemExit(f"the losses of the first step differ, so this is not the same work: {first}")
    expected = median(run["held_out"] for run in runs["plain"])
    for name, found in runs.items():
        for run in found:
            if abs(run["held_out"] / expected - 1) > SAME_HELD_OUT_RATIO:
                raise SystemExit(
                    f"{name} ends at a held-out loss of {run['held_out']:.4f}, the plain loop {expected:.4f}"
                )


def _row(name: str, found: list[Run], plain: list[Run], tokens: int) -> list[str]:
    whole = [tokens / run["whole_s"] for run in found]
    steps = [step_speed(run) for run in found]
    of_plain = [median(whole) / median([tokens / run["whole_s"] for run in plain])]
    of_plain.append(median(steps) / median([step_speed(run) for run in plain]))
    return [
        TRAINERS[name][0],
        found[0]["compute"],
        str(len(found)),
        tables.spread([run["whole_s"] for run in found]),
        tables.spread(whole),
        f"{100 * of_plain[0]:.0f} %",
        tables.spread(steps),
        f"{100 * of_plain[1]:.0f} %",
        f"{found[0]['losses'][0]:.4f}",
        f"{found[0]['held_out']:.4f}",
        tables.spread([run["peak_gib"] for run in found]),
    ]


def _is_due(name: str, runs: dict[str, list[Run]], device: str) -> bool:
    """Return whether a trainer has a turn in this round."""
    if name == "ours-fp32" and "ours" in runs:
        return device == "cpu" and runs["ours"][-1]["compute"] == "bf16"
    return device == "cuda" or name not in _ONCE or not runs[name]


def _where(device: str, threads: int) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"{threads} threads"


_HEADER = [
    "",
    "compute",
    "runs",
    "whole run, s",
    "real tokens/s, whole run",
    "of plain",
    "real tokens/s, steps alone",
    "of plain",
    "loss, first step",
    "held-out loss after",
    "peak memory, GiB",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=TRAINERS, help="leave the others out; writes no table")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--digest", help=argparse.SUPPRESS)
    parser.add_argument("--one", choices=TRAINERS, help=argparse.SUPPRESS)
    parser.add_argument("--judge", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps <= SKIPPED_STEPS:
        parser.error(f"--steps must be above {SKIPPED_STEPS}, as the first ones are left out of the steps' speed")
    threads = arguments.threads
    if arguments.folder:
        work = Workload(arguments.folder, arguments.digest)
        found = measure(arguments.one, work, threads) if arguments.one else judge(work, arguments.judge)
        print(json.dumps(found))
        return
    from demo.assets import ensure_model

    model_folder = ensure_model()
    runs: dict[str, list[Run]] = {name: [] for name in arguments.only or TRAINERS}
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        works = [
            prepare(Path(temporary, str(number)), model_folder, arguments.steps, threads, arguments.device)
            for number in range(arguments.runs)
        ]
        for number, work in enumerate(works, start=1):
            for name, found in runs.items():
                if not _is_due(name, runs, arguments.device):
                    continue
                own = work
                if name == "ours-fp32":  # in a run of its own, or it would find ours committed
                    folder = Path(temporary, f"{number}-fp32")
                    own = prepare(folder, model_folder, arguments.steps, threads, arguments.device)
                run = _child(own, threads, "--one", name)
                run |= _child(own, threads, "--judge", run["adapter"])
                found.append(run)
                told = f"{run['whole_s']:.1f} s, {step_speed(run):.1f} tokens/s in steps"
                print(f"run {number} {name}: {told}, held-out {run['held_out']:.4f}", file=sys.stderr, flush=True)
        before = _child(works[0], threads, "--judge", "")["held_out"]
        steps, rows, held_out_rows = works[0].steps, works[0].batch_rows, len(works[0].held_out)
    if arguments.only:
        return
    check_same_work(runs)
    tokens = sum(len(row.input_ids) for step in steps for row in step)
    padded = sum(max(len(row.input_ids) for row in step) * len(step) for step in steps)
    body = (
        f"SmolLM2-135M-Instruct, LoRA rank {RANK} on all linear layers, {_where(arguments.device, threads)}; "
        f"{len(steps)} steps of {rows} rows of conversations, {tokens} real tokens ({padded} when padded), "
        f"{held_out_rows} held-out rows measured before and after; runs in turns, medians (quartiles). "
        f"Held-out loss of the base model: {before:.4f}."
        "\n\n"
        + tables.table(_HEADER, [_row(name, found, runs["plain"], tokens) for name, found in runs.items() if found])
        + "\n\n**Whole run**: from the model's load to the exported adapter, imports left out; each with its own "
        "held-out losses before and after and a checkpoint; ours also fetches the model, answers sample prompts, "
        "reloads the adapter, hashes and commits. **Steps alone** leave the first "
        f"{SKIPPED_STEPS} out. The first losses of our run and the plain loop, whose rows and precision are the same, "
        f"agree to {SAME_FIRST_LOSS[runs['plain'][0]['compute']]}, and each adapter, judged by plain PEFT in fp32, is "
        f"within {SAME_HELD_OUT_RATIO:.0%} of the plain loop's held-out loss, or this table is not written."
    )
    on_gpu = arguments.device == "cuda"
    tables.write(
        "throughput-gpu" if on_gpu else "throughput",
        f"Whole run and step on {'a GPU' if on_gpu else 'the CPU'}",
        "python -m bench.throughput" + (" --device cuda" if on_gpu else ""),
        ["torch", "transformers", "peft", "trl"],
        body,
    )


if __name__ == "__main__":
    main()
