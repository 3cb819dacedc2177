"""Preference methods on SmolLM2-135M: ours, TRL's trainers and a plain loop on the same tokens.

Pairs have answers of 200 tokens under prompts of 50, 300 and 1,500. Every run is a process of its own with pinned
threads, in fp32, from the same adapter. A run's speed counts the steps but the first, and what is computed of the
reference before them for as many pairs. `tokens` is how many times as many tokens are read as there are different
ones: the bound of what computing each prompt once could gain.

There is no table unless losses agree at the first and at the last step; ORPO's, whose likelihood TRL takes over the
prompt too, by the log odds ratio of the first.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from bench import child, preference_trainers, tables
from bench.preference_trainers import Timed
from bench.preference_work import ANSWER_TOKENS, Case, PreferenceWork
from bench.workload import RANK, Workload

SKIPPED_STEPS = 1
SAME_LOSS = 2e-3  # nats; TRL rounds what it logs
TRAINERS: dict[str, Callable[[PreferenceWork], Timed]] = {
    "ours": preference_trainers.ours,
    "plain": preference_trainers.plain,
    "trl-dpo": lambda work: preference_trainers.trl_dpo(work, precompute=False),
    "trl-dpo-before": lambda work: preference_trainers.trl_dpo(work, precompute=True),
    "trl-orpo": preference_trainers.trl_orpo,
    "trl-kto": preference_trainers.trl_kto,
}
_WORDS = {
    "ours": "finetune-operator",
    "plain": "plain loop, transformers + PEFT",
    "trl-dpo": "TRL",
    "trl-dpo-before": "TRL, reference precomputed",
    "trl-orpo": "TRL",
    "trl-kto": "TRL",
}
_DPO = ("ours", "plain", "trl-dpo", "trl-dpo-before")
CASES: dict[Case, tuple[str, ...]] = {
    Case("DPO", 50, batch=2): _DPO,
    Case("DPO", 300, batch=1): _DPO,
    Case("DPO", 1500, batch=1): _DPO,
    Case("ORPO", 300, batch=1): ("ours", "trl-orpo"),
    Case("KTO", 300, batch=2): ("ours", "trl-kto"),
}


class Speed(NamedTuple):
    """Pairs or answers a second."""

    whole: float  # the reference among it
    steps: float


def measure(name: str, work: PreferenceWork, threads: int) -> dict[str, Any]:
    """Return what one run took, in this process."""
    import torch

    for module in ("transformers.trainer", "peft", "finetune_trainer.train"):
        import_module(module)  # no part of the run: everybody pays for them
    torch.set_num_threads(threads)
    return asdict(TRAINERS[name](work)) | {"peak_gib": child.peak_bytes("cpu") / 2**30}


def speed(run: dict[str, Any], batch: int) -> Speed:
    """Return the speed of the counted steps, and with the reference's time of as many examples."""
    steps, counted = len(run["step_s"]), run["step_s"][SKIPPED_STEPS:]
    examples, seconds = batch * len(counted), sum(counted)
    return Speed(examples / (seconds + run["reference_s"] * len(counted) / steps), examples / seconds)


def check_same_work(case: Case, runs: dict[str, dict[str, Any]]) -> None:
    """Raise SystemExit where losses say that the runs did not do the same work."""
    places = [("losses", 0), ("losses", -1)] if case.method != "ORPO" else [("log_odds", 0)]
    for figure, step in places:
        found = {name: run[figure][step] for name, run in runs.items()}
        if max(found.values()) - min(found.values()) > SAME_LOSS:
            raise SystemExit(f"{case.name}: {figure} of step {step} differ, so this is not the same work: {found}")


def _row(case: Case, name: str, runs: dict[str, dict[str, Any]], work: PreferenceWork) -> list[str]:
    run, own, ours = runs[name], speed(runs[name], case.batch), speed(runs["ours"], case.batch)
    return [
        case.method,
        f"{case.prompt_tokens:,}",
        _WORDS[name],
        f"{own.whole:.3f}",
        "" if name == "ours" else f"{ours.whole / own.whole:.2f}",
        f"{own.steps:.3f}",
        "" if name == "ours" else f"{ours.steps / own.steps:.2f}",
        f"{run['losses'][0]:.4f}",
        f"{run['losses'][-1]:.4f}",
        f"{run['peak_gib']:.2f}",
        f"{work.tree_ratio:.2f}" if name == "ours" else "",
    ]


def _header(steps: int) -> list[str]:
    return [
        "method",
        "prompt",
        "",
        "examples/s, reference included",
        "ours ÷ this",
        "examples/s, steps alone",
        "ours ÷ this",
        "loss, first step",
        f"loss, step {steps}",
        "peak memory, GiB",
        "tokens",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    names = [case.name for case in CASES]
    parser.add_argument("--only", nargs="+", choices=names, help="leave the others out; writes no table")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--digest", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--one", choices=TRAINERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps <= SKIPPED_STEPS:
        parser.error(f"--steps must be above {SKIPPED_STEPS}, as the first ones are left out of the speed")
    if arguments.folder:
        case = next(case for case in CASES if case.name == arguments.case)
        work = PreferenceWork(case, Workload(arguments.folder, arguments.digest))
        print(json.dumps(measure(arguments.one, work, arguments.threads)))
        return
    from demo.assets import ensure_model

    wanted, model_folder = arguments.only or names, ensure_model()
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        for case, trainers in CASES.items():
            if case.name in wanted:
                folder = Path(temporary, case.name)
                work = PreferenceWork.prepare(folder, case, model_folder, arguments.steps, arguments.threads)
                rows += _measured(case, trainers, work, arguments.threads)
    body = (
        f"SmolLM2-135M-Instruct, LoRA rank {RANK} on all linear layers, fp32, {arguments.threads} threads; "
        f"{arguments.steps} steps, answers of {ANSWER_TOKENS} tokens; the first step is left out of the speeds.\n\n"
        + tables.table(_header(arguments.steps), rows)
        + "\n\nExamples are pairs, of KTO answers. **Reference included**: what the model that the job began with says "
        "of them, which ours computes before the first step, as TRL does where it is told to; TRL else computes it in "
        "each step. **Steps alone**: without what is computed before them. **tokens**: of both whole sequences, "
        "divided by those of the prompt once and both answers, the most that computing prompts once could gain. Losses "
        f"agree to {SAME_LOSS} at the first and the last step, or this table is not written; of ORPO, whose likelihood "
        "TRL takes over the prompt too, the log odds ratio of the first step does. Peak memory is that of the whole "
        "process."
    )
    if arguments.only:
        print(body)
        return
    tables.write(
        "preference",
        "Preference methods on the CPU",
        "python -m bench.preference",
        ["torch", "transformers", "peft", "trl"],
        body,
    )


def _measured(case: Case, trainers: tuple[str, ...], work: PreferenceWork, threads: int) -> list[list[str]]:
    """Return the rows of one case. Ours is first, as the others begin with its adapter."""
    runs: dict[str, dict[str, Any]] = {}
    own = ("--folder", str(work.run.folder), "--digest", work.run.plan_digest, "--case", case.name)
    for name in trainers:
        runs[name] = child.run("bench.preference", threads, *own, "--one", name)
        found = speed(runs[name], case.batch)
        told = f"{found.whole:.3f} examples/s, {found.steps:.3f} in steps, losses {runs[name]['losses']}"
        print(f"{case.name} {name}: {told}", file=sys.stderr, flush=True)
    check_same_work(case, runs)
    return [_row(case, name, runs, work) for name in trainers]


if __name__ == "__main__":
    main()
